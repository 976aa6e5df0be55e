"""nnU-Net's experiment planner (nnU-Net v2): from a fingerprint and dataset.json to plans.json.

With the profile `nnunet` the plans are nnU-Net's, key by key. Sizes and spacings are (z, y, x); those of a
configuration are in network order, after `transpose_forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dataset import DatasetJson
from engine.errors import DatasetInvalid
from engine.fingerprint import Fingerprint
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.memory_fit import SizeChoice
from engine.planners import PLANNERS, PROFILES, PlannerName, ProfileName, plans_name
from engine.topology import Topology, feature_map_voxels, topology

FloatArray = NDArray[np.float64]

_ANISOTROPY = 3
_BASE_FEATURES = 32
_MAX_FEATURES = {2: 512, 3: 320}
REFERENCE_BATCH: Mapping[int, int] = MappingProxyType({2: 12, 3: 2})
"""By dimensions: the batch for which the planners' references hold."""
_MIN_BATCH = 2
# Edge of the square or cube in which the first patch has its volume, before it is cut to the median image.
_FIRST_EDGE = {2: 2048, 3: 256}
_MASK_BELOW = 0.75
_NORMALIZATIONS: Mapping[str, str] = MappingProxyType(
    {
        "ct": "CTNormalization",
        "nonorm": "NoNormalization",
        "zscore": "ZScoreNormalization",
        "rescale_to_0_1": "RescaleTo01Normalization",
        "rgb_to_0_1": "RGBTo01Normalization",
    }
)
_RESAMPLING = "resample_data_or_seg_to_shape"
_OWN_CONFIGURATIONS = frozenset({"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"})
_SHARED_DATA = frozenset({"2d", "3d_fullres"})
_SHARED_IDENTIFIER = "nnUNetPlans"

Content = Mapping[str, Any]
Fit = Callable[[SizeChoice, Callable[[Topology, int], Content]], tuple[Topology, int]]
"""Takes patch and batch of a configuration by another measure than nnU-Net's estimate (engine/memory_fit.py). The
second argument makes the configuration's content in plans.json for any of them."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is to be planned.

    `gpu_memory_gb` replaces the planner's own target; `overwrite_target_spacing` (z, y, x as stored, mm) the target
    spacing of the full resolution; `plans_name` the name that planner and profile give; `fit` nnU-Net's estimate of
    what fits into the memory.
    """

    dataset_name: str
    dataset_json: DatasetJson
    fingerprint: Fingerprint
    planner: PlannerName = "ExperimentPlanner"
    profile: ProfileName = "nnunet"
    gpu_memory_gb: float | None = None
    overwrite_target_spacing: tuple[float, float, float] | None = None
    plans_name: str | None = None
    fit: Fit | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """`plans` is the content of plans.json; `notes` say in words what was left out, and why."""

    plans: dict[str, Any]
    notes: tuple[str, ...]


def plan_experiment(request: PlanRequest) -> Planned:
    """Raises DatasetInvalid when fingerprint and dataset.json do not belong together, when the images are too small
    for any U-Net, or when the smallest patch does not fit into the memory."""
    return _Planning(request).run()


def write_plans(plans: Mapping[str, Any], path: Path) -> None:
    """The plans as a file. Configurations that a user added to an older file of that name are kept, as in nnU-Net.

    Raises DatasetInvalid when the older file is not readable as plans.
    """
    configurations = dict(plans["configurations"])
    if path.exists():
        older = read_json(path, error=DatasetInvalid).get("configurations")
        if not isinstance(older, Mapping):
            raise DatasetInvalid(f"{path.name}: exists and is no plans file; move it away")
        configurations |= {
            name: content
            for name, content in older.items()
            if name not in _OWN_CONFIGURATIONS and name not in configurations
        }
    write_json({**plans, "configurations": configurations}, path)


@dataclass
class _Planning:
    """One run of the planner; its parts share the request."""

    request: PlanRequest
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.planner = PLANNERS[self.request.planner]
        self.profile = PROFILES[self.request.profile]
        self.plans_name = self.request.plans_name or plans_name(self.request.planner, self.request.profile)

    def run(self) -> Planned:
        request, fingerprint = self.request, self.request.fingerprint
        channels = len(request.dataset_json.channel_names)
        if channels != len(fingerprint.intensities):
            raise DatasetInvalid(
                f"the fingerprint has {len(fingerprint.intensities)} channel(s), dataset.json {channels}; "
                "they belong to different datasets"
            )
        spacings = np.array(fingerprint.spacings)
        shapes = np.array(fingerprint.shapes_after_crop)
        target = self._target_spacing(spacings, shapes)
        coarsest = int(np.argmax(target))
        forward = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
        new_shapes = [
            _new_shape(shape, spacing, target.tolist())
            for shape, spacing in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
        ]
        median_shape = np.median(new_shapes, 0)
        if median_shape.min() < 1:
            self.notes.append(
                "the median image has less than one voxel along an axis at the target spacing: taken as 1"
            )
            median_shape = np.maximum(median_shape, 1.0)
        spacing, shape = target[forward], median_shape[forward]
        return Planned(
            plans={
                "dataset_name": request.dataset_name,
                "plans_name": self.plans_name,
                "original_median_spacing_after_transp": [float(v) for v in np.median(spacings, 0)[forward]],
                "original_median_shape_after_transp": [round(v) for v in np.median(shapes, 0)[forward]],
                "image_reader_writer": request.dataset_json.image_reader_writer,
                "transpose_forward": forward,
                "transpose_backward": [forward.index(axis) for axis in range(3)],
                "configurations": self._configurations(spacing, shape),
                "experiment_planner_used": self.planner.name,
                "label_manager": "LabelManager",
                "foreground_intensity_properties_per_channel": fingerprint.document()[
                    "foreground_intensity_properties_per_channel"
                ],
                **({"profile": request.profile} if self.profile.plans_name_part else {}),
            },
            notes=tuple(self.notes),
        )

    def _target_spacing(self, spacings: FloatArray, shapes: NDArray[Any]) -> FloatArray:
        """The median; along a coarse axis with few slices the 10th percentile, but not below the other axes."""
        if self.request.overwrite_target_spacing is not None:
            return np.array(self.request.overwrite_target_spacing)
        target: FloatArray = np.percentile(spacings, 50, 0)
        size = np.percentile(shapes, 50, 0)
        coarsest = int(np.argmax(target))
        others = [axis for axis in range(3) if axis != coarsest]
        coarsest_other = max(target[others])
        if target[coarsest] > _ANISOTROPY * coarsest_other and size[coarsest] * _ANISOTROPY < min(size[others]):
            finer = np.percentile(spacings[:, coarsest], 10)
            target[coarsest] = finer if finer >= coarsest_other else coarsest_other + 1e-5
        return target

    def _configurations(self, spacing: FloatArray, shape: FloatArray) -> dict[str, Any]:
        num_training = self.request.dataset_json.num_training
        dataset_voxels = float(np.prod(shape) * num_training)
        full = lowres = None
        if shape[0] != 1:
            full = self._configuration("3d_fullres", spacing, shape, dataset_voxels)
        if full is not None and math.prod(full["patch_size"]) <= self.profile.fullres_above_voxels:
            self.notes.append(
                f"3d_fullres is left out: its patch {full['patch_size']} has not more than "
                f"{self.profile.fullres_above_voxels} voxels"
            )
            full = None
        if full is not None:
            lowres = self._lowres(full, spacing, shape)
            full["batch_dice"] = lowres is not None
        flat = self._configuration("2d", spacing[1:], shape[1:], dataset_voxels)
        if flat is not None:
            flat["batch_dice"] = True
        made = {"2d": flat, "3d_lowres": lowres, "3d_fullres": full}
        configurations = {name: content for name, content in made.items() if content is not None}
        if not configurations:
            raise DatasetInvalid(
                f"the median image has {[float(edge) for edge in shape]} voxels at the target spacing (coarsest axis "
                "first): too small for any U-Net, two edges of 8 are the least"
            )
        if lowres is not None:
            configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        return configurations

    def _lowres(self, full: dict[str, Any], spacing: FloatArray, shape: FloatArray) -> dict[str, Any] | None:
        covered = math.prod(full["patch_size"]) / np.prod(shape)
        lowres, coarse, coarse_shape = None, spacing.copy(), shape
        while covered < self.profile.lowres_below:
            # Axes that are much finer than the coarsest lose resolution first.
            finer = max(coarse) / coarse > 2
            stretched = finer if self.profile.lowres_until_covered and finer.any() else np.ones(3, dtype=np.bool_)
            coarse[stretched] *= self.profile.lowres_step
            coarse_shape = spacing / coarse * shape
            voxels = np.prod(coarse_shape)
            lowres = self._configuration(
                "3d_lowres",
                coarse,
                [max(1, round(edge)) for edge in coarse_shape],
                float(voxels * self.request.dataset_json.num_training),
            )
            if lowres is None or not self.profile.lowres_until_covered:
                break
            covered = math.prod(lowres["patch_size"]) / voxels
        if lowres is not None and self.profile.lowres_until_covered and np.prod(shape) / np.prod(coarse_shape) < 2:
            self.notes.append("3d_lowres is left out: it would have more than half the voxels of 3d_fullres")
            lowres = None
        if lowres is not None:
            lowres["batch_dice"] = False
            lowres["next_stage"] = "3d_cascade_fullres"
        return lowres

    def _configuration(
        self, name: str, spacing: FloatArray, median_shape: Sequence[float] | FloatArray, dataset_voxels: float
    ) -> dict[str, Any] | None:
        """One configuration without `batch_dice`; None, with a note, when the image is too small to be pooled once."""
        dimensions = len(spacing)
        found = self._fit_patch(spacing, median_shape)
        if found is None:
            self.notes.append(f"{name} is left out: {[float(e) for e in median_shape]} voxels are too few to pool once")
            return None
        shape, estimate = found

        def most(patch: Topology) -> int:
            share = dataset_voxels * self.planner.max_dataset_covered
            return max(round(share / math.prod(patch.patch_size)), _MIN_BATCH)

        def content(patch: Topology, batch: int) -> dict[str, Any]:
            return self._content(name, spacing, median_shape, patch, batch)

        batch = max(
            _MIN_BATCH, min(round(self._reference(dimensions) / estimate * REFERENCE_BATCH[dimensions]), most(shape))
        )
        if self.request.fit is not None:
            patches = tuple(self._patches(spacing, median_shape))
            choice = SizeChoice(
                configuration=name,
                patches=patches,
                planned=patches.index(shape),
                batch_size=batch,
                smallest_batch=_MIN_BATCH,
                largest_batch=most,
            )
            shape, batch = self.request.fit(choice, content)
        if shape.n_stages == 2:
            self.notes.append(
                f"{name} has two stages only: its one deep-supervision output must keep its weight (nnU-Net sets it "
                "to 0 and learns nothing)"
            )
        return content(shape, batch)

    def _content(
        self,
        name: str,
        spacing: FloatArray,
        median_shape: Sequence[float] | FloatArray,
        shape: Topology,
        batch: int,
    ) -> dict[str, Any]:
        """A configuration as plans.json has it, without `batch_dice`."""
        schemes = [
            _NORMALIZATIONS.get(channel.casefold(), "ZScoreNormalization")
            for channel in self.request.dataset_json.channel_names
        ]
        cropped = self.request.fingerprint.median_relative_size_after_cropping < _MASK_BELOW
        return {
            "data_identifier": self._data_identifier(name),
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": batch,
            "patch_size": list(shape.patch_size),
            "median_image_size_in_voxels": [v if isinstance(v, int) else float(v) for v in median_shape],
            "spacing": [float(v) for v in spacing],
            "normalization_schemes": schemes,
            "use_mask_for_norm": [cropped and scheme == "ZScoreNormalization" for scheme in schemes],
            "resampling_fn_data": _RESAMPLING,
            "resampling_fn_seg": _RESAMPLING,
            "resampling_fn_data_kwargs": _resampling(order=3, is_seg=False),
            "resampling_fn_seg_kwargs": _resampling(order=1, is_seg=True),
            "resampling_fn_probabilities": _RESAMPLING,
            "resampling_fn_probabilities_kwargs": _resampling(order=1, is_seg=False),
            "architecture": self._architecture(shape),
        }

    def _fit_patch(
        self, spacing: FloatArray, median_shape: Sequence[float] | FloatArray
    ) -> tuple[Topology, int] | None:
        """The largest patch whose network fits into the memory, and its estimate; None where nothing can be pooled."""
        dimensions = len(spacing)
        batches = REFERENCE_BATCH[dimensions] / _MIN_BATCH if self.planner.patch_for_smallest_batch else 1
        shape = None
        for shape in self._patches(spacing, median_shape):
            estimate = self._estimate(shape)
            if estimate / batches <= self._reference(dimensions):
                return shape, estimate
        if shape is None:
            return None
        memory_gb = self.request.gpu_memory_gb or self.planner.reference_gb
        raise DatasetInvalid(f"no patch fits into {memory_gb:g} GB of GPU memory; give more")

    def _patches(self, spacing: FloatArray, median_shape: Sequence[float] | FloatArray) -> Iterator[Topology]:
        """From the largest on, each shorter than the one before along its longest axis, as long as they can be
        pooled."""
        dimensions = len(spacing)
        spacing_mm, median = [float(v) for v in spacing], [float(v) for v in median_shape]
        aspect = 1 / np.array(spacing_mm)
        aspect = aspect * (_FIRST_EDGE[dimensions] ** dimensions / np.prod(aspect)) ** (1 / dimensions)
        shape = topology(spacing_mm, [min(max(1, round(a)), m) for a, m in zip(aspect, median, strict=True)])
        while shape.n_stages > 1:
            yield shape
            ratios = [edge / m for edge, m in zip(shape.patch_size, median, strict=True)]
            longest = int(np.argsort(ratios)[-1])
            smaller, edges = list(shape.patch_size), list(shape.patch_size)
            smaller[longest] -= shape.divisors[longest]
            if smaller[longest] < 1:
                return
            # The smaller patch's divisor, so that no possible size is skipped (256 with 64: 224 comes next).
            edges[longest] -= topology(spacing_mm, smaller).divisors[longest]
            shape = topology(spacing_mm, edges)

    def _reference(self, dimensions: int) -> float:
        value = self.planner.reference_2d if dimensions == 2 else self.planner.reference_3d
        return value * ((self.request.gpu_memory_gb or self.planner.reference_gb) / self.planner.reference_gb)

    def _estimate(self, shape: Topology) -> int:
        return feature_map_voxels(
            self.planner.network,
            shape,
            features_per_stage=_features(shape),
            blocks_per_stage=self._blocks(shape),
            convs_per_decoder_stage=[self.planner.decoder_convs] * (shape.n_stages - 1),
            num_outputs=self.request.dataset_json.num_label_entries,
        )

    def _blocks(self, shape: Topology) -> list[int]:
        first = self.planner.first_blocks
        return [first[s] if s < len(first) else self.planner.further_blocks for s in range(shape.n_stages)]

    def _architecture(self, shape: Topology) -> dict[str, Any]:
        dimensions = len(shape.patch_size)
        blocks = "n_conv_per_stage" if self.planner.network == "plain" else "n_blocks_per_stage"
        return {
            "network_class_name": self.planner.network_class_name,
            "arch_kwargs": {
                "n_stages": shape.n_stages,
                "features_per_stage": _features(shape),
                "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                "kernel_sizes": [list(kernel) for kernel in shape.kernel_sizes],
                "strides": [list(stride) for stride in shape.strides],
                blocks: self._blocks(shape),
                "n_conv_per_stage_decoder": [self.planner.decoder_convs] * (shape.n_stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }

    def _data_identifier(self, configuration: str) -> str:
        """The folder of the preprocessed cases. The residual planners and the profiles share nnU-Net's default data,
        unless the target spacing was replaced: then the cases differ (nnU-Net would mix them up)."""
        shares = configuration in _SHARED_DATA and self.request.overwrite_target_spacing is None
        default = self.request.plans_name is None or self.planner.network == "residual"
        return f"{_SHARED_IDENTIFIER if shares and default else self.plans_name}_{configuration}"


def _new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> list[int]:
    """nnU-Net's own rounding, without the tolerance that `engine.resampling` has for the noise of an affine."""
    return [round(old / new * size) for old, new, size in zip(spacing, target, shape, strict=True)]


def _features(shape: Topology) -> list[int]:
    most = _MAX_FEATURES[len(shape.patch_size)]
    return [min(most, _BASE_FEATURES * 2**stage) for stage in range(shape.n_stages)]


def _resampling(*, order: int, is_seg: bool) -> dict[str, Any]:
    return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
