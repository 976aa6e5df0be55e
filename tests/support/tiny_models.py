"""Bundles with one-layer networks whose answers a test can work out by hand; no torch needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engine.bundle import Bundle, write_bundle
from engine.labels import LabelManager
from engine.manifest import (
    BundleConfiguration,
    Channel,
    Code,
    Contract,
    Ensemble,
    Fold,
    LabelSpec,
    Manifest,
    QualityThresholds,
)


def write_pointwise_network(
    path: Path,
    weights: NDArray[np.float32],
    bias: NDArray[np.float32],
    patch_size: Sequence[int],
    *,
    ramp_axis: int | None = None,
    batch: int | str = 1,
) -> None:
    """logits[k] = sum over c of weights[k, c] * image[c] + bias[k], a convolution with a kernel of one voxel.

    `ramp_axis` adds the position along that axis of the patch to the logits of the last head, so that the answer
    depends on the direction in which the network sees the patch. `batch`: windows at a time, or a name for any number.
    """
    heads, channels = weights.shape
    ones = [1] * len(patch_size)
    nodes = [
        helper.make_node("Conv", ["image", "weights", "bias"], ["convolved" if ramp_axis is not None else "logits"])
    ]
    constants = [
        numpy_helper.from_array(weights.reshape(heads, channels, *ones).astype(np.float32), "weights"),
        numpy_helper.from_array(bias.astype(np.float32), "bias"),
    ]
    if ramp_axis is not None:
        ramp = np.zeros((1, heads, *patch_size), dtype=np.float32)
        shape = [-1 if axis == ramp_axis else 1 for axis in range(len(patch_size))]
        ramp[:, -1] = np.arange(patch_size[ramp_axis], dtype=np.float32).reshape(shape)
        constants.append(numpy_helper.from_array(ramp, "ramp"))
        nodes.append(helper.make_node("Add", ["convolved", "ramp"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "pointwise",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, channels, *patch_size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, heads, *patch_size])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


def configuration_json(
    patch_size: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    schemes: Sequence[str] = ("NoNormalization",),
    previous_stage: str | None = None,
) -> dict[str, Any]:
    """One configuration of plans.json; the architecture only has to be a valid one of the right dimensions."""
    axes = len(patch_size)
    kwargs = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": list(patch_size),
        "spacing": list(spacing_mm),
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": [False] * len(schemes),
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**kwargs, "order": 3},
        "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True},
        "resampling_fn_probabilities_kwargs": kwargs,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
                "kernel_sizes": [[3] * axes] * 2,
                "strides": [[1] * axes, [2] * axes],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
        **({} if previous_stage is None else {"previous_stage": previous_stage}),
    }


def plans_json(
    configurations: Mapping[str, Mapping[str, Any]], *, transpose_forward: Sequence[int] = (0, 1, 2)
) -> dict[str, Any]:
    """A plans.json with these configurations."""
    return {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [8, 8, 8],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose_forward),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose_forward)],
        "configurations": dict(configurations),
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def write_tiny_bundle(
    root: Path,
    *,
    labels: Mapping[str, int | list[int]],
    configurations: Mapping[str, Mapping[str, Any]],
    mirror_axes: Sequence[int] = (),
    channels: int = 1,
    orientation: str = "as-stored",
    transpose_forward: Sequence[int] = (0, 1, 2),
    regions_class_order: Sequence[int] | None = None,
    postprocessing: Mapping[str, Any] | None = None,
    ensemble: Ensemble = "probabilities",
) -> Bundle:
    """Completes a bundle around networks that lie at <configuration>/fold_<n>.onnx below `root`."""
    dataset: dict[str, Any] = {
        "channel_names": {str(index): f"channel {index}" for index in range(channels)},
        "labels": dict(labels),
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    if regions_class_order is not None:
        dataset["regions_class_order"] = list(regions_class_order)
    manager = LabelManager.from_dataset_json(dataset)
    code = Code(scheme="SCT", value="123037004", meaning="Anatomical Structure")
    manifest = Manifest(
        name="tiny",
        semver="1.0.0",
        description="",
        licence="Apache-2.0",
        origin="made by a test",
        channels=tuple(Channel(index=index, name=f"channel {index}") for index in range(channels)),
        labels=tuple(
            LabelSpec(
                value=label.value,
                name=label.name,
                region=label.region,
                category=code,
                type=code,
                laterality=None,
                pair=None,
                colour=(128, 174, 128),
                volume_range_ml=None,
            )
            for label in manager.foreground
        ),
        contract=Contract(
            modalities=("MR",),
            anatomy=None,
            orientation=orientation,
            slice_axis=None,
            spacing_min_mm=(0.1, 0.1, 0.1),
            spacing_max_mm=(10.0, 10.0, 10.0),
            min_slices=1,
            max_slices=1000,
            max_slice_gap_ratio=1.05,
            max_gantry_tilt_deg=30.0,
            allow_duplicates=False,
        ),
        configurations=tuple(
            BundleConfiguration(
                name=name,
                folds=tuple(
                    Fold(fold=file.stem.removeprefix("fold_"), file=file)
                    for file in sorted((root.resolve() / name).glob("fold_*.onnx"))
                ),
                mirror_axes=tuple(mirror_axes),
                previous_stage=planned.get("previous_stage"),
            )
            for name, planned in configurations.items()
        ),
        ensemble=ensemble,
        step_size=0.5,
        parity=(),
        quality=QualityThresholds(min_confidence=0.5, min_fold_dice=0.7, min_mirror_dice=0.7, max_components={}),
    )
    plans = plans_json(configurations, transpose_forward=transpose_forward)
    return write_bundle(root, manifest, plans_json=plans, dataset_json=dataset, postprocessing=postprocessing)
