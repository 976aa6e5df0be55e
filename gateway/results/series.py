"""DICOM series → volumes on the source grid, with what the slices say about themselves.

`read_series` groups the images of one series into volumes (`slice_geometry`), and `decode` fills in the voxels:
float32 (1, Z, Y, X), value = stored value * RescaleSlope + RescaleIntercept of its own slice. Slices are ordered along
the slice normal cross(row, column), so the array has the voxel order of the stored images; the affine says where it
lies, tilted gantry included. Nothing is resampled or flipped here.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from engine.errors import InputRejected
from engine.volume import Geometry, Volume
from gateway.errors import Rejected
from gateway.results.attributes import AttributeRejected
from gateway.results.frames import Frame, SourceObject, is_placed, read_frames, read_object
from gateway.results.pixels import StoredValues, stored_frames
from gateway.results.slice_findings import FindingKind, GeometryFinding
from gateway.results.slice_geometry import Stack, stacks
from storage.part10 import read_meta_elements

MAX_VOXELS = 1 << 30
"""Larger volumes (4 GiB as float32) are refused before anything is allocated."""
_MOST_THREADS = 8
_PARALLEL_FROM_FILES = 4


@dataclass(frozen=True, kw_only=True)
class SourceFrame:
    """Slice z of the volume: which stored frame it is. frame_number counts from 1, None for classic objects.
    position_mm: ImagePositionPatient (LPS)."""

    sop_class_uid: str
    sop_instance_uid: str
    frame_number: int | None
    position_mm: tuple[float, float, float]
    file: Path


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesPart:
    """One volume of a series.

    part: "" when the series is one volume, else a readable name that stays the same for the same images in any order,
    such as "EchoTime=4.9"; split_by: the same as (key, value) pairs. volume: None until `decode`.
    frames[z] is slice z. headers: data sets without pixel data, headers[z] of slice z; for an enhanced object the one
    data set. distances_mm: between neighbouring slices along the normal, len(frames) - 1 of them.
    """

    part: str
    split_by: tuple[tuple[str, str], ...]
    volume: Volume | None
    geometry: Geometry
    frames: tuple[SourceFrame, ...]
    headers: tuple[Dataset, ...]
    findings: tuple[GeometryFinding, ...]
    modality: str
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    distances_mm: tuple[float, ...]
    tilt_deg: float
    planes: tuple[Frame, ...]

    @property
    def enhanced(self) -> bool:
        """Whether the slices are frames of multi-frame objects."""
        return self.frames[0].frame_number is not None

    @property
    def slice_gap_ratio(self) -> float:
        """Largest distance between neighbours over their median; 1.0 for a single slice."""
        return max(self.distances_mm) / float(np.median(self.distances_mm)) if self.distances_mm else 1.0

    def finding(self, kind: FindingKind) -> GeometryFinding | None:
        """The finding of this kind, if there is one."""
        return next((f for f in self.findings if f.kind == kind), None)


def read_series(
    files: Sequence[Path], *, only_headers: bool = False, max_voxels: int = MAX_VOXELS
) -> tuple[SeriesPart, ...]:
    """Read the images of one series, in any order, and sort them into volumes.

    only_headers: leave the voxels out (`decode` adds them to one part). Objects that claim no position, such as screen
    saves, are set aside with a finding as long as slices remain; an object sent twice counts once.
    Raises AttributeRejected naming attribute and SOP Instance UID for what cannot be read, Rejected without files, and
    OSError when a file is not there.
    """
    if not files:
        raise Rejected("the series has no files; nothing can be read")
    objects, findings = _objects(files)
    frames = [frame for source in objects for frame in read_frames(source)]
    parts = []
    for stack in stacks(frames):
        z, y, x = stack.shape
        if z * y * x > max_voxels:
            problem = f"and Columns make {z} x {y} x {x} voxels, more than {max_voxels},"
            raise AttributeRejected("Rows", problem, stack.frames[0].source.where, "send a smaller series")
        parts.append(_part(stack, findings))
    return tuple(parts) if only_headers else tuple(decode(part) for part in parts)


def decode(part: SeriesPart) -> SeriesPart:
    """The same part with its voxels. Raises AttributeRejected naming the image that cannot be decoded."""
    array = np.empty((1, *part.geometry.shape), dtype=np.float32)
    slices: dict[Path, list[int]] = {}
    for z, frame in enumerate(part.frames):
        slices.setdefault(frame.file, []).append(z)

    def fill(indices: list[int]) -> None:
        planes = [part.planes[z] for z in indices]
        source = planes[0].source
        stored = [0 if plane.frame_number is None else plane.frame_number - 1 for plane in planes]
        offset = source.pixel_data_offset
        decoded = stored_frames(source.file, source.pixel_format, stored, source.where, offset=offset)
        for z, plane, values in zip(indices, planes, decoded, strict=True):
            rescale_values(values, plane.rescale_slope, plane.rescale_intercept, array[0, z])

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    # Where OpenJPEG looks for its number of threads; decoding holds the interpreter's lock.
    os.environ.setdefault("OPJ_NUM_THREADS", str(threads))
    if len(slices) < _PARALLEL_FROM_FILES:
        for indices in slices.values():
            fill(indices)
    else:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            for _ in pool.map(fill, slices.values()):
                pass
    return replace(part, volume=Volume(array=array, geometry=part.geometry))


def rescale_values(values: StoredValues, slope: float, intercept: float, out: NDArray[np.float32]) -> None:
    """value * slope + intercept in float64, rounded once to float32."""
    if values.itemsize <= 2 and slope.is_integer() and intercept.is_integer() and _is_exact(slope, intercept):
        # Nothing is ever rounded, so that float32 gives the same.
        if slope == 1.0:
            np.add(values, np.float32(intercept), out=out)
        else:
            np.multiply(values, np.float32(slope), out=out)
            out += np.float32(intercept)
    elif slope == 1.0 and intercept == 0.0:
        out[...] = values
    else:
        out[...] = values.astype(np.float64) * slope + intercept


def _is_exact(slope: float, intercept: float) -> bool:
    """Whether every value of 16 bits gives a whole number that float32 holds."""
    return 0xFFFF * abs(slope) + abs(intercept) <= 1 << 24


def _objects(files: Sequence[Path]) -> tuple[list[SourceObject], list[GeometryFinding]]:
    """Readable slices of one series, and findings about what was set aside."""
    found: dict[str, SourceObject] = {}
    repeated: list[str] = []
    conflicting: list[str] = []
    for file in sorted(files):
        source = read_object(file)
        if source.sop_instance_uid in found:
            same = _same_content(file, found[source.sop_instance_uid].file)
            (repeated if same else conflicting).append(source.sop_instance_uid)
        else:
            found[source.sop_instance_uid] = source
    placed = [source for source in found.values() if is_placed(source)]
    if not placed:
        read_frames(next(iter(found.values())))  # raises, naming what the first object lacks
    slice_classes = Counter(source.sop_class_uid for source in placed)
    aside = [source for source in found.values() if not is_placed(source)]
    for source in aside:
        if source.sop_class_uid in slice_classes:
            read_frames(source)  # of the class of the slices but without position: raises, naming the attribute
    _check_one_series(placed)
    findings = []
    if repeated:
        findings.append(_set_aside("repeated-instances", repeated, "files repeat a SOP Instance UID; one was read"))
    if conflicting:
        what = "files repeat a SOP Instance UID with other content"
        findings.append(_set_aside("conflicting-instances", conflicting, what))
    if aside:
        uids = [source.sop_instance_uid for source in aside]
        findings.append(_set_aside("unplaced-images", uids, "objects without a position in the patient were left out"))
    return placed, findings


def _same_content(file: Path, other: Path) -> bool:
    """Whether two DICOM files hold the same data set, byte for byte; how and when they came does not count."""
    digests = []
    for path in (file, other):
        with path.open("rb") as stream:
            try:
                _, start = read_meta_elements(stream)
            except ValueError:
                return False
            stream.seek(start)
            digests.append(hashlib.file_digest(stream, "sha256").digest())
    return digests[0] == digests[1]


def _set_aside(kind: FindingKind, uids: Sequence[str], what: str) -> GeometryFinding:
    detail = f"{len(uids)} {what}"
    return GeometryFinding(kind=kind, value=float(len(uids)), limit=0.0, detail=detail, sop_instance_uids=tuple(uids))


def _check_one_series(objects: Sequence[SourceObject]) -> None:
    first = objects[0]
    for source in objects[1:]:
        for keyword, here, there in (
            ("StudyInstanceUID", first.study_instance_uid, source.study_instance_uid),
            ("SeriesInstanceUID", first.series_instance_uid, source.series_instance_uid),
            ("Modality", first.modality, source.modality),
        ):
            if here != there:
                problem = f"differs from that of SOP Instance UID {first.sop_instance_uid}"
                raise AttributeRejected(keyword, problem, source.where, "give the images of one series only")


def _geometry(stack: Stack) -> Geometry:
    try:
        return Geometry(shape=stack.shape, affine_lps=stack.affine_lps)
    except InputRejected as error:
        problem = f"spans no volume ({error})"
        advice = "correct the positions at the sender"
        raise AttributeRejected("ImagePositionPatient", problem, stack.frames[0].source.where, advice) from error


def _part(stack: Stack, findings: Sequence[GeometryFinding]) -> SeriesPart:
    first = stack.frames[0].source
    one_object = all(f.source is first for f in stack.frames)
    enhanced = stack.frames[0].frame_number is not None
    frames = tuple(
        SourceFrame(
            sop_class_uid=f.source.sop_class_uid,
            sop_instance_uid=f.source.sop_instance_uid,
            frame_number=f.frame_number,
            position_mm=(float(f.position_mm[0]), float(f.position_mm[1]), float(f.position_mm[2])),
            file=f.source.file,
        )
        for f in stack.frames
    )
    return SeriesPart(
        part=stack.part,
        split_by=stack.split_by,
        volume=None,
        geometry=_geometry(stack),
        frames=frames,
        headers=(first.header,) if enhanced and one_object else tuple(f.source.header for f in stack.frames),
        findings=(*stack.findings, *findings),
        modality=first.modality,
        study_instance_uid=first.study_instance_uid,
        series_instance_uid=first.series_instance_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
        distances_mm=stack.distances_mm,
        tilt_deg=stack.tilt_deg,
        planes=stack.frames,
    )
