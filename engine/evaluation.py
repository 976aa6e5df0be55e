"""A folder of label maps against a folder of references: nnU-Net's summary.json, with HD95 and surface Dice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.dataset import grid_difference, undeclared_labels
from engine.errors import DatasetInvalid, InputRejected
from engine.labels import LabelManager
from engine.metrics import CaseMetrics, evaluated_regions, measure_case
from engine.nifti import read_whole_numbers
from engine.parallel import Progress, map_cases

Row = tuple[str, str, CaseMetrics]
"""Reference file, prediction file, metrics."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two label maps of a case."""

    name: str
    reference: Path
    prediction: Path


def find_pairs(predictions: Path, references: Path, ending: str, *, chill: bool = False) -> list[Pair]:
    """Files of both folders with one name. As in nnU-Net a reference without a prediction is an error unless `chill`;
    a prediction without a reference always is.

    Raises DatasetInvalid with the first such name and how many there are.
    """
    found, there = (_names(folder, ending) for folder in (predictions, references))
    for missing, where, remedy in (
        (sorted(found - there), "has no reference", "remove it, or add its reference"),
        ([] if chill else sorted(there - found), "has no prediction", "predict it, or leave it out with --chill"),
    ):
        if missing:
            raise DatasetInvalid(f"{missing[0]} {where} ({len(missing)} such): {remedy}")
    if not found:
        raise DatasetInvalid(f"{predictions} holds no file that ends with {ending}")
    return [
        Pair(name=name, reference=references / f"{name}{ending}", prediction=predictions / f"{name}{ending}")
        for name in sorted(found)
    ]


def evaluate_pairs(
    pairs: list[Pair],
    labels: LabelManager,
    *,
    processes: int,
    progress: Progress | None = None,
    surfaces: bool = True,
    warn: Callable[[str], None] | None = None,
) -> list[Row]:
    """A value that is not declared is of no label, as in nnU-Net; `warn` is told of it, with case, file and value.

    Raises InputRejected with the case that cannot be read or whose two files do not lie on one grid, DatasetInvalid for
    an undeclared value where nobody would be warned, WorkerDied.
    """
    evaluate = partial(_evaluate, labels=labels, surfaces=surfaces)
    rows = []
    for row, unexpected in map_cases(evaluate, pairs, processes=processes, progress=progress):
        for text in unexpected:
            if warn is None:
                raise DatasetInvalid(text)
            warn(f"{text}; it counts as none of them")
        rows.append(row)
    return rows


def _evaluate(pair: Pair, *, labels: LabelManager, surfaces: bool) -> tuple[Row, list[str]]:
    """And what is undeclared in the files."""
    try:
        reference, prediction = read_whole_numbers(pair.reference), read_whole_numbers(pair.prediction)
    except InputRejected as error:
        raise type(error)(f"{pair.name}: {error}") from error
    difference = grid_difference(reference.geometry, prediction.geometry)
    if difference is not None and difference.is_error:
        text = difference.text.replace("the image", "the reference")
        raise InputRejected(f"{pair.name}: {pair.prediction.name}: {text}")
    metrics = measure_case(
        reference.array,
        prediction.array,
        reference.geometry.spacing_mm,
        evaluated_regions(labels),
        ignore_label=labels.ignore_label,
        surfaces=surfaces,
    )
    unexpected = [
        f"{pair.name}: {file} {path.name}: {text}"
        for file, path, found in (
            ("reference", pair.reference, reference),
            ("prediction", pair.prediction, prediction),
        )
        if (text := undeclared_labels(found, labels))
    ]
    # A read-only view cannot travel to another process.
    return (str(pair.reference), str(pair.prediction), dict(metrics)), unexpected


def _names(folder: Path, ending: str) -> set[str]:
    try:
        return {
            path.name.removesuffix(ending)
            for path in folder.iterdir()
            if path.name.endswith(ending) and not path.name.startswith(".")
        }
    except OSError as error:
        raise DatasetInvalid(f"{folder}: cannot be read: {error.strerror}") from error
