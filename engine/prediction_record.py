"""Whose predictions lie in a fold's validation, and which references they were measured against.

    validation/predicted_by.json   what predicted (a digest of the weights and of what they were given), and of each
                                   reference its size and time of last change when it was measured

Predictions of other weights are never taken for those of the checkpoint beside them; without the file nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.dataset import Case
from engine.errors import DatasetInvalid
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.metrics import SUMMARY

PREDICTED_BY = "predicted_by.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PredictionRecord:
    """`predictor` is the digest; `references` have size in bytes and time of last change in ns, by case."""

    predictor: str
    references: Mapping[str, tuple[int, int]]


def claim_predictions(
    folder: Path, logits_folder: Path, predictor: str, references: Sequence[Case], *, file_ending: str
) -> bool:
    """Before cases are predicted into `folder` and `logits_folder`: removes what others predicted, and notes who
    predicts now and what is measured against. False when predictions had to go.

    Raises OSError; DatasetInvalid for a reference that is absent.
    """
    try:
        record = read_record(folder)
    except DatasetInvalid:  # after a power failure
        record = None
    kept = record is not None and record.predictor == predictor
    removed = False if kept else forget_predictions(folder, logits_folder, file_ending=file_ending)
    write_record(folder, PredictionRecord(predictor=predictor, references=reference_stamps(references)))
    return not removed


def forget_predictions(folder: Path, logits_folder: Path, *, file_ending: str) -> bool:
    """Removes label maps, logits, summary and record; True where there was a label map or logits."""
    predictions = [*folder.glob(f"*{file_ending}"), *logits_folder.glob("*.npy")]
    # First: without it what is left counts for nothing.
    for path in (folder / PREDICTED_BY, folder / SUMMARY, *predictions):
        path.unlink(missing_ok=True)
    return bool(predictions)


def read_record(folder: Path) -> PredictionRecord | None:
    """None where there is none: nnU-Net predicted, or an earlier version. Raises DatasetInvalid when it is damaged."""
    path = folder / PREDICTED_BY
    if not path.exists():
        return None
    document = Reader(read_json(path, error=DatasetInvalid), where=path.name, error=DatasetInvalid)
    if document.integer("format", 0, 2**16) != FORMAT:
        raise document.fail("format", f"is not {FORMAT}")
    references = document.child("references")
    stamps = {name: references.integers(name, 0, 2**63, lengths=(2, 2)) for name in references.keys()}  # noqa: SIM118
    return PredictionRecord(
        predictor=document.text("predictor"),
        references={name: (stamp[0], stamp[1]) for name, stamp in stamps.items()},
    )


def write_record(folder: Path, record: PredictionRecord) -> None:
    write_json(
        {
            "format": FORMAT,
            "predictor": record.predictor,
            "references": {name: list(stamp) for name, stamp in record.references.items()},
        },
        folder / PREDICTED_BY,
    )


def reference_stamps(cases: Iterable[Case]) -> dict[str, tuple[int, int]]:
    """Raises DatasetInvalid for a label map that is not there."""
    stamps = {}
    for case in cases:
        try:
            state = case.label.stat()
        except OSError as error:
            raise DatasetInvalid(f"{case.name}: its label map cannot be read: {error.strerror}") from error
        stamps[case.name] = (state.st_size, state.st_mtime_ns)
    return stamps
