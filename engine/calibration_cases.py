"""A bundle's calibration from its cross-validation: each case through the fold that never saw it, as it is deployed.

The predictor that serves later runs here too, with one fold and all final configurations, so that the evidence is made
by the same code. A case costs what its validation did. What is known of a case is a line in a file:

    <results>/<dataset>/calibration/<run>.jsonl

`run` names networks and rules; a case whose line is there, and whose files are the same, is not predicted again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.bundle import Bundle
from engine.calibration import MIN_CASES, KnownCase, calibrate
from engine.dataset import Case, read_case
from engine.errors import InputRejected, MemoryExceeded
from engine.experiment import Experiment
from engine.metrics import measure_case
from engine.parallel import Progress
from engine.predictor import Predictor
from engine.quality_estimate import FEATURES_VERSION, Calibration, Evidence, Found

FOLDER = "calibration"
_FORMAT = 2
_EVIDENCE = ("volume_ml", "components", "touches_border", "mirror_dice", "border_entropy", "fold_dice")


@dataclass(frozen=True, kw_only=True)
class _Line:
    """What the file has of a case. `fold` predicted it. `segments`: by label name, the evidence with `dice` and
    `hd95_mm`."""

    stamp: str
    fold: str
    segments: Mapping[str, Mapping[str, Any]]


def calibrate_bundle(
    bundle: Bundle,
    experiment: Experiment,
    folds: Sequence[str],
    results: Path,
    *,
    progress: Progress = lambda _done, _total: None,
) -> Calibration:
    """Of the labels that have enough cases; nothing is predicted where there are too few cases at all.

    Raises InputRejected or MemoryExceeded with the case's name, DatasetInvalid for splits that name no case.
    """
    fold_of = {name: fold for fold in folds for name in experiment.split(fold).val}
    cases = [case for case in experiment.dataset.cases if case.name in fold_of]
    names = [label.name for label in bundle.labels]
    if len(cases) < MIN_CASES:
        note = f"{len(cases)} cases were validated; an estimate of quality without a reference needs {MIN_CASES}"
        return replace(calibrate({}), notes=(note,))
    file = results / experiment.name / FOLDER / f"{_run(bundle)}.jsonl"
    lines = _known(file, cases, fold_of)
    missing = [case for case in cases if case.name not in lines]
    done = len(lines)
    progress(done, len(cases))
    if missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        with Predictor(bundle) as predictor, file.open("a", encoding="utf-8") as stream:
            for case in missing:
                line = _measure(predictor, experiment, case, fold_of[case.name])
                # On a line of its own even after one that was cut off.
                stream.write("\n" + json.dumps({"case": case.name, **vars(line)}, allow_nan=False) + "\n")
                stream.flush()
                lines[case.name] = line
                done += 1
                progress(done, len(cases))
    patients = experiment.dataset.json.patients
    known: dict[str, list[KnownCase]] = {name: [] for name in names}
    for case in cases:
        for name in names:
            segment = lines[case.name].segments[name]
            # The prefixes keep a case's name from being taken for a patient's.
            patient = f"patient {patients[case.name]}" if case.name in patients else f"case {case.name}"
            known[name].append(
                KnownCase(
                    patient=patient,
                    evidence=Evidence.of(segment),
                    dice=segment["dice"],
                    hd95_mm=segment["hd95_mm"],
                )
            )
    return calibrate(known)


def describe(calibration: Calibration) -> str:
    """What the estimate was found to be worth, in a sentence; empty where there is none."""
    found = [label.found for label in calibration.labels.values()]
    if not found:
        return ""
    most = max(label.cases for label in calibration.labels.values())
    parts = [
        f"the lower 90 % bound of the Dice held for {_span(found, lambda f: f.dice_coverage, percent=True)}",
        f"the upper one of the HD95 for {_span(found, lambda f: f.hd95_coverage, percent=True)} of the cases",
        f"rank correlation of estimated and true Dice {_span(found, lambda f: f.dice_correlation)}",
    ]
    return f"Estimate of quality without a reference, cross-fitted on {most} cases: {'; '.join(parts)}."


def _span(found: Sequence[Found], key: Callable[[Found], float | None], *, percent: bool = False) -> str:
    """The lowest and highest over the labels."""
    values = [value for one in found if (value := key(one)) is not None]
    if not values:
        return "unknown"
    shown = [f"{100 * value:.0f}" if percent else f"{value:.2f}" for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(shown)) + (" %" if percent else "")


def _measure(predictor: Predictor, experiment: Experiment, case: Case, fold: str) -> _Line:
    loaded = read_case(case, experiment.dataset.json)
    bundle = predictor.bundle
    try:
        prediction = predictor.predict(loaded.volume, folds=[fold])
    except (InputRejected, MemoryExceeded) as error:
        raise type(error)(f"calibration, {case.name}: {error}; --no-calibration exports without an estimate") from error
    measured = measure_case(
        loaded.labels.array,
        prediction.labels.array,
        loaded.labels.geometry.spacing_mm,
        list(dict.fromkeys(label.region for label in bundle.labels)),
        ignore_label=bundle.label_manager.ignore_label,
    )
    segments = {}
    for label, segment in zip(bundle.labels, prediction.segments, strict=True):
        evidence = {name: getattr(segment, name) for name in _EVIDENCE}
        metrics = measured[label.region]
        segments[label.name] = {**evidence, "dice": metrics.dice, "hd95_mm": metrics.hd95_mm}
    return _Line(stamp=_stamp(case), fold=fold, segments=segments)


def _known(file: Path, cases: Sequence[Case], fold_of: Mapping[str, str]) -> dict[str, _Line]:
    """The lines of these cases that are still true, predicted by the fold that validates them; one that was cut off
    counts as none."""
    if not file.exists():
        return {}
    stamps = {case.name: _stamp(case) for case in cases}
    found = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if stamps.get(line["case"]) == line["stamp"] and fold_of[line["case"]] == line["fold"]:
            found[line["case"]] = _Line(stamp=line["stamp"], fold=line["fold"], segments=line["segments"])
    return found


def _stamp(case: Case) -> str:
    """Changes with the case's files."""
    states = [(path.name, path.stat()) for path in (*case.channels.values(), case.label)]
    return _digest([[name, state.st_size, state.st_mtime_ns] for name, state in states])


def _run(bundle: Bundle) -> str:
    """Changes with everything that decides what the bundle predicts, and with what is written down of it."""
    rules = {
        "format": [_FORMAT, FEATURES_VERSION],
        "weights": bundle.weights_digest,
        "files": {
            name: hashlib.sha256((bundle.root / name).read_bytes()).hexdigest()
            for name in ("plans.json", "dataset.json", "postprocessing.json")
            if (bundle.root / name).exists()
        },
        "configurations": [
            [c.name, [fold.fold for fold in c.folds], c.mirror_axes, c.previous_stage] for c in bundle.configurations
        ],
        "ensemble": bundle.ensemble,
        "step_size": bundle.step_size,
        "orientation": bundle.contract.orientation,
    }
    return _digest(rules)[:16]


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
