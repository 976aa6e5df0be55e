"""Assembly over a real database with a clock of the test's own."""

from __future__ import annotations

import itertools
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.intake.assembly import ALARM_INCOMPLETE, ALARM_LATE, Assembly, content_digest
from gateway.intake.errors import IntakeRejected
from gateway.intake.evidence import ExpectedCount
from gateway.intake.operator_wish import open_evidence, set_wish
from gateway.settings import Completeness, DestinationSettings, GatewaySettings, PeerAddress, SenderSettings, Settings
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.records import Association, Instance, InstanceState, Series, Study, StudyState, StudyVersion
from storage.spool import study_key

T0 = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
STUDY = "1.2.840.1"


class Counts:
    """Answers as the test says."""

    def __init__(self) -> None:
        self.answer: ExpectedCount | None = None
        self.asked: list[str] = []

    def latest(self, study_instance_uid: str, peer: PeerAddress) -> ExpectedCount:
        self.asked.append(study_instance_uid)
        return self.answer or ExpectedCount(source=peer.ae_title, pending=True)

    def forget(self, study_instance_uid: str) -> None:
        self.answer = None


class Ward:
    """A gateway's rows, a clock, and an assembly over them."""

    def __init__(self, database: Database, tmp_path: Path, **gateway: Any) -> None:
        self.database = database
        self.now = T0
        self.counts = Counts()
        self.enqueued: list[str] = []
        self.headers_read: list[str] = []
        self.unreadable: set[str] = set()
        self.settings = Settings(
            folder=tmp_path, gateway=GatewaySettings(**gateway), destinations=DestinationSettings()
        )
        self.assembly = self.new_assembly()

    def new_assembly(self) -> Assembly:
        return Assembly(
            self.database,
            self.settings,
            expected_count=self.counts,
            headers=self.header,
            enqueue=self.enqueue,
            clock=lambda: self.now,
        )

    def enqueue(self, _session: Session, version: StudyVersion) -> None:
        self.enqueued.append(version.workflow_id)

    def header(self, spool_path: str) -> Dataset:
        self.headers_read.append(spool_path)
        if spool_path in self.unreadable:
            raise IntakeRejected("cut off")
        header = Dataset()
        header.SeriesInstanceUID = spool_path.split("/")[0]
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [0, 0, int(spool_path.split("/")[1])]
        return header

    def after(self, seconds: float) -> list[str]:
        self.now += timedelta(seconds=seconds)
        return self.assembly.tick()

    def receive(
        self,
        slices: range | list[int],
        *,
        association: str = "a1",
        series: str = "1.2.840.1.1",
        study: str = STUDY,
        state: InstanceState = InstanceState.CURRENT,
        reopen: bool = True,
        content: str = "",
    ) -> None:
        with self.database.session() as session:
            row = session.get(Study, study)
            if row is None:
                row = Study(
                    study_instance_uid=study, study_key=study_key(study), state=StudyState.RECEIVING,
                    first_received_at=self.now, last_received_at=self.now, calling_ae="MR1", version=0,
                )  # fmt: skip
                session.add(row)
                session.flush()
            row.last_received_at = self.now
            if state == InstanceState.CURRENT and reopen and row.state != StudyState.QUARANTINED:
                row.state = StudyState.RECEIVING
            if session.get(Series, (study, series)) is None:
                session.add(
                    Series(
                        study_instance_uid=study, series_instance_uid=series, modality="MR",
                        first_received_at=self.now, last_received_at=self.now,
                    )
                )  # fmt: skip
            if session.get(Association, association) is None:
                session.add(
                    Association(
                        association_id=association, calling_ae="MR1", called_ae="SEGGATE",
                        peer_address="192.0.2.1", opened_at=self.now, instances=0,
                    )
                )  # fmt: skip
            for n in slices:
                session.add(
                    Instance(
                        object_id=f"{study}-{series}-{n}-{association}-{state}", study_instance_uid=study,
                        series_instance_uid=series, sop_instance_uid=f"{series}.{n}", state=state,
                        digest=f"{content}{n:064d}"[-64:], size_bytes=1, spool_path=f"{series}/{n}",
                        received_at=self.now, association_id=association, calling_ae="MR1", called_ae="SEGGATE",
                        peer_address="192.0.2.1",
                    )
                )  # fmt: skip

    def end(self, association: str = "a1", how: str = "released") -> None:
        with self.database.session() as session:
            row = session.get_one(Association, association)
            row.ended, row.ended_at = how, self.now

    def study(self, uid: str = STUDY) -> Study:
        with self.database.reading() as session:
            return session.get_one(Study, uid)

    def versions(self) -> list[StudyVersion]:
        with self.database.reading() as session:
            return list(session.scalars(select(StudyVersion).order_by(StudyVersion.number)))

    def events(self, kind: str) -> list[dict[str, Any]]:
        with self.database.reading() as session:
            ledger.verify(session)
            return [e.detail for e in ledger.events(session, ledger.study_subject(STUDY)) if e.kind == kind]

    def alarms(self) -> list[str]:
        with self.database.reading() as session:
            return [a.kind for a in open_alarms(session)]

    def wish(self, wish: str | None) -> bool:
        with self.database.session() as session:
            return set_wish(session, STUDY, wish, actor="operator")

    def set_state(self, state: StudyState) -> None:
        with self.database.session() as session:
            session.get_one(Study, STUDY).state = state


@pytest.fixture
def ward(database: Database, tmp_path: Path) -> Ward:
    return Ward(database, tmp_path)


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_a_released_study_is_declared_after_the_quiet_time_with_its_evidence(ward: Ward) -> None:
    ward.receive(range(10))
    ward.end()
    assert ward.after(29) == []
    assert ward.study().state_reason == "waiting for 30 s without a new object"
    (version_id,) = ward.after(1)
    (version,) = ward.versions()
    assert (version.version_id, version.number, version.rule) == (version_id, 1, "quiet-after-release")
    assert version.content_digest == content_digest([(f"1.2.840.1.1.{n}", f"{n:064d}") for n in range(10)])
    assert ward.enqueued == [version.workflow_id] == [f"study-{study_key(STUDY)}-{version.content_digest[:32]}"]
    assert ward.study().state == StudyState.WHOLE
    assert ward.study().version == 1
    (event,) = ward.events("declared-whole")
    assert event["rule"] == "quiet-after-release"
    assert event["evidence"] == version.evidence
    assert event["evidence"]["objects"] == 10
    assert event["evidence"]["series"] == {"1.2.840.1.1": 10}
    assert event["evidence"]["released"] is True
    assert event["evidence"]["quiet_s"] == 30
    assert event["evidence"]["gaps_checked"] is True
    assert ward.after(1000) == []


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_settings_are_those_of_the_sender(database: Database, tmp_path: Path) -> None:
    fast = SenderSettings(ae_title="MR1", completeness=Completeness(quiet_s=2))
    ward = Ward(database, tmp_path, senders=(fast,))
    ward.receive(range(3))
    ward.end()
    assert len(ward.after(2)) == 1


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_the_operator_completes_or_waits(ward: Ward) -> None:
    ward.receive(range(3))
    ward.end()
    assert ward.wish("wait")
    assert ward.after(10_000) == []
    assert ward.wish("complete")
    assert len(ward.after(0)) == 1
    assert ward.versions()[0].rule == "operator"
    assert ward.study().wish is None
    assert [e["wish"] for e in ward.events("operator-wish")] == ["wait", "complete"]
    assert not ward.wish("complete")


@pytest.mark.requirement("REC-13")
def test_an_aborted_study_is_interrupted_and_a_resend_makes_one_version(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end(how="aborted")
    assert ward.after(120) == []
    assert str(ward.study().state_reason).startswith("interrupted;")
    assert [(e["ended"], e["objects"]) for e in ward.events("interrupted")] == [("aborted", 4)]
    ward.receive(range(4), association="a2", state=InstanceState.DUPLICATE)
    ward.receive(range(4, 10), association="a2")
    ward.end("a2")
    assert ward.after(29) == []
    assert len(ward.after(1)) == 1
    (version,) = ward.versions()
    assert len(version.object_ids) == 10
    assert version.evidence["interrupted"] is False
    assert len(ward.enqueued) == 1
    assert len(ward.events("interrupted")) == 1


@pytest.mark.requirement("REC-13")
def test_another_series_does_not_make_up_for_an_aborted_one(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end(how="lost")
    ward.now += timedelta(seconds=5)
    ward.receive(range(6), association="a2", series="1.2.840.1.2")
    ward.end("a2")
    assert ward.after(299) == []
    assert len(ward.after(1)) == 1
    assert ward.versions()[0].rule == "quiet-open"
    assert ward.versions()[0].evidence["interrupted"] is True
    assert ward.versions()[0].evidence["because"] == ["interrupted association"]
    assert ward.alarms() == [ALARM_INCOMPLETE]
    ward.now += timedelta(seconds=5)
    ward.receive(range(5), association="a3", content="9")
    ward.end("a3")
    assert len(ward.after(30)) == 1
    assert ward.alarms() == []


def test_an_interruption_is_recorded_once_across_restarts(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end(how="aborted")
    ward.after(1)
    ward.assembly = ward.new_assembly()
    ward.after(1)
    assert len(ward.events("interrupted")) == 1


@pytest.mark.requirement("CMP-16")
def test_slice_gaps_prolong_the_wait_and_are_evidence(ward: Ward) -> None:
    ward.receive([0, 1, 2, 3, 5, 6, 7])
    ward.end()
    assert ward.after(30) == []
    assert "missing slices" in str(ward.study().state_reason)
    assert len(ward.after(270)) == 1
    (gap,) = ward.versions()[0].evidence["gaps"]
    assert (gap["after_mm"], gap["before_mm"], gap["missing"]) == (3, 5, 1)
    assert ward.versions()[0].evidence["because"] == ["slice gaps"]
    assert ward.alarms() == [ALARM_INCOMPLETE]


def test_a_filled_gap_ends_the_prolonged_wait(ward: Ward) -> None:
    ward.receive([0, 1, 2, 3, 5, 6, 7])
    ward.end()
    assert ward.after(100) == []
    ward.receive([4], association="a2")
    ward.end("a2")
    assert len(ward.after(30)) == 1


def test_a_growing_study_is_not_read_again(ward: Ward) -> None:
    for n in range(5):
        ward.receive([n])
        ward.after(1)
    assert sorted(ward.headers_read) == [f"1.2.840.1.1/{n}" for n in range(5)]


def test_an_unreadable_header_does_not_stop_the_declaration(ward: Ward) -> None:
    ward.unreadable = {"1.2.840.1.1/2"}
    ward.receive(range(5))
    ward.end()
    assert len(ward.after(300)) == 1


@pytest.fixture
def asking(database: Database, tmp_path: Path) -> Ward:
    sender = SenderSettings(
        ae_title="MR1",
        completeness=Completeness(expected_count="wait"),
        query=PeerAddress(ae_title="PACS", host="127.0.0.1", port=104),
    )
    return Ward(database, tmp_path, senders=(sender,))


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_the_expected_count_declares_at_once_after_the_release(asking: Ward) -> None:
    asking.counts.answer = ExpectedCount(source="PACS", count=4)
    asking.receive(range(4))
    assert asking.after(1) == []
    assert asking.counts.asked == []
    asking.end()
    assert len(asking.after(0)) == 1
    (version,) = asking.versions()
    assert version.rule == "expected-count"
    assert version.evidence["expected"] == {"source": "PACS", "count": 4, "problem": "", "pending": False}


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_a_count_that_is_not_reached_is_waited_for_and_then_alarmed(asking: Ward) -> None:
    asking.counts.answer = ExpectedCount(source="PACS", count=5)
    asking.receive(range(4))
    asking.end()
    assert asking.after(7199) == []
    assert asking.study().state_reason == "waiting for PACS, which has more objects of this study"
    assert len(asking.after(1)) == 1
    assert asking.versions()[0].rule == "give-up"
    assert asking.alarms() == [ALARM_INCOMPLETE]


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_quarantined_objects_do_not_count_towards_the_expected_number(asking: Ward) -> None:
    asking.counts.answer = ExpectedCount(source="PACS", count=5)
    asking.receive(range(3))
    asking.receive([3, 4], state=InstanceState.QUARANTINED)
    asking.end()
    assert asking.after(7199) == []
    assert len(asking.after(1)) == 1
    assert (asking.versions()[0].rule, asking.versions()[0].evidence["quarantined"]) == ("give-up", 2)
    with asking.database.reading() as session:
        (alarm,) = open_alarms(session)
    assert alarm.kind == ALARM_INCOMPLETE
    assert "3 objects although 5 are expected, 2 more are quarantined" in alarm.message


def test_a_study_with_quarantined_objects_is_declared_late_and_with_an_alarm(ward: Ward) -> None:
    ward.receive(range(3))
    ward.receive([3], state=InstanceState.QUARANTINED)
    ward.end()
    assert ward.after(299) == []
    assert ward.study().state_reason == "waiting for another copy of 1 quarantined objects, at most 300 s"
    assert len(ward.after(1)) == 1
    assert ward.versions()[0].evidence["because"] == ["quarantined objects: 1"]
    assert ward.alarms() == [ALARM_INCOMPLETE]


def test_an_intact_copy_makes_up_for_a_quarantined_object(ward: Ward) -> None:
    ward.receive([3], state=InstanceState.QUARANTINED)
    ward.receive(range(4))
    ward.end()
    assert len(ward.after(30)) == 1
    assert ward.versions()[0].evidence["quarantined"] == 0
    assert ward.alarms() == []


def test_own_results_that_the_peer_counts_too_do_not_delay(asking: Ward) -> None:
    asking.counts.answer = ExpectedCount(source="PACS", count=5)
    asking.receive(range(4))
    asking.receive([4], state=InstanceState.OWN_RESULT)
    asking.end()
    assert len(asking.after(1)) == 1
    assert asking.versions()[0].rule == "expected-count"


def test_a_failed_query_is_evidence_and_does_not_delay(asking: Ward) -> None:
    asking.counts.answer = ExpectedCount(source="PACS", problem="asked, no answer: it cannot be reached")
    asking.receive(range(4))
    asking.end()
    assert len(asking.after(30)) == 1
    assert "cannot be reached" in asking.versions()[0].evidence["expected"]["problem"]


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
@pytest.mark.parametrize("reopened_by_the_indexer", [True, False])
def test_late_slices_make_a_new_version(ward: Ward, reopened_by_the_indexer: bool) -> None:
    ward.receive(range(4))
    ward.end()
    assert len(ward.after(30)) == 1
    ward.set_state(StudyState.VERIFIED)
    ward.now += timedelta(seconds=3600)
    ward.receive([4, 5], association="a2", reopen=reopened_by_the_indexer)
    ward.end("a2")
    declared = ward.after(30) + ward.after(30)
    assert len(declared) == 1
    first, second = ward.versions()
    assert (second.number, len(second.object_ids)) == (2, 6)
    assert second.workflow_id != first.workflow_id
    event = ward.events("declared-whole")[1]
    assert (event["late_objects"], event["replaces_version"]) == (2, 1)


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_objects_after_the_late_window_wait_for_the_operator(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end()
    ward.after(30)
    ward.now += timedelta(seconds=86_401)
    ward.receive([4], association="a2")
    ward.end("a2")
    assert ward.after(30) == []
    assert ward.after(1000) == []
    assert ward.alarms() == [ALARM_LATE]
    assert len(ward.events("late-objects-held")) == 1
    assert "late window" in str(ward.study().state_reason)
    assert ward.wish("complete")
    assert len(ward.after(0)) == 1
    assert ward.versions()[1].rule == "operator"
    assert ward.alarms() == []


@pytest.mark.requirement("REC-08")
def test_duplicates_alone_make_no_new_version(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end()
    ward.after(30)
    ward.set_state(StudyState.VERIFIED)
    ward.receive(range(4), association="a2", state=InstanceState.DUPLICATE)
    ward.end("a2")
    assert ward.after(60) == []
    assert ward.study().state == StudyState.VERIFIED
    assert len(ward.enqueued) == 1


def test_a_reopened_study_with_the_same_content_goes_back_where_it_was(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end()
    ward.after(30)
    ward.set_state(StudyState.RECEIVING)
    assert ward.after(30) == []
    assert ward.study().state == StudyState.WHOLE
    assert len(ward.versions()) == 1
    assert len(ward.events("unchanged")) == 1


def test_content_that_comes_back_is_work_of_its_own(ward: Ward) -> None:
    ward.receive(range(4))
    ward.end()
    ward.after(30)
    with ward.database.session() as session:
        session.get_one(Instance, f"{STUDY}-1.2.840.1.1-3-a1-current").state = InstanceState.REPLACED
        session.get_one(Study, STUDY).state = StudyState.RECEIVING
    assert len(ward.after(30)) == 1
    with ward.database.session() as session:
        session.get_one(Instance, f"{STUDY}-1.2.840.1.1-3-a1-current").state = InstanceState.CURRENT
        session.get_one(Study, STUDY).state = StudyState.RECEIVING
    assert len(ward.after(30)) == 1
    assert len(set(ward.enqueued)) == 3
    assert ward.enqueued[2] == f"{ward.enqueued[0]}-3"


@pytest.mark.requirement("CMP-18")
def test_a_quarantined_study_is_never_declared(ward: Ward) -> None:
    ward.receive(range(4))
    ward.set_state(StudyState.QUARANTINED)
    ward.end()
    assert ward.after(100_000) == []
    ward.receive([5], association="a2")
    assert ward.after(100_000) == []
    assert ward.study().state == StudyState.QUARANTINED


@pytest.mark.parametrize("state", [InstanceState.OWN_RESULT, InstanceState.QUARANTINED])
def test_a_study_without_objects_to_process_is_listed_and_not_declared(ward: Ward, state: InstanceState) -> None:
    ward.receive(range(2), state=state)
    ward.end()
    assert ward.after(30) == []
    assert ward.study().state == StudyState.UNMATCHED
    assert ward.study().state_reason == f"no object to process ({state.value}: 2)"
    assert ward.enqueued == []
    ward.receive([7], association="a2")
    ward.end("a2")
    assert len(ward.after(30 if state == InstanceState.OWN_RESULT else 300)) == 1


def test_a_failing_enqueue_leaves_nothing_behind(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    ward.receive(range(4))
    ward.end()

    def refuse(_session: Session, _version: StudyVersion) -> None:
        raise ConnectionError("queue")

    monkeypatch.setattr(ward.assembly, "_enqueue", refuse)
    with pytest.raises(ConnectionError):
        ward.after(30)
    assert ward.versions() == []
    assert ward.study().state == StudyState.RECEIVING
    assert ward.events("declared-whole") == []
    monkeypatch.undo()
    assert len(ward.after(0)) == 1


def test_two_ticks_at_once_declare_once(ward: Ward) -> None:
    studies = [f"1.2.840.{n}" for n in range(1, 9)]
    for uid in studies:
        ward.receive(range(3), study=uid, series=f"{uid}.1")
    ward.end()
    ward.now += timedelta(seconds=30)
    barrier = threading.Barrier(3)
    found: list[list[str]] = []
    failures: list[BaseException] = []

    def tick() -> None:
        assembly = ward.new_assembly()
        try:
            barrier.wait(timeout=10)
            found.append(assembly.tick())
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failures.append(error)

    threads = [threading.Thread(target=tick) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert len(found) == 3
    assert sorted(itertools.chain.from_iterable(found)) == sorted(v.version_id for v in ward.versions())
    assert sorted(v.study_instance_uid for v in ward.versions()) == studies
    assert len(ward.enqueued) == len(set(ward.enqueued)) == 8


def test_an_object_that_arrives_during_the_look_postpones_the_declaration(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward.receive(range(4))
    ward.end()
    read = ward.header

    def arriving(spool_path: str) -> Dataset:
        if spool_path.endswith("/0"):
            ward.receive([9], association="a2")
        return read(spool_path)

    monkeypatch.setattr(ward.assembly, "_headers", arriving)
    assert ward.after(30) == []
    assert ward.study().state == StudyState.RECEIVING


def test_open_evidence_shows_what_is_waited_for(ward: Ward) -> None:
    ward.receive(range(4))
    ward.after(1)
    with ward.database.reading() as session:
        shown = open_evidence(session, ward.settings, STUDY, ward.now)
    assert "not released" in str(shown["state_reason"])
    assert isinstance(shown["evidence"], dict)
    assert shown["evidence"]["objects"] == 4
