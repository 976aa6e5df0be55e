"""Which changes of the images the drift check notices, how soon, and how often it is wrong.

    python -m benchmarks.drift [--json] [--work FOLDER] [--processes N] [--splits N] [--window N]
    python -m benchmarks.drift --per-year [--years N]   alarms that nothing has caused (benchmarks/drift_years.py)
    python -m benchmarks.drift --scale                  seconds of a check over thousands of studies (drift_scale.py)

The 200 hippocampus cases are live traffic of the demo model. Each change is made before the pipeline, on
u = (x - p0.5) / (p99.5 - p0.5) of each study: gamma and contrast on u clipped to 0...1, noise of so many u, a gain that
normalisation removes, and another manufacturer. The facts of a study are those that the gateway keeps.

In each split of the cases 140 are the reference and the others are live; thresholds come from the reference alone. A
null window are unchanged live studies, a changed window has the change in each study. `detection_rate` is the share of
changed windows with any alarm; `delay_studies` the median number of changed studies in a window, the others unchanged,
from which on there is one; `false_alarm_rate` the share of null windows with an alarm in any stream and
`false_alarm_upper` the upper end of Wilson's 95 % interval. Facts are kept in FOLDER: started again, it goes on. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import load_bundle
from engine.dataset import Case, open_dataset, read_case
from engine.drift_check import StudyRow, check_drift, stream_names, streams_of
from engine.drift_thresholds import Thresholds, calibrate_thresholds
from engine.intensity_baseline import summarize_study
from engine.predictor import Predictor
from engine.volume import Volume
from gateway.monitoring.study_rows import study_row
from gateway.results.quality import judge

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "gateway" / "demo" / "model"
REFERENCE = 140
FloatArray = NDArray[np.float64]

UNCHANGED, MANUFACTURER = "unchanged", "manufacturer"
IMAGE_CHANGES: Mapping[str, Callable[[FloatArray, np.random.Generator], FloatArray]] = {
    "gamma 1.1": lambda u, _: np.clip(u, 0, 1) ** 1.1,
    "gamma 1.3": lambda u, _: np.clip(u, 0, 1) ** 1.3,
    "noise 0.05": lambda u, random: u + random.normal(0, 0.05, u.shape),
    "noise 0.10": lambda u, random: u + random.normal(0, 0.10, u.shape),
    "contrast 1.15": lambda u, _: np.clip(0.5 + 1.15 * (u - 0.5), 0, 1),
    "gain 1.3": lambda u, _: u,  # the gain itself is below, since it is one of x and not of u
}
GAINS = {"gain 1.3": 1.3}
HARMLESS = ("gain 1.3",)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for the facts of the studies (default: a temporary one)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--window", type=int, default=30)
    parser.add_argument("--per-year", action="store_true", help="alarms in years in which nothing changes")
    parser.add_argument("--years", type=int, default=200, help="how many years, with --per-year")
    parser.add_argument("--scale", action="store_true", help="how long a check over thousands of studies takes")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    changes = (UNCHANGED,) if options.per_year or options.scale else (UNCHANGED, *IMAGE_CHANGES)
    with tempfile.TemporaryDirectory(prefix="seggate-drift-") as scratch:
        facts = make_facts(options.work or Path(scratch), options.processes, changes=changes, quiet=options.json)
    if options.per_year:
        from benchmarks.drift_years import alarms_per_year

        rows = [_row(entry) for entry in facts[UNCHANGED]]
        baseline = load_bundle(MODEL, verify=False).evidence.baseline
        assert baseline is not None
        found = alarms_per_year(rows, baseline, years=options.years, processes=options.processes, quiet=options.json)
    elif options.scale:
        from benchmarks.drift_scale import seconds_of_a_check

        found = seconds_of_a_check(facts[UNCHANGED], quiet=options.json)
    else:
        found = measure(facts, splits=options.splits, window=options.window, quiet=options.json)
    print(json.dumps(found))
    return 0


def make_facts(work: Path, processes: int, *, changes: Sequence[str], quiet: bool) -> dict[str, list[dict[str, Any]]]:
    """Of each change the facts of every case, in the cases' order."""
    work.mkdir(parents=True, exist_ok=True)
    shared = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared"))
    dataset = open_dataset(shared / "data" / "Dataset004_Hippocampus")
    facts: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(processes) as pool:
        for change in changes:
            make = partial(_facts_of, work, change, dataset.folder)
            facts[change] = list(pool.map(make, dataset.cases, chunksize=4))
            if not quiet:
                print(f"{change}: {len(facts[change])} studies", file=sys.stderr)
    return facts


def measure(facts: Mapping[str, list[dict[str, Any]]], *, splits: int, window: int, quiet: bool) -> dict[str, Any]:
    rows = {change: [_row(entry) for entry in entries] for change, entries in facts.items()}
    rows[MANUFACTURER] = [
        replace(row, categories={**row.categories, "manufacturer": "Another"}) for row in rows[UNCHANGED]
    ]
    changes = [change for change in rows if change != UNCHANGED]
    null: list[bool] = []
    found: dict[str, list[bool]] = {change: [] for change in changes}
    delays: dict[str, list[int]] = {change: [] for change in changes}
    streams: dict[str, dict[str, int]] = {change: {} for change in changes}
    null_windows, changed_windows = math.ceil(2000 / splits), math.ceil(200 / splits)
    for split in range(splits):
        random = np.random.default_rng(split)
        order = random.permutation(len(rows[UNCHANGED]))
        reference, live = order[:REFERENCE], order[REFERENCE:]
        known = [rows[UNCHANGED][index] for index in reference]
        thresholds = calibrate_thresholds(
            streams_of(known, names=stream_names(known)), studies=len(known), window=window
        )
        for _ in range(null_windows):
            chosen = random.choice(live, window, replace=False)
            null.append(_alarm(known, [rows[UNCHANGED][i] for i in chosen], thresholds) is not None)
        for change in changes:
            for _ in range(changed_windows):
                chosen = random.choice(live, window, replace=False)
                first = _alarm(known, [rows[change][i] for i in chosen], thresholds)
                found[change].append(first is not None)
                if first is not None:
                    streams[change][first] = streams[change].get(first, 0) + 1
            delays[change].append(_delay(known, rows, change, list(chosen), thresholds))
        if not quiet:
            print(f"split {split}: {sum(null)} of {len(null)} null windows with an alarm", file=sys.stderr)
    same = sum(_labels(a) == _labels(b) for a, b in zip(facts[UNCHANGED], facts[HARMLESS[0]], strict=True))
    return {
        "machine": f"{platform.processor() or platform.machine()}",
        "splits": splits,
        "window": window,
        "reference": REFERENCE,
        "null_windows": len(null),
        "false_alarm_rate": round(statistics.fmean(null), 5),
        "false_alarm_upper": round(_wilson_upper(sum(null), len(null)), 5),
        "changes": [
            {
                "name": change,
                "windows": len(found[change]),
                "detection_rate": round(statistics.fmean(found[change]), 4),
                "delay_studies": statistics.median(delays[change]),
                "first_streams": streams[change],
            }
            for change in changes
        ],
        "studies_with_the_same_labels_under_gain": same,
    }


def _facts_of(work: Path, change: str, folder: Path, case: Case) -> dict[str, Any]:
    """What the gateway would keep of a case; from `work` where it is there."""
    name = hashlib.sha256(f"{change} {case.name} {(MODEL / 'bundle.json').read_text()}".encode()).hexdigest()[:24]
    path = work / f"{name}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    bundle, predictor = _predictor()
    loaded = read_case(case, open_dataset(folder).json)
    volume = Volume(array=_changed(loaded.volume.array, change, case.name), geometry=loaded.volume.geometry)
    prediction = predictor.predict(volume)
    baseline = bundle.evidence.baseline
    assert baseline is not None
    volumes_ml = [segment.volume_ml for segment in prediction.segments]
    summary = summarize_study(volume, prediction.labels, baseline.channels, volumes_ml, grid=baseline.grid)
    measurements = [asdict(segment) for segment in prediction.segments]
    verdict, _ = judge(measurements, mean_confidence=prediction.mean_confidence, bundle=bundle, doubts=())
    entry = {
        "acquisition": {
            "categories": {"modality": "MR", "manufacturer": "One", "contrast-agent": "no"},
            "numbers": {"slices": float(volume.array.shape[1])},
        },
        "image": asdict(summary),
        "measurements": measurements,
        "verdict": str(verdict),
        "confidence": prediction.mean_confidence,
        "labels": hashlib.sha256(prediction.labels.array.tobytes()).hexdigest(),
    }
    partial_path = path.with_suffix(f".{os.getpid()}")
    partial_path.write_text(json.dumps(entry))
    partial_path.replace(path)
    return entry


def _changed(array: NDArray[np.float32], change: str, case: str) -> NDArray[np.float32]:
    """Scaled to 16 bit first, as a scanner would store it; some cases reach 1.7 million."""
    factor = min(1.0, 65535.0 / float(array.max()))
    x = np.round(array.astype(np.float64) * factor)
    if change != UNCHANGED:
        low, high = np.percentile(x, (0.5, 99.5))
        seed = int.from_bytes(hashlib.sha256(f"{change} {case}".encode()).digest()[:8])
        u = IMAGE_CHANGES[change]((x - low) / (high - low), np.random.default_rng(seed))
        x = (u * (high - low) + low) * GAINS.get(change, 1.0)
    return x.astype(np.float32)


_LOADED: list[tuple[Any, Predictor]] = []


def _predictor() -> tuple[Any, Predictor]:
    """One for each process."""
    if not _LOADED:
        bundle = load_bundle(MODEL)
        _LOADED.append((bundle, Predictor(bundle, device="cpu", threads=1)))
    return _LOADED[0]


def _row(entry: Mapping[str, Any]) -> StudyRow:
    return study_row(
        entry["acquisition"],
        entry["image"],
        entry["measurements"],
        verdict=entry["verdict"],
        confidence=entry["confidence"],
    )


def _labels(entry: Mapping[str, Any]) -> str:
    return str(entry["labels"])


def _alarm(known: list[StudyRow], live: list[StudyRow], thresholds: Thresholds) -> str | None:
    """The stream that is furthest, where there is an alarm."""
    report = check_drift(known, live, thresholds=thresholds)
    return report.drifted[0].name if report.severity != "none" else None


def _delay(
    known: list[StudyRow],
    rows: Mapping[str, list[StudyRow]],
    change: str,
    chosen: list[int],
    thresholds: Thresholds,
) -> int:
    """The fewest changed studies in the window with an alarm; one more than the window where there is none."""
    low, high = 1, len(chosen) + 1
    while low < high:
        count = (low + high) // 2
        live = [rows[change if place < count else UNCHANGED][index] for place, index in enumerate(chosen)]
        if _alarm(known, live, thresholds) is not None:
            high = count
        else:
            low = count + 1
    return low


def _wilson_upper(events: int, trials: int) -> float:
    """The upper end of Wilson's interval at 95 %."""
    z, share = 1.959964, events / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre + spread) / (1 + z * z / trials)


if __name__ == "__main__":
    sys.exit(main())
