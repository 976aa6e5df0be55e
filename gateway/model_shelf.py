"""The models at hand in a worker: champions resolved, bundles verified once, predictors kept warm."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import structlog

from engine.backends import Device
from engine.bundle import Bundle, load_bundle
from engine.errors import EngineError
from engine.execution_plan import ExecutionPlan
from engine.predictor import Prediction, Predictor
from engine.volume import Geometry, Volume
from gateway.model_plans import ModelPlans, open_planned
from storage.errors import ModelChanged, ModelMissing, StorageError
from storage.models import SHADOW, ModelRegistry, RegisteredModel

_log = structlog.get_logger(__name__)
_CHAMPION_FOR_S = 2.0


class ModelShelf:
    """Resolves names to the version that serves, and holds its loaded bundle and predictor.

    Safe to use from several threads. Weights are hashed when a bundle is first loaded; what differs from its
    registration is refused with ModelChanged and never run (INF-35). With `plans`, each model runs by its execution
    plan, which is measured when there is none; without, in ONNX Runtime and float32.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        *,
        device: Device = "auto",
        threads: int = 0,
        plans: ModelPlans | None = None,
        scratch: Path | None = None,
    ) -> None:
        """`plans`: which runtime each model uses on this machine. `scratch`: a folder on a disk, for models that need
        more memory than is free (engine.predictor)."""
        self._registry = registry
        self._plans = plans
        self._scratch = scratch
        self._device = device
        self._threads = threads
        self._lock = threading.RLock()
        self._champions: dict[str, tuple[float, RegisteredModel]] = {}
        self._shadows: dict[str, tuple[float, RegisteredModel | None]] = {}
        self._bundles: dict[tuple[str, str], Bundle] = {}
        self._predictors: dict[tuple[str, str], Predictor] = {}
        self._in_force: dict[tuple[str, str], ExecutionPlan | None] = {}
        self._users: Counter[tuple[str, str]] = Counter()

    def champion(self, name: str) -> RegisteredModel:
        """The version that serves now (asked again after two seconds); raises ModelMissing."""
        with self._lock:
            known = self._champions.get(name)
            if known is not None and time.monotonic() - known[0] < _CHAMPION_FOR_S:
                return known[1]
            model = self._registry.champion(name)
            self._champions[name] = (time.monotonic(), model)
            return model

    def shadow(self, name: str) -> RegisteredModel | None:
        """The version that runs in shadow now (asked again after two seconds); None where none does."""
        with self._lock:
            known = self._shadows.get(name)
            if known is not None and time.monotonic() - known[0] < _CHAMPION_FOR_S:
                return known[1]
            model = next((m for m in self._registry.versions(name) if SHADOW in m.aliases), None)
            self._shadows[name] = (time.monotonic(), model)
            return model

    def forget(self, name: str) -> None:
        """Ask the registry at the next study which version serves: another one does since this moment."""
        with self._lock:
            self._champions.pop(name, None)
            self._shadows.pop(name, None)

    def serves(self, name: str) -> bool:
        """Whether a version of the model serves now."""
        try:
            self.champion(name)
        except ModelMissing:
            return False
        return True

    def version(self, name: str, semver: str) -> RegisteredModel:
        return self._registry.get(name, semver)

    def bundle(self, model: RegisteredModel) -> Bundle:
        """The verified bundle of a registered model; raises BundleInvalid or ModelChanged."""
        key = (model.name, model.semver)
        with self._lock:
            bundle = self._bundles.get(key)
            if bundle is None:
                bundle = load_bundle(model.folder, verify=True)
                if (bundle.weights_digest, bundle.configuration_digest) != (
                    model.weights_digest,
                    model.configuration_digest,
                ):
                    raise ModelChanged(
                        f"{model.name} {model.semver}: its files are not those that were registered; "
                        "restore them or import the model again"
                    )
                self._bundles[key] = bundle
            return bundle

    def predictor(self, model: RegisteredModel) -> Predictor:
        """A warm predictor for a registered model."""
        bundle = self.bundle(model)
        with self._lock:
            predictor = self._predictors.get((model.name, model.semver))
            if predictor is None:
                device, threads = self._device, self._threads or None
                plan = self._plans.in_force(bundle, device=device, threads=threads) if self._plans else None
                predictor, plan = open_planned(bundle, plan, device=device, threads=threads, scratch=self._scratch)
                self._in_force[(model.name, model.semver)] = plan
                self._predictors[(model.name, model.semver)] = predictor
            return predictor

    def loaded(self) -> dict[str, frozenset[str]]:
        """By model the versions whose networks are in memory."""
        with self._lock:
            return {name: frozenset(v for n, v in self._predictors if n == name) for name, _ in self._predictors}

    def close_all_but(self, name: str, needed: Collection[str]) -> list[str]:
        """Free the networks of a model's versions that are not `needed`, and return which; one that is in use stays
        until the next call. Asked for again, a version is loaded again."""
        closed = []
        for semver in sorted(self.loaded().get(name, frozenset()) - frozenset(needed)):
            key = (name, semver)
            with self._lock:
                predictor = None if self._users[key] else self._predictors.pop(key, None)
            if predictor is not None:
                predictor.close()
                closed.append(semver)
        return closed

    def check_memory(self, model: RegisteredModel, geometry: Geometry, *, budget_bytes: int | None) -> None:
        """Raises MemoryExceeded, with the numbers, for an image on `geometry` that the model could not be run on."""
        self.predictor(model).check_memory(geometry, budget_bytes=budget_bytes)

    def needed_bytes(self, model: RegisteredModel, geometry: Geometry) -> int:
        """The estimated peak of running the model on an image on `geometry`, the image included."""
        return self.predictor(model).needed_bytes(geometry)

    def predict(
        self,
        model: RegisteredModel,
        volume: Volume,
        *,
        budget_bytes: int | None,
        progress: Callable[[float], None] | None = None,
    ) -> Prediction:
        """Run a model; `progress` is called between windows. Raises what the predictor and `progress` raise."""
        key = (model.name, model.semver)
        with self._in_use(key, model) as predictor:
            prediction = predictor.predict(volume, budget_bytes=budget_bytes, progress=progress)
            plan = self._in_force[key]
        if plan is None or not plan.left_out:
            return prediction
        return replace(prediction, runtime=replace(prediction.runtime, left_out=plan.left_out))

    @contextmanager
    def _in_use(self, key: tuple[str, str], model: RegisteredModel) -> Iterator[Predictor]:
        with self._lock:
            predictor = self.predictor(model)
            self._users[key] += 1
        try:
            yield predictor
        finally:
            with self._lock:
                self._users[key] -= 1

    def known(self) -> list[str]:
        """Names and versions of all registered models; opens the registry."""
        return [f"{m.name} {m.semver}" for m in self._registry.all()]

    def warm(self) -> list[str]:
        """Load every champion, so that the first study does not wait for it; returns the names of those loaded.

        One that cannot be loaded is logged and left: only studies for it are parked, with the reason.
        """
        loaded = []
        for model in self._registry.all():
            if model.state == "champion":
                try:
                    self.predictor(model)
                except (EngineError, StorageError) as error:
                    _log.error("a model could not be loaded", model=f"{model.name} {model.semver}", error=str(error))
                    continue
                loaded.append(f"{model.name} {model.semver}")
        return loaded

    def close(self) -> None:
        with self._lock:
            for predictor in self._predictors.values():
                predictor.close()
            self._predictors.clear()
