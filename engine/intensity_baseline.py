"""How bright the training images are, study by study: the baseline that live studies are compared with (ART-20).

A study becomes two histograms per channel, of its foreground (what the label map marks) and of the whole image (the box
around what is not 0), as shares of 10,000 over bins whose edges are frozen in the baseline. The outer two bins are
open. Where values have a unit (CT, PET, unnormalised and RGB channels) the edges are in that unit; MR has none, so
there 0 and 1 are the 1st and 99th percentile of the image's own voxels that are not 0. Nothing depends on the order in
which voxels are stored, and percentiles are values that occur, so the numbers are the same on every machine.

Every 4th voxel towards the head, every 2nd towards back and left is looked at: a live study costs a sixteenth, and the
baseline is made on the same grid. The noise is the median absolute deviation of the Laplacian (Immerkaer 1996, with
the median for the mean), as a share of the distance from the 1st to the 99th percentile.

Spacing, size and grid are along the patient's axes, in the order superior, posterior, left. No names are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engine.drift_streams import kl_divergence as divergence
from engine.json_reader import Reader
from engine.plans import NormalizationScheme
from engine.volume import LabelMap, Reorientation, Volume, reorientation

BASELINE_JSON = "baseline.json"
FORMAT = 2
BINS = 64
SHARES = 10_000
"""What the bins of one histogram add up to."""
ALPHA = 0.5
"""Added to every bin before histograms are compared, so that a bin that one side never filled gives no infinity."""
PERCENTILES = (1.0, 50.0, 99.0)
# Studies that are kept one by one, times channels: enough for a bootstrap, and a file of at most half a megabyte.
_MAX_HISTOGRAMS = 1000
_MAX_CASES = 10**7
_MAX_VALUE = 1e38

GRID = (4, 2, 2)
"""Of which voxels along superior, posterior, left every n-th is looked at."""
_WHOLE = (1, 1, 1)  # as format 1 did
_NOISE_VOXELS = 2**17
# The Laplacian adds up six neighbours and takes six times the middle: white noise of 1 becomes this.
_LAPLACIAN = 42**0.5
_DEVIATION = 0.6745  # the median of |noise| of a standard deviation of 1

_CT_RANGE = (-1024.0, 3071.0)
_PERCENTILE_RANGE = (-0.1, 1.4)
_UNIT_SCHEMES: frozenset[NormalizationScheme] = frozenset({"ct", "nonorm", "rgb_to_0_1"})
_UNIT_CHANNELS = frozenset({"ct", "cbct", "pet", "pt", "suv"})
_LPS = "LPS"

Scale = Literal["image", "percentile"]
Counts = tuple[int, ...]
Triple = tuple[float, float, float]
Triplet = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ChannelBins:
    """The frozen edges of one channel, BINS - 1 of them, ascending; a value on an edge belongs to the upper bin.

    `scale` "image": edges in the image's units. "percentile": 0 and 1 are the 1st and 99th percentile of the image.
    """

    name: str
    scale: Scale
    foreground_edges: tuple[float, ...]
    whole_edges: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ChannelIntensities:
    """One channel of one study. `foreground` is None without foreground. `percentiles` (1, 50, 99) are in the image's
    units, of the voxels that are not 0; zeros where there is none. `noise` is a share of the distance between the outer
    two of them; None where there is no distance, the image is too thin, or format 1 wrote it."""

    foreground: Counts | None
    whole: Counts
    percentiles: Triple
    noise: float | None


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """One study. `spacing_mm` and `size` (voxels of the box around what is not 0, on the grid that was looked at) run
    superior, posterior, left; `volumes_ml` is by the labels of the model; `foreground_share` is the part of that box
    that has a label, None where format 1 wrote it."""

    channels: tuple[ChannelIntensities, ...]
    spacing_mm: Triple
    size: tuple[int, int, int]
    volumes_ml: tuple[float, ...]
    foreground_share: float | None


@dataclass(frozen=True, kw_only=True)
class PooledIntensities:
    """The mean of all studies' histograms, each study with the same weight; they add up to SHARES."""

    foreground: tuple[float, ...] | None
    whole: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class IntensityBaseline:
    """`pooled` is over all `cases`; `studies` are those cases, or an even choice where there are very many. `labels`
    are names, in the order of the studies' volumes. `grid`: see GRID."""

    grid: Triplet
    channels: tuple[ChannelBins, ...]
    labels: tuple[str, ...]
    cases: int
    pooled: tuple[PooledIntensities, ...]
    studies: tuple[StudySummary, ...]


def choose_bins(
    names: Sequence[str], schemes: Sequence[NormalizationScheme], percentiles: Sequence[tuple[float, float]]
) -> tuple[ChannelBins, ...]:
    """Edges for each channel from its name, the plans' normalisation, and the 0.5th and 99.5th percentile of the
    training set's foreground (the fingerprint's)."""
    found = []
    for name, scheme, (low, high) in zip(names, schemes, percentiles, strict=True):
        if scheme not in _UNIT_SCHEMES and name.casefold() not in _UNIT_CHANNELS:
            edges = _even(*_PERCENTILE_RANGE)
            found.append(ChannelBins(name=name, scale="percentile", foreground_edges=edges, whole_edges=edges))
            continue
        margin = max((high - low) / 2, 0.5)
        whole = _CT_RANGE if scheme == "ct" else (min(0.0, low - margin), high + margin)
        found.append(
            ChannelBins(
                name=name,
                scale="image",
                foreground_edges=_even(low - margin, high + margin),
                whole_edges=_even(*whole),
            )
        )
    return tuple(found)


def summarize_study(
    volume: Volume,
    labels: LabelMap,
    bins: Sequence[ChannelBins],
    volumes_ml: Sequence[float],
    *,
    ignore_label: int | None = None,
    grid: Triplet = GRID,
) -> StudySummary:
    """What the baseline holds of a training case, and what a live study is compared by; one function for both.

    `volume` (C, Z, Y, X) in its source's units, on any grid and in any voxel order, `labels` on the same grid: the
    reference in training, the prediction later. `volumes_ml` are the volumes of the model's labels in them
    (`label_volumes_ml`, or as measured already). ValueError when image and labels do not fit together.
    """
    if volume.array.shape[0] != len(bins) or labels.array.shape != volume.geometry.shape:
        raise ValueError(
            f"image {volume.array.shape} and labels {labels.array.shape} do not fit {len(bins)} channel(s)"
        )
    patient = reorientation(volume.geometry, _LPS)
    array, values = _on_grid(volume.array, patient, grid), _on_grid(labels.array, patient, grid)
    box = _box(array)
    inside = values[box]
    foreground = inside != 0
    if ignore_label is not None:
        foreground &= inside != ignore_label
    z, y, x = inside.shape
    channels = []
    for channel, sampled, chosen in zip(volume.array, array, bins, strict=True):
        found = _channel(sampled[box], foreground, chosen)
        low, _, high = found.percentiles
        noise = _noise(_towards(channel, patient), grid)
        relative = None if noise is None or high <= low else float(f"{noise / (high - low):.6g}")
        channels.append(replace(found, noise=relative))
    return StudySummary(
        channels=tuple(channels),
        spacing_mm=_triple(float(f"{mm:.6g}") for mm in patient.target.spacing_mm),
        size=(z, y, x),
        volumes_ml=tuple(float(f"{ml:.6g}") for ml in volumes_ml),
        foreground_share=float(f"{np.count_nonzero(foreground) / foreground.size:.6g}"),
    )


def label_volumes_ml(labels: LabelMap, regions: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """The volume of each of the regions' label values together."""
    voxels = np.bincount(labels.array.ravel())
    sizes = [sum(int(voxels[value]) for value in set(region) if value < voxels.size) for region in regions]
    return tuple(size * labels.geometry.voxel_volume_ml for size in sizes)


def make_baseline(
    bins: Sequence[ChannelBins], labels: Sequence[str], studies: Sequence[StudySummary], *, grid: Triplet = GRID
) -> IntensityBaseline:
    """The baseline of these studies, at least one, that were all summarised on this grid."""
    kept = max(1, _MAX_HISTOGRAMS // len(bins))
    chosen = np.unique(np.linspace(0, len(studies) - 1, min(kept, len(studies))).round().astype(int))
    return IntensityBaseline(
        grid=grid,
        channels=tuple(bins),
        labels=tuple(labels),
        cases=len(studies),
        pooled=tuple(
            PooledIntensities(
                foreground=_pooled([study.channels[index].foreground for study in studies]),
                whole=_pooled([study.channels[index].whole for study in studies]) or (),
            )
            for index in range(len(bins))
        ),
        studies=tuple(studies[index] for index in chosen),
    )


def kl_divergence(current: Sequence[float], reference: Sequence[float]) -> float:
    """KL(current || reference) in nats of two histograms that add up to SHARES (single or pooled), each smoothed by
    ALPHA a bin; finite, at least 0. ValueError for different numbers of bins."""
    if len(current) != len(reference):
        raise ValueError(f"histograms of {len(current)} and {len(reference)} bins cannot be compared")
    return float(divergence(_smoothed(current), _smoothed(reference)))


def pool(histograms: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of several studies' histograms, each with the same weight; at least one."""
    return tuple(round(float(share), 4) for share in np.mean(np.asarray(histograms, dtype=np.float64), axis=0))


def baseline_text(baseline: IntensityBaseline) -> str:
    """The content of baseline.json: one study a line, so that hundreds of them stay a small file. What was read in
    format 1 is written in it."""
    plain = [asdict(study) for study in baseline.studies]
    is_old = baseline.grid == _WHOLE and all(study["foreground_share"] is None for study in plain)
    if is_old:
        for study in plain:
            del study["foreground_share"]
            for channel in study["channels"]:
                del channel["noise"]
    head = {
        "format": 1 if is_old else FORMAT,
        **({} if is_old else {"grid": baseline.grid}),
        "alpha": ALPHA,
        "shares": SHARES,
        "labels": baseline.labels,
        "cases": baseline.cases,
        "channels": [asdict(channel) for channel in baseline.channels],
        "pooled": [asdict(pooled) for pooled in baseline.pooled],
    }
    lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in head.items()]
    studies = ",\n".join(map(_compact, plain))
    return "{\n" + ",\n".join(lines) + ',\n"studies": [\n' + studies + "\n]\n}\n"


def read_baseline(document: Mapping[str, Any], *, error: type[Exception]) -> IntensityBaseline:
    """The baseline in a document; raises `error` with the key for whatever is missing, of wrong type or range, or does
    not add up."""
    reader = Reader(document, where=BASELINE_JSON, error=error)
    written = reader.integer("format", 0, 10**6)
    if written not in (1, FORMAT):
        raise reader.fail("format", f"is not {FORMAT}, and not 1")
    if reader.integer("shares", 0, 10**6) != SHARES:
        raise reader.fail("shares", f"is not {SHARES}")
    grid = reader.integers("grid", 1, 64, lengths=(3, 3)) if written != 1 else _WHOLE
    if reader.number("alpha", 0.0, 1e3) != ALPHA:
        raise reader.fail("alpha", f"is not {ALPHA}")
    channels = tuple(_read_bins(entry) for entry in reader.children("channels", lengths=(1, 256)))
    labels = reader.texts("labels", lengths=(1, 4096))
    pooled = tuple(
        PooledIntensities(
            foreground=None if entry.raw("foreground") is None else _read_pooled(entry, "foreground"),
            whole=_read_pooled(entry, "whole"),
        )
        for entry in reader.children("pooled", lengths=(len(channels), len(channels)))
    )
    studies = tuple(
        read_study(entry, channels=len(channels), labels=len(labels))
        for entry in reader.children("studies", lengths=(1, _MAX_HISTOGRAMS))
    )
    return IntensityBaseline(
        grid=(grid[0], grid[1], grid[2]),
        channels=channels,
        labels=labels,
        cases=reader.integer("cases", len(studies), _MAX_CASES),
        pooled=pooled,
        studies=studies,
    )


def read_study(entry: Reader, *, channels: int, labels: int) -> StudySummary:
    """One study as `asdict` writes it; raises the reader's error."""
    size = entry.integers("size", 1, 10**6, lengths=(3, 3))
    return StudySummary(
        channels=tuple(
            ChannelIntensities(
                foreground=None if channel.raw("foreground") is None else _read_counts(channel, "foreground"),
                whole=_read_counts(channel, "whole"),
                percentiles=_triple(channel.numbers("percentiles", -_MAX_VALUE, _MAX_VALUE, lengths=(3, 3))),
                noise=_optional(channel, "noise", 1e6),
            )
            for channel in entry.children("channels", lengths=(channels, channels))
        ),
        spacing_mm=_triple(entry.numbers("spacing_mm", 1e-6, 1e7, lengths=(3, 3))),
        size=(size[0], size[1], size[2]),
        volumes_ml=entry.numbers("volumes_ml", 0.0, 1e12, lengths=(labels, labels)),
        foreground_share=_optional(entry, "foreground_share", 1.0),
    )


def _channel(image: NDArray[np.float32], foreground: NDArray[np.bool_], bins: ChannelBins) -> ChannelIntensities:
    values = image[image != 0]
    low, median, high = (0.0, 0.0, 0.0)
    if values.size:
        # Values that occur: nothing is interpolated, so nothing depends on how a machine rounds.
        low, median, high = (float(v) for v in np.percentile(values, PERCENTILES, method="lower"))
    offset, factor = (0.0, 1.0) if bins.scale == "image" else (low, (high - low) if high > low else 1.0)

    def histogram(edges: Sequence[float], voxels: NDArray[np.float32]) -> Counts:
        # The edges are even: a place among them is computed, not searched.
        width = factor * (edges[-1] - edges[0]) / (len(edges) - 1)
        places = (voxels - np.float32(offset + factor * edges[0])) * np.float32(1.0 / width)
        np.floor(places, out=places).clip(-1, BINS - 2, out=places)
        return _shares(np.bincount(places.astype(np.int16) + 1, minlength=BINS))

    return ChannelIntensities(
        foreground=histogram(bins.foreground_edges, image[foreground]) if foreground.any() else None,
        whole=histogram(bins.whole_edges, image.ravel()),
        percentiles=(low, median, high),
        noise=None,
    )


def _noise(image: NDArray[np.float32], grid: Triplet) -> float | None:
    """The standard deviation of the noise of a channel (superior, posterior, left), from its Laplacian at some of the
    grid's voxels that are not 0; None where there are none inside."""
    if min(image.shape) < 3:
        return None
    inner = tuple(size - 2 for size in image.shape)
    total = math.prod(-(-size // step) for size, step in zip(inner, grid, strict=True))
    thinned = grid[0] * max(1, -(-total // _NOISE_VOXELS))
    steps = (min(thinned, max(grid[0], inner[0] // 8)), grid[1], grid[2])
    places = [slice(1 + (size - 1) % step // 2, -1, step) for size, step in zip(inner, steps, strict=True)]
    middle = image[tuple(places)]
    laplacian = 6.0 * middle
    for axis in range(3):
        for move in (-1, 1):
            beside = [*places]
            stop = image.shape[axis] - 1 + move
            beside[axis] = slice(places[axis].start + move, stop, steps[axis])
            laplacian = laplacian - image[tuple(beside)]
    known = np.abs(laplacian[middle != 0])
    return None if known.size == 0 else float(np.median(known)) / (_DEVIATION * _LAPLACIAN)


def _towards(array: NDArray[Any], patient: Reorientation) -> NDArray[Any]:
    """A view of (..., Z, Y, X) along superior, posterior, left."""
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in patient.axes))
    return np.flip(moved, tuple(lead + axis for axis in patient.reversed_axes))


def _on_grid(array: NDArray[Any], patient: Reorientation, grid: Triplet) -> NDArray[Any]:
    """Every n-th voxel (..., Z, Y, X) along superior, posterior, left, the same on both ends."""
    view = _towards(array, patient)
    parts = tuple(slice((size - 1) % step // 2, None, step) for size, step in zip(view.shape[-3:], grid, strict=True))
    z, y, x = parts
    return np.ascontiguousarray(view[..., z, y, x])


def _box(array: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """Around what is not 0 in any channel, as the preprocessing crops; everything where all is 0."""
    nonzero = np.zeros(array.shape[1:], dtype=np.bool_)
    for channel in array:
        nonzero |= channel != 0
    parts = []
    for axis in range(3):
        found = np.flatnonzero(nonzero.any(axis=tuple(other for other in range(3) if other != axis)))
        parts.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, nonzero.shape[axis]))
    return parts[0], parts[1], parts[2]


def _shares(counts: NDArray[np.int64]) -> Counts:
    """Whole shares that add up to SHARES: rounded down, and what is left goes to the largest remainders (the lower bin
    first)."""
    total = int(counts.sum())
    scaled = [int(count) * SHARES for count in counts]
    shares = [value // total for value in scaled]
    by_remainder = sorted(range(len(shares)), key=lambda index: -(scaled[index] % total))
    for index in by_remainder[: SHARES - sum(shares)]:
        shares[index] += 1
    return tuple(shares)


def _pooled(histograms: Sequence[Counts | None]) -> tuple[float, ...] | None:
    present = [histogram for histogram in histograms if histogram is not None]
    return pool(present) if present else None


def _smoothed(shares: Sequence[float]) -> NDArray[np.float64]:
    counts = np.asarray(shares, dtype=np.float64) + ALPHA
    smoothed: NDArray[np.float64] = counts / counts.sum()
    return smoothed


def _even(low: float, high: float) -> tuple[float, ...]:
    """BINS - 1 edges from `low` to `high`, in nine digits."""
    return tuple(float(f"{low + (high - low) * index / (BINS - 2):.9g}") for index in range(BINS - 1))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _triple(values: Any) -> Triple:
    first, second, third = values
    return first, second, third


def _read_bins(entry: Reader) -> ChannelBins:
    scale = entry.text("scale")
    if scale not in get_args(Scale):
        raise entry.fail("scale", f"{scale[:40]!r} is not one of {', '.join(get_args(Scale))}")
    edges = {}
    for key in ("foreground_edges", "whole_edges"):
        edges[key] = entry.numbers(key, -_MAX_VALUE, _MAX_VALUE, lengths=(BINS - 1, BINS - 1))
        if any(low >= high for low, high in zip(edges[key], edges[key][1:], strict=False)):
            raise entry.fail(key, "must ascend")
    return ChannelBins(name=entry.text("name"), scale=scale, **edges)  # type: ignore[arg-type]


def _read_counts(entry: Reader, key: str) -> Counts:
    counts = entry.integers(key, 0, SHARES, lengths=(BINS, BINS))
    if sum(counts) != SHARES:
        raise entry.fail(key, f"adds up to {sum(counts)}, not {SHARES}")
    return counts


def _optional(entry: Reader, key: str, highest: float) -> float | None:
    return None if entry.raw(key, None) is None else entry.number(key, 0.0, highest)


def _read_pooled(entry: Reader, key: str) -> tuple[float, ...]:
    shares = entry.numbers(key, 0.0, SHARES, lengths=(BINS, BINS))
    if abs(sum(shares) - SHARES) > 1.0:
        raise entry.fail(key, f"adds up to {sum(shares):.2f}, not {SHARES}")
    return shares
