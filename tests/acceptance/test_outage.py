"""A destination that is away keeps its backlog, slows no other, and drains without duplicates (QUE-29, OUT-42, EMR-47).

One gateway; the PACS (Orthanc) and the EMR are stopped and started again on their ports and their data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import pytest

from storage.records import DeliveryState
from tests.support import pacs
from tests.support.peers import require_peer
from tests.support.waiting import wait_until
from tests.support.whole_gateway import SentStudy, WholeGateway, running_emr, whole_gateway


class Switch:
    """A peer that can be switched off and on again."""

    def __init__(self, start: Callable[[], AbstractContextManager[object]]) -> None:
        self._start = start
        self._running: AbstractContextManager[object] | None = None

    def on(self) -> None:
        if self._running is None:
            self._running = self._start()
            self._running.__enter__()

    def off(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None


@dataclass(frozen=True)
class Hospital:
    gateway: WholeGateway
    pacs: Switch
    emr: Switch


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    require_peer("orthanc")
    folder = tmp_path_factory.mktemp("outage")
    dicom_port, http_port, emr_port = (pacs.free_port() for _ in range(3))
    archive = Switch(lambda: pacs.orthanc(folder / "pacs", dicom_port=dicom_port, http_port=http_port))
    emr = Switch(lambda: running_emr(folder / "emr", emr_port))
    with whole_gateway(
        folder / "gateway", pacs_address=("ORTHANC", dicom_port), emr_url=f"http://127.0.0.1:{emr_port}/fhir"
    ) as gateway:
        try:
            gateway.start_receiver()
            gateway.start("worker")
            gateway.start("services")
            yield Hospital(gateway=gateway, pacs=archive, emr=emr)
        finally:
            archive.off()
            emr.off()


def _is(gateway: WholeGateway, study: SentStudy, destination: str, state: DeliveryState) -> bool:
    gateway.check_alive()
    return [d.state for d in gateway.deliveries(study.uid, destination)] == [state]


def _arrived_once(gateway: WholeGateway, study: SentStudy) -> None:
    """One SEG, one SR, one report; one event per destination says that it was verified."""
    (result,) = gateway.results(study.uid)
    objects = gateway.objects(result.result_id)
    assert gateway.in_pacs(study.uid) == {
        "SEG": [objects["SEG"].sop_instance_uid],
        "SR": [objects["SR"].sop_instance_uid],
    }
    assert len(gateway.reports(study.uid)) == 1
    ended = [e.detail["destination"] for e in gateway.events(study.uid) if e.kind == "delivery-verified"]
    assert sorted(ended) == ["emr", "pacs"]


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_a_pacs_that_is_away_keeps_its_backlog_while_the_emr_gets_its_reports(hospital: Hospital) -> None:
    gateway = hospital.gateway
    hospital.pacs.off()
    hospital.emr.on()
    studies = [gateway.write_study(f"backlog {number}") for number in range(3)]
    for study in studies:
        gateway.send(study.files)
    for study in studies:
        wait_until(partial(_is, gateway, study, "emr", DeliveryState.VERIFIED), "the EMR has the report")
        assert len(gateway.reports(study.uid)) == 1
        assert gateway.study(study.uid).state == "delivering"
    waiting = [d for study in studies for d in gateway.deliveries(study.uid, "pacs")]
    assert [d.state for d in waiting] == [DeliveryState.QUEUED] * 3
    # The head of the queue knocks for all: those behind it have not been tried.
    assert sorted(d.attempts for d in waiting)[:2] == [0, 0]
    assert [a.subject for a in gateway.alarms("destination-away")] == ["destination:pacs"]

    hospital.pacs.on()
    for study in studies:
        gateway.wait_for_state(study.uid, "verified")
        _arrived_once(gateway, study)
    assert gateway.alarms("destination-away") == []
    assert gateway.verify_ledger() > 0


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
@pytest.mark.requirement("EMR-47", open="final only after approval; HAPI; HL7 v2 fallback")
def test_an_emr_that_is_away_does_not_keep_the_pacs_waiting(hospital: Hospital) -> None:
    gateway = hospital.gateway
    hospital.pacs.on()
    hospital.emr.off()
    study = gateway.write_study("emr away")
    gateway.send(study.files)
    wait_until(partial(_is, gateway, study, "pacs", DeliveryState.VERIFIED), "the PACS has the result")
    assert set(gateway.in_pacs(study.uid)) == {"SEG", "SR"}
    wait_until(partial(gateway.alarms, "destination-away"), "the EMR's absence is alarmed")
    assert _is(gateway, study, "emr", DeliveryState.QUEUED)

    hospital.emr.on()
    gateway.wait_for_state(study.uid, "verified")
    _arrived_once(gateway, study)
    assert gateway.alarms("destination-away") == []


@pytest.mark.requirement("EMR-47", open="final only after approval; HAPI; HL7 v2 fallback")
def test_the_report_of_a_patient_the_emr_does_not_know_is_held_and_goes_out_when_it_does(hospital: Hospital) -> None:
    gateway = hospital.gateway
    hospital.pacs.on()
    hospital.emr.on()
    stranger = gateway.write_study("stranger", patient_id="NOT-YET-ADMITTED")
    gateway.send(stranger.files)
    wait_until(partial(_is, gateway, stranger, "pacs", DeliveryState.VERIFIED), "the PACS has the result")
    (alarm,) = wait_until(partial(gateway.alarms, "report-held"), "the held report is alarmed")
    (held,) = gateway.deliveries(stranger.uid, "emr")
    assert alarm.subject == f"delivery:{held.delivery_id}"
    assert "NOT-YET-ADMITTED" not in alarm.message
    assert gateway.reports(stranger.uid) == []

    # What waits for its own patient holds up nobody else's report.
    known = gateway.write_study("known")
    gateway.send(known.files)
    gateway.wait_for_state(known.uid, "verified")
    assert _is(gateway, stranger, "emr", DeliveryState.QUEUED)

    gateway.add_patient("NOT-YET-ADMITTED")
    gateway.wait_for_state(stranger.uid, "verified")
    _arrived_once(gateway, stranger)
    _arrived_once(gateway, known)
    assert gateway.alarms("report-held") == []
    (delivered,) = gateway.deliveries(stranger.uid, "emr")
    assert delivered.workflow_id != held.workflow_id or delivered.attempts > held.attempts
