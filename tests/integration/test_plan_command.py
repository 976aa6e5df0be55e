"""`seggate plan`: what it writes, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engine.plans import read_plans
from engine.preprocessed import case_names
from gateway.cli import app
from tests.support.peers import require_peer
from tests.support.raw_datasets import write_dataset

SHAPE = (16, 24, 24)
NAME = "Dataset005_Plan"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / NAME, cases=6, shape=SHAPE)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Where the command puts what it makes of the dataset."""
    return tmp_path / "preprocessed" / NAME


def _plan(tmp_path: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words, "--preprocessed", str(tmp_path / "preprocessed")])


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.requirement("ART-02")
@pytest.mark.requirement("ART-05")
def test_a_dataset_gets_fingerprint_plans_and_splits(tmp_path: Path, folder: Path, made: Path) -> None:
    ran = _plan(tmp_path, str(folder), "--plans-only", "--processes", "2")
    assert ran.exit_code == 0, ran.output
    assert "3d_fullres" in ran.stdout
    assert {path.name for path in made.iterdir()} == {
        "dataset.json",
        "dataset_fingerprint.json",
        "nnUNetPlans.json",
        "splits_final.json",
    }
    assert (made / "dataset.json").read_bytes() == (folder / "dataset.json").read_bytes()
    assert set(read_plans(made / "nnUNetPlans.json").configurations) == {"2d", "3d_fullres"}
    assert _read(made / "nnUNetPlans.json")["dataset_name"] == NAME
    assert len(_read(made / "splits_final.json")) == 5


def test_json_output_is_one_document(tmp_path: Path, folder: Path, made: Path) -> None:
    ran = _plan(tmp_path, str(folder), "--processes", "1", "--json")
    document = json.loads(ran.stdout)
    assert document["ok"] is True
    assert document["written"]["plans"] == str(made / "nnUNetPlans.json")
    assert document["configurations"] == _read(made / "nnUNetPlans.json")["configurations"]


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_options_reach_the_planner(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "mine.json"
    words = ["--planner", "ResEncL", "--profile", "article", "--plans-name", "minePlans", "--out", str(out)]
    words += ["--overwrite-target-spacing", "1.0", "0.75", "0.5", "--gpu-memory-gb", "16", "--dataset-name", "Other"]
    ran = _plan(tmp_path, str(folder), *words, "--plans-only", "--processes", "1")
    assert ran.exit_code == 0, ran.output
    plans = _read(out)
    assert plans["plans_name"] == "minePlans"
    assert plans["dataset_name"] == "Other"
    assert plans["experiment_planner_used"] == "nnUNetPlannerResEncL"
    assert plans["profile"] == "article"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [1.0, 0.75, 0.5]
    assert (tmp_path / "preprocessed" / "Other" / "dataset_fingerprint.json").exists()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps of 600 bytes a voxel on a machine with 1 GB, instead of real ones; names of what was measured."""
    require_peer("torch")
    from engine.memory_probe import StepMemory
    from engine.training_setup import TrainingSetup

    names: list[str] = []

    def measure(setup: TrainingSetup, **_: object) -> StepMemory:
        configuration = setup.configuration
        names.append(configuration.name)
        return StepMemory(
            device="the processor",
            precision=setup.precision,
            patch_size=configuration.patch_size,
            batch_size=configuration.batch_size,
            peak_bytes=600 * configuration.batch_size * math.prod(configuration.patch_size),
            available_bytes=10**9,
            total_bytes=10**9,
            estimate_bytes=10**8,
        )

    monkeypatch.setattr("engine.plan_probe.measure_step", measure)
    return names


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_a_probe_is_written_beside_nnunets_plans(tmp_path: Path, folder: Path, made: Path, measured: list[str]) -> None:
    words = [str(folder), "--plans-only", "--processes", "1", "--device", "cpu", "--precision", "float32"]
    assert _plan(tmp_path, *words).exit_code == 0
    assert not measured
    before = _read(made / "nnUNetPlans.json")
    ran = _plan(tmp_path, *words, "--probe")
    assert ran.exit_code == 0, ran.output
    assert sorted(measured) == ["2d", "3d_fullres"]
    assert "memory of a training step" in ran.stdout
    after = _read(made / "nnUNetPlans.json")
    memory = after.pop("seggate")["memory"]
    assert after == before
    assert memory["3d_fullres"]["peak_bytes"] == 600 * before["configurations"]["3d_fullres"]["batch_size"] * math.prod(
        before["configurations"]["3d_fullres"]["patch_size"]
    )
    assert read_plans(made / "nnUNetPlans.json").configurations.keys() == {"2d", "3d_fullres"}


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
def test_the_articles_plans_fill_the_device_where_it_is_measured(
    tmp_path: Path, folder: Path, made: Path, measured: list[str]
) -> None:
    words = [str(folder), "--plans-only", "--processes", "1", "--profile", "article", "--json"]
    if not torch_finds_a_gpu():
        plain = json.loads(_plan(tmp_path, *words).stdout)
        assert any("not measured (--device cuda: torch finds no GPU here)" in note for note in plain["notes"])
        assert plain["memory"] is None
    fitted = json.loads(_plan(tmp_path, *words, "--probe", "--device", "cpu", "--precision", "float32").stdout)
    assert len(measured) > 2
    for name, memory in fitted["memory"].items():
        assert fitted["configurations"][name]["batch_size"] == memory["batch_size"]
        assert memory["peak_bytes"] <= 0.9 * memory["total_bytes"]


def torch_finds_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.requirement("ART-04")
def test_cases_are_preprocessed_once_and_what_was_lost_is_made_again(tmp_path: Path, folder: Path, made: Path) -> None:
    words = [str(folder), "--configuration", "3d_fullres", "--processes", "1", "--json"]
    ran = _plan(tmp_path, *words)
    assert ran.exit_code == 0, ran.output
    data = made / "nnUNetPlans_3d_fullres"
    assert json.loads(ran.stdout)["written"]["preprocessed 3d_fullres"] == str(data)
    assert case_names(data) == tuple(f"case_{index:02}" for index in range(6))
    assert not (made / "nnUNetPlans_2d").exists()
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    (data / "case_03.json").unlink()
    assert _plan(tmp_path, *words).exit_code == 0
    changed = {path.name for path in data.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"case_03.json", "case_03.npy", "case_03_seg.npy", "case_03_locations.npz"}


def test_a_disk_that_is_too_small_is_refused_with_numbers_and_nothing_is_preprocessed(
    tmp_path: Path, folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.experiment.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    ran = _plan(tmp_path, str(folder), "--processes", "1", "--json")
    assert ran.exit_code == 1
    assert re.search(r"need about \d+ MiB and 0 MiB are free", json.loads(ran.stdout)["error"])
    assert not list(made.glob("*_3d_fullres/*"))


def test_memory_decides_how_many_cases_are_made_at_once_and_too_little_is_refused(
    tmp_path: Path, folder: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.experiment.available_bytes", lambda: 10 * 2**20)
    ran = _plan(tmp_path, str(folder), "--processes", "2", "--json")
    assert ran.exit_code == 1
    assert re.search(r"largest case needs about \d+ MiB and 10 MiB are free", json.loads(ran.stdout)["error"])
    assert not list(made.glob("*_3d_fullres/*"))
    monkeypatch.setattr("engine.experiment.available_bytes", lambda: 150 * 2**20)
    ran = _plan(tmp_path, str(folder), "--processes", "2", "--json")
    assert ran.exit_code == 0, ran.output
    assert "1 of 2 processes: free memory" in ran.stderr
    assert len(case_names(made / "nnUNetPlans_3d_fullres")) == 6


def test_an_unknown_configuration_is_named_with_those_that_there_are(tmp_path: Path, folder: Path) -> None:
    ran = _plan(tmp_path, str(folder), "--configuration", "4d", "--processes", "1", "--json")
    assert ran.exit_code == 1
    assert "no configuration '4d'; there are 2d, 3d_fullres" in json.loads(ran.stdout)["error"]


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("ART-05")
def test_a_fingerprint_made_elsewhere_is_planned_alone(tmp_path: Path, shared_root: Path) -> None:
    reference = shared_root / "reference" / "plans" / "ct_large_902"
    out = tmp_path / "plans.json"
    words = ["--fingerprint", str(reference / "dataset_fingerprint.json")]
    words += ["--dataset-json", str(reference / "dataset.json"), "--dataset-name", "Dataset902_TSlarge"]
    ran = _plan(tmp_path, *words, "--out", str(out))
    assert ran.exit_code == 0, ran.output
    assert _read(out) == _read(reference / "nnUNetPlans.json")
    assert not (tmp_path / "preprocessed").exists()


@pytest.mark.requirement("ART-10")
def test_patients_of_the_dataset_are_kept_together(tmp_path: Path, made: Path) -> None:
    patients = {f"case_{index:02}": f"p{index // 2}" for index in range(12)}
    folder = write_dataset(tmp_path / NAME, cases=12, shape=SHAPE, patients=patients)
    assert _plan(tmp_path, str(folder), "--processes", "1").exit_code == 0
    for fold in _read(made / "splits_final.json"):
        assert not {patients[name] for name in fold["train"]} & {patients[name] for name in fold["val"]}


def test_splits_that_tear_patients_apart_are_noted(tmp_path: Path) -> None:
    patients = {f"case_{index:02}": f"p{index // 2}" for index in range(12)}
    folder = write_dataset(tmp_path / NAME, cases=12, shape=SHAPE, patients=patients)
    ran = _plan(tmp_path, str(folder), "--processes", "1", "--splits", "nnunet", "--json")
    (note,) = json.loads(ran.stdout)["notes"]
    assert "too good" in note
    assert "p0" not in note


def test_splits_that_are_there_are_kept_and_never_changed(tmp_path: Path, folder: Path, made: Path) -> None:
    made.mkdir(parents=True)
    names = [f"case_{index:02}" for index in range(6)]
    own = [{"train": names[:4], "val": names[4:]}]
    (made / "splits_final.json").write_text(json.dumps(own))
    assert _plan(tmp_path, str(folder), "--processes", "1").exit_code == 0
    assert _read(made / "splits_final.json") == own
    refused = _plan(tmp_path, str(folder), "--processes", "1", "--splits", "nnunet")
    assert refused.exit_code == 1
    assert "other splits are already there" in refused.stderr
    assert _read(made / "splits_final.json") == own


def test_new_cases_are_named_and_join_the_folds_when_they_are_asked_to(
    tmp_path: Path, folder: Path, made: Path
) -> None:
    words = [str(folder), "--plans-only", "--processes", "1", "--json"]
    assert _plan(tmp_path, *words).exit_code == 0
    before = _read(made / "splits_final.json")
    for sub, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / sub / f"case_05{ending}", folder / sub / f"case_06{ending}")
    document = _read(folder / "dataset.json")
    (folder / "dataset.json").write_text(json.dumps({**document, "numTraining": 7}))
    kept = json.loads(_plan(tmp_path, *words).stdout)
    assert any("1 case(s) are in no fold: case_06;" in note for note in kept["notes"])
    assert _read(made / "splits_final.json") == before
    extended = json.loads(_plan(tmp_path, *words, "--splits", "extend").stdout)
    assert any("1 new case(s) are in the folds now (case_06)" in note for note in extended["notes"])
    after = _read(made / "splits_final.json")
    assert sum("case_06" in fold["val"] for fold in after) == 1
    assert sum("case_06" in fold["train"] for fold in after) == 4
    without = [{side: [n for n in fold[side] if n != "case_06"] for side in fold} for fold in after]
    assert without == [{side: sorted(fold[side]) for side in fold} for fold in before]
    again = json.loads(_plan(tmp_path, *words, "--splits", "extend").stdout)
    assert _read(made / "splits_final.json") == after
    assert not any("case_06" in note for note in again["notes"])


def test_splits_that_are_not_there_cannot_be_extended(tmp_path: Path, folder: Path) -> None:
    ran = _plan(tmp_path, str(folder), "--splits", "extend", "--plans-only", "--processes", "1")
    assert ran.exit_code == 1
    assert "plan without it first" in ran.stderr


def test_the_datasets_own_splits_are_taken(tmp_path: Path, folder: Path, made: Path) -> None:
    names = [f"case_{index:02}" for index in range(6)]
    own = [{"train": names[1:], "val": names[:1]}]
    (folder / "splits_final.json").write_text(json.dumps(own))
    assert _plan(tmp_path, str(folder), "--processes", "1").exit_code == 0
    assert _read(made / "splits_final.json") == own
    assert _plan(tmp_path, str(folder), "--processes", "1", "--splits", "stratified").exit_code == 1


def test_too_few_cases_for_folds_are_planned_with_a_note(tmp_path: Path, made: Path) -> None:
    folder = write_dataset(tmp_path / NAME, cases=3, shape=SHAPE)
    ran = _plan(tmp_path, str(folder), "--processes", "1", "--json")
    assert ran.exit_code == 0
    assert "fold `all`" in json.loads(ran.stdout)["notes"][0]
    assert not (made / "splits_final.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give a dataset's folder"),
        (["--fingerprint", "f.json"], "--dataset-json"),
        (["DIR", "--fingerprint", "f.json", "--dataset-json", "d.json"], "not both"),
        (["--fingerprint", "f.json", "--dataset-json", "d.json", "--splits", "nnunet"], "--splits and --processes"),
        (["DIR", "--overwrite-target-spacing", "0", "1", "1"], "above 0"),
        (["DIR", "--plans-name", "../x"], "--plans-name"),
        (["DIR", "--out", "x.json"], "--plans-only"),
        (["DIR", "--plans-only", "--configuration", "2d"], "--configuration"),
    ],
)
def test_options_that_do_not_go_together_end_with_2(tmp_path: Path, words: list[str], named: str) -> None:
    ran = _plan(tmp_path, *words)
    assert ran.exit_code == 2
    assert named in ran.stderr


def test_a_dataset_at_fault_ends_with_1_and_says_which_case(tmp_path: Path, folder: Path, made: Path) -> None:
    (folder / "labelsTr" / "case_02.nii.gz").write_bytes(b"nothing")
    ran = _plan(tmp_path, str(folder), "--processes", "1", "--json")
    assert ran.exit_code == 1
    assert "case_02.nii.gz" in json.loads(ran.stdout)["error"]
    assert "Traceback" not in ran.output
    assert not made.exists()
