"""`seggate dataset exclude`: the case is used no more, and everything that was trained on it is named."""
# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.bundle import load_bundle
from engine.experiment import open_experiment
from engine.fingerprint import read_fingerprint
from gateway.cli import app
from tests.support.raw_datasets import write_dataset
from tests.support.tiny_experiment import NAME, planned, seggate, shown

MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
BRIEF = (
    *("--configuration", "3d_fullres", "--epochs", "1", "--iterations", "1"),
    *("--precision", "float32", "--threads", "1"),
)


def _exclude(root: Path, *words: str) -> Result:
    where = ("--preprocessed", str(root / "preprocessed"), "--results", str(root / "results"))
    return CliRunner().invoke(app, ["dataset", "exclude", *words, *where])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of six cases, trained, selected and exported. Fold 0 validates cases 00, 02, 04."""
    root, threads = tmp_path_factory.mktemp("exported"), torch.get_num_threads()
    raw = planned(root)
    for words in (["train", str(raw), *BRIEF], ["select", str(raw)], ["export", str(raw)]):
        ran = seggate(root, *words)
        assert ran.exit_code == 0, ran.output
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def trained(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def test_folds_and_bundles_that_were_trained_on_the_case_are_named(trained: Path) -> None:
    raw = trained / NAME
    document = shown(_exclude(trained, "case_02", str(raw), "--reason", "motion", "--json"))
    assert document["ok"]
    assert (document["state"], document["reason"], document["cases"]) == ("excluded", "motion", 5)
    assert [(f["model"], f["fold"], f["roles"], f["trained_on"], f["finished"]) for f in document["folds"]] == [
        (MODEL, "0", ["validation"], False, True),
        (MODEL, "1", ["train"], True, True),
    ]
    assert [(b["semver"], b["folds"]) for b in document["bundles"]] == [("1.0.0", [f"{MODEL}/fold_1"])]
    notes = "\n".join(document["notes"])
    assert "was planned with case_02: its folds drop the case from now on" in notes
    assert "know it until they are trained again" in notes
    for_people = _exclude(trained, "case_02", str(raw), "--reason", "motion")
    assert for_people.exit_code == 0
    assert "What knows case_02\n" in for_people.stdout
    assert "1.0.0" in for_people.stdout


def test_a_bundle_is_traced_when_its_folds_are_gone_or_trained_anew(trained: Path) -> None:
    """By the digests of its provenance; where no list of cases has that digest, that is said."""
    raw, model = trained / NAME, trained / "results" / NAME / MODEL
    shutil.rmtree(model)
    words = ("case_02", str(raw), "--reason", "motion", "--json")
    document = shown(_exclude(trained, *words))
    assert document["folds"] == []
    assert [(b["semver"], b["folds"], b["untraced"]) for b in document["bundles"]] == [
        ("1.0.0", [f"{MODEL}/fold_1"], None)
    ]
    assert seggate(trained, "train", str(raw), *BRIEF).exit_code == 0
    assert shown(_exclude(trained, *words))["bundles"] == document["bundles"]
    (trained / "preprocessed" / NAME / "splits_final.json").unlink()
    (found,) = shown(_exclude(trained, *words))["bundles"]
    assert "no list of cases that is here is the one that it was trained on: 3d_fullres/fold_1" in found["untraced"]


def test_what_is_exported_after_an_exclusion_says_that_its_networks_know_the_case(trained: Path) -> None:
    raw = trained / NAME
    assert _exclude(trained, "case_02", str(raw), "--reason", "motion").exit_code == 0
    assert seggate(trained, "select", str(raw)).exit_code == 0
    document = shown(seggate(trained, "export", str(raw), "--semver", "1.1.0", "--no-calibration", "--json"))
    assert "learned from 6 cases, and 1 of them are excluded since (the first: case_02)" in "\n".join(document["notes"])
    bundle = load_bundle(Path(document["bundle"]))
    assert "on 6 cases of Dataset901_Tiny, 1 of which excluded since" in bundle.origin
    assert bundle.evidence.provenance is not None
    assert bundle.evidence.provenance.data.cases == 6


def test_planning_training_and_selection_go_on_without_the_case(trained: Path) -> None:
    raw = trained / NAME
    assert _exclude(trained, "case_02", str(raw), "--reason", "motion").exit_code == 0
    experiment = open_experiment(raw, trained / "preprocessed", plans_name=None)
    assert [(s.train, s.val) for s in experiment.splits()] == [
        (("case_01", "case_03", "case_05"), ("case_00", "case_04")),
        (("case_00", "case_04"), ("case_01", "case_03", "case_05")),
    ]
    assert "case_02" not in experiment.split("all").train
    # A finished fold stays; what it says of the case counts no more.
    stays = shown(seggate(trained, "train", str(raw), *BRIEF, "--json"))
    assert [fold["state"] for fold in stays["folds"]] == ["finished"] * 2
    selected = seggate(trained, "select", str(raw), "--json")
    assert selected.exit_code == 0, selected.output
    assert "learned from 1 case(s) that are excluded since (the first: case_02)" in shown(selected)["notes"][0]
    crossval = trained / "results" / NAME / MODEL / "crossval_results_folds_0_1" / "summary.json"
    cases = [Path(c["prediction_file"]).name for c in json.loads(crossval.read_text())["metric_per_case"]]
    assert cases == [f"case_{index:02}.nii.gz" for index in (0, 1, 3, 4, 5)]
    # Folds that begin anew have four cases to train or validate on.
    shutil.rmtree(trained / "results")
    again = shown(seggate(trained, "train", str(raw), *BRIEF, "--json"))
    assert again["state"] == "finished"
    request = json.loads((trained / "results" / NAME / MODEL / "fold_1" / "training.json").read_text())
    assert request["train"] == ["case_00", "case_04"]
    assert shown(_exclude(trained, "case_02", str(raw), "--reason", "motion", "--json"))["folds"] == []


def test_planned_again_fingerprint_and_plans_are_without_the_case(trained: Path) -> None:
    raw, planned_folder = trained / NAME, trained / "preprocessed" / NAME
    assert _exclude(trained, "case_02", str(raw), "--reason", "motion").exit_code == 0
    ran = shown(seggate(trained, "plan", str(raw), "--plans-only", "--json"))
    assert "1 excluded case(s) are left out" in ran["notes"]
    assert "case_02" not in {c.name for c in read_fingerprint(planned_folder / "dataset_fingerprint.json").cases}
    splits = json.loads((planned_folder / "splits_final.json").read_text())
    assert splits[0]["val"] == ["case_00", "case_04"]
    notes = shown(_exclude(trained, "case_02", str(raw), "--undo", "--json"))["notes"]
    assert any("no fold has it" in note for note in notes)


def test_an_exclusion_is_taken_back(trained: Path) -> None:
    raw = trained / NAME
    assert _exclude(trained, "case_02", str(raw), "--reason", "motion").exit_code == 0
    document = shown(_exclude(trained, "case_02", str(raw), "--undo", "--json"))
    assert (document["state"], document["reason"], document["cases"]) == ("used", "motion", 6)
    assert any("its folds have case_02 again" in note for note in document["notes"])
    experiment = open_experiment(raw, trained / "preprocessed", plans_name=None)
    assert experiment.splits()[0].val == ("case_00", "case_02", "case_04")
    assert not (raw / "exclusions.json").exists()


def test_a_case_that_no_fold_has_any_more_is_said_when_it_comes_back(tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / NAME)
    assert _exclude(tmp_path, "case_02", str(raw), "--reason", "motion").exit_code == 0
    names = [f"case_{index:02}" for index in (0, 1, 3, 4, 5)]
    folds = [{"train": [n for n in names if n != name], "val": [name]} for name in names]
    preprocessed = tmp_path / "preprocessed" / NAME
    preprocessed.mkdir(parents=True)
    (preprocessed / "splits_final.json").write_text(json.dumps(folds))
    (preprocessed / "dataset_fingerprint.json").write_text("{}")
    document = shown(_exclude(tmp_path, "case_02", str(raw), "--undo", "--json"))
    assert "no fold has it: remove splits_final.json there and plan again" in document["notes"][0]


def test_the_check_lists_it_and_the_rest_of_the_patient_is_named(tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / NAME, patients={"case_01": "p", "case_02": "p", "case_03": "q"})
    document = shown(_exclude(tmp_path, "case_02", str(raw), "--reason", "wrong  side", "--json"))
    assert "other cases of the same patient stay in use: case_01" in document["notes"]
    assert any("no models were looked for" in note for note in document["notes"])
    checked = CliRunner().invoke(app, ["dataset", "check", str(raw), "--processes", "1", "--json"])
    (excluded,) = json.loads(checked.stdout)["excluded"]
    assert excluded == {"case": "case_02", "reason": "wrong side", "excluded_at": document["excluded_at"]}
    for_people = CliRunner().invoke(app, ["dataset", "check", str(raw), "--processes", "1"])
    assert "5 cases, 0 errors, 0 warnings, 1 excluded" in for_people.stdout


def test_the_folder_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_dataset(tmp_path / NAME))
    ran = CliRunner().invoke(app, ["dataset", "exclude", "case_02", "--reason", "motion"])
    assert ran.exit_code == 0, ran.output
    assert "case_02" in json.loads((tmp_path / NAME / "exclusions.json").read_text())["cases"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("case_77", "--reason", "x"), 1, "'case_77' is no case of Dataset901_Tiny"),
        (("case_00", "--undo"), 1, "'case_00' is not excluded"),
        (("case_00",), 2, "give --reason TEXT, or --undo"),
        (("case_00", "--undo", "--reason", "x"), 2, "give --reason TEXT, or --undo"),
        (("case_00", "--reason", "  "), 1, "a reason of 1 to 1000 characters"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(
    tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    raw = write_dataset(tmp_path / NAME)
    ran = _exclude(tmp_path, words[0], str(raw), *words[1:])
    assert (ran.exit_code, message in ran.output, "Traceback" in ran.output) == (code, True, False), ran.output
    assert not (raw / "exclusions.json").exists()


def test_the_last_case_stays(tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / NAME, cases=2)
    assert _exclude(tmp_path, "case_00", str(raw), "--reason", "x").exit_code == 0
    ran = _exclude(tmp_path, "case_01", str(raw), "--reason", "x")
    assert (ran.exit_code, "the only case that is left" in ran.output) == (1, True)


def test_a_fold_that_cannot_be_read_changes_nothing_it_should_not(tmp_path: Path) -> None:
    """The case is excluded first; what is asked afterwards may fail, and is asked again by the same command."""
    raw = write_dataset(tmp_path / NAME)
    fold = tmp_path / "results" / NAME / MODEL / "fold_0"
    fold.mkdir(parents=True)
    (fold / "training.json").write_text("{")
    ran = _exclude(tmp_path, "case_00", str(raw), "--reason", "x")
    assert ran.exit_code == 1
    assert "case_00 is excluded, but" in ran.output
    assert "fold_0/training.json" in ran.output
    assert "case_00" in json.loads((raw / "exclusions.json").read_text())["cases"]
