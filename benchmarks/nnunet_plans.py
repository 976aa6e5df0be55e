"""Plans of nnU-Net for one CT channel, with a network of one's own size (nnU-Net v2's plans.json)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Intensities of the foreground in CT: the figures of shared/models/Dataset900_CTsmall.
_INTENSITIES = {
    "max": 1110.0,
    "mean": 84.80559539794922,
    "median": 38.0,
    "min": -672.0,
    "percentile_00_5": -61.0,
    "percentile_99_5": 622.0,
    "std": 124.72550964355469,
}
# nnU-Net's default network for a patch of 96x112x128 at equal spacings.
DEFAULT_FEATURES = (32, 64, 128, 256, 320, 320)
DEFAULT_STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 2))


def ct_plans(
    *,
    spacing_mm: Sequence[float],
    patch_size: Sequence[int],
    dataset_name: str = "Dataset900_CT",
    features: Sequence[int] = DEFAULT_FEATURES,
    strides: Sequence[Sequence[int]] = DEFAULT_STRIDES,
) -> dict[str, Any]:
    """plans.json with `3d_fullres` alone: two convolutions of 3x3x3 a stage, as the planner writes it."""
    stages = len(features)

    def resampled(order: int, *, is_seg: bool) -> dict[str, Any]:
        return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}

    return {
        "dataset_name": dataset_name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing_mm),
        "original_median_shape_after_transp": list(patch_size),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": _INTENSITIES},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch_size),
                "median_image_size_in_voxels": [float(size) for size in patch_size],
                "spacing": list(spacing_mm),
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampled(3, is_seg=False),
                "resampling_fn_seg_kwargs": resampled(1, is_seg=True),
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampled(1, is_seg=False),
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                    "arch_kwargs": {
                        "n_stages": stages,
                        "features_per_stage": list(features),
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": [[3, 3, 3]] * stages,
                        "strides": [list(stride) for stride in strides],
                        "n_conv_per_stage": [2] * stages,
                        "n_conv_per_stage_decoder": [2] * (stages - 1),
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
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
        },
    }
