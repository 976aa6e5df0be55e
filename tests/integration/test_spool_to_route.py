"""From acknowledged bytes to the routing decision, with nothing replaced but the clock and the queue."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.intake.assembly import Assembly
from gateway.intake.evidence import ExpectedCount, object_counts
from gateway.intake.header import read_header
from gateway.intake.indexer import Indexer
from gateway.intake.operator_wish import set_wish
from gateway.intake.routes_file import RoutesFile
from gateway.intake.routing import Routed, route_version
from gateway.intake.routing_rules import parse_rules
from gateway.quarantine_release import Released, release_quarantine
from gateway.retrying import retry_study
from gateway.settings import PeerAddress
from gateway.steps import StudyWork
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.part10 import ObjectEvidence
from storage.records import Instance, InstanceState, LedgerEvent, Result, Study, StudyState, StudyVersion
from storage.spool import Spool
from tests.support.received_objects import STUDY, data_set, element, intake_settings
from tests.support.scripted_peer import CT_IMAGE, EXPLICIT_LITTLE
from tests.support.story_rows import NotedQueue

A = {"id": "P1", "name": "Doe^Jane", "birth_date": "19700101"}
B = {"id": "P2", "name": "Roe^Joan", "birth_date": "19800101"}
RULES = """
[[rules]]
name = "thorax"
model = "ct-thorax"
[rules.when]
all = [
    { attribute = "Modality", op = "equals", value = "CT" },
    { attribute = "SeriesDescription", op = "starts-with", value = "Thor" },
    { attribute = "SliceOrientation", op = "equals", value = "axial" },
    { attribute = "CallingAETitle", op = "equals", value = "CT1" },
    { attribute = "NumberOfInstances", op = "range", min = 4 },
]
"""


class NoAnswer:
    def latest(self, study_instance_uid: str, peer: PeerAddress) -> ExpectedCount:
        raise AssertionError("no query is configured")

    def forget(self, study_instance_uid: str) -> None: ...


class Intake:
    def __init__(self, folder: Path) -> None:
        self.settings = intake_settings(folder)
        self.spool = Spool(self.settings.spool_dir, 0)
        self.spool.prepare()
        self.database = Database(self.settings.database_url)
        self.database.create_all()
        self.indexer = Indexer(self.spool, self.database, self.settings)
        self.ahead = timedelta()
        self.enqueued: list[str] = []
        self.assembly = self.new_assembly()

    def new_assembly(self) -> Assembly:
        return Assembly(
            self.database,
            self.settings,
            expected_count=NoAnswer(),
            headers=self.header,
            enqueue=self.enqueue,
            clock=lambda: datetime.now(UTC) + self.ahead,
        )

    def enqueue(self, _session: Session, version: StudyVersion) -> None:
        self.enqueued.append(version.version_id)

    def header(self, spool_path: str) -> Dataset:
        return read_header(self.spool.resolve(spool_path)).dataset

    def association(self, name: str, slices: range, ended: str, patient: dict[str, str]) -> None:
        """Send slices over an association of its own and index everything."""
        identifier = name * 32
        common = {
            "association_id": identifier,
            "calling_ae": "CT1",
            "called_ae": "SEGGATE",
            "peer_address": "192.0.2.1",
            "opened_at": datetime.now(UTC).isoformat(),
        }
        self.spool.write_event("opened", common)
        for number in slices:
            geometry = element(0x00200032, "DS", f"0\\0\\{number}") + element(0x00200037, "DS", "1\\0\\0\\0\\1\\0")
            self.spool.write_object(
                data_set(
                    f"1.2.3.{number}",
                    extra=geometry,
                    id=patient["id"],
                    name=patient["name"],
                    birth_date=patient["birth_date"],
                ),
                evidence=ObjectEvidence(
                    object_id=self.spool.new_id(),
                    association_id=identifier,
                    peer_address="192.0.2.1",
                    calling_ae="CT1",
                    called_ae="SEGGATE",
                    received_at=datetime.now(UTC),
                    sop_class_uid=CT_IMAGE,
                    sop_instance_uid=f"1.2.3.{number}",
                    transfer_syntax_uid=EXPLICIT_LITTLE,
                ),
            )
        self.spool.write_event("ended", common | {"ended": ended, "ended_at": datetime.now(UTC).isoformat()})
        while self.indexer.run_once():
            pass

    def after(self, seconds: float) -> list[str]:
        self.ahead += timedelta(seconds=seconds)
        return self.assembly.tick()

    def work(self, routes: Path) -> StudyWork:
        """Routing as a worker does it that has just started."""
        rules = RoutesFile(routes, self.database, serves=lambda _name: True)
        return StudyWork(database=self.database, routes=rules, headers=self.header, orders=cast(Any, None))

    def route(self, version_id: str) -> Routed:
        return route_version(self.database, self.header, version_id, parse_rules(RULES))

    def release(self) -> Released:
        return release_quarantine(self.database, NotedQueue(), STUDY, reason="the first is right", actor="user:jo")

    def kinds(self) -> list[str]:
        with self.database.reading() as session:
            ledger.verify(session)
            return [event.kind for event in ledger.events(session, ledger.study_subject(STUDY))]

    def objects(self) -> dict[str, int]:
        with self.database.reading() as session:
            return object_counts(session, STUDY)

    def study(self) -> Study:
        with self.database.reading() as session:
            return session.get_one(Study, STUDY)


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    made = Intake(tmp_path)
    yield made
    made.database.close()


@pytest.mark.requirement("REC-13")
def test_an_abort_and_its_resend_make_one_version_that_is_routed(intake: Intake) -> None:
    intake.association("a", range(3), "aborted", A)
    assert intake.after(60) == []
    assert str(intake.study().state_reason).startswith("interrupted")
    intake.association("b", range(6), "released", A)
    (version_id,) = intake.after(31)
    assert intake.enqueued == [version_id]
    routed = intake.route(version_id)
    assert routed.outcome == "matched"
    assert [d.model for d in routed.decisions] == ["ct-thorax"]
    assert intake.study().state == StudyState.PROCESSING


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_late_slices_change_the_decision_in_a_new_version(intake: Intake) -> None:
    intake.association("a", range(3), "released", A)
    (first,) = intake.after(31)
    assert intake.route(first).outcome == "unmatched"
    assert intake.study().state == StudyState.UNMATCHED
    intake.association("b", range(3, 6), "released", A)
    (second,) = intake.after(60)
    assert intake.route(second).outcome == "matched"
    intake.association("c", range(6), "released", A)
    assert intake.after(60) == []
    assert intake.study().version == 2


@pytest.mark.requirement("CMP-18")
def test_two_patients_under_one_study_are_never_declared(intake: Intake) -> None:
    intake.association("a", range(3), "released", A)
    intake.association("b", range(3, 6), "released", B)
    assert intake.study().state == StudyState.QUARANTINED
    assert intake.after(100_000) == []
    assert intake.enqueued == []
    with intake.database.reading() as session:
        kinds = set(session.scalars(select(LedgerEvent.kind)))
    assert "declared-whole" not in kinds


@pytest.mark.requirement("CMP-18")
def test_a_released_study_is_declared_from_the_first_patients_objects_alone(intake: Intake) -> None:
    intake.association("a", range(6), "released", A)
    intake.association("b", range(6, 9), "released", B)
    assert intake.release().objects_aside == 3
    assert intake.after(31) == []
    assert intake.study().state_reason == "waiting for another copy of 3 quarantined objects, at most 300 s"
    (version_id,) = intake.after(300)
    with intake.database.reading() as session:
        version = session.get_one(StudyVersion, version_id)
        used = set(session.scalars(select(Instance.object_id).where(Instance.state == InstanceState.CURRENT)))
        aside = session.scalars(select(Instance).where(Instance.state == InstanceState.QUARANTINED)).all()
    assert set(version.object_ids) == used
    assert len(used) == 6
    assert version.evidence["because"] == ["quarantined objects: 3"]
    assert all("another patient" in str(i.state_reason) for i in aside)
    assert all(intake.spool.resolve(i.spool_path).is_file() for i in aside)
    assert intake.study().patient_id == "P1"
    assert intake.route(version_id).outcome == "matched"

    # The wrong objects once more, byte for byte, and a worker that starts anew: nothing is undone.
    intake.association("c", range(6, 9), "released", B)
    again = intake.new_assembly()
    intake.ahead += timedelta(seconds=1000)
    assert again.tick() == []
    assert intake.study().state == StudyState.PROCESSING
    assert intake.objects() == {"current": 6, "quarantined": 3, "duplicate": 3}
    assert intake.kinds().count("identity-conflict") == 3


@pytest.mark.requirement("CMP-18")
def test_a_new_object_of_the_other_patient_quarantines_a_released_study_again(intake: Intake) -> None:
    intake.association("a", range(3), "released", A)
    intake.association("b", range(3, 4), "released", B)
    intake.release()
    intake.association("c", range(4, 5), "released", B)
    assert intake.study().state == StudyState.QUARANTINED
    with intake.database.reading() as session:
        assert "identity-conflict" in {a.kind for a in open_alarms(session)}
    assert intake.release().objects_aside == 2


@pytest.mark.requirement("CMP-18")
def test_an_operator_need_not_wait_for_what_was_released(intake: Intake) -> None:
    intake.association("a", range(6), "released", A)
    intake.association("b", range(6, 7), "released", B)
    intake.release()
    with intake.database.session() as session:
        assert set_wish(session, STUDY, "complete", actor="user:jo")
    assert len(intake.after(0)) == 1


@pytest.mark.requirement("RTE-23")
def test_an_unmatched_study_is_routed_again_by_the_rules_of_today(intake: Intake, tmp_path: Path) -> None:
    routes, queue = tmp_path / "routes.toml", NotedQueue()
    routes.write_text('time_zone = "UTC"\n' + RULES.replace("min = 4", "min = 40"))
    intake.association("a", range(6), "released", A)
    (version_id,) = intake.after(31)
    work = intake.work(routes)
    assert work.route(version_id) == "unmatched"
    before = intake.study().state_reason

    # The rules still do not want it: as before, and no version or result is made.
    assert retry_study(intake.database, queue, STUDY, actor="user:jo").routing == 1
    assert [work.route(version_id) for _ in range(2)] == ["unmatched"] * 2
    assert (intake.study().state, intake.study().state_reason) == (StudyState.UNMATCHED, before)
    assert intake.study().version == 1
    with intake.database.reading() as session:
        assert session.scalars(select(Result)).all() == []

    routes.write_text('time_zone = "UTC"\n' + RULES)
    assert work.route(version_id) == "unmatched"  # a repeated step: nobody asked for it
    assert retry_study(intake.database, queue, STUDY, actor="user:jo").routing == 1
    assert intake.work(routes).route(version_id) == "matched"
    assert work.route(version_id) == "matched"
    assert intake.study().state == StudyState.PROCESSING
    assert [str(call["workflow"]) for call in queue.calls] == ["process_study"] * 2
    assert len(set(queue.ids)) == 2
    kinds = [k for k in intake.kinds() if k in {"routed", "retried"}]
    assert kinds == ["routed", "retried", "routed", "retried", "routed"]
    with intake.database.reading() as session:
        events = ledger.events(session, ledger.study_subject(STUDY))
        assert {e.detail["reason"] for e in events if e.kind == "retried"} == {before}
