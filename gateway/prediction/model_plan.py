"""The execution plan that `seggate predict` runs a model by: measured at first use and kept, as in the gateway.

Plans of registered models lie in the models folder, where `seggate models tune` puts them; those of other models beside
the converted ones in the cache, below the digest of their weights: their names are not unique.
"""

from __future__ import annotations

from pathlib import Path

from engine.execution_plan import ExecutionPlan
from engine.predictor import Predictor
from engine.sanity_check import STRICT_TOLERANCE
from gateway.model_plans import ModelPlans, open_planned
from gateway.prediction.conversion_cache import Progress, Tell, cache_folder
from gateway.prediction.model import ChosenModel
from gateway.prediction.request import PredictRequest

_FOLDER = "plans"


def plan_of(model: ChosenModel, request: PredictRequest, *, tell: Tell, progress: Progress) -> ExecutionPlan | None:
    """The plan in force, measured now if there is none. None where nothing could be measured: then ONNX Runtime in
    float32 runs.

    With a tolerance candidates that change labels are measured, too, which takes up to two minutes once; `progress`
    hears how far that is, `tell` each time what it costs. Raises BackendFailed, BundleInvalid, MemoryExceeded where
    that fails.
    """
    device, threads = request.chosen_device, request.threads
    if request.tolerance is None:
        folder = model.plans_dir or _beside_bundles(model, request, STRICT_TOLERANCE)
        plans = ModelPlans(folder)
        plan = plans.find(model.bundle, device=device, threads=threads).plan
        if plan is None:
            from gateway.logs import keep_off_standard_output

            keep_off_standard_output()
            plan = plans.in_force(model.bundle, device=device, threads=threads)
    else:
        plan = _within(model, request, request.tolerance, progress=progress, tell=tell)
    for text in plan.cost if plan is not None else ():
        tell(text)
    return plan


def _within(
    model: ChosenModel, request: PredictRequest, tolerance: float, *, progress: Progress, tell: Tell
) -> ExecutionPlan:
    from engine.tuning import TuningRequest, tune

    device, threads = request.chosen_device, request.threads
    plans = ModelPlans(_beside_bundles(model, request, tolerance))
    found = plans.find(model.bundle, device=device, threads=threads)
    if found.plan is not None:
        return found.plan
    asked = TuningRequest(device=device, threads=threads, tolerance=tolerance)
    plan = tune(model.bundle, asked, progress=progress)
    try:
        plans.save(plan)
    except OSError as error:
        tell(f"the execution plan could not be kept in the cache ({error.strerror}); the next call measures again")
    return plan


def _beside_bundles(model: ChosenModel, request: PredictRequest, tolerance: float) -> Path:
    own = model.bundle.weights_digest.removeprefix("sha256:")[:32]
    return cache_folder(request.cache) / _FOLDER / own / f"{tolerance:g}"


def open_model(model: ChosenModel, plan: ExecutionPlan | None, request: PredictRequest) -> Predictor:
    """The networks, loaded as the plan says. Where memory is short, sums are kept in a file in the results' folder.
    Raises BundleInvalid, BackendFailed."""
    predictor, _ = open_planned(
        model.bundle, plan, device=request.chosen_device, threads=request.threads, scratch=request.output
    )
    return predictor
