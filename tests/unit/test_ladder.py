"""The ladder as a pure machine: every rung with everything that can be heard, and what the delivery makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.delivery.destination import DestinationAway, Found, ObjectStatus, OutgoingObject, Role, Verification
from gateway.delivery.ladder import STEPS, LadderState, Rung, advance, heard, park, prepared, requeue, withhold
from gateway.delivery.status import Outcome
from gateway.settings import DimseDestination
from storage.records import DeliveryState

_NOW = datetime(2026, 3, 1, tzinfo=UTC)
_SETTINGS = DimseDestination(
    name="pacs", ae_title="PACS", host="localhost", port=104, encodings=("LABELMAP", "BINARY", "SC")
)


def _object(uid: str, role: Role) -> OutgoingObject:
    return OutgoingObject(
        sop_instance_uid=uid,
        sop_class_uid="1.2.3",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        series_instance_uid="1.2.4",
        study_instance_uid="1.2.5",
        path=Path("unused"),
        digest="0" * 64,
        role=role,
    )


SEG, SR = _object("1.1", "SEG"), _object("1.2", "SR")


def _state() -> LadderState:
    return prepared(LadderState.new("d1", _NOW), "LABELMAP", [SEG, SR])


def _status(item: OutgoingObject, outcome: Outcome, meaning: str = "words", code: int | None = 0) -> ObjectStatus:
    return ObjectStatus(sop_instance_uid=item.sop_instance_uid, code=code, outcome=outcome, meaning=meaning)


def _check(item: OutgoingObject, outcome: Found) -> Verification:
    return Verification(sop_instance_uid=item.sop_instance_uid, outcome=outcome, detail="detail")


def _told(state: LadderState, *news: ObjectStatus | Verification, at: datetime = _NOW) -> LadderState:
    statuses = [n for n in news if isinstance(n, ObjectStatus)]
    checks = [n for n in news if isinstance(n, Verification)]
    if statuses:
        state = advance(state, statuses, now=at, settings=_SETTINGS)
    return advance(state, checks, now=at, settings=_SETTINGS) if checks else state


_SENDING = ("stored", "warning", "failed", "doubtful", "refused", "unknown")
_ASKING = ("verified", "absent", "differs", "not-queryable")
# Rows: from rung; columns as in _SENDING, then _ASKING. A dot: stays.
_TABLE = """
queued    stored stored queued queued refused sent     verified . refused .
sent      stored stored queued queued refused .        verified queued refused queued
stored    . . . . . .                                  verified . refused .
verified  . . . . . .                                  . . . .
refused   . . . . . .                                  . . . .
"""


@pytest.mark.requirement("OUT-42", open="storage commitment")
@pytest.mark.parametrize("row", _TABLE.strip().splitlines())
def test_each_rung_moves_as_the_table_says_and_never_down_from_stored(row: str) -> None:
    start, *ends = row.split()
    for news, end in zip((*_SENDING, *_ASKING), ends, strict=True):
        rung = Rung(start)
        assert STEPS.get((rung, news), rung) == (rung if end == "." else Rung(end)), (start, news)


def test_all_found_is_verified_and_finished() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "stored"))
    assert (state.state, state.finished) == (DeliveryState.STORED, False)
    state = _told(state, _check(SEG, "verified"), _check(SR, "verified"))
    assert (state.state, state.finished) == (DeliveryState.VERIFIED, True)


def test_below_stored_is_never_called_stored() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "failed"))
    assert state.state is DeliveryState.SENT
    assert not state.finished


def test_a_warning_is_stored_and_stays_visible_after_verification() -> None:
    state = _told(_state(), _status(SEG, "warning", "0xB000 coercion of data elements"), _status(SR, "stored"))
    state = _told(state, _check(SEG, "verified"), _check(SR, "verified"))
    assert state.state is DeliveryState.VERIFIED
    assert "0xB000 coercion of data elements" in state.reason


def test_a_destination_that_cannot_be_asked_ends_at_stored() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "stored"))
    state = _told(state, _check(SEG, "not-queryable"), _check(SR, "not-queryable"))
    assert (state.state, state.finished) == (DeliveryState.STORED, True)
    assert "not verified" in state.reason


def test_an_image_that_is_refused_goes_to_the_next_encoding_at_once() -> None:
    state = _told(_state(), _status(SEG, "refused", "0x0122", 0x0122))
    assert (state.encoding, state.refused, state.state) == (None, ("LABELMAP",), DeliveryState.QUEUED)
    assert state.retry_in_s(_NOW) == 0
    assert [o.rung for o in state.objects] == [Rung.REFUSED, Rung.QUEUED]


def test_when_the_last_encoding_is_refused_it_is_parked_with_the_reason() -> None:
    state = replace(_state(), refused=("BINARY", "SC"))
    state = _told(state, _status(SEG, "refused", "0x0122 SOP class not supported", 0x0122))
    assert (state.state, state.finished) == (DeliveryState.PARKED, True)
    assert "0x0122" in state.reason


def test_a_report_has_no_fallback_and_is_parked_with_the_way_out() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "refused", "0x0122", 0x0122))
    assert state.state is DeliveryState.PARKED
    assert "send_sr" in state.reason


def test_a_processing_failure_without_reason_becomes_a_refusal_after_many() -> None:
    state = _state()
    for n in range(8):
        assert state.encoding == "LABELMAP", n
        state = _told(state, _status(SEG, "doubtful", "0x0110 processing failure", 0x0110))
    assert (state.encoding, state.refused) == (None, ("LABELMAP",))


def test_out_of_resources_is_waited_for_however_often() -> None:
    state = _state()
    for _ in range(50):
        state = _told(state, _status(SEG, "failed", "0xA700", 0xA700))
    assert (state.encoding, state.state, state.finished) == ("LABELMAP", DeliveryState.QUEUED, False)


def test_waits_grow_and_progress_resets_them() -> None:
    state, waits = _state(), []
    for _ in range(9):
        state = advance(state, DestinationAway("away"), now=_NOW, settings=_SETTINGS)
        waits.append(state.retry_in_s(_NOW) or 0)
    assert waits[0] <= 5
    assert 150 <= waits[-1] <= 300
    state = _told(state, _status(SEG, "stored"), _status(SR, "failed"))
    assert (state.retry_in_s(_NOW) or 0) <= 5


def test_stored_but_not_found_is_asked_again_and_then_sent_again() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "stored"))
    for n in range(8):
        assert state.current[0].rung is Rung.STORED, n
        state = _told(state, _check(SEG, "absent"), _check(SR, "verified"))
    assert [o.rung for o in state.current] == [Rung.QUEUED, Rung.VERIFIED]


def test_other_content_under_our_uid_is_parked_not_called_delivered() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "stored"))
    state = _told(state, _check(SEG, "differs"), _check(SR, "verified"))
    assert state.state is DeliveryState.PARKED
    assert state.refused == ()


def test_patience_ends_in_parked_and_never_in_dropped() -> None:
    late = _NOW + timedelta(seconds=_SETTINGS.give_up_after_s)
    state = advance(_state(), DestinationAway("no route"), now=late, settings=_SETTINGS)
    state = advance(state, DestinationAway("no route"), now=late, settings=_SETTINGS)
    assert not state.finished  # a clock that jumped forward once parks nothing
    state = advance(state, DestinationAway("no route"), now=late, settings=_SETTINGS)
    assert (state.state, state.finished) == (DeliveryState.PARKED, True)
    assert "no route" in state.reason


def test_stored_and_then_unreachable_for_asking_ends_at_stored_but_positively_absent_is_parked() -> None:
    late = _NOW + timedelta(seconds=_SETTINGS.give_up_after_s)
    stored = _told(_state(), _status(SEG, "stored"), _status(SR, "stored"))
    away = stored
    for _ in range(3):
        away = advance(away, DestinationAway("query is down"), now=late, settings=_SETTINGS)
    assert (away.state, away.finished) == (DeliveryState.STORED, True)
    absent = stored
    for _ in range(3):
        absent = _told(absent, _check(SEG, "absent"), _check(SR, "verified"), at=late)
    assert absent.state is DeliveryState.PARKED


def test_a_finished_delivery_does_not_change_any_more() -> None:
    for finished in (withhold(_state(), "superseded"), park(_state(), "why")):
        assert _told(finished, _status(SEG, "stored")) == finished
    assert withhold(_state(), "superseded").state is DeliveryState.WITHHELD


def test_retry_by_hand_has_new_patience_and_keeps_what_is_stored() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "refused", "0x0122", 0x0122))
    later = _NOW + timedelta(days=10)
    again = requeue(state, later)
    assert (again.since, again.finished, again.refused, again.failures) == (later, False, (), 0)
    again = prepared(again, "LABELMAP", [SEG, SR])
    assert [o.rung for o in again.current] == [Rung.STORED, Rung.QUEUED]


def test_after_a_retry_by_hand_doubts_are_counted_anew() -> None:
    state = _state()
    for _ in range(7):
        state = _told(state, _status(SEG, "doubtful"))
    again = prepared(requeue(park(state, "by somebody"), _NOW), "LABELMAP", [SEG, SR])
    assert _told(again, _status(SEG, "doubtful")).encoding == "LABELMAP"


@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_a_report_that_is_no_longer_to_be_sent_keeps_nothing_from_its_end() -> None:
    state = _told(_state(), _status(SEG, "stored"), _status(SR, "refused", "0x0122", 0x0122))
    assert "set send_sr = false" in state.reason
    again = prepared(requeue(state, _NOW), "LABELMAP", [SEG])  # the operator did
    assert _told(again, _check(SEG, "verified")).state is DeliveryState.VERIFIED


def test_news_of_an_object_that_is_not_ours_changes_nothing() -> None:
    state = _state()
    assert heard(state, [_status(_object("9.9", "SEG"), "stored")]) == state


def test_the_state_survives_json() -> None:
    state = _told(_state(), _status(SEG, "warning", "0xB000", 0xB000), _status(SR, "unknown", code=None))
    for one in (state, park(state, "why"), LadderState.new("d2", _NOW)):
        assert LadderState.from_dict(json.loads(json.dumps(one.as_dict()))) == one
