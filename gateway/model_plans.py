"""Execution plans in the models folder: of each version one per machine, used as long as machine and runtimes are those
that it was measured on.

    <model>/plans/<version>/<machine>.json

<machine> is a digest of processor, cores, memory and GPU, so that several machines can share a models folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backends import Device
from engine.bundle import Bundle
from engine.errors import BackendFailed, EngineError, PlanInvalid
from engine.execution_plan import ExecutionPlan, plan_document, planned_bundle, read_plan
from engine.json_reader import read_json
from engine.machine import MachineIdentity, this_identity
from engine.predictor import Predictor
from engine.whole_file import whole_file

FOLDER = "plans"


@dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """`plan` is in force. Without one, `reasons` say why the plan of this machine is not used; none: there is none."""

    plan: ExecutionPlan | None
    reasons: tuple[str, ...] = ()


class ModelPlans:
    """The plans below a models folder."""

    def __init__(self, models_dir: Path) -> None:
        self._models_dir = models_dir
        self._machine: MachineIdentity | None = None

    @property
    def machine(self) -> MachineIdentity:
        """This one; asked once, since the driver of a GPU may take its time."""
        if self._machine is None:
            self._machine = this_identity()
        return self._machine

    def find(self, bundle: Bundle, *, device: Device = "auto", threads: int | None = None) -> FoundPlan:
        """The plan of this machine, if it holds where the settings say `device` and `threads`."""
        path = self._path(bundle.name, bundle.semver, self.machine.key)
        if not path.exists():
            return FoundPlan(plan=None)
        try:
            plan = _read(path)
        except PlanInvalid as error:
            return FoundPlan(plan=None, reasons=(str(error),))
        reasons = plan.stale_reasons(bundle, self.machine, device=device, threads=threads)
        return FoundPlan(plan=None, reasons=tuple(reasons)) if reasons else FoundPlan(plan=plan)

    def all(self, name: str, semver: str) -> tuple[ExecutionPlan, ...]:
        """The plans of every machine that has one; damaged ones are left out."""
        found = []
        for path in sorted((self._models_dir / name / FOLDER / semver).glob("*.json")):
            with contextlib.suppress(PlanInvalid):
                found.append(_read(path))
        return tuple(found)

    def save(self, plan: ExecutionPlan) -> Path:
        """In the place of the one before; a half-written plan never has the final name. Raises OSError."""
        path = self._path(plan.model, plan.semver, plan.machine.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(plan_document(plan), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def in_force(self, bundle: Bundle, *, device: Device = "auto", threads: int | None = None) -> ExecutionPlan | None:
        """The plan to run the model by: the one of this machine, or one that is measured now and kept (first use).

        A plan that no longer holds is told and replaced by an exact one. None where nothing can be measured: whoever
        then opens the networks as they are hears why. Workers of one machine measure one after the other.
        """
        if (found := self.find(bundle, device=device, threads=threads)).plan is not None:
            return found.plan
        with self._turn(bundle):
            if (found := self.find(bundle, device=device, threads=threads)).plan is not None:
                return found.plan
            model = f"{bundle.name} {bundle.semver}"
            if found.reasons:
                _log().warning(
                    "the execution plan no longer holds; measuring anew, without tolerance",
                    model=model,
                    reasons=list(found.reasons),
                    then=f"`seggate models tune {bundle.name}`",
                )
            from engine.tuning import first_plan

            try:
                plan = first_plan(bundle, device=device, threads=threads)
            except EngineError as error:
                _log().warning("no execution plan could be measured", model=model, error=str(error))
                return None
            _log().info("execution plan measured", model=model, choice=str(plan.choice), seconds=plan.seconds)
            try:
                self.save(plan)
            except OSError as error:
                _log().warning("the execution plan could not be kept", model=model, error=error.strerror)
            return plan

    def _path(self, name: str, semver: str, key: str) -> Path:
        return self._models_dir / name / FOLDER / semver / f"{key}.json"

    @contextlib.contextmanager
    def _turn(self, bundle: Bundle) -> Iterator[None]:
        """One process of this machine at a time; at once where the folder cannot be written."""
        path = self._path(bundle.name, bundle.semver, self.machine.key).with_suffix(".lock")
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(path.open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_planned(
    bundle: Bundle,
    plan: ExecutionPlan | None,
    *,
    device: Device = "auto",
    threads: int | None = None,
    scratch: Path | None = None,
) -> tuple[Predictor, ExecutionPlan | None]:
    """The model as the plan says, and the plan; without one, or where it cannot be opened any more (which is told), in
    ONNX Runtime and float32, and None. Raises BundleInvalid, BackendFailed."""
    if plan is not None:
        try:
            chosen, threads = planned_bundle(bundle, plan), plan.choice.threads or threads
            predictor = Predictor(chosen, choice=plan.choice, threads=threads, scratch=scratch)
            return predictor, plan
        except BackendFailed as error:
            _log().error(
                "what the execution plan says cannot be opened; running without it",
                model=f"{bundle.name} {bundle.semver}",
                choice=str(plan.choice),
                error=str(error),
            )
    return Predictor(bundle, device=device, threads=threads, scratch=scratch), None


def _log() -> Any:
    """Imported where something is to be told: a prediction by a plan that is there has no use for it, and waits."""
    import structlog

    return structlog.get_logger(__name__)


def _read(path: Path) -> ExecutionPlan:
    return read_plan(read_json(path, error=PlanInvalid), where=path.name)
