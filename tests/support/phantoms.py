"""Writes asymmetric CT and MR series with a known array and a known affine, so that a wrong side is visible.

The content is defined in patient coordinates (LPS, mm: x grows to the patient's left, y to the back,
z to the head), never in indices: whatever the orientation, slice order or encoding, the same place in the
patient holds the same structure. The same arguments give the same UIDs and the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tests.support.phantom_objects import (
    Modality,
    ObjectPlan,
    PhantomPatient,
    Rescale,
    classic_slice,
    enhanced_object,
    slice_rescale,
    stored_values,
    write_object,
)

__all__ = [
    "BLOB_VALUES",
    "CENTRE_MM",
    "LEFT",
    "RIGHT",
    "InstanceNumbers",
    "Modality",
    "Order",
    "Orientation",
    "PhantomPatient",
    "PhantomSeries",
    "Rescale",
    "asymmetric_content",
    "asymmetric_labels",
    "direction_cosines",
    "phantom_affine",
    "world_positions_mm",
    "write_series",
]

Orientation = Literal["axial", "axial-prone", "axial-mirrored", "sagittal", "coronal", "oblique", "double-oblique"]
Order = Literal["ascending", "reversed", "shuffled"]
InstanceNumbers = Literal["with", "against", "absent"]

LEFT, RIGHT = 1, 2
"""Values of `asymmetric_labels`: the structure in the patient's left half, and the one in the right half."""

CENTRE_MM = np.array([4.0, -11.5, 37.25])
"""Patient coordinates (LPS) of the volume's centre; off the origin, so that a lost origin is noticed."""

# Offsets from the centre and radii as fractions of half the smallest extent of the volume.
_LEFT_BLOB = ((0.45, 0.05, 0.0), 0.38)
_RIGHT_BLOB = ((-0.5, 0.05, 0.0), 0.24)
_ANTERIOR_BLOB = ((0.0, -0.62, 0.1), 0.2)
_SUPERIOR_BLOB = ((-0.05, 0.15, 0.66), 0.2)
BLOB_VALUES = {"left": 300.0, "right": 600.0, "anterior": 900.0, "superior": 1200.0}
"""Added brightness of each structure over the background (which stays below 120)."""


@dataclass(frozen=True, kw_only=True)
class PhantomSeries:
    """What was written.

    files: in delivery order (file names sort in this order). ordered_files and datasets: one per slice along
    the slice normal cross(row, column); one element for an enhanced object, whose frames are in the order of
    `frame_order` (frame_order[k] = index along the normal of stored frame k).
    array: (Z, Y, X) float32 after rescale, z along the slice normal; labels: `asymmetric_labels` on the same
    grid. affine_lps: 4x4 float64, takes (x, y, z, 1).
    """

    files: tuple[Path, ...]
    ordered_files: tuple[Path, ...]
    datasets: tuple[Dataset, ...]
    frame_order: tuple[int, ...]
    array: NDArray[np.float32]
    affine_lps: NDArray[np.float64]
    labels: NDArray[np.uint8] = field(repr=False)
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str


def _rotation(axis: int, degrees: float) -> NDArray[np.float64]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(3)
    first, second = [i for i in range(3) if i != axis]
    matrix[first, first], matrix[first, second] = c, -s
    matrix[second, first], matrix[second, second] = s, c
    return matrix


def direction_cosines(orientation: Orientation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row and column direction (ImageOrientationPatient) of a named orientation."""
    x, y, z = np.eye(3)
    twice = _rotation(2, -15.0) @ _rotation(1, 12.0) @ _rotation(0, 25.0)
    planes = {
        "axial": (x, y),
        "axial-prone": (-x, -y),
        "axial-mirrored": (x, -y),  # the slice normal points to the feet
        "sagittal": (y, -z),
        "coronal": (x, -z),
        "oblique": tuple(_rotation(0, 25.0) @ v for v in (x, y)),
        "double-oblique": tuple(twice @ v for v in (x, y)),
    }
    row, column = planes[orientation]
    return row, column


def phantom_affine(
    orientation: Orientation,
    *,
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int, int],
    tilt_deg: float = 0.0,
) -> NDArray[np.float64]:
    """Affine (4x4, LPS, for voxel indices x, y, z) of a phantom volume centred on CENTRE_MM.

    spacing_mm and shape are (z, y, x). tilt_deg leans the stacking direction from the slice normal towards
    the column direction, as a tilted gantry does; spacing_mm[0] is the step along the stacking direction.
    """
    row, column = direction_cosines(orientation)
    tilt = math.radians(tilt_deg)
    stacking = math.cos(tilt) * np.cross(row, column) + math.sin(tilt) * column
    affine = np.eye(4)
    affine[:3, 0] = row * spacing_mm[2]
    affine[:3, 1] = column * spacing_mm[1]
    affine[:3, 2] = stacking * spacing_mm[0]
    middle_xyz = (np.array(shape[::-1]) - 1) / 2
    affine[:3, 3] = CENTRE_MM - affine[:3, :3] @ middle_xyz
    return affine


def world_positions_mm(affine_lps: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Patient coordinates of every voxel centre: array (Z, Y, X, 3)."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    indices = np.stack([x, y, z], axis=-1).astype(np.float64)
    return np.asarray(indices @ affine_lps[:3, :3].T + affine_lps[:3, 3])


def _inside(
    blob: tuple[tuple[float, float, float], float], positions: NDArray[np.float64], half_extent_mm: float
) -> NDArray[np.bool_]:
    offset, radius = blob
    centre = CENTRE_MM + np.array(offset) * half_extent_mm
    inside: NDArray[np.bool_] = np.linalg.norm(positions - centre, axis=-1) <= radius * half_extent_mm
    return inside


def _half_extent_mm(affine_lps: NDArray[np.float64], shape: tuple[int, int, int]) -> float:
    steps = np.linalg.norm(affine_lps[:3, :3], axis=0)
    return float(min(steps * np.array(shape[::-1]))) / 2


def asymmetric_labels(
    affine_lps: NDArray[np.float64], shape: tuple[int, int, int], *, half_extent_mm: float | None = None
) -> NDArray[np.uint8]:
    """Label map (Z, Y, X): LEFT is the larger structure in the patient's left half (+x in LPS), RIGHT the
    smaller one in the right half. half_extent_mm: scale of the content; by default half the smallest
    extent of the grid.
    """
    scale = _half_extent_mm(affine_lps, shape) if half_extent_mm is None else half_extent_mm
    positions = world_positions_mm(affine_lps, shape)
    labels = np.zeros(shape, dtype=np.uint8)
    labels[_inside(_LEFT_BLOB, positions, scale)] = LEFT
    labels[_inside(_RIGHT_BLOB, positions, scale)] = RIGHT
    return labels


def asymmetric_content(
    affine_lps: NDArray[np.float64],
    shape: tuple[int, int, int],
    *,
    half_extent_mm: float | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Image (Z, Y, X): a background that rises slowly along every patient axis, noise, and four bright
    structures (BLOB_VALUES): large on the left, smaller on the right, one anterior, one superior."""
    scale = _half_extent_mm(affine_lps, shape) if half_extent_mm is None else half_extent_mm
    positions = world_positions_mm(affine_lps, shape)
    relative = (positions - CENTRE_MM) / scale
    image = 50.0 + relative @ np.array([3.0, 5.0, 7.0])
    image += np.random.default_rng(seed).integers(0, 10, size=shape)
    for name, blob in (
        ("left", _LEFT_BLOB),
        ("right", _RIGHT_BLOB),
        ("anterior", _ANTERIOR_BLOB),
        ("superior", _SUPERIOR_BLOB),
    ):
        image[_inside(blob, positions, scale)] += BLOB_VALUES[name]
    return np.asarray(np.rint(image), dtype=np.float64)


def _delivery(order: Order, count: int, seed: int) -> list[int]:
    if order == "ascending":
        return list(range(count))
    if order == "reversed":
        return list(range(count))[::-1]
    shuffled = [int(i) for i in np.random.default_rng(seed + 1).permutation(count)]
    return shuffled


def write_series(
    folder: Path,
    *,
    orientation: Orientation = "axial",
    order: Order = "ascending",
    instance_numbers: InstanceNumbers = "with",
    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 1.5),
    shape: tuple[int, int, int] = (12, 20, 24),
    tilt_deg: float = 0.0,
    modality: Modality = "CT",
    enhanced: bool = False,
    rescale: Rescale = "shared",
    transfer_syntax: str = ExplicitVRLittleEndian,
    single_slice: bool = False,
    bits_stored: int = 16,
    signed: bool = False,
    seed: int = 0,
    study_instance_uid: str | None = None,
    series_number: int = 1,
    series_description: str = "asymmetric phantom",
    patient: PhantomPatient | None = None,
) -> PhantomSeries:
    """Write one series into `folder` (made if absent) as IM0001.dcm, IM0002.dcm, … in delivery order.

    spacing_mm, shape: (z, y, x), z along the slice normal. order: in which order files (frames of an enhanced
    object) are written. instance_numbers: InstanceNumber rising with the slice normal, against it, or absent.
    tilt_deg: gantry tilt, see `phantom_affine`. single_slice: only the middle slice is written (shape z
    becomes 1, SliceThickness = spacing_mm[0]). rescale "none" leaves rescale attributes out.
    Series of one seed share study and frame of reference; series_number tells them apart. JPEG 2000 needs at
    least 32 rows and columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    row, column = direction_cosines(orientation)
    affine = phantom_affine(orientation, spacing_mm=spacing_mm, shape=shape, tilt_deg=tilt_deg)
    scale = _half_extent_mm(affine, shape)
    if single_slice:
        affine[:3, 3] += affine[:3, 2] * (shape[0] // 2)
        shape = (1, *shape[1:])
    image = asymmetric_content(affine, shape, half_extent_mm=scale, seed=seed)
    labels = asymmetric_labels(affine, shape, half_extent_mm=scale)

    recipe = repr((orientation, order, instance_numbers, spacing_mm, shape, tilt_deg))
    recipe += repr((modality, enhanced, rescale))
    recipe += repr((str(transfer_syntax), bits_stored, signed, seed, series_number, series_description))
    study_uid = study_instance_uid or generate_uid(entropy_srcs=["phantom", str(seed), "study"])
    series_uid = generate_uid(entropy_srcs=["phantom", study_uid, recipe, "series"])
    plan = ObjectPlan(
        modality=modality,
        enhanced=enhanced,
        rescale=rescale,
        transfer_syntax=str(transfer_syntax),
        patient=patient or PhantomPatient(),
        study_uid=study_uid,
        series_uid=series_uid,
        frame_of_reference_uid=generate_uid(entropy_srcs=["phantom", study_uid, "frame of reference"]),
        series_number=series_number,
        series_description=series_description,
        affine=affine,
        row=row,
        column=column,
        spacing_mm=spacing_mm,
        slice_thickness_mm=spacing_mm[0],
        bits_stored=bits_stored,
        signed=signed,
    )
    stored = stored_values(plan, image)
    array = np.empty(shape, dtype=np.float32)
    for index in range(shape[0]):
        slope, intercept = slice_rescale(plan, index)
        array[index] = stored[index] * slope + intercept

    delivery = _delivery(order, shape[0], seed)
    files: list[Path] = []
    datasets: dict[int, Dataset] = {}
    ordered_files: dict[int, Path] = {}
    if enhanced:
        sop_uid = generate_uid(entropy_srcs=[series_uid, "enhanced"])
        dataset = enhanced_object(plan, delivery, stored, sop_uid)
        files.append(folder / "IM0001.dcm")
        write_object(dataset, files[0], plan.transfer_syntax)
        datasets[0], ordered_files[0] = dataset, files[0]
    else:
        for sent, index in enumerate(delivery):
            number = {"with": index + 1, "against": shape[0] - index, "absent": None}[instance_numbers]
            sop_uid = generate_uid(entropy_srcs=[series_uid, str(index)])
            dataset = classic_slice(plan, index, number, stored[index], sop_uid)
            files.append(folder / f"IM{sent + 1:04d}.dcm")
            write_object(dataset, files[-1], plan.transfer_syntax)
            datasets[index], ordered_files[index] = dataset, files[-1]
    return PhantomSeries(
        files=tuple(files),
        ordered_files=tuple(ordered_files[k] for k in sorted(ordered_files)),
        datasets=tuple(datasets[k] for k in sorted(datasets)),
        frame_order=tuple(delivery),
        array=array,
        affine_lps=affine,
        labels=labels,
        study_instance_uid=study_uid,
        series_instance_uid=series_uid,
        frame_of_reference_uid=plan.frame_of_reference_uid,
    )
