"""benchmarks.predict: its cases, how label maps are compared, and what our command says of itself."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks.nnunet_plans import ct_plans
from benchmarks.predict import compare, default_command, runtime_of
from benchmarks.predict_cases import CASES, GROWTH, ON_CPU, ON_CUDA, Volumes, nnunet_environment, write_torso
from engine.nifti import read_nifti, write_nifti
from engine.plans import read_plans
from engine.volume import Geometry, LabelMap


def write(path: Path, changed: int = 0, shape: tuple[int, int, int] = (4, 5, 6)) -> None:
    array = np.zeros(shape, dtype=np.uint8)
    array.ravel()[:changed] = 1
    path.parent.mkdir(exist_ok=True)
    write_nifti(LabelMap(array=array, geometry=Geometry(shape=shape, affine_lps=np.eye(4))), path)


def test_agreement_is_of_all_voxels_and_of_the_worst_volume(tmp_path: Path) -> None:
    for case, changed in (("a", 0), ("b", 12)):
        write(tmp_path / "theirs" / f"{case}.nii.gz")
        write(tmp_path / "ours" / f"{case}.nii.gz", changed)
    found = compare(tmp_path / "theirs", tmp_path / "ours")
    assert (found["different_voxels"], found["voxels"]) == (12, 240)
    assert found["voxel_agreement"] == pytest.approx(0.95)
    assert found["worst_volume_agreement"] == pytest.approx(0.9)


def test_a_missing_label_map_ends_the_benchmark(tmp_path: Path) -> None:
    write(tmp_path / "theirs" / "a.nii.gz")
    (tmp_path / "ours").mkdir()
    with pytest.raises(SystemExit, match="nnU-Net wrote 1 label maps, we wrote 0"):
        compare(tmp_path / "theirs", tmp_path / "ours")


def test_label_maps_on_other_grids_end_the_benchmark(tmp_path: Path) -> None:
    write(tmp_path / "theirs" / "a.nii.gz")
    write(tmp_path / "ours" / "a.nii.gz", shape=(4, 5, 7))
    with pytest.raises(SystemExit, match=r"a.nii.gz: nnU-Net's label map is \(4, 5, 6\)"):
        compare(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("runtime", "backend", "precision"),
    [
        ("onnxruntime 1.32.0 on cpu, float32", "onnxruntime 1.32.0 (cpu)", "float32"),
        ("openvino 2026.4.1 on cpu, bf16", "openvino 2026.4.1 (cpu)", "bf16"),
        ("something else", "unknown", "unknown"),
    ],
)
def test_backend_and_precision_are_read_from_the_runtime(runtime: str, backend: str, precision: str) -> None:
    assert runtime_of({"runtime": runtime}) == {"backend": backend, "precision": precision}


def test_our_command_is_filled_in_word_by_word() -> None:
    values = {"model": "m", "input": "i", "output": "o", "device": "cpu", "mirroring": ""}
    words = [word.format(**values) for word in shlex.split(default_command())]
    assert [word for word in ("i", "o", "m", "cpu") if word not in words] == []


def test_default_cases_exist_and_are_paired_but_the_largest() -> None:
    by_name = {case.name: case for case in CASES}
    assert [name for name in ON_CPU if not by_name[name].is_paired] == ["whole-104"]
    assert {name: by_name[name].pairs for name in ON_CPU} == {
        "hippocampus-40": 5,
        "ct-small-net": 5,
        "ct-default-net": 2,
        "ct-default-net-bf16": 2,
        "whole-104": 0,
    }
    assert all(name in by_name for name in ON_CUDA)


def test_plans_of_every_random_network_are_read(tmp_path: Path) -> None:
    for case in (*CASES, *GROWTH):
        if case.random is None:
            continue
        model = case.random
        (tmp_path / "plans.json").write_text(
            json.dumps(
                ct_plans(
                    spacing_mm=model.spacing_mm,
                    patch_size=model.patch_size,
                    features=model.features,
                    strides=model.strides,
                )
            )
        )
        read = read_plans(tmp_path / "plans.json", configurations=["3d_fullres"])
        planned = read.configurations["3d_fullres"]
        assert planned.patch_size == model.patch_size
        assert planned.architecture.features_per_stage == model.features
        total = np.prod(planned.architecture.strides, axis=0)
        assert all(edge % by == 0 for edge, by in zip(model.patch_size, total, strict=True))


@pytest.mark.peer("shared-data")
def test_the_torso_is_stretched_over_the_grid_that_was_asked_for(shared_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "torso_0000.nii.gz"
    write_torso(shared_root / "data", file, Volumes(kind="torso", size=(56, 50, 61), spacing_mm=(2.0, 3.0, 4.0)))
    volume = read_nifti([file])
    assert volume.array.shape == (1, 61, 50, 56)
    assert volume.geometry.spacing_mm == pytest.approx((4.0, 3.0, 2.0))
    air, soft = (volume.array < -900).mean(), (np.abs(volume.array) < 200).mean()
    assert 0.1 < air < 0.9
    assert 0.1 < soft < 0.9


def test_nnunet_gets_its_own_folders_and_not_our_modules() -> None:
    found = nnunet_environment(nnUNet_results="results")
    assert found["nnUNet_results"] == "results"
    assert "PYTHONPATH" not in found
