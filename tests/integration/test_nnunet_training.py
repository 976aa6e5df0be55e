"""Both ways with nnU-Net's own trainer and predictor, run beside ours."""
# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch", "nnunet")

import torch

from engine.dataset import RawDataset, open_dataset, read_case
from engine.json_writer import write_json
from engine.nifti import read_label_map
from engine.plans import Plans, read_plans
from engine.preprocessed import case_names
from engine.schedule import Schedule
from engine.splits import Split, read_splits, write_splits
from engine.training import Trainer
from engine.training_checkpoint import FINAL, read_state
from engine.validation import ModelInTraining, TorchBackend
from tests.support.nnunet_peer import nnunet
from tests.support.nnunet_results import TrainedModel, dataset_json, plans_json
from tests.support.tiny_training import CASES, TINY, tiny_setup, write_raw

NAME = "Dataset901_Tiny"
SPLITS = (Split(train=CASES[1:], val=CASES[:1]), Split(train=CASES[:3], val=CASES[3:]))
SCHEDULE = Schedule(epochs=8, iterations=40, validation_iterations=2)
MODELS = {
    "plain": TINY,
    "residual": replace(TINY, network="ResidualEncoderUNet"),
    "regions in 2d": replace(
        TINY,
        name="2d",
        dimensions=2,
        strides=((2, 2), (2, 2)),
        kernels=((3, 3),) * 3,
        patch_size=(12, 12),
        spacing=(1.0, 1.0),
        labels={"background": 0, "both": [1, 2], "inner": [2]},
        regions_class_order=(1, 2),
        heads=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """nnU-Net's three folders below `root` with one dataset, preprocessed by nnU-Net; our training of fold 0 on its
    arrays and splits; our result folder."""

    root: Path
    model: TrainedModel
    dataset: RawDataset
    plans: Plans
    trainer: Trainer
    results: Path


@pytest.fixture(scope="module", params=MODELS)
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    require_peer("blosc2")
    root, model = tmp_path_factory.mktemp("nnunet"), MODELS[request.param]
    raw, preprocessed = root / "raw" / NAME, root / "preprocessed" / NAME
    write_raw(raw, model, shape=(12, 24, 28))
    # As `seggate plan --probe` writes it; nnU-Net preprocesses, trains and predicts with such plans.
    document = {**plans_json(model), "seggate": {"memory": {model.name: {"peak_bytes": 1}}}}
    write_json(document, root / "plans.json")
    nnunet("plan_and_preprocess", root, dataset=NAME, configurations=[model.name], plans=str(root / "plans.json"))
    write_json({}, preprocessed / "dataset_fingerprint.json")  # copied by nnU-Net's trainer, not read
    write_splits(SPLITS, preprocessed / "splits_final.json")
    arrays = preprocessed / f"nnUNetPlans_{model.name}"
    for pickled in arrays.glob("*.pkl"):
        # Neither opened nor needed by ours; nnU-Net's trainer needs them.
        shutil.copy(pickled, root)
        pickled.write_bytes(b"not a pickle")
    assert case_names(arrays) == CASES
    fold = read_splits(preprocessed / "splits_final.json", CASES)[0]
    results = root / "results" / NAME / f"nnUNetTrainer__nnUNetPlans__{model.name}"
    setup = tiny_setup(
        root / "ours",
        model,
        schedule=SCHEDULE,
        folder=arrays,
        training_cases=fold.train,
        validation_cases=fold.val,
    )
    trainer = Trainer(setup, results / "fold_0")
    assert trainer.run()
    write_json(document, results / "plans.json")
    write_json(dataset_json(model), results / "dataset.json")
    for pickled in root.glob("*.pkl"):
        shutil.copy(pickled, arrays)
    return Experiment(
        root=root,
        model=model,
        dataset=open_dataset(raw),
        plans=read_plans(document, configurations=[model.name]),
        trainer=trainer,
        results=results,
    )


def test_ours_trains_on_nnunets_preprocessed_arrays(experiment: Experiment) -> None:
    records = experiment.trainer.records
    assert records[-1].train_loss < records[0].train_loss - 0.15


@pytest.mark.requirement("ART-07")
def test_nnunets_predictor_gives_the_same_labels_from_our_result_folder(experiment: Experiment) -> None:
    mine = ModelInTraining(
        plans=experiment.plans,
        configuration=experiment.plans.configurations[experiment.model.name],
        labels=experiment.dataset.json.labels,
        backends=[TorchBackend(experiment.trainer.network)],
        mirror_axes=experiment.trainer.setup.augmentation.mirror_axes,
    )
    cases = experiment.dataset.cases
    files = [[str(path) for path in case.channels.values()] for case in cases]
    out = experiment.root / "predicted"
    answer = nnunet("predict", experiment.root, model=str(experiment.results), files=files, out=str(out))
    assert tuple(answer["mirror_axes"]) == mine.mirror_axes
    differing = voxels = 0
    found: set[int] = set()
    for case in cases:
        theirs = read_label_map(out / f"{case.name}.nii.gz").array
        ours = mine.predict(read_case(case, experiment.dataset.json).volume).array
        differing, voxels = differing + int((theirs != ours).sum()), voxels + theirs.size
        found |= set(np.unique(ours).tolist())
    assert differing <= 1e-4 * voxels
    assert found == {0, 1, 2}, "a model that finds nothing proves nothing"


def test_nnunets_trainer_goes_on_from_our_checkpoint_with_the_optimisers_state(experiment: Experiment) -> None:
    checkpoint = experiment.trainer.folder / FINAL
    ours = torch.load(checkpoint, weights_only=False)
    before = json.loads(json.dumps(ours["logging"]["train_losses"]))
    kept = checkpoint.read_bytes()
    answer: dict[str, Any] = nnunet(
        "continue_training",
        experiment.root,
        dataset=NAME,
        configuration=experiment.model.name,
        checkpoint=str(checkpoint),
        iterations=8,
    )
    # nnU-Net's fold folder is ours: it has written its own final checkpoint there.
    theirs = read_written_by_nnunet(Path(answer["final"]))
    checkpoint.write_bytes(kept)
    assert answer["epoch"] == SCHEDULE.epochs
    assert answer["epoch_after"] == SCHEDULE.epochs + 1
    assert answer["momenta_loaded"]
    # The lowest output has no weight in the loss: its head is never trained, in neither of the two.
    assert answer["without_momentum"] == ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]
    assert answer["parameters"] == [name for name, _ in experiment.trainer.network.named_parameters()]
    assert answer["train_losses"][:-1] == pytest.approx(before)
    # The same data and a rate of the start: it goes on where ours ended, not where a new training begins.
    assert answer["train_losses"][-1] < before[0] - 0.1
    assert theirs.keys() == dict(read_state(checkpoint).weights).keys()


def read_written_by_nnunet(path: Path) -> dict[str, torch.Tensor]:
    from engine.checkpoint import read_checkpoint

    return dict(read_checkpoint(path).weights)
