"""A fold's validation as it counts today: for the cases that the splits name now, against the references of now, and
only where the network that was validated is the one that is there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.dataset import Case, RawDataset
from engine.errors import DatasetInvalid
from engine.evaluation import Pair, evaluate_pairs
from engine.experiment import FINAL, LOGITS, REQUEST, VALIDATION, Experiment
from engine.finished_fold import IDENTITY
from engine.json_reader import Reader, read_json
from engine.metrics import SUMMARY, read_summary, summarize, summary, write_summary_document
from engine.parallel import Progress
from engine.prediction_record import PREDICTED_BY, PredictionRecord, read_record, reference_stamps, write_record
from engine.splits import SPLITS_JSON, Split
from engine.stage_predictions import stage_digest, stage_folder
from engine.training_identity import changed_cases

CHECKPOINT = "checkpoint"
"""Key of training.json: SHA-256 of the final checkpoint's file when it was validated."""
PREVIOUS_STAGE = "previous stage"
"""Of the trainer's identity."""
_MOST_CASES = 10**7


def validated_fold(
    experiment: Experiment, results: Path, *, trainer: str, configuration: str, fold: str
) -> ValidatedFold:
    """Raises DatasetInvalid where the fold's figures are not those of the networks that are there: it was trained with
    other plans or validation cases, its checkpoint has changed since, or the stage before it in a cascade has."""
    model = experiment.model_folder(results, trainer, configuration)
    experiment.check_model_folder(model)
    found = ValidatedFold(folder=model / f"fold_{fold}", split=experiment.split(fold), dataset=experiment.dataset)
    found.check_split()
    found.check_checkpoint()
    stages = experiment.previous_stages(configuration)
    if stages:
        before = experiment.model_folder(results, trainer, stages[-1])
        found.check_previous_stage(stage_folder(before, configuration), stages[-1])
    return found


def checkpoint_digest(folder: Path) -> str:
    """Of a fold's final checkpoint. Raises OSError."""
    with (folder / FINAL).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class ValidatedFold:
    """`folder` is the fold's; `split` what the splits say of it now."""

    folder: Path
    split: Split
    dataset: RawDataset

    def entries(self, *, processes: int, progress: Progress) -> list[dict[str, Any]]:
        """`metric_per_case` of the split's validation cases, each with its prediction in this folder. Cases whose
        reference has changed are measured anew, and the fold's summary.json is written again.

        Raises DatasetInvalid when the fold was validated on other cases than its split names; InputRejected, OSError.
        """
        validation = self.folder / VALIDATION
        ending = self.dataset.json.file_ending
        measured: dict[str, dict[str, Any]] = {}
        for entry in read_summary(validation / SUMMARY)["metric_per_case"]:
            file = Path(entry["prediction_file"]).name
            # The folder may have been moved since its summary was written.
            measured[file.removesuffix(ending)] = {**entry, "prediction_file": str(validation / file)}
        self._check_cases(tuple(measured))
        cases = {case.name: case for case in self.dataset.cases}
        stale = self._stale([cases[name] for name in self.split.val])
        if stale:
            measured |= self._measured_anew(stale, processes=processes, progress=progress)
            write_summary_document(validation / SUMMARY, summarize(list(measured.values())))
            self._note_references(stale)
        return [measured[name] for name in self.split.val]

    def predictor(self) -> str | None:
        """The digest of what predicted the validation; None where nobody wrote it down (nnU-Net). Raises
        DatasetInvalid."""
        record = read_record(self.folder / VALIDATION)
        return None if record is None else record.predictor

    def check_checkpoint(self) -> None:
        """Raises DatasetInvalid when the checkpoint is not the one that was validated. One that is absent, or of which
        nobody wrote it down, is not compared."""
        request = self._request()
        if request is None or CHECKPOINT not in request or not (self.folder / FINAL).exists():
            return
        if request.text(CHECKPOINT) != checkpoint_digest(self.folder):
            raise DatasetInvalid(
                f"{self.folder.parent.name}: {self.folder.name}/{FINAL} has changed since it was validated: the "
                f"figures beside it are another network's. Put the old file back, or remove {self.folder} and train it "
                f"again; where nnU-Net trained and validated it further, remove its {REQUEST}, {LOGITS} and "
                f"{VALIDATION}/{PREDICTED_BY}"
            )

    def check_previous_stage(self, stage: Path, configuration: str) -> None:
        """Raises DatasetInvalid when the predictions of the previous stage, `configuration`, in `stage` are not those
        that the fold learned from: its network would be given what it does not know."""
        request = self._request()
        identity = None if request is None else request.child(IDENTITY, {})
        if request is None or identity is None or identity.raw(PREVIOUS_STAGE, None) is None:
            return
        groups = [request.texts(key, lengths=(0, _MOST_CASES), default=()) for key in ("train", "hold_out", "val")]
        names = tuple(dict.fromkeys(name for group in groups for name in group))
        if identity.text(PREVIOUS_STAGE) != stage_digest(stage, names):
            raise DatasetInvalid(
                f"{self.folder.parent.name}: {self.folder.name} learned from other predictions of {configuration} than "
                f"those of now: {configuration} was trained anew. Remove {self.folder} and train it again"
            )

    def excluded_since(self) -> tuple[str, ...]:
        """Cases that the fold was trained or validated on and that the dataset excludes now."""
        request = self._request()
        if request is None:
            return ()
        groups = (request.texts(key, lengths=(0, _MOST_CASES), default=()) for key in ("train", "hold_out", "val"))
        return tuple(sorted({name for group in groups for name in group} & self.dataset.excluded_names))

    def check_split(self) -> None:
        """Raises DatasetInvalid when the fold was trained with other validation cases than its split names."""
        self._check_cases(self.split.val)

    def _check_cases(self, measured: Sequence[str]) -> None:
        """Cases that the dataset has no more (or leaves out) are nobody's."""
        there = {case.name for case in self.dataset.cases}
        trained: Sequence[str] = measured
        request = self._request()
        if request is not None:
            trained = request.texts("val", lengths=(0, _MOST_CASES), default=measured)
        for names in (measured, trained):
            changed = changed_cases("validation cases", [name for name in names if name in there], self.split.val)
            if changed is not None:
                raise DatasetInvalid(
                    f"{self.folder.parent.name}: {self.folder.name} is of other folds than those of {SPLITS_JSON} "
                    f"({changed}): remove {self.folder} and train it again, or put the old {SPLITS_JSON} back"
                )

    def _request(self) -> Reader | None:
        path = self.folder / REQUEST
        if not path.exists():
            return None
        return Reader(read_json(path, error=DatasetInvalid), where=REQUEST, error=DatasetInvalid)

    def _stale(self, cases: Sequence[Case]) -> list[Case]:
        """Those whose reference is not the one that was measured against."""
        record, now = read_record(self.folder / VALIDATION), reference_stamps(cases)
        if record is not None:
            return [case for case in cases if record.references.get(case.name) != now[case.name]]
        written = (self.folder / VALIDATION / SUMMARY).stat().st_mtime_ns
        return [case for case in cases if now[case.name][1] > written]

    def _measured_anew(self, cases: Sequence[Case], *, processes: int, progress: Progress) -> dict[str, dict[str, Any]]:
        pairs = [
            Pair(
                name=case.name,
                reference=case.label,
                prediction=self.folder / VALIDATION / f"{case.name}{self.dataset.json.file_ending}",
            )
            for case in cases
        ]
        found = summary(evaluate_pairs(pairs, self.dataset.json.labels, processes=processes, progress=progress))
        return dict(zip((case.name for case in cases), found["metric_per_case"], strict=True))

    def _note_references(self, cases: Sequence[Case]) -> None:
        record = read_record(self.folder / VALIDATION)
        if record is not None:
            references = {**record.references, **reference_stamps(cases)}
            write_record(self.folder / VALIDATION, PredictionRecord(predictor=record.predictor, references=references))
