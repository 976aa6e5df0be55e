"""A fold's validation as it counts today: for the cases that the splits name now, against the references of now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.dataset import Case, RawDataset
from engine.errors import DatasetInvalid
from engine.evaluation import Pair, evaluate_pairs
from engine.experiment import REQUEST, VALIDATION
from engine.json_reader import Reader, read_json
from engine.metrics import SUMMARY, read_summary, summarize, summary, write_summary_document
from engine.parallel import Progress
from engine.prediction_record import PredictionRecord, read_record, reference_stamps, write_record
from engine.splits import SPLITS_JSON, Split
from engine.training_identity import changed_cases


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

    def check_split(self) -> None:
        """Raises DatasetInvalid when the fold was trained with other validation cases than its split names."""
        self._check_cases(self.split.val)

    def _check_cases(self, measured: Sequence[str]) -> None:
        """Cases that the dataset has no more (or leaves out) are nobody's."""
        there = {case.name for case in self.dataset.cases}
        trained: Sequence[str] = measured
        if (self.folder / REQUEST).exists():
            request = Reader(
                read_json(self.folder / REQUEST, error=DatasetInvalid), where=REQUEST, error=DatasetInvalid
            )
            trained = request.texts("val", lengths=(0, 10**7), default=measured)
        for names in (measured, trained):
            changed = changed_cases("validation cases", [name for name in names if name in there], self.split.val)
            if changed is not None:
                raise DatasetInvalid(
                    f"{self.folder.parent.name}: {self.folder.name} is of other folds than those of {SPLITS_JSON} "
                    f"({changed}): remove {self.folder} and train it again, or put the old {SPLITS_JSON} back"
                )

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
