"""What `seggate predict` was asked for, and the refusal of what does not go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engine.backends import Device
from engine.execution_plan import MAX_TOLERANCE
from engine.sanity_check import STRICT_TOLERANCE

OutputFormat = Literal["nifti", "seg", "both"]
SegEncoding = Literal["BINARY", "LABELMAP"]


class UsageRefused(Exception):
    """Options that do not go together, or that cannot be done here; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class PredictRequest:
    """The command line; None, nothing or False where it says nothing.

    model: path or name; dataset, plans, trainer: nnU-Net's address under nnUNet_results. configurations: of a bundle
    or result folder. tolerance: share of the voxels that a faster way to run the model may change.
    """

    inputs: tuple[Path, ...]
    output: Path
    model: str | None = None
    dataset: str | None = None
    configurations: tuple[str, ...] = ()
    plans: str | None = None
    trainer: str | None = None
    folds: tuple[str, ...] = ()
    checkpoint: str | None = None
    orientation: str | None = None
    postprocessing: bool | None = None
    step_size: float | None = None
    mirroring: bool = True
    tolerance: float | None = None
    device: str = "auto"
    threads: int | None = None
    format: OutputFormat = "nifti"
    seg_encoding: SegEncoding = "BINARY"
    name: str | None = None
    save_probabilities: bool = False
    continue_prediction: bool = False
    ahead: int = 1
    writers: int = 1
    num_parts: int = 1
    part_id: int = 0
    previous_stage_predictions: Path | None = None
    not_on_device: bool = False
    config: Path = Path("config")
    cache: Path | None = None
    verbose: bool = False
    quiet: bool = False

    @property
    def wants_nifti(self) -> bool:
        return self.format in ("nifti", "both")

    @property
    def wants_seg(self) -> bool:
        return self.format in ("seg", "both")

    @property
    def chosen_device(self) -> Device:
        """After `check_request`."""
        return next(known for known in get_args(Device) if known == self.device)


def check_request(request: PredictRequest) -> None:
    """Raises UsageRefused for what can be seen without looking at any file."""
    if (request.model is None) == (request.dataset is None):
        raise UsageRefused("name the model with -m (folder, archive or name), or with -d and -c as in nnU-Net")
    if request.dataset is not None and len(request.configurations) != 1:
        raise UsageRefused("-d needs one configuration: -c, for example 3d_fullres")
    if request.dataset is None:
        for option, value in (("-p", request.plans), ("-tr", request.trainer)):
            if value is not None:
                raise UsageRefused(f"{option} is part of nnU-Net's address and needs -d; -m names the model itself")
    if request.previous_stage_predictions is not None:
        raise UsageRefused(
            "-prev_stage_predictions: label maps of the stage before are not taken from files; leave the option out: "
            "the model brings that stage, and it is run with the cascade"
        )
    if request.not_on_device:
        raise UsageRefused(
            "--not_on_device: results are always gathered in main memory, so there is nothing to switch; leave it out"
        )
    if request.device not in get_args(Device):
        raise UsageRefused(f"-device {request.device}: the networks run on cpu or cuda (auto: cuda where it works)")
    if request.tolerance is not None and not STRICT_TOLERANCE <= request.tolerance <= MAX_TOLERANCE:
        raise UsageRefused(
            f"--tolerance {request.tolerance:g}: from {STRICT_TOLERANCE:g} (what holds without it) to {MAX_TOLERANCE:g}"
        )
    if not 0 <= request.part_id < request.num_parts:
        raise UsageRefused(f"-part_id {request.part_id}: with -num_parts {request.num_parts} it is 0 to "
                           f"{request.num_parts - 1}")  # fmt: skip
    if request.name is not None and not _is_name(request.name):
        raise UsageRefused(f"--name {request.name[:80]!r}: letters, digits, '-', '_' and '.', at most 100 of them")
    if request.seg_encoding != "BINARY" and not request.wants_seg:
        raise UsageRefused("--seg-encoding needs --format seg or both")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 100 and name[0] != "." and all(c.isalnum() or c in "-_." for c in name)
