"""Whole cases through a network: what is written, what is done again, and what ensembles are made from."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.case_results import join_outputs, network_logits
from engine.dataset import RawDataset, open_dataset, read_case
from engine.errors import DatasetInvalid, InputRejected
from engine.nifti import read_label_map, write_nifti
from engine.plans import Plans, read_plans
from engine.preprocessing import crop_to_nonzero
from engine.training import Trainer
from engine.validation import ModelInTraining, TorchBackend, measure_on, validate
from engine.volume import LabelMap
from tests.support.nnunet_results import plans_json
from tests.support.raw_datasets import write_array, write_dataset
from tests.support.tiny_training import CASES, TINY, tiny_setup, write_raw


class Threshold:
    """Not trained: knows the normalised brightness of each label of the tiny dataset."""

    name = precision = version = provider = "threshold"
    threads = batch = 1

    def __init__(self) -> None:
        self.runs = 0

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        self.runs += 1
        return np.stack([-abs(batch[:, 0] - place) for place in (-0.35, 1.85, 3.35)], axis=1).astype(np.float32)

    def close(self) -> None:
        pass


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    write_raw(tmp_path / "Dataset901_Tiny", TINY)
    return open_dataset(tmp_path / "Dataset901_Tiny")


def _plans() -> Plans:
    return read_plans(plans_json(TINY))


def _model(dataset: RawDataset, backend: Threshold) -> ModelInTraining:
    plans = _plans()
    return ModelInTraining(
        plans=plans,
        configuration=plans.configurations[TINY.name],
        labels=dataset.json.labels,
        backends=(backend,),
        mirror_axes=(),
    )


def test_a_fold_is_validated_with_predictions_and_nnunets_summary(tmp_path: Path, dataset: RawDataset) -> None:
    measured = validate(_model(dataset, Threshold()), dataset, CASES[:2], tmp_path / "validation")
    assert measured is not None
    dice = measured[0][1,].dice
    assert dice is not None
    assert dice > 0.8
    summary = json.loads((tmp_path / "validation" / "summary.json").read_text())
    assert [Path(entry["prediction_file"]).name for entry in summary["metric_per_case"]] == [
        "case_00.nii.gz",
        "case_01.nii.gz",
    ]
    assert summary["metric_per_case"][0]["metrics"]["1"]["Dice"] == dice
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {
        "case_00.nii.gz",
        "case_01.nii.gz",
        "summary.json",
    }


def test_a_validation_that_was_stopped_goes_on_and_predicts_nothing_twice(tmp_path: Path, dataset: RawDataset) -> None:
    backend = Threshold()
    folder = tmp_path / "validation"
    model = _model(dataset, backend)
    assert validate(model, dataset, CASES[:2], folder, stop=lambda: backend.runs > 0) is None
    assert not (folder / "summary.json").exists()
    once = backend.runs
    assert validate(model, dataset, CASES[:2], folder) is not None
    assert backend.runs == 2 * once
    whole = validate(_model(dataset, Threshold()), dataset, CASES[:2], tmp_path / "again")
    assert validate(model, dataset, CASES[:2], folder) == whole
    assert backend.runs == 2 * once


@pytest.mark.parametrize("damaged", ["validation/case_00.nii.gz", "logits/case_00.npy"])
def test_what_was_not_written_to_its_end_is_predicted_again(tmp_path: Path, dataset: RawDataset, damaged: str) -> None:
    backend = Threshold()
    model, folder, logits = _model(dataset, backend), tmp_path / "validation", tmp_path / "logits"
    whole = validate(model, dataset, CASES[:2], folder, logits_folder=logits)
    once = backend.runs // 2
    content = (tmp_path / damaged).read_bytes()
    os.truncate(tmp_path / damaged, len(content) // 2)
    assert validate(model, dataset, CASES[:2], folder, logits_folder=logits) == whole
    assert backend.runs == 3 * once
    assert (tmp_path / damaged).read_bytes() == content


def test_stored_logits_give_the_same_labels_again(tmp_path: Path, dataset: RawDataset) -> None:
    model = _model(dataset, Threshold())
    validate(model, dataset, CASES[:1], tmp_path / "validation", logits_folder=tmp_path / "logits")
    cropped = crop_to_nonzero(read_case(dataset.cases[0], dataset.json).volume, model.plans)
    stored = np.load(tmp_path / "logits" / "case_00.npy", allow_pickle=False)
    output = network_logits(stored, cropped, model.configuration)
    predicted = read_label_map(tmp_path / "validation" / "case_00.nii.gz")
    joined = join_outputs([output], cropped, model.plans, model.labels, predicted.geometry)
    assert np.array_equal(joined.array, predicted.array)


def test_cases_are_measured_without_anything_written(tmp_path: Path, dataset: RawDataset) -> None:
    before = sorted(tmp_path.rglob("*"))
    measured = measure_on(_model(dataset, Threshold()), dataset, CASES[:3])
    assert len(measured) == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_predictions_lie_in_the_voxel_order_of_the_files_where_the_reader_reorients(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", cases=1, overwrite_image_reader_writer="SimpleITKIOWithReorient")
    direction = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    image = np.random.default_rng(0).normal(5, 1, (10, 16, 18)).astype(np.float32)
    label = np.zeros((10, 16, 18), dtype=np.uint8)
    label[2:6, 3:9, 4:8] = 1
    image[label == 1] += 5
    write_array(folder / "imagesTr" / "case_00_0000.nii.gz", image, (1.0, 1.0, 1.0), direction=direction)
    write_array(folder / "labelsTr" / "case_00.nii.gz", label, (1.0, 1.0, 1.0), direction=direction)
    dataset = open_dataset(folder)
    validate(_model(dataset, Threshold()), dataset, ["case_00"], tmp_path / "validation")
    predicted = read_label_map(tmp_path / "validation" / "case_00.nii.gz")
    reference = read_label_map(folder / "labelsTr" / "case_00.nii.gz")
    assert predicted.geometry.same_grid(reference.geometry)
    assert np.count_nonzero((predicted.array > 0) & (label == 1)) > 0.9 * np.count_nonzero(label)


def test_a_prediction_on_another_grid_is_named(tmp_path: Path, dataset: RawDataset) -> None:
    model, folder = _model(dataset, Threshold()), tmp_path / "validation"
    validate(model, dataset, CASES[:1], folder)
    predicted = read_label_map(folder / "case_00.nii.gz")
    cut = LabelMap(array=predicted.array[1:], geometry=read_label_map(_cut(tmp_path, predicted)).geometry)
    write_nifti(cut, folder / "case_00.nii.gz")
    with pytest.raises(InputRejected, match="case_00: the prediction has"):
        validate(model, dataset, CASES[:1], folder)


def _cut(tmp_path: Path, predicted: LabelMap) -> Path:
    return write_array(tmp_path / "cut.nii.gz", predicted.array[1:], (1.0, 1.0, 1.0))


def test_a_name_that_is_no_case_is_refused(tmp_path: Path, dataset: RawDataset) -> None:
    with pytest.raises(DatasetInvalid, match="case_99 is no case"):
        validate(_model(dataset, Threshold()), dataset, ["case_99"], tmp_path / "validation")


class Everywhere(Threshold):
    """Finds label 2 everywhere, and label 1 a little less."""

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([np.full_like(batch[:, 0], logit) for logit in (-100.0, 0.0, 0.5)], axis=1)


def test_folds_are_averaged_before_the_labels_are_taken(dataset: RawDataset) -> None:
    """Against a fold that is always for label 2, label 1 stands only where the other is for it by more than that."""
    volume = read_case(dataset.cases[0], dataset.json).volume
    plans = _plans()
    both = ModelInTraining(
        plans=plans,
        configuration=plans.configurations[TINY.name],
        labels=dataset.json.labels,
        backends=(Threshold(), Everywhere()),
        mirror_axes=(),
    ).predict(volume)
    alone = _model(dataset, Threshold()).predict(volume)
    assert {0, 1, 2} == set(np.unique(alone.array))
    assert set(np.unique(both.array)) == {1, 2}
    assert (alone.array[both.array == 1] <= 1).all()
    assert (both.array[alone.array == 2] == 2).all()


def test_a_network_in_training_answers_with_its_full_resolution(tmp_path: Path) -> None:
    trainer = Trainer(tiny_setup(tmp_path), tmp_path / "fold_0")
    backend = TorchBackend(trainer.network)
    logits = backend.run(np.zeros((1, 1, *TINY.patch_size), dtype=np.float32))
    assert logits.shape == (1, 3, *TINY.patch_size)
    assert logits.dtype == np.float32
    assert (backend.provider, backend.threads) == ("cpu", torch.get_num_threads())
