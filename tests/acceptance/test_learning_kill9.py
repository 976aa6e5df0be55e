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

from gateway.learning.runs import run_folder, runs_of
from storage import ledger
from storage.learning_records import RunState, ServingPeriod
from storage.models import ModelRegistry
from storage.records import Executor
from tests.support import learning_site as site
from tests.support.learning_gateway import approve, learning_gateway, only_run, send_patient
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway

_STEPS = ("write cases", "plan", "train", "count", "export", "register", "examine", "offer")
_POINTS = (*(f"{step}:end" for step in _STEPS), "alias-champion", "alias-previous")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    folder = tmp_path_factory.mktemp("learning9")
    trained = site.train(folder / "trained", range(1, 9))
    with learning_gateway(folder, trained, fine_tuning='folds = ["0"]\nepochs = 3\niterations = 30') as gateway:
        gateway.start("worker", lives=True)
        yield gateway


@pytest.mark.requirement("ART-21", "ART-22", "QUE-27")
def test_killed_anywhere_a_fine_tuning_ends_in_one_promotion(gateway: WholeGateway) -> None:
    for seed in (100, 101):
        approve(gateway, send_patient(gateway, seed))
    for point in _POINTS:
        gateway.kill_at(point)

    with _ChampionWatch(gateway) as watch:
        site.run("learn", "start", site.MODEL, "--config", str(gateway.config))
        _kill_while_it_trains(gateway)
        wait_until(lambda: only_run(gateway).state == RunState.PROMOTED, "the promotion", timeout_s=900)
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


def _kill_while_it_trains(gateway: WholeGateway) -> None:
    """The worker, after the training of the fold has written its first checkpoint."""
    folder = run_folder(gateway.settings.models_dir, only_run(gateway).run_id)
    wait_until(
        lambda: list(folder.rglob("fold_0/checkpoint_*.pth")) and only_run(gateway), "a checkpoint", timeout_s=300
    )
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
