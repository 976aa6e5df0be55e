"""Which components to remove from a model's label maps, chosen on its cross-validation (ART-12).

nnU-Net's rule: keep the largest component of all foreground together where the mean Dice gets better and no label's
gets worse; then, label by label, keep its largest component where its own mean Dice gets better. With `most_components`
above 1 the same is tried for the 2, 3, ... largest, and the best number is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.evaluation import Pair, Row
from engine.json_writer import write_json
from engine.labels import Label, LabelManager
from engine.metrics import SUMMARY, CaseMetrics, evaluated_regions, measure_case, summary, write_summary
from engine.nifti import is_flat, read_label_map, write_nifti
from engine.parallel import Progress, map_cases
from engine.postprocessing import KEEP_LARGEST, KEEP_SEVERAL, KeepLargest, apply_postprocessing
from engine.volume import LabelMap

POSTPROCESSING_JSON = "postprocessing.json"
POSTPROCESSED = "postprocessed"

Steps = tuple[KeepLargest, ...]


@dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """`steps` in order; `before` and `after` are the summaries (Dice, no surfaces) without and with them."""

    steps: Steps
    before: dict[str, Any]
    after: dict[str, Any]


def find_postprocessing(
    pairs: Sequence[Pair],
    labels: LabelManager,
    *,
    most_components: int,
    processes: int,
    progress: Progress | None = None,
) -> Postprocessing:
    """Reads every case once for all foreground together and once for each label. Raises InputRejected, WorkerDied."""
    counts = range(1, most_components + 1)
    rounds = [labels.foreground, *((label,) for label in labels.foreground if len(labels.foreground) > 1)]
    steps: Steps = ()
    before = best = None
    for number, together in enumerate(rounds):

        def advance(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(number * total + done, len(rounds) * total)

        tried = [steps, *((*steps, _keep(together, count)) for count in counts)]
        plain, *changed = _summaries(pairs, labels, tried, processes=processes, progress=advance)
        before, best = before or plain, plain
        for candidate, found in zip(tried[1:], changed, strict=True):
            of_label = _dice(found, together[0]) > _dice(best, together[0])
            if _is_better(found, best, plain) if number == 0 else of_label:
                steps, best = candidate, found
    if before is None or best is None:
        raise ValueError("labels without foreground have no post-processing")
    return Postprocessing(steps=steps, before=before, after=best)


def write_postprocessing(found: Postprocessing, labels: LabelManager, path: Path) -> None:
    """nnU-Net's postprocessing.json. Steps that keep several components are not nnU-Net's and are read here only."""
    functions, arguments = [], []
    for step in found.steps:
        value = _labels_or_regions(step, labels)
        functions.append(KEEP_LARGEST if step.count == 1 else KEEP_SEVERAL)
        arguments.append({"labels_or_regions": value, **({"count": step.count} if step.count > 1 else {})})
    document = {
        "input_folder": _without_cases(found.before),
        "postprocessed": _without_cases(found.after),
        "postprocessing_fns": functions,
        "postprocessing_kwargs": arguments,
    }
    write_json(_without_nan(document), path)


def apply_to_folder(
    pairs: Sequence[Pair], steps: Steps, labels: LabelManager, folder: Path, *, processes: int
) -> dict[str, Any]:
    """The label maps after the steps, with their summary.json, in `folder`; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = map_cases(partial(_apply, steps=steps, labels=labels, folder=folder), pairs, processes=processes)
    write_summary(folder / SUMMARY, rows)
    return summary(rows)


def _keep(together: Sequence[Label], count: int) -> KeepLargest:
    values = tuple(dict.fromkeys(value for label in together for value in label.region))
    return KeepLargest(values=values, count=count)


def _labels_or_regions(step: KeepLargest, labels: LabelManager) -> Any:
    """As nnU-Net spells it: a list of all labels or regions, one label, or one region."""
    regions = [label.region for label in labels.foreground]
    if step.values in regions:
        return list(step.values) if labels.has_regions else step.values[0]
    return [list(region) if labels.has_regions else region[0] for region in regions]


def _is_better(found: dict[str, Any], best: dict[str, Any], plain: dict[str, Any]) -> bool:
    """The mean Dice is strictly better than the best so far, and no label's is worse than without the step."""
    worse = any(found["mean"][key]["Dice"] < plain["mean"][key]["Dice"] for key in plain["mean"])
    return bool(found["foreground_mean"]["Dice"] > best["foreground_mean"]["Dice"]) and not worse


def _dice(found: dict[str, Any], label: Label) -> float:
    key = str(label.region[0]) if len(label.region) == 1 else str(label.region)
    value: float = found["mean"][key]["Dice"]
    return value


def _summaries(
    pairs: Sequence[Pair], labels: LabelManager, tried: Sequence[Steps], *, processes: int, progress: Progress
) -> list[dict[str, Any]]:
    """One summary for each of the lists of steps."""
    measured = map_cases(
        partial(_measure, labels=labels, tried=tuple(tried)), pairs, processes=processes, progress=progress
    )
    return [
        summary([(str(p.reference), str(p.prediction), case[i]) for p, case in zip(pairs, measured, strict=True)])
        for i in range(len(tried))
    ]


def _measure(pair: Pair, *, labels: LabelManager, tried: Sequence[Steps]) -> list[CaseMetrics]:
    reference, prediction = read_label_map(pair.reference), read_label_map(pair.prediction)
    measured = []
    for steps in tried:
        changed = prediction.array.copy()
        apply_postprocessing(changed, steps)
        measured.append(_metrics(reference, changed, labels, surfaces=False))
    return measured


def _apply(pair: Pair, *, steps: Steps, labels: LabelManager, folder: Path) -> Row:
    reference, prediction = read_label_map(pair.reference), read_label_map(pair.prediction)
    array = prediction.array.copy()
    apply_postprocessing(array, steps)
    path = folder / pair.prediction.name
    write_nifti(LabelMap(array=array, geometry=prediction.geometry), path, flat=is_flat(pair.prediction))
    return str(pair.reference), str(path), _metrics(reference, array, labels, surfaces=True)


def _metrics(reference: LabelMap, array: Any, labels: LabelManager, *, surfaces: bool) -> CaseMetrics:
    measured = measure_case(
        reference.array,
        array,
        reference.geometry.spacing_mm,
        evaluated_regions(labels),
        ignore_label=labels.ignore_label,
        surfaces=surfaces,
    )
    # A read-only view cannot travel to another process.
    return dict(measured)


def _without_cases(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "metric_per_case"}


def _without_nan(value: Any) -> Any:
    """JSON that every reader takes: null for what has no value."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and value != value else value
