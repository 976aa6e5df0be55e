"""What is kept of a destination between attempts, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select, text
from structlog.testing import capture_logs

from gateway.delivery.attempt import DESTINATION_REFUSES, FALLBACK_ENCODING, QUERY_REFUSES
from gateway.delivery.contact import DESTINATION_AWAY, AnyDestination, destination_row, note_contact
from gateway.settings import DicomWebDestination, DimseDestination
from storage.alarms import open_alarms, raise_alarm
from storage.database import Database
from storage.records import DestinationState
from tests.support.waiting import PATIENCE_S, wait_until

_PACS = DimseDestination(name="pacs", ae_title="PACS", host="192.0.2.1", port=104)


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_two_processes_at_first_contact_share_one_row(database: Database) -> None:
    errors: list[BaseException] = []

    def second() -> None:
        try:
            with database.session() as session:
                assert destination_row(session, _PACS).failures == 0
        except BaseException as error:  # noqa: BLE001 - reported to the test's thread
            errors.append(error)

    other = threading.Thread(target=second)
    with database.session() as session:
        destination_row(session, _PACS)
        session.flush()
        other.start()
        if not database.is_sqlite:  # it has seen no row and waits for ours to be committed
            wait_until(lambda: _waiting_for_a_lock(database), "the second one inserts")
    other.join(PATIENCE_S)
    assert (other.is_alive(), errors) == (False, [])
    with database.reading() as session:
        assert [row.name for row in session.scalars(select(DestinationState))] == ["pacs"]


@pytest.mark.requirement("OUT-44", open="RTSTRUCT, GSPS, PDF")
@pytest.mark.parametrize(
    "now",
    [
        _PACS.model_copy(update={"host": "192.0.2.2"}),
        _PACS.model_copy(update={"port": 11112}),
        _PACS.model_copy(update={"ae_title": "ARCHIVE"}),
        DicomWebDestination(name="pacs", url="http://192.0.2.1/dicom-web"),
    ],
)
def test_a_name_that_is_given_to_another_address_starts_anew_and_says_so(
    database: Database, now: AnyDestination
) -> None:
    with database.session() as session:
        row = destination_row(session, _PACS)
        row.capability = {"BINARY": {"support": "refused", "since": "2026-01-01T00:00:00+00:00", "detail": ""}}
        note_contact(session, row, away=True, reason="no route")
        for kind in (DESTINATION_REFUSES, QUERY_REFUSES):
            raise_alarm(session, kind=kind, subject="destination:pacs", message="")
        raise_alarm(session, kind=FALLBACK_ENCODING, subject="destination:pacs:BINARY", message="")
        raise_alarm(session, kind=DESTINATION_AWAY, subject="destination:other", message="")
    with capture_logs() as logs, database.session() as session:
        destination_row(session, now)
    assert [(entry["destination"], entry["log_level"]) for entry in logs] == [("pacs", "warning")]
    with database.reading() as session:
        row = session.get_one(DestinationState, "pacs")
        assert (row.circuit, row.failures, row.capability, row.last_error) == ("closed", 0, None, None)
        assert [a.subject for a in open_alarms(session)] == ["destination:other"]


def test_what_is_known_stays_while_the_address_is_the_same(database: Database) -> None:
    with database.session() as session:
        note_contact(session, destination_row(session, _PACS), away=True, reason="no route")
    with capture_logs() as logs, database.session() as session:
        same = _PACS.model_copy(update={"timeout_s": 5, "encodings": ("SC",)})
        assert destination_row(session, same).circuit == "open"
    assert logs == []


def test_a_row_from_before_addresses_were_kept_is_taken_over(database: Database) -> None:
    with database.session() as session:
        note_contact(session, destination_row(session, _PACS), away=True, reason="no route")
        session.get_one(DestinationState, "pacs").address = None
    with database.session() as session:
        assert destination_row(session, _PACS).circuit == "open"


def _waiting_for_a_lock(database: Database) -> bool:
    with database.reading() as session:
        count = session.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        return bool(count)
