"""What a training noted of each epoch, and the same as nnU-Net's logger keeps it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.metrics import CompositeScore

_EMA = 0.9


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """`dice_per_class`: online ("pseudo") Dice of each foreground class over all validation patches, None where it
    never occurred; `mean_dice` leaves those out, 0 where all are; `ema_dice` is its moving average. `learning_rate` is
    that of the last step, `seconds` the time that the epoch ran, all resumptions together. `hold_out`: whole cases of
    the hold-out, None where they were not looked at. `patch_hd95_mm`: engine.online_validation; None in checkpoints
    that were written without."""

    epoch: int
    learning_rate: float
    train_loss: float
    validation_loss: float
    dice_per_class: tuple[float | None, ...]
    mean_dice: float
    ema_dice: float
    seconds: float
    hold_out: CompositeScore | None = None
    patch_hd95_mm: float | None = None

    @property
    def score(self) -> float | None:
        """The composite score on the hold-out; lower is better."""
        return None if self.hold_out is None else self.hold_out.value

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint; `from_plain` undoes it."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> EpochRecord:
        whole = plain["hold_out"]
        return cls(
            **{
                **plain,
                "dice_per_class": tuple(plain["dice_per_class"]),
                "hold_out": None if whole is None else CompositeScore(**whole),
            }
        )


def write_epochs(records: Sequence[EpochRecord], path: Path) -> None:
    """One epoch a line, with its score; all of them each time: what was lost with a killed process is not in the file
    either."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = (json.dumps({**record.as_plain(), "score": record.score}) + "\n" for record in records)
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def best_judged(records: Sequence[EpochRecord]) -> EpochRecord | None:
    """The first epoch with the lowest composite score on the hold-out."""
    best: tuple[float, EpochRecord] | None = None
    for record in records:
        if record.score is not None and (best is None or record.score < best[0]):
            best = record.score, record
    return None if best is None else best[1]


def epochs_without_gain(records: Sequence[EpochRecord]) -> int:
    """Epochs since the best score on the hold-out; 0 where none was judged."""
    best = best_judged(records)
    return 0 if best is None else records[-1].epoch - best.epoch


def averages(dice_per_class: Sequence[float | None], before: Sequence[EpochRecord]) -> tuple[float, float]:
    """The mean of the classes that occurred, and nnU-Net's moving average of it over the epochs."""
    known = [value for value in dice_per_class if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return mean, mean if not before else _EMA * before[-1].ema_dice + (1 - _EMA) * mean


def nnunet_logging(records: Sequence[EpochRecord]) -> dict[str, list[Any]]:
    """The lists of nnU-Net's logger, one entry per epoch; its plot takes the difference of the two times."""
    return {
        "mean_fg_dice": [r.mean_dice for r in records],
        "ema_fg_dice": [r.ema_dice for r in records],
        "dice_per_class_or_region": [[math.nan if d is None else d for d in r.dice_per_class] for r in records],
        "train_losses": [r.train_loss for r in records],
        "val_losses": [r.validation_loss for r in records],
        "lrs": [r.learning_rate for r in records],
        "epoch_start_timestamps": [0.0 for _ in records],
        "epoch_end_timestamps": [r.seconds for r in records],
    }
