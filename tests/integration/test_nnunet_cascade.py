"""The cascade both ways with nnU-Net's own trainer and predictor: ours on its arrays, its on our predictions."""
# ruff: noqa: E402

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.peers import require_peer

require_peer("torch", "nnunet", "blosc2")

import torch

from engine.dataset import open_dataset, read_case
from engine.experiment import LOGITS, open_experiment
from engine.export import import_model
from engine.json_writer import write_json
from engine.nifti import read_label_map
from engine.predictor import Predictor
from engine.preprocessed import open_case
from engine.splits import Split, write_splits
from engine.stage_predictions import PreviousStage, predicted_by, stage_folder
from engine.training_checkpoint import FINAL
from tests.support.nnunet_peer import nnunet
from tests.support.nnunet_results import TrainedModel, plans_json
from tests.support.tiny_experiment import seggate
from tests.support.tiny_training import CASES, TINY, write_raw

NAME, LOWRES, CASCADE = "Dataset901_Tiny", "3d_lowres", "3d_cascade_fullres"
VALIDATED = CASES[::2]
SPLITS = (Split(train=CASES[1::2], val=VALIDATED), Split(train=VALIDATED, val=CASES[1::2]))
LEARNS = ("--epochs", "8", "--iterations", "50", "--precision", "float32", "--threads", "1", "--deterministic")
REGIONS = replace(TINY, labels={"background": 0, "both": [1, 2], "inner": [2]}, regions_class_order=(1, 2), heads=2)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """nnU-Net's three folders below `root`, preprocessed by nnU-Net to grids that are not the images', and our training
    of 3d_lowres (both folds) and of the cascade (fold 0)."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "raw" / NAME

    def model(self, configuration: str) -> Path:
        return self.root / "results" / NAME / f"nnUNetTrainer__nnUNetPlans__{configuration}"

    @property
    def stage(self) -> Path:
        return stage_folder(self.model(LOWRES), CASCADE)

    def previous(self, name: str) -> NDArray[Any]:
        """What the first stage predicted of a case, whoever wrote it."""
        experiment = open_experiment(self.raw, self.root / "preprocessed", plans_name=None)
        case = open_case(experiment.data_folder(CASCADE), name, experiment.dataset.json.labels)
        return PreviousStage(folder=self.stage, digest="").labels(name, case.image_CZYX.shape[1:])

    def copy(self, root: Path) -> Experiment:
        shutil.copytree(self.root, root)
        return Experiment(root=root)


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[TINY, REGIONS], ids=["labels", "regions"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    root, tiny = tmp_path_factory.mktemp("nnunet"), request.param
    lowres: TrainedModel = replace(tiny, name=LOWRES, spacing=(1.6, 1.4, 1.5))
    cascade = replace(tiny, name=CASCADE, spacing=(1.2, 1.1, 0.9), previous_stage=LOWRES)
    made = Experiment(root=root)
    write_raw(made.raw, tiny, shape=(14, 26, 28))
    document = plans_json(lowres, cascade)
    document["configurations"][LOWRES]["next_stage"] = CASCADE
    write_json(document, root / "plans.json")
    nnunet("plan_and_preprocess", root, dataset=NAME, configurations=[LOWRES, CASCADE], plans=str(root / "plans.json"))
    write_json({}, root / "preprocessed" / NAME / "dataset_fingerprint.json")  # copied, not read
    write_splits(SPLITS, root / "preprocessed" / NAME / "splits_final.json")
    for words in (("--configuration", LOWRES), ("--configuration", CASCADE, "--fold", "0")):
        ran = seggate(root, "train", str(made.raw), *words, *LEARNS)
        assert ran.exit_code == 0, ran.output
    return made


def _assert_same(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], *, differing_share: float = 1e-4) -> None:
    """At least 99.99 % of the voxels, in label maps that have every label."""
    differing = voxels = 0
    found: set[int] = set()
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        differing, voxels = differing + int((ours != theirs).sum()), voxels + ours.size
        found |= set(np.unique(ours).tolist())
    assert differing <= differing_share * voxels
    assert found == {0, 1, 2}, "a model that finds nothing proves nothing"


def _validate(experiment: Experiment, configuration: str) -> Path:
    """nnU-Net's validation of our fold 0 takes the place of ours."""
    checkpoint = str(experiment.model(configuration) / "fold_0" / FINAL)
    answer = nnunet("validate", experiment.root, dataset=NAME, configuration=configuration, checkpoint=checkpoint)
    return Path(answer["folder"])


@pytest.mark.requirement("ART-05")
def test_our_logits_become_the_label_map_that_nnunets_own_code_makes_of_them(
    experiment: Experiment, tmp_path: Path
) -> None:
    kept = {name: str(experiment.model(LOWRES) / "fold_0" / LOGITS / f"{name}.npy") for name in VALIDATED}
    arguments = {"dataset": NAME, "configuration": LOWRES, "following": CASCADE, "logits": kept, "out": str(tmp_path)}
    nnunet("resample_next_stage", experiment.root, **arguments)
    nnunet("dump", experiment.root, folder=str(tmp_path), out=str(tmp_path))
    pairs = [(experiment.previous(name), np.load(tmp_path / f"{name}.npy")) for name in VALIDATED]
    _assert_same(pairs, differing_share=0)


@pytest.mark.requirement("ART-05")
def test_nnunets_trainer_predicts_for_the_next_stage_what_ours_does_and_ours_reads_it(
    experiment: Experiment, tmp_path: Path
) -> None:
    theirs = experiment.copy(tmp_path / "theirs")
    shutil.rmtree(theirs.stage)
    _validate(theirs, LOWRES)
    assert {path.name for path in theirs.stage.iterdir()} == {f"{name}.b2nd" for name in VALIDATED}
    # nnU-Net adds windows up in half precision. Few voxels are so near a tie that this decides, but in maps as small as
    # these two of them are more than one in 10,000.
    pairs = [(experiment.previous(name), theirs.previous(name)) for name in VALIDATED]
    _assert_same(pairs, differing_share=1e-3)
    # Our cascade learns from theirs: those of its fold's other cases are ours.
    for name in SPLITS[1].val:
        shutil.copy(experiment.stage / f"{name}.b2nd", theirs.stage)
    assert {predicted_by(theirs.stage, name) for name in CASES} == {None}
    words = ("--configuration", CASCADE, "--fold", "1", "--epochs", "1", "--iterations", "2", *LEARNS[4:])
    ran = seggate(theirs.root, "train", str(theirs.raw), *words)
    assert ran.exit_code == 0, ran.output


def test_nnunets_trainer_validates_our_cascade_as_we_do(experiment: Experiment, tmp_path: Path) -> None:
    """On what our first stage left for it."""
    theirs = experiment.copy(tmp_path / "theirs")
    shutil.rmtree(theirs.model(CASCADE) / "fold_0" / "validation")
    found = _validate(theirs, CASCADE)
    ours = experiment.model(CASCADE) / "fold_0" / "validation"
    _assert_same(
        (read_label_map(ours / f"{name}.nii.gz").array, read_label_map(found / f"{name}.nii.gz").array)
        for name in VALIDATED
    )


@pytest.mark.requirement("ART-07")
def test_nnunets_predictor_gives_with_both_stages_what_our_bundle_does(experiment: Experiment, tmp_path: Path) -> None:
    dataset = open_dataset(experiment.raw)
    files = [[str(path) for path in case.channels.values()] for case in dataset.cases]
    first, second = tmp_path / "first", tmp_path / "second"
    for configuration, out, previous in ((LOWRES, first, None), (CASCADE, second, str(first))):
        model = str(experiment.model(configuration))
        nnunet("predict", experiment.root, model=model, files=files, out=str(out), previous=previous)
    bundle = import_model(experiment.model(CASCADE), tmp_path / "bundle", folds=("0",))
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        _assert_same(
            (
                predictor.predict(read_case(case, dataset.json).volume).labels.array,
                read_label_map(second / f"{case.name}.nii.gz").array,
            )
            for case in dataset.cases
        )


def test_nnunets_trainer_goes_on_with_our_cascade(experiment: Experiment, tmp_path: Path) -> None:
    theirs = experiment.copy(tmp_path / "theirs")
    checkpoint = theirs.model(CASCADE) / "fold_0" / FINAL
    losses = torch.load(checkpoint, weights_only=False)["logging"]["train_losses"]
    arguments = {"dataset": NAME, "configuration": CASCADE, "checkpoint": str(checkpoint), "iterations": 8}
    answer = nnunet("continue_training", theirs.root, **arguments)
    assert answer["epoch"] == 8
    assert answer["momenta_loaded"]
    assert answer["train_losses"][-1] < losses[0] - 0.1
