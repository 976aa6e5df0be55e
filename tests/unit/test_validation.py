"""engine.validation: whole cases through networks, measured against their labels."""
# ruff: noqa: E402

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.dataset import RawDataset, open_dataset, read_case
from engine.errors import DatasetInvalid
from engine.nifti import read_label_map
from engine.plans import read_plans
from engine.training import Trainer
from engine.validation import SUMMARY, ModelInTraining, TorchBackend, validate
from tests.support.nnunet_results import plans_json
from tests.support.tiny_training import CASES, TINY, tiny_setup, write_raw


class ByBrightness:
    """A backend that knows: labels 1 and 2 of `write_raw` are bright and brighter. Values are normalised."""

    name, precision, version, provider, threads = "rule", "float32", "1", "cpu", 1

    def __init__(self, thresholds: tuple[float, float]) -> None:
        self._low, self._high = thresholds

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = [np.zeros_like(batch), (batch > self._low) * 5.0, (batch > self._high) * 9.0]
        return np.concatenate(logits, axis=1).astype(np.float32)

    def close(self) -> None: ...


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    write_raw(tmp_path / "Dataset901_Tiny", TINY)
    return open_dataset(tmp_path / "Dataset901_Tiny")


def model(dataset: RawDataset, *backends: ByBrightness | TorchBackend) -> ModelInTraining:
    plans = read_plans(plans_json(TINY))
    return ModelInTraining(
        plans=plans,
        configuration=plans.configurations[TINY.name],
        labels=dataset.json.labels,
        backends=backends,
        mirror_axes=(0, 1, 2),
    )


# Noise of 10 on 50, 110 and 150, as z-scores of the cases: the gap between the classes.
PERFECT = (0.69, 2.44)


def test_a_network_that_knows_the_answer_is_measured_as_such(tmp_path: Path, dataset: RawDataset) -> None:
    steps: list[tuple[int, int]] = []
    metrics = validate(
        model(dataset, ByBrightness(PERFECT)),
        dataset,
        CASES[:2],
        tmp_path / "validation",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert len(metrics) == 2
    summary = json.loads((tmp_path / "validation" / SUMMARY).read_text())
    assert summary["foreground_mean"]["Dice"] > 0.95
    assert [Path(row["prediction_file"]).name for row in summary["metric_per_case"]] == [
        "case_00.nii.gz",
        "case_01.nii.gz",
    ]


def test_label_maps_lie_on_the_grid_of_their_case(tmp_path: Path, dataset: RawDataset) -> None:
    validate(model(dataset, ByBrightness(PERFECT)), dataset, CASES[:1], tmp_path / "validation")
    written = read_label_map(tmp_path / "validation" / "case_00.nii.gz")
    case = read_case(dataset.cases[0], dataset.json)
    assert written.geometry.same_grid(case.labels.geometry)
    assert (written.array == case.labels.array).mean() > 0.99


def test_folds_are_averaged_before_the_labels_are_taken(dataset: RawDataset) -> None:
    """One fold finds label 2 everywhere (logits 0, 5, 9), one is right (0, 0, 0 in the background; 0, 5, 0 in label 1):
    their means are greatest for label 2, but in label 1 for that."""
    volume = read_case(dataset.cases[0], dataset.json).volume
    sure, right = ByBrightness((-100.0, -100.0)), ByBrightness(PERFECT)
    alone = [model(dataset, backend).predict(volume).array for backend in (sure, right)]
    both = model(dataset, sure, right).predict(volume).array
    assert (alone[0] == 2).all()
    assert {0, 1, 2} == set(np.unique(alone[1]))
    np.testing.assert_array_equal(both, np.where(alone[1] == 1, 1, 2))


def test_a_trained_network_is_asked_without_its_lower_heads_and_gradients(tmp_path: Path, dataset: RawDataset) -> None:
    trainer = Trainer(tiny_setup(tmp_path), tmp_path / "fold_0")
    backend = TorchBackend(trainer.network)
    logits = backend.run(np.zeros((1, 1, *TINY.patch_size), dtype=np.float32))
    assert logits.shape == (1, 3, *TINY.patch_size)
    assert logits.dtype == np.float32
    assert (backend.provider, backend.threads) == ("cpu", torch.get_num_threads())
    found = model(dataset, backend).predict(read_case(dataset.cases[0], dataset.json).volume)
    assert found.array.shape == (10, 16, 18)


def test_a_split_of_another_dataset_is_refused_before_anything_is_predicted(
    tmp_path: Path, dataset: RawDataset
) -> None:
    with pytest.raises(DatasetInvalid, match="other_1 is no case of Dataset901_Tiny"):
        validate(model(dataset, ByBrightness(PERFECT)), dataset, ("case_00", "other_1"), tmp_path / "validation")
    assert not list((tmp_path / "validation").glob("*"))
