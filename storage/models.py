"""The model registry: MLflow (embedded, its own database) knows names, versions and aliases; the folder holds bundles.

`champion` is what serves, `candidate` and `shadow` do not, `previous` is what served before. The semantic version is a
tag, because MLflow takes no dots in an alias. Tags can be changed by anyone with a client, so each registration and
promotion is also a ledger event (written by the caller), and weights are checked against it before they are used.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from storage.errors import DatabaseAway, ModelChanged, ModelMissing

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CANDIDATE, SHADOW, PREVIOUS = "champion", "candidate", "shadow", "previous"
_SEMVER = re.compile(r"(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){2}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """One version of a model as the registry knows it."""

    name: str
    semver: str
    registry_version: int
    folder: Path
    weights_digest: str
    configuration_digest: str
    licence: str
    description: str
    aliases: tuple[str, ...]
    registered_at_ms: int

    @property
    def state(self) -> str:
        """champion, shadow, candidate, previous or retired: what this version may be used for."""
        return next((a for a in (CHAMPION, SHADOW, CANDIDATE, PREVIOUS) if a in self.aliases), "retired")


class ModelRegistry:
    """Registered models under `folder`; `url` is MLflow's own database (empty = SQLite in the folder)."""

    def __init__(self, folder: Path, *, url: str = "") -> None:
        self.folder = folder
        self._url = url or f"sqlite:///{folder / 'registry.sqlite'}"
        self._client: MlflowClient | None = None

    def register(
        self,
        bundle: Path,
        *,
        name: str,
        semver: str,
        weights_digest: str,
        configuration_digest: str,
        licence: str,
        description: str,
        serve: bool,
    ) -> RegisteredModel:
        """Copy a verified bundle under the models folder and register it; `serve` makes it the champion at once.

        Registering the same name, version and digests again is free. Raises ModelChanged when the version exists
        with other weights or configuration (a version never changes), ValueError on a malformed name or version.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"model name {name!r}: use a-z, 0-9 and '-', at most 63 characters")
        if not _SEMVER.fullmatch(semver):
            raise ValueError(f"version {semver!r}: use MAJOR.MINOR.PATCH, for example 1.0.0")
        existing = next((m for m in self.versions(name) if m.semver == semver), None)
        if existing is not None:
            if (existing.weights_digest, existing.configuration_digest) != (weights_digest, configuration_digest):
                raise ModelChanged(
                    f"{name} {semver} is registered with other content; choose a new version number: "
                    "`seggate export DATASET --semver V`, or another name with --name"
                )
            if serve and CHAMPION not in existing.aliases:
                self.promote(name, semver)
            return self.get(name, semver)
        target = self._copy(bundle, name, semver)
        client = self._mlflow()
        if name not in {m.name for m in client.search_registered_models()}:
            client.create_registered_model(name)
        version = client.create_model_version(
            name,
            source=target.as_uri(),
            description=description,
            tags={
                "semver": semver,
                "weights_digest": weights_digest,
                "configuration_digest": configuration_digest,
                "licence": licence,
                "folder": str(target.relative_to(self.folder)),
            },
        )
        if serve:
            self.promote(name, semver)
        else:
            client.set_registered_model_alias(name, CANDIDATE, version.version)
        return self.get(name, semver)

    def promote(self, name: str, semver: str) -> RegisteredModel:
        """Make a version the champion; the former champion becomes `previous`. At no moment is there no champion."""
        client, model = self._mlflow(), self.get(name, semver)
        champion = next((m for m in self.versions(name) if CHAMPION in m.aliases), None)
        if champion is not None and champion.registry_version != model.registry_version:
            client.set_registered_model_alias(name, PREVIOUS, str(champion.registry_version))
        client.set_registered_model_alias(name, CHAMPION, str(model.registry_version))
        if CANDIDATE in model.aliases:
            client.delete_registered_model_alias(name, CANDIDATE)
        return self.get(name, semver)

    def set_shadow(self, name: str, semver: str) -> RegisteredModel:
        """Make a version the one that runs in shadow, instead of another one. Raises ModelMissing."""
        model = self.get(name, semver)
        self._mlflow().set_registered_model_alias(name, SHADOW, str(model.registry_version))
        return self.get(name, semver)

    def clear_shadow(self, name: str) -> None:
        """No version runs in shadow any more; free when none does."""
        if any(SHADOW in m.aliases for m in self.versions(name)):
            self._mlflow().delete_registered_model_alias(name, SHADOW)

    def champion(self, name: str) -> RegisteredModel:
        """The version that serves; raises ModelMissing when there is none."""
        for model in self.versions(name):
            if CHAMPION in model.aliases:
                return model
        raise ModelMissing(f"no model {name!r} serves here; import one with `seggate models import`")

    def get(self, name: str, semver: str) -> RegisteredModel:
        for model in self.versions(name):
            if model.semver == semver:
                return model
        raise ModelMissing(f"no version {semver} of model {name!r} is registered")

    def versions(self, name: str) -> Sequence[RegisteredModel]:
        """All versions of one model, oldest first; none for a name that is not registered. Raises DatabaseAway."""
        if not _NAME.fullmatch(name):
            return ()
        with self._answers() as client:
            known = {m.name: m for m in client.search_registered_models(f"name='{name}'")}.get(name)
            if known is None:
                return ()
            aliases = dict(known.aliases)
            found = client.search_model_versions(f"name='{name}'")
            return sorted((self._model(v, aliases) for v in found), key=lambda m: m.registry_version)

    def all(self) -> Sequence[RegisteredModel]:
        """All versions of all models, by name and age. Raises DatabaseAway."""
        with self._answers() as client:
            names = sorted(m.name for m in client.search_registered_models())
        return [model for name in names for model in self.versions(name)]

    def _model(self, version: Any, aliases: dict[str, Any]) -> RegisteredModel:
        tags = version.tags
        return RegisteredModel(
            name=version.name,
            semver=tags.get("semver", ""),
            registry_version=int(version.version),
            folder=self.folder / tags.get("folder", ""),
            weights_digest=tags.get("weights_digest", ""),
            configuration_digest=tags.get("configuration_digest", ""),
            licence=tags.get("licence", ""),
            description=version.description or "",
            aliases=tuple(sorted(a for a, v in aliases.items() if int(v) == int(version.version))),
            registered_at_ms=int(version.creation_timestamp or 0),
        )

    def _copy(self, bundle: Path, name: str, semver: str) -> Path:
        """Copy beside the target, sync, rename: a half-copied bundle never has the final name."""
        target = self.folder / name / semver
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{semver}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(bundle, partial, symlinks=False)
        for path in (*partial.rglob("*"), partial):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if target.exists():
            # Left by a registration that died before MLflow knew of it: nothing refers to it.
            shutil.rmtree(target)
        partial.rename(target)
        return target

    @contextmanager
    def _answers(self) -> Iterator[MlflowClient]:
        """The client. That the registry is away must not read as "no such model": raises DatabaseAway."""
        _import_quietly()
        from mlflow.exceptions import MlflowException

        try:
            yield self._mlflow()
        except OSError as error:
            raise DatabaseAway(f"{error.filename}: {error.strerror}") from error
        except (MlflowException, SQLAlchemyError) as error:
            raise DatabaseAway(f"the model registry did not answer: {type(error).__name__}") from error

    def _mlflow(self) -> MlflowClient:
        """The client, made at first use: MLflow takes seconds to import and to migrate its database."""
        if self._client is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _import_quietly()
            from mlflow import MlflowClient

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # MLflow migrates its database when the client is made, and two at once break it for good.
                with (self.folder / "registry.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    client = MlflowClient(tracking_uri=self._url, registry_uri=self._url)
                    client.search_registered_models(max_results=1)
                self._client = client
        return self._client


def _import_quietly() -> None:
    """MLflow imported with its telemetry off and without its own warnings."""
    if "mlflow" not in sys.modules:
        # Nothing leaves the machine, whatever MLflow's defaults are.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["DO_NOT_TRACK"] = "true"
        with warnings.catch_warnings():
            # MLflow's own imports warn about their future; nothing here can act on it.
            warnings.simplefilter("ignore")
            import mlflow  # noqa: F401
    # Its schema migrations announce themselves on standard error at every first use. Each time: whoever else imports
    # MLflow, or sets its logger up again, does not ask.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
