"""Every file of shared data that is known to fail meets a running gateway.

Those that a sender can send go through C-STORE, by a scripted peer where no toolkit would send them; the others are
named by `seggate send`, which sends the rest. Whatever was acknowledged has exactly one row, with a state.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
import pytest

from gateway.errors import Rejected
from gateway.results.series import read_series
from storage.part10 import meta_text, read_meta_elements
from storage.records import Instance, Study
from tests.support.intensity_model import write_intensity_bundle
from tests.support.peers import shared_data
from tests.support.phantoms import PhantomSeries, write_series
from tests.support.running_gateway import RunningGateway, running_gateway
from tests.support.scripted_peer import CT_IMAGE, EXPLICIT_LITTLE, Response, ScriptedPeer

pytestmark = pytest.mark.peer("shared-data")

PYDICOM, MORE, SYNTAXES = "dicom/pydicom/test_files", "dicom/pydicom-data", "dicom/transfer-syntaxes"
BLANK = "dicom/ct-organs/series-with-blank-uids"

# A sender could send these; the attribute that the quarantine names.
QUARANTINED = {
    f"{PYDICOM}/MR_truncated.dcm": "PixelData (7FE0,0010)",
    f"{PYDICOM}/badVR.dcm": "NumberOfFrames (0028,0008)",
    f"{PYDICOM}/rtplan_truncated.dcm": "BeamSequence (300A,00B0)",
    f"{MORE}/bad_sequence.dcm": "SOPInstanceUID (0008,0018)",
    f"{MORE}/JLSL_16_15_1_1F.dcm": "StudyInstanceUID (0020,000D)",
    f"{MORE}/emri_small_jpeg_2k_lossless_too_short.dcm": "PixelData (7FE0,0010)",
}
# These say not even how they are encoded: no sender can send them.
NOT_SENDABLE = {
    f"{PYDICOM}/no_meta.dcm": "no file meta information",
    f"{PYDICOM}/ExplVR_LitEndNoMeta.dcm": "no file meta information",
    f"{PYDICOM}/ExplVR_BigEndNoMeta.dcm": "no file meta information",
    f"{PYDICOM}/rtstruct.dcm": "no file meta information",
    f"{PYDICOM}/meta_missing_tsyntax.dcm": "TransferSyntaxUID (0002,0010)",
    f"{PYDICOM}/empty_charset_LEI.dcm": "MediaStorageSOPClassUID (0002,0002)",
    f"{PYDICOM}/nested_priv_SQ.dcm": "MediaStorageSOPClassUID (0002,0002)",
}
# Encoded in a way that nobody here can decode: refused when the association is negotiated.
REFUSED = (
    f"{SYNTAXES}/CTImage.dcm_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm",
    f"{SYNTAXES}/CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm",
    f"{MORE}/liver_deflate.dcm",
    f"{MORE}/liver_nonbyte_aligned_deflate.dcm",
)
# Segmentations with one bit per pixel and run lengths: stored as they are, and nothing for a model.
ONE_BIT = (f"{MORE}/liver_rle.dcm", f"{MORE}/liver_nonbyte_aligned_rle.dcm")
SENDER = "DEMO-SCANNER"
PRIVATE_CLASS = "1.3.46.670589.5.0.3"
ROUTES = """
time_zone = "UTC"
[[rules]]
name = "all"
model = "sides"
[rules.when]
all = [{ attribute = "Modality", op = "in", value = ["CT", "MR", "SEG"] }]
"""


@dataclass
class Ward:
    """The gateway, and what it has acknowledged so far: affected SOP Instance UIDs, one per Success."""

    gateway: RunningGateway
    folder: Path
    data: Path
    acknowledged: list[str] = field(default_factory=list)

    def store(self, data_set: bytes, *, sop_class: str, sop_instance: str, syntax: str) -> Response:
        """One object as a scripted peer sends it, whatever is in it."""
        with ScriptedPeer(self.gateway.address.port) as peer:
            accepted = peer.associate(calling_ae=SENDER, contexts={1: (sop_class, [syntax])})
            assert accepted[1][0] == 0, f"{sop_class} in {syntax} is not accepted"
            answer = peer.store(data_set, sop_instance=sop_instance.encode(), sop_class=sop_class.encode())
            peer.release()
        if answer.status == 0:
            self.acknowledged.append(sop_instance)
        return answer

    def knows(self, study_uid: str) -> bool:
        with self.gateway.database.reading() as session:
            return session.get(Study, study_uid) is not None

    def send(self, path: Path) -> dict[str, Any]:
        """`seggate send --json`, as a person runs it."""
        to = self.gateway.address
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "gateway.cli", "send", str(path), "--json"),
                *("--to", f"{to.ae_title}@{to.host}:{to.port}", "--from", SENDER),
            ],
            capture_output=True,
            timeout=120,
        )
        assert ran.stderr == b""
        said: dict[str, Any] = json.loads(ran.stdout)
        self.acknowledged += [s["sop_instance_uid"] for s in said["sent"] + said["warnings"]]
        assert ran.returncode == (0 if said["ok"] else 1)
        return said


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    data = shared_data()
    folder = tmp_path_factory.mktemp("bad-input")
    bundle = write_intensity_bundle(folder / "model", name="sides", modalities=("CT", "MR", "SEG"))
    with running_gateway(folder, routes=ROUTES, bundles=[bundle], patients=["PH-0001"]) as gateway:
        yield Ward(gateway, folder, data)


def parts_of(path: Path) -> tuple[str, str, str, bytes]:
    """SOP class, SOP instance, transfer syntax (of the file meta information) and the data set's bytes."""
    with path.open("rb") as file:
        meta, offset = read_meta_elements(file)
    sop_class, sop_instance, syntax = (meta_text(meta, tag) for tag in (0x00020002, 0x00020003, 0x00020010))
    return sop_class, sop_instance, syntax, path.read_bytes()[offset:]


def good_study(ward: Ward, seed: int) -> PhantomSeries:
    """A study that must go the whole way, whatever came before."""
    series = write_series(ward.folder / "good" / str(seed), spacing_mm=(2.0, 2.0, 2.0), shape=(12, 14, 16), seed=seed)
    said = ward.send(ward.folder / "good" / str(seed))
    assert said["ok"]
    return series


def assert_well(ward: Ward, seed: int) -> None:
    document = ward.gateway.wait_until_ended(good_study(ward, seed).study_instance_uid)
    assert (document["state"], document["reason"]) == ("verified", None)


def assert_conserved(ward: Ward) -> None:
    """Every acknowledged object has exactly one row and one file, and nothing else has one."""
    ward.gateway.wait_until_indexed(len(ward.acknowledged))
    rows = ward.gateway.instances()
    spool = ward.gateway.settings.spool_dir
    for row in rows:
        assert (spool / row.spool_path).is_file()
        assert row.state in {"current", "duplicate", "conflict", "quarantined"}
        assert row.state == "current" or row.state_reason
    assert len({row.object_id for row in rows}) == len(rows)


def last_rows(ward: Ward, count: int = 1) -> list[Instance]:
    """The rows of the objects that were acknowledged last."""
    ward.gateway.wait_until_indexed(len(ward.acknowledged))
    return sorted(ward.gateway.instances(), key=lambda row: row.object_id)[-count:]


def reason(row: Instance) -> str:
    assert row.state_reason is not None
    return row.state_reason


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize("name", QUARANTINED)
def test_an_object_at_fault_is_kept_in_quarantine_with_its_attribute(ward: Ward, name: str) -> None:
    sop_class, sop_instance, syntax, data_set = parts_of(ward.data / name)
    announced = sop_instance if all(c.isdigit() or c == "." for c in sop_instance) and sop_instance else "1.2.3.4"
    answer = ward.store(data_set, sop_class=sop_class, sop_instance=announced, syntax=syntax)
    assert answer.status == 0
    (row,) = last_rows(ward)
    assert row.state == "quarantined"
    assert QUARANTINED[name] in reason(row)
    kept = ward.gateway.settings.spool_dir / row.spool_path
    assert kept.read_bytes().endswith(data_set)


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
def test_blank_uids_in_the_command_are_refused_with_the_attribute(ward: Ward) -> None:
    """The series as its owner would send it: the command carries what the objects carry, nothing."""
    files = sorted((ward.data / BLANK).iterdir())
    assert len(files) == 20
    before = len(ward.gateway.instances())
    with ScriptedPeer(ward.gateway.address.port) as peer:
        peer.associate(calling_ae=SENDER, contexts={1: (CT_IMAGE, [EXPLICIT_LITTLE])})
        for message_id, file in enumerate(files, start=1):
            answer = peer.store(file.read_bytes()[132:], sop_instance=b"", message_id=message_id)
            assert answer.status == 0x0117
            assert "AffectedSOPInstanceUID (0000,1000)" in answer.comment
        peer.release()
    assert_well(ward, 500)
    assert len(ward.gateway.instances()) == before + 12


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
def test_blank_uids_in_the_data_set_are_quarantined_with_the_attribute(ward: Ward) -> None:
    """The command says more than the object: each is kept, and none opens a study."""
    files = sorted((ward.data / BLANK).iterdir())
    for number, file in enumerate(files):
        _, _, syntax, data_set = parts_of(file)
        assert ward.store(data_set, sop_class=CT_IMAGE, sop_instance=f"1.2.3.{number}", syntax=syntax).status == 0
    rows = last_rows(ward, len(files))
    assert Counter(row.state for row in rows) == {"quarantined": len(files)}
    assert all("SOPClassUID (0008,0016)" in reason(row) for row in rows)
    assert {row.study_instance_uid for row in rows} == {None}


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
def test_send_names_file_and_attribute_and_sends_the_rest(ward: Ward, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    faulty = {**NOT_SENDABLE, **QUARANTINED}
    for name in faulty:
        (mixed / Path(name).name).symlink_to(ward.data / name)
    for file in (ward.data / BLANK).iterdir():
        (mixed / file.name).symlink_to(file)
    rest = write_series(mixed, spacing_mm=(2.0, 2.0, 2.0), shape=(12, 14, 16), seed=501)
    said = ward.send(mixed)
    reasons = {Path(f["file"]).name: f["reason"] for f in said["failed"]}
    for name, attribute in faulty.items():
        assert attribute in reasons.pop(Path(name).name)
    assert len(reasons) == 20
    assert all("SOPClassUID (0008,0016)" in reason for reason in reasons.values())
    assert {Path(s["file"]).name for s in said["sent"]} == {f.name for f in rest.files}
    assert ward.gateway.wait_until_ended(rest.study_instance_uid)["state"] == "verified"


@pytest.mark.requirement("REC-06")
def test_what_nobody_can_decode_is_refused_and_send_names_it(ward: Ward, tmp_path: Path) -> None:
    for name in REFUSED:
        (tmp_path / Path(name).name).symlink_to(ward.data / name)
    said = ward.send(tmp_path)
    assert said["sent"] == said["warnings"] == said["skipped"] == []
    assert {Path(f["file"]).name for f in said["failed"]} == {Path(name).name for name in REFUSED}
    assert all("TransferSyntaxUID (0002,0010)" in f["reason"] for f in said["failed"])
    assert not ward.knows("1.2.840.113619.2.30.1.1762295590.1623.978668949.886")


@pytest.mark.requirement("RTE-21", open="dry run over history")
@pytest.mark.parametrize("name", ONE_BIT, ids=lambda name: Path(name).name)
def test_one_bit_run_lengths_are_kept_and_no_model_is_asked(ward: Ward, tmp_path: Path, name: str) -> None:
    study_uid = own_study(ward.data / name, tmp_path / "object.dcm", ONE_BIT.index(name))
    assert ward.send(tmp_path / "object.dcm")["ok"]
    document = ward.gateway.wait_until_ended(study_uid)
    assert (document["state"], document["objects"], document["results"]) == ("unmatched", 1, [])
    ((series,),) = [version["series"] for version in document["routing"]]
    assert series["models"] == []
    assert "not-an-image" in str(series["rules"])
    (row,) = last_rows(ward)
    kept = ward.gateway.settings.spool_dir / row.spool_path
    assert kept.read_bytes().endswith(parts_of(tmp_path / "object.dcm")[3])
    with pytest.raises(Rejected, match=re.escape("BitsAllocated (0028,0100)")):
        read_series([kept], only_headers=True)


@pytest.mark.requirement("REC-07")
def test_an_unknown_private_sop_class_is_refused_at_negotiation(ward: Ward) -> None:
    before = len(ward.gateway.instances())
    with ScriptedPeer(ward.gateway.address.port) as peer:
        accepted = peer.associate(
            calling_ae=SENDER, contexts={1: (PRIVATE_CLASS, [EXPLICIT_LITTLE]), 3: (CT_IMAGE, [EXPLICIT_LITTLE])}
        )
        assert {context: result for context, (result, _) in accepted.items()} == {1: 3, 3: 0}
        peer.release()
    assert len(ward.gateway.instances()) == before


@pytest.mark.requirement("CARD-01")
def test_afterwards_a_good_study_goes_the_whole_way_and_nothing_is_lost(ward: Ward) -> None:
    """Conservation: every Success that was given has one row with a state, and there are no other rows."""
    assert_well(ward, 502)
    rows = ward.gateway.instances()
    assert len(rows) == len(ward.acknowledged)
    assert_conserved(ward)
    announced = Counter(ward.acknowledged)
    recorded = Counter(str(row.sop_instance_uid) for row in rows if row.state != "quarantined")
    assert recorded <= announced
    ward.gateway.stage.check_alive()
    log = ward.gateway.stage.log("gateway").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert "process ended" not in log


def own_study(source: Path, target: Path, number: int) -> str:
    """A copy of an object in a study and series of its own: the UIDs' last digits are exchanged in the bytes."""
    header = pydicom.dcmread(source, stop_before_pixels=True)
    content = source.read_bytes()
    made = {}
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        old = str(header[keyword].value)
        made[keyword] = old[:-4] + f"7{number:02d}7"
        content = content.replace(old.encode(), made[keyword].encode())
    target.write_bytes(content)
    return made["StudyInstanceUID"]
