"""report.html of a model: one file with figures and pictures in it, for people."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine.dataset import DatasetJson
from engine.experiment import ALL, BEST_CASE, EPOCHS, PROGRESS, REQUEST, VALIDATION, WORST_CASE
from engine.metrics import SUMMARY, read_summary
from engine.whole_file import whole_file

REPORT = "report.html"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{border-bottom:1px solid #ccc;padding:.3rem .8rem;"
    "text-align:right}th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)
_LEFT_OUT = (
    f"<p>The fold <code>{ALL}</code> is left out of these means: it was trained on the cases that it validates.</p>"
)
_METRICS = {"Dice": "Dice", "HD95": "HD95 (mm)", "SurfaceDice": "surface Dice (2 mm)"}


def write_report(folder: Path, dataset_json: DatasetJson) -> Path:
    """Of a model's folder (<trainer>__<plans>__<configuration>), with what its folds have so far; returns the file."""
    folds = sorted(path for path in folder.glob("fold_*") if path.is_dir())
    parts = [
        f"<h1>{escape(folder.name)}</h1>",
        f"<p>{escape(folder.parent.name)}: {len(dataset_json.channel_names)} channel(s) "
        f"({escape(', '.join(dataset_json.channel_names))}), labels "
        f"{escape(', '.join(label.name for label in dataset_json.labels.foreground))}.</p>",
        _folds_table(folds),
        _labels_table(folds, dataset_json),
        "<p>Means over cases, then labels. One side empty: Dice 0, HD95 the volume's diagonal; both empty: left out. "
        "HD95 and surface Dice are those of engine/surfaces.py.</p>",
    ]
    for fold in folds:
        parts.append(f"<h2>{escape(fold.name)}</h2>")
        parts += [_picture(fold / name) for name in (PROGRESS, BEST_CASE, WORST_CASE) if (fold / name).exists()]
    page = f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{_STYLE}</style>"
    with whole_file(folder / REPORT) as partial:
        partial.write_text(page + "\n".join(parts), encoding="utf-8")
    return folder / REPORT


def read_epochs(fold: Path) -> list[dict[str, Any]]:
    """The lines of a fold's training_log.jsonl; none before the first epoch ended."""
    path = fold / EPOCHS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _folds_table(folds: Sequence[Path]) -> str:
    rows = []
    for fold in folds:
        epochs = read_epochs(fold)
        request = json.loads((fold / REQUEST).read_text(encoding="utf-8")) if (fold / REQUEST).exists() else {}
        summary = fold / VALIDATION / SUMMARY
        found = read_summary(summary)["foreground_mean"] if summary.exists() else {}
        rows.append(
            [
                fold.name,
                f"{len(request.get('train', []))} / {len(request.get('hold_out', []))} / {len(request.get('val', []))}",
                f"{len(epochs)} of {request['schedule']['epochs'] if request else '?'}",
                f"{sum(line['seconds'] for line in epochs) / 60:.1f}",
                request.get("precision", ""),
                *(_figure(found.get(key)) for key in _METRICS),
            ]
        )
    heads = ["fold", "cases: trained, held out, validated", "epochs", "minutes", "precision"]
    return _table([*heads, *_METRICS.values()], rows)


def _labels_table(folds: Sequence[Path], dataset_json: DatasetJson) -> str:
    """Means over the validated cases of all folds but `all`, which knows every case that it validates."""
    own = [fold for fold in folds if (fold / VALIDATION / SUMMARY).exists()]
    cases = [
        entry["metrics"]
        for fold in own
        if fold.name != f"fold_{ALL}"
        for entry in read_summary(fold / VALIDATION / SUMMARY)["metric_per_case"]
    ]
    left_out = _LEFT_OUT if any(fold.name == f"fold_{ALL}" for fold in own) else ""
    if not cases:
        return left_out or "<p>No fold was validated yet.</p>"
    rows = []
    for label in dataset_json.labels.foreground:
        key = str(label.region[0]) if len(label.region) == 1 else str(label.region)
        means = [_mean(case[key].get(metric) for case in cases) for metric in _METRICS]
        rows.append([label.name, str(len(cases)), *map(_figure, means)])
    return _table(["label", "validated cases", *_METRICS.values()], rows) + left_out


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _figure(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'
