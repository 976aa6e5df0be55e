"""What can be planned for, as data: nnU-Net's planners (nnU-Net v2) and the profiles `nnunet` and
`article`, which differ in when 3D configurations are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from engine.architecture import NetworkKind

PlannerName = Literal["ExperimentPlanner", "ResEncM", "ResEncL", "ResEncXL"]
ProfileName = Literal["nnunet", "article"]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """What one of nnU-Net's planners aims at.

    `reference_2d`, `reference_3d`: feature map values (`feature_map_voxels`) that fill `reference_gb` of GPU memory at
    the reference batch size. `patch_for_smallest_batch`: a patch shrinks until the smallest batch fits, not the
    reference one. `max_dataset_covered`: share of the dataset's voxels that a batch may hold.
    """

    name: str
    plans_name: str
    network: NetworkKind
    reference_2d: float
    reference_3d: float
    reference_gb: float
    max_dataset_covered: float
    patch_for_smallest_batch: bool = False
    first_blocks: tuple[int, ...] = (1, 3, 4)
    further_blocks: int = 6
    decoder_convs: int = 1

    @property
    def network_class_name(self) -> str:
        name = "PlainConvUNet" if self.network == "plain" else "ResidualEncoderUNet"
        return f"dynamic_network_architectures.architectures.unet.{name}"


PLANNERS: Mapping[PlannerName, Planner] = MappingProxyType(
    {
        "ExperimentPlanner": Planner(
            name="ExperimentPlanner",
            plans_name="nnUNetPlans",
            network="plain",
            reference_2d=85e6,
            reference_3d=560e6,
            reference_gb=8,
            max_dataset_covered=0.05,
            patch_for_smallest_batch=True,
            first_blocks=(),
            further_blocks=2,
            decoder_convs=2,
        ),
        "ResEncM": Planner(
            name="nnUNetPlannerResEncM",
            plans_name="nnUNetResEncUNetMPlans",
            network="residual",
            reference_2d=135e6,
            reference_3d=680e6,
            reference_gb=8,
            max_dataset_covered=1,
        ),
        "ResEncL": Planner(
            name="nnUNetPlannerResEncL",
            plans_name="nnUNetResEncUNetLPlans",
            network="residual",
            reference_2d=380e6,
            reference_3d=2100e6,
            reference_gb=24,
            max_dataset_covered=1,
        ),
        "ResEncXL": Planner(
            name="nnUNetPlannerResEncXL",
            plans_name="nnUNetResEncUNetXLPlans",
            network="residual",
            reference_2d=560e6,
            reference_3d=3600e6,
            reference_gb=40,
            max_dataset_covered=1,
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """When 3D configurations are made.

    The full resolution is, if its patch has more than `fullres_above_voxels`; the low resolution, if that patch covers
    less than `lowres_below` of the median image. Its spacing is the full one times `lowres_step` on every axis, once;
    or, with `lowres_until_covered`, step by step, coarse axes last, until the patch covers that share, and dropped
    where the image has then not shrunk to half its voxels. `fills_device`: patch and batch are those that fill the
    device on which the training will run, where it can be measured (engine/memory_fit.py).
    """

    fullres_above_voxels: int
    lowres_below: float
    lowres_step: float
    lowres_until_covered: bool
    fills_device: bool
    plans_name_part: str


PROFILES: Mapping[ProfileName, Profile] = MappingProxyType(
    {
        "nnunet": Profile(
            fullres_above_voxels=0,
            lowres_below=0.25,
            lowres_step=1.03,
            lowres_until_covered=True,
            fills_device=False,
            plans_name_part="",
        ),
        "article": Profile(
            fullres_above_voxels=16**3,
            lowres_below=0.9,
            lowres_step=2.0,
            lowres_until_covered=False,
            fills_device=True,
            plans_name_part="Article",
        ),
    }
)


def plans_name(planner: PlannerName, profile: ProfileName) -> str:
    """nnU-Net's name of the planner's plans; those of another profile have it in their name."""
    name, part = PLANNERS[planner].plans_name, PROFILES[profile].plans_name_part
    return name.removesuffix("Plans") + part + "Plans" if part else name
