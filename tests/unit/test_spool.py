"""The spool: durable before told, written once, nothing outside its folder."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest

from storage.durable_files import partial_name
from storage.errors import ObjectChanged, ObjectMissing, SpoolFull, SpoolUnsafe
from storage.part10 import ObjectEvidence
from storage.spool import Settlement, Spool, object_path, quarantine_path, received_at, study_key

DATASET = b"\x08\x00\x18\x00UI\x08\x001.2.3.4\x00" + b"\x10\x00\x20\x00LO\x04\x00AB C"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "spool", reserve_bytes=0)
    made.prepare()
    return made


def evidence(spool: Spool, **changes: Any) -> ObjectEvidence:
    values: dict[str, Any] = {
        "object_id": spool.new_id(),
        "association_id": "a" * 32,
        "peer_address": "192.0.2.7",
        "calling_ae": "CT1",
        "called_ae": "SEGGATE",
        "received_at": datetime(2024, 2, 29, 12, 0, 0, 123456, UTC),
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "sop_instance_uid": "1.2.3.4",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
    }
    return ObjectEvidence(**(values | changes))


def left_in_tmp(spool: Spool) -> list[str]:
    return os.listdir(spool.root / "tmp")


def test_object_is_a_dicom_file_with_the_bytes_and_the_evidence(spool: Spool) -> None:
    told = evidence(spool)
    path = spool.write_object(DATASET, evidence=told)
    assert path.read_bytes().endswith(DATASET)
    assert spool.read_evidence(path) == told
    assert spool.dataset_digest(path) == hashlib.sha256(DATASET).hexdigest()
    read = pydicom.dcmread(path)
    assert read.file_meta.TransferSyntaxUID == told.transfer_syntax_uid
    assert read.file_meta.SendingApplicationEntityTitle == "CT1"
    assert read.file_meta.ReceivingApplicationEntityTitle == "SEGGATE"
    assert read.PatientID == "AB C"
    assert path.name == f"{told.object_id}.dcm"
    assert left_in_tmp(spool) == []


def test_stream_and_memoryview_give_the_same_bytes(spool: Spool) -> None:
    big = os.urandom(3 << 20)
    digest = hashlib.sha256(big).hexdigest()
    for source in (io.BytesIO(big), memoryview(big), bytearray(big)):
        assert spool.dataset_digest(spool.write_object(source, evidence=evidence(spool))) == digest


@pytest.mark.requirement("REC-01", open="power cut by a block-layer recorder")
def test_file_and_folder_are_synced_before_the_object_counts(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(file: int) -> None:
        steps.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), spool.root).split("/")[0])
        real_fsync(file)

    def rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    spool.write_object(DATASET, evidence=evidence(spool))
    assert steps == ["sync tmp", "rename", "sync incoming"]


@pytest.mark.requirement("REC-01", open="power cut by a block-layer recorder")
def test_every_folder_that_prepare_makes_is_synced_in_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_mkdir = os.fsync, Path.mkdir

    def fsync(file: int) -> None:
        steps.append(f"sync {os.path.relpath(os.readlink(f'/proc/self/fd/{file}'), tmp_path)}")
        real_fsync(file)

    def mkdir(self: Path, *arguments: Any, **named: Any) -> None:
        steps.append(f"mkdir {self.relative_to(tmp_path)}")
        real_mkdir(self, *arguments, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    Spool(tmp_path / "state" / "spool", reserve_bytes=0).prepare()
    made = [step.removeprefix("mkdir ") for step in steps if step.startswith("mkdir")]
    assert made[:2] == ["state", "state/spool"]
    for folder in made:
        assert f"sync {os.path.dirname(folder) or '.'}" in steps[steps.index(f"mkdir {folder}") :]


def test_short_writes_are_completed(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, memoryview(data)[:7]))
    path = spool.write_object(DATASET, evidence=evidence(spool))
    assert spool.dataset_digest(path) == hashlib.sha256(DATASET).hexdigest()


@pytest.mark.requirement("REC-02")
@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, SpoolFull), (errno.EDQUOT, SpoolFull), (errno.EIO, SpoolUnsafe)]
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_failed_write_or_sync_keeps_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected):
        spool.write_object(DATASET, evidence=evidence(spool))
    monkeypatch.undo()
    assert left_in_tmp(spool) == []
    assert spool.incoming() == []


def test_free_space_under_the_reserve_refuses_at_once(tmp_path: Path) -> None:
    full = Spool(tmp_path / "full", reserve_bytes=1 << 62)
    full.prepare()
    assert not full.has_space()
    with pytest.raises(SpoolFull, match="reserve"):
        full.write_object(DATASET, evidence=evidence(full))
    assert left_in_tmp(full) == []


def test_reserve_is_watched_inside_a_large_object(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(Spool, "has_space", lambda self: next(answers))
    with pytest.raises(SpoolFull):
        spool.write_object(io.BytesIO(bytes(20 << 20)), evidence=evidence(spool))
    assert left_in_tmp(spool) == []


def test_folder_that_vanished_is_unsafe(tmp_path: Path) -> None:
    gone = Spool(tmp_path / "gone", reserve_bytes=0)
    with pytest.raises(SpoolUnsafe):
        gone.write_object(DATASET, evidence=evidence(gone))
    with pytest.raises(SpoolUnsafe):
        gone.incoming()


def test_incoming_is_in_order_of_arrival_objects_and_events_alike(spool: Spool) -> None:
    first = spool.write_object(DATASET, evidence=evidence(spool))
    event = spool.write_event("released", {"association_id": "a" * 32})
    last = spool.write_object(DATASET, evidence=evidence(spool))
    (spool.root / "incoming" / "notes.txt").write_text("not ours")
    assert [entry.path for entry in spool.incoming()] == [first, event, last]
    assert [entry.is_event for entry in spool.incoming()] == [False, True, False]
    assert spool.read_event(event) == ("released", {"association_id": "a" * 32})
    spool.forget_event(event)
    spool.forget_event(event)
    assert len(spool.incoming()) == 2


def test_ids_grow_even_when_the_clock_steps_back(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10**18, 9 * 10**17, 9 * 10**17 + 1])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    ids = [spool.new_id() for _ in range(3)]
    assert ids == sorted(ids)
    assert received_at(ids[0]) == datetime.fromtimestamp(10**9, UTC)


def test_settled_object_is_found_before_and_after_the_move(spool: Spool) -> None:
    told = evidence(spool)
    early = spool.write_object(DATASET, evidence=told)
    final = object_path(study_key("1.2.3"), told.object_id)
    assert spool.resolve(final) == early
    for _ in range(2):
        spool.settle([Settlement(object_id=told.object_id, spool_path=final)])
    assert spool.resolve(final) == spool.root / final
    assert not early.exists()
    with pytest.raises(ObjectMissing):
        spool.resolve(object_path(study_key("1.2.3"), spool.new_id()))


def test_settled_objects_are_listed_and_can_be_taken_back(spool: Spool) -> None:
    first, second, unreadable = (evidence(spool) for _ in range(3))
    for told in (second, first, unreadable):
        spool.write_object(DATASET, evidence=told)
    places = [object_path(study_key("1.2.3"), told.object_id) for told in (first, second)]
    for told, place in zip((first, second), places, strict=True):
        spool.settle([Settlement(object_id=told.object_id, spool_path=place)])
    quarantined = spool.quarantine(unreadable.object_id)
    (folder,) = spool.study_folders()
    (folder / "notes.txt").write_text("put here by hand")
    (folder / f"{spool.new_id()}.dcm").mkdir()
    assert spool.objects_in(folder) == [spool.root / place for place in places]
    assert spool.objects_in(spool.root / "quarantine") == [spool.root / quarantined]
    assert spool.objects_in(folder.parent / "results") == []
    spool.take_back([spool.root / places[1], spool.root / quarantined])
    assert spool.objects_in(folder) == [spool.root / places[0]]
    assert [entry.id for entry in spool.incoming()] == [second.object_id, unreadable.object_id]
    assert spool.read_evidence(spool.resolve(places[1])) == second
    with pytest.raises(SpoolUnsafe):
        spool.take_back([spool.root / places[1]])


def test_quarantined_object_leaves_incoming(spool: Spool) -> None:
    told = evidence(spool)
    spool.write_object(DATASET, evidence=told)
    assert spool.quarantine(told.object_id) == quarantine_path(told.object_id)
    assert spool.resolve(quarantine_path(told.object_id)).is_file()
    assert spool.incoming() == []


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize(
    "path", ["../outside", "studies/../../x", "/etc/passwd", "studies//x", "tmp/x", "studies/a\0b", ""]
)
def test_path_cannot_leave_the_spool(spool: Spool, path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside the spool"):
        spool.resolve(path)


@pytest.mark.parametrize("bad", ["", "../x", "A" * 32, "0" * 31])
def test_object_id_and_study_key_are_checked(spool: Spool, bad: str) -> None:
    with pytest.raises(ValueError, match="part of a path"):
        object_path(bad, spool.new_id())
    with pytest.raises(ValueError, match="part of a path"):
        spool.write_object(DATASET, evidence=evidence(spool, object_id=bad))


def test_no_uid_in_the_folder_name_of_a_study() -> None:
    assert study_key("1.2.840.1") == hashlib.sha256(b"1.2.840.1").hexdigest()[:32]


@pytest.mark.requirement("QUE-27")
def test_result_file_is_written_once(spool: Spool) -> None:
    key = study_key("1.2.3")
    relative, digest = spool.store_result_file(key, "r1", "seg.dcm", b"seg")
    assert (spool.root / relative).read_bytes() == b"seg"
    assert digest == hashlib.sha256(b"seg").hexdigest()
    assert spool.store_result_file(key, "r1", "seg.dcm", b"seg") == (relative, digest)
    with pytest.raises(ObjectChanged):
        spool.store_result_file(key, "r1", "seg.dcm", b"other")
    assert (spool.root / relative).read_bytes() == b"seg"
    assert left_in_tmp(spool) == []


@pytest.mark.requirement("QUE-27")
def test_a_result_made_while_it_is_written_is_named_by_its_content(spool: Spool) -> None:
    key, digest = study_key("1.2.3"), hashlib.sha256(b"segment").hexdigest()
    stored = spool.store_result_chunks(key, "r1", "seg-binary", ".dcm", iter([b"seg", b"", b"ment"]))
    assert stored == (f"studies/{key}/results/r1/seg-binary-{digest[:16]}.dcm", digest, 7)
    assert (spool.root / stored[0]).read_bytes() == b"segment"
    assert spool.store_result_chunks(key, "r1", "seg-binary", ".dcm", [b"segment"]) == stored
    (spool.root / stored[0]).write_bytes(b"altered")
    with pytest.raises(ObjectChanged):
        spool.store_result_chunks(key, "r1", "seg-binary", ".dcm", [b"segment"])
    assert left_in_tmp(spool) == []


def test_a_result_whose_making_fails_leaves_nothing(spool: Spool) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"seg"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        spool.store_result_chunks(study_key("1.2.3"), "r1", "seg", ".dcm", chunks())
    assert left_in_tmp(spool) == []
    assert list(spool.root.glob("studies/*/results/*/*")) == []


def test_a_result_file_that_was_altered_or_truncated_is_not_used(spool: Spool) -> None:
    path, digest = spool.store_result_file("a" * 32, "r1", "labels.npz", b"labels")
    assert spool.unchanged(path, digest).read_bytes() == b"labels"
    for other in (b"label", b"lapels"):
        (spool.root / path).write_bytes(other)
        with pytest.raises(ObjectChanged, match=r"labels\.npz was altered or truncated.*backup"):
            spool.unchanged(path, digest)


def test_a_result_that_would_not_fit_is_refused_with_the_numbers(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spool, "free_bytes", lambda _: 5 << 20)
    spool.check_room(5 << 20)
    with pytest.raises(SpoolFull, match=r"5 MB free, a result may take 6 MB"):
        spool.check_room(6 << 20)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_result_name_cannot_leave_its_folder(spool: Spool, name: str) -> None:
    with pytest.raises(ValueError, match="part of a path"):
        spool.store_result_file(study_key("1"), "r1", name, b"")


def test_sweep_removes_only_what_dead_processes_left(spool: Spool) -> None:
    alive = spool.root / "tmp" / partial_name(f"{spool.new_id()}.dcm")
    alive.write_bytes(b"being written")
    dead = alive.with_name(alive.name.replace(f".{os.getpid()}.", ".999999999."))
    dead.write_bytes(b"half")
    # Of the processes of another host that shares the spool nothing is known here.
    elsewhere = dead.with_name(f"{spool.new_id()}.dcm.another-host.999999999.part")
    elsewhere.write_bytes(b"being written")
    assert spool.sweep_tmp() == 1
    assert sorted(left_in_tmp(spool)) == sorted([alive.name, elsewhere.name])
    os.utime(alive, (0, 0))
    os.utime(elsewhere, (0, 0))
    assert spool.sweep_tmp() == 2


def test_check_sync_leaves_nothing(spool: Spool) -> None:
    assert spool.check_sync() > 0
    assert left_in_tmp(spool) == []
    with pytest.raises(SpoolUnsafe):
        Spool(spool.root / "absent", 0).check_sync()


def test_foreign_file_has_no_evidence(spool: Spool, tmp_path: Path) -> None:
    foreign = tmp_path / "x.dcm"
    foreign.write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(ValueError, match="evidence"):
        spool.read_evidence(foreign)
    foreign.write_bytes(b"junk")
    with pytest.raises(ValueError, match="preamble"):
        spool.read_evidence(foreign)
