"""nnU-Net's plans: how the input of each network is made (`engine.architecture` reads what the network looks like).

Names of Python classes and functions in the file are looked up in the tables below, never imported; what is not in a
table is refused. All tuples over axes are in network order, that is after `transpose_forward`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from engine.architecture import Architecture, read_architecture
from engine.errors import ImportRefused
from engine.json_reader import Reader, read_json

NormalizationScheme = Literal["ct", "zscore", "nonorm", "rescale_to_0_1", "rgb_to_0_1"]
ResamplingFunction = Literal["default", "torch", "none"]


_NORMALIZATIONS: Mapping[str, NormalizationScheme] = MappingProxyType(
    {
        "CTNormalization": "ct",
        "ZScoreNormalization": "zscore",
        "NoNormalization": "nonorm",
        "RescaleTo01Normalization": "rescale_to_0_1",
        "RGBTo01Normalization": "rgb_to_0_1",
    }
)
_RESAMPLINGS: Mapping[str, ResamplingFunction] = MappingProxyType(
    {
        "resample_data_or_seg_to_shape": "default",
        "resample_torch_fornnunet": "torch",
        "no_resampling_hack": "none",
    }
)
_READERS = frozenset(
    {
        "SimpleITKIO",
        "SimpleITKIOWithReorient",
        "NibabelIO",
        "NibabelIOWithReorient",
        "NaturalImage2DIO",
        "Tiff3DIO",
    }
)
_FOLDER = re.compile(r"[^/\\\0.][^/\\\0]{0,199}")
_MAX_EDGE = 4096
_MAX_PATCH_VOXELS = 2**28
_MAX_CHANNELS = 256
_MAX_SPACING_MM = 10_000.0


@dataclass(frozen=True, kw_only=True)
class IntensityProperties:
    """Foreground intensities of one channel over the training set, in the image's own units."""

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True, kw_only=True)
class ResamplingKwargs:
    """How one kind of array is resampled.

    `default`: spline of `order` in the plane (or the volume); along a coarse axis, `order_z`, when separated.
    `torch`: linear; along a coarse axis nearest, when separated. `none`: the array is returned as it is.
    `force_separate_z`: None lets the spacing decide (coarsest over finest > 3).
    """

    function: ResamplingFunction
    order: int
    order_z: int
    force_separate_z: bool | None
    is_seg: bool


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One of 2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres or a user's own, with inheritance resolved.

    `patch_size` and `spacing_mm` have 2 entries for a 2D network and 3 otherwise. `previous_stage` names the
    configuration whose label map is an additional input (cascade). `data_identifier` is the folder of the preprocessed
    cases, `batch_dice` whether the loss sums a batch before it takes the Dice.
    """

    name: str
    data_identifier: str
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    normalization_schemes: tuple[NormalizationScheme, ...]
    use_mask_for_norm: tuple[bool, ...]
    resampling_data: ResamplingKwargs
    resampling_seg: ResamplingKwargs
    resampling_probabilities: ResamplingKwargs
    architecture: Architecture
    batch_size: int
    batch_dice: bool
    previous_stage: str | None
    next_stage: tuple[str, ...]

    @property
    def is_2d(self) -> bool:
        return len(self.patch_size) == 2


@dataclass(frozen=True, kw_only=True)
class Plans:
    """`transpose_forward[i]` is the axis of the (Z, Y, X) array that becomes network axis i;
    `transpose_backward` undoes it. `foreground_intensity_properties` is by channel index."""

    dataset_name: str
    plans_name: str
    transpose_forward: tuple[int, int, int]
    transpose_backward: tuple[int, int, int]
    configurations: Mapping[str, Configuration]
    foreground_intensity_properties: Mapping[int, IntensityProperties]
    image_reader_writer: str


def read_plans(source: Path | Mapping[str, Any], *, configurations: Collection[str] | None = None) -> Plans:
    """Plans from a plans.json or from its content.

    Only the named configurations are read (all without `configurations`), so that one that is not used and not
    supported stands in nobody's way. Raises ImportRefused with the key for whatever is missing, out of range,
    contradictory or not on the lists of this module.
    """
    document: Mapping[str, Any]
    if isinstance(source, Path):
        document, where = read_json(source, error=ImportRefused), source.name
    else:
        document, where = source, "plans"
    plans = Reader(document, where=where, error=ImportRefused)

    label_manager = plans.text("label_manager", "LabelManager")
    if label_manager != "LabelManager":
        raise plans.fail("label_manager", f"{label_manager[:80]!r} is not supported, only 'LabelManager'")
    reader_name = plans.text("image_reader_writer")
    if reader_name not in _READERS:
        raise plans.fail(
            "image_reader_writer",
            f"{reader_name[:80]!r} is not one of {', '.join(sorted(_READERS))}: the voxel order cannot be known",
        )
    forward = _permutation(plans, "transpose_forward")
    backward = _permutation(plans, "transpose_backward")
    if tuple(forward[i] for i in backward) != (0, 1, 2):
        raise plans.fail("transpose_backward", f"{backward} does not undo transpose_forward {forward}")

    listed = plans.child("configurations")
    wanted = list(listed.keys()) if configurations is None else list(configurations)
    if not wanted:
        raise plans.fail("configurations", "none is given")
    return Plans(
        dataset_name=plans.text("dataset_name"),
        plans_name=plans.text("plans_name"),
        transpose_forward=forward,
        transpose_backward=backward,
        configurations=MappingProxyType({name: _configuration(name, listed) for name in wanted}),
        foreground_intensity_properties=MappingProxyType(_intensities(plans)),
        image_reader_writer=reader_name,
    )


def _permutation(plans: Reader, key: str) -> tuple[int, int, int]:
    first, second, third = plans.integers(key, 0, 2, lengths=(3, 3))
    if {first, second, third} != {0, 1, 2}:
        raise plans.fail(key, "each of 0, 1 and 2 is needed once")
    return first, second, third


def _intensities(plans: Reader) -> dict[int, IntensityProperties]:
    key = "foreground_intensity_properties_per_channel"
    if key not in plans:
        key = "foreground_intensity_properties_by_modality"
    channels = plans.child(key)
    found: dict[int, IntensityProperties] = {}
    for name in channels.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        if not name.isascii() or not name.isdecimal() or len(name) > 4:
            raise channels.fail(name[:80], "a channel index is needed")
        entry = channels.child(name)
        found[int(name)] = IntensityProperties(
            mean=entry.number("mean", -1e30, 1e30),
            std=entry.number("std", 0.0, 1e30),
            percentile_00_5=entry.number("percentile_00_5", -1e30, 1e30),
            percentile_99_5=entry.number("percentile_99_5", -1e30, 1e30),
        )
    return found


def _resolve(name: str, listed: Reader) -> Reader:
    """The configuration with what it inherits; a child overrides its parent. A circle is an error."""
    chain: list[str] = []
    merged: dict[str, Any] = {}
    current: str | None = name
    while current is not None:
        if current in chain:
            raise listed.fail(name[:80], f"inherits in a circle: {' -> '.join([*chain, current])[:300]}")
        if current not in listed:
            raise listed.fail(current[:80], "is not in the plans")
        chain.append(current)
        entry = listed.child(current)
        merged = {**{key: entry.raw(key) for key in entry.keys()}, **merged}  # noqa: SIM118
        # The parent's own `inherits_from` decides the next step, not the child's that is already merged.
        current = entry.text_or_none("inherits_from")
    return Reader(merged, where=f"{listed.where}: {name}", error=listed.error)


def _configuration(name: str, listed: Reader) -> Configuration:
    entry = _resolve(name, listed)
    patch_size = entry.integers("patch_size", 1, _MAX_EDGE, lengths=(2, 3))
    voxels = 1
    for edge in patch_size:
        voxels *= edge
    if voxels > _MAX_PATCH_VOXELS:
        raise entry.fail("patch_size", f"{voxels} voxels; at most {_MAX_PATCH_VOXELS}")
    dimensions = len(patch_size)
    preprocessor = entry.text("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise entry.fail("preprocessor_name", f"{preprocessor[:80]!r} is not supported, only 'DefaultPreprocessor'")
    schemes = tuple(
        entry.look_up("normalization_schemes", scheme, _NORMALIZATIONS)
        for scheme in entry.texts("normalization_schemes", lengths=(1, _MAX_CHANNELS))
    )
    masks = entry.array("use_mask_for_norm", lengths=(len(schemes), len(schemes)))
    if not all(isinstance(mask, bool) for mask in masks):
        raise entry.fail("use_mask_for_norm", "true or false is needed for each channel")
    architecture = read_architecture(entry, dimensions)
    if any(edge % stride for edge, stride in zip(patch_size, architecture.total_stride, strict=True)):
        raise entry.fail(
            "patch_size", f"{patch_size} is no multiple of the strides' product {architecture.total_stride}"
        )
    following = entry.raw("next_stage", None)
    if following is None:
        following = []
    elif isinstance(following, str):
        following = [following]
    next_stage = Reader({"next_stage": following}, where=entry.where, error=entry.error).texts(
        "next_stage", lengths=(0, 16)
    )
    identifier = entry.text("data_identifier", f"nnUNetPlans_{name}")
    if not _FOLDER.fullmatch(identifier):
        raise entry.fail("data_identifier", f"{identifier[:80]!r} is no name for a folder")
    return Configuration(
        name=name,
        data_identifier=identifier,
        patch_size=patch_size,
        spacing_mm=entry.numbers("spacing", 1e-6, _MAX_SPACING_MM, lengths=(dimensions, dimensions)),
        normalization_schemes=schemes,
        use_mask_for_norm=tuple(masks),
        resampling_data=_resampling(entry, "data", order=3, is_seg=False),
        resampling_seg=_resampling(entry, "seg", order=1, is_seg=True),
        resampling_probabilities=_resampling(entry, "probabilities", order=1, is_seg=False),
        architecture=architecture,
        batch_size=entry.integer("batch_size", 1, 2**20),
        batch_dice=entry.boolean("batch_dice", False),
        previous_stage=entry.text_or_none("previous_stage"),
        next_stage=next_stage,
    )


def _resampling(entry: Reader, kind: str, *, order: int, is_seg: bool) -> ResamplingKwargs:
    key = f"resampling_fn_{kind}"
    function = entry.look_up(key, entry.text(key), _RESAMPLINGS)
    kwargs = entry.child(f"{key}_kwargs", {})
    separate = kwargs.raw("force_separate_z", None)
    if separate is not None and not isinstance(separate, bool):
        raise kwargs.fail("force_separate_z", "true, false or null is needed")
    if kwargs.boolean("is_seg", is_seg) != is_seg:
        raise kwargs.fail("is_seg", f"must be {str(is_seg).lower()} for {key}")
    if function == "torch":
        mode = kwargs.text("mode", "linear")
        if mode != "linear":
            raise kwargs.fail("mode", f"{mode[:40]!r} is not supported, only 'linear'")
        order = 1
    return ResamplingKwargs(
        function=function,
        order=kwargs.integer("order", 0, 5, order),
        order_z=kwargs.integer("order_z", 0, 5, 0),
        force_separate_z=separate,
        is_seg=is_seg,
    )
