"""nnU-Net's training of one fold (nnU-Net v2): epochs of batches, online validation, checkpoints (torch).

    setup ─▶ Trainer.run ─▶ per epoch: batches ▸ steps ▸ online validation ▸ record ▸ checkpoint

Batches depend on their place alone (engine/batches.py), so a training that was stopped anywhere goes on as if it had
not been: a checkpoint says at which iteration of which epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engine.allocator import freed_memory_kept
from engine.batches import Batch, BatchSource, BatchStream
from engine.compilation import FastestGradients, resolved
from engine.determinism import determinism
from engine.errors import TrainingDiverged, TrainingRefused
from engine.head_start import start_heads
from engine.loss import BatchShare, SegmentationLoss, deep_supervision_weights
from engine.metrics import CompositeScore
from engine.network import build_network, initialize
from engine.online_validation import PatchFigures, PatchValidation
from engine.parameter_groups import follow_schedule, parameter_groups
from engine.random_state import Purpose, random_generator
from engine.rehearsal import RehearsalDraw
from engine.sampling import PatchSampler
from engine.step_gradients import StepGradients
from engine.training_checkpoint import BEST, FINAL, LATEST, TrainingState, read_state, write_state
from engine.training_identity import difference
from engine.training_log import EpochRecord, averages, best_judged, epochs_without_gain, nnunet_logging
from engine.training_pause import TrainingPause
from engine.training_processes import TrainingProcesses
from engine.training_setup import TrainingSetup

Judge = Callable[[nn.Module, int], CompositeScore | None]
"""Validates a network on whole cases after an epoch; None where it is not that epoch's turn. It may return early, with
anything, when the training was told to stop."""

_MOST_TIME_FOR_SAVING = 0.05


class Trainer:
    """Trains one fold in `folder`; goes on from the checkpoint that it finds there, the final one before the latest.

    A checkpoint is written at least every `save_every_s` seconds of training (but never for more than a twentieth of
    the time), within epochs too. Of several `processes` each trains its share of every batch and the first writes.
    `note` gets a line for the log. While a `pause` is asked for (by default in `folder`), `run` waits between two
    steps, with a checkpoint; that counts as no time.

    Raises TrainingRefused when the batch is too small for the processes, or when the checkpoint belongs to another
    training or, in deterministic mode, to another number of threads or processes; ImportRefused when it is damaged.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        folder: Path,
        *,
        save_every_s: float = 60.0,
        processes: TrainingProcesses | None = None,
        note: Callable[[str], None] = lambda _text: None,
        pause: TrainingPause | None = None,
    ) -> None:
        self.setup = setup
        self.folder = folder
        self.processes = processes or TrainingProcesses()
        batch_size = setup.configuration.batch_size
        self._samples = self.processes.share(batch_size)
        self.records: list[EpochRecord] = []
        self.epoch, self.iteration = 0, 0
        self._losses: list[float] = []
        self._best_ema: float | None = None
        self._spent_s = 0.0  # in this epoch, before `_since`
        self.pause = pause or TrainingPause(folder, note=note)
        self._since = self.pause.now()
        self._validation_s: float | None = None
        self._judge_s: float | None = None
        self._judge_batches = 0
        self._save_every_s, self._last_saved, self._saving_s = save_every_s, self._since, 0.0
        architecture, schedule = setup.configuration.architecture, setup.schedule
        network = build_network(
            architecture, channels=setup.input_channels, heads=setup.labels.num_heads, deep_supervision=True
        )
        if setup.start is None:
            initialize(network, random_generator(setup.seed, Purpose.WEIGHTS, epoch=0, iteration=0))
        else:
            setup.start.load_into(network)
        self._heads = network.decoder.seg_layers
        self.network: nn.Module = network.to(setup.device)
        memory_format = torch.channels_last if setup.configuration.is_2d else torch.channels_last_3d
        self.network.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.network, schedule),
            schedule.learning_rate,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            nesterov=True,
        )
        self.loss = SegmentationLoss(
            setup.labels,
            batch_dice=setup.batch_dice,
            weights=deep_supervision_weights(architecture.n_stages - 1),
            share=BatchShare(part=len(self._samples) / batch_size, add_up=self.processes.add_up),
        ).to(setup.device)
        for weight, head in zip(self.loss.weights, reversed(network.decoder.seg_layers), strict=True):
            # A compiler would give an output that nobody looks at a gradient of 0, and the optimiser decay its weights.
            head.requires_grad_(weight > 0)
        mode = resolved(setup.compile, setup.device, deterministic=setup.deterministic)
        self._scaler = torch.amp.GradScaler("cuda") if setup.precision == "fp16" else None
        self._step = StepGradients(
            self.network,
            self.loss,
            device=setup.device,
            precision=setup.precision,
            memory_format=memory_format,
            scaler=self._scaler,
        )
        ways = self._step.ways(mode, alone=self.processes.size == 1)
        self._gradients = FastestGradients(self._step.through(self.network), ways, note=note)
        folder.mkdir(parents=True, exist_ok=True)
        found = next((name for name in (FINAL, LATEST) if (folder / name).exists()), None)
        if found is not None:
            self._resume(found)

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINAL).exists()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Of the data as it is when the training begins or goes on."""
        return self.setup.identity()

    def run(
        self,
        *,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[EpochRecord], None] = lambda _record: None,
        judge: Judge | None = None,
        judge_batches: int = 0,
    ) -> bool:
        """Trains until the schedule ends (True) or `stop` says so (False), with a checkpoint either way; `report` gets
        each epoch's record.

        With `judge` the best checkpoint is that of the lowest composite score, the training ends after the schedule's
        `patience` epochs without a lower one, and the final checkpoint has the best one's weights. `judge_batches`: how
        many batches it is as long as, for the time that a budget keeps for it until it was measured.

        Raises TrainingDiverged, DatasetInvalid, TrainingRefused when the best checkpoint is of another training, and
        OSError when a checkpoint cannot be written; the last checkpoint stays in each case.
        """
        if self.is_finished:
            return True
        self._judge_batches = judge_batches
        if not (self.folder / LATEST).exists():
            # It is of a training that was here before, and this one may never have a score.
            (self.folder / BEST).unlink(missing_ok=True)
        _ = self.identity  # of the data that is opened now
        stop = self._waiting(self.processes.agreed(stop))
        self._since = self._last_saved = self.pause.now()
        if self.setup.start is None and not self.records and not self.iteration:
            start_heads(self._heads, self.source("training"), self.setup.labels)
        with (
            freed_memory_kept(),
            determinism(self.setup.deterministic),
            BatchStream(self.source("training"), threads=self.setup.loader_threads) as batches,
            BatchStream(self.source("validation"), threads=self.setup.loader_threads) as held_out,
        ):
            # An epoch that was stopped after the budget's last step still has to be validated.
            while self._losses or self._agreed_progress() < 1:
                found = self._validate(held_out, stop) if self._train_epoch(batches, stop) else None
                whole = self._judged(judge) if judge is not None and found is not None else None
                if found is None or (judge is not None and stop()):
                    self._save(LATEST)
                    return False
                record = self._close_epoch(*found, whole, judged=judge is not None)
                if self.processes.is_first:
                    report(record)
        if judge is not None and (self.folder / BEST).exists():
            best = self._best()
            self.network.load_state_dict(best.weights, strict=True)
            self.optimizer.load_state_dict(dict(best.optimizer))
        self._save(FINAL)
        if self.processes.is_first:
            (self.folder / LATEST).unlink(missing_ok=True)
        return True

    @property
    def is_settled(self) -> bool:
        """Whether all further steps are of one kind, compiled or not (engine/compilation.py)."""
        return self._gradients.is_settled

    def progress(self) -> float:
        """The part of the schedule that is over, from 0 to 1; 1 when its patience is."""
        patience = self.setup.schedule.patience
        if patience is not None and epochs_without_gain(self.records) >= patience:
            return 1.0
        # Until it was measured: a batch without its way backward costs half a step.
        batch_s = self._epoch_s() / max(1, self.iteration) / 2
        schedule, validation_s, judge_s = self.setup.schedule, self._validation_s, self._judge_s
        reserved_s = batch_s * self._judge_batches if judge_s is None else judge_s
        reserved_s += batch_s * schedule.validation_iterations if validation_s is None else validation_s
        if validation_s is None and schedule.budget_s is not None:
            # The first steps may be slow.
            reserved_s = min(reserved_s, schedule.budget_s / 2)
        spent_s = sum(record.seconds for record in self.records) + self._epoch_s()
        return schedule.progress(self.epoch, spent_s, reserved_s + 2 * self._saving_s)

    def _agreed_progress(self) -> float:
        """By the first process's clock."""
        return self.processes.first_number(self.progress())

    def step(self, batch: Batch) -> float:
        """One optimiser step; the loss before it, of all processes' batches together. Raises TrainingDiverged when loss
        or gradient is not finite: the weights are still those from before."""
        images, labels = batch
        self.network.train()
        self._gradients.before_step(images, labels)
        started = time.perf_counter()
        loss = self._gradients(images, labels)
        value = self.processes.join_gradients(self.network.parameters(), loss)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.setup.schedule.gradient_norm)
        # In fp16 a gradient may overflow: the scaler then leaves this step out and scales less.
        if not math.isfinite(value) or (self._scaler is None and not math.isfinite(float(norm))):
            raise TrainingDiverged(
                f"epoch {self.epoch}, iteration {self.iteration}: the loss is {value}, the norm of its gradient "
                f"{float(norm)}; try a lower learning rate, or float32 instead of half precision"
            )
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self._gradients.after_step(time.perf_counter() - started)
        return value

    def _waiting(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """`stop`, which waits first for as long as a pause is asked for; asked by all processes together."""
        paused = self.processes.agreed(self.pause.is_asked)

        def asked() -> bool:
            if paused():
                self._save(LATEST)
                if self.setup.device.type == "cuda":
                    torch.cuda.empty_cache()  # for whoever it waits for
                self.pause.wait(stop, paused)
            return stop()

        return asked

    def _train_epoch(self, batches: BatchStream, stop: Callable[[], bool]) -> bool:
        """The steps that the epoch still lacks, or as many as the budget has time for; False when stopped."""
        for batch in batches.epoch(self.epoch, self.setup.schedule.iterations, first=self.iteration):
            if stop():
                return False
            progress = self._agreed_progress()
            if progress >= 1 and self._losses:
                break
            follow_schedule(self.optimizer, self.setup.schedule.rate(progress))
            self._losses.append(self.step(batch))
            self.iteration += 1
            wait_s = max(self._save_every_s, self._saving_s / _MOST_TIME_FOR_SAVING)
            if self.pause.now() - self._last_saved >= wait_s:
                self._save(LATEST)
        return True

    def _validate(self, batches: BatchStream, stop: Callable[[], bool]) -> tuple[float, PatchFigures] | None:
        """Mean loss, and what was measured on the patches; None when stopped."""
        started, losses = self.pause.now(), []
        configuration = self.setup.configuration
        found = PatchValidation(
            self.setup.labels,
            spacing_mm=configuration.spacing_mm,
            batch_size=configuration.batch_size,
            samples=self._samples,
        )
        self.network.eval()
        with torch.no_grad():
            for images, target in batches.epoch(self.epoch, self.setup.schedule.validation_iterations):
                if stop():
                    return None
                outputs = self._step.logits(images)
                losses.append(float(self.loss(outputs, target)))
                found.add(outputs[0], target)
        self._validation_s = self.pause.now() - started
        total = torch.tensor([math.fsum(losses)], dtype=torch.float64)
        self.processes.add_up(total)
        found.join(self.processes.add_up)
        return float(total) / len(losses), found.figures

    def _judged(self, judge: Judge) -> CompositeScore | None:
        started = self.pause.now()
        whole = judge(self.network, self.epoch)
        if whole is not None:
            self._judge_s = self.pause.now() - started
        return whole

    def _best(self) -> TrainingState:
        """The best checkpoint. Raises TrainingRefused when it is not this training's, which keeps its latest."""
        best = read_state(self.folder / BEST)
        found = difference(best.own["identity"], self.identity)
        if found is not None:
            self._save(LATEST)
            raise TrainingRefused(
                f"{self.folder.name}/{BEST} is of another training ({found}); remove this fold, and train it again"
            )
        return best

    def _close_epoch(
        self, validation_loss: float, patches: PatchFigures, whole: CompositeScore | None, *, judged: bool
    ) -> EpochRecord:
        mean, ema = averages(patches.dice_per_class, self.records)
        record = EpochRecord(
            epoch=self.epoch,
            learning_rate=self.optimizer.param_groups[-1]["lr"],  # the decoder's
            train_loss=math.fsum(self._losses) / len(self._losses),
            validation_loss=validation_loss,
            dice_per_class=patches.dice_per_class,
            patch_hd95_mm=patches.hd95_mm,
            mean_dice=mean,
            ema_dice=ema,
            seconds=self._epoch_s(),
            hold_out=whole,
        )
        self.records.append(record)
        self.epoch, self.iteration, self._losses = self.epoch + 1, 0, []
        self._spent_s, self._since = 0.0, self.pause.now()
        is_best = best_judged(self.records) is record if judged else self._best_ema is None or ema > self._best_ema
        self._best_ema = ema if self._best_ema is None else max(ema, self._best_ema)
        if is_best:
            self._save(BEST)
        return record

    def _epoch_s(self) -> float:
        return self._spent_s + self.pause.now() - self._since

    def source(self, stage: Literal["training", "validation"]) -> BatchSource:
        setup, configuration = self.setup, self.setup.configuration
        names = setup.training_cases if stage == "training" else setup.validation_cases
        initial = setup.augmentation.initial_patch_size if stage == "training" else configuration.patch_size
        return BatchSource(
            folder=setup.folder,
            names=names,
            labels=setup.labels,
            sampler=PatchSampler(
                seed=setup.seed,
                stage=stage,
                cases=len(names),
                batch_size=configuration.batch_size,
                patch_size=configuration.patch_size,
                initial_patch_size=initial,
                has_ignore_label=setup.labels.ignore_label is not None,
                rehearsal=RehearsalDraw.of(setup.rehearsal, names) if stage == "training" else None,
            ),
            plan=setup.augmentation,
            channels=setup.channels,
            samples=self._samples,
            device=setup.device,
            previous=setup.previous,
        )

    def _save(self, name: str) -> None:
        if not self.processes.is_first:
            return
        started = self.pause.now()
        state = TrainingState(
            weights=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=None if self._scaler is None else self._scaler.state_dict(),
            epoch=self.epoch,
            best_ema=self._best_ema,
            logging=nnunet_logging(self.records),
            init_args=self.setup.init_args,
            mirror_axes=self.setup.augmentation.inference_mirror_axes,
            own={
                "identity": self.identity,
                "threads": torch.get_num_threads(),
                "processes": self.processes.size,
                "iteration": self.iteration,
                "losses": list(self._losses),
                "spent_s": self._epoch_s(),
                "judge_s": self._judge_s,
                "records": [record.as_plain() for record in self.records],
            },
        )
        write_state(state, self.folder / name)
        self._last_saved = self.pause.now()
        self._saving_s = self._last_saved - started

    def _resume(self, name: str) -> None:
        state = read_state(self.folder / name)
        own, where = state.own, f"{self.folder.name}/{name}"
        found = difference(own["identity"], self.identity)
        if found is not None:
            raise TrainingRefused(
                f"{where} is of another training ({found}); train into another folder, or remove this one"
            )
        now = {"thread": torch.get_num_threads(), "process": self.processes.size}
        for what, number in now.items():
            before = own.get(f"{what}s", 1)
            if self.setup.deterministic and before != number:
                raise TrainingRefused(
                    f"{where} was trained with {before} {what}(s); deterministic mode needs as many again, not {number}"
                )
        self.network.load_state_dict(state.weights, strict=True)
        self.optimizer.load_state_dict(dict(state.optimizer))
        if self._scaler is not None and state.scaler is not None:
            self._scaler.load_state_dict(dict(state.scaler))
        self.epoch, self.iteration = state.epoch, own["iteration"]
        self._best_ema, self._losses, self._spent_s = state.best_ema, list(own["losses"]), own["spent_s"]
        self._judge_s = own.get("judge_s")
        self.records = [EpochRecord.from_plain(record) for record in own["records"]]
