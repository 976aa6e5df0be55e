"""gateway.model_plans: each machine's plan of a version, measured when there is none that holds, and obeyed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from structlog.testing import capture_logs

from engine import tuning
from engine.backends import BackendChoice
from engine.bundle import Bundle
from engine.errors import BackendFailed
from engine.execution_plan import ExecutionPlan
from engine.phantom_planning import plan_phantoms
from engine.sanity_check import compare_labels
from engine.sanity_phantom import make_phantom
from gateway.model_plans import ModelPlans, open_planned
from gateway.model_shelf import ModelShelf
from storage.models import ModelRegistry, RegisteredModel
from tests.support.execution_plans import brightness_bundle, plan_of


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return brightness_bundle(tmp_path / "bundle", mirror_axes=(0,))


@pytest.fixture
def plans(tmp_path: Path) -> ModelPlans:
    return ModelPlans(tmp_path / "models")


class Measured:
    """Counts what would have been measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        monkeypatch.setattr(tuning, "first_plan", self)

    def __call__(self, bundle: Bundle, **_: Any) -> ExecutionPlan:
        self.times += 1
        return replace(plan_of(bundle), origin="first-use")


def test_a_plan_that_was_kept_is_found_and_one_of_another_machine_only_shown(bundle: Bundle, plans: ModelPlans) -> None:
    plan = plan_of(bundle)
    other = replace(plan, machine=replace(plan.machine, cores=99))
    assert plans.find(bundle).plan is None
    plans.save(other)
    assert plans.find(bundle).plan is None
    path = plans.save(plan)
    assert plans.find(bundle).plan == plan
    assert sorted(p.machine.cores for p in plans.all(bundle.name, bundle.semver)) == sorted((plan.machine.cores, 99))
    assert path.parts[-4:-1] == ("tiny", "plans", "1.0.0")
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_at_first_use_a_plan_is_measured_once_and_kept(
    bundle: Bundle, plans: ModelPlans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = Measured(monkeypatch)
    plan = plans.in_force(bundle)
    assert plan is not None
    assert plans.in_force(bundle) == plan
    assert ModelPlans(tmp_path / "models").in_force(bundle) == plan  # another process
    assert measured.times == 1


def test_a_plan_that_no_longer_holds_is_told_and_measured_anew_without_tolerance(
    bundle: Bundle, plans: ModelPlans, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    old = plan_of(bundle, tolerance=1e-2, mirroring="none")
    plans.save(replace(old, libraries={**old.libraries, "openvino": "2025.0"}))
    with capture_logs() as logs:
        plan = plans.in_force(bundle)
    assert plan is not None
    assert plan.is_exact
    assert measured.times == 1
    assert "openvino was 2025.0" in str(logs[0]["reasons"])


def test_a_damaged_plan_is_told_and_measured_anew(
    bundle: Bundle, plans: ModelPlans, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    path = plans.save(plan_of(bundle))
    path.write_text("{", encoding="utf-8")
    assert path.name in plans.find(bundle).reasons[0]
    assert plans.all("tiny", "1.0.0") == ()
    assert plans.in_force(bundle) is not None
    assert measured.times == 1


def test_settings_that_the_plan_does_not_keep_make_it_measured_anew(
    bundle: Bundle, plans: ModelPlans, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch)
    plans.save(plan_of(bundle))
    assert plans.in_force(bundle, threads=2) is not None
    assert measured.times == 0
    plans.in_force(bundle, threads=1)
    assert measured.times == 1


def test_what_cannot_be_measured_or_kept_does_not_keep_a_model_from_running(
    bundle: Bundle, plans: ModelPlans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "models").write_text("no folder")
    Measured(monkeypatch)
    assert plans.in_force(bundle) is not None

    def fails(*_: Any, **__: Any) -> Any:
        raise BackendFailed("no backend at all")

    monkeypatch.setattr(tuning, "first_plan", fails)
    assert plans.in_force(bundle) is None


def test_a_plan_that_cannot_be_opened_any_more_is_told_and_left(bundle: Bundle) -> None:
    gone = plan_of(bundle, choice=BackendChoice(runtime="openvino", provider="cuda", precision="float32"))
    with capture_logs() as logs:
        predictor, plan = open_planned(bundle, gone, device="cpu")
    with predictor:
        assert plan is None
        assert predictor.runtime.startswith("onnxruntime")
    assert logs[0]["log_level"] == "error"


def _registered(bundle: Bundle) -> RegisteredModel:
    return RegisteredModel(
        name=bundle.name,
        semver=bundle.semver,
        registry_version=1,
        folder=bundle.root,
        weights_digest=bundle.weights_digest,
        configuration_digest=bundle.configuration_digest,
        licence="",
        description="",
        aliases=("champion",),
        registered_at_ms=0,
    )


@pytest.mark.parametrize("mirroring", ["full", "none"])
def test_a_worker_runs_a_model_by_its_plan_and_the_result_says_so(
    bundle: Bundle, plans: ModelPlans, mirroring: Any
) -> None:
    plans.save(plan_of(bundle, mirroring=mirroring, tolerance=1e-3))
    model = _registered(bundle)
    shelf, plain = (
        ModelShelf(cast(ModelRegistry, None), device="cpu", threads=2, plans=known) for known in (plans, None)
    )
    volume = make_phantom(dict(plan_phantoms(bundle))["turned"])
    found = shelf.predict(model, volume, budget_bytes=None)
    runtime = found.runtime
    assert (runtime.backend, runtime.provider, runtime.precision, runtime.threads) == ("openvino", "cpu", "float32", 2)
    assert "openvino" in runtime.versions
    assert runtime.left_out == (("mirrored passes",) if mirroring == "none" else ())
    assert (found.segments[0].mirror_dice is None) == (mirroring == "none")
    expected = plain.predict(model, volume, budget_bytes=None)
    assert expected.runtime.backend == "onnxruntime"
    agreement = compare_labels("turned", expected.labels.array, found.labels.array, bundle.labels)
    assert agreement.faults == ()
    assert np.unique(found.labels.array).tolist() == [0, 1, 2]
    for one in (shelf, plain):
        one.close()


def test_the_file_is_plain_json_without_a_name_of_the_machine(bundle: Bundle, plans: ModelPlans) -> None:
    text = plans.save(plan_of(bundle)).read_text(encoding="utf-8")
    assert json.loads(text)["choice"]["runtime"] == "openvino"
    assert os.uname().nodename not in text
