"""What is parked for a destination is given up by a person, with the reason; the rest is left alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from gateway import parking
from gateway.cli import app
from gateway.destination_settings import DestinationSettings
from gateway.retrying import retriable_studies, retry_study
from gateway.withholding import withhold_parked
from storage import ledger
from storage.alarms import open_alarms, raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, ResultState, Study, StudyState
from tests.support.story_rows import STUDY_UID, NotedQueue, add_delivery, add_result, add_study, add_version

_REMOVED = "destinations.toml no longer names this destination"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Two studies: of each, the delivery to `orthanc` is parked and the one to `vna` has arrived."""
    database = Database(f"sqlite:///{tmp_path / 'seggate.sqlite'}")
    database.create_all()
    with database.session() as session:
        for uid in (STUDY_UID, "1.9"):
            add_study(session, StudyState.DELIVERING, uid=uid)
            add_version(session, uid=uid)
            add_result(session, ResultState.RELEASED, uid=uid, result_id=f"of {uid}")
            add_delivery(session, DeliveryState.VERIFIED, destination="vna", result_id=f"of {uid}")
            parked = add_delivery(session, DeliveryState.QUEUED, destination="orthanc", result_id=f"of {uid}")
            raise_alarm(session, kind="report-held", subject=f"delivery:{parked.delivery_id}", message="")
            parking.park_delivery(session, parked.delivery_id, _REMOVED)
    yield database
    database.close()


def states(database: Database) -> dict[str, tuple[str, str | None]]:
    with database.reading() as session:
        return {s.study_instance_uid: (s.state, s.state_reason) for s in session.scalars(select(Study))}


def test_what_is_withheld_no_longer_fails_its_study_and_retry_leaves_it_alone(database: Database) -> None:
    assert set(states(database).values()) == {(StudyState.FAILED, f"delivery to orthanc: {_REMOVED}")}
    withheld = withhold_parked(database, "orthanc", reason="replaced by vna", actor="user:jo")
    assert [(w.study_instance_uid, w.deliveries, w.state) for w in withheld] == [
        (STUDY_UID, 1, "verified"),
        ("1.9", 1, "verified"),
    ]
    assert set(states(database).values()) == {(StudyState.VERIFIED, None)}
    with database.reading() as session:
        assert open_alarms(session) == []
        event = ledger.events(session, ledger.study_subject(STUDY_UID))[-1]
        rows = session.scalars(select(Delivery).where(Delivery.destination == "orthanc")).all()
    assert {(d.state, d.state_reason) for d in rows} == {("withheld", "a person decided: replaced by vna")}
    assert (event.kind, event.actor, event.detail["parked_for"]) == ("delivery-withheld", "user:jo", _REMOVED)
    assert retriable_studies(database) == []
    assert not retry_study(database, NotedQueue(), DestinationSettings(), STUDY_UID, actor="user:jo").anything
    assert withhold_parked(database, "orthanc", reason="again", actor="user:jo") == []


def test_only_the_named_destination_and_study_are_touched(database: Database) -> None:
    assert withhold_parked(database, "vna", reason="x", actor="user:jo") == []
    withhold_parked(database, "orthanc", reason="x", actor="user:jo", study_instance_uid="1.9")
    assert states(database) == {
        STUDY_UID: (StudyState.FAILED, f"delivery to orthanc: {_REMOVED}"),
        "1.9": (StudyState.VERIFIED, None),
    }


def test_a_study_with_something_else_parked_stays_failed_and_alarmed(database: Database) -> None:
    with database.session() as session:
        other = add_delivery(session, DeliveryState.QUEUED, destination="emr", result_id="of 1.9")
        parking.park_delivery(session, other.delivery_id, "refused")
    withhold_parked(database, "orthanc", reason="x", actor="user:jo")
    assert states(database)["1.9"] == (StudyState.FAILED, "delivery to emr: refused")
    with database.reading() as session:
        assert [(a.kind, a.subject) for a in open_alarms(session)] == [("parked", "study:1.9")]


def test_the_command_says_what_it_did(database: Database, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    (config / "gateway.toml").write_text(f'[database]\nurl = "sqlite:///{tmp_path / "seggate.sqlite"}"\n')
    for name in ("routes", "destinations", "logging"):
        (config / f"{name}.toml").write_text("")

    def withhold(*arguments: str) -> tuple[int, str]:
        run = CliRunner().invoke(app, ["withhold", *arguments, "--reason", "replaced", "--config", str(config)])
        return run.exit_code, run.output

    assert withhold("vna") == (1, "seggate: nothing is parked for 'vna'\n")
    assert withhold("orthanc", "--study", "1.9") == (0, "1.9: deliveries withheld: 1; its state is verified\n")
    code, output = withhold("orthanc", "--json")
    assert (code, json.loads(output)) == (0, [{"study_instance_uid": STUDY_UID, "deliveries": 1, "state": "verified"}])
