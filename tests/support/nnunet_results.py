"""Result folders in the layout of nnU-Net v2, with small random networks; needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.network import build_network
from engine.plans import read_plans


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a folder is to hold. `strides` without the first stage's ones; kernels are 3, or 1 along an axis that a
    stage's stride leaves alone in the first two stages (anisotropic)."""

    name: str = "3d_fullres"
    dimensions: int = 3
    network: str = "PlainConvUNet"
    features: tuple[int, ...] = (4, 6, 6)
    strides: tuple[tuple[int, ...], ...] = ((1, 2, 2), (2, 2, 2))
    kernels: tuple[tuple[int, ...], ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    patch_size: tuple[int, ...] = (8, 16, 16)
    spacing: tuple[float, ...] = (3.0, 1.0, 1.0)
    channels: tuple[str, ...] = ("CT",)
    labels: Mapping[str, Any] = field(default_factory=lambda: {"background": 0, "liver": 1, "spleen": 2})
    regions_class_order: tuple[int, ...] | None = None
    heads: int = 3
    previous_stage: str | None = None
    extra_channels: int = 0
    mirror_axes: tuple[int, ...] | None = (0, 1, 2)
    seed: int = 0


TWO_D = TrainedModel(
    name="2d",
    dimensions=2,
    strides=((2, 2), (2, 2)),
    kernels=((3, 3), (3, 3), (3, 3)),
    patch_size=(16, 16),
    spacing=(1.0, 1.0),
    mirror_axes=(0, 1),
)


def configuration_json(model: TrainedModel) -> dict[str, Any]:
    """The configuration as nnU-Net 2.4 and later write it into plans.json."""
    dimensions, stages = model.dimensions, len(model.features)
    counts = "n_conv_per_stage" if model.network == "PlainConvUNet" else "n_blocks_per_stage"
    resampling = "resample_data_or_seg_to_shape"
    kwargs = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{model.name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(model.patch_size),
        "median_image_size_in_voxels": [float(edge) for edge in model.patch_size],
        "spacing": list(model.spacing),
        "normalization_schemes": ["CTNormalization" if c == "CT" else "ZScoreNormalization" for c in model.channels],
        "use_mask_for_norm": [False] * len(model.channels),
        "resampling_fn_data": resampling,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **kwargs},
        "resampling_fn_seg": resampling,
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **kwargs},
        "resampling_fn_probabilities": resampling,
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **kwargs},
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{model.network}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": list(model.features),
                "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                "kernel_sizes": [list(kernel) for kernel in model.kernels],
                "strides": [[1] * dimensions, *(list(stride) for stride in model.strides)],
                counts: [2] * stages,
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    if model.previous_stage is not None:
        configuration["previous_stage"] = model.previous_stage
    return configuration


def old_configuration_json(model: TrainedModel) -> dict[str, Any]:
    """The same configuration as nnU-Net up to 2.3 wrote it; features must be base * 2^i up to a maximum."""
    configuration = configuration_json(model)
    kwargs = configuration.pop("architecture")["arch_kwargs"]
    counts = "n_conv_per_stage" if model.network == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        **configuration,
        "UNet_class_name": model.network,
        "UNet_base_num_features": model.features[0],
        "unet_max_num_features": max(model.features),
        "n_conv_per_stage_encoder": kwargs[counts],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [len(model.features) - 1] * model.dimensions,
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }


def plans_json(*models: TrainedModel, old: bool = False) -> dict[str, Any]:
    make = old_configuration_json if old else configuration_json
    intensities = {"mean": 80.0, "std": 40.0, "percentile_00_5": -50.0, "percentile_99_5": 200.0}
    channels = range(len(models[0].channels))
    return {
        "dataset_name": "Dataset901_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {model.name: make(model) for model in models},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): {**intensities, "min": -100.0, "max": 300.0, "median": 80.0} for channel in channels
        },
    }


def dataset_json(model: TrainedModel) -> dict[str, Any]:
    document: dict[str, Any] = {
        "channel_names": {str(index): name for index, name in enumerate(model.channels)},
        "labels": dict(model.labels),
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    if model.regions_class_order is not None:
        document["regions_class_order"] = list(model.regions_class_order)
    return document


def state_dict_with_copies(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The network's parameters under all the names that nnU-Net writes."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict().items():
        weights[name] = tensor
        for part, position in ((".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")):
            if part in name:
                weights[name.replace(part, position)] = tensor
    encoder = {f"decoder.{name}": tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    return {**weights, **encoder}


def checkpoint_content(model: TrainedModel, *, plans: Mapping[str, Any], fold: int | str = 0) -> dict[str, Any]:
    """What nnU-Net's trainer saves, including the numpy scalars in its log."""
    torch.manual_seed(model.seed)
    architecture = read_plans(plans, configurations=[model.name]).configurations[model.name].architecture
    network = build_network(architecture, channels=len(model.channels) + model.extra_channels, heads=model.heads)
    return {
        "network_weights": state_dict_with_copies(network),
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(0.25)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1,
        "init_args": {
            "plans": dict(plans),
            "configuration": model.name,
            "fold": fold,
            "dataset_json": dataset_json(model),
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": model.mirror_axes,
    }


def write_results(
    dataset_folder: Path,
    model: TrainedModel,
    *,
    plans: Mapping[str, Any] | None = None,
    folds: Sequence[int | str] = (0,),
    checkpoint: str = "checkpoint_final.pth",
) -> Path:
    """The result folder `nnUNetTrainer__nnUNetPlans__<name>` below `dataset_folder`; returns it."""
    document = plans_json(model) if plans is None else plans
    folder = dataset_folder / f"nnUNetTrainer__nnUNetPlans__{model.name}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(document))
    (folder / "dataset.json").write_text(json.dumps(dataset_json(model)))
    for fold in folds:
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint_content(model, plans=document, fold=fold), folder / f"fold_{fold}" / checkpoint)
    return folder
