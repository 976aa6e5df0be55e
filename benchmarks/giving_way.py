"""What a training beside a gateway costs the studies: C-STORE and the whole way, with and without it.

    python -m benchmarks.giving_way DATASET [--json] [--repeats N]

DATASET is Dataset004_Hippocampus in nnU-Net's format; nnU-Net's own network is trained on it, on this machine, beside a
gateway with PACS and EMR on loopback. Studies arrive one after the other in three states: `alone`, `gives way` (as the
gateway trains: low priority, half the cores, paused while a result waits for a model), `in the way` (the same command
as a person would start it). Medians of seconds from the first byte to the last C-STORE answer, and from there to
verified. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.overhead import ROOT, copy_study, default_study
from gateway.demo.stage import Stage
from gateway.demo.story import follow, send, set_the_stage
from gateway.durable import Stopped
from gateway.learning.training_child import TrainingChild
from gateway.learning.training_steps import results_wait
from gateway.settings import load_settings
from storage.database import Database

CONFIGURATION = "3d_fullres"
STATES = ("alone", "gives way", "in the way")
_BEGUN_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.giving_way", description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--study", type=Path, default=default_study())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seggate-giving-way-") as scratch:
        report = measure(options.dataset, options.study, options.repeats, Path(scratch), quiet=options.json)
    print(json.dumps(report))
    return 0


def measure(dataset: Path, study: Path, repeats: int, scratch: Path, *, quiet: bool) -> dict[str, Any]:
    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    places = ["--preprocessed", str(scratch / "preprocessed")]
    plan = ["plan", str(dataset), *places, "--configuration", CONFIGURATION]
    subprocess.run([sys.executable, "-m", "gateway.cli", *plan], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    train = ["train", "run", str(dataset), *places, "--configuration", CONFIGURATION, "--fold", "0", "--no-probe"]
    stage = Stage(scratch / "stage")
    rows: list[dict[str, Any]] = []
    try:
        number = 0
        first = copy_study(study, scratch / "first", number)
        set_the_stage(stage, first[0], ROOT / "config" / "routes.toml", tell)
        quiet_s = load_settings(stage.config).gateway.completeness.quiet_s
        _one(stage, *first, quiet_s)
        for state in STATES:
            results = scratch / state.replace(" ", "-")
            with _training(state, [*train, "--results", str(results)], results, stage):
                for _ in range(repeats):
                    number += 1
                    seconds = _one(stage, *copy_study(study, scratch / f"copy{number}", number), quiet_s)
                    rows.append({"state": state, **seconds})
                    tell(json.dumps(rows[-1]))
    finally:
        stage.stop()
    medians = {
        state: {
            key: round(statistics.median(row[key] for row in rows if row["state"] == state), 3)
            for key in ("store_s", "way_s", "model_s")
        }
        for state in STATES
    }
    return {
        "medians": medians,
        "repeats": repeats,
        "all_verified": all(row["verified"] for row in rows),
        "pacs": stage.pacs,
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()},
        "rows": rows,
    }


def _one(stage: Stage, folder: Path, uid: str, quiet_s: float) -> dict[str, Any]:
    answered: list[datetime] = []
    began = datetime.now(UTC)
    send(stage, folder, lambda _done, _total: answered.append(datetime.now(UTC)))
    outcome = follow(stage, uid, timeout_s=600, tell=lambda _line: None)
    result = next(r for r in outcome.document["results"] if r["runtime"])
    end = max(d["updated_at"] for d in result["deliveries"])
    return {
        "verified": outcome.verified,
        "store_s": round((answered[-1] - began).total_seconds(), 3),
        "way_s": round((end - answered[-1]).total_seconds() - quiet_s, 3),
        "model_s": round(sum(v for k, v in result["runtime"]["seconds"].items() if k != "read"), 3),
    }


@contextmanager
def _training(state: str, command: list[str], results: Path, stage: Stage) -> Iterator[None]:
    """A training in this state at work, until the block ends."""
    if state == "alone":
        yield
        return
    ending = _giving_way(command, results, stage) if state == "gives way" else _in_the_way(command, results)
    try:
        deadline = time.monotonic() + _BEGUN_S
        while not list(results.rglob("training_log.txt")):
            if time.monotonic() > deadline:
                raise SystemExit("the training did not begin")
            time.sleep(0.2)
        time.sleep(10)  # steps are under way
        yield
    finally:
        ending()


def _giving_way(command: list[str], results: Path, stage: Stage) -> Callable[[], None]:
    settings = load_settings(stage.config)
    database, stop = Database(settings.database_url), threading.Event()
    child = TrainingChild(stop=stop, studies_wait=lambda: results_wait(database))
    trainer = "nnUNetTrainer__nnUNetPlans__"
    fold = results / Path(command[2]).resolve().name / f"{trainer}{CONFIGURATION}" / "fold_0"

    def run() -> None:
        with suppress(Stopped):
            child.run(command, log=results / "training.log", pause_file=fold / "pause")

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()
        database.close()

    return end


def _in_the_way(command: list[str], results: Path) -> Callable[[], None]:
    results.mkdir(parents=True)
    with (results / "training.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "gateway.cli", *command], cwd=ROOT, stdout=log, stderr=log)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait()

    return end


if __name__ == "__main__":
    sys.exit(main())
