"""The weights that a fine-tuning begins with: all those of a trained network, its heads included (torch).

nnU-Net's `-pretrained_weights` leaves out what is called `.seg_layers.`, and so draws the heads anew even where the
labels are the same. Here the labels are the same, and every head is kept, those of deep supervision too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import nn

from engine.checkpoint import read_checkpoint
from engine.errors import ImportRefused
from engine.training_checkpoint import weights_digest


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """`digest` is that of the weights in the file `checkpoint` (`training_checkpoint.weights_digest`)."""

    checkpoint: Path
    digest: str

    @classmethod
    def of(cls, checkpoint: Path) -> Self:
        """Raises ImportRefused as `read_checkpoint` does."""
        return cls(checkpoint=checkpoint, digest=weights_digest(read_checkpoint(checkpoint).weights))

    def load_into(self, network: nn.Module) -> None:
        """Every parameter of the network, in place. Raises ImportRefused, naming the first one, where the file has
        another network's, values that are not finite, or changed since `digest` was taken."""
        where = f"{self.checkpoint.parent.parent.name}/{self.checkpoint.parent.name}/{self.checkpoint.name}"
        weights = read_checkpoint(self.checkpoint).weights
        if weights_digest(weights) != self.digest:
            raise ImportRefused(f"{where}: has changed since the fine-tuning was asked for")
        expected = network.state_dict()
        for name in sorted({*expected, *weights}):
            if name not in expected or name not in weights or weights[name].shape != expected[name].shape:
                raise ImportRefused(f"{where}: parameter {name[:200]} does not fit the network that the plans describe")
            if not bool(weights[name].isfinite().all()):
                raise ImportRefused(f"{where}: parameter {name[:200]} has values that are not finite")
        network.load_state_dict(weights, strict=True)
