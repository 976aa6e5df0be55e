"""Files go out as they are; what cannot be sent is named, and the rest is sent."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from gateway.intake.scp import Receiver
from gateway.sending import Failure, PeerRefused, Progress, Sendable, inspect_file, send_files
from gateway.settings import PeerAddress
from storage.part10 import ObjectEvidence, encode_preamble_and_meta, read_meta_elements
from storage.spool import Spool, received_at
from tests.support import peers
from tests.support.received_objects import data_set, intake_settings
from tests.support.scripted_peer import CT_IMAGE, EXPLICIT_LITTLE


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    settings = intake_settings(tmp_path / "gateway")
    running = Receiver(settings, Spool(settings.spool_dir, 0))
    running.start()
    yield running
    running.stop()


def address(receiver: Receiver) -> PeerAddress:
    return PeerAddress(ae_title="SEGGATE", host="127.0.0.1", port=receiver.port)


def dataset_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        _, offset = read_meta_elements(file)
    return path.read_bytes()[offset:]


def write_file(path: Path, data: bytes, *, sop: str, sop_class: str = CT_IMAGE, syntax: str = EXPLICIT_LITTLE) -> Path:
    evidence = ObjectEvidence(
        object_id="0" * 32, association_id="", peer_address="", calling_ae="", called_ae="",
        received_at=received_at("0" * 32), sop_class_uid=sop_class, sop_instance_uid=sop, transfer_syntax_uid=syntax,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_preamble_and_meta(evidence) + data)
    return path


def stored(receiver: Receiver) -> dict[str, Path]:
    paths = [entry.path for entry in receiver.spool.incoming() if not entry.is_event]
    return {receiver.spool.read_evidence(path).sop_instance_uid: path for path in paths}


def test_folder_is_sent_byte_for_byte_with_progress(receiver: Receiver, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    for number in range(5):
        write_file(folder / f"s{number % 2}" / f"{number}.dcm", data_set(f"1.2.3.{number}"), sop=f"1.2.3.{number}")
    (folder / "notes.txt").write_text("not DICOM at all")
    (folder / "nothing").write_bytes(b"")
    seen: list[Progress] = []
    report = send_files(folder, address(receiver), calling_ae="CT1", progress=seen.append)
    assert report.is_complete
    assert len(report.sent) == 5
    assert sorted((path.name, word) for path, word in report.skipped) == [
        ("notes.txt", "not DICOM"),
        ("nothing", "empty"),
    ]
    assert [(p.done, p.total) for p in seen] == [(n, 5) for n in range(1, 6)]
    kept = stored(receiver)
    for sent in report.sent:
        assert dataset_bytes(kept[sent.sop_instance_uid]) == dataset_bytes(sent.path)


@pytest.mark.parametrize(
    ("data", "meta", "expected"),
    [
        (data_set("1.2.3.1")[:-8], {}, "PixelData (7FE0,0010)"),
        (data_set(""), {}, "SOPInstanceUID (0008,0018)"),
        (data_set("1.2.3.1", study=""), {}, "StudyInstanceUID (0020,000D)"),
        (data_set("1.2.3.1"), {"sop": ""}, "MediaStorageSOPInstanceUID (0002,0003)"),
        (data_set("1.2.3.1"), {"sop": "../x"}, "MediaStorageSOPInstanceUID (0002,0003)"),
        (data_set("1.2.3.1"), {"syntax": ""}, "TransferSyntaxUID (0002,0010)"),
        (b"", {}, "ends after the file meta information"),
        (
            data_set("1.2.3.9"),
            {},
            "MediaStorageSOPInstanceUID (0002,0003) of the file is another than SOPInstanceUID (0008,0018)",
        ),
        (
            data_set("1.2.3.1", sop_class="1.2.840.10008.5.1.4.1.1.4"),
            {},
            "MediaStorageSOPClassUID (0002,0002) of the file is another than SOPClassUID (0008,0016)",
        ),
    ],
)
def test_bad_file_is_named_with_its_attribute_and_the_rest_is_sent(
    receiver: Receiver, tmp_path: Path, data: bytes, meta: dict[str, Any], expected: str
) -> None:
    bad = write_file(tmp_path / "f" / "a-bad.dcm", data, **({"sop": "1.2.3.1"} | meta))
    write_file(tmp_path / "f" / "good.dcm", data_set("1.2.3.2"), sop="1.2.3.2")
    report = send_files(tmp_path / "f", address(receiver), calling_ae="CT1")
    (failure,) = report.failed
    assert failure.path == bad
    assert expected in failure.reason
    assert not report.is_complete
    assert list(stored(receiver)) == ["1.2.3.2"]


def test_what_cannot_be_looked_into_is_named_and_the_rest_is_sent(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "f"
    write_file(folder / "good.dcm", data_set("1.2.3.2"), sop="1.2.3.2")
    (folder / "nothing.dcm").write_bytes(b"")
    (folder / "closed").mkdir()
    (folder / "link").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.dcm")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(folder)  # a socket's path is short
        listening.bind("socket.dcm")
        real = os.scandir

        def scandir(path: Any) -> Any:
            if str(path) == str(folder / "closed"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        report = send_files(folder, address(receiver), calling_ae="CT1")
    assert sorted((f.path.name, f.reason) for f in report.failed) == [
        ("closed", "folder cannot be read: Permission denied"),
        ("nothing.dcm", "empty file"),
    ]
    assert sorted((path.name, word) for path, word in report.skipped) == [
        ("link", "link to a folder, not followed"),
        ("pipe.dcm", "pipe, socket or device"),
        ("socket.dcm", "pipe, socket or device"),
    ]
    assert not report.is_complete
    assert list(stored(receiver)) == ["1.2.3.2"]


@pytest.mark.peer("shared-data")
def test_known_bad_files_are_named_and_the_folder_is_sent(receiver: Receiver, shared_data: Path) -> None:
    folder = shared_data / "dicom" / "pydicom" / "test_files"
    names = {
        "MR_truncated.dcm": "PixelData (7FE0,0010)",
        "badVR.dcm": "NumberOfFrames (0028,0008)",
        "no_meta.dcm": "file meta information",
        "ExplVR_LitEndNoMeta.dcm": "file meta information",
        "ExplVR_BigEndNoMeta.dcm": "file meta information",
        "meta_missing_tsyntax.dcm": "TransferSyntaxUID (0002,0010)",
    }
    good = [folder / "CT_small.dcm", folder / "MR_small.dcm"]
    report = send_files([*(folder / name for name in names), *good], address(receiver), calling_ae="CT1")
    assert {failure.path.name for failure in report.failed} == set(names)
    for failure in report.failed:
        assert names[failure.path.name] in failure.reason
    assert [sent.path for sent in report.sent] == good


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("REC-06", open="HTJ2K from a real sender")
def test_real_syntaxes_arrive_byte_for_byte_and_retired_ones_are_named(receiver: Receiver, shared_data: Path) -> None:
    folder = shared_data / "dicom" / "transfer-syntaxes"
    files = sorted(folder.glob("CTImage*.dcm"))
    seen: set[bytes] = set()
    for path in files:
        report = send_files(path, address(receiver), calling_ae="CT1")
        if _retired(path):
            (failure,) = report.failed
            assert "does not accept CT Image Storage in JPEG" in failure.reason
            continue
        assert report.is_complete, report.failed
        seen.add(dataset_bytes(path))
    kept = {dataset_bytes(entry.path) for entry in receiver.spool.incoming() if not entry.is_event}
    assert kept == seen
    assert len(files) - sum(_retired(path) for path in files) == 13


def _retired(path: Path) -> bool:
    return path.name.endswith((".4.53.dcm", ".4.55.dcm"))


@pytest.mark.peer("shared-data")
def test_dicomdir_is_skipped_with_a_word(shared_data: Path) -> None:
    assert inspect_file(shared_data / "dicom" / "pydicom" / "test_files" / "dicomdirtests" / "DICOMDIR") == "DICOMDIR"


def test_more_than_128_contexts_take_several_associations(receiver: Receiver, tmp_path: Path) -> None:
    from gateway.intake.presentation_contexts import storage_sop_classes

    for number, sop_class in enumerate(storage_sop_classes()[:140]):
        sop = f"1.2.3.{number}"
        write_file(tmp_path / "f" / f"{number}.dcm", data_set(sop, sop_class=sop_class), sop=sop, sop_class=sop_class)
    report = send_files(tmp_path / "f", address(receiver), calling_ae="CT1")
    assert report.is_complete, report.failed[:3]
    assert len(stored(receiver)) == 140
    associations = {receiver.spool.read_evidence(path).association_id for path in stored(receiver).values()}
    assert len(associations) == 2


def test_class_that_the_peer_does_not_take_is_named(receiver: Receiver, tmp_path: Path) -> None:
    write_file(tmp_path / "f" / "a.dcm", data_set("1.2.3.1", sop_class="1.2.3.4"), sop="1.2.3.1", sop_class="1.2.3.4")
    write_file(tmp_path / "f" / "b.dcm", data_set("1.2.3.2"), sop="1.2.3.2")
    report = send_files(tmp_path / "f", address(receiver), calling_ae="CT1")
    (failure,) = report.failed
    assert "does not accept" in failure.reason
    assert len(report.sent) == 1


def test_refusal_and_silence_are_told_apart(receiver: Receiver, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.dcm", data_set("1.2.3.1"), sop="1.2.3.1")
    with pytest.raises(PeerRefused, match="does not know our AE title"):
        send_files(path, address(receiver), calling_ae="STRANGER")
    with pytest.raises(PeerRefused, match="another AE title"):
        send_files(path, PeerAddress(ae_title="OTHER", host="127.0.0.1", port=receiver.port), calling_ae="CT1")
    closed = PeerAddress(ae_title="SEGGATE", host="127.0.0.1", port=receiver.port)
    receiver.stop()
    with pytest.raises(PeerRefused, match="cannot be reached"):
        send_files(path, closed, calling_ae="CT1", timeout_s=2)
    with pytest.raises(FileNotFoundError):
        send_files(tmp_path / "absent", closed)


def test_failure_status_is_reported_per_object(receiver: Receiver, tmp_path: Path) -> None:
    for number in range(2):
        write_file(tmp_path / "f" / f"{number}.dcm", data_set(f"1.2.3.{number}"), sop=f"1.2.3.{number}")

    def fill_up(progress: Progress) -> None:
        receiver.spool.reserve_bytes = 1 << 62

    report = send_files(tmp_path / "f", address(receiver), calling_ae="CT1", progress=fill_up)
    assert len(report.sent) == 1
    (failure,) = report.failed
    assert failure.status == 0xA700
    assert "out of disk space" in failure.reason


def test_sendable_carries_what_is_negotiated(tmp_path: Path) -> None:
    found = inspect_file(write_file(tmp_path / "a.dcm", data_set("1.2.3.1"), sop="1.2.3.1"))
    assert found == Sendable(
        path=tmp_path / "a.dcm", sop_class_uid=CT_IMAGE, sop_instance_uid="1.2.3.1", transfer_syntax_uid=EXPLICIT_LITTLE
    )
    assert isinstance(inspect_file(tmp_path), Failure)


@pytest.mark.peer("dcmtk", "shared-data")
def test_storescp_receives_what_we_send(shared_data: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([peers.program("storescp"), "+xa", "+B", "-od", str(tmp_path), str(port)])
    try:
        source = shared_data / "dicom" / "pydicom" / "test_files" / "CT_small.dcm"
        report = None
        for _ in range(100):
            try:
                peer = PeerAddress(ae_title="ANY", host="127.0.0.1", port=port)
                report = send_files(source, peer, calling_ae="CT1", timeout_s=10)
                break
            except PeerRefused:
                if process.poll() is not None:
                    raise
        assert report is not None
        assert report.is_complete
        (received,) = tmp_path.iterdir()
        assert pydicom.dcmread(received).PixelData == pydicom.dcmread(source).PixelData
    finally:
        process.terminate()
        process.wait(10)
