"""Makes an execution plan: candidates are timed on single windows, then compared on whole cases, fastest first.

The fastest whose labels stay within the limits wins. What the labels are compared with is what torch gave at the export
(the bundle's sanity cases), or ONNX Runtime in float32 where torch has said nothing: cases that were added, invented
images of a bundle without sanity cases, single windows. On windows alone only a float32 candidate may win.

On the CPU float32 is all that is tried unless a tolerance is asked for; on a GPU also torch in half precision, which is
nnU-Net's own arithmetic there, under the same limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backend_probe import BackendStatus, available_backends
from engine.backends import BackendChoice, Device, Runtime
from engine.bundle import Bundle
from engine.errors import BackendFailed, BundleInvalid, MemoryExceeded
from engine.execution_plan import CandidateFigure, ExecutionPlan, Mirroring, Origin, installed_libraries, with_mirroring
from engine.machine import MachineIdentity, allowed_cores, this_identity
from engine.predictor import Predictor
from engine.sanity_check import STRICT_TOLERANCE, CaseAgreement, Limits, compare_labels
from engine.tuning_images import TuningCase, tuning_cases, tuning_windows
from engine.volume import Volume
from engine.window_timing import Clock, TimedChoice, time_choices

DEFAULT_BUDGET_S = 120.0
FIRST_USE_BUDGET_S = 2.0
_TIMING_SHARE = 0.4
"""Part of the time that windows may take; whole cases have the rest."""
_BATCHES = (2, 4, 8)
_MIN_GAIN = 0.05
"""Part of a window's time that another number of threads or windows must save."""
_LONG_WINDOW_S = 1.0
"""From here on a window fills the machine by itself, and several at a time only need more memory."""
_MAX_LOGIT_DIFFERENCE = 1e-3
"""Of a float32 candidate, in parts of the largest logit: labels say nothing where a window is all background."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class TuningRequest:
    """What may be tried. `threads` None: all cores, and half of them. `runtimes` None: those that are usual on the
    device. `mirroring` "none" tries the model without its mirrored passes as well."""

    device: Device = "auto"
    threads: int | None = None
    runtimes: Collection[Runtime] | None = None
    tolerance: float = STRICT_TOLERANCE
    mirroring: Mirroring = "full"
    budget_s: float = DEFAULT_BUDGET_S


def tune(
    bundle: Bundle,
    request: TuningRequest,
    *,
    added: Sequence[tuple[str, Volume]] = (),
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> ExecutionPlan:
    """Measures every candidate on the bundle's cases and those `added`, by name. When `request.budget_s` is over, what
    was measured until then decides; opening the candidates and a few windows of each are always done.

    Raises BackendFailed where nothing computes on the device asked for, or the reference fails; BundleInvalid for a
    bundle whose networks or sanity cases cannot be used; MemoryExceeded, InputRejected for an added case.
    """
    tuning = _Tuning(bundle, request, clock=clock, progress=progress)
    tuning.time(tuning.candidates())
    tuning.time(tuning.variants())
    tuning.compare(tuning_cases(bundle, added))
    return tuning.plan("tuned")


def first_plan(
    bundle: Bundle,
    *,
    device: Device = "auto",
    threads: int | None = None,
    clock: Clock = time.perf_counter,
) -> ExecutionPlan:
    """A plan for a model that nobody tuned, quickly: the float32 runtimes on one window of each configuration.

    Raises as `tune` does.
    """
    request = TuningRequest(device=device, threads=threads, budget_s=FIRST_USE_BUDGET_S)
    tuning = _Tuning(bundle, request, clock=clock, progress=None)
    tuning.time([choice for choice in tuning.candidates() if choice.runtime != "torch"])
    return tuning.plan("first-use")


class _Tuning:
    def __init__(self, bundle: Bundle, request: TuningRequest, *, clock: Clock, progress: Progress | None) -> None:
        self._bundle = bundle
        self._request = request
        self._limits = Limits.of(request.tolerance)
        self._clock = clock
        self._began = clock()
        self._progress = progress
        self._machine: MachineIdentity = this_identity()
        self._absent: list[BackendStatus] = []
        self._timed: dict[BackendChoice, TimedChoice] = {}
        self._compared: dict[tuple[BackendChoice, Mirroring], _Comparison] = {}
        self._cases: tuple[TuningCase, ...] = ()
        self._windows: Mapping[str, NDArray[np.float32]] = tuning_windows(bundle)
        self._candidates = self._find_candidates()
        self._reference = self._candidates[0]

    def candidates(self) -> Sequence[BackendChoice]:
        """The reference first, then what else computes here, with all the threads that it may have."""
        return self._candidates

    def _find_candidates(self) -> list[BackendChoice]:
        request = self._request
        found: list[BackendChoice] = []
        for status in available_backends(request.device, runtimes=request.runtimes):
            if not self._is_wanted(status):
                continue
            if status.is_available:
                found.append(_choice_of(status, request.threads or allowed_cores()))
            else:
                self._absent.append(status)
        exact = [choice for choice in found if choice.precision == "float32"]
        # Of several ONNX Runtime's; of its providers the CPU.
        exact.sort(key=lambda choice: (choice.runtime != "onnxruntime", choice.provider != "cpu"))
        if not exact:
            reasons = "; ".join(map(str, self._absent)) or "no runtime was asked for that is used there"
            raise BackendFailed(f"nothing computes in float32 on device {request.device!r} here: {reasons}")
        return [exact[0], *(choice for choice in found if choice != exact[0])]

    def variants(self) -> list[BackendChoice]:
        """The fastest so far with half the threads, and with several windows at a time."""
        fastest = min(self._measured(), key=lambda timed: timed.seconds_per_window or 0.0, default=None)
        if fastest is None or self._out_of_time(_TIMING_SHARE):
            return []
        choice, found = fastest.choice, []
        if self._request.threads is None and choice.provider == "cpu" and choice.threads >= 4:
            found.append(replace(choice, threads=choice.threads // 2))
        if (fastest.seconds_per_window or 0.0) < _LONG_WINDOW_S:
            found += [replace(choice, batch=batch) for batch in _BATCHES[: None if choice.provider != "cpu" else 2]]
        return found

    def time(self, choices: Sequence[BackendChoice]) -> None:
        """Raises BackendFailed where the reference fails."""
        if not choices:
            return
        share, done = _TIMING_SHARE / 2, len(self._timed)
        start = _TIMING_SHARE / 2 if done else 0.0
        steps = 0

        def advance() -> None:
            nonlocal steps
            steps += 1
            self._report(start + share * steps / (2 * len(choices)), "windows")

        for timed in time_choices(
            self._bundle,
            choices,
            self._windows,
            out_of_time=lambda: self._out_of_time(_TIMING_SHARE),
            clock=self._clock,
            advance=advance,
        ):
            self._timed[timed.choice] = timed
            if timed.choice == self._reference and timed.reason is not None:
                raise BackendFailed(f"{self._bundle.name}: the reference, {timed.choice}: {timed.reason}")

    def compare(self, cases: Sequence[TuningCase]) -> None:
        """Whole cases, the fastest candidate first, while there is time."""
        self._cases = tuple(cases)
        order = sorted(filter(self._is_worth_it, self._ways()), key=self._position_s)
        expected: dict[str, NDArray[Any]] = {c.name: c.expected for c in cases if c.expected is not None}
        reference = (self._reference, "full")
        if len(expected) < len(cases):  # it has to speak first where torch has said nothing
            order.sort(key=lambda way: way != reference)
        for number, way in enumerate(order):
            share = _TIMING_SHARE + (1 - _TIMING_SHARE) * number / len(order)
            self._report(share, f"cases, {way[0]}" + (", not mirrored" if way[1] == "none" else ""))
            if self._out_of_time(1.0):
                break
            self._compared[way] = self._compare_one(way, expected, is_reference=way == reference)

    def plan(self, origin: Origin) -> ExecutionPlan:
        """Raises BackendFailed where nothing agrees with the reference, not even the reference with the export."""
        figures = self._figures()
        order = sorted((f for f in figures if f.agrees), key=lambda figure: figure.seconds_per_position or 0.0)
        chosen = self._chosen(order)
        if chosen is None:
            faults = "; ".join(f"{f.choice}: {f.verdict}" for f in figures)
            raise BackendFailed(f"{self._bundle.name}: no backend gives the labels of the export here: {faults}")
        self._report(1.0, "done")
        bundle, suite = self._bundle, self._bundle.evidence.sanity
        compared = {name for comparison in self._compared.values() for name in comparison.names}
        by_torch = any(case.expected is not None for case in self._cases if case.name in compared)
        return ExecutionPlan(
            model=bundle.name,
            semver=bundle.semver,
            weights_digest=bundle.weights_digest,
            configuration_digest=bundle.configuration_digest,
            machine=self._machine,
            libraries=MappingProxyType(installed_libraries()),
            choice=chosen.choice,
            mirroring=chosen.mirroring,
            tolerance=self._request.tolerance,
            origin=origin,
            reference=suite.computed_by if suite is not None and by_torch else str(self._reference),
            cases=tuple(case.name for case in self._cases if case.name in compared),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(self._clock() - self._began, 3),
            figures=figures,
        )

    def _chosen(self, order: Sequence[CandidateFigure]) -> CandidateFigure | None:
        """Of candidates that agree, fastest first: one that whole cases speak for, else a float32 one of which windows
        do. Another number of threads or windows must be worth it."""
        proven = [f for f in order if f.cases] or [
            f for f in order if f.choice.precision == "float32" and f.mirroring == "full"
        ]
        if not proven:
            return None
        fastest = proven[0]
        alike = [
            f for f in proven if _arithmetic(f.choice, f.mirroring) == _arithmetic(fastest.choice, fastest.mirroring)
        ]
        plain = min(alike, key=lambda f: (f.choice.batch, -f.choice.threads))
        needed = (1 - _MIN_GAIN) * (plain.seconds_per_position or 0.0)
        return fastest if (fastest.seconds_per_position or 0.0) <= needed else plain

    def _compare_one(
        self, way: tuple[BackendChoice, Mirroring], expected: dict[str, NDArray[Any]], *, is_reference: bool
    ) -> _Comparison:
        choice, mirroring = way
        comparison = _Comparison()
        bundle = with_mirroring(self._bundle, mirroring)
        try:
            with Predictor(bundle, choice=choice) as predictor:
                for case in self._cases:
                    began = self._clock()
                    labels = predictor.predict(case.volume, progress=self._end_in_time).labels.array
                    seconds = self._clock() - began
                    if is_reference:
                        expected.setdefault(case.name, labels)
                    if case.name in expected:
                        agreement = compare_labels(
                            case.name, expected[case.name], labels, bundle.labels, limits=self._limits
                        )
                        comparison.add(agreement, seconds)
        except _OutOfTimeError:
            pass
        except (BackendFailed, BundleInvalid, MemoryExceeded) as error:
            comparison.reason = str(error)
        return comparison

    def _end_in_time(self, _share: float) -> None:
        if self._out_of_time(1.0):
            raise _OutOfTimeError

    def _figures(self) -> tuple[CandidateFigure, ...]:
        found = []
        for way in self._ways():
            timed, comparison = self._timed[way[0]], self._compared.get(way, _Comparison())
            is_compared_on_cases = bool(comparison.names)
            if not is_compared_on_cases and comparison.reason is None and way[1] == "full":
                comparison = self._on_windows(timed)
            found.append(
                CandidateFigure(
                    choice=way[0],
                    mirroring=way[1],
                    version=timed.version,
                    seconds_per_window=_rounded(timed.seconds_per_window),
                    seconds_per_position=_rounded(self._position_s(way)),
                    case_seconds=_rounded(comparison.seconds) if is_compared_on_cases else None,
                    cases=len(comparison.names) if is_compared_on_cases else 0,
                    voxels=comparison.voxels,
                    changed_voxels=comparison.changed if comparison.names else None,
                    dice_change=MappingProxyType(dict(comparison.dice_change)),
                    faults=tuple(comparison.faults),
                    reason=comparison.reason or (None if comparison.names else "time was up"),
                )
            )
        failed = [(t.choice, t.version, t.reason) for t in self._timed.values() if t.reason is not None]
        absent = [(_choice_of(status, 0), status.version, status.reason) for status in self._absent]
        return (*found, *(_nothing_of(choice, version, reason or "") for choice, version, reason in failed + absent))

    def _on_windows(self, timed: TimedChoice) -> _Comparison:
        """The labels of single windows, against those of the reference."""
        comparison, manager = _Comparison(), self._bundle.label_manager
        for name, reference in self._timed[self._reference].logits.items():
            found = timed.logits[name]
            agreement = compare_labels(
                name,
                manager.logits_to_labels(reference),
                manager.logits_to_labels(found),
                self._bundle.labels,
                limits=self._limits,
            )
            difference = float(np.abs(found - reference).max()) / max(float(np.abs(reference).max()), 1e-6)
            faults = list(agreement.faults)
            if timed.choice.precision == "float32" and difference > _MAX_LOGIT_DIFFERENCE:
                faults.append(f"logits differ by {difference:.2g} of the largest (limit {_MAX_LOGIT_DIFFERENCE:g})")
            comparison.add(replace(agreement, faults=tuple(faults)), 0.0)
        return comparison

    def _is_worth_it(self, way: tuple[BackendChoice, Mirroring]) -> bool:
        """Whether other threads or several windows at a time save enough to look at the labels, too."""
        plain = min(
            (other for other in self._ways() if _arithmetic(*other) == _arithmetic(*way)),
            key=lambda other: (other[0].batch, -other[0].threads),
        )
        return way == plain or self._position_s(way) <= (1 - _MIN_GAIN) * self._position_s((plain[0], way[1]))

    def _is_wanted(self, status: BackendStatus) -> bool:
        if status.precision == "float32" or self._request.tolerance > STRICT_TOLERANCE:
            return True
        return status.runtime == "torch" and status.provider == "cuda"

    def _measured(self) -> list[TimedChoice]:
        return [timed for timed in self._timed.values() if timed.reason is None]

    def _ways(self) -> list[tuple[BackendChoice, Mirroring]]:
        is_mirrored = any(configuration.mirror_axes for configuration in self._bundle.configurations)
        kinds: tuple[Mirroring, ...] = ("full",)
        if self._request.mirroring == "none" and is_mirrored:
            kinds = ("full", "none")
        return [(timed.choice, mirroring) for timed in self._measured() for mirroring in kinds]

    def _position_s(self, way: tuple[BackendChoice, Mirroring]) -> float:
        return self._timed[way[0]].seconds_per_position(self._bundle, mirrored=way[1] == "full") or 0.0

    def _out_of_time(self, share: float) -> bool:
        return self._clock() - self._began > share * self._request.budget_s

    def _report(self, share: float, what: str) -> None:
        if self._progress is not None:
            self._progress(share, what)


@dataclass
class _Comparison:
    """What was compared so far: by case (or by window), added up."""

    names: list[str] = field(default_factory=list)
    seconds: float = 0.0
    voxels: int = 0
    changed: int = 0
    dice_change: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    reason: str | None = None

    def add(self, agreement: CaseAgreement, seconds: float) -> None:
        self.names.append(agreement.name)
        self.seconds += seconds
        self.voxels += agreement.voxels
        self.changed += agreement.changed
        for label, dice in agreement.dice.items():
            change = 0.0 if dice is None else round(1.0 - dice, 6)
            self.dice_change[label] = max(self.dice_change.get(label, 0.0), change)
        self.faults += [f"{agreement.name}: {fault}" for fault in agreement.faults]


class _OutOfTimeError(Exception):
    """A prediction was ended because the time for tuning is up; never leaves this module."""


def _choice_of(status: BackendStatus, threads: int) -> BackendChoice:
    """On a GPU the threads are the runtime's own affair."""
    return BackendChoice(
        runtime=status.runtime,
        provider=status.provider,
        precision=status.precision,
        threads=threads if status.provider == "cpu" else 0,
    )


def _arithmetic(choice: BackendChoice, mirroring: Mirroring) -> tuple[str, ...]:
    """What of a way decides about the labels."""
    return choice.runtime, choice.provider, choice.precision, mirroring


def _nothing_of(choice: BackendChoice, version: str, reason: str) -> CandidateFigure:
    return CandidateFigure(
        choice=choice,
        mirroring="full",
        version=version,
        seconds_per_window=None,
        seconds_per_position=None,
        case_seconds=None,
        cases=0,
        voxels=0,
        changed_voxels=None,
        dice_change=MappingProxyType({}),
        faults=(),
        reason=reason,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.4g}")
