"""The whole loop without a hand, on PostgreSQL with two workers: drift, fine-tuning, tests, promotion, and a bad
version that is rolled back.

Studies of a second scanner arrive. The nightly jobs run each minute here, and a reader answers what is asked of
readers. Everything else the gateway does by itself: alarm, fine-tuning, candidate, sanity suite, shadow, promotion.
Then a version whose sides are exchanged is forced into service.
"""
# ruff: noqa: E402

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from tests.support.peers import ROOT, require_peer

require_peer("torch")

from engine.bundle import load_bundle
from engine.nifti import write_nifti
from engine.volume import Geometry, LabelMap
from gateway.cli import app
from gateway.learning.runs import runs_of
from storage.learning_records import RunState, ServingPeriod, ShadowRun
from storage.models import ModelRegistry
from storage.records import Alarm, Delivery, Executor, LedgerEvent, Result, ResultState, Study
from tests.support import learning_site as site
from tests.support.phantoms import PhantomSeries, asymmetric_labels, phantom_affine
from tests.support.postgresql import postgresql
from tests.support.running_gateway import RunningGateway, running_gateway

pytestmark = [pytest.mark.requirement("CARD-05"), pytest.mark.peer("postgresql")]

REFERENCE, WINDOW, AFTER, BAD = 60, 30, 6, 4
GATEWAY = """
[scheduler]
drift_cron = "* * * * *"
learning_cron = "* * * * *"

[drift]
reference_studies = 60
"""


@dataclass(frozen=True)
class Loop:
    gateway: RunningGateway
    patients: list[str]
    folder: Path

    def send(self, seeds: range, scanner: site.Scanner) -> list[PhantomSeries]:
        sent = []
        for seed in seeds:
            sent.append(site.write_study(self.folder / "sent" / str(seed), seed, self.patients[seed], scanner))
            self.gateway.send(sent[-1].files)
        return sent

    def wait_for_results(self, studies: list[PhantomSeries], *, timeout_s: float = 300) -> None:
        uids = [study.study_instance_uid for study in studies]

        def ended(session: Session) -> bool:
            states = session.scalars(select(Study.state).where(Study.study_instance_uid.in_(uids))).all()
            return len(states) == len(uids) and set(states) == {"verified"}

        self.gateway.wait_for(f"{len(uids)} studies verified", ended, timeout_s=timeout_s)

    def results_of(self, studies: list[PhantomSeries]) -> list[Result]:
        with self.gateway.database.reading() as session:
            uids = [study.study_instance_uid for study in studies]
            return list(session.scalars(select(Result).where(Result.study_instance_uid.in_(uids))))


class Reader:
    """A person who reads what is waiting for labels, and knows the truth."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._stop = loop, threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        affine = phantom_affine("axial", spacing_mm=site.SPACING_MM, shape=site.SHAPE)
        self._labels = loop.folder / "truth.nii.gz"
        array = asymmetric_labels(affine, site.SHAPE)
        write_nifti(LabelMap(array=array, geometry=Geometry(affine_lps=affine, shape=site.SHAPE)), self._labels)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    @staticmethod
    def _says(*words: str) -> bool:
        return CliRunner().invoke(app, ["corrections", "add", *words]).exit_code == 0

    def _read(self) -> None:
        from storage.learning_records import Correction, ReviewTask

        config = str(self._loop.gateway.config)
        while not self._stop.wait(1.0):
            with self._loop.gateway.database.reading() as session:
                tasks = session.scalars(
                    select(ReviewTask).where(ReviewTask.kind == "label", ReviewTask.closed_at.is_(None))
                ).all()
                wanted = [result_id for task in tasks for result_id in task.result_ids]
                read = set(session.scalars(select(Correction.result_id)))
            for result_id in wanted:
                if result_id not in read:
                    corrected = ["--nifti", str(self._labels)]
                    if not self._says(result_id, *corrected, "--config", config):
                        assert self._says(result_id, "--approve", "--config", config)  # it was right


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    folder = tmp_path_factory.mktemp("loop")
    trained = site.train(folder / "trained", range(1, 13))
    locked = site.write_dataset(folder / "Dataset903_Locked", range(900, 912))
    learning = f"""
[[models]]
name = "{site.MODEL}"
trained = "{trained.model}"
dataset = "{trained.raw}"
locked = "{locked}"
[models.selection]
least = 6
most = 12
[models.fine_tuning]
epochs = 2
iterations = 20
threads = 1
[models.change_plan]
approval = "automatic"
max_dice_loss = 0.05
max_dice_loss_per_label = 0.1
max_runtime_ratio = 10
max_memory_ratio = 3
shadow_studies = 3
watch_studies = 20
watch_least = 2
max_hold_rate = 0.4
"""
    patients = [f"LOOP-{seed:04}" for seed in range(1, 400)]
    with (
        postgresql() as url,
        running_gateway(
            folder,
            routes=site.ROUTES,
            bundles=[load_bundle(trained.bundle)],
            patients=patients,
            gateway_toml=f'{GATEWAY}\n[database]\nurl = "{url}"\n',
            learning_toml=learning,
        ) as gateway,
        _second_worker(gateway, folder / "second.log"),
    ):
        yield Loop(gateway, patients, folder)


@contextmanager
def _second_worker(gateway: RunningGateway, log: Path) -> Iterator[None]:
    """As on another machine that shares the database and the state folder."""
    command = [sys.executable, "-m", "gateway.role", "worker", "--config", str(gateway.config)]
    environment = {**os.environ, "SEGGATE_EXECUTOR": "second", "TCP_NODELAY": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT, env=environment)
    try:
        gateway.wait_for("the second worker", lambda s: len(_workers(s)) == 2)
        yield
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_from_the_second_scanner_to_the_new_version_and_from_a_bad_one_back(loop: Loop) -> None:
    gateway = loop.gateway
    first = loop.send(range(100, 100 + REFERENCE), site.first_scanner)
    second = loop.send(range(200, 200 + WINDOW), site.second_scanner)
    loop.wait_for_results([*first, *second], timeout_s=600)
    assert {r.model_version for r in loop.results_of([*first, *second])} == {"1.0.0"}

    gateway.wait_for("the drift alarm", lambda s: _alarmed(s, "drift"), timeout_s=150)
    with Reader(loop):
        gateway.wait_for("a candidate", lambda s: bool(_runs(s, RunState.CANDIDATE, RunState.PROMOTED)), timeout_s=600)
        # The candidate runs in shadow on what arrives now.
        shadowed = loop.send(range(250, 250 + AFTER), site.second_scanner)
        gateway.wait_for("the promotion", lambda s: bool(_runs(s, RunState.PROMOTED)), timeout_s=300)
    loop.wait_for_results(shadowed)
    with gateway.database.reading() as session:
        shadow = session.scalars(select(ShadowRun).where(ShadowRun.state == "done")).all()
        assert len(shadow) >= 3
        assert {run.model_version for run in shadow} == {"1.1.0"}

    after = loop.send(range(270, 270 + AFTER), site.second_scanner)
    loop.wait_for_results(after)
    assert {r.model_version for r in loop.results_of(after)} == {"1.1.0"}

    _force_bad_version(loop)
    bad = loop.send(range(290, 290 + BAD), site.second_scanner)
    gateway.wait_for("the rollback", lambda s: _served(s)[-1] == ("1.1.0", None), timeout_s=300)
    last = loop.send(range(310, 310 + AFTER), site.second_scanner)
    loop.wait_for_results([*bad, *last])
    assert {r.model_version for r in _current(loop.results_of(last))} == {"1.1.0"}

    everything = [*first, *second, *shadowed, *after, *bad, *last]
    current = _current(loop.results_of(everything))
    assert len(current) == len(everything)
    assert len({r.study_instance_uid for r in current}) == len(everything)
    assert all(r.state == ResultState.RELEASED and r.model_version and r.weights_digest for r in current)
    with gateway.database.reading() as session:
        periods = _served(session)
        assert [version for version, _ in periods] == ["1.0.0", "1.1.0", "1.2.0", "1.1.0"]
        kinds = session.scalars(
            select(LedgerEvent.kind).where(LedgerEvent.subject == f"model:{site.MODEL}").order_by(LedgerEvent.sequence)
        ).all()
        executors = set(session.execute(text(_WORKED)).scalars())
        sent = session.execute(select(Delivery.result_id, func.count()).group_by(Delivery.result_id)).all()
    assert {"training-queued", "training-candidate", "model-examined", "model-promoted", "model-rolled-back"} <= set(
        kinds
    )
    assert len(executors) == 2, "only one worker has worked"
    assert {row.result_id for row in sent} >= {r.result_id for r in current}
    site.run("audit", "verify", "--config", str(gateway.config))  # fails where a chain is broken
    for study in [bad[0], last[0]]:
        assert len([o for o in gateway.in_pacs(study.study_instance_uid) if o["modality"] == "SEG"]) == 1


_WORKED = "SELECT DISTINCT executor_id FROM dbos.workflow_status WHERE name = 'make_result' AND status = 'SUCCESS'"


def _force_bad_version(loop: Loop) -> None:
    """1.2.0: the champion's own networks, whose labels have changed sides."""
    registry = ModelRegistry(loop.gateway.settings.models_dir)
    good = load_bundle(registry.get(site.MODEL, "1.1.0").folder)
    bad = site.write_exchanged(good, loop.folder / "bad", semver="1.2.0")
    config = str(loop.gateway.config)
    site.run("models", "import", str(bad), "--candidate", "--config", config)
    site.run("models", "promote", site.MODEL, "1.2.0", "--force", "--reason", "a drill", "--config", config)


def _alarmed(session: Session, kind: str) -> bool:
    return session.scalars(select(Alarm).where(Alarm.kind == kind)).first() is not None


def _workers(session: Session) -> list[str]:
    query = select(Executor.executor_id).where(Executor.role == "worker", Executor.stopped_at.is_(None))
    return list(session.scalars(query))


def _runs(session: Session, *states: RunState) -> list[str]:
    return [run.run_id for run in runs_of(session, site.MODEL, states)]


def _served(session: Session) -> list[tuple[str, object]]:
    rows = session.scalars(select(ServingPeriod).order_by(ServingPeriod.period_id)).all()
    return [(row.model_version, row.ended_at) for row in rows]


def _current(results: list[Result]) -> list[Result]:
    return [result for result in results if result.state != ResultState.SUPERSEDED]
