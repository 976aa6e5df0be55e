"""From the spool to the rows: states of objects and studies, conflicts, identities, the database away."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import select

from gateway.intake.assembly import Assembly
from gateway.intake.expected_count import ExpectedCounts
from gateway.intake.indexer import Indexer
from gateway.settings import Settings
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import DatabaseAway
from storage.part10 import ObjectEvidence
from storage.records import (
    Association,
    Instance,
    InstanceState,
    Record,
    Refusal,
    Result,
    ResultObject,
    Series,
    Study,
    StudyState,
    StudyVersion,
)
from storage.spool import Spool
from tests.support.received_objects import SERIES, STUDY, data_set, element, intake_settings
from tests.support.scripted_peer import CT_IMAGE, EXPLICIT_LITTLE

A: dict[str, Any] = {"id": "P1", "name": "Doe^Jane", "birth_date": "19700101"}


class Bench:
    """A spool, a database and an indexer."""

    def __init__(self, folder: Path, **receiver: Any) -> None:
        self.settings: Settings = intake_settings(folder, **receiver)
        self.spool = Spool(self.settings.spool_dir, 0)
        self.spool.prepare()
        self.database = Database(self.settings.database_url)
        self.database.create_all()
        self.indexer = Indexer(self.spool, self.database, self.settings)

    def receive(
        self,
        data: bytes,
        *,
        sop: str = "1.2.3.1",
        association: str = "a" * 32,
        sop_class: str = CT_IMAGE,
        syntax: str = EXPLICIT_LITTLE,
    ) -> Path:
        evidence = ObjectEvidence(
            object_id=self.spool.new_id(),
            association_id=association,
            peer_address="192.0.2.1",
            calling_ae="CT1",
            called_ae="SEGGATE",
            received_at=datetime.now(UTC),
            sop_class_uid=sop_class,
            sop_instance_uid=sop,
            transfer_syntax_uid=syntax,
        )
        return self.spool.write_object(data, evidence=evidence)

    def slice(self, sop: str, **how: Any) -> Path:
        return self.receive(data_set(sop, **how), sop=sop)

    def rows(self, kind: type[Record]) -> Sequence[Any]:
        with self.database.reading() as session:
            return session.scalars(select(kind)).all()

    def states(self) -> list[str]:
        with self.database.reading() as session:
            return [str(state) for state in session.scalars(select(Instance.state).order_by(Instance.object_id))]

    def study(self, uid: str = STUDY) -> Study:
        with self.database.reading() as session:
            return session.get_one(Study, uid)

    def set_state(self, state: StudyState) -> None:
        with self.database.session() as session:
            session.get_one(Study, STUDY).state = state

    def events(self, kind: str, subject: str = f"study:{STUDY}") -> list[dict[str, Any]]:
        with self.database.reading() as session:
            return [dict(event.detail) for event in ledger.events(session, subject) if event.kind == kind]

    def alarms(self) -> list[tuple[str, str]]:
        with self.database.reading() as session:
            return [(alarm.kind, alarm.message) for alarm in open_alarms(session)]

    def settle_after(self, seconds: float) -> None:
        """What assembly makes of the rows so many seconds from now, where nothing is in use."""
        Assembly(
            self.database,
            self.settings,
            expected_count=ExpectedCounts(calling_ae="SEGGATE"),
            headers=lambda path: Dataset(),
            enqueue=lambda session, version: None,
            clock=lambda: datetime.now(UTC) + timedelta(seconds=seconds),
        ).tick()

    def event(self, kind: str, association: str = "a" * 32, **detail: Any) -> Path:
        common = {
            "association_id": association,
            "calling_ae": "CT1",
            "called_ae": "SEGGATE",
            "peer_address": "192.0.2.1",
            "opened_at": datetime.now(UTC).isoformat(),
        }
        return self.spool.write_event(kind, common | detail)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.database.close()


def test_objects_become_rows_and_move_to_their_study(bench: Bench) -> None:
    for number in range(3):
        bench.slice(f"1.2.3.{number}", **A)
    assert bench.indexer.run_once() == 3
    assert bench.states() == ["current"] * 3
    study = bench.study()
    assert (study.state, study.patient_id, study.patient_name) == (StudyState.RECEIVING, "P1", "Doe^Jane")
    assert [s.series_description for s in bench.rows(Series)] == ["Thorax"]
    assert bench.spool.incoming() == []
    for row in bench.rows(Instance):
        path = bench.spool.resolve(row.spool_path)
        assert path.parent == bench.spool.root / "studies" / study.study_key / "objects"
        assert bench.spool.dataset_digest(path) == row.digest
    assert bench.indexer.run_once() == 0


@pytest.mark.requirement("REC-08")
def test_identical_retransmit_is_counted_and_starts_nothing(bench: Bench) -> None:
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    bench.set_state(StudyState.VERIFIED)
    last = bench.study().last_received_at
    bench.slice("1.2.3.1", **A)
    bench.event("ended", ended="released", ended_at=datetime.now(UTC).isoformat(), objects=2)
    bench.indexer.run_once()
    assert bench.states() == ["current", "duplicate"]
    assert bench.study().state == StudyState.VERIFIED
    assert bench.study().last_received_at == last
    assert bench.events("received")[0]["series"] == [{"series_instance_uid": SERIES, "current": 1, "duplicate": 1}]
    assert bench.alarms() == []
    assert all(bench.spool.resolve(row.spool_path).is_file() for row in bench.rows(Instance))


def test_retransmit_while_receiving_keeps_the_study_waiting(bench: Bench) -> None:
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    first = bench.study().last_received_at
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    assert bench.study().last_received_at > first


@pytest.mark.requirement("REC-09", open="the operator's page")
@pytest.mark.parametrize(
    ("policy", "states", "study_state"),
    [
        ("keep-first", ["current", "conflict"], StudyState.VERIFIED),
        ("newest", ["replaced", "current"], StudyState.RECEIVING),
        ("quarantine", ["current", "conflict"], StudyState.QUARANTINED),
    ],
)
def test_conflicting_retransmit_keeps_both(
    tmp_path: Path, policy: str, states: list[str], study_state: StudyState
) -> None:
    bench = Bench(tmp_path, conflict_policy=policy)
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    bench.set_state(StudyState.VERIFIED)
    bench.slice("1.2.3.1", **A, pixels=b"\3\4" * 16, extra=element(0x00200013, "IS", "7"))
    bench.indexer.run_once()
    assert bench.states() == states
    assert bench.study().state == study_state
    contents = {bench.spool.dataset_digest(bench.spool.resolve(row.spool_path)) for row in bench.rows(Instance)}
    assert len(contents) == 2
    (told,) = bench.events("conflicting-retransmit")
    assert told["policy"] == policy
    assert told["differs_in"] == ["InstanceNumber (0020,0013)", "PixelData (7FE0,0010)"]
    assert [kind for kind, _ in bench.alarms()] == ["conflicting-retransmit"]
    bench.slice("1.2.3.1", **A, pixels=b"\3\4" * 16, extra=element(0x00200013, "IS", "7"))
    bench.indexer.run_once()
    assert bench.states() == [*states, "duplicate"]
    bench.database.close()


def test_same_uid_in_another_study_never_replaces(tmp_path: Path) -> None:
    bench = Bench(tmp_path, conflict_policy="newest")
    bench.slice("1.2.3.1", **A)
    bench.slice("1.2.3.1", **A, study="1.2.826.0.1.2")
    bench.indexer.run_once()
    assert bench.states() == ["current", "conflict"]
    assert bench.study().state == StudyState.RECEIVING
    bench.settle_after(60)
    other = bench.study("1.2.826.0.1.2")
    assert (other.state, other.state_reason) == (StudyState.UNMATCHED, "no object to process (conflict: 1)")
    assert len(bench.events("conflicting-retransmit", "study:1.2.826.0.1.2")) == 1
    bench.database.close()


def test_study_of_unreadable_objects_alone_is_listed_with_their_number(bench: Bench) -> None:
    for number in range(2):
        bench.receive(data_set("1.2.3.99", **A), sop=f"1.2.3.{number}")
        bench.indexer.run_once()
        bench.settle_after(60)
        reason = f"no object to process (quarantined: {number + 1})"
        assert (bench.study().state, bench.study().state_reason) == (StudyState.UNMATCHED, reason)
    assert len(bench.events("object-quarantined")) == 2
    bench.slice("1.2.3.50", **A)
    bench.indexer.run_once()
    assert bench.study().state == StudyState.RECEIVING


def test_unreadable_object_does_not_open_a_finished_study(bench: Bench) -> None:
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    bench.set_state(StudyState.VERIFIED)
    bench.receive(data_set("1.2.3.99", **A), sop="1.2.3.2")
    bench.indexer.run_once()
    assert bench.study().state == StudyState.VERIFIED


@pytest.mark.requirement("CMP-18")
@pytest.mark.parametrize(
    ("other", "attribute"),
    [
        ({"id": "P2"}, "PatientID (0010,0020)"),
        ({"name": "Roe^Jane"}, "PatientName (0010,0010)"),
        ({"birth_date": "19700102"}, "PatientBirthDate (0010,0030)"),
    ],
)
def test_two_identities_under_one_study_stop_it(bench: Bench, other: dict[str, str], attribute: str) -> None:
    bench.slice("1.2.3.1", **A)
    bench.slice("1.2.3.2", **(A | other))
    bench.slice("1.2.3.3", **A)
    bench.indexer.run_once()
    assert bench.states() == ["current", "quarantined", "current"]
    study = bench.study()
    assert study.state == StudyState.QUARANTINED
    assert study.patient_name == "Doe^Jane"
    assert attribute in str(study.state_reason)
    ((kind, message),) = bench.alarms()
    assert kind == "identity-conflict"
    assert attribute in message
    told = str(bench.events("identity-conflict")) + message + str(study.state_reason)
    assert not any(value in told for value in (*A.values(), *other.values()))


@pytest.mark.requirement("CMP-18")
def test_absent_identity_never_conflicts_and_is_filled_later(bench: Bench) -> None:
    bench.slice("1.2.3.1", id="P1")
    bench.slice("1.2.3.2")
    bench.slice("1.2.3.3", **A | {"name": "DOE^Jane^^"})
    bench.slice("1.2.3.4", **A)
    bench.indexer.run_once()
    assert bench.states() == ["current"] * 4
    assert bench.study().patient_birth_date == "19700101"
    assert bench.alarms() == []


@pytest.mark.parametrize("state", [StudyState.VERIFIED, StudyState.WHOLE, StudyState.UNMATCHED, StudyState.FAILED])
def test_late_object_opens_the_study_again(bench: Bench, state: StudyState) -> None:
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    bench.set_state(state)
    bench.slice("1.2.3.2", **A)
    bench.indexer.run_once()
    assert bench.study().state == StudyState.RECEIVING
    assert [event["state_before"] for event in bench.events("reopened")] == [state]


def test_quarantined_study_stays_quarantined(bench: Bench) -> None:
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    bench.set_state(StudyState.QUARANTINED)
    bench.slice("1.2.3.2", **A)
    bench.indexer.run_once()
    assert bench.study().state == StudyState.QUARANTINED


def nested(levels: int, *, defined: bool) -> bytes:
    inner = b""
    for _ in range(levels):
        if defined:
            item = b"\xfe\xff\x00\xe0" + len(inner).to_bytes(4, "little") + inner
            inner = b"\x08\x00\x40\x11SQ\x00\x00" + len(item).to_bytes(4, "little") + item
        else:
            inner = (
                b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
                + inner
                + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
            )
    return inner


HOSTILE = {
    "10000 nested sequences": (
        data_set("1.2.3.1", extra=nested(10000, defined=False)),
        "ReferencedImageSequence (0008",
    ),
    "10000 nested, defined": (data_set("1.2.3.1", extra=nested(10000, defined=True)), "ReferencedImageSequence (0008"),
    "length beyond the end": (data_set("1.2.3.1")[:-8], "PixelData (7FE0,0010)"),
    "pixels too short": (data_set("1.2.3.1", pixels=b"\1\2"), "PixelData (7FE0,0010)"),
    "bad number of frames": (data_set("1.2.3.1", extra=element(0x00280008, "IS", "1A")), "NumberOfFrames (0028,0008)"),
    "another SOP Instance UID": (data_set("1.2.3.99"), "SOPInstanceUID (0008,0018)"),
    "path as UID": (data_set("../../etc/passwd"), "SOPInstanceUID (0008,0018)"),
    "blank study": (data_set("1.2.3.1", study=""), "StudyInstanceUID (0020,000D)"),
    "path as study": (data_set("1.2.3.1", study="/../../x"), "StudyInstanceUID (0020,000D)"),
    "no series": (data_set("1.2.3.1", series=None), "SeriesInstanceUID (0020,000E)"),
    "long UID": (data_set("1.2.3.1", study="1." + "2" * 70), "StudyInstanceUID (0020,000D)"),
    "another class": (data_set("1.2.3.1", sop_class="1.2.840.10008.5.1.4.1.1.4"), "SOPClassUID (0008,0016)"),
    "text": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ""),
    "NUL bytes": (b"\0" * 512, ""),
    "nothing": (b"", ""),
    "noise": (bytes(range(256)) * 16, ""),
}


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_object_is_quarantined_with_its_attribute(bench: Bench, name: str) -> None:
    data, attribute = HOSTILE[name]
    before = {p for p in bench.spool.root.parent.rglob("*") if not p.is_relative_to(bench.spool.root)}
    bench.receive(data)
    bench.slice("1.2.3.50", **A)
    bench.indexer.run_once()
    assert bench.states() == ["quarantined", "current"]
    bad = next(row for row in bench.rows(Instance) if row.state == InstanceState.QUARANTINED)
    assert bad.state_reason.startswith(attribute)
    assert bad.spool_path.startswith("quarantine/")
    assert bench.spool.dataset_digest(bench.spool.resolve(bad.spool_path)) == bad.digest
    assert [kind for kind, _ in bench.alarms()] == ["object-quarantined"]
    after = {p for p in bench.spool.root.parent.rglob("*") if not p.is_relative_to(bench.spool.root)}
    assert {p for p in after - before if "sqlite" not in p.name} == set()


def test_text_that_columns_cannot_hold_is_no_obstacle(bench: Bench) -> None:
    bench.slice("1.2.3.1", id="x" * 5000, name="A\0B^\ud800".encode("utf-8", "replace").decode(), birth_date="1" * 99)
    bench.indexer.run_once()
    assert bench.states() == ["current"]
    assert len(str(bench.study().patient_id)) == 256


def test_wrong_character_set_is_read_with_replacements_and_noted(bench: Bench) -> None:
    data = data_set("1.2.3.1", **A).replace(b"ISO_IR 192", b"ISO_IR 100")
    bench.receive(data.replace(b"Doe^Jane", b"D\xf6e^Jan\xe9"), sop="1.2.3.1")
    bench.receive(data_set("1.2.3.2").replace(b"Doe^Jane", b"D\xf6e^Jan\xe9"), sop="1.2.3.2")
    bad = data_set("1.2.3.3", **A, series="1.2.5", study="1.2.6").replace(b"Doe^Jane", b"D\xf6e^Jan\xe9")
    bench.receive(bad, sop="1.2.3.3")
    bench.indexer.run_once()
    assert bench.states() == ["current"] * 3
    assert bench.study().patient_name == "Döe^Jané"
    rows = {row.sop_instance_uid: row for row in bench.rows(Instance)}
    assert rows["1.2.3.1"].state_reason is None
    assert "character set" in rows["1.2.3.3"].state_reason


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chrArab", "قباني^لنزار"),
        ("chrFren", "Buc^Jérôme"),
        ("chrFrenMulti", "Buc^Jérôme"),
        ("chrGerm", "Äneas^Rüdiger"),
        ("chrGreek", "Διονυσιος"),
        ("chrH31", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("chrH32", "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
        ("chrHbrw", "שרון^דבורה"),
        ("chrI2", "Hong^Gildong=洪^吉洞=홍^길동"),
        ("chrJapMulti", "やまだ^たろう"),
        ("chrJapMultiExplicitIR6", "やまだ^たろう"),
        ("chrKoreanMulti", "김희중"),
        ("chrRuss", "Люкceмбypг"),  # noqa: RUF001 - as the file has it
        ("chrX1", "Wang^XiaoDong=王^小東"),
        ("chrX2", "Wang^XiaoDong=王^小东"),
    ],
)
def test_patient_name_is_right_in_its_character_set(bench: Bench, shared_data: Path, name: str, expected: str) -> None:
    from gateway.intake.header import read_header

    path = shared_data / "dicom" / "pydicom" / "charset_files" / f"{name}.dcm"
    header = read_header(path)
    bench.receive(
        path.read_bytes()[header.dataset_offset :],
        sop=header.sop_instance_uid,
        sop_class=header.sop_class_uid,
        syntax=header.transfer_syntax_uid,
    )
    bench.indexer.run_once()
    (study,) = bench.rows(Study)
    assert study.patient_name == expected


@pytest.mark.requirement("OUT-46")
def test_own_result_coming_back_opens_nothing(bench: Bench) -> None:
    now = datetime.now(UTC)
    with bench.database.session() as session:
        session.add(
            Study(
                study_instance_uid=STUDY, study_key="k", state=StudyState.VERIFIED, first_received_at=now,
                last_received_at=now, calling_ae="CT1", version=1,
            )
        )  # fmt: skip
        session.flush()
        session.add(
            StudyVersion(
                version_id="v", study_instance_uid=STUDY, number=1, content_digest="d", declared_at=now, rule="r",
                evidence={}, object_ids=[], workflow_id="w",
            )
        )  # fmt: skip
        session.flush()
        session.add(
            Result(
                result_id="r", version_id="v", study_instance_uid=STUDY, series_instance_uid=SERIES, part="", rule="r",
                model_name="m", model_version="1", weights_digest="w", configuration_digest="c", state="released",
                workflow_id="w2", created_at=now,
            )
        )  # fmt: skip
        session.flush()
        session.add(
            ResultObject(
                sop_instance_uid="1.2.3.77", result_id="r", role="SEG", encoding="BINARY", sop_class_uid="1.2",
                series_instance_uid="1.2", transfer_syntax_uid="1.2", spool_path="p", digest="d", size_bytes=1,
            )
        )  # fmt: skip
    bench.slice("1.2.3.77", **A)
    bench.slice("1.2.3.77", **A, study="1.2.9")
    bench.indexer.run_once()
    assert bench.states() == ["own_result", "own_result"]
    assert bench.study().state == StudyState.VERIFIED
    assert [study.study_instance_uid for study in bench.rows(Study)] == [STUDY]
    assert len(bench.events("own-result-returned")) == 1


@pytest.mark.requirement("OUT-46")
def test_result_that_the_header_gives_away_opens_nothing(bench: Bench) -> None:
    def by_maker(dataset: Dataset) -> str | None:
        return "made by a gateway" if dataset.Modality == "CT" else None

    bench.indexer = Indexer(bench.spool, bench.database, bench.settings, is_own_result=by_maker)
    bench.slice("1.2.3.1", **A)
    bench.indexer.run_once()
    assert bench.states() == ["own_result"]
    assert bench.rows(Study) == []


def test_crash_between_commit_and_move_is_repaired(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.slice("1.2.3.1", **A)
    monkeypatch.setattr(Spool, "settle", lambda self, moves: None)
    bench.indexer.run_once()
    monkeypatch.undo()
    (waiting,) = bench.spool.incoming()
    assert bench.spool.resolve(bench.rows(Instance)[0].spool_path) == waiting.path
    Indexer(bench.spool, bench.database, bench.settings).run_once()
    assert bench.states() == ["current"]
    assert bench.spool.incoming() == []
    assert bench.spool.resolve(bench.rows(Instance)[0].spool_path).is_file()


@pytest.mark.requirement("REC-03", open="PostgreSQL stopped under load")
def test_database_away_loses_nothing_and_the_index_catches_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    away = threading.Event()
    tried = threading.Event()
    away.set()
    real = Database.session

    def session(self: Database) -> Any:
        if away.is_set():
            tried.set()
            raise DatabaseAway("the database did not answer")
        return real(self)

    monkeypatch.setattr(Database, "session", session)
    stop = threading.Event()
    thread = threading.Thread(target=bench.indexer.run, args=(stop,))
    thread.start()
    for number in range(5):
        bench.slice(f"1.2.3.{number}", **A)
    assert tried.wait(10)
    assert len(bench.spool.incoming()) == 5
    away.clear()
    deadline = datetime.now(UTC) + timedelta(seconds=20)
    while bench.spool.incoming() and datetime.now(UTC) < deadline:
        stop.wait(0.02)
    stop.set()
    thread.join(10)
    assert bench.states() == ["current"] * 5
    assert len(bench.rows(Study)) == 1


def test_entry_that_the_database_refuses_does_not_hold_up_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sqlalchemy.exc import DataError

    from gateway.intake import study_index

    real = study_index.StudyIndex._place_readable

    def refusing(self: Any, item: Any) -> Instance:
        if item.header.sop_instance_uid == "1.2.3.1":
            raise DataError("INSERT", {"name": "CANARY"}, ValueError("CANARY"))
        return real(self, item)

    monkeypatch.setattr(study_index.StudyIndex, "_place_readable", refusing)
    for number in range(3):
        bench.slice(f"1.2.3.{number}", **A)
    bench.indexer.run_once()
    assert sorted(bench.states()) == ["current", "current", "quarantined"]
    assert "DataError" in caplog.text
    assert "CANARY" not in caplog.text
    assert bench.spool.incoming() == []


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize("suffix", ["dcm", "json"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "input/output error"])
def test_unreadable_entry_does_not_hold_up_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str, suffix: str
) -> None:
    now = 0.0
    bench.indexer = Indexer(bench.spool, bench.database, bench.settings, clock=lambda: now)
    bad = bench.slice("1.2.3.0", **A) if suffix == "dcm" else bench.event("opened")
    if kind == "input/output error":
        real_open, real_read = Path.open, Path.read_bytes

        def failing(real: Any) -> Any:
            def read(self: Path, *args: Any, **named: Any) -> Any:
                if self == bad:
                    raise OSError(errno.EIO, "Input/output error")
                return real(self, *args, **named)

            return read

        monkeypatch.setattr(Path, "open", failing(real_open))
        monkeypatch.setattr(Path, "read_bytes", failing(real_read))
    else:
        content = bad.read_bytes()
        bad.unlink()
        bad.mkdir() if kind == "folder" else os.mkfifo(bad)
    for number in (1, 2):
        bench.slice(f"1.2.3.{number}", **A)
    bench.indexer.run_once()
    assert bench.states() == ["current"] * 2
    ((alarm, message),) = bench.alarms()
    assert alarm == "spool-entry-unreadable"
    assert bad.name in message
    assert bench.indexer.run_once() == 0  # not at every look
    if kind == "input/output error":
        monkeypatch.undo()
    else:
        bad.rmdir() if kind == "folder" else bad.unlink()
        bad.write_bytes(content)
    now = 61.0
    assert bench.indexer.run_once() == 1
    assert bench.spool.incoming() == []
    assert bench.alarms() == []


def test_entry_that_the_database_refuses_altogether_raises_an_alarm_and_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.intake import study_index

    now = 0.0
    bench.indexer = Indexer(bench.spool, bench.database, bench.settings, clock=lambda: now)
    real = study_index.StudyIndex.place

    def refusing(self: Any, item: Any) -> Any:
        if item.evidence.sop_instance_uid == "1.2.3.1":
            raise RuntimeError("unforeseen")
        return real(self, item)

    monkeypatch.setattr(study_index.StudyIndex, "place", refusing)
    for number in range(3):
        bench.slice(f"1.2.3.{number}", **A)
    bench.indexer.run_once()
    assert bench.states() == ["current"] * 2
    assert [kind for kind, _ in bench.alarms()] == ["index-refused"]
    (left,) = bench.spool.incoming()
    assert left.path.name in bench.alarms()[0][1]
    monkeypatch.undo()
    now = 61.0
    bench.indexer.run_once()
    assert bench.states() == ["current"] * 3
    assert bench.alarms() == []


def test_entry_that_breaks_the_index_itself_does_not_hold_up_the_others(bench: Bench) -> None:
    def broken(dataset: Dataset) -> str | None:
        if dataset.SOPInstanceUID == "1.2.3.1":
            raise RuntimeError("unforeseen")
        return None

    bench.indexer = Indexer(bench.spool, bench.database, bench.settings, is_own_result=broken)
    for number in range(3):
        bench.slice(f"1.2.3.{number}", **A)
    bench.indexer.run_once()
    assert sorted(bench.states()) == ["current", "current", "quarantined"]
    assert bench.spool.incoming() == []


@pytest.mark.requirement("REC-13")
@pytest.mark.parametrize("ended", ["aborted", "lost", "released"])
def test_end_of_the_association_is_evidence(bench: Bench, ended: str) -> None:
    bench.event("opened")
    bench.slice("1.2.3.1", **A)
    bench.event("ended", ended=ended, ended_at=datetime.now(UTC).isoformat(), objects=1)
    bench.indexer.run_once()
    (association,) = bench.rows(Association)
    assert (association.ended, association.instances) == (ended, 1)
    assert [event["ended"] for event in bench.events("received")] == [ended]
    assert bench.spool.incoming() == []


def test_receiver_that_starts_again_leaves_no_association_open(bench: Bench) -> None:
    bench.event("opened")
    bench.slice("1.2.3.1", **A)
    bench.spool.write_event("started", {"at": (datetime.now(UTC) + timedelta(seconds=1)).isoformat()})
    bench.indexer.run_once()
    (association,) = bench.rows(Association)
    assert association.ended == "lost"
    assert len(bench.events("received")) == 1


def test_event_that_is_read_twice_counts_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = {
        "kind": "association", "calling_ae": "X", "called_ae": "SEGGATE", "peer_address": "192.0.2.9",
        "reason": "calling AE title not recognized", "first_at": "2024-01-01T00:00:00+00:00",
        "last_at": "2024-01-01T00:00:05+00:00", "count": 7,
    }  # fmt: skip
    bench.slice("1.2.3.1", **A)
    bench.event("ended", ended="released", ended_at=datetime.now(UTC).isoformat(), objects=1)
    bench.spool.write_event("refused", {"refusals": [refusal]})
    monkeypatch.setattr(Spool, "forget_event", lambda self, path: None)
    bench.indexer.run_once()
    bench.indexer.run_once()
    monkeypatch.undo()
    bench.indexer.run_once()
    assert [row.count for row in bench.rows(Refusal)] == [7]
    assert len(bench.events("received")) == 1
    later = refusal | {"last_at": "2024-01-01T00:01:00+00:00", "count": 2}
    bench.spool.write_event("refused", {"refusals": [later]})
    bench.indexer.run_once()
    assert [row.count for row in bench.rows(Refusal)] == [9]


def test_flood_of_invented_names_does_not_fill_the_table(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.intake.association_index._MAX_REFUSALS", 3)
    now = datetime.now(UTC).isoformat()
    for number in range(10):
        refusal = {
            "kind": "association", "calling_ae": f"X{number}", "called_ae": "S", "peer_address": "192.0.2.9",
            "reason": "no", "first_at": now, "last_at": f"2024-01-01T00:00:{number:02d}+00:00", "count": 1,
        }  # fmt: skip
        bench.spool.write_event("refused", {"refusals": [refusal]})
    bench.indexer.run_once()
    rows = bench.rows(Refusal)
    assert len(rows) == 4
    assert sum(row.count for row in rows) == 10


def test_damaged_event_and_foreign_file_do_not_stop_the_index(bench: Bench) -> None:
    bench.slice("1.2.3.1", **A)
    (bench.spool.root / "incoming" / f"{bench.spool.new_id()}.json").write_text('{"kind": 1}')
    bench.spool.write_event("ended", {"association_id": "x"})
    (bench.spool.root / "incoming" / f"{bench.spool.new_id()}.dcm").write_bytes(b"put here by hand")
    bench.slice("1.2.3.2", **A)
    bench.indexer.run_once()
    assert bench.states() == ["current", "quarantined", "current"]
    assert bench.spool.incoming() == []


@pytest.mark.requirement("REC-10")
def test_many_associations_with_one_study_give_one_row_each(bench: Bench) -> None:
    for number in range(40):
        sop = f"1.2.3.{number}"
        bench.receive(data_set(sop, **A), sop=sop, association=f"{number % 8:032x}")
    bench.indexer.run_once()
    assert len(bench.rows(Study)) == 1
    assert len(bench.rows(Series)) == 1
    assert [a.instances for a in bench.rows(Association)] == [5] * 8
    assert bench.states() == ["current"] * 40
