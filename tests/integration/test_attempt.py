"""Whole attempts at peers that refuse, break off, are away and come back: one copy of each object in the end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from gateway.delivery.attempt import Attempted, attempt
from gateway.delivery.capability import Learned
from gateway.delivery.destination import Found, ObjectStatus, OutgoingObject, Verification
from gateway.delivery.dimse import DimsePacs
from gateway.delivery.ladder import LadderState, Rung, heard, prepared, requeue
from gateway.delivery.orthanc import OrthancPacs
from gateway.delivery.status import Outcome
from gateway.settings import DimseDestination, OrthancDestination
from storage.records import DeliveryState, utc_now
from tests.support import pacs
from tests.support.outgoing import COMPREHENSIVE_3D_SR, InventedResult

LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
BINARY_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"


class Sending:
    """A delivery of one result to one peer, attempt by attempt, with a clock that the test turns."""

    def __init__(self, peer: pacs.RunningPacs, result: InventedResult, **settings: object) -> None:
        fields = {"name": "pacs", "ae_title": peer.ae_title, "host": peer.host, "port": peer.port, "timeout_s": 10}
        self.settings = DimseDestination.model_validate({**fields, **settings})
        self.result = result
        self.now = utc_now()
        self.state = LadderState.new("d1", self.now)
        self.learned = Learned()

    def attempt(self, *, recovered: bool = False) -> Attempted:
        outcome = attempt(
            DimsePacs(self.settings, calling_ae_title="SEGGATE"),
            self.settings,
            self.result.objects,
            LadderState.from_dict(self.state.as_dict()),
            learned=Learned.from_record(self.learned.as_record()),
            recovered=recovered,
            clock=self._clock,
        )
        self.state, self.learned = outcome.state, outcome.learned
        self.now += timedelta(seconds=self.state.retry_in_s(self.now) or 0)
        return outcome

    def _clock(self) -> datetime:
        return self.now


@pytest.fixture
def result(tmp_path: Path) -> InventedResult:
    return InventedResult(tmp_path / "result")


@pytest.mark.peer("orthanc")
@pytest.mark.requirement("OUT-44", open="RTSTRUCT, GSPS, PDF")
def test_orthanc_refuses_labelmap_gets_binary_and_the_next_result_starts_with_binary(
    tmp_path: Path, result: InventedResult
) -> None:
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        first = Sending(peer, result, encodings=["LABELMAP", "BINARY", "SC"])
        outcome = first.attempt()
        assert first.state.state is DeliveryState.VERIFIED
        assert (first.state.encoding, first.state.refused) == ("BINARY", ("LABELMAP",))
        assert [a.kind for a in outcome.alarms] == ["fallback-encoding"]
        assert result.asked == ["LABELMAP", "BINARY"]

        second = Sending(peer, InventedResult(tmp_path / "second"), encodings=["LABELMAP", "BINARY", "SC"])
        second.learned = first.learned
        assert second.attempt().alarms == ()
        assert second.state.state is DeliveryState.VERIFIED
        assert second.result.asked == ["BINARY"]


@pytest.mark.peer("orthanc")
def test_orthanc_that_takes_unknown_classes_gets_the_labelmap(tmp_path: Path, result: InventedResult) -> None:
    with pacs.orthanc(tmp_path / "orthanc", UnknownSopClassAccepted=True) as peer:
        sending = Sending(peer, result, encodings=["LABELMAP", "BINARY"])
        sending.attempt()
        assert (sending.state.state, sending.state.encoding) == (DeliveryState.VERIFIED, "LABELMAP")


@pytest.mark.requirement("OUT-44", open="RTSTRUCT, GSPS, PDF")
def test_where_no_segmentation_is_taken_a_secondary_capture_arrives_and_no_orphaned_report(
    tmp_path: Path, result: InventedResult
) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", [0x0122], refused_classes=[LABELMAP_STORAGE])
    with pacs.scripted(scripted) as peer:
        sending = Sending(peer, result, encodings=["LABELMAP", "BINARY", "SC"])
        outcome = sending.attempt()
    assert (sending.state.state, sending.state.encoding) == (DeliveryState.VERIFIED, "SC")
    assert len(outcome.alarms) == 2
    assert set(scripted.objects()) == {o.sop_instance_uid for o in (result.image("SC"), result.report("SC"))}


@pytest.mark.peer("dcmtk")
@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_a_peer_without_query_ends_at_stored(tmp_path: Path, result: InventedResult) -> None:
    with pacs.storescp(tmp_path / "store") as peer:
        sending = Sending(peer, result)
        sending.attempt()
    assert (sending.state.state, sending.state.finished) == (DeliveryState.STORED, True)
    assert "not verified" in sending.state.reason


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_away_then_back_delivers_once_and_the_file_is_made_once(tmp_path: Path, result: InventedResult) -> None:
    port = pacs.free_port()
    peer = pacs.RunningPacs(ae_title="SCRIPTED", host="127.0.0.1", port=port, folder=tmp_path)
    sending = Sending(peer, result)
    for _ in range(12):
        outcome = sending.attempt()
        assert outcome.away
        assert sending.state.state is DeliveryState.QUEUED
        assert "cannot be reached" in sending.state.reason
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", port=port)
    with pacs.scripted(scripted):
        assert not sending.attempt().away
    assert sending.state.state is DeliveryState.VERIFIED
    assert sorted(scripted.received) == sorted(o.sop_instance_uid for o in result.objects("BINARY"))


def test_broken_off_after_storing_is_asked_first_and_not_sent_twice(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", ["abort-after-storing"])
    seg, sr = result.objects("BINARY")
    with pacs.scripted(scripted) as peer:
        sending = Sending(peer, result)
        sending.attempt()
        assert [o.rung for o in sending.state.current] == [Rung.SENT, Rung.QUEUED]
        assert sending.state.state == "sent"
        sending.attempt()
    assert sending.state.state == "verified"
    assert scripted.received == [seg.sop_instance_uid, sr.sop_instance_uid]


def test_broken_off_before_storing_is_sent_again_under_the_same_uid(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", ["abort"])
    seg, sr = result.objects("BINARY")
    with pacs.scripted(scripted) as peer:
        sending = Sending(peer, result)
        sending.attempt()
        sending.attempt()
    assert sending.state.state is DeliveryState.VERIFIED
    assert scripted.received == [seg.sop_instance_uid, seg.sop_instance_uid, sr.sop_instance_uid]


@pytest.mark.requirement("QUE-27")
def test_a_repeated_first_attempt_asks_before_it_sends(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs")
    with pacs.scripted(scripted) as peer:
        Sending(peer, result).attempt()  # its outcome was lost with the process
        assert len(scripted.received) == 2
        again = Sending(peer, result)
        again.attempt(recovered=True)
    assert again.state.state is DeliveryState.VERIFIED
    assert len(scripted.received) == 2


def test_what_is_stored_is_not_sent_again_when_the_rest_failed(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", [("then", 0x0000), 0xA700])
    seg, sr = result.objects("BINARY")
    with pacs.scripted(scripted) as peer:
        sending = Sending(peer, result)
        sending.attempt()
        assert "0xA700 out of resources" in sending.state.reason
        sending.attempt()
    assert sending.state.state is DeliveryState.VERIFIED
    assert scripted.received == [seg.sop_instance_uid, sr.sop_instance_uid, sr.sop_instance_uid]


@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_a_warning_is_kept_with_its_words(tmp_path: Path, result: InventedResult) -> None:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", [("then", 0xB000)])) as peer:
        sending = Sending(peer, result)
        sending.attempt()
    assert sending.state.state is DeliveryState.VERIFIED
    assert "0xB000 coercion of data elements" in sending.state.warnings[0]


def test_one_odd_object_does_not_change_what_is_known_of_a_pacs_that_takes_the_class(
    tmp_path: Path, result: InventedResult
) -> None:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", [("then", 0), ("then", 0), 0xA900])) as peer:
        good = Sending(peer, result)
        good.attempt()
        odd = Sending(peer, InventedResult(tmp_path / "odd"))
        odd.learned = good.learned
        odd.attempt()
    assert (odd.state.state, odd.state.encoding) == (DeliveryState.VERIFIED, "SC")
    assert odd.learned.support("BINARY", odd.now) == "accepted"


def test_a_pacs_that_lets_us_not_in_is_alarmed_and_waited_for(tmp_path: Path, result: InventedResult) -> None:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs")) as peer:
        sending = Sending(peer, result, ae_title="OTHER")
        outcome = sending.attempt()
    assert [a.kind for a in outcome.alarms] == ["destination-refuses"]
    assert (sending.state.state, sending.state.finished) == (DeliveryState.QUEUED, False)


def test_reports_are_left_out_where_the_destination_takes_none(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", refused_classes=[COMPREHENSIVE_3D_SR])
    with pacs.scripted(scripted) as peer:
        sending = Sending(peer, result, send_sr=False)
        sending.attempt()
    assert sending.state.state is DeliveryState.VERIFIED
    assert scripted.objects() == (result.image("BINARY").sop_instance_uid,)


@pytest.mark.requirement("OUT-44", open="RTSTRUCT, GSPS, PDF")
def test_when_nothing_is_taken_the_delivery_is_parked_and_alarmed(tmp_path: Path, result: InventedResult) -> None:
    refused = [LABELMAP_STORAGE, BINARY_STORAGE, "1.2.840.10008.5.1.4.1.1.7"]
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", refused_classes=refused)) as peer:
        sending = Sending(peer, result, encodings=["LABELMAP", "BINARY", "SC"])
        outcome = sending.attempt()
    assert (sending.state.state, sending.state.finished) == (DeliveryState.PARKED, True)
    assert outcome.alarms[-1].kind == "delivery-parked"


@pytest.mark.peer("orthanc")
@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
def test_orthanc_stopped_and_started_again_holds_each_object_once(tmp_path: Path, result: InventedResult) -> None:
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        pass
    settings = OrthancDestination(name="pacs", url=peer.http_url, timeout_s=5)
    state, learned = LadderState.new("d1", utc_now()), Learned()
    away = attempt(OrthancPacs(settings), settings, result.objects, state, learned=learned)
    assert (away.away, away.state.state) == (True, DeliveryState.QUEUED)
    http_port = int(peer.http_url.rstrip("/").rsplit(":", 1)[1])
    with pacs.orthanc(tmp_path / "orthanc", dicom_port=peer.port, http_port=http_port):
        for recovered in (False, True):  # the second: the first one's outcome was lost
            done = attempt(
                OrthancPacs(settings), settings, result.objects, away.state, learned=learned, recovered=recovered
            )
            assert done.state.state is DeliveryState.VERIFIED
        found = OrthancPacs(settings).verify(result.objects("BINARY"))
        assert [v.detail for v in found] == ["found in Orthanc, same MD5"] * 2


class Scripted(DimsePacs):
    """Does not leave the house: finds and answers what the test says, and notes the roles that were sent."""

    def __init__(self, settings: DimseDestination) -> None:
        super().__init__(settings, calling_ae_title="SEGGATE")
        self.finds: Found = "absent"
        self.answers: Outcome = "stored"
        self.sent: list[str] = []

    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        self.sent += [o.role for o in objects]
        return tuple(
            ObjectStatus(sop_instance_uid=o.sop_instance_uid, code=None, outcome=self.answers, meaning="scripted")
            for o in objects
        )

    def verify(self, objects: Sequence[OutgoingObject]) -> tuple[Verification, ...]:
        return tuple(
            Verification(sop_instance_uid=o.sop_instance_uid, outcome=self.finds, detail="scripted") for o in objects
        )


@pytest.fixture
def scripted_pacs() -> Scripted:
    return Scripted(DimseDestination(name="pacs", ae_title="PACS", host="127.0.0.1", port=104))


def test_a_report_does_not_leave_where_other_content_is_found_under_the_uid_of_its_image(
    scripted_pacs: Scripted, result: InventedResult
) -> None:
    settings = scripted_pacs._settings
    scripted_pacs.finds = "differs"
    seg, sr = result.objects("BINARY")
    broken_off = [ObjectStatus(sop_instance_uid=seg.sop_instance_uid, code=None, outcome="unknown", meaning="")]
    state = heard(prepared(LadderState.new("d1", utc_now()), "BINARY", [seg, sr]), broken_off)
    outcome = attempt(scripted_pacs, settings, result.objects, state, learned=Learned())
    assert outcome.state.state is DeliveryState.PARKED
    assert scripted_pacs.sent == []


@pytest.mark.requirement("QUE-29", open="rate cap, order of the backlog")
@pytest.mark.parametrize(("answers", "answered"), [("unknown", False), ("refused", True), ("stored", True)])
def test_a_destination_that_only_broke_off_has_not_answered(
    scripted_pacs: Scripted, result: InventedResult, answers: Outcome, answered: bool
) -> None:
    scripted_pacs.answers = answers
    settings = scripted_pacs._settings
    outcome = attempt(scripted_pacs, settings, result.objects, LadderState.new("d1", utc_now()), learned=Learned())
    assert (outcome.answered, outcome.away) == (answered, False)


def test_a_refused_report_that_is_switched_off_and_retried_lets_the_delivery_end(
    tmp_path: Path, result: InventedResult
) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", refused_classes=[COMPREHENSIVE_3D_SR])
    with pacs.scripted(scripted) as peer:
        sending = Sending(peer, result)
        sending.attempt()
        assert sending.state.state is DeliveryState.PARKED
        again = Sending(peer, result, send_sr=False)
        again.state = requeue(sending.state, utc_now())
        again.attempt()
    assert again.state.state is DeliveryState.VERIFIED
    assert scripted.received == [result.image("BINARY").sop_instance_uid]
