"""The scheduler's retraining check, by its cron line alone: a full training of a model that has new labelled cases.

Here it is due each minute. A reader approves one study; the scheduler starts the job, the job asks for a full training
from the beginning with the old cases and the new one, and its workflows end with a version that was examined.
"""
# ruff: noqa: E402

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from tests.support.peers import require_peer

require_peer("torch")

from engine.bundle import load_bundle
from engine.dataset import open_dataset
from gateway.learning.case_writing import case_name
from gateway.learning.runs import runs_of
from storage.learning_records import Correction, GateReport, LearningRun, RunState
from tests.support import learning_site as site
from tests.support.running_gateway import RunningGateway, running_gateway

OLD = range(1, 7)
PATIENT = "RETRAIN-1"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("retraining")
    trained = site.train(folder / "trained", OLD, epochs=2, iterations=20)
    locked = site.write_dataset(folder / "Dataset903_Locked", range(900, 910))
    learning = f"""
[[models]]
name = "{site.MODEL}"
trained = "{trained.model}"
dataset = "{trained.raw}"
locked = "{locked}"
[models.selection]
least = 1
random_share = 0
[models.fine_tuning]
folds = ["0"]
threads = 1
[models.retraining]
epochs = 1
iterations = 5
"""
    with running_gateway(
        folder,
        routes=site.ROUTES,
        bundles=[load_bundle(trained.bundle)],
        patients=[PATIENT],
        gateway_toml='[scheduler]\nretraining_cron = "* * * * *"\ndrift_cron = ""\nlearning_cron = ""\n',
        learning_toml=learning,
    ) as gateway:
        yield gateway


@pytest.mark.requirement("CARD-05", "ART-21")
def test_the_cron_line_starts_one_full_training_with_the_old_and_the_new_cases(
    gateway: RunningGateway, tmp_path: Path
) -> None:
    study = site.write_study(tmp_path / "sent", 100, PATIENT)
    gateway.send(study.files)
    document = gateway.wait_until_ended(study.study_instance_uid, timeout_s=300)
    (result,) = document["results"]
    with gateway.database.reading() as session:
        assert runs_of(session, site.MODEL) == []  # without a label there is nothing to learn
    site.run("corrections", "add", result["result_id"], "--approve", "--config", str(gateway.config))

    gateway.wait_for("the training is asked for", lambda s: bool(runs_of(s, site.MODEL)), timeout_s=300)
    gateway.wait_for("the version is examined", _is_over, timeout_s=900)
    with gateway.database.reading() as session:
        (run,) = runs_of(session, site.MODEL)
        assert (run.kind, run.requested_by, run.reason) == ("retraining", "policy", "retraining_cron")
        assert run.figures is not None
        assert run.figures["folds"] == {"0": "done"}
        assert [case["result_id"] for case in run.cases or []] == [result["result_id"]]
        assert session.scalars(select(Correction.learnt_by)).all() == [run.run_id]
        (report,) = session.scalars(select(GateReport)).all()
        assert (report.change, report.model_version) == ("retraining", run.semver)
        jobs = session.scalars(text("SELECT workflow_uuid FROM workflow_status WHERE workflow_uuid LIKE 'job retr%'"))
        assert all(str(name).endswith(":00+00:00") for name in jobs)  # started by the line and by nobody else
    (raw,) = (gateway.settings.models_dir / str(run.folder)).rglob("raw/*/dataset.json")
    names = {case.name for case in open_dataset(raw.parent).cases}
    assert names == {*(f"patient_{seed:04}" for seed in OLD), case_name(result["result_id"])}


def _is_over(session: Session) -> bool:
    (run,) = runs_of(session, site.MODEL)
    assert run.state != RunState.FAILED, _why(run)
    return run.state in (RunState.CANDIDATE, RunState.REFUSED, RunState.PROMOTED)


def _why(run: LearningRun) -> str:
    return f"{run.kind} has failed: {run.state_reason}"
