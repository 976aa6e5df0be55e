"""One attempt of a delivery with its rows: what ends it, what it teaches about the destination, who waits for whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from emr.client import EmrClient
from emr.content import ReportContent
from emr.errors import Unavailable
from emr.receipt import ReceiptEntry, ReportReceipt
from gateway.delivery.contact import kind_of
from gateway.delivery.destination import (
    Capability,
    DestinationAway,
    DestinationRefuses,
    EchoReport,
    ObjectStatus,
    OutgoingObject,
    Verification,
    check_file,
)
from gateway.delivery.dispatch import Dispatch
from gateway.delivery.reporting import Reporting
from gateway.settings import DestinationSettings
from gateway.workflows import Story
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import (
    Delivery,
    DeliveryState,
    DestinationState,
    Result,
    ResultState,
    StudyState,
    utc_now,
)
from tests.support.report_content import report_content
from tests.support.story_rows import NotedQueue, add_delivery, add_result, add_study, add_version

_SETTINGS: dict[str, Any] = {
    "dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}],
    "fhir": [{"name": "emr", "url": "http://127.0.0.1/fhir", "patient_identifier_system": "urn:oid:1.2"}],
}
_RECEIPT = ReportReceipt(
    report_id="DiagnosticReport/1",
    entries=(ReceiptEntry(resource_type="DiagnosticReport", reference="DiagnosticReport/1", created=True),),
    created=True,
    how="transaction",
)


@dataclass
class Peer:
    """A PACS and an EMR in one: does what `sending` and `asking` say, and notes how often it was asked."""

    sending: Callable[[], None] = lambda: None
    asking: Callable[[], None] = lambda: None
    sent: list[str] = field(default_factory=list)
    holds: set[str] = field(default_factory=set)
    name: str = "pacs"

    def send(self, what: Any) -> Any:
        self.sent.append("report" if isinstance(what, ReportContent) else "objects")
        self.sending()
        if isinstance(what, ReportContent):
            return _RECEIPT
        self.holds |= {o.sop_instance_uid for o in what}
        return tuple(
            ObjectStatus(sop_instance_uid=o.sop_instance_uid, code=0, outcome="stored", meaning="success")
            for o in cast(Sequence[OutgoingObject], what)
        )

    def verify(self, what: Any, result_id: str = "") -> Any:
        self.asking()
        if result_id:
            return True
        return tuple(
            Verification(
                sop_instance_uid=o.sop_instance_uid,
                outcome="verified" if o.sop_instance_uid in self.holds else "absent",
                detail="as asked",
            )
            for o in what
        )

    def capability(self) -> Capability:
        return Capability(sop_classes={})

    def echo(self) -> EchoReport:
        raise NotImplementedError

    def close(self) -> None:
        pass


class PlainReporting(Reporting):
    """Reporting with an invented content: what a report says is another test's matter."""

    def _content(self, *_: Any) -> ReportContent:
        return report_content(2, result_id="r1")


class House:
    """A database with one released result, and a Dispatch over it."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(f"sqlite:///{folder / 'test.sqlite'}")
        self.database.create_all()
        self.queue = NotedQueue()
        self.peer = Peer()
        self.folder = folder
        self.settings = DestinationSettings.model_validate(_SETTINGS)
        with self.database.session() as session:
            add_study(session, StudyState.DELIVERING)
            add_version(session)
            add_result(session, ResultState.RELEASED, verdict="pass")

    def add(self, destination: str, state: DeliveryState = DeliveryState.QUEUED, **columns: Any) -> str:
        kinds = {d.name: kind_of(d) for d in self.settings.all}
        with self.database.session() as session:
            planned = columns.pop("next_attempt_at", utc_now())
            delivery = add_delivery(session, state, destination=destination, next_attempt_at=planned, **columns)
            delivery.kind = kinds[destination]
            return delivery.delivery_id

    def dispatch(self) -> Dispatch:
        reporting = PlainReporting(
            database=self.database,
            clients={"emr": cast(EmrClient, self.peer)},
            bundle_of=lambda name, version: pytest.fail(f"{name} {version} is not needed"),
            institution="",
            software_version="0",
        )
        return Dispatch(
            database=self.database,
            settings=self.settings,
            pacs={"pacs": self.peer},
            reporting=reporting,
            objects_of=self.objects,
            enqueuer=self.queue,
        )

    def attempt(self, delivery_id: str) -> dict[str, Any]:
        return self.dispatch().attempt(delivery_id, self.row(delivery_id).workflow_id)

    def deliver(self, delivery_id: str) -> str:
        """The whole workflow, its waits skipped."""
        story = Story(attempts=3, wait=lambda _: None, step=lambda _, function, *arguments: function(*arguments))
        return story.deliver(self.dispatch(), delivery_id, self.row(delivery_id).workflow_id)

    def objects(self, result_id: str, encoding: str) -> Sequence[OutgoingObject]:
        return [
            OutgoingObject(
                sop_instance_uid="1.2.3.9",
                sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                series_instance_uid="1.2.3.8",
                study_instance_uid="1.2.3",
                path=self.folder / "seg.dcm",
                digest="0" * 64,
                role="SEG",
            )
        ]

    def row(self, delivery_id: str) -> Delivery:
        with self.database.reading() as session:
            return session.get_one(Delivery, delivery_id)

    def destination(self, name: str) -> DestinationState:
        with self.database.reading() as session:
            return session.get_one(DestinationState, name)

    def reopen(self, name: str) -> None:
        """As if the wait for the next probe were over."""
        with self.database.session() as session:
            row = session.get(DestinationState, name)
            if row is not None:
                row.circuit, row.failures = "closed", 0

    def alarms(self) -> set[str]:
        with self.database.reading() as session:
            return {a.kind for a in open_alarms(session)}

    def change(self, delivery_id: str, **columns: Any) -> None:
        with self.database.session() as session:
            delivery = session.get_one(Delivery, delivery_id)
            for name, value in columns.items():
                setattr(delivery, name, value)

    def supersede(self) -> None:
        with self.database.session() as session:
            result = session.get_one(Result, "r1")
            result.state, result.state_reason = ResultState.SUPERSEDED, "replaced by result r2"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.database.close()


def fails(error: Exception) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


@pytest.mark.parametrize("state", [DeliveryState.WITHHELD, DeliveryState.PARKED])
@pytest.mark.parametrize("destination", ["pacs", "emr"])
def test_withheld_and_parked_deliveries_never_go_out_whatever_was_planned(
    house: House, state: DeliveryState, destination: str
) -> None:
    delivery = house.add(destination, state, next_attempt_at=utc_now(), state_reason="because")
    assert house.attempt(delivery) == {"state": state, "retry_in_s": None}
    assert house.peer.sent == []
    row = house.row(delivery)
    assert (row.next_attempt_at, row.state_reason) == (None, "because")


@pytest.mark.requirement("CMP-17")
@pytest.mark.parametrize("state", [DeliveryState.QUEUED, DeliveryState.SENT])
def test_a_superseded_report_is_withheld_before_it_is_known_to_have_arrived(house: House, state: DeliveryState) -> None:
    delivery = house.add("emr", state)
    house.supersede()
    assert house.attempt(delivery)["state"] == DeliveryState.WITHHELD
    assert house.peer.sent == []


@pytest.mark.requirement("CMP-17")
def test_a_report_superseded_while_the_emr_is_away_is_not_tried_again(house: House) -> None:
    delivery = house.add("emr")

    def superseded_meanwhile() -> None:
        house.supersede()
        house.change(delivery, state=DeliveryState.WITHHELD, state_reason="replaced by result r2", next_attempt_at=None)
        raise Unavailable("transaction: no answer in time")

    house.peer.sending = superseded_meanwhile
    assert house.attempt(delivery) == {"state": DeliveryState.WITHHELD, "retry_in_s": None}
    row = house.row(delivery)
    assert row.next_attempt_at is None
    assert "may have arrived" in str(row.state_reason)


@pytest.mark.requirement("CMP-17")
def test_a_result_superseded_while_its_pacs_is_away_stays_withheld(house: House) -> None:
    delivery = house.add("pacs")

    def superseded_meanwhile() -> None:
        house.supersede()
        house.change(delivery, state=DeliveryState.WITHHELD, state_reason="replaced by result r2", next_attempt_at=None)
        raise DestinationAway("pacs cannot be reached")

    house.peer.sending = superseded_meanwhile
    assert house.attempt(delivery) == {"state": DeliveryState.WITHHELD, "retry_in_s": None}
    assert house.row(delivery).state_reason == "replaced by result r2"
    assert house.row(delivery).next_attempt_at is None


@pytest.mark.parametrize("destination", ["pacs", "emr"])
def test_a_withheld_delivery_says_that_an_attempt_was_cut_short(house: House, destination: str) -> None:
    delivery = house.add(destination, attempts=1)  # counted in the row, and nothing is known of how it ended
    house.supersede()
    house.attempt(delivery)
    assert house.row(delivery).state_reason == (
        "replaced by result r2; an earlier attempt was cut short, so it may have arrived"
    )


@pytest.mark.requirement("QUE-29", open="rate cap; urgent first in the drain; an outage of hours")
@pytest.mark.parametrize(
    ("error", "alarms"),
    [
        (DestinationAway("the query service does not answer"), set()),
        (DestinationRefuses("the query service refuses"), {"query-refuses"}),
    ],
)
def test_a_query_service_that_is_away_does_not_stop_the_sending(
    house: House, error: Exception, alarms: set[str]
) -> None:
    doubtful = house.add("pacs", attempts=1)
    with house.database.session() as session:
        add_result(session, ResultState.RELEASED, result_id="r2")
    fresh = house.add("pacs", result_id="r2")
    house.peer.asking = fails(error)
    assert house.attempt(doubtful) == {"state": DeliveryState.QUEUED, "retry_in_s": None}  # asked first, in vain
    assert house.queue.ids == [house.row(doubtful).workflow_id]  # comes back on its own
    assert house.destination("pacs").circuit == "closed"
    assert house.alarms() == alarms
    assert house.attempt(fresh)["state"] == DeliveryState.STORED
    assert house.peer.sent == ["objects"]
    house.peer.asking = lambda: None
    assert house.attempt(fresh)["state"] == DeliveryState.VERIFIED
    assert house.alarms() == set()


def test_a_probe_that_could_only_ask_leaves_the_circuit_open_and_makes_way(house: House) -> None:
    waiting = house.add("pacs", attempts=1)
    with house.database.session() as session:
        since = utc_now() - timedelta(seconds=60)
        session.add(DestinationState(name="pacs", circuit="open", since=since, failures=1))
    house.peer.asking = fails(DestinationAway("the query service does not answer"))
    assert house.attempt(waiting)["retry_in_s"] is None
    assert len(house.queue.ids) == 1
    assert house.destination("pacs").circuit == "open"


def test_a_pacs_that_takes_nothing_opens_its_circuit_and_the_head_of_the_queue_waits_in_place(house: House) -> None:
    delivery = house.add("pacs")
    house.peer.sending = fails(DestinationAway("pacs cannot be reached"))
    assert float(house.attempt(delivery)["retry_in_s"]) > 0
    assert house.queue.ids == []
    assert house.destination("pacs").circuit == "open"
    assert house.alarms() == {"destination-away"}


@pytest.mark.requirement("QUE-27")
def test_a_delivery_whose_file_was_altered_is_parked_with_an_alarm_that_says_what_to_do(house: House) -> None:
    delivery = house.add("pacs")
    (house.folder / "seg.dcm").write_bytes(b"not what was recorded")
    house.peer.sending = lambda: check_file(house.objects("r1", "BINARY")[0])
    assert house.deliver(delivery) == DeliveryState.PARKED
    with house.database.reading() as session:
        (alarm,) = open_alarms(session)
    for said in ("pacs", "1.2.3.9", str(house.folder / "seg.dcm"), "altered or truncated", "seggate retry"):
        assert said in alarm.message


_ELSEWHERE = {**_SETTINGS, "dimse": [{**_SETTINGS["dimse"][0], "host": "127.0.0.2"}]}


def test_what_was_stored_at_the_old_address_is_asked_for_and_sent_to_the_new_one(house: House) -> None:
    delivery = house.add("pacs")
    house.peer.asking = fails(DestinationAway("the query service does not answer"))
    assert house.attempt(delivery)["state"] == DeliveryState.STORED
    house.settings = DestinationSettings.model_validate(_ELSEWHERE)
    house.peer.asking, house.peer.holds = lambda: None, set()
    assert house.attempt(delivery)["state"] == DeliveryState.VERIFIED
    assert house.peer.sent == ["objects", "objects"]


def test_what_moved_with_its_archive_to_a_new_address_is_not_sent_again(house: House) -> None:
    delivery = house.add("pacs")
    house.peer.asking = fails(DestinationAway("the query service does not answer"))
    house.attempt(delivery)
    house.settings = DestinationSettings.model_validate(_ELSEWHERE)
    house.peer.asking = lambda: None
    assert house.attempt(delivery)["state"] == DeliveryState.VERIFIED
    assert house.peer.sent == ["objects"]


def test_a_pacs_that_is_now_reached_another_way_gets_what_waited_for_it(house: House) -> None:
    delivery = house.add("pacs")
    settings = {"fhir": _SETTINGS["fhir"], "orthanc": [{"name": "pacs", "url": "http://127.0.0.1:8042"}]}
    house.settings = DestinationSettings.model_validate(settings)
    assert house.attempt(delivery)["state"] == DeliveryState.VERIFIED
    assert house.row(delivery).kind == "orthanc"


@pytest.mark.parametrize(("name", "was", "now"), [("pacs", "dimse", "fhir"), ("emr", "fhir", "dimse")])
def test_objects_never_go_to_an_emr_and_reports_never_to_a_pacs(house: House, name: str, was: str, now: str) -> None:
    delivery = house.add(name)
    house.settings = DestinationSettings.model_validate(
        {now: [{**_SETTINGS[now][0], "name": name}]},
    )
    assert house.attempt(delivery) == {"state": DeliveryState.PARKED, "retry_in_s": None}
    assert house.peer.sent == []
    reason = str(house.row(delivery).state_reason)
    assert f"{name} as {now}" in reason
    assert f"made for {was}" in reason
    assert house.alarms() == {"parked"}


@pytest.mark.parametrize("finished", [True, False])
def test_after_a_retry_patience_and_waits_begin_anew(house: House, finished: bool) -> None:
    delivery = house.add("pacs")
    house.change(delivery, queued_at=utc_now() - timedelta(days=30))
    house.peer.sending = fails(DestinationAway("pacs cannot be reached"))
    for _ in range(2):  # overdue: one more such attempt would park it
        house.reopen("pacs")
        house.attempt(delivery)
    if finished:
        house.reopen("pacs")
        assert house.attempt(delivery)["state"] == DeliveryState.PARKED
    # As `seggate retry` puts it back, also where it was parked by something else than the ladder.
    house.change(delivery, state=DeliveryState.QUEUED, queued_at=utc_now(), next_attempt_at=utc_now())
    house.reopen("pacs")
    assert house.attempt(delivery)["state"] == DeliveryState.QUEUED
    (kept,) = house.row(delivery).objects or []
    assert (kept["failures"], kept["overdue"], kept["attempts"]) == (1, 0, 4 if finished else 3)


@pytest.mark.requirement("QUE-27")
def test_killed_between_sending_and_writing_it_down_the_object_is_asked_for_and_not_sent_twice(house: House) -> None:
    delivery = house.add("pacs")

    class Killed(BaseException):
        """As kill -9: nothing after it runs."""

    def killed() -> None:
        raise Killed

    house.peer.asking = killed  # stored there; the process dies before a word of it is in the row
    with pytest.raises(Killed):
        house.attempt(delivery)
    row = house.row(delivery)
    assert (row.state, row.objects, house.peer.sent) == (DeliveryState.QUEUED, None, ["objects"])
    house.peer.asking = lambda: None
    assert house.attempt(delivery) == {"state": DeliveryState.VERIFIED, "retry_in_s": None}
    assert house.peer.sent == ["objects"]
