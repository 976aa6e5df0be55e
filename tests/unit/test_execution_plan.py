"""engine.execution_plan: a plan is read back as it was written, and used only where it was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import execution_plan
from engine.backends import BackendChoice
from engine.bundle import Bundle
from engine.errors import PlanInvalid
from engine.execution_plan import (
    CandidateFigure,
    ExecutionPlan,
    installed_libraries,
    plan_document,
    planned_bundle,
    read_plan,
)
from engine.machine import this_identity
from tests.support.execution_plans import brightness_bundle, plan_of


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return brightness_bundle(tmp_path / "bundle", mirror_axes=(0, 2))


def test_a_plan_is_read_back_as_it_was_written(bundle: Bundle) -> None:
    plan = plan_of(bundle, tolerance=1e-3, mirroring="none")
    assert read_plan(json.loads(json.dumps(plan_document(plan))), where="plan.json") == plan


def test_a_plan_holds_where_it_was_measured(bundle: Bundle) -> None:
    plan = plan_of(bundle)
    assert plan.stale_reasons(bundle, this_identity()) == []
    assert plan.stale_reasons(bundle, this_identity(), device="cpu", threads=2) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: replace(p, weights_digest="0"), "other weights"),
        (lambda p: replace(p, semver="9.9.9"), "it is of tiny 9.9.9"),
        (lambda p: replace(p, machine=replace(p.machine, cores=999)), "cores was 999"),
        (lambda p: replace(p, libraries={**p.libraries, "openvino": "1.0"}), "openvino was 1.0, is 20"),
        (lambda p: replace(p, libraries={**p.libraries, "gone": "1.0"}), "gone was 1.0, is not there"),
    ],
)
def test_what_changed_since_is_told(
    bundle: Bundle, change: Callable[[ExecutionPlan], ExecutionPlan], named: str
) -> None:
    reasons = change(plan_of(bundle)).stale_reasons(bundle, this_identity())
    assert any(named in reason for reason in reasons), reasons


def test_the_settings_of_the_worker_go_before_the_plan(bundle: Bundle) -> None:
    plan = plan_of(bundle)
    assert "the settings say cuda" in plan.stale_reasons(bundle, this_identity(), device="cuda")[0]
    assert "the settings say 7" in plan.stale_reasons(bundle, this_identity(), threads=7)[0]


def test_a_new_runtime_makes_a_plan_stale(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(bundle)
    monkeypatch.setattr(
        execution_plan, "installed_libraries", lambda: {**installed_libraries(), "onnxruntime-gpu": "1.33.0"}
    )
    assert plan.stale_reasons(bundle, this_identity()) == ["onnxruntime-gpu was not there, is 1.33.0"]


def test_a_plan_without_mirrored_passes_takes_the_axes_and_nothing_else(bundle: Bundle) -> None:
    planned = planned_bundle(bundle, plan_of(bundle, tolerance=1e-2, mirroring="none"))
    assert [c.mirror_axes for c in planned.configurations] == [()]
    assert planned.weights_digest == bundle.weights_digest
    assert planned_bundle(bundle, plan_of(bundle)) is bundle
    assert planned_bundle(bundle, None) is bundle


def test_only_strict_limits_and_every_pass_are_exact(bundle: Bundle) -> None:
    assert plan_of(bundle).is_exact
    assert not plan_of(bundle, tolerance=1e-3).is_exact
    left_out = plan_of(bundle, mirroring="none")
    assert not left_out.is_exact
    assert left_out.left_out == ("mirrored passes",)
    assert plan_of(bundle, tolerance=1e-3).limits.dice_change == pytest.approx(1e-2)


def test_a_figure_says_in_a_word_what_came_of_it(bundle: Bundle) -> None:
    figure: CandidateFigure = plan_of(bundle).figure
    assert (figure.agrees, figure.verdict) == (True, "agrees")
    assert replace(figure, cases=0).verdict == "agrees on single windows"
    assert not replace(figure, faults=("a: 7 voxels",)).agrees
    assert not replace(figure, changed_voxels=None, reason="time was up").agrees
    assert replace(figure, changed_voxels=None, reason="time was up").verdict == "time was up"


def _at(*path: str | int, value: object) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_at("format", value=2), "format"),
        (_at("choice", "runtime", value="tensorflow"), "tensorflow"),
        (_at("choice", "precision", value="int8"), "int8"),
        (_at("choice", "batch", value=0), "batch"),
        (_at("choice", "threads", value=-1), "threads"),
        (_at("choice", "threads", value=3), "lack what was chosen"),
        (_at("tolerance", value=0.5), "tolerance"),
        (_at("mirroring", value="half"), "mirroring"),
        (_at("figures", value=[]), "figures"),
        (_at("figures", 0, "changed_voxels", value="many"), "changed_voxels"),
        (_at("figures", 0, "dice_change", value={"a": 2.0}), "dice_change"),
        (_at("machine", "cores", value=0), "cores"),
        (_at("libraries", value=[]), "libraries"),
    ],
)
def test_a_value_of_wrong_type_or_range_is_refused_with_its_key(
    bundle: Bundle, edit: Callable[[Any], None], named: str
) -> None:
    document = json.loads(json.dumps(plan_document(plan_of(bundle))))
    edit(document)
    with pytest.raises(PlanInvalid, match=named):
        read_plan(document, where="plan.json")


def test_a_choice_says_what_it_is() -> None:
    choice = BackendChoice(runtime="openvino", provider="cpu", precision="bf16")
    assert str(choice) == "openvino on cpu, bf16"
