"""Checkpoints of a training: nnU-Net's own layout, so that nnU-Net predicts with them and goes on training from them.

nnU-Net registers its tensors several times (nnU-Net v2) and loads strictly, so every copy is written. What
only this engine needs (where in the epoch, seed, threads, history) is under the key `seggate`, which nnU-Net ignores.

nnU-Net goes on from a checkpoint at `current_epoch` with its own schedule of 1000 epochs of 250 iterations: the
learning rate of a shorter training cannot be carried over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import load_checkpoint_file
from engine.errors import TrainingRefused
from engine.experiment import FINAL as FINAL_CHECKPOINT

FORMAT = 1
LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", FINAL_CHECKPOINT
TRAINER = "nnUNetTrainer"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a training needs to go on. `own` is what only this engine knows; plain values alone."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any] | None
    epoch: int
    best_ema: float | None
    logging: Mapping[str, list[Any]]
    init_args: Mapping[str, Any]
    mirror_axes: tuple[int, ...]
    own: Mapping[str, Any]


def init_args(
    plans: Mapping[str, Any], configuration: str, fold: int | str, dataset_json: Mapping[str, Any]
) -> dict[str, Any]:
    """What nnU-Net's trainer was made with, which its predictor reads: the documents plans.json and dataset.json."""
    return {
        "plans": dict(plans),
        "configuration": configuration,
        "fold": fold,
        "dataset_json": dict(dataset_json),
        "device": torch.device("cpu"),
    }


def write_state(state: TrainingState, path: Path) -> None:
    """The whole file or the old one: written beside it, synced, renamed. Raises OSError (the disk is full)."""
    document = {
        "network_weights": with_copies(state.weights),
        "optimizer_state": _contiguous(state.optimizer),
        "grad_scaler_state": None if state.scaler is None else dict(state.scaler),
        "logging": {key: list(values) for key, values in state.logging.items()},
        "_best_ema": state.best_ema,
        "current_epoch": state.epoch,
        "init_args": dict(state.init_args),
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": state.mirror_axes or None,
        "seggate": {"format": FORMAT, **state.own},
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except RuntimeError as error:
        # torch's writer hides what the file said.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def read_state(path: Path) -> TrainingState:
    """Raises ImportRefused as `read_checkpoint` does, TrainingRefused when it is not a state of this engine."""
    document, checkpoint = load_checkpoint_file(path)
    own = document.get("seggate")
    if not isinstance(own, Mapping) or own.get("format") != FORMAT:
        raise TrainingRefused(f"{path.name}: was not written by this version of the engine; it cannot be resumed")
    return TrainingState(
        weights=checkpoint.weights,
        optimizer=document["optimizer_state"],
        scaler=document["grad_scaler_state"],
        epoch=document["current_epoch"],
        best_ema=document["_best_ema"],
        logging=document["logging"],
        init_args=document["init_args"],
        mirror_axes=checkpoint.mirror_axes,
        own=own,
    )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Changes with any weight, and with nothing else."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _contiguous(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The momenta in the order of the parameters' axes, wherever and however they lie."""
    moments = {
        index: {k: v.detach().cpu().contiguous() if isinstance(v, Tensor) else v for k, v in state.items()}
        for index, state in optimizer["state"].items()
    }
    return {**optimizer, "state": moments}


def with_copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """nnU-Net's names: each convolution and norm once more in `all_modules`, the encoder once more in the decoder."""
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stored = tensor.detach().cpu().contiguous()
        names = [name]
        for kind, copy in (("conv", "all_modules.0"), ("norm", "all_modules.1")):
            head, middle, tail = name.rpartition(f".{kind}.")
            if middle:
                names.append(f"{head}.{copy}.{tail}")
        named.update(dict.fromkeys(names, stored))
        named.update({f"decoder.{n}": stored for n in names if n.startswith("encoder.")})
    return named
