"""`seggate predict` and execution plans: measured once, kept, shared with the gateway for registered models, and told
where they cost something."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engine import tuning
from engine.backends import BackendChoice
from engine.bundle import Bundle
from engine.execution_plan import ExecutionPlan
from engine.nifti import read_label_map
from gateway.cli import app
from gateway.model_plans import ModelPlans
from gateway.prediction.request import PredictRequest, UsageRefused, check_request
from gateway.settings import load_settings
from tests.integration.test_predict_command import SPACING, expected, image
from tests.support.execution_plans import plan_of
from tests.support.intensity_model import PHANTOM_BANDS, write_intensity_bundle
from tests.support.raw_datasets import write_array

HALF = BackendChoice(runtime="openvino", provider="cpu", precision="bf16", threads=2)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_intensity_bundle(tmp_path / "bundle" / "phantom", name="phantom")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_array(tmp_path / "a_0000.nii.gz", image(), SPACING)


class Measured:
    """Takes the place of what measures, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, **plan: Any) -> None:
        self.plan = plan
        self.asked: list[Any] = []
        monkeypatch.setattr(tuning, name, self)

    def __call__(self, bundle: Bundle, request: Any = None, **_: Any) -> ExecutionPlan:
        self.asked.append(request)
        return replace(plan_of(bundle, **self.plan), origin="first-use" if request is None else "tuned")


def predict(tmp_path: Path, file: Path, *words: Any, out: str = "out") -> Result:
    cache = ("--cache", tmp_path / "cache") if "--cache" not in words else ()
    return CliRunner().invoke(app, list(map(str, ["predict", "-i", file, "-o", tmp_path / out, *words, *cache])))


def summary(ran: Result) -> dict[str, Any]:
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def test_the_first_call_measures_and_the_next_ones_do_not(
    bundle: Bundle, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, "first_plan")
    for _ in range(2):
        ran = predict(tmp_path, file, "-m", bundle.root, "--json")
        assert ran.exit_code == 0, ran.output
        assert summary(ran)["runtime"].startswith("openvino ")
    assert len(measured.asked) == 1
    assert (read_label_map(tmp_path / "out" / "a.nii.gz").array == expected(image())).all()


def test_what_is_measured_at_first_use_gives_the_labels(bundle: Bundle, file: Path, tmp_path: Path) -> None:
    ran = predict(tmp_path, file, "-m", bundle.root, "--verbose")
    assert ran.exit_code == 0, ran.output
    assert "runs by an execution plan: " in ran.stderr
    assert len(list((tmp_path / "cache" / "plans").rglob("*.json"))) == 1
    assert (read_label_map(tmp_path / "out" / "a.nii.gz").array == expected(image())).all()


def test_two_models_of_one_name_have_plans_of_their_own(
    bundle: Bundle, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, "first_plan")
    bands = dict(reversed(list(PHANTOM_BANDS.items())))
    other = write_intensity_bundle(tmp_path / "other" / "phantom", name="phantom", bands=bands)
    for root in (bundle.root, other.root, bundle.root, other.root):
        assert predict(tmp_path, file, "-m", root).exit_code == 0
    assert len(measured.asked) == 2


def test_all_classes_are_kept_by_the_plan_too(
    bundle: Bundle, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, "first_plan")
    ran = predict(tmp_path, file, "-m", bundle.root, "--save_probabilities", "--json")
    assert ran.exit_code == 0, ran.output
    assert summary(ran)["runtime"].startswith("openvino ")


def test_a_registered_model_runs_as_it_was_tuned(bundle: Bundle, file: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gateway.toml").write_text('state_dir = "state"\n')
    config = ("--config", str(tmp_path / "config"))
    assert CliRunner().invoke(app, ["models", "import", str(bundle.root), *config]).exit_code == 0
    models = load_settings(tmp_path / "config").models_dir
    ModelPlans(models).save(plan_of(bundle, choice=HALF, tolerance=0.001))
    ran = predict(tmp_path, file, "-m", "phantom", "--json", *config)
    assert ran.exit_code == 0, ran.output
    assert summary(ran)["runtime"].endswith("bf16")
    assert "the tolerance costs 0 of 1000 voxels" in ran.stderr
    assert not (tmp_path / "cache").exists()


def test_a_tolerance_is_measured_once_told_each_time_and_not_mixed_with_exact_results(
    bundle: Bundle, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, quick = Measured(monkeypatch, "tune", choice=HALF, tolerance=0.001), Measured(monkeypatch, "first_plan")
    for _ in range(2):
        ran = predict(tmp_path, file, "-m", bundle.root, "--tolerance", "0.001", "--json")
        assert ran.exit_code == 0, ran.output
        assert summary(ran)["runtime"].endswith("bf16")
        assert "the tolerance costs 0 of 1000 voxels" in ran.stderr
    assert [asked.tolerance for asked in measured.asked] == [0.001]
    ran = predict(tmp_path, file, "-m", bundle.root, "--continue_prediction")
    assert ran.exit_code == 2
    assert "was begun with another execution" in ran.stderr
    assert len(quick.asked) == 1
    same = predict(tmp_path, file, "-m", bundle.root, "--tolerance", "0.001", "--continue_prediction", "--json")
    assert summary(same)["skipped"] == 1


def test_without_anything_to_measure_the_networks_are_opened_as_they_are(
    bundle: Bundle, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.tuning.available_backends", lambda *_, **__: ())
    ran = predict(tmp_path, file, "-m", bundle.root, "--json", "-device", "cpu")
    assert ran.exit_code == 0, ran.output
    assert summary(ran)["runtime"].startswith("onnxruntime ")
    assert "no execution plan could be measured" in ran.stderr


def test_a_cache_that_cannot_be_written_costs_measuring_again_and_no_result(
    bundle: Bundle, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Measured(monkeypatch, "tune", choice=HALF, tolerance=0.001)
    (tmp_path / "cache").write_text("a file")
    ran = predict(tmp_path, file, "-m", bundle.root, "--tolerance", "0.001")
    assert ran.exit_code == 0, ran.output
    assert "could not be kept in the cache" in ran.stderr


@pytest.mark.parametrize("tolerance", [0.0, 1e-5, 0.06, float("nan")])
def test_a_tolerance_beyond_reason_is_refused(tmp_path: Path, tolerance: float) -> None:
    request = PredictRequest(inputs=(tmp_path,), output=tmp_path, model="m", tolerance=tolerance)
    with pytest.raises(UsageRefused, match=r"--tolerance .*: from 0\.0001"):
        check_request(request)
