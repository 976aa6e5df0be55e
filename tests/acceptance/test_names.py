"""Names in the character sets of shared data are right in SEG, SR, FHIR and on the screen.

Each file's Specific Character Set and the encoded bytes of its Patient's Name are put, as they are, into a series that
goes the whole way. The names were typed in here from what the files stand for, not decoded by the code under test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from tests.support.intensity_model import write_intensity_bundle
from tests.support.peers import require_peer, shared_data
from tests.support.phantoms import PhantomPatient, PhantomSeries, write_series
from tests.support.received_objects import element
from tests.support.result_readers import shown_name
from tests.support.running_gateway import RunningGateway, running_gateway

pytestmark = pytest.mark.peer("dcmtk", "shared-data")

# File -> name as PS3.5 6.2.1 writes it, and how a person reads it in the report (first writing, others in brackets).
NAMES = {
    "chrArab": ("قباني^لنزار", "قباني, لنزار"),
    "chrFren": ("Buc^Jérôme", "Buc, Jérôme"),
    "chrFrenMulti": ("Buc^Jérôme", "Buc, Jérôme"),
    "chrGerm": ("Äneas^Rüdiger", "Äneas, Rüdiger"),
    "chrGreek": ("Διονυσιος", "Διονυσιος"),
    "chrH31": ("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada, Tarou (山田, 太郎) (やまだ, たろう)"),
    "chrH32": ("ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", "ﾔﾏﾀﾞ, ﾀﾛｳ (山田, 太郎) (やまだ, たろう)"),
    "chrHbrw": ("שרון^דבורה", "שרון, דבורה"),
    "chrI2": ("Hong^Gildong=洪^吉洞=홍^길동", "Hong, Gildong (洪, 吉洞) (홍, 길동)"),
    "chrJapMulti": ("やまだ^たろう", "やまだ, たろう"),
    "chrJapMultiExplicitIR6": ("やまだ^たろう", "やまだ, たろう"),
    "chrKoreanMulti": ("김희중", "김희중"),
    "chrRuss": ("Люкceмбypг", "Люкceмбypг"),  # noqa: RUF001 - Cyrillic and Latin mixed, as in the file
    "chrX1": ("Wang^XiaoDong=王^小東", "Wang, XiaoDong (王, 小東)"),
    "chrX2": ("Wang^XiaoDong=王^小东", "Wang, XiaoDong (王, 小东)"),
    # No name at the top level of the file: the name of the sequence item, with the set that holds there.
    "chrSQEncoding": ("ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", "ﾔﾏﾀﾞ, ﾀﾛｳ (山田, 太郎) (やまだ, たろう)"),
    "chrSQEncoding1": ("ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", "ﾔﾏﾀﾞ, ﾀﾛｳ (山田, 太郎) (やまだ, たろう)"),
}
ROUTES = """
time_zone = "UTC"
[[rules]]
name = "all"
model = "sides"
[rules.when]
all = [{ attribute = "Modality", op = "equals", value = "CT" }]
"""


@dataclass(frozen=True)
class Sent:
    gateway: RunningGateway
    series: dict[str, PhantomSeries]


def name_bytes(file: Path) -> tuple[bytes, bytes]:
    """The bytes of Specific Character Set and of Patient's Name that belong together in a file, as they are there."""
    dataset: Dataset = pydicom.dcmread(file)
    holder: Dataset = dataset if "PatientName" in dataset else dataset.RequestedProcedureCodeSequence[0]
    sets = holder.get("SpecificCharacterSet", dataset.SpecificCharacterSet)
    name = holder.get_item("PatientName")
    assert isinstance(name, RawDataElement)
    assert name.value
    return "\\".join([sets] if isinstance(sets, str) else sets).encode("ascii"), name.value


def with_name(file: Path, character_set: bytes, name: bytes) -> None:
    """Exchange two elements of a phantom in the file's bytes; no toolkit decodes or encodes anything."""
    content = file.read_bytes()
    for tag, vr, old, new in (
        (0x00080005, "CS", b"ISO_IR 192", character_set),
        (0x00100010, "PN", b"Phantom^Asymmetric", name),
    ):
        assert content.count(element(tag, vr, old)) == 1
        content = content.replace(element(tag, vr, old), element(tag, vr, new))
    file.write_bytes(content)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    require_peer("dcmtk")
    sources = shared_data() / "dicom" / "pydicom" / "charset_files"
    folder = tmp_path_factory.mktemp("names")
    bundle = write_intensity_bundle(folder / "sides", name="sides", spacing_mm=(3.0, 3.0, 3.0))
    series = {}
    for seed, name in enumerate(NAMES, start=300):
        series[name] = write_series(
            folder / "sources" / name,
            spacing_mm=(3.0, 3.0, 3.0),
            shape=(10, 12, 12),
            seed=seed,
            patient=PhantomPatient(patient_id=f"NAME-{name}"),
        )
        for file in series[name].files:
            with_name(file, *name_bytes(sources / f"{name}.dcm"))
    patients = [f"NAME-{name}" for name in NAMES]
    with running_gateway(folder, routes=ROUTES, bundles=[bundle], patients=patients) as gateway:
        report = gateway.send([file for made in series.values() for file in made.files])
        assert report.failed == ()
        yield Sent(gateway, series)


def test_every_file_of_shared_data_is_here(shared_data: Path) -> None:
    assert {f.stem for f in (shared_data / "dicom" / "pydicom" / "charset_files").glob("*.dcm")} == set(NAMES)


@pytest.mark.requirement("OUT-41", open="SEMIAUTOMATIC and MANUAL after an edit")
@pytest.mark.requirement("EMR-47", open="final only after approval; HAPI; HL7 v2 fallback")
@pytest.mark.parametrize("name", NAMES)
def test_name_is_right_in_segmentation_report_emr_and_on_the_screen(sent: Sent, name: str, tmp_path: Path) -> None:
    dicom_name, read_name = NAMES[name]
    uid = sent.series[name].study_instance_uid
    document = sent.gateway.wait_until_ended(uid)
    assert (document["state"], document["reason"]) == ("verified", None)
    files = sent.gateway.result_files(uid, tmp_path)
    for modality in ("SEG", "SR"):
        assert shown_name(files[modality]) == dicom_name
        assert pydicom.dcmread(files[modality], stop_before_pixels=True).PatientName == dicom_name
    (report,) = sent.gateway.reports(document)
    assert report["subject"]["display"] == read_name
    assert document["patient_name"] == dicom_name


def test_the_screen_shows_every_name(sent: Sent) -> None:
    """`seggate studies` as a person runs it, with and without --json."""
    for name in NAMES:
        sent.gateway.wait_until_ended(sent.series[name].study_instance_uid)
    command = [sys.executable, "-m", "gateway.cli", "studies", "--config", str(sent.gateway.config)]
    listed = subprocess.run([*command, "--json"], capture_output=True, timeout=60, check=True).stdout.decode("utf-8")
    shown = {row["study_uid"]: row["patient_name"] for row in json.loads(listed)}
    assert shown == {sent.series[name].study_instance_uid: NAMES[name][0] for name in NAMES}
    environment = {"COLUMNS": "400", "PYTHONUTF8": "1", "PATH": "/usr/bin:/bin"}
    table = subprocess.run(command, capture_output=True, timeout=60, check=True, env=environment).stdout.decode("utf-8")
    assert [n for n, _ in NAMES.values() if n not in table] == []
