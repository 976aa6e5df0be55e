"""The story of a study, as durable workflows. Read this first; each step's module is named in docs/architecture.md.

    study declared whole ─▶ process_study: route ▸ order
                                    │ one result per series (part) and model
                                    ▼
                            make_result: infer ▸ judge ▸ encode ▸ release
                                    │ one delivery per destination
                                    ▼
                            deliver: attempt, wait, attempt … until verified, stored or parked
                                     (a long wait gives the place in the queue up and comes back as a new turn)

    beside it, where a version runs in shadow: shadow_result: compare (one row is all that comes of it)

    training asked for ─▶ prepare_run: write cases ▸ plan
                                  │ one workflow per fold, on whichever machine is free
                                  ▼
                          train_fold: train ▸ count
                                  │ after the last
                                  ▼
                          finish_run: export ▸ register ▸ examine ▸ offer (shadow, or promotion)

Every arrow is an enqueue in the transaction that made it due. A step may run twice (its process can die after the
work and before DBOS's note of it), so every step first looks at its row and does nothing when it is already done.
Arguments and results of steps are identifiers and states, never arrays or patient data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import structlog
from dbos import DBOS

from gateway.errors import Transient, is_foreseen, is_of_the_machine, meaning

PROCESS_STUDY, MAKE_RESULT, DELIVER, RUN_JOB = "process_study", "make_result", "deliver", "run_job"
PREPARE_RUN, TRAIN_FOLD, FINISH_RUN = "prepare_run", "train_fold", "finish_run"
SHADOW_RESULT = "shadow_result"

_log = structlog.get_logger(__name__)


class StudySteps(Protocol):
    """What the story needs done; gateway/app.py plugs in who does it."""

    def route(self, version_id: str) -> str: ...  # "matched" | "unmatched" | "review"
    def order(self, version_id: str) -> str: ...  # "ordered" | "nothing-to-run"
    def park_study(self, version_id: str, step: str, reason: str) -> str: ...


class ResultSteps(Protocol):
    def infer(self, result_id: str) -> str: ...  # "inferred" | "superseded" | "held"
    def judge(self, result_id: str) -> str: ...  # "pass" | "review" | "hold" | "superseded"
    def encode(self, result_id: str) -> str: ...  # "encoded"
    def release(self, result_id: str) -> str: ...  # "released" | "held" | "superseded"
    def park_result(self, result_id: str, step: str, reason: str) -> str: ...


class DeliverySteps(Protocol):
    # {"state": ..., "retry_in_s": float | None}; `turn` is the workflow that asks
    def attempt(self, delivery_id: str, turn: str) -> dict[str, Any]: ...
    def park_delivery(self, delivery_id: str, step: str, reason: str) -> str: ...


class ShadowSteps(Protocol):
    # `turn` is the workflow that asks; "done" | "skipped" | "waits", which is another turn later
    def compare(self, shadow_id: str, turn: str) -> str: ...
    def park_shadow(self, shadow_id: str, step: str, reason: str) -> str: ...


class RecurringSteps(Protocol):
    def run(self, job: str) -> str: ...  # what there is to say of it
    def park_job(self, job: str, step: str, reason: str) -> str: ...


class TrainingSteps(Protocol):
    """`fold_key` is RUN_ID/FOLD."""

    def write_cases(self, run_id: str) -> str: ...  # "written" | "ended"
    def plan(self, run_id: str) -> str: ...  # "planned" | "ended"; the folds are on their queue
    def train(self, fold_key: str) -> str: ...  # "trained" | "ended"
    def count(self, fold_key: str) -> str: ...  # "last" | "not the last"
    def export(self, run_id: str) -> str: ...  # "exported" | "ended"
    def register(self, run_id: str) -> str: ...  # the version | "ended"
    def examine(self, run_id: str) -> str: ...  # "ACCEPTED" | "REJECTED" | "OUTSIDE_PLAN" | "ended"
    def offer(self, run_id: str) -> str: ...  # "shadow" | "waits" | "promoted" | "ended"
    def fail_run(self, run_id: str, step: str, reason: str) -> str: ...


class Parked(Exception):
    """A step failed for good; the work is parked with the reason."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Story:
    """The workflows, given who does the steps. `boundary` is told of every step's begin and end.

    `step` and `wait` are those of gateway.durable.Execution.
    """

    attempts: int
    step: Callable[..., Any]
    wait: Callable[[float], None]
    boundary: Callable[[str], None] = lambda _name: None

    def process_study(self, steps: StudySteps, version_id: str) -> str:
        try:
            routed = self._do("route", steps.route, version_id)
            if routed != "matched":
                return str(routed)
            return str(self._do("order", steps.order, version_id))
        except Parked as parked:
            return str(self._do("park", steps.park_study, version_id, parked.step, parked.reason, patient=True))

    def make_result(self, steps: ResultSteps, result_id: str) -> str:
        try:
            inferred = self._do("infer", steps.infer, result_id)
            if inferred != "inferred":
                return str(inferred)
            if self._do("judge", steps.judge, result_id) == "superseded":
                return "superseded"  # the version of the model was withdrawn for it, or meanwhile
            self._do("encode", steps.encode, result_id)
            return str(self._do("release", steps.release, result_id))
        except Parked as parked:
            return str(self._do("park", steps.park_result, result_id, parked.step, parked.reason, patient=True))

    def deliver(self, steps: DeliverySteps, delivery_id: str, turn: str) -> str:
        """`turn` is the id of this workflow: a delivery that was put back on its queue has another one."""
        try:
            while True:
                outcome = self._do("attempt", steps.attempt, delivery_id, turn, patient=True)
                if outcome["retry_in_s"] is None:
                    return str(outcome["state"])
                self.wait(float(outcome["retry_in_s"]))
        except Parked as parked:
            return str(self._do("park", steps.park_delivery, delivery_id, parked.step, parked.reason, patient=True))

    def shadow_result(self, steps: ShadowSteps, shadow_id: str, turn: str) -> str:
        """What fails here is said of the version in shadow and of nothing else."""
        try:
            return str(self._do("compare", steps.compare, shadow_id, turn))
        except Parked as parked:
            return str(self._do("park", steps.park_shadow, shadow_id, parked.step, parked.reason, patient=True))

    def run_job(self, steps: RecurringSteps, job: str) -> str:
        """One run of a job that recurs (gateway/scheduled_jobs.py)."""
        try:
            return str(self._do("job", steps.run, job))
        except Parked as parked:
            return str(self._do("park", steps.park_job, job, parked.step, parked.reason, patient=True))

    def prepare_run(self, steps: TrainingSteps, run_id: str) -> str:
        try:
            if self._do("write cases", steps.write_cases, run_id) == "ended":
                return "ended"
            return str(self._do("plan", steps.plan, run_id))
        except Parked as parked:
            return str(self._do("park", steps.fail_run, run_id, parked.step, parked.reason, patient=True))

    def train_fold(self, steps: TrainingSteps, fold_key: str) -> str:
        try:
            if self._do("train", steps.train, fold_key) == "ended":
                return "ended"
            return str(self._do("count", steps.count, fold_key))
        except Parked as parked:
            run_id = fold_key.partition("/")[0]
            return str(self._do("park", steps.fail_run, run_id, parked.step, parked.reason, patient=True))

    def finish_run(self, steps: TrainingSteps, run_id: str) -> str:
        try:
            if self._do("export", steps.export, run_id) == "ended":
                return "ended"
            if self._do("register", steps.register, run_id) == "ended":
                return "ended"
            verdict = self._do("examine", steps.examine, run_id)
            if verdict != "ACCEPTED":
                return str(verdict)
            return str(self._do("offer", steps.offer, run_id))
        except Parked as parked:
            return str(self._do("park", steps.fail_run, run_id, parked.step, parked.reason, patient=True))

    def _do(self, name: str, function: Callable[..., Any], *args: str, patient: bool = False) -> Any:
        """One step: Transient failures are waited for and tried again, everything else parks the work.

        A disk that is full or a database that is away is waited for however long. `patient`: so is any Transient
        failure. A delivery has its own end of patience (give_up_after_s), and what cannot be parked would be lost to
        the operator.
        """
        for attempt in count(1):
            outcome = self.step(name, self._guarded, name, function, *args)
            if outcome["ok"]:
                return outcome["value"]
            waits = patient or outcome.get("of_the_machine", False)
            if not outcome["transient"] or (attempt >= self.attempts and not waits):
                break
            self.wait(min(2.0 ** min(attempt, 6), 60.0))
        raise Parked(name, outcome["reason"])

    def _guarded(self, name: str, function: Callable[..., Any], *args: str) -> dict[str, Any]:
        """Run a step and turn what it raises into data: the edge of the worker, the one broad except."""
        self.boundary(f"{name}:begin")
        try:
            value = function(*args)
        except Exception as error:  # noqa: BLE001 - the edge: recorded with its reason, never swallowed
            kind = meaning(error)
            reason = f"{kind.__name__}: {error}" if str(error) else f"{kind.__name__}: {type(error).__name__}"
            error_name, traceback = type(error).__name__, not is_foreseen(error)
            _log.warning("step failed", step=name, subject=args[0], error=error_name, reason=reason, exc_info=traceback)
            machine = is_of_the_machine(error)
            return {"ok": False, "transient": kind is Transient, "of_the_machine": machine, "reason": reason}
        self.boundary(f"{name}:end")
        return {"ok": True, "value": value}


def register_study_workflows(story: Story, studies: StudySteps, results: ResultSteps, *, attempts: int) -> None:
    """Tell DBOS the workflows of a worker. `attempts` bounds how often a crashing workflow is recovered."""

    @DBOS.workflow(name=PROCESS_STUDY, max_recovery_attempts=attempts + 20)
    def process_study(version_id: str) -> str:
        return story.process_study(studies, version_id)

    @DBOS.workflow(name=MAKE_RESULT, max_recovery_attempts=attempts + 20)
    def make_result(result_id: str) -> str:
        return story.make_result(results, result_id)


def register_shadow_workflows(story: Story, shadows: ShadowSteps, *, attempts: int) -> None:
    """Tell DBOS the workflow of versions in shadow, which a worker runs."""

    @DBOS.workflow(name=SHADOW_RESULT, max_recovery_attempts=attempts + 20)
    def shadow_result(shadow_id: str) -> str:
        return story.shadow_result(shadows, shadow_id, str(DBOS.workflow_id))


def register_job_workflows(story: Story, jobs: RecurringSteps, *, attempts: int) -> None:
    """Tell DBOS the workflow of jobs that recur, which a worker runs."""

    @DBOS.workflow(name=RUN_JOB, max_recovery_attempts=attempts + 20)
    def run_job(job: str) -> str:
        return story.run_job(jobs, job)


def register_training_workflows(story: Story, trainings: TrainingSteps, *, attempts: int) -> None:
    """Tell DBOS the workflows of a training, which a worker runs. A fold may take days, and many restarts."""

    @DBOS.workflow(name=PREPARE_RUN, max_recovery_attempts=attempts + 20)
    def prepare_run(run_id: str) -> str:
        return story.prepare_run(trainings, run_id)

    @DBOS.workflow(name=TRAIN_FOLD, max_recovery_attempts=None)
    def train_fold(fold_key: str) -> str:
        return story.train_fold(trainings, fold_key)

    @DBOS.workflow(name=FINISH_RUN, max_recovery_attempts=attempts + 20)
    def finish_run(run_id: str) -> str:
        return story.finish_run(trainings, run_id)


def register_delivery_workflows(story: Story, deliveries: DeliverySteps) -> None:
    """Tell DBOS the workflow of the delivery role; a delivery may be recovered any number of times."""

    @DBOS.workflow(name=DELIVER, max_recovery_attempts=None)
    def deliver(delivery_id: str) -> str:
        return story.deliver(deliveries, delivery_id, str(DBOS.workflow_id))
