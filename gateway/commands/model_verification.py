"""Sanity cases of a registered model, computed again with what is installed here: part of `seggate models verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from gateway.commands.output import table

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.execution_plan import ExecutionPlan
    from engine.sanity_check import CaseAgreement


@dataclass(frozen=True, kw_only=True)
class SanityRun:
    """`fault` is None when all cases are within the limits, or there is none. `runtime` names backend, its version,
    provider and precision."""

    runtime: str
    cases: tuple[CaseAgreement, ...]
    fault: str | None

    def document(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "cases": [{**asdict(case), "lowest_dice": case.lowest_dice} for case in self.cases],
        }


def run_sanity(bundle: Bundle, *, plan: ExecutionPlan | None, hide_bar: bool) -> SanityRun | None:
    """As the model runs by its execution plan, within what that allows; without one in ONNX Runtime. None where the
    bundle has no sanity cases. What the engine raises on a case becomes the fault."""
    from engine.errors import EngineError
    from engine.sanity_check import STRICT, check_sanity
    from gateway.model_plans import open_planned

    if bundle.evidence.sanity is None:
        return None
    runtime = ""
    try:
        predictor, plan = open_planned(bundle, plan)
        limits = plan.limits if plan is not None else STRICT
        with predictor:
            runtime = predictor.runtime
            with Progress(console=Console(stderr=True), disable=hide_bar, transient=True) as bar:
                task = bar.add_task(f"{bundle.name} {bundle.semver}", total=1.0)
                cases = check_sanity(predictor, limits=limits, progress=lambda share: bar.update(task, completed=share))
    except EngineError as error:
        return SanityRun(runtime=runtime, cases=(), fault=f"the sanity cases cannot be computed: {error}")
    faults = [f"{case.name}: {fault}" for case in cases for fault in case.faults]
    return SanityRun(
        runtime=runtime,
        cases=cases,
        fault=f"differs from its export on {runtime}: {'; '.join(faults)}" if faults else None,
    )


def present_sanity(runs: Sequence[tuple[str, str, SanityRun]]) -> None:
    """A row for each case of each (model, version)."""
    rows = [
        (name, semver, run.runtime, case.name, f"{case.changed} of {case.voxels}", f"{case.lowest_dice:.6f}")
        for name, semver, run in runs
        for case in run.cases
    ]
    if rows:
        table("", ("model", "version", "computed by", "sanity case", "voxels changed", "lowest Dice to torch"), rows)
