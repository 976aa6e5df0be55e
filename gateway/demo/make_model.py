"""Makes the demo model again: `python -m gateway.demo.make_model DATASET --work FOLDER`.

DATASET is Dataset004_Hippocampus (Medical Segmentation Decathlon) in nnU-Net's format, 200 cases. Plans, preprocessed
cases and trained folds go below FOLDER; started again, it goes on. The bundle holds the five folds of the
cross-validation themselves, so its card's figures are theirs; it goes to gateway/demo/model, which must not exist.
On a processor of one type the same weights come out (about two hours on two cores); with `--device cuda` or `--budget`
they do not. `--only-fold` trains one fold: start several side by side, then the command without it. Needs the extra
`train`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from engine.errors import EngineError
from engine.json_reader import read_json
from engine.json_writer import write_json
from engine.model_card import read_card
from engine.sides import MirrorPolicy

HERE = Path(__file__).resolve().parent
CARD = HERE / "hippocampus-mr.toml"
MODEL = HERE / "model"

PLANS = "nnUNetDemoPlans"
CONFIGURATION = "3d_fullres"
# A quarter of nnU-Net's widths, so that five networks fit into a repository; two patches a step instead of seven, since
# a short training gains more from many steps than from large ones.
FEATURES = (8, 16, 32, 64)
BATCH = 2
EPOCHS, ITERATIONS = 24, 250
# A series has a known orientation: only left and right change places, as between a person's two sides.
MIRROR: MirrorPolicy = "lateral"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the bundle was written, 1 when not, or when it was stopped; the reason goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m gateway.demo.make_model", description="Make the demo model.")
    parser.add_argument("dataset", type=Path, help="Dataset004_Hippocampus in nnU-Net's format")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to make (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", help="train each fold for so long (7m) instead of so many epochs")
    parser.add_argument("--only-fold", help="train and validate this fold alone, as one of several processes")
    chosen = parser.parse_args(arguments)
    try:
        bundle = make(
            chosen.dataset,
            chosen.work,
            chosen.out,
            epochs=chosen.epochs,
            iterations=chosen.iterations,
            device=chosen.device,
            budget=chosen.budget,
            only_fold=chosen.only_fold,
        )
    except (EngineError, OSError) as error:
        print(f"not made: {error}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    if bundle is None:
        if chosen.only_fold is None:
            print("stopped; the same command goes on", file=sys.stderr)  # noqa: T201
        return int(chosen.only_fold is None)
    print(f"{bundle.name} {bundle.semver}, weights {bundle.weights_digest}")  # noqa: T201
    print(bundle.description)  # noqa: T201
    return 0


def make(
    dataset: Path,
    work: Path,
    out: Path,
    *,
    epochs: int,
    iterations: int,
    device: Literal["cpu", "cuda"] = "cpu",
    budget: str | None = None,
    only_fold: str | None = None,
) -> Any:
    """The bundle (engine.bundle.Bundle); None when the training was told to stop, or was of one fold. Raises
    EngineError, OSError."""
    # Here, so that the paths of this module can be used where torch is not installed.
    from engine.experiment import open_experiment
    from engine.model_figures import figures, read_choice
    from engine.training_processes import TrainingProcesses
    from engine.training_profile import TRAINING_PROFILES
    from gateway.commands.export import export_chosen
    from gateway.commands.select import select_trained
    from gateway.commands.train import TrainOptions, fold_requests, run_folds
    from gateway.stop_signal import stop_requests
    from gateway.time_budget import parse_budget

    preprocessed, results = work / "preprocessed", work / "results"
    plan_demo(dataset, preprocessed)
    experiment = open_experiment(dataset, preprocessed, plans_name=PLANS)
    options = TrainOptions(
        folder=dataset,
        configurations=(CONFIGURATION,),
        folds=() if only_fold is None else (only_fold,),
        profile="nnunet",
        epochs=epochs,
        iterations=iterations,
        budget=budget,
        patience=None,
        precision="bf16",
        deterministic=device == "cpu" and budget is None,
        seed=0,
        device=device,
        devices=1,
        compile="off" if device == "cpu" else "auto",
        probes=True,
        threads=1,
        sides="keep",
        mirror=MIRROR,
        keeps_logits=True,
        calibrates=True,
        plans_name=PLANS,
        dataset_name=None,
        preprocessed=preprocessed,
        results=results,
        processes=None,
    )
    with stop_requests() as stop:
        requests = fold_requests(options, experiment, parse_budget(budget))
        state, _ = run_folds(requests, options, experiment, stop, TrainingProcesses(), hide_bar=False)
    if state == "stopped" or only_fold is not None:
        return None
    select_trained(
        experiment, results, TRAINING_PROFILES["nnunet"], (CONFIGURATION,), (), processes=None, hide_bar=False
    )
    card = read_card(CARD)
    found = figures(read_choice(experiment, results), experiment.dataset.json.labels)
    card = replace(card, description=f"{card.description} {found}")
    notes: list[str] = []
    bundle = export_chosen(
        experiment,
        results,
        out,
        card,
        name=None,
        semver=None,
        processes=None,
        calibrates=True,
        notes=notes,
        hide_bar=False,
    )
    for note in notes:
        print(f"note: {note}")  # noqa: T201
    return bundle


def plan_demo(dataset: Path, preprocessed: Path) -> None:
    """nnU-Net's plans with the demo's widths and batch; kept when they are there."""
    from gateway.commands.plan import PlanOptions, plan_folder

    folder = preprocessed / dataset.resolve().name
    if (folder / f"{PLANS}.json").exists():
        return
    plan_folder(
        PlanOptions(
            folder=dataset,
            fingerprint=None,
            dataset_json=None,
            dataset_name=None,
            planner="ExperimentPlanner",
            profile="nnunet",
            gpu_memory_gb=None,
            overwrite_target_spacing=None,
            plans_name=None,
            splits=None,
            preprocessed=preprocessed,
            out=None,
            processes=None,
            plans_only=True,
        ),
        dataset,
        hide_bar=False,
    )
    plans: Any = read_json(folder / "nnUNetPlans.json", error=EngineError)
    plans["plans_name"] = PLANS
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = BATCH
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = list(FEATURES)
    write_json(plans, folder / f"{PLANS}.json")


if __name__ == "__main__":
    sys.exit(main())
