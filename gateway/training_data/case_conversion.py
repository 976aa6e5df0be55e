"""One case: its series and labels are read, placed on one grid, and written as NIfTI files.

    imagesTr/CASE_0000.nii.gz ...    labelsTr/CASE.nii.gz    .conversion/CASE.json

The last file is written last: it has digests of what the case was made from, so that a case is made again when that
changes, and only then. Voxels are those of the series, exchanged and reversed into one orientation; nothing is
resampled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dataset import IMAGES, LABELS, grid_difference
from engine.errors import InputRejected
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.nifti import read_label_map, write_image
from engine.volume import Geometry, LabelMap, reorientation
from gateway.errors import Rejected
from gateway.results.series import SeriesPart, decode, read_series
from gateway.results.slice_findings import FindingKind
from gateway.training_data.contour_masks import BetweenSlices, paint_contours
from gateway.training_data.faults import FAULT_ERRORS, Fault
from gateway.training_data.grid_placement import EVENNESS, even_grid, place
from gateway.training_data.label_names import LabelTable
from gateway.training_data.label_objects import LabelObject
from gateway.training_data.label_painting import LabelPainter, Overlap
from gateway.training_data.segment_masks import paint_segments
from gateway.training_data.source_scan import shown

ENDING = ".nii.gz"
RECORDS = ".conversion"
FORMAT = 2
"""Raised when the same source makes another case: then all are made again."""
_REFUSED: frozenset[FindingKind] = frozenset(
    {
        "missing-slices",
        "duplicate-positions",
        "mixed-contents",
        "ambiguous-times",
        "conflicting-instances",
        "slice-thickness-absent",
    }
)
_TOLD: frozenset[FindingKind] = frozenset(
    {"single-slice", "irregular-spacing", "not-collinear", "gantry-tilt", "partial-extent", "repeated-instances",
     "unplaced-images", "lossy-compression"}
)  # fmt: skip
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True, kw_only=True)
class CaseJob:
    """`series`: files of each channel; `labels` with, for each, number of the structure → label value (`values`), and
    the images that are `absent` and must have no voxels (SOP Instance UIDs)."""

    name: str
    series: tuple[tuple[Path, ...], ...]
    labels: tuple[LabelObject, ...]
    values: tuple[Mapping[int, int], ...]
    absent: tuple[frozenset[str], ...]


@dataclass(frozen=True, kw_only=True)
class ConversionRules:
    """What holds for all cases. `root` is the source, for messages; `folder` the dataset; `threshold` that of
    FRACTIONAL segments."""

    root: Path
    folder: Path
    orientation: str
    table: LabelTable
    overlap: Overlap
    between: BetweenSlices
    threshold: float


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """`made`: whether anything was written. `values` are the labels that have voxels; `notes` are what a person should
    know of the case."""

    name: str
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    values: frozenset[int] = frozenset()
    made: bool = False


def convert_case(job: CaseJob, rules: ConversionRules) -> CaseResult:
    """Makes what is not there yet. What is wrong with the case is in the result; OSError is raised when the disk is
    full or read-only, since then no other case can be written."""
    conversion = _Conversion(job, rules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's name values of the files
            return conversion.run()
    except FAULT_ERRORS as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        cause = str(error) or type(error).__name__
        fault = Fault(case=job.name, file=conversion.at, cause=cause)
        return CaseResult(name=job.name, faults=(*conversion.faults, fault))


def is_made(job: CaseJob, rules: ConversionRules) -> bool:
    """Whether `convert_case` would have nothing to do."""
    return _Conversion(job, rules).is_made()


def case_files(folder: Path, name: str, channels: int) -> tuple[tuple[Path, ...], Path]:
    """Image files in the order of the channels, and the label file."""
    images = tuple(folder / IMAGES / f"{name}_{channel:04}{ENDING}" for channel in range(channels))
    return images, folder / LABELS / f"{name}{ENDING}"


def record_file(folder: Path, name: str) -> Path:
    return folder / RECORDS / f"{name}.json"


class _Conversion:
    """One run of `convert_case`. `at` is the file or series that is being worked on, for a fault."""

    def __init__(self, job: CaseJob, rules: ConversionRules) -> None:
        self.job, self.rules = job, rules
        self.at: str | None = None
        self.faults: list[Fault] = []
        self.notes: list[str] = []

    def run(self) -> CaseResult:
        job, rules = self.job, self.rules
        images, label = case_files(rules.folder, job.name, len(job.series))
        stamps = {"images": self._image_stamp(), "label": self._label_stamp()}
        record = self._record()
        images_made, label_made = self.made(record, stamps)
        if images_made and label_made:
            return CaseResult(name=job.name, notes=tuple(record["notes"]), values=frozenset(record["values"]))
        parts, grid = self._parts()
        volumes = _volumes(parts)
        if record.get("volumes") != volumes:  # the labels say now that another volume of the series is meant
            images_made = label_made = False
        change = reorientation(grid, rules.orientation)
        painter = self._painted(grid)
        if self.faults:
            return CaseResult(name=job.name, faults=tuple(self.faults))
        # First: until the new record is there, nothing says by which rules the files were made.
        record_file(rules.folder, job.name).unlink(missing_ok=True)
        if not label_made:
            self._write(change.apply(painter.array), change.target, label)
        if not images_made:
            for channel, path in zip(range(len(parts)), images, strict=True):
                self._write(change.apply(self._voxels(parts[channel], channel)), change.target, path)
        known = {"volumes": volumes, "notes": self.notes, "values": sorted(painter.painted)}
        write_json({"format": FORMAT, **stamps, **known}, record_file(rules.folder, job.name))
        return CaseResult(name=job.name, notes=tuple(self.notes), values=painter.painted, made=True)

    def made(self, record: Mapping[str, Any], stamps: Mapping[str, str]) -> tuple[bool, bool]:
        """Whether images and label are there, as they would be made now. Which volume of a series is the image depends
        on the labels too: images alone may be of another one."""
        images, label = case_files(self.rules.folder, self.job.name, len(self.job.series))
        return (
            record.get("images") == stamps["images"] and all(path.is_file() for path in images),
            record.get("label") == stamps["label"] and label.is_file(),
        )

    def is_made(self) -> bool:
        try:
            return all(self.made(self._record(), {"images": self._image_stamp(), "label": self._label_stamp()}))
        except OSError:  # a source file is gone: the conversion says so
            return False

    def _record(self) -> dict[str, Any]:
        try:
            record = read_json(record_file(self.rules.folder, self.job.name), error=Rejected)
        except Rejected:
            return {}
        whole = record.get("format") == FORMAT and all(isinstance(record.get(k), list) for k in ("notes", "values"))
        return record if whole else {}

    def _image_stamp(self) -> str:
        return _digest([[_state(file) for file in files] for files in self.job.series], self.rules.orientation)

    def _label_stamp(self) -> str:
        job, rules = self.job, self.rules
        # By their content: a correction may leave size and time as they were. Images are too large for that.
        labels = [
            [label.file.name, label.digest, sorted(values.items()), sorted(absent)]
            for label, values, absent in zip(job.labels, job.values, job.absent, strict=True)
        ]
        return _digest(self._image_stamp(), labels, rules.overlap, rules.between, rules.threshold)

    def _parts(self) -> tuple[list[SeriesPart], Geometry]:
        """One volume for each channel, without voxels, and the grid that they share."""
        parts: list[SeriesPart] = []
        grid: Geometry | None = None
        for channel, files in enumerate(self.job.series):
            self.at = f"channel {channel:04}"
            part = self._part(read_series(files, only_headers=True), grid)
            self.at = f"series {part.series_instance_uid}"
            refused = [finding.detail for finding in part.findings if finding.kind in _REFUSED]
            if refused:
                raise Rejected("; ".join(refused))
            own = series_grid(part)
            if grid is None:
                grid = own
            else:
                _check_shared(parts[0], part, grid, own)
            self.notes += [f"{f.kind}: {f.detail}" for f in part.findings if f.kind in _TOLD]
            parts.append(part)
        if grid is None:
            raise Rejected("the case has no series")
        return parts, grid

    def _part(self, parts: Sequence[SeriesPart], grid: Geometry | None) -> SeriesPart:
        """The only volume; of several the one that the labels refer to, or that lies on the first channel's grid."""
        volumes = [part for part in parts if part.finding("localizer") is None] or list(parts)
        if len(volumes) == 1:
            return volumes[0]
        referred = {uid for label in self.job.labels for uid in label.instances}
        drawn_on = [part for part in volumes if referred & {frame.sop_instance_uid for frame in part.frames}]
        if len(drawn_on) == 1:
            return drawn_on[0]
        fitting = [part for part in volumes if grid is not None and _fits(part, grid)]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(part.part for part in volumes[:4])
        raise Rejected(f"the series holds {len(volumes)} volumes ({names}), and the labels do not say which is meant")

    def _painted(self, grid: Geometry) -> LabelPainter:
        """The label map on the source grid; what is wrong with one file of labels does not hide the next one's."""
        job, rules = self.job, self.rules
        painter = LabelPainter(grid.shape, len(rules.table.labels), rules.overlap)
        for label, values, absent in zip(job.labels, job.values, job.absent, strict=True):
            self.at = shown(label.file, rules.root)
            if not values:
                continue
            try:
                if label.kind == "SEG":
                    paint_segments(label.file, values, grid, painter, threshold=rules.threshold, absent=absent)
                elif label.kind == "RTSTRUCT":
                    self.notes += paint_contours(
                        label.file, values, grid, painter, between=rules.between, absent=absent
                    )
                else:
                    paint_label_map(read_label_map(label.file), values, grid, painter, label.file.name)
            except (Rejected, InputRejected) as error:
                self.faults.append(Fault(case=job.name, file=self.at, cause=str(error)))
        for (low, high), voxels in sorted(painter.overlaps.items()):
            text = f"{rules.table.name(low)!r} and {rules.table.name(high)!r} overlap in {voxels} voxels"
            if rules.overlap == "refuse":
                cause = f"{text}; `--overlap first` or `--overlap last` decides by the order of the labels"
                self.faults.append(Fault(case=job.name, file=None, cause=cause))
            else:
                winner = rules.table.name(low if rules.overlap == "first" else high)
                self.notes.append(f"{text}, which went to {winner!r}")
        if not self.faults and not painter.painted:
            self.notes.append("no voxel has a label")
        return painter

    def _voxels(self, part: SeriesPart, channel: int) -> NDArray[Any]:
        self.at = f"series {part.series_instance_uid}"
        volume = decode(part).volume
        if volume is None:
            raise Rejected(f"channel {channel:04}: has no voxels")
        return written_values(volume.array[0])

    def _write(self, array: NDArray[Any], grid: Geometry, path: Path) -> None:
        self.at = path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(array, grid, path)


def series_grid(part: SeriesPart) -> Geometry:
    """The even grid with orthogonal axes on which a volume is written as NIfTI. Raises Rejected where there is none."""
    positions_mm = np.array([frame.position_mm for frame in part.frames])
    return even_grid(part.geometry.affine_lps, positions_mm, part.geometry.shape)


def written_values(array: NDArray[np.float32]) -> NDArray[Any]:
    """An image (Z, Y, X) as it is written: int16 where that holds every value. Raises Rejected for what is not
    finite."""
    if not np.isfinite(array).all():
        raise Rejected("RescaleSlope and RescaleIntercept give values that are not finite")
    whole = np.abs(array).max() < 2**15 and np.array_equal(array, np.rint(array))
    return array.astype(np.int16) if whole else array


def _fits(part: SeriesPart, grid: Geometry) -> bool:
    try:
        return series_grid(part).same_grid(grid, tolerance_mm=EVENNESS * min(grid.spacing_mm))
    except Rejected:
        return False


def _check_shared(first: SeriesPart, part: SeriesPart, grid: Geometry, own: Geometry) -> None:
    """Channels are matched voxel by voxel. Raises Rejected where they do not lie on one grid of one patient
    position."""
    if own.same_grid(grid, tolerance_mm=EVENNESS * min(grid.spacing_mm)):
        if first.frame_of_reference_uid != part.frame_of_reference_uid:
            raise Rejected(
                "FrameOfReferenceUID (0020,0052) differs from the first channel's: nothing says that the positions "
                "are comparable; register the series first"
            )
        return
    difference = grid_difference(grid, own)
    what = "position" if difference is None else difference.text
    raise Rejected(f"lies on another grid than the first channel ({what}); resample the series onto one grid first")


def paint_label_map(
    labels: LabelMap, values: Mapping[int, int], grid: Geometry, painter: LabelPainter, what: str
) -> None:
    """Paint a label map in any voxel order. values: its value → label value. Raises Rejected, naming `what` it is, when
    it does not lie on the grid."""
    geometry = labels.geometry
    # The thickness of a single slice says nothing of where its voxels are.
    axes = 3 if len(labels.array) > 1 else 2
    placement = place(
        origin_mm=geometry.affine_lps[:3, 3],
        steps_mm=geometry.affine_lps[:3, :axes],
        sizes=geometry.shape[::-1][:axes],
        target=grid,
        what=what,
    )
    # Slice by slice: indices of a whole structure can take many times the memory of the label map.
    for z, plane in enumerate(labels.array):
        present = np.flatnonzero(np.bincount(plane.ravel()))
        for number in (int(n) for n in present if int(n) in values):
            y, x = np.nonzero(plane == number)
            painter.paint(values[number], *placement.apply((x, y, np.full_like(y, z))[:axes], grid, what))


def _volumes(parts: Sequence[SeriesPart]) -> str:
    """Which images the case is made of: a series may hold several volumes of one grid (phases)."""
    return _digest([[[frame.sop_instance_uid, frame.frame_number] for frame in part.frames] for part in parts])


def _state(file: Path) -> list[object]:
    """Without its folder: a source that was moved is the same."""
    state = file.stat()
    return [file.name, state.st_size, state.st_mtime_ns]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
