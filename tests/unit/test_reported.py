"""What a report names, and how long it waits for that: what a PACS has, but not for a PACS that is away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.delivery.capability import Learned
from gateway.delivery.destination import OutgoingObject, Role
from gateway.delivery.reported import PATIENCE_S, ReportedObjects
from gateway.destination_settings import DestinationSettings
from storage.database import Database
from storage.records import Delivery, DeliveryState, DestinationState, ResultState, StudyState, utc_now
from tests.support.story_rows import STUDY_UID, add_delivery, add_result, add_study, add_version, kept_ladder

_PACS: dict[str, Any] = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}
_UIDS = {"BINARY": ("2.25.1", "2.25.2"), "LABELMAP": ("2.25.3", "2.25.4"), "SC": ("2.25.5", "2.25.4")}
PENDING = (DeliveryState.QUEUED, DeliveryState.SENT)
ENDED = (DeliveryState.PARKED, DeliveryState.WITHHELD)
ARRIVED = (DeliveryState.STORED, DeliveryState.VERIFIED)


class House:
    """A released result whose report is due, and PACSs named `first` and `second`."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(f"sqlite:///{folder / 'test.sqlite'}")
        self.database.create_all()
        self.asked: list[str] = []
        settings = DestinationSettings.model_validate(
            {
                "dimse": [
                    {"name": "first", "encodings": ["LABELMAP", "BINARY"], **_PACS},
                    {"name": "second", "encodings": ["SC"], "send_sr": False, **_PACS},
                ]
            }
        )
        self.reported = ReportedObjects(database=self.database, pacs=settings.pacs, objects_of=self.objects)
        with self.database.session() as session:
            add_study(session, StudyState.DELIVERING)
            add_version(session)
            add_result(session, ResultState.RELEASED)
            self.report = add_delivery(session, DeliveryState.QUEUED, destination="emr")
            self.report.kind = "fhir"

    def objects(self, result_id: str, encoding: str) -> Sequence[OutgoingObject]:
        self.asked.append(encoding)
        roles: tuple[Role, Role] = ("SC" if encoding == "SC" else "SEG", "SR")
        return [
            OutgoingObject(
                sop_instance_uid=uid,
                sop_class_uid="1.2",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                series_instance_uid="1.2.3.8",
                study_instance_uid=STUDY_UID,
                path=Path("unused"),
                digest="0" * 64,
                role=role,
            )
            for uid, role in zip(_UIDS[encoding], roles, strict=True)
        ]

    def add(self, destination: str, state: DeliveryState, *ladder: str) -> None:
        """A delivery; `ladder` is the encoding and what of it was taken."""
        with self.database.session() as session:
            objects = [kept_ladder(*ladder)] if ladder else None
            add_delivery(session, state, destination=destination, objects=objects)

    def away(self, destination: str, **refused: str) -> None:
        """Its circuit is open; `refused`: what is remembered of it."""
        learned = Learned()
        for encoding, why in refused.items():
            learned = learned.learn(encoding, "refused", why, utc_now())
        with self.database.session() as session:
            state = DestinationState(name=destination, circuit="open", since=utc_now(), failures=1)
            state.capability = learned.as_record()
            session.add(state)

    def wait_s(self, after_s: float = 0.0) -> float:
        with self.database.reading() as session:
            report = session.get_one(Delivery, self.report.delivery_id)
            return self.reported.wait_s(session, report, now=report.queued_at + timedelta(seconds=after_s))

    def named(self) -> list[str]:
        return [o.sop_instance_uid for o in self.reported.objects("r1", now=utc_now())]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.database.close()


@pytest.mark.requirement("EMR-47", "OUT-44")
@pytest.mark.parametrize("state", ARRIVED)
def test_a_report_names_what_the_pacs_has_after_its_fallback(house: House, state: DeliveryState) -> None:
    house.add("first", state, "BINARY", *_UIDS["BINARY"])
    assert house.wait_s() == 0
    assert house.named() == ["2.25.1", "2.25.2"]


@pytest.mark.requirement("EMR-47", "OUT-44")
def test_a_report_names_the_picture_where_no_segmentation_was_taken(house: House) -> None:
    house.add("second", DeliveryState.VERIFIED, "SC", _UIDS["SC"][0])
    assert house.wait_s() == 0
    assert house.named() == ["2.25.5"]  # and no report that this PACS does not take


def test_of_two_pacs_the_one_that_has_most_is_named(house: House) -> None:
    house.add("second", DeliveryState.VERIFIED, "SC", _UIDS["SC"][0])
    house.add("first", DeliveryState.STORED, "BINARY", *_UIDS["BINARY"])
    assert house.named() == ["2.25.1", "2.25.2"]


def test_one_pacs_that_has_the_image_is_enough(house: House) -> None:
    house.add("second", DeliveryState.VERIFIED, "SC", _UIDS["SC"][0])
    house.add("first", DeliveryState.QUEUED)
    assert house.wait_s() == 0
    assert house.named() == ["2.25.5"]


@pytest.mark.parametrize("state", PENDING)
def test_a_report_waits_for_a_pacs_that_is_there_but_not_for_ever(house: House, state: DeliveryState) -> None:
    house.add("first", state)
    waits = [house.wait_s(after_s) for after_s in (0, 1, 10, 100, PATIENCE_S - 1)]
    assert waits == [0.1, 0.5, 5, 30, 30]
    assert house.wait_s(PATIENCE_S) == 0
    assert house.wait_s(-3600) == 0  # the clock was set back
    assert house.named() == ["2.25.3", "2.25.4"]  # what this PACS is sent first


def test_an_image_whose_report_is_still_on_its_way_is_waited_for(house: House) -> None:
    house.add("first", DeliveryState.SENT, "BINARY", _UIDS["BINARY"][0])
    assert house.wait_s() > 0
    assert house.named() == ["2.25.1", "2.25.2"]


@pytest.mark.requirement("EMR-47", "QUE-29")
def test_a_pacs_that_is_away_is_not_waited_for(house: House) -> None:
    house.add("first", DeliveryState.QUEUED)
    house.away("first")
    assert house.wait_s() == 0
    assert house.named() == ["2.25.3", "2.25.4"]


@pytest.mark.requirement("OUT-44")
def test_what_is_remembered_of_a_pacs_that_is_away_decides_what_is_named(house: House) -> None:
    house.add("first", DeliveryState.QUEUED)
    house.away("first", LABELMAP="no presentation context")
    assert house.named() == ["2.25.1", "2.25.2"]


def test_a_report_that_no_pacs_takes_is_not_foreseen(house: House) -> None:
    house.add("second", DeliveryState.QUEUED)
    house.away("second")
    assert house.named() == ["2.25.5"]


def test_of_several_that_are_waited_for_the_first_of_the_configuration_is_named(house: House) -> None:
    for name in ("second", "first"):
        house.add(name, DeliveryState.QUEUED)
    house.away("second")
    assert house.wait_s() > 0
    assert house.named() == ["2.25.3", "2.25.4"]


@pytest.mark.parametrize("state", ENDED)
def test_where_every_pacs_ended_without_the_image_none_is_named(house: House, state: DeliveryState) -> None:
    house.add("first", state)
    assert house.wait_s() == 0
    assert house.named() == []


def test_a_parked_delivery_whose_image_was_taken_is_named_with_it_alone(house: House) -> None:
    house.add("first", DeliveryState.PARKED, "BINARY", _UIDS["BINARY"][0])
    assert house.named() == ["2.25.1"]


def test_where_nothing_goes_to_a_pacs_the_report_does_not_wait_and_names_the_binary_one(house: House) -> None:
    assert house.wait_s() == 0
    assert house.named() == ["2.25.1", "2.25.2"]
    assert house.asked == ["BINARY"]


def test_a_report_that_was_accepted_waits_for_nothing(house: House) -> None:
    house.add("first", DeliveryState.QUEUED)
    with house.database.session() as session:
        session.get_one(Delivery, house.report.delivery_id).state = DeliveryState.STORED
    assert house.wait_s() == 0
