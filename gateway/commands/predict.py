"""`seggate predict`: images in, label maps or DICOM Segmentations out, as nnUNetv2_predict does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from engine.errors import EngineError
from engine.execution_plan import ExecutionPlan
from gateway.commands.output import WorkBar, print_json_line, printable, say, work_bar
from gateway.errors import GatewayError
from gateway.prediction.cases import Case
from gateway.prediction.found_cases import find_cases
from gateway.prediction.model import ChosenModel, choose_model
from gateway.prediction.model_plan import plan_of
from gateway.prediction.outputs import Outputs
from gateway.prediction.pipeline import CaseDone, Pipeline, PredictionStopped
from gateway.prediction.request import PredictRequest, UsageRefused, check_request
from gateway.prediction.runner import Runner
from gateway.stop_signal import stop_requests


@dataclass
class _Tally:
    """What came of the cases so far. `first_window_s`: from the start of the process."""

    total: int
    skipped: int
    predicted: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    first_window_s: float | None = None
    state: str = "finished"


def predict(request: PredictRequest, *, as_json: bool) -> int:
    """0 when every case is predicted, 1 when one failed or the call was stopped or could not begin, 2 for options that
    do not go together."""
    began = time.monotonic()
    try:
        check_request(request)
        model, plan = _chosen(request, as_json)
        found = find_cases(request, model)
        outputs = Outputs(request, model, plan)
        outputs.begin(found.cases)
        missing = [case for case in found.cases if not (request.continue_prediction and outputs.is_done(case))]
        tally = _Tally(total=len(found.cases), skipped=len(found.cases) - len(missing))
        tally.failed.update(found.faults)
        for note in found.notes:
            say(f"note: {note}")
        for what, why in found.faults:
            _present_failure(what, why, {}, as_json, say)
        runtime = _run(request, model, plan, outputs, missing, tally, as_json=as_json) if missing else ""
    except UsageRefused as error:
        say(f"seggate: {error}")
        return 2
    except (EngineError, GatewayError) as error:
        say(f"seggate: not predicted: {error}")
        return 1
    summary = {
        "ok": not tally.failed and tally.state == "finished",
        "state": tally.state,
        "cases": tally.total,
        "predicted": tally.predicted,
        "skipped": tally.skipped,
        "failed": tally.failed,
        "seconds": round(time.monotonic() - began, 3),
        "first_window_s": tally.first_window_s,
        "runtime": runtime,
        **model.identity(),
    }
    if as_json:
        print_json_line(summary)
    else:
        say(_sentence(tally, request, time.monotonic() - began))
    return 0 if summary["ok"] else 1


def _chosen(request: PredictRequest, as_json: bool) -> tuple[ChosenModel, ExecutionPlan | None]:
    """The model and how it is run; converting and measuring, which take their time, have bars of their own."""
    hidden = as_json or request.quiet or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(text: str) -> None:
            bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

        def detail(text: str) -> None:
            if request.verbose:
                say(text)

        def shown(work: str) -> Callable[[float, str], None]:
            def progress(share: float, what: str) -> None:
                if work not in tasks:
                    tasks[work] = bar.add_task(work, total=1.0)
                bar.update(tasks[work], completed=share, description=f"{work}: {what}")

            return progress

        model = choose_model(request, tell=tell, detail=detail, progress=shown("converting"))
        plan = plan_of(model, request, tell=tell, progress=shown("measuring"))
        if plan is not None:
            detail(f"runs by an execution plan: {plan.summary}")
        return model, plan


def _run(
    request: PredictRequest,
    model: ChosenModel,
    plan: ExecutionPlan | None,
    outputs: Outputs,
    missing: Sequence[Case],
    tally: _Tally,
    *,
    as_json: bool,
) -> str:
    """Predicts the cases; what the networks ran on."""
    sizes = {case.name: max(1, case.size_bytes) for case in missing}
    finished = 0
    hidden = as_json or request.quiet or not sys.stderr.isatty()
    runner = Runner(model, plan, request)
    try:
        with stop_requests() as stop, work_bar(sum(sizes.values()), hidden=hidden) as bar:

            def report(case: Case, share: float) -> None:
                if tally.first_window_s is None and share > 0:
                    tally.first_window_s = _since_start_s()
                bar.show(f"{_place(case, missing)} {case.name}", finished + share * sizes[case.name])

            pipeline = Pipeline(
                runner,
                model.bundle.contract,
                outputs.write,
                channels=len(model.bundle.channels),
                ahead=request.ahead,
                writers=request.writers,
                report=report,
                stop=stop.is_set,
            )
            try:
                for done in _counted(pipeline.run(missing), tally):
                    finished += sizes[done.case.name]
                    _present(done, request, bar, as_json)
            except PredictionStopped:
                tally.state = "stopped"
            except OSError as error:  # what a case fails with is in its line; this one is of the disk
                tally.state = "stopped"
                bar.say(f"seggate: {request.output}: {error.strerror or error}: nothing more can be written")
        return runner.runtime
    finally:
        runner.close()


def _counted(results: Iterable[CaseDone], tally: _Tally) -> Iterable[CaseDone]:
    for done in results:
        if done.error is None:
            tally.predicted += 1
        else:
            tally.failed[done.case.name] = done.error
        yield done


def _present(done: CaseDone, request: PredictRequest, bar: WorkBar, as_json: bool) -> None:
    if done.error is not None:
        _present_failure(done.case.name, done.error, done.case.source, as_json, bar.say)
        return
    for doubt in done.doubts:
        bar.say(f"note: {done.case.name}: {doubt}")
    seconds = {stage: round(value, 4) for stage, value in done.seconds.items()}
    if as_json:
        print_json_line(
            {
                "case": done.case.name,
                "ok": True,
                "seconds": seconds,
                "volumes_ml": done.volumes_ml,
                "files": [str(path) for path in done.files],
                "notes": list(done.doubts),
                **done.case.source,
            }
        )
    elif request.verbose:
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items())
        volumes = ", ".join(f"{name} {value:.3g} ml" for name, value in done.volumes_ml.items())
        bar.say(f"{done.case.name}: {stages} s; {volumes}")


def _present_failure(name: str, error: str, source: Any, as_json: bool, tell: Any) -> None:
    tell(f"seggate: {name}: {error}")
    if as_json:
        print_json_line({"case": name, "ok": False, "error": error, **source})


def _place(case: Case, cases: Sequence[Case]) -> str:
    return f"{[other.name for other in cases].index(case.name) + 1}/{len(cases)}"


def _sentence(tally: _Tally, request: PredictRequest, seconds: float) -> str:
    parts = [f"{tally.predicted} predicted in {seconds:.1f} s"]
    if tally.skipped:
        parts.append(f"{tally.skipped} were there already")
    if tally.failed:
        parts.append(f"{len(tally.failed)} failed: {', '.join(sorted(tally.failed)[:10])}")
    if tally.state == "stopped":
        parts.append("stopped; the same command with --continue_prediction goes on")
    return f"{request.output}: {'; '.join(parts)}"


def _since_start_s() -> float | None:
    """Seconds since this process began (proc(5): field 22 of stat, in ticks of the clock since the machine's start)."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"), 3)
