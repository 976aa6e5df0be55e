"""`seggate demo` as a newcomer runs it: with the synthetic study, with a real one, with and without Orthanc."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from gateway.demo.stage import orthanc_program
from tests.support.peers import shared_data

KEYS = {"study_uid", "state", "seconds", "seg", "sr", "report_id", "pacs", "verified"}
TIMEOUT_S = 240


@dataclass(frozen=True)
class Demo:
    """One finished run. `said` is the JSON object of standard output, `told` what stood on standard error."""

    said: dict[str, Any]
    told: str
    code: int
    state: Path


def run_demo(state: Path, *options: str, environment: dict[str, str] | None = None) -> Demo:
    command = [sys.executable, "-m", "gateway.cli", "demo", "--state", str(state), "--json", *options]
    ran = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, env={**os.environ, **(environment or {})})
    told = ran.stderr.decode("utf-8")
    assert ran.stdout, told
    return Demo(json.loads(ran.stdout), told, ran.returncode, state)


def processes_of(state: Path) -> list[psutil.Process]:
    """What runs with this state folder on its command line, whoever its parent is now."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(str(state) in part for part in process.info["cmdline"] or [])
    ]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "synthetic", "--pacs", "embedded")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    study = shared_data() / "dicom" / "mr-hippocampus" / "study3"
    return run_demo(tmp_path_factory.mktemp("demo") / "real", "--study", str(study))


def assert_whole_way(demo: Demo) -> None:
    said = demo.said
    assert demo.code == 0, demo.told
    assert set(said) >= KEYS
    assert said["verified"] is True
    assert said["state"] == "verified"
    assert said["counts"] == {"SEG": 1, "SR": 1, "report": 1}
    assert set(said["seg"]) == {"sop_instance_uid", "segments"}
    assert [set(s) for s in said["seg"]["segments"]] == [{"label", "volume_ml", "voxels"}] * 2
    assert said["seconds"] > 0
    assert said["report_id"].startswith("DiagnosticReport/")
    assert len({said["study_uid"], said["seg"]["sop_instance_uid"], said["sr"]}) == 3


@pytest.mark.requirement("CARD-01", "CARD-03", "CARD-04")
@pytest.mark.requirement("OPS-62", open="compose file; reviewed SEG; TLS; GPU")
def test_synthetic_study_goes_the_whole_way_with_the_embedded_archive(synthetic: Demo) -> None:
    assert_whole_way(synthetic)
    assert synthetic.said["pacs"] == "embedded"
    assert "synthetic" in synthetic.told
    assert "no patient's image" in synthetic.told
    # An invented image is not among those from which the model's quality can be estimated, and that is said.
    assert synthetic.said["verdict"] == "review"


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("CARD-01", "CARD-02", "CARD-03", "CARD-04")
@pytest.mark.requirement("OPS-62", open="compose file; reviewed SEG; TLS; GPU")
def test_real_study_goes_the_whole_way(real: Demo) -> None:
    assert_whole_way(real)
    assert real.said["pacs"] == ("orthanc" if orthanc_program() else "embedded")
    volumes_ml = {s["label"]: s["volume_ml"] for s in real.said["seg"]["segments"]}
    assert set(volumes_ml) == {"Anterior", "Posterior"}
    assert all(1 <= volume_ml <= 6 for volume_ml in volumes_ml.values())


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("RTE-21", open="dry run over history")
def test_only_one_series_of_the_real_study_is_routed_and_the_others_have_a_reason(real: Demo) -> None:
    """`seggate show --json`, from what the demo left behind."""
    config = real.state / "config"
    command = [sys.executable, "-m", "gateway.cli", "show", real.said["study_uid"], "--config", str(config), "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout)
    (version,) = shown["routing"]
    assert version["rule_set_digest"]
    by_description = {s["series_description"]: s for s in version["series"]}
    assert len(version["series"]) == len(by_description) == 5
    assert [d for d, s in by_description.items() if s["models"]] == ["HippoCrop"]
    for description, series in by_description.items():
        (asked,) = [r for r in series["rules"] if r["rule"] == "hippocampus"]
        conditions = asked["explanation"]["when"]["members"][0]["members"]
        (on_description,) = [c for c in conditions if "SeriesDescription" in c.get("condition", "")]
        assert on_description["truth"] == ("true" if description == "HippoCrop" else "false"), on_description
        assert {v["value"] for v in on_description["values"]} == {description}
    assert {r["series_instance_uid"] for r in shown["results"]} == {by_description["HippoCrop"]["series_instance_uid"]}


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("ART-25", open="saliency")
def test_report_names_patient_study_objects_volumes_confidence_and_flags(real: Demo) -> None:
    """From the files of the EMR, which is another process."""
    held = [json.loads(f.read_text(encoding="utf-8")) for f in (real.state / "emr").glob("*.json")]
    by_reference = {f"{r['resourceType']}/{r['id']}": r for r in held}
    report = by_reference[real.said["report_id"]]
    assert report["status"] == "preliminary"
    (patient,) = [r for r in held if r["resourceType"] == "Patient"]
    assert report["subject"]["reference"] == f"Patient/{patient['id']}"
    assert report["imagingStudy"][0]["identifier"]["value"] == f"urn:oid:{real.said['study_uid']}"
    observations = [by_reference[r["reference"]] for r in report["result"]]
    volumes_ml = {o["bodySite"]["text"].split(" (")[0]: o for o in observations if "bodySite" in o}
    for segment in real.said["seg"]["segments"]:
        observation = volumes_ml[segment["label"]]
        assert observation["valueQuantity"]["value"] == pytest.approx(segment["volume_ml"], abs=1e-3)
        assert observation["valueQuantity"]["code"] == "mL"
        assert any(c["code"]["coding"][0]["code"] == "mean-confidence" for c in observation["component"])
    (quality,) = [o for o in observations if "bodySite" not in o]
    assert quality["valueCodeableConcept"]["coding"][0]["code"] == "verdict-pass"
    documents = {r["masterIdentifier"]["value"] for r in held if r["resourceType"] == "DocumentReference"}
    assert documents == {f"urn:oid:{real.said['seg']['sop_instance_uid']}", f"urn:oid:{real.said['sr']}"}


@pytest.mark.peer("shared-data")
def test_the_picture_is_of_the_source_series_and_of_no_sister(real: Demo) -> None:
    """Its panels look like slices of HippoCrop and like nothing else in the study, by correlation."""
    picture = Path(real.said["overlay"])
    assert picture == real.state / "overlay.png"
    sheet = np.asarray(Image.open(picture).convert("L"), dtype=np.float64)
    files = sorted((shared_data() / "dicom" / "mr-hippocampus" / "study3").rglob("*.dcm"))
    best: dict[str, float] = {}
    panel = panel_of(sheet, pydicom.dcmread(next(f for f in files if description_of(f) == "HippoCrop")))
    for file in files:
        dataset = pydicom.dcmread(file)
        plane = Image.fromarray(dataset.pixel_array.astype(np.float32)).resize(panel.shape[::-1])
        likeness = float(np.corrcoef(np.asarray(plane).ravel(), panel.ravel())[0, 1])
        best[dataset.SeriesDescription] = max(best.get(dataset.SeriesDescription, -1.0), likeness)
    assert best.pop("HippoCrop") > 0.85
    assert max(best.values()) < 0.6


def description_of(file: Path) -> str:
    return str(pydicom.dcmread(file, stop_before_pixels=True).get("SeriesDescription", ""))


def panel_of(sheet: NDArray[np.float64], source: pydicom.Dataset) -> NDArray[np.float64]:
    """The first of three equal panels with the source's aspect ratio, margins of 8, below a line of text."""
    width = (sheet.shape[1] - 32) // 3
    row_mm, column_mm = (float(v) for v in source.PixelSpacing)
    height = round(width * source.Rows * row_mm / (source.Columns * column_mm))
    return sheet[34 : 34 + height, 8 : 8 + width]


@pytest.mark.parametrize("which", ["synthetic", "real"])
def test_nothing_keeps_running(which: str, request: pytest.FixtureRequest) -> None:
    demo: Demo = request.getfixturevalue(which)
    assert processes_of(demo.state) == []


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "thesis.txt"
    kept.write_text("mine")
    command = [sys.executable, "-m", "gateway.cli", "demo", "--state", str(tmp_path), "--json"]
    ran = subprocess.run(command, capture_output=True, timeout=60)
    assert ran.returncode == 1
    assert b"was not made by a demo" in ran.stderr
    assert ran.stdout == b""
    assert kept.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_study_inside_the_folder_to_be_emptied_is_left_alone(tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (tmp_path / ".seggate-demo").touch()
    (study / "image.dcm").write_bytes(b"mine")
    command = [sys.executable, "-m", "gateway.cli", "demo", "--state", str(tmp_path), "--study", str(study)]
    ran = subprocess.run(command, capture_output=True, timeout=60)
    assert ran.returncode == 2
    assert b"--state" in ran.stderr
    assert (study / "image.dcm").read_bytes() == b"mine"


def test_orthanc_that_is_asked_for_and_absent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gateway.demo import stage

    monkeypatch.setattr(stage, "orthanc_program", lambda: None)
    asked = stage.Stage(tmp_path / "state", "orthanc")
    asked.prepare()
    with pytest.raises(stage.StageFailed, match="--pacs embedded"):
        asked.start_pacs()


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    """Interrupted while it starts: no process of the demo is left."""
    state = tmp_path / "state"
    with demo_that_keeps_running(state) as process:
        assert process.stderr is not None
        while b"EMR:" not in (line := process.stderr.readline()):
            assert line, "the demo ended before it was interrupted"
        assert processes_of(state)
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(timeout=60) in (0, 1)
    assert processes_of(state) == []


@contextmanager
def demo_that_keeps_running(state: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "gateway.cli", "demo", "--state", str(state), "--keep", "--pacs", "embedded"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
