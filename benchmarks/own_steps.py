"""Our training steps, for benchmarks/train.py: preprocesses the dataset, then answers each number of steps on the
standard input with one line, the seconds that they took.

    python -m benchmarks.own_steps RAW PLANS CONFIGURATION PRECISION SCRATCH THREADS
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from engine.allocator import freed_memory_kept
from engine.augmentation_profile import NNUNET, AugmentationPlan
from engine.batches import BatchStream
from engine.dataset import open_dataset
from engine.plans import read_plans
from engine.preprocessed import PreprocessJob, preprocess_dataset
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_setup import TrainingSetup, default_loader_threads


def main() -> None:
    raw, plans_file, name, precision, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    trainer = make_trainer(Path(raw), Path(plans_file), name, precision, Path(folder))
    stream = BatchStream(trainer.source("training"), threads=trainer.setup.loader_threads)
    torch.backends.cudnn.benchmark = True  # as in a training
    with freed_memory_kept(), stream:
        batches = (batch for epoch in count() for batch in stream.epoch(epoch, trainer.setup.schedule.iterations))
        while not trainer.is_settled:
            trainer.step(next(batches))
        for line in sys.stdin:
            started = time.perf_counter()
            for _ in range(int(line)):
                trainer.step(next(batches))
            print(time.perf_counter() - started, flush=True)


def make_trainer(raw: Path, plans_file: Path, name: str, precision: Any, folder: Path) -> Trainer:
    dataset = open_dataset(raw)
    plans = read_plans(plans_file, configurations=[name])
    configuration = plans.configurations[name]
    preprocessed = folder / "preprocessed"
    job = PreprocessJob(
        plans=plans,
        configurations=(configuration,),
        dataset_json=dataset.json,
        folders={name: preprocessed},
    )
    preprocess_dataset(job, dataset.cases, processes=1)
    cases = tuple(case.name for case in dataset.cases)
    setup = TrainingSetup(
        configuration=configuration,
        batch_dice=False,
        labels=dataset.json.labels,
        channels=len(dataset.json.channel_names),
        folder=preprocessed,
        training_cases=cases[len(cases) // 5 :],
        validation_cases=cases[: len(cases) // 5],
        augmentation=AugmentationPlan(
            profile=NNUNET,
            patch_size=configuration.patch_size,
            spacing_mm=configuration.spacing_mm,
            mirror_axes=tuple(range(len(configuration.patch_size))),
        ),
        schedule=Schedule(),
        seed=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        precision=precision,
        deterministic=False,
    )
    setup = replace(setup, loader_threads=default_loader_threads(setup.device))
    return Trainer(setup, folder / "fold_0")


if __name__ == "__main__":
    main()
