"""engine.tuning: the fastest candidate that gives the labels of the export wins, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import bundle_networks, tuning, window_timing
from engine.backend_probe import BackendStatus
from engine.backends import Backend, BackendChoice, Network
from engine.bundle import Bundle
from engine.errors import BackendFailed
from engine.execution_plan import CandidateFigure, ExecutionPlan
from engine.onnx_backend import OnnxBackend
from engine.sanity_phantom import make_phantom
from engine.tuning import TuningRequest, first_plan, tune
from tests.support.execution_plans import brightness_bundle

Kind = tuple[str, str]  # runtime and precision
ORT, OPENVINO, BF16 = ("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bf16")


@dataclass
class Machine:
    """A machine whose runtimes take a known time a window and are wrong by a known amount; its clock stands still
    otherwise. `share`: part of a run's time that does not depend on the number of windows."""

    cost_s: Mapping[Kind, float]
    shift: Mapping[Kind, float] = field(default_factory=dict)
    broken: Mapping[Kind, str] = field(default_factory=dict)
    share: float = 0.0
    now: float = 0.0
    opened: list[BackendChoice] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def statuses(self, _device: str = "auto", *, runtimes: Any = None) -> tuple[BackendStatus, ...]:
        return tuple(
            BackendStatus(runtime=r, provider="cpu", precision=p, version="1.0", reason=self.broken.get((r, p)))  # type: ignore[arg-type]
            for r, p in self.cost_s
            if runtimes is None or r in runtimes
        )

    def open(self, network: Network, choice: BackendChoice) -> Backend:
        self.opened.append(choice)
        return _Pretended(self, network, choice)


class _Pretended:
    def __init__(self, machine: Machine, network: Network, choice: BackendChoice) -> None:
        self._machine, self._choice = machine, choice
        self._inner = OnnxBackend(
            network.file, channels=network.channels, patch_size=network.patch_size, device="cpu", threads=1
        )
        self.name, self.version, self.provider = choice.runtime, "1.0", "cpu"
        self.precision, self.threads, self.batch = choice.precision, choice.threads, choice.batch

    def run(self, batch: Any) -> Any:
        kind = (self._choice.runtime, self._choice.precision)
        windows = self._machine.share + (1 - self._machine.share) * len(batch)
        self._machine.now += self._machine.cost_s[kind] * windows
        logits = self._inner.run(batch)
        logits[:, 1] += np.float32(self._machine.shift.get(kind, 0.0))
        return logits

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Machine]:
    def use(machine: Machine) -> Machine:
        monkeypatch.setattr(tuning, "available_backends", machine.statuses)
        monkeypatch.setattr(window_timing, "open_backend", machine.open)
        monkeypatch.setattr(bundle_networks, "open_backend", machine.open)
        monkeypatch.setattr(tuning, "_BATCHES", ())
        return machine

    return use


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return brightness_bundle(tmp_path_factory.mktemp("bundle") / "b", mirror_axes=(0, 1), sanity=True)


def _figures(plan: ExecutionPlan) -> dict[Kind, CandidateFigure]:
    """Those with one window at a time and every pass."""
    alone = (f for f in plan.figures if f.mirroring == "full" and f.choice.batch == 1)
    return {(f.choice.runtime, f.choice.precision): f for f in alone}


USUAL: Mapping[Kind, float] = {ORT: 0.2, OPENVINO: 0.1, BF16: 0.02}


def test_the_fastest_that_gives_torchs_labels_wins(bundle: Bundle, on: Callable[[Machine], Machine]) -> None:
    machine = on(Machine(cost_s=USUAL))
    plan = tune(bundle, TuningRequest(budget_s=1e9), clock=machine)
    assert (plan.choice.runtime, plan.choice.precision, plan.mirroring) == ("openvino", "float32", "full")
    assert (plan.origin, plan.cases) == ("tuned", ("thick-slices", "plans-grid", "turned"))
    assert plan.reference.endswith("float32 on the CPU")
    figures = _figures(plan)
    assert set(figures) == {ORT, OPENVINO}  # nobody asked for less than float32
    assert figures[OPENVINO].seconds_per_window == pytest.approx(0.1)
    assert figures[OPENVINO].seconds_per_position == pytest.approx(0.4)  # four mirrored passes of one network
    assert figures[ORT].cases == 3
    assert figures[ORT].case_seconds == pytest.approx(2 * (figures[OPENVINO].case_seconds or 0))


@pytest.mark.parametrize("shift", [0.05, 5.0])
def test_a_faster_one_with_other_labels_loses_with_its_figures(
    bundle: Bundle, on: Callable[[Machine], Machine], shift: float
) -> None:
    machine = on(Machine(cost_s=USUAL, shift={OPENVINO: shift}))
    plan = tune(bundle, TuningRequest(budget_s=1e9), clock=machine)
    assert plan.choice.runtime == "onnxruntime"
    loser = _figures(plan)[OPENVINO]
    assert loser.changed_voxels
    assert any("voxels changed (at most 1 in 10,000)" in fault for fault in loser.faults)
    assert max(loser.dice_change.values()) > 0.001


def test_reduced_precision_needs_a_tolerance_and_has_to_keep_it(
    bundle: Bundle, on: Callable[[Machine], Machine]
) -> None:
    machine = on(Machine(cost_s=USUAL, shift={BF16: 0.1}))
    allowed = tune(bundle, TuningRequest(budget_s=1e9, tolerance=0.05), clock=machine)
    assert allowed.choice.precision == "bf16"
    cost = _figures(allowed)[BF16]
    assert 0 < (cost.changed_voxels or 0) < 0.05 * cost.voxels
    too_little = tune(bundle, TuningRequest(budget_s=1e9, tolerance=1.5e-4), clock=machine)
    assert too_little.choice.precision == "float32"
    assert _figures(too_little)[BF16].faults


def test_without_time_for_a_case_only_float32_may_win_by_its_windows(
    bundle: Bundle, on: Callable[[Machine], Machine]
) -> None:
    machine = on(Machine(cost_s=USUAL))
    plan = tune(bundle, TuningRequest(budget_s=0.01, tolerance=0.05), clock=machine)
    assert (plan.choice.runtime, plan.choice.precision) == ("openvino", "float32")
    assert plan.cases == ()
    assert {f.cases for f in plan.figures} == {0}
    assert plan.figure.verdict == "agrees on single windows"
    # Opening and a few windows of each are all that was done.
    assert machine.now == pytest.approx(sum(USUAL.values()) * (1 + window_timing.MIN_ROUNDS))


def test_a_case_that_is_not_finished_in_time_counts_for_nothing(
    bundle: Bundle, on: Callable[[Machine], Machine]
) -> None:
    machine = on(Machine(cost_s={ORT: 0.2, OPENVINO: 0.1}))
    spent = (0.2 + 0.1) * (1 + window_timing.MIN_ROUNDS)
    plan = tune(bundle, TuningRequest(budget_s=spent + 0.15), clock=machine)
    assert plan.cases == ()
    assert plan.figure.verdict == "agrees on single windows"
    assert machine.now < spent + 1.0


def test_fewer_mirrored_passes_are_tried_when_asked_for(bundle: Bundle, on: Callable[[Machine], Machine]) -> None:
    machine = on(Machine(cost_s={ORT: 0.2, OPENVINO: 0.1}))
    plan = tune(bundle, TuningRequest(budget_s=1e9, mirroring="none"), clock=machine)
    # This network answers the same to a mirrored window, so nothing is lost.
    assert (plan.mirroring, plan.left_out) == ("none", ("mirrored passes",))
    assert plan.figure.seconds_per_position == pytest.approx(0.1)
    assert not plan.is_exact


@pytest.mark.parametrize(("share", "batch"), [(0.9, 4), (0.0, 1), (0.02, 1)])
def test_several_windows_at_a_time_have_to_be_worth_it(
    bundle: Bundle, on: Callable[[Machine], Machine], monkeypatch: pytest.MonkeyPatch, share: float, batch: int
) -> None:
    machine = on(Machine(cost_s={ORT: 0.2, OPENVINO: 0.1}, share=share))
    monkeypatch.setattr(tuning, "_BATCHES", (2, 4))
    plan = tune(bundle, TuningRequest(budget_s=1e9), clock=machine)
    assert (plan.choice.runtime, plan.choice.batch) == ("openvino", batch)


def test_half_the_threads_are_tried_where_there_are_many(
    bundle: Bundle, on: Callable[[Machine], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = on(Machine(cost_s={ORT: 0.2, OPENVINO: 0.1}))
    monkeypatch.setattr(tuning, "allowed_cores", lambda: 8)
    plan = tune(bundle, TuningRequest(budget_s=1e9), clock=machine)
    assert sorted(f.choice.threads for f in plan.figures if f.choice.runtime == "openvino") == [4, 8]
    assert plan.choice.threads == 8  # as fast: nothing is won by fewer
    fixed = tune(bundle, TuningRequest(budget_s=1e9, threads=3), clock=machine)
    assert {f.choice.threads for f in fixed.figures} == {3}


def test_what_does_not_compute_here_is_named_with_its_reason(
    bundle: Bundle, on: Callable[[Machine], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = on(Machine(cost_s=USUAL, broken={BF16: "this processor has no bf16"}))
    plan = tune(bundle, TuningRequest(budget_s=1e9, tolerance=0.01), clock=machine)
    assert _figures(plan)[BF16].verdict == "this processor has no bf16"

    def fails(network: Network, choice: BackendChoice) -> Backend:
        if choice.runtime == "openvino":
            raise BackendFailed("no memory for it")
        return machine.open(network, choice)

    monkeypatch.setattr(window_timing, "open_backend", fails)
    plan = tune(bundle, TuningRequest(budget_s=1e9), clock=machine)
    assert (plan.choice.runtime, _figures(plan)[OPENVINO].verdict) == ("onnxruntime", "no memory for it")


def test_a_reference_that_fails_and_a_device_without_any_backend_are_errors(
    bundle: Bundle, on: Callable[[Machine], Machine]
) -> None:
    on(Machine(cost_s={ORT: 0.2}, broken={ORT: "no such device"}))
    with pytest.raises(BackendFailed, match=r"nothing computes in float32 .* no such device"):
        tune(bundle, TuningRequest(device="cuda"))


def test_a_bundle_whose_labels_nothing_gives_again_is_an_error(
    bundle: Bundle, on: Callable[[Machine], Machine]
) -> None:
    machine = on(Machine(cost_s={ORT: 0.2}, shift={ORT: 0.7}))
    with pytest.raises(BackendFailed, match="no backend gives the labels of the export"):
        tune(bundle, TuningRequest(budget_s=1e9), clock=machine)


def test_added_cases_are_judged_by_onnx_runtime_in_float32(bundle: Bundle, on: Callable[[Machine], Machine]) -> None:
    suite = bundle.evidence.sanity
    assert suite is not None
    assert suite.cases[0].phantom is not None
    machine = on(Machine(cost_s=USUAL))
    added = [("added-1", make_phantom(suite.cases[0].phantom))]
    plan = tune(bundle, TuningRequest(budget_s=1e9), added=added, clock=machine)
    assert "added-1" in plan.cases
    assert plan.choice.runtime == "openvino"
    assert _figures(plan)[OPENVINO].cases == 4


def test_a_bundle_without_sanity_cases_is_measured_on_invented_ones(
    tmp_path: Path, on: Callable[[Machine], Machine]
) -> None:
    machine = on(Machine(cost_s=USUAL))
    plan = tune(brightness_bundle(tmp_path / "b"), TuningRequest(budget_s=1e9), clock=machine)
    assert plan.choice.runtime == "openvino"
    assert plan.reference == "onnxruntime on cpu, float32"
    assert len(plan.cases) == 3


def test_at_first_use_single_windows_of_the_float32_runtimes_decide(
    bundle: Bundle, on: Callable[[Machine], Machine]
) -> None:
    machine = on(Machine(cost_s=USUAL))
    plan = first_plan(bundle, clock=machine)
    assert (plan.origin, plan.choice.runtime, plan.cases) == ("first-use", "openvino", ())
    assert {choice.precision for choice in machine.opened} == {"float32"}
    wrong = on(Machine(cost_s=USUAL, shift={OPENVINO: 0.5}))
    assert first_plan(bundle, clock=wrong).choice.runtime == "onnxruntime"


def test_progress_goes_from_nothing_to_all(bundle: Bundle, on: Callable[[Machine], Machine]) -> None:
    machine, shares = on(Machine(cost_s=USUAL)), []
    tune(bundle, TuningRequest(budget_s=1e9), progress=lambda share, _what: shares.append(share), clock=machine)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_real_runtimes_of_this_machine_agree_on_a_small_model(bundle: Bundle) -> None:
    plan = tune(bundle, TuningRequest(device="cpu", threads=2, budget_s=60))
    figures = _figures(plan)
    assert figures[ORT].agrees, figures[ORT].verdict
    assert figures[OPENVINO].agrees, figures[OPENVINO].verdict
    # The network's file takes one window at a time, and says so.
    assert any("the plans say" in f.verdict for f in plan.figures if f.choice.batch > 1)
