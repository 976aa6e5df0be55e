from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from engine.manifest import Contract
from gateway.results.contract import first_refusal, judge
from gateway.results.series import SeriesPart, read_series
from tests.support.phantoms import write_series

CONTRACT = Contract(
    modalities=("CT",),
    anatomy=None,
    orientation="LPS",
    slice_axis=None,
    spacing_min_mm=(0.5, 0.5, 0.5),
    spacing_max_mm=(5.0, 3.0, 3.0),
    min_slices=4,
    max_slices=100,
    max_slice_gap_ratio=1.05,
    max_gantry_tilt_deg=10.0,
    allow_duplicates=False,
)


def part_of(files: tuple[Path, ...] | list[Path]) -> SeriesPart:
    (part,) = read_series(files, only_headers=True)
    return part


def refused(part: SeriesPart, contract: Contract = CONTRACT) -> set[str]:
    return {finding.name for finding in judge(part, contract, channels=1) if not finding.ok}


def test_a_regular_volume_passes_and_every_criterion_is_listed(tmp_path: Path) -> None:
    findings = judge(part_of(write_series(tmp_path, order="shuffled").files), CONTRACT, channels=1)

    assert first_refusal(findings) is None
    assert [finding.name for finding in findings] == [
        "modality",
        "channels",
        "image-type",
        "slice-axis",
        "slice-count",
        "spacing",
        "thickness",
        "slice-gap",
        "irregularity",
        "duplicates",
        "repeated-instances",
        "alignment",
        "gantry-tilt",
    ]
    assert all(finding.detail for finding in findings)


@pytest.mark.requirement("INF-37")
def test_another_modality_is_refused_with_a_reason_a_machine_can_read(tmp_path: Path) -> None:
    refusal = first_refusal(judge(part_of(write_series(tmp_path, modality="MR").files), CONTRACT, channels=1))

    assert refusal is not None
    assert (refusal.name, refusal.value, refusal.limit) == ("modality", "MR", ("CT",))
    assert refusal.detail == "Modality (0008,0060) is MR, allowed: CT"


@pytest.mark.requirement("CMP-16", open="a notice in the PACS")
@pytest.mark.parametrize(("allowed", "expected"), [(1.05, {"slice-gap"}), (2.5, set())])
def test_a_missing_slice_is_refused_unless_the_contract_allows_it(
    tmp_path: Path, allowed: float, expected: set[str]
) -> None:
    files = list(write_series(tmp_path, shape=(10, 8, 8)).ordered_files)
    del files[4]
    contract = replace(CONTRACT, max_slice_gap_ratio=allowed)

    assert refused(part_of(files), contract) == expected


@pytest.mark.requirement("CMP-16", open="a notice in the PACS")
@pytest.mark.parametrize(("allow", "expected"), [(False, {"duplicates"}), (True, set())])
def test_a_doubled_slice_is_refused_unless_the_contract_allows_it(
    tmp_path: Path, allow: bool, expected: set[str]
) -> None:
    files = list(write_series(tmp_path, shape=(6, 8, 8)).ordered_files)
    ds = dcmread(files[2])
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["double"])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(tmp_path / "double.dcm")

    assert refused(part_of([*files, tmp_path / "double.dcm"]), replace(CONTRACT, allow_duplicates=allow)) == expected


@pytest.mark.requirement("CMP-16", open="a notice in the PACS")
def test_slices_too_close_together_are_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path, shape=(7, 8, 8), spacing_mm=(2.0, 1.0, 1.0)).ordered_files
    ds = dcmread(files[-1])
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, y, z - 1.5]
    ds.save_as(files[-1])

    assert refused(part_of(list(files))) == {"irregularity"}


def test_a_tilted_gantry_is_judged_by_its_angle(tmp_path: Path) -> None:
    part = part_of(write_series(tmp_path, tilt_deg=12.0).files)

    assert refused(part) == {"gantry-tilt"}
    assert refused(part, replace(CONTRACT, max_gantry_tilt_deg=12.1)) == set()


@pytest.mark.parametrize(
    ("orientation", "axis"), [("sagittal", "sagittal"), ("coronal", "coronal"), ("oblique", "axial")]
)
def test_the_slice_axis_is_judged(tmp_path: Path, orientation: str, axis: str) -> None:
    part = part_of(write_series(tmp_path, orientation=orientation).files)  # type: ignore[arg-type]

    assert refused(part, replace(CONTRACT, slice_axis=axis)) == set()  # type: ignore[arg-type]
    other = "coronal" if axis != "coronal" else "sagittal"
    assert refused(part, replace(CONTRACT, slice_axis=other)) == {"slice-axis"}  # type: ignore[arg-type]


def test_spacing_is_compared_in_the_models_orientation(tmp_path: Path) -> None:
    # Sagittal slices 3 mm apart: in LPS order the 3 mm lie along x, the 2 mm of the rows along z.
    part = part_of(write_series(tmp_path, orientation="sagittal", spacing_mm=(3.0, 2.0, 1.5)).files)
    contract = replace(CONTRACT, spacing_min_mm=(1.9, 1.4, 2.9), spacing_max_mm=(2.1, 1.6, 3.1))

    assert refused(part, contract) == set()
    assert refused(part, replace(contract, orientation="as-stored")) == {"spacing"}


@pytest.mark.parametrize(("slices", "expected"), [(3, {"slice-count"}), (4, set()), (101, {"slice-count"})])
def test_slice_counts_are_judged(tmp_path: Path, slices: int, expected: set[str]) -> None:
    part = part_of(write_series(tmp_path, shape=(slices, 4, 4)).files)

    assert refused(part) == expected


def test_a_single_slice_of_unknown_extent_is_refused(tmp_path: Path) -> None:
    (file,) = write_series(tmp_path, single_slice=True).files
    ds = dcmread(file)
    del ds.SliceThickness
    ds.save_as(file)

    assert refused(part_of([file]), replace(CONTRACT, min_slices=1)) == {"thickness"}


def test_a_localizer_is_refused(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(5, 8, 8))
    for file in series.files:
        ds = dcmread(file)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        ds.save_as(file)

    assert refused(part_of(series.files)) == {"image-type"}


@pytest.mark.parametrize("changed", [False, True])
def test_two_contents_under_one_uid_are_refused_and_the_same_twice_is_not(tmp_path: Path, changed: bool) -> None:
    files = list(write_series(tmp_path, shape=(6, 8, 8)).ordered_files)
    ds = dcmread(files[2])
    ds.file_meta.SourceApplicationEntityTitle = "AGAIN"
    if changed:
        ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "again.dcm")

    assert refused(part_of([*files, tmp_path / "again.dcm"])) == ({"repeated-instances"} if changed else set())


def test_a_model_of_several_channels_is_refused(tmp_path: Path) -> None:
    part = part_of(write_series(tmp_path).files)
    refusal = first_refusal(judge(part, CONTRACT, channels=2))

    assert refusal is not None
    assert (refusal.name, refusal.value, refusal.limit) == ("channels", 1, 2)
    assert refusal.detail == "the model wants 2 channels; one series gives 1"
