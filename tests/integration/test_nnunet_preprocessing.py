"""Preprocessed training cases against those of nnU-Net, run beside us on the same files and plans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from engine.dataset import RawDataset, open_dataset
from engine.plans import read_plans
from engine.preprocessed import PreprocessJob, open_case, preprocess_dataset
from tests.support.ct_set import write_ct_set
from tests.support.nnunet_peer import nnunet

pytestmark = [pytest.mark.peer("nnunet", "shared-data"), pytest.mark.requirement("ART-03")]


def _compare(root: Path, dataset: RawDataset, plans_file: Path, configurations: list[str]) -> None:
    """Every configuration of every case: images to 1e-5, label maps exactly."""
    plans = read_plans(plans_file, configurations=configurations)
    job = PreprocessJob(
        plans=plans,
        configurations=tuple(plans.configurations.values()),
        dataset_json=dataset.json,
        folders={name: root / "ours" / name for name in configurations},
    )
    preprocess_dataset(job, dataset.cases, processes=1)
    identifiers = json.loads(plans_file.read_text())["configurations"]
    for name in configurations:
        folder = root / "preprocessed" / dataset.name / identifiers[name]["data_identifier"]
        theirs = root / "theirs" / name
        assert nnunet("dump", root, folder=str(folder), out=str(theirs))["files"] == 2 * len(dataset.cases)
        for case in dataset.cases:
            ours = open_case(root / "ours" / name, case.name, dataset.json.labels)
            image, labels = np.load(theirs / f"{case.name}.npy"), np.load(theirs / f"{case.name}_seg.npy")
            whole, where = (slice(None),) * 4, f"{name} {case.name}"
            np.testing.assert_allclose(ours.image_CZYX[whole], image, rtol=0, atol=1e-5, err_msg=where)
            np.testing.assert_array_equal(ours.labels_1ZYX[whole], labels, err_msg=where)


def test_twenty_hippocampus_cases_are_preprocessed_as_by_nnunet(tmp_path: Path, shared_data: Path) -> None:
    name = "Dataset004_Hippocampus"
    raw = tmp_path / "raw" / name
    document = json.loads((shared_data / name / "dataset.json").read_text())
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    for label in sorted((shared_data / name / "labelsTr").glob("*.nii.gz"))[:20]:
        shutil.copy(label, raw / "labelsTr")
        shutil.copy(shared_data / name / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz"), raw / "imagesTr")
    (raw / "dataset.json").write_text(json.dumps({**document, "numTraining": 20}))
    plans = shared_data.parent / "reference" / "plans" / "hippocampus_004" / "nnUNetPlans.json"
    configurations = ["2d", "3d_fullres"]
    nnunet("plan_and_preprocess", tmp_path, dataset=name, configurations=configurations, plans=str(plans))
    _compare(tmp_path, open_dataset(raw), plans, configurations)


@pytest.mark.requirement("ART-04")
def test_ct_of_thin_own_and_thick_slices_is_preprocessed_as_by_nnunet(tmp_path: Path, shared_data: Path) -> None:
    """With nnU-Net's own fingerprint and plans. The thick slices are resampled apart from their plane."""
    name = "Dataset900_Torso"
    raw = write_ct_set(tmp_path / "raw" / name, shared_data)
    configurations = ["2d", "3d_fullres"]
    nnunet("plan_and_preprocess", tmp_path, dataset=name, configurations=configurations)
    plans = tmp_path / "preprocessed" / name / "nnUNetPlans.json"
    _compare(tmp_path, open_dataset(raw), plans, configurations)


def test_images_of_two_axes_are_preprocessed_as_by_nnunet(tmp_path: Path) -> None:
    """Their pixels are four times as high as wide, and of two sizes, so that all are resampled."""
    name = "Dataset901_Flat"
    raw = tmp_path / "raw" / name
    random = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    for index in range(4):
        labels = np.zeros((40, 150 + 10 * index), np.uint8)
        labels[5:20, 20 : 60 + index], labels[25:35, 80:130] = 1, 2
        image = (random.normal(50, 5, labels.shape) + 60 * labels).astype(np.float32)
        for array, path in ((image, f"imagesTr/c{index}_0000.nii.gz"), (labels, f"labelsTr/c{index}.nii.gz")):
            flat = sitk.GetImageFromArray(array)
            flat.SetSpacing((1.0, 4.0) if index % 2 else (0.8, 3.6))
            sitk.WriteImage(flat, str(raw / path))
    document = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": 4}
    (raw / "dataset.json").write_text(json.dumps({**document, "file_ending": ".nii.gz"}))
    nnunet("plan_and_preprocess", tmp_path, dataset=name, configurations=["2d"])
    _compare(tmp_path, open_dataset(raw), tmp_path / "preprocessed" / name / "nnUNetPlans.json", ["2d"])
