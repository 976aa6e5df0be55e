"""How long a training lasts and how its learning rate falls (nnU-Net v2).

By epochs, as in nnU-Net, the rate changes once an epoch. With a budget of time the rate follows the time as well and
reaches 0 when the budget ends, however many epochs fit into it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`epochs` of `iterations` steps and `validation_iterations` validation batches each; the rate falls from
    `learning_rate` to 0 by the power `decay_exponent`; SGD's momentum and weight decay; gradients are clipped to
    `gradient_norm`. `budget_s`: the training ends after so many seconds, unless the epochs end before; `patience`:
    after so many epochs without a better score on the hold-out (ART-10). `encoder_factor`: the encoder's part of the
    learning rate, at every step; the decoder has all of it (engine/parameter_groups.py).
    """

    epochs: int = 1000
    iterations: int = 250
    validation_iterations: int = 50
    learning_rate: float = 0.01
    decay_exponent: float = 0.9
    momentum: float = 0.99
    weight_decay: float = 3e-5
    gradient_norm: float = 12.0
    budget_s: float | None = None
    patience: int | None = None
    encoder_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.iterations < 1 or self.validation_iterations < 1:
            raise ValueError(
                f"{self.epochs} epochs of {self.iterations} and {self.validation_iterations} iterations: each must be "
                "at least 1"
            )
        if self.budget_s is not None and self.budget_s <= 0:
            raise ValueError(f"budget of {self.budget_s} s: more than 0 is needed")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience of {self.patience} epochs: at least 1 is needed")

        if not 0 < self.encoder_factor <= 1:
            raise ValueError(f"encoder factor {self.encoder_factor}: more than 0 and at most 1 is needed")

    def progress(self, epoch: int, spent_s: float, reserved_s: float = 0.0) -> float:
        """The part of the training that is over, 0 to 1, after `epoch` epochs and `spent_s` seconds of training.

        `reserved_s` of the budget is kept for what follows the last step (validation, checkpoint).
        """
        done = epoch / self.epochs
        if self.budget_s is not None:
            left_s = self.budget_s - reserved_s
            done = max(done, spent_s / left_s if left_s > 0 else 1.0)
        return min(1.0, done)

    def rate(self, progress: float) -> float:
        """The learning rate at this progress."""
        return float(self.learning_rate * (1 - progress) ** self.decay_exponent)
