"""A model bundle whose network segments by intensity alone, so that the right answer is known voxel by voxel.

The network is two convolutions with kernels of one voxel and a rectifier between them: for each label a plateau over
the label's band of intensities, falling to nothing at its edges. It needs neither training nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engine.bundle import Bundle, write_bundle
from engine.manifest import BundleConfiguration, Channel, Code, Contract, Fold, LabelSpec, Manifest, QualityThresholds
from tests.support.tiny_models import configuration_json, plans_json

_CONFIGURATION = "3d_fullres"
_PATCH = (16, 16, 16)
_STRUCTURE = Code(scheme="SCT", value="123037004", meaning="Anatomical Structure")
_LUNG = Code(scheme="SCT", value="39607008", meaning="Lung")
_RISE = 40.0  # intensities over which a plateau begins and ends
_HEIGHT = 20.0  # of a plateau, in logits; the background has half of it everywhere
_COLOURS = ((230, 60, 60), (60, 120, 230), (70, 190, 90))


@dataclass(frozen=True, kw_only=True)
class Band:
    """One label: voxels whose value is between `low` and `high` (exclusive) belong to it."""

    low: float
    high: float
    laterality: Literal["left", "right"] | None = None
    pair: str | None = None
    volume_range_ml: tuple[float, float] | None = None


PHANTOM_BANDS: Mapping[str, Band] = {
    "left structure": Band(low=200, high=500, laterality="left", pair="right structure"),
    "right structure": Band(low=500, high=800, laterality="right", pair="left structure"),
}
"""The paired structures of tests.support.phantoms, by their brightness."""

SWAPPED_BANDS: Mapping[str, Band] = {
    "left structure": Band(low=500, high=800, laterality="left", pair="right structure"),
    "right structure": Band(low=200, high=500, laterality="right", pair="left structure"),
}
"""The same with the sides exchanged, as a model that mirrors its input would have them."""


_WRONG_PLACE = (
    helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0),
    helper.make_node("Abs", ["brightest"], ["bright"]),
    helper.make_node("Add", ["bright", "thousand"], ["far"]),
    helper.make_node("Cast", ["far"], ["place"], to=TensorProto.INT64),
    helper.make_node("Gather", ["sums", "place"], ["logits"], axis=0),
)


def write_intensity_bundle(
    root: Path,
    *,
    name: str,
    bands: Mapping[str, Band] = PHANTOM_BANDS,
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0),
    orientation: str = "RAS",
    modalities: Sequence[str] = ("CT", "MR"),
    semver: str = "1.0.0",
    min_confidence: float = 0.5,
    raises: bool = False,
) -> Bundle:
    """Write the bundle into `root`; label values are 1, 2, … in the order of `bands`. `raises`: it loads and no image
    gets through it.

    A series with spacing `spacing_mm` (z, y, x in `orientation`) is not resampled, so that the answer is exact.
    """
    file = root / _CONFIGURATION / "fold_0.onnx"
    _write_network(file, tuple(bands.values()), raises=raises)
    labels = tuple(
        LabelSpec(
            value=value,
            name=label,
            region=(value,),
            category=_STRUCTURE,
            type=_LUNG,
            laterality=band.laterality,
            pair=band.pair,
            colour=_COLOURS[(value - 1) % len(_COLOURS)],
            volume_range_ml=band.volume_range_ml,
        )
        for value, (label, band) in enumerate(bands.items(), start=1)
    )
    manifest = Manifest(
        name=name,
        semver=semver,
        description="segments by intensity; for tests",
        licence="Apache-2.0",
        origin="made by a test",
        channels=(Channel(index=0, name="image"),),
        labels=labels,
        contract=Contract(
            modalities=tuple(modalities),
            anatomy=None,
            orientation=orientation,
            slice_axis=None,
            spacing_min_mm=(0.5, 0.5, 0.5),
            spacing_max_mm=(5.0, 5.0, 5.0),
            min_slices=4,
            max_slices=256,
            max_slice_gap_ratio=1.05,
            max_gantry_tilt_deg=30.0,
            allow_duplicates=False,
        ),
        configurations=(
            BundleConfiguration(
                name=_CONFIGURATION, folds=(Fold(fold="0", file=file.resolve()),), mirror_axes=(), previous_stage=None
            ),
        ),
        ensemble="probabilities",
        step_size=0.5,
        parity=(),
        quality=QualityThresholds(
            min_confidence=min_confidence, min_fold_dice=0.7, min_mirror_dice=0.7, max_components={}
        ),
    )
    dataset = {
        "channel_names": {"0": "image"},
        "labels": {"background": 0, **{label: value for value, label in enumerate(bands, start=1)}},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    plans = plans_json({_CONFIGURATION: configuration_json(_PATCH, spacing_mm)})
    return write_bundle(root, manifest, plans_json=plans, dataset_json=dataset)


def _write_network(path: Path, bands: Sequence[Band], *, raises: bool) -> None:
    """logits[0] = half a plateau; logits[k] = plateau(image), a sum of four rectified lines.

    `raises`: the only image of the batch is then looked for where none is, at a place that the image itself says.
    """
    knots: list[float] = []
    joins = np.zeros((len(bands) + 1, 4 * len(bands)), dtype=np.float32)
    for index, band in enumerate(bands):
        half = _RISE / 2
        knots += [band.low - half, band.low + half, band.high - half, band.high + half]
        joins[index + 1, 4 * index : 4 * index + 4] = np.array([1, -1, -1, 1], dtype=np.float32) * _HEIGHT / _RISE
    offsets = np.zeros(len(bands) + 1, dtype=np.float32)
    offsets[0] = _HEIGHT / 2
    hidden = len(knots)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "ones", "knots"], ["lines"]),
            helper.make_node("Relu", ["lines"], ["rectified"]),
            helper.make_node("Conv", ["rectified", "joins", "offsets"], ["sums" if raises else "logits"]),
            *(_WRONG_PLACE if raises else ()),
        ],
        "bands",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *_PATCH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, len(bands) + 1, *_PATCH])],
        [
            numpy_helper.from_array(np.ones((hidden, 1, 1, 1, 1), dtype=np.float32), "ones"),
            numpy_helper.from_array(-np.array(knots, dtype=np.float32), "knots"),
            numpy_helper.from_array(joins.reshape(len(bands) + 1, hidden, 1, 1, 1), "joins"),
            numpy_helper.from_array(offsets, "offsets"),
            numpy_helper.from_array(np.array([1000.0], dtype=np.float32), "thousand"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
