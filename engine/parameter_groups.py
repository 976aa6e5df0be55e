"""Groups of a network's parameters that learn at different rates, in one ratio at every step (torch).

nnU-Net's PolyLRScheduler writes one rate into every group, by which layer-wise rates are lost at the first step. Here
each group keeps its factor, and the schedule's rate is multiplied by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.schedule import Schedule

FACTOR = "factor"


def parameter_groups(network: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    """One group, unless the encoder has a rate of its own: then the encoder's and, last, everything else's."""
    if schedule.encoder_factor == 1:
        return [{"params": list(network.parameters())}]
    encoder = [parameter for name, parameter in network.named_parameters() if name.startswith("encoder.")]
    others = [parameter for name, parameter in network.named_parameters() if not name.startswith("encoder.")]
    return [{"params": encoder, FACTOR: schedule.encoder_factor}, {"params": others, FACTOR: 1.0}]


def follow_schedule(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its part of the schedule's rate. A group without a factor has all of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)
