"""A training on PostgreSQL with two workers: both train folds, one is killed, and the other ends what it had begun."""
# ruff: noqa: E402

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from tests.support.peers import require_peer

require_peer("torch")

from engine.bundle import load_bundle
from gateway.learning.runs import runs_of
from storage.learning_records import RunState
from storage.models import ModelRegistry
from tests.support import learning_site as site
from tests.support.learning_gateway import approve, learning_gateway, only_run, send_patient
from tests.support.postgresql import postgresql
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway

FOLDS = 5


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    folder = tmp_path_factory.mktemp("machines")
    trained = site.train(folder / "trained", range(1, 11), folds=FOLDS, epochs=4, iterations=60)
    with (
        postgresql() as url,
        learning_gateway(
            folder,
            trained,
            fine_tuning="epochs = 2\niterations = 40",
            worker="heartbeat_s = 0.5\ntakeover_s = 4",
            more=f'[database]\nurl = "{url}"\n',
        ) as gateway,
    ):
        for name in ("one", "two"):
            gateway.start("worker", name=name, executor=name)
        yield gateway


@pytest.mark.peer("postgresql")
@pytest.mark.requirement("CARD-05", "ART-21")
def test_two_workers_share_the_folds_and_one_ends_what_the_other_had_begun(gateway: WholeGateway) -> None:
    before = send_patient(gateway, 100)
    approve(gateway, before)
    site.run("learn", "start", site.MODEL, "--config", str(gateway.config))

    wait_until(lambda: only_run(gateway) and len(_at_work(gateway)) == 2, "both workers train", timeout_s=300)
    gateway.processes["two"].send_signal(signal.SIGKILL)
    wait_until(lambda: only_run(gateway).state == RunState.PROMOTED, "the promotion", timeout_s=600)

    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
    assert run.figures is not None
    assert run.figures["folds"] == {str(fold): "done" for fold in range(FOLDS)}
    bundle = load_bundle(ModelRegistry(gateway.settings.models_dir).champion(site.MODEL).folder)
    assert [fold.fold for fold in bundle.configurations[0].folds] == [str(fold) for fold in range(FOLDS)]

    after = send_patient(gateway, 101)
    assert [r.model_version for r in gateway.results(before.study_instance_uid)] == ["1.0.0"]
    assert [r.model_version for r in gateway.results(after.study_instance_uid)] == ["1.1.0"]


def _at_work(gateway: WholeGateway) -> set[str]:
    """The executors that train a fold now."""
    query = "SELECT executor_id FROM dbos.workflow_status WHERE name = 'train_fold' AND status = 'PENDING'"
    with gateway.database.reading() as session:
        return {str(row[0]) for row in session.execute(text(query)) if row[0]}
