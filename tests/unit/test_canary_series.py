"""gateway.monitoring.canary_series: a sanity case that is read back as the same voxels on the same grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.valuerep import format_number_as_ds

from engine.manifest import Contract
from engine.sanity_phantom import Phantom, make_phantom
from engine.volume import AS_STORED, Geometry, Volume
from gateway.errors import Rejected
from gateway.intake.own_results import is_own_result
from gateway.monitoring.canary_series import (
    PATIENT_ID,
    PATIENT_NAME,
    SliceAxis,
    modality_of,
    new_uid,
    slice_axes,
    stored_values,
    write_canary_series,
)
from gateway.results.series import SeriesPart, read_series

CONTRACT = Contract(
    modalities=("MR",),
    anatomy=None,
    orientation="RAS",
    slice_axis=None,
    spacing_min_mm=(0.5, 0.5, 0.5),
    spacing_max_mm=(5.0, 5.0, 5.0),
    min_slices=2,
    max_slices=100,
    max_slice_gap_ratio=1.05,
    max_gantry_tilt_deg=30.0,
    allow_duplicates=False,
)


def phantom(*, stored: str = "RAS", oblique: bool = False, ranges: tuple[float, float] = (0.0, 1000.0)) -> Volume:
    return make_phantom(
        Phantom(
            seed=3,
            shape=(5, 8, 11),
            spacing_mm=(3.0, 1.25, 0.7),
            orientation="RAS",
            stored_orientation=stored,
            oblique=oblique,
            ranges=(ranges,),
        )
    )


def read_back(folder: Path, volume: Volume, *, axis: SliceAxis = "axial", modality: str = "MR") -> SeriesPart:
    series = write_canary_series(
        folder, volume, study_instance_uid=new_uid(), modality=modality, slice_axis=axis, model="tiny"
    )
    (part,) = read_series(series.files)
    assert part.study_instance_uid == series.study_instance_uid
    return part


@pytest.mark.requirement("OPS-59")
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize(("stored", "oblique"), [("LPS", False), ("RAS", False), ("PIR", True), ("AIL", True)])
def test_voxels_and_grid_come_back_whatever_the_order_of_the_case(
    tmp_path: Path, stored: str, oblique: bool, axis: SliceAxis
) -> None:
    volume = phantom(stored=stored, oblique=oblique)
    part = read_back(tmp_path, volume, axis=axis)
    assert part.volume is not None
    back = part.volume.reoriented(volume.geometry.orientation)[0]
    assert back.geometry.same_grid(volume.geometry, tolerance_mm=1e-4)
    assert np.abs(back.array - volume.array).max() <= 1000 / 32767 / 2 * 1.01
    assert [finding.kind for finding in part.findings] == []


def image(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32).reshape(1, 1, -1)


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ([-1024.0, 0.0, 3071.0], True),
        ([0.0, 65534.0], True),
        ([-2.0, 40000.0, 0.0], False),
        ([0.0, 1e-7, 0.5, 1.0], False),
        ([-1.7e6, 0.0, 1.7e6], False),
        ([1000.25, 1000.5, 1001.0], False),
        ([3.5, 3.5], False),
        ([1e-30, 5e-30], False),
    ],
)
def test_intensities_survive_16_bit_and_nothing_is_taken_for_0_or_0_for_something(
    values: list[float], exact: bool
) -> None:
    original = image(values)
    stored, slope, intercept = stored_values(original)
    back = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    if exact:
        assert (slope, intercept) == (1.0, 0.0)
        assert np.array_equal(back, original)
    span = max(abs(original.min()), original.max()) if (original == 0).any() else original.max() - original.min()
    # What is next to nothing becomes the smallest that can be stored.
    assert np.abs(back - original).max() <= max(span / 32767 * 1.01, abs(original).max() * 1e-6)
    assert np.array_equal(back == 0, original == 0)
    assert float(format_number_as_ds(slope)) == slope


def test_a_series_is_of_no_patient_is_no_result_of_ours_and_another_study_each_time(tmp_path: Path) -> None:
    uids = []
    for number in (1, 2):
        part = read_back(tmp_path / str(number), phantom())
        header = dcmread(part.frames[0].file)
        assert (header.PatientID, str(header.PatientName)) == (PATIENT_ID, PATIENT_NAME)
        assert is_own_result(header) is None
        uids += [header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID]
        uids += [frame.sop_instance_uid for frame in part.frames]
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_every_modality_is_read_as_itself(tmp_path: Path, modality: str) -> None:
    volume = phantom(ranges=(-1000.0, 1500.0))
    part = read_back(tmp_path, volume, modality=modality)
    assert part.modality == modality
    assert part.volume is not None
    low, high = float(volume.array.min()), float(volume.array.max())
    assert float(part.volume.array.min()) == pytest.approx(low, abs=0.1)
    assert float(part.volume.array.max()) == pytest.approx(high, abs=0.1)
    with pytest.raises(Rejected, match="the model takes US, XA"):
        modality_of(("US", "XA"))
    assert modality_of(("US", modality)) == modality


def test_slices_lie_as_the_contract_wants_them_else_across_the_coarsest_spacing() -> None:
    volume = phantom()  # RAS: z, the coarsest, is towards the head
    assert slice_axes(volume, CONTRACT)[0] == "axial"
    assert slice_axes(phantom(stored="SLP"), CONTRACT)[0] == "axial"
    assert slice_axes(volume, replace(CONTRACT, slice_axis="sagittal")) == ("sagittal",)
    as_stored = replace(CONTRACT, orientation=AS_STORED)
    assert slice_axes(volume, as_stored) == ()
    assert slice_axes(phantom(stored="LIP"), as_stored) == ("coronal",)


def test_several_channels_are_refused(tmp_path: Path) -> None:
    two = Volume(
        array=np.ones((2, 3, 4, 5), dtype=np.float32), geometry=Geometry(shape=(3, 4, 5), affine_lps=np.eye(4))
    )
    with pytest.raises(Rejected, match="2 channels"):
        write_canary_series(tmp_path, two, study_instance_uid="1.2", modality="MR", slice_axis="axial", model="tiny")
