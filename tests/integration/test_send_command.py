"""`seggate send`: what was stored, what was not and why, to our receiver and to a peer that refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.commands.send import parse_address
from gateway.intake.scp import Receiver
from gateway.state import open_spool
from tests.support import pacs
from tests.support.outgoing import InventedResult
from tests.support.received_objects import intake_settings

KNOWN_TO_FAIL = {
    "MR_truncated.dcm": "PixelData (7FE0,0010)",
    "badVR.dcm": "NumberOfFrames (0028,0008)",
    "no_meta.dcm": "no file meta information",
    "ExplVR_LitEndNoMeta.dcm": "no file meta information",
    "ExplVR_BigEndNoMeta.dcm": "no file meta information",
    "meta_missing_tsyntax.dcm": "TransferSyntaxUID (0002,0010)",
}


def send(path: Path, to: str, *options: str) -> Result:
    ran = CliRunner().invoke(app, ["send", str(path), "--to", to, *options], env={"COLUMNS": "300"})
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def document(ran: Result) -> dict[str, Any]:
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two DICOM objects and a text file."""
    result = InventedResult(tmp_path / "result")
    folder = tmp_path / "to-send"
    folder.mkdir()
    for item in result.objects("BINARY"):
        (folder / f"{item.role}.dcm").write_bytes(item.path.read_bytes())
    (folder / "README.txt").write_text("not DICOM")
    return folder


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    settings = intake_settings(tmp_path / "gateway")
    running = Receiver(settings, open_spool(settings))
    running.start()
    yield running
    running.stop()


def test_everything_is_stored_and_counted(files: Path, receiver: Receiver) -> None:
    ran = send(files, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "CT1")
    assert ran.exit_code == 0
    assert "2 stored" in ran.stdout
    assert f"1 are no DICOM objects: {files / 'README.txt'} (not DICOM)" in ran.stdout
    assert sum(not i.is_event for i in receiver.spool.incoming()) == 2


def test_the_first_skipped_files_are_named_and_the_others_counted(files: Path, receiver: Receiver) -> None:
    for number in range(7):
        (files / f"{number}.txt").write_text("not DICOM")
    ran = send(files, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "CT1")
    assert "8 are no DICOM objects" in ran.stdout
    assert "4.txt (not DICOM) and 3 more" in ran.stdout


def test_the_document_for_scripts_is_all_of_standard_output(files: Path, receiver: Receiver) -> None:
    ran = send(files, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "CT1", "--json")
    assert ran.exit_code == 0
    said = document(ran)
    assert said["ok"] is True
    assert {s["sop_instance_uid"] for s in said["sent"]} == {
        pydicom.dcmread(p, stop_before_pixels=True).SOPInstanceUID for p in files.glob("*.dcm")
    }
    assert [s["file"] for s in said["skipped"]] == [str(files / "README.txt")]
    assert ran.stderr == ""


def test_a_file_that_cannot_be_sent_is_named_with_its_attribute_and_the_rest_is_sent(
    files: Path, receiver: Receiver
) -> None:
    broken = pydicom.dcmread(files / "SEG.dcm")
    broken.SOPInstanceUID = ""
    broken.save_as(files / "broken.dcm", enforce_file_format=False)
    ran = send(files, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "CT1")
    assert ran.exit_code == 1
    assert "broken.dcm" in ran.stdout
    assert "SOPInstanceUID (0008,0018)" in ran.stdout
    assert "2 stored" in ran.stdout


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
def test_real_files_known_to_fail_are_named_with_the_attribute(
    tmp_path: Path, shared_data: Path, receiver: Receiver
) -> None:
    folder = shared_data / "dicom" / "pydicom" / "test_files"
    sent_with = tmp_path / "mixed"
    sent_with.mkdir()
    for name in (*KNOWN_TO_FAIL, "CT_small.dcm"):
        (sent_with / name).symlink_to(folder / name)
    said = document(send(sent_with, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "CT1", "--json"))
    failed = {Path(f["file"]).name: f["reason"] for f in said["failed"]}
    assert set(failed) == set(KNOWN_TO_FAIL)
    for name, words in KNOWN_TO_FAIL.items():
        assert words in failed[name], (name, failed[name])
    assert [Path(s["file"]).name for s in said["sent"]] == ["CT_small.dcm"]


@pytest.mark.peer("shared-data")
def test_a_series_with_blank_uids_is_refused_file_by_file(shared_data: Path, receiver: Receiver) -> None:
    folder = shared_data / "dicom" / "ct-organs" / "series-with-blank-uids"
    ran = send(folder, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "CT1", "--json")
    said = document(ran)
    assert ran.exit_code == 1
    assert said["sent"] == []
    assert len(said["failed"]) == len(list(folder.iterdir()))
    assert all("UID (0008,00" in f["reason"] for f in said["failed"])


def test_a_refusal_of_the_peer_is_shown_with_its_status(tmp_path: Path, files: Path) -> None:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", script=[0xA700, ("then", 0xB000)])) as peer:
        ran = send(files, f"SCRIPTED@127.0.0.1:{peer.port}", "--json")
    said = document(ran)
    assert ran.exit_code == 1
    assert [f["status"] for f in said["failed"]] == ["0xA700"]
    assert [s["status"] for s in said["warnings"]] == ["0xB000"]


@pytest.mark.requirement("REC-04", open="one-click add")
def test_a_sender_that_is_not_on_the_allow_list_is_told_so(files: Path, receiver: Receiver) -> None:
    ran = send(files, f"SEGGATE@127.0.0.1:{receiver.port}", "--from", "STRANGER", "--json")
    assert ran.exit_code == 1
    assert "does not know our AE title" in document(ran)["error"]
    assert not [i for i in receiver.spool.incoming() if not i.is_event]


def test_nobody_there_is_one_clear_line(files: Path) -> None:
    ran = send(files, f"PACS@127.0.0.1:{pacs.free_port()}")
    assert ran.exit_code == 1
    assert "cannot be reached" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("127.0.0.1:104", "use AE@host:port"),
        ("PACS@127.0.0.1", "use AE@host:port"),
        ("PACS@127.0.0.1:0", "the port must be 1 to 65535"),
        ("PACS@127.0.0.1:70000", "the port must be 1 to 65535"),
        ("SEVENTEEN-LETTERS@host:104", "an AE title has 1 to 16 characters"),
        ("BACK\\SLASH@host:104", "an AE title has 1 to 16 characters"),
        ("PACS@host name:104", "use AE@host:port"),
    ],
)
def test_an_address_that_is_none_is_wrong_usage(files: Path, to: str, words: str) -> None:
    ran = send(files, to)
    assert ran.exit_code == 2
    assert words in ran.stderr


def test_a_calling_ae_title_that_is_none_is_wrong_usage(files: Path) -> None:
    assert send(files, "PACS@127.0.0.1:104", "--from", "SEVENTEEN-LETTERS").exit_code == 2


def test_addresses_with_names_numbers_and_blanks_are_understood() -> None:
    assert parse_address("PACS@[::1]:11112").host == "::1"
    assert parse_address("MY PACS@pacs.hospital.example:104").ae_title == "MY PACS"
    assert parse_address("PACS@10.1.1.5:104").port == 104
