"""One fold of one configuration, from preprocessed cases to a validated network (torch).

    train ─▶ checkpoint_final.pth ─▶ validate ─▶ validation/CASE.nii.gz, summary.json ─▶ pictures

    fold_X/  training.json        what was asked for, with the fold's cases
             training_log.txt     what happened, in lines with their time
             training_log.jsonl   one epoch a line
             progress.png         overlay_best.png  overlay_worst.png
             checkpoint_*.pth     validation/  validation_logits/

A cascade reads what the stage before it predicted, and a stage before a cascade predicts its cases for it
(engine/cascade_stage.py).

Each part is left out when it is there already, so that a fold that was stopped or killed anywhere is finished by
starting it again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from functools import cached_property

from torch import nn

from engine.augmentation_profile import AugmentationPlan
from engine.case_pictures import draw_best_and_worst
from engine.case_results import has_logits
from engine.data_digest import data_digest
from engine.errors import DatasetInvalid
from engine.experiment import (
    ALL,
    EPOCHS,
    LOG,
    LOGITS,
    PROGRESS,
    REQUEST,
    VALIDATION,
    check_disk,
    is_finished,
)
from engine.finished_fold import DATA, IDENTITY, refuse_other_training
from engine.fold_request import FoldReport, FoldRequest
from engine.json_writer import write_json
from engine.memory_probe import StepMemory, check_step, measure_step
from engine.metrics import CompositeScore, composite_score
from engine.prediction_record import claim_predictions, forget_predictions
from engine.preprocessed import open_case
from engine.provenance import this_software
from engine.sibling_folds import refuse_other_mirroring
from engine.sides import Mirroring, plan_mirroring
from engine.sliding_window import WindowGrid
from engine.splits import KEEPS_PATIENTS_TOGETHER, Split, hold_out
from engine.training import Trainer
from engine.training_checkpoint import FINAL, LATEST, init_args, weights_digest
from engine.training_lock import is_asked_to_stop, training_lock
from engine.training_log import EpochRecord, write_epochs
from engine.training_pause import TrainingPause
from engine.training_plots import draw_progress
from engine.training_processes import TrainingProcesses
from engine.training_setup import TrainingSetup
from engine.validated_fold import CHECKPOINT, ValidatedFold, checkpoint_digest
from engine.validation import STEP_SIZE, ModelInTraining, TorchBackend, cases_named, measure_on, validate

_REDRAW_EVERY_S = 30.0
# Of a checkpoint: the best, the latest or final one, and the next while it is written.
_CHECKPOINTS = 3
# Bytes a parameter: itself and its momentum, float32.
_BYTES = 8


def train_fold(
    request: FoldRequest,
    *,
    stop: Callable[[], bool] = lambda: False,
    report: FoldReport | None = None,
    processes: TrainingProcesses | None = None,
) -> bool:
    """True when the fold is trained and validated, False when it was told to stop: then it goes on when called again.

    Several `processes` call this together; the first one writes all but the validation's cases, which they divide.

    Raises TrainingRefused (another process trains it, it is finished or half done and of another training, or the stage
    before it is not trained), TrainingDiverged, DatasetInvalid, InputRejected, DiskTooSmall, MemoryExceeded,
    WorkerDied, OSError; the last checkpoint stays.
    """
    processes, report = processes or TrainingProcesses(), report or FoldReport()

    def asked() -> bool:
        return stop() or is_asked_to_stop(request.folder)

    with training_lock(request.folder) if processes.is_first else nullcontext():
        processes.on_first(lambda: request.experiment.prepare_model_folder(request.model_folder))
        fold = _Fold(request, asked, report, processes)
        try:
            if processes.on_first(fold.is_finished):
                return processes.on_first(
                    lambda: request.stage.complete(device=request.device, stop=asked, progress=report.case)
                )
            return fold.run()
        except Exception as error:
            fold.log(f"failed: {error}")
            raise


class _Fold:
    """One run of `train_fold`; its parts share the request."""

    def __init__(
        self, request: FoldRequest, stop: Callable[[], bool], report: FoldReport, processes: TrainingProcesses
    ) -> None:
        self.request, self.stop, self.report, self.processes = request, stop, report, processes
        self.experiment = request.experiment
        self.configuration = request.experiment.configuration(request.configuration)
        self.labels = self.experiment.dataset.json.labels
        self.split, self.held_out = self._cases()
        names = dict.fromkeys((*self.split.train, *self.held_out, *self.split.val))
        self.previous = request.stage.previous_stage(tuple(names))
        self.next_stages = request.stage.next_stages()
        self.mirroring = plan_mirroring(
            self.experiment.dataset, self.experiment.plans, self.configuration, request.sides, request.mirror
        )
        refuse_other_mirroring(request.folder, self.mirroring.axes, self.mirror_axes)
        self.pause = TrainingPause(request.folder, note=self.log)
        self._drawn = 0.0
        self._memory: StepMemory | None = None

    def is_finished(self) -> bool:
        """Trained and validated, with all that was asked for. Raises TrainingRefused where it is of another training
        than what is asked for, DatasetInvalid where its checkpoint has changed since it was validated."""
        folder = self.request.folder
        if not is_finished(folder):
            return False
        refuse_other_training(
            folder,
            self._request_json(),
            any_precision=self.request.any_precision,
            excluded=self.experiment.dataset.excluded_names,
        )
        validated = ValidatedFold(folder=folder, split=self.split, dataset=self.experiment.dataset)
        validated.check_checkpoint()
        ending = self.experiment.dataset.json.file_ending
        return all((folder / VALIDATION / f"{name}{ending}").exists() for name in self.split.val) and (
            not self.request.keeps_logits or all(has_logits(folder / LOGITS / f"{n}.npy") for n in self.split.val)
        )

    def run(self) -> bool:
        request, setup = self.request, self._setup()
        self.processes.on_first(lambda: self._check_memory(setup))
        trainer = Trainer(setup, request.folder, processes=self.processes, note=self.log, pause=self.pause)
        if self.processes.is_first:
            self._check_disk(trainer.network)
            self._begin(trainer)
        judge = self._judge if self.held_out else None
        if not trainer.run(
            stop=self.stop,
            report=lambda record: self._epoch(trainer, record),
            judge=judge,
            judge_batches=self._judge_batches(),
        ):
            if self.processes.is_first:
                self._write_epochs(trainer.records)
            self.log(f"stopped in epoch {trainer.epoch}; a checkpoint is written")
            return False
        if self.processes.is_first:
            self._write_epochs(trainer.records)
            self._draw(trainer.records)
        self.log(f"trained for {len(trainer.records)} epochs; {len(self.split.val)} cases are validated")
        weights = weights_digest(trainer.network.state_dict())
        self.processes.on_first(lambda: self._claim_predictions(weights))
        measured = validate(
            self._model(trainer.network, self.mirror_axes),
            self.experiment.dataset,
            self.split.val,
            request.folder / VALIDATION,
            logits_folder=request.folder / LOGITS if request.keeps_logits else None,
            next_stages=self.next_stages,
            stop=self._waiting_stop,
            progress=self.report.case,
            processes=self.processes,
        )
        if measured is None:
            self.log("stopped while cases were validated")
            return False
        score = composite_score(measured)
        self.log(f"validated: {describe(score)}")
        if self.processes.is_first:
            draw_best_and_worst(self.experiment.dataset, self.split.val, measured, request.folder)
            document = {
                **self._request_json(),
                "weights": weights,
                CHECKPOINT: checkpoint_digest(request.folder),
                "result": asdict(score),
            }
            write_json(document, request.folder / REQUEST)
        return True

    def _waiting_stop(self) -> bool:
        """Between two cases: waits while a pause is asked for."""
        self.pause.wait(self.stop)
        return self.stop()

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        return self._augmentation().inference_mirror_axes

    def log(self, text: str) -> None:
        """A line with its time in the fold's log, and to whoever listens; the first process's alone."""
        if not self.processes.is_first:
            return
        with (self.request.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")
        self.report.line(text)

    def _cases(self) -> tuple[Split, tuple[str, ...]]:
        """The fold without its hold-out, and the hold-out (empty without one)."""
        split, share = self.experiment.split(self.request.fold), self.request.profile.hold_out_share
        if share is None:
            return split, ()
        summaries = {case.name: case for case in self.experiment.fingerprint().cases}
        missing = [name for name in split.train if name not in summaries]
        if missing:
            raise DatasetInvalid(
                f"the fingerprint says nothing about {missing[0]} ({len(missing)} such); the hold-out needs volume and "
                "labels of every case: run `seggate plan` again"
            )
        parted = hold_out(
            [summaries[name] for name in split.train], patients=self.experiment.dataset.json.patients, share=share
        )
        return Split(train=parted.train, val=split.val), parted.val

    def _augmentation(self) -> AugmentationPlan:
        mirroring: Mirroring = self.mirroring
        return AugmentationPlan(
            profile=self.request.profile.augmentation,
            patch_size=self.configuration.patch_size,
            spacing_mm=self.configuration.spacing_mm,
            mirror_axes=mirroring.axes,
            lateral_axis=mirroring.lateral_axis,
            paired_labels=mirroring.paired_labels,
            masked_channels=tuple(i for i, masked in enumerate(self.configuration.use_mask_for_norm) if masked),
            previous_labels=() if self.previous is None else self.labels.foreground_labels,
        )

    def _setup(self) -> TrainingSetup:
        request, experiment = self.request, self.experiment
        fold = int(request.fold) if request.fold != ALL else ALL
        return TrainingSetup(
            configuration=self.configuration,
            batch_dice=self.configuration.batch_dice,
            labels=self.labels,
            channels=len(experiment.dataset.json.channel_names),
            folder=experiment.data_folder(request.configuration),
            training_cases=self.split.train,
            # The fold's validation cases stay untouched where there is a hold-out.
            validation_cases=self.held_out or self.split.val,
            augmentation=self._augmentation(),
            schedule=request.schedule,
            seed=request.seed + (fold if isinstance(fold, int) else 0),
            device=request.device,
            precision=request.precision,
            deterministic=request.deterministic,
            init_args=init_args(experiment.plans_json, request.configuration, fold, experiment.dataset.json.document),
            loader_threads=request.loader_threads,
            previous=self.previous,
            compile=request.compile,
            start=request.start,
            rehearsal=request.rehearsal,
        )

    def _model(self, network: nn.Module, mirror_axes: tuple[int, ...]) -> ModelInTraining:
        return ModelInTraining(
            plans=self.experiment.plans,
            configuration=self.configuration,
            labels=self.labels,
            backends=(TorchBackend(network),),
            mirror_axes=mirror_axes,
            previous=self.previous,
        )

    def _judge(self, network: nn.Module, epoch: int) -> CompositeScore | None:
        """The hold-out's whole cases, without mirrored passes: eight times faster, and alike for every epoch."""
        if epoch % self.request.profile.hold_out_every:
            return None
        model = self._model(network, ())
        measured = measure_on(
            model, self.experiment.dataset, self.held_out, stop=self._waiting_stop, processes=self.processes
        )
        return composite_score(measured)

    def _check_memory(self, setup: TrainingSetup) -> None:
        """A step is measured, by the first process, with the largest share of a batch that a process has. Raises
        MemoryExceeded."""
        if not self.request.probes or (self.request.folder / FINAL).exists():
            return
        place, batch_size = self.processes.place, setup.configuration.batch_size
        share = math.ceil(batch_size / self.processes.size)
        probed = replace(setup, configuration=replace(setup.configuration, batch_size=share))
        self._memory = measure_step(
            probed,
            label_entries=self.experiment.dataset.json.num_label_entries,
            planner=self.experiment.plans_json.get("experiment_planner_used"),
            alike=place.local_size,
        )
        self.log(str(self._memory))
        check_step(self._memory)

    def _judge_batches(self) -> int:
        """How many batches the hold-out's cases are as long as."""
        data, configuration = self.experiment.data_folder(self.request.configuration), self.configuration
        windows = 0
        for name in self.held_out:
            z, y, x = open_case(data, name, self.labels).image_CZYX.shape[1:]
            grid = WindowGrid(shape=(z, y, x), patch_size=configuration.patch_size, step_size=STEP_SIZE)
            windows += len(grid)
        return math.ceil(windows / configuration.batch_size)

    def _claim_predictions(self, weights: str) -> None:
        """Predictions that are there stay if the same weights made them, from the same data in the same way."""
        previous = None if self.previous is None else self.previous.digest
        made_by = [weights, list(self.mirror_axes), previous, self._data[DATA]]
        kept = claim_predictions(
            self.request.folder / VALIDATION,
            self.request.folder / LOGITS,
            hashlib.sha256(json.dumps(made_by).encode()).hexdigest(),
            cases_named(self.experiment.dataset, self.split.val),
            file_ending=self.experiment.dataset.json.file_ending,
        )
        if not kept:
            self.log("predictions of other weights are removed")

    @cached_property
    def _data(self) -> dict[str, object]:
        """What training.json has of the data and the trainer, as they were when this run began."""
        folder = self.experiment.data_folder(self.request.configuration)
        cases = (*self.split.train, *self.held_out, *self.split.val)
        return {DATA: data_digest(folder, cases), IDENTITY: self._setup().identity()}

    def _check_disk(self, network: nn.Module) -> None:
        needed = _CHECKPOINTS * _BYTES * sum(p.numel() for p in network.parameters())
        folder = self.request.folder
        data = self.experiment.data_folder(self.request.configuration)
        if self.request.keeps_logits or self.next_stages:
            for name in self.split.val:
                voxels = math.prod(open_case(data, name, self.labels).image_CZYX.shape[1:])
                needed += 2 * self.labels.num_heads * voxels if self.request.keeps_logits else 0
                needed += sum(stage.needed_bytes(name, voxels, self.configuration) for stage in self.next_stages)
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        check_disk(folder, needed - there, "checkpoints and validation")

    def _request_json(self) -> dict[str, object]:
        request = self.request
        return {
            "software": this_software(),
            "profile": request.profile.name,
            "configuration": request.configuration,
            "fold": request.fold,
            "schedule": asdict(request.schedule),
            "seed": request.seed,
            "precision": request.precision,
            "deterministic": request.deterministic,
            "memory": None if self._memory is None else self._memory.as_plain(),
            "mirror_axes": list(self.mirroring.axes),
            "inference_mirror_axes": list(self.mirror_axes),
            "train": list(self.split.train),
            "hold_out": list(self.held_out),
            "val": list(self.split.val),
            **self._data,
        }

    def _begin(self, trainer: Trainer) -> None:
        request, schedule = self.request, self.request.schedule
        write_json(self._request_json(), request.folder / REQUEST)
        if trainer.is_finished:
            return
        where = "goes on" if (request.folder / LATEST).exists() else "begins"
        if where == "begins":
            ending = self.experiment.dataset.json.file_ending
            forget_predictions(request.folder / VALIDATION, request.folder / LOGITS, file_ending=ending)
        self.log(
            f"{request.configuration}, fold {request.fold}: {where} at epoch {trainer.epoch} of {schedule.epochs} on "
            f"{request.device.type} in {request.precision}, {self.processes.size} process(es); "
            f"{len(self.split.train)} cases to train on, {len(self.held_out)} held out, {len(self.split.val)} to "
            "validate on"
        )
        for note in (self.mirroring.note, *self._notes()):
            if note:
                self.log(note)
        if (schedule.epochs, schedule.iterations) != (1000, 250):
            self.log(
                f"nnU-Net cannot go on from these checkpoints with this schedule ({schedule.epochs} x "
                f"{schedule.iterations}): its own trainer assumes 1000 epochs of 250 iterations"
            )

    def _notes(self) -> list[str]:
        """What is particular about the fold's cases."""
        notes = []
        both = set(self.held_out) & set(self.split.val)
        if both:
            notes.append(
                f"{len(both)} held-out case(s) are validated too: the hold-out chose the weights and the fold `{ALL}` "
                "was trained on the others, so that its validation says little"
            )
        left = () if self.request.fold == ALL else self.experiment.in_no_fold()
        if left:
            notes.append(f"{len(left)} case(s) of the dataset are in no fold ({left[0]}): see `seggate plan --splits`")
        if (mixed := self.experiment.mixed_patients([self.request.fold])) is not None:
            notes.append(f"{mixed}: {KEEPS_PATIENTS_TOGETHER}")
        return notes

    def _epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        whole = "" if record.hold_out is None else f"; hold-out: {describe(record.hold_out)}"
        hd95 = "" if record.patch_hd95_mm is None else f"HD95 {record.patch_hd95_mm:.2f} mm, "
        self.log(
            f"epoch {record.epoch}: loss {record.train_loss:.4f}, validation {record.validation_loss:.4f}, "
            f"Dice {record.mean_dice:.4f} (moving average {record.ema_dice:.4f}), "
            f"{hd95}learning rate {record.learning_rate:.2g}, {record.seconds:.1f} s{whole}"
        )
        self._write_epochs(trainer.records)
        if time.monotonic() - self._drawn >= _REDRAW_EVERY_S:
            self._draw(trainer.records)
        self.report.epoch(record, self.request.schedule.epochs)

    def _write_epochs(self, records: Sequence[EpochRecord]) -> None:
        write_epochs(records, self.request.folder / EPOCHS)

    def _draw(self, records: Sequence[EpochRecord]) -> None:
        draw_progress(records, self.request.folder / PROGRESS, labels=[label.name for label in self.labels.foreground])
        self._drawn = time.monotonic()


def describe(score: CompositeScore) -> str:
    """The three means in words."""
    if score.dice is None or score.hd95_mm is None or score.surface_dice is None:
        return "no label on either side"
    return f"Dice {score.dice:.4f}, HD95 {score.hd95_mm:.2f} mm, surface Dice {score.surface_dice:.4f}"
