"""nnU-Net's dataset fingerprint (nnU-Net v2): what the planner needs to know of the images.

Axes are (z, y, x) as stored. The numbers are nnU-Net's own: the same draws from the same random state. Where nnU-Net
keeps 100 million values a channel, here a case is reduced to how often each of its values was drawn; mean, deviation
and percentiles are exact from these counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dataset import Case, DatasetJson, LoadedCase, RawDataset, count_labels, read_case
from engine.errors import DatasetInvalid
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.parallel import Progress, map_cases
from engine.volume import nonzero_box

FINGERPRINT_JSON = "dataset_fingerprint.json"

# nnU-Net's constants: values drawn over the whole dataset, and the state they are drawn from.
_SAMPLES = 10**8
_SEED = 1234
# Draws at a time; the sequence is the same however it is cut.
_BLOCK = 2**18
# The bit of a float32's sign.
_SIGN = np.uint32(2**31)
# Values that may be sorted in one array when a percentile is looked for.
_FEW = 2**16
# The key of what nnU-Net does not have; it ignores it.
_OURS = "seggate"
_MAX_CASES = 10**7
_AXES = ("z", "y", "x")

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class IntensityStatistics:
    """Foreground intensities of one channel over the dataset, every case with the same weight, in image units."""

    max: float
    mean: float
    median: float
    min: float
    percentile_00_5: float
    percentile_99_5: float
    std: float


@dataclass(frozen=True, kw_only=True)
class CaseSummary:
    """What splits are stratified by: volume of all foreground labels (ignore left out), and which of them occur."""

    name: str
    foreground_ml: float
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Per case, in the dataset's order: `spacings` in mm and `shapes_after_crop`, (z, y, x). `intensities` by channel.
    `cases` is empty in a fingerprint that nnU-Net made."""

    spacings: tuple[Triple, ...]
    shapes_after_crop: tuple[tuple[int, int, int], ...]
    intensities: tuple[IntensityStatistics, ...]
    median_relative_size_after_cropping: float
    cases: tuple[CaseSummary, ...] = ()

    def document(self) -> dict[str, Any]:
        """The content of dataset_fingerprint.json: nnU-Net's four keys, and under `seggate` statistics per axis, the
        number of cases and the case summaries."""
        return {
            "foreground_intensity_properties_per_channel": {
                str(index): asdict(statistics) for index, statistics in enumerate(self.intensities)
            },
            "median_relative_size_after_cropping": self.median_relative_size_after_cropping,
            "shapes_after_crop": [list(shape) for shape in self.shapes_after_crop],
            "spacings": [list(spacing) for spacing in self.spacings],
            _OURS: {
                "num_cases": len(self.spacings),
                "spacing_mm": _per_axis(self.spacings),
                "shape_after_crop": _per_axis(self.shapes_after_crop),
                "cases": {
                    case.name: {"foreground_ml": case.foreground_ml, "labels": list(case.labels)} for case in self.cases
                },
            },
        }

    def write(self, path: Path) -> None:
        write_json(self.document(), path, sort_keys=True)


def read_fingerprint(path: Path) -> Fingerprint:
    """A dataset_fingerprint.json, ours or nnU-Net's. Raises DatasetInvalid with the key that is at fault."""
    content = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
    spacings = _triples(content, "spacings", 1e-6, 1e7)
    shapes = _triples(content, "shapes_after_crop", 1, 1e6)
    if len(spacings) != len(shapes):
        raise content.fail("spacings", f"{len(spacings)} cases, shapes_after_crop has {len(shapes)}")
    channels = content.child("foreground_intensity_properties_per_channel")
    intensities = []
    for index in range(len(list(channels.keys()))):
        entry = channels.child(str(index))
        names = IntensityStatistics.__dataclass_fields__
        intensities.append(IntensityStatistics(**{name: entry.number(name, -1e38, 1e38) for name in names}))
    summaries = content.child(_OURS, {}).child("cases", {})
    return Fingerprint(
        spacings=spacings,
        shapes_after_crop=tuple((round(z), round(y), round(x)) for z, y, x in shapes),
        intensities=tuple(intensities),
        median_relative_size_after_cropping=content.number("median_relative_size_after_cropping", 0.0, 1.0),
        cases=tuple(_summary(summaries, name) for name in summaries.keys()),  # noqa: SIM118 - Reader is no mapping; keys() checks each key
    )


def extract_fingerprint(dataset: RawDataset, *, processes: int, progress: Progress | None = None) -> Fingerprint:
    """Reads every file of the dataset once.

    Raises InputRejected with the case and file that cannot be used, DatasetInvalid when no case has foreground,
    WorkerDied when memory runs out.
    """
    analyze = partial(_analyze, dataset_json=dataset.json, num_samples=_SAMPLES // len(dataset.cases))
    seen = map_cases(analyze, dataset.cases, processes=processes, progress=progress)
    if not any(case.drawn for case in seen):
        raise DatasetInvalid("no label map has any foreground: there is nothing to learn")
    return Fingerprint(
        spacings=tuple(case.spacing_mm for case in seen),
        shapes_after_crop=tuple(case.shape_after_crop for case in seen),
        intensities=tuple(
            # In nnU-Net one case without foreground turns the pool from float32 into float64.
            _statistics(
                [case.drawn[channel] for case in seen if case.drawn],
                precision=np.float32 if all(case.drawn for case in seen) else np.float64,
            )
            for channel in range(len(dataset.json.channel_names))
        ),
        median_relative_size_after_cropping=float(np.median([case.relative_size for case in seen])),
        cases=tuple(case.summary for case in seen),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """The values drawn from one channel of one case: ascending, each once, and how often it was drawn."""

    values: NDArray[np.float32]
    counts: NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _SeenCase:
    spacing_mm: Triple
    shape_after_crop: tuple[int, int, int]
    relative_size: float
    drawn: tuple[_Drawn, ...]
    summary: CaseSummary


def _analyze(case: Case, *, dataset_json: DatasetJson, num_samples: int) -> _SeenCase:
    loaded = read_case(case, dataset_json)
    whole = tuple(slice(0, size) for size in loaded.labels.array.shape)
    # Where all is 0 nothing is cropped, as in nnU-Net.
    box = nonzero_box(loaded.volume.array) or (whole[0], whole[1], whole[2])
    foreground = loaded.labels.array[box] > 0
    shape = foreground.shape
    drawn: tuple[_Drawn, ...] = ()
    if num_foreground := int(np.count_nonzero(foreground)):
        # One state for all channels of a case, as in nnU-Net: the second channel goes on where the first stopped.
        state = np.random.RandomState(_SEED)
        drawn = tuple(
            _count_values(channel[box][foreground], _draw(state, num_foreground, num_samples))
            for channel in loaded.volume.array
        )
    return _SeenCase(
        spacing_mm=loaded.spacing_mm,
        shape_after_crop=(shape[0], shape[1], shape[2]),
        relative_size=math.prod(shape) / math.prod(loaded.labels.array.shape),
        drawn=drawn,
        summary=_summarize(loaded, dataset_json.labels.ignore_label),
    )


def _draw(state: np.random.RandomState, population: int, num_samples: int) -> NDArray[np.uint32]:
    """How often each of `population` items is drawn with replacement: the draws of nnU-Net's `state.choice`."""
    counts = np.zeros(population, dtype=np.uint32)
    for start in range(0, num_samples, _BLOCK):
        np.add.at(counts, state.randint(0, population, size=min(_BLOCK, num_samples - start)), np.uint32(1))
    return counts


def _count_values(values: NDArray[np.float32], counts: NDArray[np.uint32]) -> _Drawn:
    """Value and count are sorted together as one integer: the bits of a float32, changed so that they ascend with it,
    and the count below them."""
    bits = (values + np.float32(0.0)).view(np.uint32)  # -0.0 becomes 0.0
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    keys = ascending.astype(np.uint64)[counts > 0]
    keys <<= np.uint64(32)
    keys |= counts[counts > 0]
    keys.sort()
    ascending = (keys >> np.uint64(32)).astype(np.uint32)
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    sums = np.add.reduceat(keys & np.uint64(2**32 - 1), first)
    found = ascending[first]
    distinct = np.where(found & _SIGN, found ^ _SIGN, ~found).view(np.float32)
    return _Drawn(values=distinct, counts=sums.astype(np.min_scalar_type(int(sums.max()))))


def _summarize(loaded: LoadedCase, ignore_label: int | None) -> CaseSummary:
    voxels = {label: n for label, n in count_labels(loaded.labels).items() if label not in (0, ignore_label)}
    volume = sum(voxels.values()) * loaded.labels.geometry.voxel_volume_ml
    return CaseSummary(name=loaded.name, foreground_ml=volume, labels=tuple(voxels))


def _statistics(drawn: Sequence[_Drawn], *, precision: type[np.float32] | type[np.float64]) -> IntensityStatistics:
    """Sums are float64; mean and deviation are given in nnU-Net's precision."""
    total = sum(int(d.counts.sum(dtype=np.int64)) for d in drawn)
    mean = math.fsum(float(np.dot(d.values.astype(np.float64), d.counts)) for d in drawn) / total
    variance = math.fsum(float(np.dot((d.values.astype(np.float64) - mean) ** 2, d.counts)) for d in drawn) / total
    low, median, high = (_percentile(drawn, total, percent) for percent in (0.5, 50.0, 99.5))
    return IntensityStatistics(
        max=max(float(d.values[-1]) for d in drawn),
        mean=float(precision(mean)),
        median=median,
        min=min(float(d.values[0]) for d in drawn),
        percentile_00_5=low,
        percentile_99_5=high,
        std=float(precision(math.sqrt(variance))),
    )


def _percentile(drawn: Sequence[_Drawn], total: int, percent: float) -> float:
    """numpy's linear percentile of all that was drawn, without putting it into one array."""
    place = percent / 100 * (total - 1)
    below = math.floor(place)
    first, second = _ranked(drawn, below), _ranked(drawn, min(below + 1, total - 1))
    return float(first + (second - first) * (place - below))


def _ranked(drawn: Sequence[_Drawn], rank: int) -> np.float32:
    """The value with `rank` (from 0) among all that was drawn.

    Halves the range of values in question until few are left. `window` is, per case, which of its values are still in
    question; what lies below them is already taken off `rank`.
    """
    window = [(0, len(d.values)) for d in drawn]
    while sum(high - low for low, high in window) > max(_FEW, len(drawn)):
        widest = max(range(len(drawn)), key=lambda case: window[case][1] - window[case][0])
        low, high = window[widest]
        pivot = drawn[widest].values[(low + high - 1) // 2]
        lower = [
            (low, low + int(np.searchsorted(d.values[low:high], pivot, side="right")))
            for d, (low, high) in zip(drawn, window, strict=True)
        ]
        up_to_pivot = sum(
            int(d.counts[low:cut].sum(dtype=np.int64)) for d, (low, cut) in zip(drawn, lower, strict=True)
        )
        if rank < up_to_pivot:
            window = lower
        else:
            rank -= up_to_pivot
            window = [(cut, high) for (_, cut), (_, high) in zip(lower, window, strict=True)]
    values = np.concatenate([d.values[low:high] for d, (low, high) in zip(drawn, window, strict=True)])
    counts = np.concatenate([d.counts[low:high] for d, (low, high) in zip(drawn, window, strict=True)])
    order = np.argsort(values)
    found: np.float32 = values[order][np.searchsorted(np.cumsum(counts[order], dtype=np.int64), rank, side="right")]
    return found


def _per_axis(rows: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    columns = np.asarray(rows, dtype=np.float64).T
    return {
        axis: {
            "max": float(column.max()),
            "mean": float(column.mean()),
            "median": float(np.median(column)),
            "min": float(column.min()),
        }
        for axis, column in zip(_AXES, columns, strict=True)
    }


def _triples(content: Reader, key: str, low: float, high: float) -> tuple[Triple, ...]:
    rows = content.array(key, lengths=(1, _MAX_CASES))
    triples = []
    for index, row in enumerate(rows):
        place = f"{key}[{index}]"
        z, y, x = Reader({place: row}, where=content.where, error=content.error).numbers(
            place, low, high, lengths=(3, 3)
        )
        triples.append((z, y, x))
    return tuple(triples)


def _summary(summaries: Reader, name: str) -> CaseSummary:
    entry = summaries.child(name)
    return CaseSummary(
        name=name,
        foreground_ml=entry.number("foreground_ml", 0.0, 1e12),
        labels=entry.integers("labels", 1, 65535, lengths=(0, 65535)),
    )
