"""kill -9 at every step of a fine-tuning and of the promotion after it: it goes on, once, and a champion always serves.

A worker alone: nobody delivers. Two studies are approved, a fine-tuning is asked for, and the worker dies after each
step, between its own commit and the engine's note of it, in the middle of the training, and between any two aliases of
the registry.
"""
# ruff: noqa: E402

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import select

from tests.support.peers import require_peer

require_peer("torch")

from engine.bundle import load_bundle
from gateway.learning.registration import register
from gateway.learning.runs import run_folder, runs_of
from storage import ledger
from storage.learning_records import LearningRun, RunState, ServingPeriod
from storage.models import ModelRegistry
from storage.records import Executor
from tests.support import learning_site as site
from tests.support.pacs import free_port
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, whole_gateway

_STEPS = ("write cases", "plan", "train", "count", "export", "register", "examine", "offer")
_POINTS = (*(f"{step}:end" for step in _STEPS), "alias-champion", "alias-previous")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    folder = tmp_path_factory.mktemp("learning9")
    trained = site.train(folder / "trained", range(1, 9))
    locked = site.write_dataset(folder / "Dataset903_Locked", range(900, 910))
    nobody = ("NONE", free_port())
    with whole_gateway(
        folder / "gateway", pacs_address=nobody, emr_url=f"http://127.0.0.1:{nobody[1]}/fhir"
    ) as gateway:
        (gateway.config / "routes.toml").write_text(site.ROUTES)
        (gateway.config / "learning.toml").write_text(
            f"""[[models]]
name = "{site.MODEL}"
trained = "{trained.model}"
dataset = "{trained.raw}"
locked = "{locked}"
[models.selection]
least = 1
random_share = 0
[models.fine_tuning]
folds = ["0"]
epochs = 3
iterations = 30
threads = 1
[models.change_plan]
approval = "automatic"
max_dice_loss = 0.1
max_dice_loss_per_label = 0.2
max_runtime_ratio = 20
max_memory_ratio = 3
shadow_studies = 0
"""
        )
        register(gateway.settings, load_bundle(trained.bundle), candidate=False, actor="test")
        gateway.start_receiver()
        gateway.start("worker", lives=True)
        yield gateway


@pytest.mark.requirement("ART-21", "ART-22", "QUE-27")
def test_killed_anywhere_a_fine_tuning_ends_in_one_promotion(gateway: WholeGateway) -> None:
    config = ["--config", str(gateway.config)]
    for seed in (100, 101):
        study = site.write_study(gateway.folder / "sent" / str(seed), seed, f"P{seed}")
        gateway.send(study.files)
        gateway.wait_for_state(study.study_instance_uid, "delivering")
        (result,) = gateway.results(study.study_instance_uid)
        site.run("corrections", "add", result.result_id, "--approve", *config)
    for point in _POINTS:
        gateway.kill_at(point)

    with _ChampionWatch(gateway) as watch:
        site.run("learn", "start", site.MODEL, *config)
        _kill_while_it_trains(gateway)
        wait_until(lambda: _run(gateway).state == RunState.PROMOTED, "the promotion", timeout_s=900)
        gateway.wait_for_death_at(*_POINTS)
    assert watch.looks > 50
    assert watch.without == 0
    assert set(watch.seen) == {"1.0.0", "1.1.0"}

    assert ModelRegistry(gateway.settings.models_dir).champion(site.MODEL).semver == "1.1.0"
    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
        assert run.figures is not None
        assert run.figures["folds"] == {"0": "done"}
        periods = session.scalars(
            select(ServingPeriod).where(ServingPeriod.model_name == site.MODEL).order_by(ServingPeriod.period_id)
        ).all()
        assert [(p.model_version, p.ended_at is None) for p in periods] == [("1.0.0", False), ("1.1.0", True)]
        kinds = Counter(event.kind for event in ledger.events(session, ledger.model_subject(site.MODEL)))
        assert ledger.verify(session) > 0
    once = ("training-queued", "training-training", "training-testing", "training-candidate", "training-promoted")
    assert {kind: kinds[kind] for kind in once} == dict.fromkeys(once, 1)
    assert kinds["model-promoted"] == 2  # the first version, and this one


def _run(gateway: WholeGateway) -> LearningRun:
    gateway.check_alive()
    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
    assert run.state not in (RunState.FAILED, RunState.REFUSED), run.state_reason
    return run


def _kill_while_it_trains(gateway: WholeGateway) -> None:
    """The worker, after the training of the fold has written its first checkpoint."""
    folder = run_folder(gateway.settings.models_dir, _run(gateway).run_id)
    wait_until(lambda: list(folder.rglob("fold_0/checkpoint_*.pth")) and _run(gateway), "a checkpoint", timeout_s=300)
    with gateway.database.reading() as session:
        pid = session.scalars(select(Executor.pid).where(Executor.role == "worker")).one()
    os.kill(pid, signal.SIGKILL)


class _ChampionWatch:
    """Asks all the time which version serves."""

    def __init__(self, gateway: WholeGateway) -> None:
        self.looks, self.without = 0, 0
        self.seen: Counter[str] = Counter()
        self._registry = ModelRegistry(gateway.settings.models_dir)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _ChampionWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            champions = [m.semver for m in self._registry.versions(site.MODEL) if m.state == "champion"]
            self.looks += 1
            self.seen.update(champions)
            self.without += len(champions) != 1
