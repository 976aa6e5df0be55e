"""What a fine-tuning learns of a new site, and what it forgets of the old one.

    python -m benchmarks.learning --work FOLDER [--json] [--smoke] [--rehearsal SHARE] [--seeds N] [--only-seed N]
                                  [--threads N]

Of the 200 hippocampus cases, in an order that never changes: 100 train the champion (demo plans, fold `all`), 40 are
locked and stay as they are (old set), 60 are another site's, of which 40 are fine-tuned on and 20 are locked (shifted
set). No case is in two sets. The champion is fine-tuned on the 40 by `engine.fine_tuning`, with half of the samples of
old cases, once for each seed, and every network is measured on both locked sets: mean foreground Dice of whole cases,
mirrored passes.

The other site's images are made before everything else, from u = (x - p0.5) / (p99.5 - p0.5) clipped to 0...1:
`SHIFT`, an inversion recovery whose magnitude was stored. Tissue darker than the level `NULL` had not recovered beyond
zero, and comes out bright: |u - NULL| / (1 - NULL). NULL was chosen with the champion alone, among 0.2, 0.3, 0.4, 0.5.

Targets: the shift costs the champion 0.05 Dice at least; the fine-tuned networks regain half of it on the mean, and
lose 0.01 at most on the old set. What is done is kept in FOLDER: killed and started again, it goes on. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoint import load_network, read_checkpoint
from engine.dataset import Case, RawDataset, open_dataset
from engine.experiment import EPOCHS, open_experiment
from engine.fine_tuning import FineTuning, fine_tune
from engine.json_writer import write_json
from engine.metrics import composite_score
from engine.nifti import read_nifti, write_image
from engine.rehearsal import SHARE
from engine.trained_model import open_trained_model
from engine.training_checkpoint import FINAL
from engine.training_processes import TrainingProcesses
from engine.validation import ModelInTraining, TorchBackend, measure_on
from engine.whole_file import whole_file
from gateway.commands.train import TrainOptions, fold_requests, run_folds
from gateway.demo.make_model import CONFIGURATION, PLANS, plan_demo
from gateway.stop_signal import stop_requests

ROOT = Path(__file__).resolve().parents[1]
DATASET = "Dataset004_Hippocampus"
ORDER_SEED = 21
NULL = 0.3
SHIFT = f"|u - {NULL}| / {1 - NULL:.2g}"
LEAST_LOSS, LEAST_REGAINED, MOST_FORGOTTEN = 0.05, 0.5, 0.01


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many cases each set has, and how long is trained."""

    champion: int = 100
    old_locked: int = 40
    site: int = 40
    site_locked: int = 20
    champion_epochs: int = 16
    champion_iterations: int = 250
    epochs: int = 10
    iterations: int = 250


SMOKE = Sizes(
    champion=8,
    old_locked=3,
    site=4,
    site_locked=3,
    champion_epochs=2,
    champion_iterations=20,
    epochs=2,
    iterations=5,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--rehearsal", type=float, default=SHARE, help="share of old cases (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only-seed", type=int, help="once the champion is trained: this one, as one of several processes"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--smoke", action="store_true", help="few cases and steps: whether it runs, not what it learns")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = SMOKE if options.smoke else Sizes()
    with stop_requests() as stop:
        if options.only_seed is not None:
            return only_seed(options.work, sizes, options.rehearsal, options.only_seed, stop)
        report = measure(
            options.work,
            sizes,
            seeds=options.seeds,
            rehearsal=options.rehearsal,
            threads=options.threads,
            stop=stop,
            quiet=options.json,
        )
    if report is None:
        print("stopped; the same command goes on", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def measure(
    work: Path, sizes: Sizes, *, seeds: int, rehearsal: float, threads: int, stop: threading.Event, quiet: bool
) -> dict[str, Any] | None:
    """None when it was told to stop."""
    sets = make_sets(work, sizes)
    champion = train_champion(work, sets["champion"], sizes, threads, stop)
    if champion is None:
        return None
    old, unchanged, shifted = (
        measured(work, champion, sets[name]) for name in ("old_locked", "site_locked_unchanged", "site_locked")
    )
    loss = unchanged - shifted
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        folder = fine_tuned(work, champion, sets, sizes, rehearsal, seed, stop)
        if folder is None:
            return None
        found = {name: measured(work, folder, sets[name]) for name in ("site_locked", "old_locked")}
        rows.append(
            {
                "seed": seed,
                "shifted": round(found["site_locked"], 4),
                "old": round(found["old_locked"], 4),
                "regained_share": round((found["site_locked"] - shifted) / loss, 4) if loss else 0.0,
                "old_loss": round(old - found["old_locked"], 4),
                "training_minutes": round(_minutes(folder), 1),
            }
        )
        if not quiet:
            print(rows[-1], file=sys.stderr)
    regained = statistics.fmean(row["regained_share"] for row in rows)
    forgotten = statistics.fmean(row["old_loss"] for row in rows)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {threads} threads",
        "shift": SHIFT,
        "cases": {name: len(dataset.cases) for name, dataset in sets.items()},
        "champion_minutes": round(_minutes(champion), 1),
        "champion_old": round(old, 4),
        "champion_unchanged": round(unchanged, 4),
        "champion_shifted": round(shifted, 4),
        "loss": round(loss, 4),
        "rehearsal_share": round(rehearsal, 4),
        "fine_tuned": rows,
        "regained_share_mean": round(regained, 4),
        "old_loss_mean": round(forgotten, 4),
        "met": {
            f"loss >= {LEAST_LOSS}": loss >= LEAST_LOSS,
            f"regained_share_mean >= {LEAST_REGAINED}": regained >= LEAST_REGAINED,
            f"old_loss_mean <= {MOST_FORGOTTEN}": forgotten <= MOST_FORGOTTEN,
        },
    }


def only_seed(work: Path, sizes: Sizes, rehearsal: float, seed: int, stop: threading.Event) -> int:
    """The exit code: 0 when it is trained."""
    found = [path.parents[1] for path in (work / "champion").glob(f"results/*/*/fold_all/{FINAL}")]
    if not found:
        raise SystemExit(f"{work}: there is no champion yet; start the benchmark without --only-seed first")
    return int(fine_tuned(work, found[0], make_sets(work, sizes), sizes, rehearsal, seed, stop) is None)


def _minutes(model_folder: Path) -> float:
    """Of its epochs, however often it was interrupted."""
    lines = (model_folder / "fold_all" / EPOCHS).read_text().splitlines()
    return sum(float(json.loads(line)["seconds"]) for line in lines) / 60


def make_sets(work: Path, sizes: Sizes) -> dict[str, RawDataset]:
    """The sets as raw datasets of their own; what is there is left."""
    shared = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared"))
    whole = open_dataset(shared / "data" / DATASET)
    order = np.random.RandomState(ORDER_SEED).permutation(len(whole.cases))
    cases = [whole.cases[index] for index in order]
    first = 0
    sets = {}
    for name in ("champion", "old_locked", "site", "site_locked"):
        count = getattr(sizes, name)
        part = cases[first : first + count]
        # The parts begin at the same places whatever their sizes.
        first += getattr(Sizes(), name)
        sets[name] = _make_set(work / name / "raw" / DATASET, whole, part, shifted=name.startswith("site"))
        if name == "site_locked":
            unchanged = work / "site_locked_unchanged" / "raw" / DATASET
            sets["site_locked_unchanged"] = _make_set(unchanged, whole, part, shifted=False)
    return sets


def _make_set(folder: Path, whole: RawDataset, cases: Sequence[Case], *, shifted: bool) -> RawDataset:
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for case in cases:
        image = folder / "imagesTr" / case.channels[0].name
        label = folder / "labelsTr" / case.label.name
        if not image.exists() and shifted:
            volume = read_nifti([case.channels[0]])
            write_image(shift(volume.array[0]), volume.geometry, image)
        for source, target in ((case.channels[0], image), (case.label, label)):
            if not target.exists():
                with whole_file(target) as made:
                    made.write_bytes(source.read_bytes())
    write_json({**whole.json.document, "numTraining": len(cases)}, folder / "dataset.json")
    return open_dataset(folder)


def shift(array_ZYX: NDArray[np.float32], null: float = NULL) -> NDArray[np.float32]:
    """The other site's image of the same anatomy, in the values of the original."""
    x = array_ZYX.astype(np.float64)
    low, high = np.percentile(x, (0.5, 99.5))
    u = np.clip((x - low) / (high - low), 0, 1)
    shifted: NDArray[np.float32] = (np.abs(u - null) / (1 - null) * (high - low) + low).astype(np.float32)
    return shifted


def train_champion(work: Path, raw: RawDataset, sizes: Sizes, threads: int, stop: threading.Event) -> Path | None:
    """The champion's model folder; None when told to stop."""
    preprocessed, results = work / "champion" / "preprocessed", work / "champion" / "results"
    plan_demo(raw.folder, preprocessed)
    experiment = open_experiment(raw.folder, preprocessed, plans_name=PLANS)
    options = TrainOptions(
        folder=raw.folder,
        configurations=(CONFIGURATION,),
        folds=("all",),
        profile="nnunet",
        epochs=sizes.champion_epochs,
        iterations=sizes.champion_iterations,
        budget=None,
        patience=None,
        precision="bf16",
        deterministic=True,
        seed=0,
        device="cpu",
        devices=1,
        compile="off",
        probes=True,
        threads=threads,
        sides="keep",
        mirror="lateral",
        keeps_logits=False,
        plans_name=PLANS,
        dataset_name=None,
        preprocessed=preprocessed,
        results=results,
        processes=None,
    )
    requests = fold_requests(options, experiment, None)
    state, _ = run_folds(requests, options, experiment, stop, TrainingProcesses(), hide_bar=True)
    return requests[0].model_folder if state == "finished" else None


def fine_tuned(
    work: Path,
    champion: Path,
    sets: dict[str, RawDataset],
    sizes: Sizes,
    rehearsal: float,
    seed: int,
    stop: threading.Event,
) -> Path | None:
    """The fine-tuned model's folder; None when told to stop."""
    found = fine_tune(
        FineTuning(
            model=champion,
            old=sets["champion"].folder,
            cases=sets["site"].folder,
            results=work / f"rehearsal_{rehearsal:.2f}" / f"seed_{seed}",
            preprocessed=work / "champion" / "preprocessed",
            epochs=sizes.epochs,
            iterations=sizes.iterations,
            rehearsal=rehearsal,
            seed=seed,
            device=torch.device("cpu"),
            precision="bf16",
            deterministic=True,
            keeps_logits=False,
            compile="off",
        ),
        stop=stop.is_set,
        tell=lambda text: print(text, file=sys.stderr),
    )
    return found.model_folder if found.is_finished else None


def measured(work: Path, model_folder: Path, dataset: RawDataset) -> float:
    """The fold `all`'s mean foreground Dice on every case of the dataset; kept in `work` by the weights."""
    model = open_trained_model(model_folder)
    fold = model.fold("all")
    path = work / "measured" / f"{dataset.folder.parents[1].name}-{fold.start.digest[:24]}.json"
    if path.exists():
        known: float = json.loads(path.read_text())["dice"]
        return known
    network = load_network(
        read_checkpoint(fold.start.checkpoint),
        model.plans.configurations[model.configuration].architecture,
        channels=len(model.dataset_json.channel_names),
        heads=model.dataset_json.labels.num_heads,
        where=FINAL,
    )
    predicting = ModelInTraining(
        plans=model.plans,
        configuration=model.plans.configurations[model.configuration],
        labels=model.dataset_json.labels,
        backends=(TorchBackend(network),),
        mirror_axes=fold.inference_mirror_axes,
    )
    score = composite_score(measure_on(predicting, dataset, [case.name for case in dataset.cases]))
    if score.dice is None:
        raise SystemExit(f"{dataset.folder}: no case has a label")
    write_json({"dice": score.dice, "hd95_mm": score.hd95_mm, "cases": len(dataset.cases)}, path)
    return score.dice


if __name__ == "__main__":
    sys.exit(main())
