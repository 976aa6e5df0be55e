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
from gateway.learning.registration import register
from gateway.learning.runs import runs_of
from storage.learning_records import LearningRun, RunState
from storage.models import ModelRegistry
from tests.support import learning_site as site
from tests.support.pacs import free_port
from tests.support.postgresql import postgresql
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, whole_gateway

FOLDS = 5


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeGateway]:
    folder = tmp_path_factory.mktemp("machines")
    trained = site.train(folder / "trained", range(1, 11), folds=FOLDS, epochs=4, iterations=60)
    locked = site.write_dataset(folder / "Dataset903_Locked", range(900, 910))
    nobody = ("NONE", free_port())
    with (
        postgresql() as url,
        whole_gateway(
            folder / "gateway",
            pacs_address=nobody,
            emr_url=f"http://127.0.0.1:{nobody[1]}/fhir",
            worker="heartbeat_s = 0.5\ntakeover_s = 4",
            more=f'[database]\nurl = "{url}"\n',
        ) as gateway,
    ):
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
epochs = 2
iterations = 40
threads = 1
[models.change_plan]
approval = "automatic"
max_dice_loss = 0.2
max_dice_loss_per_label = 0.3
max_runtime_ratio = 20
max_memory_ratio = 3
shadow_studies = 0
"""
        )
        register(gateway.settings, load_bundle(trained.bundle), candidate=False, actor="test")
        gateway.start_receiver()
        for name in ("one", "two"):
            gateway.start("worker", name=name, executor=name)
        yield gateway


@pytest.mark.peer("postgresql")
@pytest.mark.requirement("CARD-05", "ART-21")
def test_two_workers_share_the_folds_and_one_ends_what_the_other_had_begun(gateway: WholeGateway) -> None:
    config = ["--config", str(gateway.config)]
    before = site.write_study(gateway.folder / "sent" / "1", 100, "P100")
    gateway.send(before.files)
    gateway.wait_for_state(before.study_instance_uid, "delivering")
    (result,) = gateway.results(before.study_instance_uid)
    site.run("corrections", "add", result.result_id, "--approve", *config)
    site.run("learn", "start", site.MODEL, *config)

    wait_until(lambda: _run(gateway) and len(_at_work(gateway)) == 2, "both workers train", timeout_s=300)
    gateway.processes["two"].send_signal(signal.SIGKILL)
    wait_until(lambda: _run(gateway).state == RunState.PROMOTED, "the promotion", timeout_s=600)

    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
    assert run.figures is not None
    assert run.figures["folds"] == {str(fold): "done" for fold in range(FOLDS)}
    bundle = load_bundle(ModelRegistry(gateway.settings.models_dir).champion(site.MODEL).folder)
    assert [fold.fold for fold in bundle.configurations[0].folds] == [str(fold) for fold in range(FOLDS)]

    after = site.write_study(gateway.folder / "sent" / "2", 101, "P101")
    gateway.send(after.files)
    gateway.wait_for_state(after.study_instance_uid, "delivering")
    assert [r.model_version for r in gateway.results(before.study_instance_uid)] == ["1.0.0"]
    assert [r.model_version for r in gateway.results(after.study_instance_uid)] == ["1.1.0"]


def _run(gateway: WholeGateway) -> LearningRun:
    gateway.check_alive()
    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
    assert run.state not in (RunState.FAILED, RunState.REFUSED), run.state_reason
    return run


def _at_work(gateway: WholeGateway) -> set[str]:
    """The executors that train a fold now."""
    query = "SELECT executor_id FROM dbos.workflow_status WHERE name = 'train_fold' AND status = 'PENDING'"
    with gateway.database.reading() as session:
        return {str(row[0]) for row in session.execute(text(query)) if row[0]}
