"""How well a prediction agrees with its reference: nnU-Net's counts, HD95, surface Dice, and the composite score.

All regions of a case are counted from one table of label pairs and measured within their bounding boxes. Empty sides
have one meaning everywhere but in summary.json, which keeps nnU-Net's (NaN where both sides are empty):
one side empty: Dice 0, HD95 = the volume's diagonal, surface Dice 0; both empty: no value, left out of means.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.errors import DatasetInvalid
from engine.labels import LabelManager
from engine.surfaces import SurfaceRuler

SUMMARY = "summary.json"
TOLERANCE_MM = 2.0
"""Of the surface Dice."""

Region = tuple[int, ...]
"""Label values that are measured as one; a plain label is a region of one value."""


@dataclass(frozen=True, kw_only=True)
class RegionMetrics:
    """One region of one case. Counts are voxels; voxels that the reference ignores count nowhere.

    `hd95_mm` and `surface_dice` (at 2 mm; engine/surfaces.py has the definition) are None where both sides are empty
    or surfaces were not measured.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    hd95_mm: float | None
    surface_dice: float | None

    @property
    def dice(self) -> float | None:
        """None where both sides are empty."""
        union = 2 * self.true_positives + self.false_positives + self.false_negatives
        return 2 * self.true_positives / union if union else None

    @property
    def iou(self) -> float | None:
        """None where both sides are empty."""
        union = self.true_positives + self.false_positives + self.false_negatives
        return self.true_positives / union if union else None


@dataclass(frozen=True, kw_only=True)
class CompositeScore:
    """Means over cases, then over regions (ART-10). None where no case has the region on either side."""

    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None

    @property
    def value(self) -> float | None:
        """0.7 (1 - Dice) + 0.3 (HD95 / 10 mm): lower is better, 0 is perfect. Never infinite or NaN."""
        if self.dice is None or self.hd95_mm is None:
            return None
        return 0.7 * (1.0 - self.dice) + 0.3 * (self.hd95_mm / 10.0)


CaseMetrics = Mapping[Region, RegionMetrics]


def as_plain(case: CaseMetrics) -> list[Any]:
    """Values that JSON has; `from_plain` undoes it."""
    return [[list(region), asdict(metrics)] for region, metrics in case.items()]


def from_plain(plain: Sequence[Any]) -> CaseMetrics:
    return MappingProxyType({tuple(region): RegionMetrics(**metrics) for region, metrics in plain})


def evaluated_regions(labels: LabelManager) -> tuple[Region, ...]:
    """What nnU-Net evaluates: every region, or every label but background, in ascending order."""
    if labels.has_regions:
        return tuple(label.region for label in labels.foreground)
    return tuple((value,) for value in labels.foreground_labels)


def measure_case(
    reference: NDArray[Any],
    prediction: NDArray[Any],
    spacing_mm: Sequence[float],
    regions: Sequence[Region],
    *,
    ignore_label: int | None = None,
    surfaces: bool = True,
) -> CaseMetrics:
    """Metrics of every region of one case.

    `reference` and `prediction` are label maps (Z, Y, X) of equal shape, spacing in mm (z, y, x). A value of no region
    is in none of them, as in nnU-Net. Ignored voxels are background on both sides where surfaces are measured.
    ValueError for shapes that differ.
    """
    if reference.shape != prediction.shape or reference.ndim != 3:
        raise ValueError(f"label maps {reference.shape} and {prediction.shape}: two alike (Z, Y, X) are needed")
    ignored = 0
    if ignore_label is not None:
        annotated = reference != ignore_label
        ignored = reference.size - int(np.count_nonzero(annotated))
        reference, prediction = reference * annotated, prediction * annotated
    highest = max(max(region) for region in regions)
    reference, prediction = _up_to(highest, reference), _up_to(highest, prediction)
    pairs = _pairs(reference, prediction, highest)
    pairs[0, 0] -= ignored
    boxes = [ndimage.find_objects(side, len(pairs)) for side in (reference, prediction)]
    ruler = SurfaceRuler(reference.shape, spacing_mm) if surfaces else None

    found: dict[Region, RegionMetrics] = {}
    for region in regions:
        values = list(region)
        in_both = int(pairs[np.ix_(values, values)].sum())
        in_reference, in_prediction = int(pairs[values].sum()), int(pairs[:, values].sum())
        hd95_mm: float | None = None
        surface_dice: float | None = None
        if ruler is not None and in_reference and in_prediction:
            box = _union([side[value - 1] for side in boxes for value in values])
            distances = ruler.measure(np.isin(reference[box], values), np.isin(prediction[box], values))
            hd95_mm, surface_dice = distances.hd95_mm(), distances.surface_dice(TOLERANCE_MM)
        elif ruler is not None and (in_reference or in_prediction):
            hd95_mm, surface_dice = ruler.diagonal_mm, 0.0
        found[region] = RegionMetrics(
            true_positives=in_both,
            false_positives=in_prediction - in_both,
            false_negatives=in_reference - in_both,
            true_negatives=int(pairs.sum()) - in_reference - in_prediction + in_both,
            hd95_mm=hd95_mm,
            surface_dice=surface_dice,
        )
    return MappingProxyType(found)


def composite_score(cases: Sequence[CaseMetrics]) -> CompositeScore:
    """The score of ART-10 over cases that were measured with surfaces."""

    def mean(attribute: str) -> float | None:
        regions = dict.fromkeys(region for case in cases for region in case)
        means = [
            fmean(values)
            for region in regions
            if (values := [v for case in cases if (v := getattr(case[region], attribute)) is not None])
        ]
        return fmean(means) if means else None

    return CompositeScore(dice=mean("dice"), hd95_mm=mean("hd95_mm"), surface_dice=mean("surface_dice"))


def summary(cases: Sequence[tuple[str, str, CaseMetrics]]) -> dict[str, Any]:
    """nnU-Net's summary.json as a dict: `cases` are (reference file, prediction file, metrics), at least one.

    Dice and IoU are NaN where both sides are empty; a region's mean leaves NaN out, the foreground mean does not
    (nnU-Net's rules). Where surfaces were measured, HD95 (mm) and SurfaceDice (2 mm) stand beside nnU-Net's own.
    """
    per_case = [
        {
            "reference_file": reference,
            "prediction_file": prediction,
            "metrics": {_key(region): _entry(metrics) for region, metrics in case.items()},
        }
        for reference, prediction, case in cases
    ]
    return summarize(per_case)


def summarize(per_case: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same from entries of `metric_per_case`, of one or several summaries; at least one."""
    tables: list[dict[str, dict[str, float]]] = [entry["metrics"] for entry in per_case]
    names = list(dict.fromkeys(name for table in tables for entry in table.values() for name in entry))
    means = {
        key: {name: _nan_mean([table[key].get(name, math.nan) for table in tables]) for name in names}
        for key in tables[0]
    }
    foreground = {name: fmean(entry[name] for entry in means.values()) for name in names}
    return {"foreground_mean": foreground, "mean": means, "metric_per_case": list(per_case)}


def write_summary(path: Path, cases: Sequence[tuple[str, str, CaseMetrics]]) -> None:
    """Writes `summary` as nnU-Net does (sorted keys; NaN is spelled NaN, as its reader wants it)."""
    write_summary_document(path, summary(cases))


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json, ours or nnU-Net's; NaN is read as nan. Raises DatasetInvalid."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetInvalid(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DatasetInvalid(f"{path}: not readable as JSON") from error
    return content


def write_summary_document(path: Path, document: Mapping[str, Any]) -> None:
    """The whole file or the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(document, indent=4, sort_keys=True), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _up_to(highest: int, labels: NDArray[Any]) -> NDArray[Any]:
    """Values beyond 0 to `highest` become the next one: tables of labels are as large as the greatest."""
    if int(labels.min(initial=0)) >= 0 and int(labels.max(initial=0)) <= highest:
        return labels.astype(np.min_scalar_type(highest), copy=False)
    within = np.full(labels.shape, highest + 1, dtype=np.min_scalar_type(highest + 1))
    np.copyto(within, labels, where=(labels >= 0) & (labels <= highest), casting="unsafe")
    return within


def _pairs(reference: NDArray[Any], prediction: NDArray[Any], highest: int) -> NDArray[np.int64]:
    """How many voxels have label i in the reference and label j in the prediction: entry (i, j). The last one is for
    whatever is greater than `highest`."""
    size = 2 + highest
    pairs = np.zeros(size * size, dtype=np.int64)
    for first in range(0, reference.shape[0], planes := max(1, 2**22 // max(1, reference[0].size))):
        part = slice(first, first + planes)
        codes = reference[part].astype(np.intp) * size + prediction[part]
        pairs += np.bincount(codes.ravel(), minlength=size * size)
    return pairs.reshape(size, size)


def _entry(metrics: RegionMetrics) -> dict[str, float]:
    entry = {
        "Dice": math.nan if metrics.dice is None else metrics.dice,
        "IoU": math.nan if metrics.iou is None else metrics.iou,
        "FP": metrics.false_positives,
        "TP": metrics.true_positives,
        "FN": metrics.false_negatives,
        "TN": metrics.true_negatives,
        "n_pred": metrics.true_positives + metrics.false_positives,
        "n_ref": metrics.true_positives + metrics.false_negatives,
    }
    if metrics.hd95_mm is not None and metrics.surface_dice is not None:
        entry |= {"HD95": metrics.hd95_mm, "SurfaceDice": metrics.surface_dice}
    return entry


def _key(region: Region) -> str:
    """ "1" for a label, "(1, 2)" for a region."""
    return str(region[0]) if len(region) == 1 else str(region)


def _nan_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _union(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    """The smallest box that holds all given boxes."""
    present = [box for box in boxes if box is not None]
    return tuple(
        slice(min(box[axis].start for box in present), max(box[axis].stop for box in present)) for axis in range(3)
    )
