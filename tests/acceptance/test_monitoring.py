"""A running gateway keeps the facts of a study and runs its recurring jobs in a worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from gateway.cli import app
from storage.records import StudyFacts
from tests.support.waiting import wait_until
from tests.support.whole_gateway import WholeGateway, gateway_to_an_archive


@pytest.mark.requirement("CARD-05")
@pytest.mark.requirement("ART-20", open="the fine-tuning that an alarm starts")
def test_facts_are_kept_as_a_study_passes_and_the_drift_job_runs_in_a_worker(tmp_path: Path) -> None:
    with gateway_to_an_archive(tmp_path) as gateway:
        study = gateway.write_study("facts")
        gateway.send(study.files)
        gateway.wait_for_state(study.uid, "verified")
        (result,) = gateway.results(study.uid)
        with gateway.database.reading() as session:
            facts = session.get_one(StudyFacts, result.result_id)
        assert facts.image is not None
        assert facts.acquisition["categories"]["modality"] == "MR"
        ran = CliRunner().invoke(app, ["schedule", "run", "drift", "--config", str(gateway.config)])
        assert (ran.exit_code, "on the queue of the workers" in ran.output) == (0, True), ran.output
        wait_until(lambda: _runs(gateway) == ["SUCCESS"], "the run has ended")


def _runs(gateway: WholeGateway) -> list[str]:
    """The states of the job's workflows."""
    with gateway.database.reading() as session:
        return list(session.scalars(text("SELECT status FROM workflow_status WHERE name = 'run_job'")))
