"""`seggate evaluate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.dataset import DATASET_JSON, read_dataset_json
from engine.errors import DatasetInvalid, EngineError
from engine.evaluation import evaluate_pairs, find_pairs
from engine.labels import LabelManager
from engine.metrics import SUMMARY, evaluated_regions, summary, write_summary
from engine.parallel import default_processes
from gateway.commands.output import print_json, progress_bar, say, table

COLUMNS = {"Dice": "Dice", "HD95": "HD95 (mm)", "SurfaceDice": "surface Dice (2 mm)"}


def evaluate(
    predictions: Path,
    references: Path,
    *,
    dataset_json: Path | None,
    out: Path | None,
    chill: bool,
    processes: int | None,
    as_json: bool,
) -> int:
    """0 when every case was measured and the summary was written, 1 when not (the message names the case)."""
    try:
        described = read_dataset_json(_dataset_json(dataset_json, predictions, references))
        pairs = find_pairs(predictions, references, described.file_ending, chill=chill)
        warnings: list[str] = []
        with progress_bar("evaluating", hidden=as_json) as advance:
            rows = evaluate_pairs(
                pairs,
                described.labels,
                processes=processes or default_processes(),
                progress=advance,
                warn=warnings.append,
            )
        path = out or predictions / SUMMARY
        write_summary(path, rows)
    except (EngineError, OSError) as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
        say(f"seggate: not evaluated: {error}")
        return 1
    found = summary(rows)
    for text in warnings:
        say(f"seggate: warning: {text}")
    if as_json:
        means = plain_means(found, described.labels)
        print_json({"ok": True, "cases": len(rows), "summary": str(path), "warnings": warnings, **means})
    else:
        present_means(found, described.labels, f"{len(rows)} cases")
        say(f"summary: {path}")
    return 0


def plain_means(found: Mapping[str, Any], labels: LabelManager) -> dict[str, Any]:
    """`foreground_mean` and `labels` (by name) of a summary; null for what has no value."""
    return {
        "foreground_mean": {key: _plain(value) for key, value in found["foreground_mean"].items()},
        "labels": {
            name: {key: _plain(value) for key, value in found["mean"][region].items()}
            for name, region in region_keys(labels).items()
        },
    }


def present_means(found: Mapping[str, Any], labels: LabelManager, title: str) -> None:
    means = [(name, found["mean"][key]) for name, key in region_keys(labels).items()]
    rows: Sequence[tuple[str, ...]] = [
        (name, *(_figure(mean.get(key, math.nan)) for key in COLUMNS))
        for name, mean in [*means, ("all", found["foreground_mean"])]
    ]
    table(title, ("label", *COLUMNS.values()), rows)


def region_keys(labels: LabelManager) -> dict[str, str]:
    """The key in a summary of each label or region, by name."""
    known = {region: str(region[0]) if len(region) == 1 else str(region) for region in evaluated_regions(labels)}
    return {label.name: known[label.region] for label in labels.foreground}


def _dataset_json(given: Path | None, predictions: Path, references: Path) -> Path:
    """The one that was named, else that of the references, else that of the predictions, in or above the folder."""
    if given is not None:
        return given
    found = [
        next((path for folder in (side, side.resolve().parent) if (path := folder / DATASET_JSON).is_file()), None)
        for side in (references, predictions)
    ]
    there = [path for path in found if path is not None]
    if not there:
        raise DatasetInvalid(f"no {DATASET_JSON} lies with predictions or references; name it with --dataset-json")
    if len(there) == 2:
        ours, theirs = (_meaning(path) for path in there)
        if ours != theirs:
            raise DatasetInvalid(
                f"{DATASET_JSON} of the references and of the predictions name other labels, or other values for them; "
                "name the right one with --dataset-json"
            )
    return there[0]


def _meaning(path: Path) -> tuple[object, ...]:
    """What the values of a label map stand for."""
    labels = read_dataset_json(path).labels
    named = frozenset((label.name, label.region) for label in labels.foreground)
    return named, labels.regions_class_order, labels.ignore_label


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
