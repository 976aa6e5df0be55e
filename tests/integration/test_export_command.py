"""`seggate export`: a bundle that gives the labels of the validated networks, with their figures in its card."""
# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch
from typer.testing import CliRunner

from engine.bundle import load_bundle
from engine.nifti import read_label_map, read_nifti
from engine.predictor import Predictor
from engine.provenance import cases_digest
from gateway.cli import app
from gateway.results.quality import judge
from tests.support.config_folder import write_config
from tests.support.tiny_experiment import NAME, planned, seggate, shown

CASES = 22
LEARNS = ("--epochs", "4", "--iterations", "10", "--precision", "float32", "--threads", "1", "--deterministic")


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("selected")
    raw = planned(root, cases=CASES, licence="CC-BY-SA 4.0", reference="made by a test")
    for words in (["train", str(raw), *LEARNS], ["select", str(raw)]):
        ran = seggate(root, *words)
        assert ran.exit_code == 0, ran.output
    return root


@pytest.fixture(scope="module")
def exported(selected: Path) -> Any:
    ran = seggate(selected, "export", str(selected / NAME), "--processes", "1", "--json")
    assert ran.exit_code == 0, ran.output
    return shown(ran)


@pytest.mark.requirement("ART-13", open="a GPU")
def test_the_bundle_has_every_fold_and_says_how_good_it_is(selected: Path, exported: Any) -> None:
    bundle = load_bundle(Path(exported["bundle"]))
    assert Path(exported["bundle"]) == (selected / "results" / NAME / "bundles" / "1.0.0").resolve()
    assert (bundle.name, bundle.semver, bundle.licence) == ("tiny", "1.0.0", "CC-BY-SA 4.0")
    assert [fold.fold for fold in bundle.configurations[0].folds] == ["0", "1"]
    assert len(bundle.parity) == 2
    folder = next((selected / "results" / NAME).glob("nnUNet*/crossval_results_folds_0_1/postprocessed"))
    means = json.loads((folder / "summary.json").read_text())
    assert f"mean foreground Dice {means['foreground_mean']['Dice']:.4f}" in bundle.description
    assert f"first: Dice {means['mean']['1']['Dice']:.4f}" in bundle.description
    assert f"of {CASES} cases by the fold that never saw it" in bundle.description
    assert f"{CASES} cases of Dataset901_Tiny; made by a test" in bundle.origin
    assert bundle.contract.orientation == "LPS"
    assert bundle.ensemble == "probabilities"


def test_a_fold_of_the_bundle_gives_the_labels_of_its_validation(selected: Path, exported: Any) -> None:
    bundle = load_bundle(Path(exported["bundle"]))
    volume = read_nifti([selected / NAME / "imagesTr" / "case_00_0000.nii.gz"])
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        found = predictor.predict(volume, folds=["0"]).labels.array
    folder = next((selected / "results" / NAME).glob("nnUNet*/crossval_results_folds_0_1/postprocessed"))
    validated = read_label_map(folder / "case_00.nii.gz").array
    assert (found == validated).mean() >= 0.9999


@pytest.mark.requirement("ART-16")
def test_the_bundle_estimates_the_quality_of_what_it_predicts(selected: Path, exported: Any) -> None:
    """The calibration's own cases are those of the cross-validation, predicted and measured as `select` had them."""
    bundle = load_bundle(Path(exported["bundle"]))
    assert bundle.calibration is not None
    known = set(bundle.calibration.labels)
    # So short a training finds one of the labels in too few cases; then a note says so.
    assert known
    assert known | {note.split(":")[0] for note in bundle.calibration.notes} == {"first", "second"}
    assert set(bundle.calibration.notes) <= set(exported["notes"])
    assert exported["calibration"] == json.loads((bundle.root / "calibration.json").read_text())
    assert "Estimate of quality without a reference, cross-fitted on 22 cases" in bundle.description
    (file,) = (selected / "results" / NAME / "calibration").glob("*.jsonl")
    lines = [json.loads(text) for text in file.read_text().splitlines() if text]
    folder = next((selected / "results" / NAME).glob("nnUNet*/crossval_results_folds_0_1/postprocessed"))
    summary = json.loads((folder / "summary.json").read_text())
    validated = {Path(entry["prediction_file"]).name[:7]: entry["metrics"] for entry in summary["metric_per_case"]}
    assert len(lines) == CASES
    for line in lines:
        for name, value in (("first", "1"), ("second", "2")):
            assert line["segments"][name]["dice"] == pytest.approx(validated[line["case"]][value]["Dice"], abs=1e-3)
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        found = predictor.predict(read_nifti([selected / NAME / "imagesTr" / "case_00_0000.nii.gz"]))
    rows = [vars(segment) | {"centroid_lps_mm": None} for segment in found.segments]
    _, checks = judge(rows, mean_confidence=found.mean_confidence, bundle=bundle, doubts=())
    assert {c.segment for c in checks if c.name == "calibrated-range"} == known


def test_without_calibration_the_bundle_says_nothing_of_quality(tmp_path: Path, selected: Path) -> None:
    words = ["export", str(selected / NAME), "--out", str(tmp_path / "bundle"), "--no-calibration", "--json"]
    ran = seggate(selected, *words)
    assert ran.exit_code == 0, ran.output
    assert load_bundle(tmp_path / "bundle").calibration is None
    assert not (tmp_path / "bundle" / "calibration.json").exists()
    assert shown(ran)["calibration"] is None
    assert any(note.startswith("--no-calibration") for note in shown(ran)["notes"])


def test_the_bundle_can_be_imported_and_serves(tmp_path: Path, exported: Any) -> None:
    config = write_config(tmp_path)
    ran = CliRunner().invoke(app, ["models", "import", exported["bundle"], "--config", str(config), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["state"] == "champion"
    verified = CliRunner().invoke(app, ["models", "verify", "--config", str(config), "--json"])
    assert verified.exit_code == 0, verified.output
    [row] = json.loads(verified.stdout)
    assert [case["changed"] for case in row["sanity"]["cases"]] == [0, 0, 0]
    shown_to_people = CliRunner().invoke(app, ["models", "show", "tiny", "--config", str(config)])
    for text in ("Training data", "CC-BY-SA 4.0", "Intensity baseline: 22 cases", "plans-grid", "seconds a window"):
        assert text in shown_to_people.stdout


@pytest.mark.requirement("ART-13", open="a GPU")
@pytest.mark.requirement("ART-20", open="the monitoring itself, its window and threshold")
def test_the_bundle_brings_baseline_sanity_cases_and_provenance(selected: Path, exported: Any) -> None:
    evidence = load_bundle(Path(exported["bundle"])).evidence
    assert evidence.baseline is not None
    assert (evidence.baseline.cases, evidence.baseline.labels) == (22, ("first", "second"))
    assert exported["baseline_cases"] == 22
    assert evidence.sanity is not None
    assert [case.name for case in evidence.sanity.cases] == ["plans-grid", "thick-slices", "turned"]
    assert evidence.provenance is not None
    data = evidence.provenance.data
    assert (data.licence, data.reference, data.cases) == ("CC-BY-SA 4.0", "made by a test", 22)
    assert data.cases_digest == cases_digest(f"case_{index:02}" for index in range(22))
    assert data.excluded == 0
    validation = evidence.provenance.validation
    assert validation is not None
    assert (validation.cases, set(validation.labels)) == (CASES, {"first", "second"})
    assert f"mean foreground Dice {validation.dice:.4f}" in exported["description"]
    for fold in evidence.provenance.training:
        assert fold.data_digest
        assert (fold.epochs, fold.planned_epochs, fold.iterations, fold.precision) == (4, 4, 10, "float32")
        assert (fold.training_cases, fold.validation_cases, fold.deterministic) == (11, 11, True)
        assert fold.software == evidence.provenance.exported_by
    assert not any("case_0" in path.read_text() for path in Path(exported["bundle"]).rglob("*.json"))


def test_cases_of_the_dataset_become_sanity_cases_with_their_dice_and_weights_may_be_fp16(
    tmp_path: Path, selected: Path
) -> None:
    words = ["--sanity-case", "case_02", "--sanity-case", "case_04", "--no-phantoms", "--out", str(tmp_path / "bundle")]
    ran = seggate(selected, "export", str(selected / NAME), *words, "--weights", "fp16", "--json")
    assert ran.exit_code == 0, ran.output
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.weights == shown(ran)["weights"] == "fp16"
    assert bundle.evidence.sanity is not None
    assert [case.name for case in bundle.evidence.sanity.cases] == ["site-1", "site-2"]
    expected = bundle.evidence.sanity.cases[0].dice
    assert expected is not None
    volume = read_nifti([selected / NAME / "imagesTr" / "case_02_0000.nii.gz"])
    reference = read_label_map(selected / NAME / "labelsTr" / "case_02.nii.gz").array
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        found = predictor.predict(volume).labels.array
    for value, name in ((1, "first"), (2, "second")):
        both = ((found == value) & (reference == value)).sum()
        dice = 2 * both / ((found == value).sum() + (reference == value).sum())
        assert expected[name] == pytest.approx(dice, abs=0.01)


def test_a_sanity_case_that_is_no_case_is_refused_before_the_work(tmp_path: Path, selected: Path) -> None:
    words = ["--sanity-case", "nobody", "--out", str(tmp_path / "bundle")]
    ran = seggate(selected, "export", str(selected / NAME), *words)
    assert ran.exit_code == 1
    assert "'nobody' is no case of Dataset901_Tiny" in ran.stderr


def test_a_card_goes_before_what_is_known(tmp_path: Path, selected: Path) -> None:
    card = tmp_path / "card.toml"
    card.write_text('name = "mine"\nsemver = "2.1.0"\ndescription = "Ours."\n[contract]\norientation = "RAS"\n')
    words = ["export", str(selected / NAME), "--card", str(card), "--out", str(tmp_path / "bundle"), "--json"]
    ran = seggate(selected, *words)
    assert ran.exit_code == 0, ran.output
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.name, bundle.semver, bundle.description) == ("mine", "2.1.0", "Ours.")
    assert bundle.contract.orientation == "RAS"


def test_what_was_exported_is_not_overwritten(selected: Path, exported: Any) -> None:
    ran = seggate(selected, "export", str(selected / NAME), "--json")
    assert ran.exit_code == 1
    assert "exists already" in shown(ran)["error"]


def test_nothing_selected_is_said(tmp_path: Path) -> None:
    ran = seggate(tmp_path, "export", str(planned(tmp_path)))
    assert ran.exit_code == 1
    assert "run `seggate select` first" in ran.stderr


def test_what_was_trained_anew_or_on_other_folds_since_it_was_selected_is_not_exported(
    tmp_path: Path, selected: Path
) -> None:
    """Its figures would be those of other networks, its calibration made of cases that a network has learnt."""
    root = shutil.copytree(selected, tmp_path / "copy")
    raw, splits = root / NAME, root / "preprocessed" / NAME / "splits_final.json"
    before = splits.read_text()
    splits.write_text(json.dumps(json.loads(before)[::-1]))
    ran = seggate(root, "export", str(raw), "--no-calibration")
    assert (ran.exit_code, "is of other folds than those of splits_final.json" in ran.output) == (1, True), ran.output
    splits.write_text(before)
    for folder in (root / "results" / NAME).glob("nnUNet*/fold_0"):
        shutil.rmtree(folder)
    words = ("--fold", "0", "--epochs", "1", "--iterations", "1", "--precision", "float32", "--seed", "5")
    assert seggate(root, "train", str(raw), *words).exit_code == 0
    ran = seggate(root, "export", str(raw), "--no-calibration")
    assert (ran.exit_code, "fold_0 was trained or validated anew since" in ran.output) == (1, True), ran.output
    assert not (root / "results" / NAME / "bundles" / "1.1.0").exists()
    assert seggate(root, "select", str(raw)).exit_code == 0
    assert seggate(root, "export", str(raw), "--no-calibration", "--semver", "1.1.0").exit_code == 0
