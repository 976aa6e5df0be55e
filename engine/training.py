"""nnU-Net's training of one fold (facts: nnU-Net v2, §5): epochs of batches, online validation, checkpoints.

    setup ─▶ Trainer ─▶ per epoch: batches ▸ step ▸ online validation ▸ record ▸ checkpoint

Batches depend on their place alone (engine/batches.py), so a training that was stopped anywhere goes on as if it had
not been: a checkpoint says at which iteration of which epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.augmentation_profile import AugmentationPlan
from engine.batches import Batch, BatchSource, BatchStream
from engine.errors import TrainingDiverged, TrainingRefused
from engine.labels import LabelManager
from engine.loss import SegmentationLoss, deep_supervision_weights
from engine.network import build_network
from engine.plans import Configuration
from engine.random_state import Purpose, random_generator
from engine.sampling import PatchSampler
from engine.training_checkpoint import BEST, FINAL, LATEST, TrainingState, read_state, write_state

Precision = Literal["float32", "bf16", "fp16"]

_NEGATIVE_SLOPE = 0.01
_EMA = 0.9
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast. The learning rate falls from its first value to 0 over the run, by a power.

    `budget_s`: the run ends after so many seconds at the latest, and the rate falls with the time that has passed.
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


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """One fold of one configuration. `folder` has the preprocessed cases; `init_args` go into the checkpoints, for
    nnU-Net. `deterministic`: bit-identical on the same kind of processor with the same number of threads."""

    configuration: Configuration
    batch_dice: bool
    labels: LabelManager
    channels: int
    folder: Path
    training_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    augmentation: AugmentationPlan
    schedule: Schedule
    seed: int
    device: torch.device
    precision: Precision
    deterministic: bool
    init_args: dict[str, Any] = field(default_factory=dict)
    loader_threads: int = 1


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What an epoch gave. `dice_per_class`: online ("pseudo") Dice of each foreground class over all validation
    patches, None where it never occurred."""

    epoch: int
    learning_rate: float
    train_loss: float
    validation_loss: float
    dice_per_class: tuple[float | None, ...]
    mean_dice: float
    ema_dice: float
    seconds: float


def default_precision(device: torch.device) -> Precision:
    """fp16 on a GPU, as nnU-Net; bf16 on a processor that has it in hardware; else float32."""
    if device.type == "cuda":
        return "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


class Trainer:
    """Trains one fold in `folder`; resumes from the checkpoint that it finds there.

    Raises TrainingRefused when that checkpoint belongs to another training, or in deterministic mode to another number
    of threads.
    """

    def __init__(self, setup: TrainingSetup, folder: Path) -> None:
        self.setup = setup
        self.folder = folder
        self.records: list[EpochRecord] = []
        self.epoch, self.iteration = 0, 0
        self._losses: list[float] = []
        self._best_ema: float | None = None
        self._started_epoch = time.monotonic()
        self._spent_s = 0.0
        network = build_network(
            setup.configuration.architecture,
            channels=setup.channels,
            heads=setup.labels.num_heads,
            deep_supervision=True,
        )
        initialize(network, setup.seed)
        self._format = torch.channels_last if setup.configuration.is_2d else torch.channels_last_3d
        self.network: nn.Module = network.to(setup.device)
        self.network.to(memory_format=self._format)  # type: ignore[call-overload]
        schedule = setup.schedule
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            schedule.learning_rate,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            nesterov=True,
        )
        outputs = setup.configuration.architecture.n_stages - 1
        self.loss = SegmentationLoss(
            setup.labels, batch_dice=setup.batch_dice, weights=deep_supervision_weights(outputs)
        ).to(setup.device)
        self._scaler = torch.amp.GradScaler("cuda") if setup.precision == "fp16" else None
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_finished:
            self._resume(folder / FINAL)
        elif (folder / LATEST).exists():
            self._resume(folder / LATEST)

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINAL).exists()

    def run(self, *, stop: Callable[[], bool] = lambda: False, report: Callable[[EpochRecord], None] = print) -> bool:
        """Trains until the schedule ends (True) or `stop` says so (False), with a checkpoint either way.

        Raises TrainingDiverged, DatasetInvalid, OSError when a checkpoint cannot be written: the last one stays.
        """
        if self.is_finished:
            return True
        setup = self.setup
        source, validation = self._source("training"), self._source("validation")
        last_saved = time.monotonic()
        with (
            _determinism(setup.deterministic),
            BatchStream(source, threads=setup.loader_threads) as batches,
            BatchStream(validation, threads=setup.loader_threads) as held_out,
        ):
            while self.progress() < 1:
                self._started_epoch = time.monotonic() - self._spent_s
                rate = self.learning_rate()
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                if not self._train_epoch(batches, stop):
                    self._save(LATEST)
                    return False
                self._close_epoch(rate, *self._validate(held_out))
                report(self.records[-1])
                if self._best_ema is None or self.records[-1].ema_dice > self._best_ema:
                    self._best_ema = self.records[-1].ema_dice
                    self._save(BEST)
                if time.monotonic() - last_saved > _SAVE_EVERY_S:
                    self._save(LATEST)
                    last_saved = time.monotonic()
        self._save(FINAL)
        (self.folder / LATEST).unlink(missing_ok=True)
        return True

    def progress(self) -> float:
        """The part of the schedule that is over, from 0 to 1: of the epochs, or of the time if that is more."""
        schedule = self.setup.schedule
        of_epochs = self.epoch / schedule.epochs
        if schedule.budget_s is None or not self.records:
            return min(1.0, of_epochs)
        spent = sum(record.seconds for record in self.records)
        # An epoch that would end too late is not begun.
        left = schedule.budget_s - spent
        if left < self.records[-1].seconds:
            return 1.0
        return min(1.0, max(of_epochs, spent / schedule.budget_s))

    def learning_rate(self) -> float:
        schedule = self.setup.schedule
        return float(schedule.learning_rate * (1 - self.progress()) ** schedule.decay_exponent)

    def step(self, batch: Batch) -> float:
        """One optimiser step; the loss before it. Raises TrainingDiverged when that is not finite."""
        images, labels = batch
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            outputs = self.network(images.contiguous(memory_format=self._format))
        loss = self.loss(outputs, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"epoch {self.epoch}, iteration {self.iteration}: the loss is {value}; try a lower learning rate, or "
                "float32 instead of half precision"
            )
        if self._scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.setup.schedule.gradient_norm)
            self.optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.setup.schedule.gradient_norm)
            self._scaler.step(self.optimizer)
            self._scaler.update()
        return value

    def _train_epoch(self, batches: BatchStream, stop: Callable[[], bool]) -> bool:
        """False when `stop` said so before the end of the epoch."""
        schedule = self.setup.schedule
        for batch in batches.epoch(self.epoch, schedule.iterations, first=self.iteration):
            if stop():
                self._spent_s = time.monotonic() - self._started_epoch
                return False
            self._losses.append(self.step(batch))
            self.iteration += 1
        return True

    def _validate(self, batches: BatchStream) -> tuple[float, tuple[float | None, ...]]:
        """Mean loss and the online Dice per class, from hard counts summed over all patches."""
        labels, losses = self.setup.labels, []
        counts = np.zeros((3, len(labels.foreground)), dtype=np.int64)
        self.network.eval()
        with torch.no_grad():
            for images, target in batches.epoch(self.epoch, self.setup.schedule.validation_iterations):
                with self._autocast():
                    outputs = self.network(images.contiguous(memory_format=self._format))
                losses.append(float(self.loss(outputs, target)))
                counts += count_overlap(outputs[0].float(), target, labels)
        both, found, there = counts
        size = found + there
        dice = tuple(float(2 * b / s) if s else None for b, s in zip(both, size, strict=True))
        return float(np.mean(losses)) if losses else math.nan, dice

    def _close_epoch(self, rate: float, validation_loss: float, dice: tuple[float | None, ...]) -> None:
        known = [value for value in dice if value is not None]
        mean = float(np.mean(known)) if known else 0.0
        ema = mean if not self.records else _EMA * self.records[-1].ema_dice + (1 - _EMA) * mean
        self.records.append(
            EpochRecord(
                epoch=self.epoch,
                learning_rate=rate,
                train_loss=float(np.mean(self._losses)),
                validation_loss=validation_loss,
                dice_per_class=dice,
                mean_dice=mean,
                ema_dice=ema,
                seconds=time.monotonic() - self._started_epoch,
            )
        )
        self.epoch, self.iteration, self._losses, self._spent_s = self.epoch + 1, 0, [], 0.0

    def _source(self, stage: Literal["training", "validation"]) -> BatchSource:
        setup, configuration = self.setup, self.setup.configuration
        names = setup.training_cases if stage == "training" else setup.validation_cases
        initial = setup.augmentation.initial_patch_size if stage == "training" else configuration.patch_size
        return BatchSource(
            folder=setup.folder,
            names=names,
            sampler=PatchSampler(
                seed=setup.seed,
                stage=stage,
                cases=len(names),
                batch_size=configuration.batch_size,
                patch_size=configuration.patch_size,
                initial_patch_size=initial,
                has_ignore_label=setup.labels.ignore_label is not None,
            ),
            plan=setup.augmentation,
            channels=setup.channels,
            samples=range(configuration.batch_size),
            device=setup.device,
        )

    def _autocast(self) -> Any:
        if self.setup.precision == "float32":
            return nullcontext()
        kind = torch.bfloat16 if self.setup.precision == "bf16" else torch.float16
        return torch.autocast(self.setup.device.type, kind)

    def _save(self, name: str) -> None:
        setup = self.setup
        state = TrainingState(
            weights=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=None if self._scaler is None else self._scaler.state_dict(),
            epoch=self.epoch,
            best_ema=self._best_ema,
            logging=_nnunet_logging(self.records),
            init_args=setup.init_args,
            mirror_axes=setup.augmentation.mirror_axes,
            own={
                "identity": self._identity(),
                "threads": torch.get_num_threads(),
                "iteration": self.iteration,
                "losses": list(self._losses),
                "spent_s": self._spent_s,
                "records": [vars(record) for record in self.records],
            },
        )
        write_state(state, self.folder / name)

    def _resume(self, path: Path) -> None:
        state = read_state(path)
        own = state.own
        for key, value in self._identity().items():
            if own["identity"].get(key) != value:
                raise TrainingRefused(
                    f"{self.folder.name}/{path.name}: {key} was {own['identity'].get(key)!r}, now it is "
                    f"{value!r}; train into another folder, or remove this one"
                )
        if self.setup.deterministic and own["threads"] != torch.get_num_threads():
            raise TrainingRefused(
                f"{self.folder.name}/{path.name}: was trained with {own['threads']} threads; deterministic mode needs "
                f"as many again, not {torch.get_num_threads()}"
            )
        self.network.load_state_dict(state.weights, strict=True)
        self.optimizer.load_state_dict(dict(state.optimizer))
        if self._scaler is not None and state.scaler is not None:
            self._scaler.load_state_dict(dict(state.scaler))
        self.epoch, self.iteration = state.epoch, own["iteration"]
        self._best_ema, self._losses, self._spent_s = state.best_ema, list(own["losses"]), own["spent_s"]
        self.records = [EpochRecord(**{**r, "dice_per_class": tuple(r["dice_per_class"])}) for r in own["records"]]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        setup, schedule = self.setup, self.setup.schedule
        return {
            "configuration": setup.configuration.name,
            "seed": setup.seed,
            "epochs": schedule.epochs,
            "iterations": schedule.iterations,
            "precision": setup.precision,
            "deterministic": setup.deterministic,
            "training_cases": list(setup.training_cases),
        }


def initialize(network: nn.Module, seed: int) -> None:
    """Kaiming normal for the slope of LeakyReLU, biases 0; in a residual block the second norm starts at 0, so that the
    block starts as its skip (facts: nnU-Net v2, §5.1). The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(
        int(random_generator(seed, Purpose.WEIGHTS, epoch=0, iteration=0).integers(2**63))
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=_NEGATIVE_SLOPE, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.InstanceNorm2d | nn.InstanceNorm3d) and name.endswith(".conv2.norm"):
            nn.init.zeros_(module.weight)


def count_overlap(logits: Tensor, target: Tensor, labels: LabelManager) -> NDArray[np.int64]:
    """(3, classes) int64 over a batch: voxels in both, found, there. Ignored voxels count nowhere."""
    counts = np.zeros((3, len(labels.foreground)), dtype=np.int64)
    known = None if labels.ignore_label is None else target != labels.ignore_label
    winners = None if labels.has_regions else logits.argmax(1)
    for index, label in enumerate(labels.foreground):
        found = winners == label.value if winners is not None else logits[:, index] > 0
        there = torch.isin(target, torch.tensor(label.region, dtype=target.dtype, device=target.device))
        if known is not None:
            found, there = found & known, there & known
        counts[:, index] = [int((found & there).sum()), int(found.sum()), int(there.sum())]
    return counts


def _nnunet_logging(records: Sequence[EpochRecord]) -> dict[str, list[Any]]:
    """The lists of nnU-Net's logger, one entry per epoch."""
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


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
