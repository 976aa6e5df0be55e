"""`seggate dataset convert`: from folders of DICOM studies to a dataset that passes `seggate dataset check`."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import UID
from typer.testing import CliRunner

from engine.dataset import open_dataset
from engine.nifti import read_label_map, read_nifti
from engine.volume import reorientation
from gateway.cli import app
from gateway.training_data.case_conversion import convert_case
from tests.support.labelled_studies import (
    NAME,
    NAMES,
    assert_converted,
    case_of,
    convert,
    read_converted,
    shown,
    write_label_map,
    write_segmentation,
    write_study,
)
from tests.support.nnunet_peer import nnunet
from tests.support.phantoms import PhantomSeries
from tests.support.structure_sets import Region, outlines, regions_of, write_structure_set


def _check(out: Path, *allowed: str) -> None:
    """`seggate dataset check` finds nothing but what is allowed, and no error."""
    ran = CliRunner().invoke(app, ["dataset", "check", str(out), "--processes", "1", "--json"])
    found = shown(ran)
    assert {finding["kind"] for finding in found["findings"]} <= set(allowed)


def _causes(document: Any) -> str:
    return "\n".join(f"{f['case']} {f['file']}: {f['cause']}" for f in document["faults"])


@pytest.fixture
def studies(tmp_path: Path) -> list[PhantomSeries]:
    """Three studies of two patients in one folder, with SEG and RTSTRUCT of odd names beside and below the images."""
    source = tmp_path / "source"
    made = [
        write_study(source / "a" / "images", 0),
        write_study(source / "b", 1),
        write_study(source / "deep" / "er" / "c", 2, patient=0, modality="CT"),
    ]
    write_segmentation(source / "results" / "0001", made[0])
    write_segmentation(source / "b" / "IM9999.dcm", made[1])
    write_structure_set(source / "deep" / "structures.bin", made[2], regions_of(made[2].labels, NAMES))
    (source / "notes.txt").write_text("no DICOM")
    return made


@pytest.mark.requirement("ART-01")
def test_seg_and_rtstruct_become_a_dataset_that_the_check_is_content_with(
    tmp_path: Path, studies: list[PhantomSeries]
) -> None:
    out = tmp_path / "raw" / NAME
    document = shown(convert(tmp_path / "source", out, "--json"))
    assert document["cases"] == ["case_0001", "case_0002", "case_0003"]
    assert document["labels"] == {"background": 0, "left structure": 1, "right structure": 2}
    assert document["channels"] == ["CT"]
    assert document["passed_over"] == {"no DICOM file (no preamble)": 1}
    for series in studies:
        assert_converted(out, series)
    _check(out)
    patients = open_dataset(out).json.patients
    names = [case_of(out, series) for series in studies]
    assert patients[names[0]] == patients[names[2]] != patients[names[1]]
    assert set(patients.values()) == {"patient_0001", "patient_0002"}


@pytest.mark.peer("nnunet")
def test_nnunet_is_content_with_the_dataset_and_knows_no_exclusion(
    tmp_path: Path, studies: list[PhantomSeries]
) -> None:
    """numTraining goes on counting what lies in imagesTr."""
    out = tmp_path / "raw" / NAME
    assert convert(tmp_path / "source", out).exit_code == 0
    excluded = ["dataset", "exclude", "case_0002", str(out), "--reason", "motion"]
    assert CliRunner().invoke(app, excluded).exit_code == 0
    assert nnunet("verify", tmp_path, dataset=NAME) == {"cases": ["case_0001", "case_0002", "case_0003"]}


def test_nothing_in_the_dataset_says_who_it_is(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    out = tmp_path / "raw" / NAME
    assert convert(tmp_path / "source", out).exit_code == 0
    secrets = [b"SECRET-", b"Confidential", b"IM0001"]
    secrets += [uid.encode() for s in studies for uid in (s.study_instance_uid, s.series_instance_uid)]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == 3 * 3 + 2
    for path in files:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert not any(secret in content or secret.decode() in path.name for secret in secrets), path
    private = out.parent / f"{NAME}.identities.json"
    assert private.stat().st_mode & 0o077 == 0
    identities = json.loads(private.read_text())
    assert {p["patient_id"] for p in identities["patients"].values()} == {"SECRET-000", "SECRET-001"}
    assert identities["cases"][case_of(out, studies[0])]["study"] == studies[0].study_instance_uid


def test_started_again_only_what_is_missing_or_changed_is_made(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    assert shown(convert(source, out, "--json"))["made"] == 3
    names = [case_of(out, series) for series in studies]
    assert shown(convert(source, out, "--json"))["made"] == 0
    (out / "imagesTr" / f"{names[1]}_0000.nii.gz").unlink()
    (out / "labelsTr" / ".4711.left.nii.gz").write_bytes(b"of a run that was killed")
    label = out / "labelsTr" / f"{names[1]}.nii.gz"
    before = label.stat().st_mtime_ns
    assert shown(convert(source, out, "--json"))["made"] == 1
    assert label.stat().st_mtime_ns == before
    assert_converted(out, studies[1])
    assert not list(out.rglob(".4711*"))
    # Another label map for one case, and a new case: names stay.
    changed = np.where(studies[1].labels == 1, 2, studies[1].labels)
    write_segmentation(source / "b" / "IM9999.dcm", studies[1], changed)
    added = write_study(source / "new", 5)
    write_segmentation(source / "new" / "seg", added)
    assert shown(convert(source, out, "--json"))["made"] == 2
    assert [case_of(out, series) for series in studies] == names
    assert case_of(out, added) == "case_0004"
    assert_converted(out, studies[1], labels=changed)
    _check(out)


@pytest.mark.parametrize("kind", ["SEG", "NIfTI"])
def test_a_correction_of_the_same_size_and_time_is_made(tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    corrected = np.array([0, 2, 1], np.uint8)[series.labels]
    file = source / "images" / ("seg.dcm" if kind == "SEG" else "seg.nii")

    def write(labels: Any) -> None:
        if kind == "NIfTI":
            write_label_map(file, series, "LPS", labels)
            return
        write_segmentation(file, series)
        ds = pydicom.dcmread(file)
        for frame in ds.PerFrameFunctionalGroupsSequence:
            item = frame.SegmentIdentificationSequence[0]
            item.ReferencedSegmentNumber = int(labels[series.labels == item.ReferencedSegmentNumber][0])
        ds.save_as(file)

    write(series.labels)
    before = file.stat()
    words = ("--nifti", "*.nii", "--json")
    assert shown(convert(source, out, *words))["made"] == 1
    assert shown(convert(source, out, *words))["made"] == 0
    write(corrected)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert shown(convert(source, out, *words))["made"] == 1
    assert_converted(out, series, labels=corrected)
    os.utime(file)  # the time alone is no change
    assert shown(convert(source, out, *words))["made"] == 0


def _phases(folder: Path) -> tuple[PhantomSeries, PhantomSeries]:
    """Two volumes of one series on one grid; the second is half as bright."""
    first = write_study(folder, 0)
    files, array = [], first.array.copy()
    for z, file in enumerate(first.ordered_files):
        ds = pydicom.dcmread(file)
        stored = ds.pixel_array // 2
        array[z] = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        ds.PixelData = stored.astype(ds.pixel_array.dtype).tobytes()
        ds.AcquisitionNumber = 2
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"{ds.SOPInstanceUID[:60]}.2")
        files.append(folder / f"second_{file.name}")
        ds.save_as(files[-1])
    second = {**vars(first), "files": tuple(files), "ordered_files": tuple(files), "array": array}
    return first, PhantomSeries(**second)


def test_labels_that_refer_to_another_phase_now_bring_its_image(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    first, second = _phases(source / "images")
    write_segmentation(source / "seg.dcm", first)
    assert shown(convert(source, out, "--json"))["made"] == 1
    assert_converted(out, first)
    corrected = np.array([0, 2, 1], np.uint8)[second.labels]
    write_segmentation(source / "seg.dcm", second, corrected)
    assert shown(convert(source, out, "--json"))["made"] == 1
    assert_converted(out, second, labels=corrected)
    assert shown(convert(source, out, "--json"))["made"] == 0


def test_killed_anywhere_it_goes_on(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    """The process ends by SIGKILL when the first case is there."""
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    script = (
        "import os, signal, sys\n"
        "from gateway.training_data import conversion\n"
        "made = conversion.convert_case\n"
        "def dying(job, rules):\n"
        "    if (rules.folder / '.conversion' / 'case_0001.json').exists(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return made(job, rules)\n"
        "conversion.convert_case = dying\n"
        "from gateway.cli import main\n"
        "sys.argv[1:] = ['dataset', 'convert', sys.argv[1], sys.argv[2], '--processes', '1']\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(source), str(out)], capture_output=True, timeout=120)
    assert ran.returncode == -9, ran.stderr
    assert not (out / "dataset.json").exists()
    assert len(list((out / "labelsTr").iterdir())) == 1
    assert shown(convert(source, out, "--json"))["made"] == 2
    for series in studies:
        assert_converted(out, series)
    _check(out)


@pytest.mark.parametrize("other", ["convert", "plan"])
def test_while_a_dataset_is_converted_nothing_else_converts_or_plans_it(
    tmp_path: Path, studies: list[PhantomSeries], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The other one starts when the first case is to be made."""
    out = tmp_path / "raw" / NAME
    foreign = write_study(tmp_path / "elsewhere", 7)
    write_segmentation(tmp_path / "elsewhere" / "seg.dcm", foreign)
    refused: list[str] = []

    def interrupted(*args: Any, **rules: Any) -> Any:
        if not refused:
            refused.append("")  # the other one gets here too, if it may
            if other == "convert":
                ran = convert(tmp_path / "elsewhere", out, "--json")
            else:
                words = ["plan", str(out), "--preprocessed", str(tmp_path / "preprocessed"), "--json"]
                ran = CliRunner().invoke(app, words)
            refused[0] = shown(ran, 1)["error"]
        return convert_case(*args, **rules)

    monkeypatch.setattr("gateway.training_data.conversion.convert_case", interrupted)
    assert shown(convert(tmp_path / "source", out, "--json"))["made"] == 3
    assert f"{NAME}: is being changed by process {os.getpid()} on" in refused[0]
    for series in studies:
        assert_converted(out, series)
    _check(out)
    assert not list(out.glob("*.lock"))


def test_several_processes_make_the_same(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    one, two = tmp_path / "one" / NAME, tmp_path / "two" / NAME
    assert convert(tmp_path / "source", one).exit_code == 0
    words = ["dataset", "convert", str(tmp_path / "source"), str(two), "--processes", "2"]
    assert CliRunner().invoke(app, words).exit_code == 0
    for path in (p for p in one.rglob("*") if p.is_file()):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


def test_labels_are_chosen_named_and_valued(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    out = tmp_path / "raw" / NAME
    document = shown(convert(tmp_path / "source", out, "--label", "organ=RIGHT*", "--json"))
    assert document["labels"] == {"background": 0, "organ": 1}
    assert {"about": "structure 'left structure'", "note": "left out: no label takes it"} in document["notes"]
    for series in studies:
        assert_converted(out, series, labels=(series.labels == 2).astype(np.uint8))
    labels = tmp_path / "labels.json"
    labels.write_text(
        json.dumps({"labels": {"b": {"value": 2, "names": ["left*"]}, "a": {"names": ["right*"], "value": 1}}})
    )
    document = shown(convert(tmp_path / "source", out, "--labels", str(labels), "--orientation", "LPS", "--json"))
    assert document["labels"] == {"background": 0, "a": 1, "b": 2}
    assert_converted(out, studies[2], labels=np.array([0, 2, 1], np.uint8)[studies[2].labels])
    _check(out)


def test_another_orientation_and_a_label_of_its_own_file_are_possible(
    tmp_path: Path, studies: list[PhantomSeries]
) -> None:
    out = tmp_path / "raw" / NAME
    assert convert(tmp_path / "source", out, "--orientation", "RAS").exit_code == 0
    for series in studies:
        assert_converted(out, series, "RAS")
    ran = convert(tmp_path / "source", out, "--json")
    assert "orientation: RAS when this folder was begun, LPS now" in shown(ran, 1)["error"]


def test_all_faults_are_found_in_one_pass_and_the_dataset_is_not_finished(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    made = [write_study(source / str(index), index) for index in range(9)]
    for index in (0, 1, 2, 3, 4):
        write_segmentation(source / str(index) / "seg.dcm", made[index])
    made[1].ordered_files[5].unlink()  # a slice is missing
    data = made[2].ordered_files[3].read_bytes()
    made[2].ordered_files[3].write_bytes(data[:-300])  # a slice is cut short
    shift = pydicom.dcmread(source / "3" / "seg.dcm")
    shift.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.0, 1.0]
    shift.save_as(source / "3" / "seg.dcm")
    (source / "4" / "seg.dcm").write_bytes((source / "4" / "seg.dcm").read_bytes()[:900])
    both = np.ones_like(made[5].labels)
    write_segmentation(source / "5" / "seg.dcm", made[5], regions=((1, 2), (2,)))
    write_segmentation(source / "6" / "seg.dcm", made[6])
    write_structure_set(source / "6" / "rs.dcm", made[6], regions_of(made[6].labels, NAMES))
    between = [Region(name=NAMES[1], contours=[c + np.array([0, 0, 0.4]) for c in outlines(both == 1)[2:6]])]
    write_structure_set(source / "7" / "rs.dcm", made[7], between)
    shutil.rmtree(source / "8")
    write_structure_set(source / "8" / "rs.dcm", made[8], regions_of(made[8].labels, NAMES))
    document = shown(convert(source, out, "--json"), 1)
    causes = _causes(document)
    for case, words in (
        (made[1], "1 of 12 slices missing"),
        (made[2], "truncated"),
        (made[3], "another grid than its images"),
        (made[5], "'structure 1' and 'structure 2' overlap in"),
        (made[6], "both draw 'left structure'"),
        (made[7], "lie between slices"),
    ):
        (line,) = (line for line in causes.splitlines() if line.startswith(case_of(out, case)))
        assert words in line
    assert "None 4/seg.dcm: " in causes
    assert "None 8/rs.dcm: the images that it refers to are not in the source" in causes
    assert len(document["faults"]) == 8
    assert document["cases"] == [case_of(out, made[0])]
    assert "SECRET" not in causes
    assert not (out / "dataset.json").exists()
    shown_to_people = convert(source, out)
    assert shown_to_people.exit_code == 1
    assert "dataset.json is not written while there are errors" in shown_to_people.output
    document = shown(convert(source, out, "--skip-faulty", "--json"))
    assert document["ok"]
    assert len(document["faults"]) == 8
    undrawn = [n["about"] for n in document["notes"] if n["note"].startswith("has no voxel in any case")]
    assert undrawn == ["label 'structure 1'", "label 'structure 2'"]
    assert_converted(out, made[0])
    _check(out)


def test_a_case_that_becomes_faulty_leaves_the_dataset(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    assert convert(source, out).exit_code == 0
    gone = case_of(out, studies[1])
    document = json.loads((out / "dataset.json").read_text()) | {"licence": "ours"}
    (out / "dataset.json").write_text(json.dumps(document))
    shutil.rmtree(source / "b")
    causes = _causes(shown(convert(source, out, "--json"), 1))
    assert f"{gone} None: was converted before, and its series or labels are not in the source any more" in causes
    assert not (out / "dataset.json").exists()
    assert shown(convert(source, out, "--skip-faulty", "--json"))["ok"]
    assert not list(out.rglob(f"{gone}*"))
    assert json.loads((out / "dataset.json").read_text())["licence"] == "ours"
    _check(out)


@pytest.mark.parametrize(("overlap", "winner"), [("first", 1), ("last", 2)])
def test_overlap_goes_to_the_label_that_was_said(tmp_path: Path, overlap: str, winner: int) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source, 0)
    write_segmentation(source / "seg.dcm", series, regions=((1, 2), (2,)))
    document = shown(convert(source, out, "--overlap", overlap, "--json"))
    assert sum("overlap in" in note["note"] for note in document["notes"]) == 1
    wanted = np.where(series.labels == 1, 1, np.where(series.labels == 2, winner, 0)).astype(np.uint8)
    assert_converted(out, series, labels=wanted)


def test_contours_between_slices_go_to_the_nearest_where_asked(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source, 0)
    contours = [c + np.array([0, 0, 0.3]) for c in outlines(series.labels == 1)]
    write_structure_set(source / "rs.dcm", series, [Region(name="left", contours=contours)])
    document = shown(convert(source, out, "--between-slices", "nearest", "--json"))
    assert "taken for the nearest slice's" in document["notes"][0]["note"]
    assert_converted(out, series, labels=(series.labels == 1).astype(np.uint8))


def _two_channels(source: Path, index: int, **second: Any) -> tuple[PhantomSeries, PhantomSeries]:
    first = write_study(source / "t1", index, modality="MR", series_description="T1 ax", series_number=1)
    other: dict[str, Any] = {"series_description": "FLAIR ax", "series_number": 2, "rescale": "none"}
    other |= {"modality": "MR"} | second
    return first, write_study(source / "flair", index, **other)


def test_channels_are_series_of_one_study_on_one_grid(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    pairs = [_two_channels(source / str(index), index) for index in (0, 4)]
    write_segmentation(source / "0" / "seg.dcm", pairs[0][0])
    write_segmentation(source / "4" / "seg.dcm", pairs[1][1])  # drawn on the other series
    words = ("--channel", "T1=MR:*t1*", "--channel", "FLAIR=MR:flair*", "--json")
    document = shown(convert(source, out, *words))
    assert document["channels"] == ["T1", "FLAIR"]
    assert document["cases"] == ["case_0001", "case_0002"]
    for first, second in pairs:
        assert_converted(out, first)
        image, _ = read_converted(out, first, channel=1)
        own, _ = read_converted(out, first)
        assert image.geometry.same_grid(own.geometry, tolerance_mm=1e-6)
        assert np.array_equal(np.sort(image.array.ravel()), np.sort(second.array.ravel()))
    _check(out)


@pytest.mark.parametrize(
    ("second", "cause"),
    [
        ({"spacing_mm": (3.0, 2.0, 1.0)}, "lies on another grid than the first channel (spacing"),
        ({"shape": (12, 20, 22)}, "lies on another grid than the first channel (shape"),
        ({"modality": "CT"}, "channel FLAIR takes no series of the study"),
        ({}, "channel FLAIR takes 2 series of the study"),
    ],
)
def test_channels_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path, second: Any, cause: str) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    first, _ = _two_channels(source, 0, **second)
    write_segmentation(source / "seg.dcm", first)
    if "takes 2" in cause:
        write_study(source / "again", 0, modality="MR", series_description="FLAIR cor", series_number=3)
    words = ("--channel", "T1=MR:*t1*", "--channel", "FLAIR=MR:*flair*", "--json")
    assert cause in _causes(shown(convert(source, out, *words), 1))


def test_series_of_another_frame_of_reference_are_no_channels(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    first, second = _two_channels(source, 0)
    for path in second.files:
        ds = pydicom.dcmread(path)
        ds.FrameOfReferenceUID = "1.2.3.4"
        ds.save_as(path)
    write_segmentation(source / "seg.dcm", first)
    words = ("--channel", "T1=MR:*t1*", "--channel", "FLAIR=MR:*flair*", "--json")
    assert "FrameOfReferenceUID (0020,0052) differs" in _causes(shown(convert(source, out, *words), 1))


def test_labelled_series_of_several_modalities_need_a_choice(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    for index, modality in enumerate(("CT", "MR")):
        series = write_study(source / modality, index, modality=modality)
        write_segmentation(source / modality / "seg.dcm", series)
    assert "several modalities: CT (1), MR (1)" in shown(convert(source, out, "--json"), 1)["error"]
    document = shown(convert(source, out, "--channel", "MRI=MR", "--json"))
    assert (document["channels"], len(document["cases"])) == (["MRI"], 1)
    assert [n["note"] for n in document["notes"]] == ["left out: no channel takes the series that it was drawn on"]


def test_nifti_labels_belong_to_the_series_around_them_or_in_their_name(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    around = write_study(source / "one" / "images", 1)
    write_label_map(source / "one" / "labels_seg.nii.gz", around, "RAS")
    (source / "one" / "t1.nii.gz").write_bytes(b"no label map, and not asked for")
    named = write_study(source / "two" / "images", 2)
    write_label_map(source / "all" / f"{named.series_instance_uid}_seg.nii.gz", named, "PIL")
    document = shown(convert(source, out, "--nifti", "*_seg.nii.gz", "--label", "L=1", "--label", "R=2", "--json"))
    assert document["labels"] == {"background": 0, "L": 1, "R": 2}
    for series in (around, named):
        assert_converted(out, series)
    _check(out)
    lost = write_label_map(source / "lost_seg.nii.gz", around, "RAS")
    causes = _causes(shown(convert(source, out, "--nifti", "*_seg.nii.gz", "--json"), 1))
    assert "lost_seg.nii.gz: 2 series lie around it" in causes
    lost.unlink()
    moved = around.affine_lps.copy()
    moved[:3, 3] += 1.0
    write_label_map(source / "one" / "labels_seg.nii.gz", _with_affine(around, moved), "RAS")
    causes = _causes(shown(convert(source, out, "--nifti", "*_seg.nii.gz", "--json"), 1))
    assert "labels_seg.nii.gz: lies on another grid than its images" in causes


def test_a_nifti_label_is_not_given_to_another_patients_series(tmp_path: Path) -> None:
    """Where the images of its own patient are not in the source; the grids of a protocol may be alike."""
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    ward = source / "ward"
    other = write_study(ward / "b" / "images", 1)
    write_label_map(ward / "a" / "seg.nii.gz", other, "RAS")
    words = ("--nifti", "*seg.nii.gz", "--json")
    assert "seg.nii.gz: no image series lies around it" in _causes(shown(convert(ward, out, *words), 1))
    # Below the source nothing tells a ward from a patient's folder: it is told.
    assert "matched with the only series in the folder ward" in json.dumps(shown(convert(source, out, *words))["notes"])
    write_label_map(ward / "b" / "images" / "own_seg.nii.gz", other, "RAS")
    assert "has labels of its own beside it" in _causes(shown(convert(source, out, *words), 1))


def test_a_case_without_a_structure_that_others_have_is_told(tmp_path: Path) -> None:
    """Nobody says whether it is not there, or was not drawn."""
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    whole, part = (write_study(source / str(index), index) for index in range(2))
    write_structure_set(source / "whole.dcm", whole, regions_of(whole.labels, NAMES))
    write_structure_set(source / "part.dcm", part, regions_of(part.labels, {1: NAMES[1]}))
    notes = shown(convert(source, out, "--json"))["notes"]
    told = [note for note in notes if "has no structure for 'right structure', which is background" in note["note"]]
    assert [note["about"] for note in told] == [case_of(out, part)]


@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
@pytest.mark.parametrize("names", [("Lesion", " LESION"), ("", "")])
def test_two_structures_of_one_name_in_one_file_are_no_label_unless_a_pattern_takes_both(
    tmp_path: Path, kind: str, names: tuple[str, str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    file = source / "labels.dcm"
    if kind == "SEG":
        write_segmentation(file, series)
    else:
        write_structure_set(file, series, regions_of(series.labels, NAMES))
    ds = pydicom.dcmread(file)
    for item, name in zip(ds.get("SegmentSequence", ds.get("StructureSetROISequence")), names, strict=True):
        setattr(item, "SegmentLabel" if kind == "SEG" else "ROIName", name)
    ds.save_as(file)
    found = names[0] or "unnamed"
    what = "segments" if kind == "SEG" else "ROIs"
    cause = f"labels.dcm: {what} 1 and 2 have one name, {found!r}; name them apart"
    for words in ((), ("--label", found.casefold()), ("--label", f"a={found}|other*")):
        assert cause in _causes(shown(convert(source, out, *words, "--json"), 1))
    assert shown(convert(source, out, "--label", f"a={found}*", "--json"))["made"] == 1
    assert_converted(out, series, labels=(series.labels > 0).astype(np.uint8))


def test_a_uid_that_is_the_beginning_of_another_is_not_that_one(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "a", 1)
    write_study(source / "b", 2)
    for uid in (f"{series.series_instance_uid}5", f"1{series.series_instance_uid}", f"{series.series_instance_uid}.5"):
        file = write_label_map(source / "all" / f"{uid}_seg.nii.gz", series, "RAS")
        causes = _causes(shown(convert(source, out, "--nifti", "*_seg.nii.gz", "--json"), 1))
        assert "no image series lies around it" in causes
        file.unlink()
    write_label_map(source / "all" / f"seg.{series.series_instance_uid}.nii.gz", series, "RAS")
    assert shown(convert(source, out, "--nifti", "seg.*", "--json"))["made"] == 1


@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
@pytest.mark.parametrize("listed", [False, True])
def test_labels_of_another_frame_of_reference_or_patient_are_refused_unless_asked_for(
    tmp_path: Path, kind: str, listed: bool
) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    file = source / "labels.dcm"
    if kind == "SEG":
        write_segmentation(file, series)
    else:
        write_structure_set(file, series, regions_of(series.labels, NAMES))
    whole = file.read_bytes()
    (tmp_path / "cases.csv").write_text("case,series,label\none,images,labels.dcm\n")
    words = ("--cases", str(tmp_path / "cases.csv"), "--json") if listed else ("--json",)

    def edited(change: Any) -> Any:
        file.write_bytes(whole)
        ds = pydicom.dcmread(file)
        change(ds)
        ds.save_as(file)
        return shown(convert(source, out, *words), 1)

    def other_frame(ds: Any) -> None:
        for item in (ds, *ds.get("ReferencedFrameOfReferenceSequence", []), *ds.get("StructureSetROISequence", [])):
            for keyword in ("FrameOfReferenceUID", "ReferencedFrameOfReferenceUID"):
                if keyword in item:
                    setattr(item, keyword, "1.2.3.4")

    assert "lies in another frame of reference" in _causes(edited(other_frame))
    assert shown(convert(source, out, *words, "--ignore-references"))["made"] == 1
    assert_converted(out, series)
    document = edited(lambda ds: setattr(ds, "PatientID", "SOMEBODY"))
    assert "PatientID (0010,0020) of labels and images differ" in _causes(document)
    notes = [note["note"] for note in shown(convert(source, out, *words, "--ignore-references"))["notes"]]
    assert "PatientID (0010,0020) of labels and images differ" in notes


@pytest.mark.parametrize("listed", [False, True])
def test_an_roi_of_another_frame_of_reference_is_not_drawn_on_the_images_of_the_others(
    tmp_path: Path, listed: bool
) -> None:
    """An RTSTRUCT with ROIs on two scanners' images names both frames of reference."""
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    ds = pydicom.dcmread(write_structure_set(source / "rs.dcm", series, regions_of(series.labels, NAMES)))
    other = pydicom.Dataset()
    other.FrameOfReferenceUID = "1.2.3.999"
    ds.ReferencedFrameOfReferenceSequence.append(other)
    ds.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.3.999"
    ds.save_as(source / "rs.dcm")
    (tmp_path / "cases.csv").write_text("case,series,label\none,images,rs.dcm\n")
    words = ("--cases", str(tmp_path / "cases.csv"), "--json") if listed else ("--json",)
    causes = _causes(shown(convert(source, out, *words), 1))
    assert (
        f"rs.dcm: ROI 2 ({NAMES[2]!r}): another frame of reference than series {series.series_instance_uid}" in causes
    )
    assert shown(convert(source, out, *words, "--label", NAMES[1]))["made"] == 1
    assert_converted(out, series, labels=(series.labels == 1).astype(np.uint8))
    assert shown(convert(source, out, *words, "--ignore-references"))["made"] == 1
    assert_converted(out, series)
    # What was made by that option is not taken for checked without it.
    assert "another frame of reference" in _causes(shown(convert(source, out, *words), 1))


@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
@pytest.mark.parametrize("without", ["images", "labels"])
def test_without_patient_id_the_patient_is_unknown_and_not_another_one(tmp_path: Path, kind: str, without: str) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    file = source / "labels.dcm"
    if kind == "SEG":
        write_segmentation(file, series)
    else:
        write_structure_set(file, series, regions_of(series.labels, NAMES))
    for path in series.files if without == "images" else [file]:
        ds = pydicom.dcmread(path)
        ds.PatientID = ""
        ds.save_as(path)
    document = shown(convert(source, out, "--json"))
    told = f"{without} have no PatientID (0010,0020), though others of the case have"
    assert sum(told in note["note"] for note in document["notes"]) == 1
    assert_converted(out, series)
    # Whichever of them says who it is, the name of a case does not.
    (tmp_path / "cases.csv").write_text("case,series,label\nliver_secret000,images,labels.dcm\n")
    other = tmp_path / "other" / NAME
    causes = _causes(shown(convert(source, other, "--cases", str(tmp_path / "cases.csv"), "--json"), 1))
    assert "its name holds the patient's identifier" in causes


def test_labels_of_images_that_are_not_there_are_not_given_to_others_of_their_frame(tmp_path: Path) -> None:
    """A SEG of one phase on the images of another."""
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    arterial = write_study(tmp_path / "elsewhere", 0)
    write_segmentation(source / "seg.dcm", arterial)
    venous = write_study(source / "venous", 0, series_number=2)
    causes = _causes(shown(convert(source, out, "--json"), 1))
    assert "seg.dcm: the images that it refers to are not in the source" in causes
    document = shown(convert(source, out, "--json", "--ignore-references"))
    assert "matched by its frame of reference" in document["notes"][0]["note"]
    assert_converted(out, venous)


def _cut(series: PhantomSeries, last: int) -> None:
    """Without the last slices, in space."""
    for file in series.ordered_files[-last:]:
        file.unlink()


@pytest.mark.parametrize("kind", ["SEG", "RTSTRUCT"])
def test_slices_that_labels_refer_to_and_that_are_not_there_are_told_and_must_have_no_voxels(
    tmp_path: Path, kind: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    labels = series.labels.copy()
    labels[-2:], labels[-3] = 0, 1
    if kind == "SEG":
        write_segmentation(source / "labels.dcm", series, labels)
    else:
        write_structure_set(source / "labels.dcm", series, regions_of(labels, NAMES))
        ds = pydicom.dcmread(source / "labels.dcm")
        for region in ds.ROIContourSequence:
            for contour, z in zip(region.ContourSequence, _depths(region, series), strict=True):
                image = pydicom.Dataset()
                image.ReferencedSOPInstanceUID = pydicom.dcmread(series.ordered_files[z]).SOPInstanceUID
                contour.ContourImageSequence = [image]
        ds.save_as(source / "labels.dcm")
    _cut(series, 2)
    document = shown(convert(source, out, "--json"))
    told = "2 image(s) that its labels refer to are not in the source: slices may be missing"
    assert {"about": case_of(out, series), "note": told} in document["notes"]
    volume, found = read_converted(out, series)
    assert volume.geometry.shape[0] == found.geometry.shape[0] == len(series.files) - 2
    assert np.count_nonzero(found.array) == np.count_nonzero(labels)
    # The same slice under another UID is not the image that was drawn on.
    last = pydicom.dcmread(series.ordered_files[-3])
    last.SOPInstanceUID = last.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    last.save_as(series.ordered_files[-3])
    causes = _causes(shown(convert(source, out, "--json"), 1))
    if kind == "SEG":
        assert f"has {np.count_nonzero(labels[-3])} voxels of segment 1 on an image that is not in the source" in causes
    else:
        assert "contours were drawn on images that are not in the source" in causes
    document = shown(convert(source, out, "--json", "--ignore-references"))
    assert told.replace("2", "3") in [note["note"] for note in document["notes"]]
    series.ordered_files[-3].unlink()
    assert "not in the source" in _causes(shown(convert(source, out, "--json"), 1))


def _depths(region: Any, series: PhantomSeries) -> list[int]:
    """The slice of each contour."""
    inverse = np.linalg.inv(series.affine_lps)
    return [round(float((inverse @ [*contour.ContourData[:3], 1])[2])) for contour in region.ContourSequence]


def test_slices_of_another_series_that_labels_refer_to_are_not_missing(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    other = write_study(tmp_path / "elsewhere", 5)
    write_segmentation(source / "seg.dcm", series)
    ds = pydicom.dcmread(source / "seg.dcm")
    added = pydicom.Dataset()
    added.SeriesInstanceUID = other.series_instance_uid
    added.ReferencedInstanceSequence = [pydicom.Dataset()]
    added.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID = other.datasets[0].SOPInstanceUID
    ds.ReferencedSeriesSequence.append(added)
    ds.save_as(source / "seg.dcm")
    assert not shown(convert(source, out, "--json"))["notes"]


def test_images_of_two_patients_under_one_series_uid_are_no_volume(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    write_segmentation(source / "seg.dcm", series)
    for file in series.files[:3]:
        ds = pydicom.dcmread(file)
        ds.PatientID = "SOMEBODY"
        ds.save_as(file)
    causes = _causes(shown(convert(source, out, "--json"), 1))
    assert "holds images of several patients or studies" in causes


def test_a_patient_of_two_systems_is_one_and_who_may_be_the_same_is_told(tmp_path: Path) -> None:
    """One system states the issuer of PatientID, another does not, and a third leaves the patient out."""
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    made = [write_study(source / str(index), index, patient=0) for index in range(4)]
    for series, changes in zip(
        made,
        ({}, {"IssuerOfPatientID": "CLINIC"}, {"PatientID": "Secret-000 "}, {"PatientID": ""}),
        strict=True,
    ):
        for file in series.files:
            ds = pydicom.dcmread(file)
            for keyword, value in changes.items():
                setattr(ds, keyword, value)
            ds.save_as(file)
        write_segmentation(source / f"{series.study_instance_uid}.dcm", series)
    document = shown(convert(source, out, "--json"))
    names = [case_of(out, series) for series in made]
    patients = open_dataset(out).json.patients
    assert patients[names[0]] == patients[names[1]]
    assert len(set(patients.values())) == 3
    told = {note["about"]: note["note"] for note in document["notes"]}
    assert set(told) == set(names)
    assert f"its patient, {patients[names[2]]}, may be {patients[names[0]]}" in told[names[2]]
    assert "has no PatientID" in told[names[3]]


def test_a_link_to_a_folder_is_not_followed_and_counted(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    write_segmentation(source / "seg.dcm", write_study(source / "images", 0))
    write_study(tmp_path / "elsewhere", 1)
    (source / "link").symlink_to(tmp_path / "elsewhere")
    assert shown(convert(source, out, "--json"))["passed_over"]["link to a folder"] == 1


def test_while_cases_are_remade_the_dataset_is_not_finished_and_a_case_is_of_no_rule(
    tmp_path: Path, studies: list[PhantomSeries], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    words = ("--label", "one=left*", "--label", "two=right*", "--json")
    shown(convert(source, out, *words))
    before = {path.name: path.read_bytes() for path in (out / "labelsTr").iterdir()}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gateway.training_data.case_conversion.write_json", killed)
    assert convert(source, out, *words, "--overlap", "last").exit_code != 0
    monkeypatch.undo()
    assert not (out / "dataset.json").exists()
    # Asked for the old rule again, the case that was being made is not taken for one of it.
    assert shown(convert(source, out, *words))["made"] == 1
    assert {path.name: path.read_bytes() for path in (out / "labelsTr").iterdir()} == before
    assert (out / "dataset.json").exists()


def _with_affine(series: PhantomSeries, affine: Any) -> PhantomSeries:
    return PhantomSeries(**{**vars(series), "affine_lps": affine})


def test_a_list_says_what_belongs_together(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = [write_study(source / str(index), index) for index in range(3)]
    left, right = (np.where(series[0].labels == value, value, 0).astype(np.uint8) for value in (1, 2))
    write_label_map(tmp_path / "labels" / "left.nii.gz", series[0], "RAS", left)
    write_label_map(tmp_path / "labels" / "right.nii.gz", series[0], "LPI", right)
    write_segmentation(source / "seg.dcm", series[1])
    write_segmentation(source / "unused.dcm", series[2])
    listed = tmp_path / "labels" / "cases.csv"
    listed.write_text(
        "case,series,label,patient\n"
        f"liver_07,{series[0].series_instance_uid},left.nii.gz|right.nii.gz,p\n"
        ",1,seg.dcm,p\n"
    )
    words = ("--label", "left=1|left*", "--label", "right=2|right*", "--cases", str(listed), "--json")
    document = shown(convert(source, out, *words))
    assert document["cases"] == ["case_0001", "liver_07"]
    assert case_of(out, series[0]) == "liver_07"
    for one in series[:2]:
        assert_converted(out, one)
    assert set(open_dataset(out).json.patients.values()) == {"patient_0001"}
    _check(out)


def test_a_list_with_faults_names_each_with_its_line(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = [write_study(source / str(index), index) for index in range(2)]
    write_segmentation(source / "seg.dcm", series[0])
    listed = tmp_path / "cases.csv"
    uid = series[0].series_instance_uid
    listed.write_text(
        "case,series,label\n"
        "good,0,seg.dcm\n"
        f"SECRET-000,{uid},seg.dcm\n"
        f"again,{uid},seg.dcm\n"
        "nowhere,9.9.9,seg.dcm\n"
        "several,.,seg.dcm\n"
        "nolabel,1,gone.dcm\n"
        "image,1,1/IM0001.dcm\n"
        f"two,{uid}|{series[1].series_instance_uid},seg.dcm\n"
    )
    document = shown(convert(source, out, "--cases", str(listed), "--json"), 1)
    causes = {f["file"]: f["cause"] for f in document["faults"]}
    assert "patient's identifier" in causes["cases.csv, line 3"]
    assert "already a case" in causes["cases.csv, line 4"]
    assert "no such Series Instance UID" in causes["cases.csv, line 5"]
    assert "holds 2 series" in causes["cases.csv, line 6"]
    assert "no such file" in causes["cases.csv, line 7"]
    assert "is no DICOM SEG" in causes["cases.csv, line 8"]
    assert "2 series for 1 channel(s)" in causes["cases.csv, line 9"]
    assert len(causes) == 7


def test_the_name_of_a_case_does_not_tell_the_patient(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "images", 0)
    for file in series.files:
        ds = pydicom.dcmread(file)
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName, ds.PatientID = "Sørensen-Müller^Li Jo^^Dr", "AB 12.345"
        ds.save_as(file)
    write_segmentation(source / "seg.dcm", series)
    listed = tmp_path / "cases.csv"
    telling = ["mueller", "CT_MULLER_1", "xSoerensen", "muellerlijo_2", "liver_ab-12345", "AB12_345"]
    telling.append(series.series_instance_uid.replace(".", "-")[:64].strip("-"))
    for name in telling:
        listed.write_text(f"case,series,label\n{name},images,seg.dcm\n")
        ran = convert(source, out, "--cases", str(listed), "--json")
        causes = _causes(shown(ran, 1))
        assert "cases.csv, line 2: its name holds the patient's identifier, a part of their name or a UID" in causes
        assert name.casefold() not in ran.output.casefold()
    for name in ("liver_2", "mulle", "drone", "jolly"):
        listed.write_text(f"case,series,label\n{name},images,seg.dcm\n")
        assert shown(convert(source, tmp_path / name / NAME, "--cases", str(listed), "--json"))["cases"] == [name]


def test_a_frame_of_reference_counts_where_one_series_has_it(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    series = write_study(source / "a", 0)
    write_structure_set(source / "rs.dcm", series, regions_of(series.labels, NAMES), refers=False)
    document = shown(convert(source, out, "--json"))
    assert "matched by its frame of reference" in document["notes"][0]["note"]
    assert_converted(out, series)
    write_study(source / "b", 0, series_number=2)
    causes = _causes(shown(convert(source, out, "--json"), 1))
    assert "rs.dcm: it may belong to 2 series" in causes


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--label", "a", "--labels", "x.json"], 2, "not both"),
        (["--labels", "gone.json"], 2, "cannot be read"),
        (["--orientation", "LPX"], 2, "three letters"),
        (["--channel", "=CT"], 2, "NAME=MODALITY"),
        (["--cases", "gone.csv"], 1, "cannot be read"),
        ([], 1, "no case can be made: 1 image series, 0 SEG"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(
    tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    write_study(tmp_path / "source", 0)
    ran = convert(tmp_path / "source", tmp_path / "raw" / NAME, *words)
    assert (ran.exit_code, "Traceback" in ran.output) == (code, False)
    assert message in ran.output
    assert not (tmp_path / "raw").exists()


def test_folders_that_would_be_mixed_up_are_refused(tmp_path: Path, studies: list[PhantomSeries]) -> None:
    source = tmp_path / "source"
    for out, words, message in (
        (tmp_path / "raw" / "liver", (), "DatasetNNN_Name"),
        (source / NAME, (), "lie in one another"),
        (tmp_path / "raw" / NAME, ("--identities", str(tmp_path / "raw" / NAME / "who.json")), "does not belong into"),
    ):
        ran = convert(source, out, *words)
        assert (ran.exit_code, message in ran.output) == (2, True), ran.output
    out = tmp_path / "raw" / NAME
    (out / "imagesTr").mkdir(parents=True)
    (out / "imagesTr" / "other_0000.nii.gz").write_bytes(b"")
    assert "was not converted from DICOM" in convert(source, out).output
    shutil.rmtree(out)
    assert convert(source, out).exit_code == 0
    (out.parent / f"{NAME}.identities.json").unlink()
    assert "without it nobody knows" in convert(source, out).output


def test_a_full_disk_stops_with_an_error_and_what_is_made_stays(
    tmp_path: Path, studies: list[PhantomSeries], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = sitk.WriteImage

    def full(image: Any, path: str, *options: Any) -> None:
        write(image, path, *options)
        written.append(path)
        if len(written) > 3:
            os.truncate(path, Path(path).stat().st_size // 2)

    monkeypatch.setattr("engine.nifti.sitk.WriteImage", full)
    source, out = tmp_path / "source", tmp_path / "raw" / NAME
    ran = convert(source, out, "--json")
    assert "is the disk full?" in shown(ran, 1)["error"]
    monkeypatch.undo()
    assert len(list((out / "labelsTr").iterdir())) + len(list((out / "imagesTr").iterdir())) == 3
    assert shown(convert(source, out, "--json"))["made"] == 2
    _check(out)


@pytest.mark.requirement("ART-01")
@pytest.mark.peer("shared-data")
def test_a_patient_with_ct_mr_and_pet_is_converted_by_a_list(tmp_path: Path, shared_data: Path) -> None:
    """Three series share a frame of reference, and their RTSTRUCT name images under other UIDs."""
    source, out = shared_data / "dicom" / "pet-ct-mr-sts-002", tmp_path / NAME
    words = ("--label", "tumour=GTV*", "--json")
    assert len(shown(convert(source, out, *words), 1)["faults"]) == 3
    listed = tmp_path / "cases.json"
    for modality in ("CT", "MR_T1", "PET"):
        out = tmp_path / modality / NAME
        entry = {"series": f"{modality}/dicom/image", "label": f"{modality}/dicom/mask/RS.dcm"}
        listed.write_text(json.dumps({"cases": [entry]}))
        document = shown(convert(source, out, "--cases", str(listed), *words))
        assert document["channels"] == [{"CT": "CT", "MR_T1": "MR", "PET": "PET"}[modality]]
        _check(out)
        twin = read_label_map(source / modality / "nifti" / "mask" / "mask.nii.gz")
        image = read_nifti([source / modality / "nifti" / "image" / "image.nii.gz"])
        labels = read_label_map(out / "labelsTr" / "case_0001.nii.gz")
        assert np.array_equal(labels.array, twin.array)
        assert labels.geometry.same_grid(twin.geometry, tolerance_mm=0.1)
        own = read_nifti([out / "imagesTr" / "case_0001_0000.nii.gz"])
        assert own.array.shape == image.array.shape


@pytest.mark.requirement("ART-01")
@pytest.mark.peer("shared-data")
def test_ct_with_nifti_labels_of_other_voxel_order_are_converted(tmp_path: Path, shared_data: Path) -> None:
    dicom = shared_data / "dicom"
    torso_labels = shared_data / "nifti" / "totalsegmentator" / "example_seg_fast_force_split.nii.gz"
    source = tmp_path / "source"
    source.mkdir()
    for name, folder in (("torso", dicom / "ct-torso" / "series"), ("organs", dicom / "ct-organs" / "series")):
        shutil.copytree(folder, source / name / "series")
    shutil.copy(torso_labels, source / "torso" / "labels.nii.gz")
    shutil.copy(dicom / "ct-organs" / "labels.nii.gz", source / "organs" / "labels.nii.gz")
    out = tmp_path / NAME
    labels = tmp_path / "labels.json"
    values = {"a": 1, "b": 5, "c": 6}
    labels.write_text(json.dumps({"labels": {name: {"names": [str(value)]} for name, value in values.items()}}))
    document = shown(convert(source, out, "--nifti", "labels.nii.gz", "--labels", str(labels), "--json"))
    assert len(document["cases"]) == 2
    _check(out)
    found = [read_label_map(path) for path in sorted((out / "labelsTr").iterdir())]
    for twin_file in (torso_labels, dicom / "ct-organs" / "labels.nii.gz"):
        twin = read_label_map(twin_file)
        change = reorientation(twin.geometry, "LPS")
        (own,) = (f for f in found if f.geometry.shape == change.target.shape)
        assert own.geometry.same_grid(change.target, tolerance_mm=0.01)
        table = np.zeros(256, np.uint8)
        table[list(values.values())] = [1, 2, 3]
        assert np.array_equal(own.array, table[change.apply(twin.array)])


@pytest.mark.peer("shared-data")
def test_what_other_software_wrote_is_converted_or_named(tmp_path: Path, shared_data: Path) -> None:
    """A folder of everything: each object that cannot be used is named once, the others become cases."""
    source, out = shared_data / "dicom" / "foreign-results", tmp_path / NAME
    words = ("--channel", "CT=CT", "--label", "liver", "--json", "--skip-faulty")
    document = shown(convert(source, out, *words))
    assert len(document["cases"]) == 2  # dcmqi's, but the one that three objects draw
    causes = _causes(document)
    assert "both draw 'liver'" in causes
    assert "tumor_User1_Manual_Trial1.dcm: the images that it refers to are not in the source" in causes
    assert "none of the labels is drawn" in causes
    _check(out, "duplicate-image", "empty-foreground", "thin-volume")
