"""A dataset small enough to be trained on in seconds: noise in which each label has its own brightness; needs torch.

    python -m tests.support.tiny_training FOLDER SAVE_EVERY_S

trains `TINY` deterministically in FOLDER, from where it was left, and prints the epoch and iteration of each step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.augmentation_profile import NNUNET, AugmentationPlan
from engine.batches import Batch
from engine.dataset import open_dataset
from engine.plans import read_plans
from engine.preprocessed import PreprocessJob, preprocess_dataset
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_checkpoint import init_args
from engine.training_setup import TrainingSetup
from tests.support.nnunet_results import TrainedModel, dataset_json, plans_json
from tests.support.raw_datasets import write_array, write_dataset

TINY = TrainedModel(
    features=(4, 6, 8),
    strides=((2, 2, 2), (1, 2, 2)),
    kernels=((3, 3, 3),) * 3,
    patch_size=(8, 12, 12),
    spacing=(1.0, 1.0, 1.0),
    channels=("MRI",),
    labels={"background": 0, "first": 1, "second": 2},
)
CASES = ("case_00", "case_01", "case_02", "case_03")
SCHEDULE = Schedule(epochs=3, iterations=4, validation_iterations=2)


def write_raw(folder: Path, model: TrainedModel, *, shape: tuple[int, int, int] = (10, 16, 18)) -> None:
    """A raw dataset of `CASES` for the model. An ignore label takes a slab of each label map."""
    document = dataset_json(model)
    random = np.random.default_rng(3)
    changes: dict[str, Any] = {key: document.get(key) for key in ("channel_names", "labels", "regions_class_order")}
    write_dataset(folder, cases=len(CASES), channels=len(model.channels), **changes)
    for index, case in enumerate(CASES):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[1:8, 3:9, 3 : 9 + index] = 1
        labels[2:7, 9:14, 5 : 10 + index] = 2
        for channel in range(len(model.channels)):
            image = random.normal(50, 10, shape) + 60 * (labels == 1) + (100 - 40 * channel) * (labels == 2)
            write_array(folder / "imagesTr" / f"{case}_{channel:04}.nii.gz", image.astype(np.float32), (1.0, 1.0, 1.0))
        if "ignore" in model.labels:
            labels[:, 12:] = model.labels["ignore"]
        write_array(folder / "labelsTr" / f"{case}.nii.gz", labels, (1.0, 1.0, 1.0))


def tiny_setup(
    root: Path, model: TrainedModel = TINY, *, schedule: Schedule = SCHEDULE, **changes: Any
) -> TrainingSetup:
    """The dataset below `root`, raw and preprocessed where it is not there yet, and fold 0 of the model on it: three
    cases to train on, one to validate on. `changes` replace fields of the setup."""
    raw, preprocessed = root / "raw" / "Dataset901_Tiny", root / "preprocessed"
    if not raw.exists():
        write_raw(raw, model)
    dataset = open_dataset(raw)
    document = plans_json(model)
    plans = read_plans(document, configurations=[model.name])
    configuration = plans.configurations[model.name]
    job = PreprocessJob(
        plans=plans,
        configurations=(configuration,),
        dataset_json=dataset.json,
        folders={model.name: preprocessed},
    )
    preprocess_dataset(job, dataset.cases, processes=1)
    setup = TrainingSetup(
        configuration=configuration,
        batch_dice=False,
        labels=dataset.json.labels,
        channels=len(model.channels),
        folder=preprocessed,
        training_cases=CASES[1:],
        validation_cases=CASES[:1],
        augmentation=AugmentationPlan(
            profile=NNUNET,
            patch_size=configuration.patch_size,
            spacing_mm=configuration.spacing_mm,
            mirror_axes=tuple(range(len(configuration.patch_size))),
        ),
        schedule=schedule,
        seed=7,
        device=torch.device("cpu"),
        precision="float32",
        deterministic=True,
        init_args=init_args(document, model.name, 0, dataset.json.document),
    )
    return replace(setup, **changes)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TellingTrainer(Trainer):
    """Prints where it is before each step."""

    def step(self, batch: Batch) -> float:
        print(self.epoch, self.iteration, flush=True)
        return super().step(batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    TellingTrainer(tiny_setup(here), here / "fold_0", save_every_s=float(sys.argv[2])).run()
