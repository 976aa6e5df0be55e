"""`seggate learn start|list|show|retry|stop`: trainings for a new version of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from gateway.commands.model_promotion import acting
from gateway.commands.output import local, print_json, say, table
from gateway.durable import Enqueuer, prepare
from gateway.errors import Rejected
from gateway.learning import runs
from gateway.learning.policy import LearningPolicy
from gateway.learning.shadow import stop_shadow
from gateway.settings import Settings, load_settings
from gateway.state import existing_database, open_registry
from storage.database import Database
from storage.learning_records import LearningRun


def start(config: Path, model: str, *, kind: runs.Kind, reason: str, as_json: bool) -> int:
    """0 when a run is queued or waits for labels; 1 when there can be none."""
    settings = load_settings(config)
    learning = settings.learning.of(model)
    if not learning.can_learn:
        say(f"seggate: learning.toml does not say what {model} was trained with; add `trained` and `dataset`")
        return 1
    with _opened(settings) as (database, enqueuer):
        policy = LearningPolicy(
            database=database, enqueuer=enqueuer, registry=open_registry(settings), settings=settings
        )
        run = policy.ask_for(learning, kind, requested_by=acting(None)[0], reason=reason)
        if run is None:
            say(
                f"seggate: {model}: nothing serves, or another training or candidate is there; see `seggate learn list`"
            )
            return 1
    _present(run, as_json=as_json)
    return 0


def list_(config: Path, model: str | None, *, as_json: bool) -> int:
    database = existing_database(load_settings(config))
    try:
        with database.reading() as session:
            found = [_document(run) for run in runs.runs_of(session, model)]
    finally:
        database.close()
    if as_json:
        print_json(found)
    elif not found:
        say("no training was ever asked for; `seggate learn start MODEL` does")
    else:
        rows = [
            (
                *(r["run_id"][:8], r["model"], r["kind"], r["base_version"], r["semver"] or "", r["state"], r["cases"]),
                *(local(r["updated_at"]), r["state_reason"] or ""),
            )
            for r in found
        ]
        table("", ("run", "model", "kind", "from", "version", "state", "cases", "since", "reason"), rows)
    return 0


def show(config: Path, run_id: str, *, as_json: bool) -> int:
    settings = load_settings(config)
    database = existing_database(settings)
    try:
        with database.reading() as session:
            run = _found(session, run_id)
    except Rejected as error:
        say(f"seggate: {error}")
        return 1
    finally:
        database.close()
    document = {**_document(run), "chosen": run.cases or [], "figures": run.figures or {}}
    document["logs"] = str(runs.run_folder(settings.models_dir, run.run_id) / "logs")
    if as_json:
        print_json(document)
        return 0
    keys = (
        "run_id",
        "model",
        "kind",
        "base_version",
        "semver",
        "state",
        "state_reason",
        "requested_by",
        "reason",
        "logs",
    )
    for key in keys:
        say(f"{key:14} {document[key] if document[key] is not None else ''}")
    folds = document["figures"].get("folds", {})
    if folds:
        say(f"{'folds':14} {', '.join(f'{fold} {state}' for fold, state in sorted(folds.items()))}")
    return 0


def retry(config: Path, run_id: str, *, as_json: bool) -> int:
    with _opened(load_settings(config)) as (database, enqueuer):
        try:
            with database.session() as session:
                run = _found(session, run_id, lock=True)
                runs.retry_run(session, enqueuer, run, actor=acting(None)[0])
        except Rejected as error:
            say(f"seggate: {error}")
            return 1
    _present(run, as_json=as_json)
    return 0


def stop(config: Path, run_id: str, *, reason: str, as_json: bool) -> int:
    """The run is given up; a fold that trains ends within seconds, a candidate runs in shadow no more."""
    settings = load_settings(config)
    with _opened(settings) as (database, _):
        try:
            with database.session() as session:
                run = _found(session, run_id, lock=True)
                runs.give_up(session, run, actor=acting(None)[0], reason=reason)
        except Rejected as error:
            say(f"seggate: {error}")
            return 1
        registry = open_registry(settings)
        shadow = registry.shadow(run.model_name) if run.semver is not None else None
        if shadow is not None and shadow.semver == run.semver:
            stop_shadow(database, registry, run.model_name, actor=acting(None)[0])
    _present(run, as_json=as_json)
    return 0


def _found(session: Session, run_id: str, *, lock: bool = False) -> LearningRun:
    """By the whole id or the beginning that `learn list` shows. Raises Rejected."""
    ids = [run.run_id for run in runs.runs_of(session, None) if run.run_id.startswith(run_id)]
    if len(ids) > 1:
        raise Rejected(f"{run_id!r} is the beginning of {len(ids)} ids; give more of it")
    return runs.get_run(session, ids[0] if ids else run_id, lock=lock)


@contextmanager
def _opened(settings: Settings) -> Iterator[tuple[Database, Enqueuer]]:
    database = existing_database(settings)
    prepare(database)
    enqueuer = Enqueuer(database)
    try:
        yield database, enqueuer
    finally:
        enqueuer.close()
        database.close()


def _document(run: LearningRun) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "model": run.model_name,
        "kind": run.kind,
        "base_version": run.base_version,
        "semver": run.semver,
        "state": run.state,
        "state_reason": run.state_reason,
        "requested_by": run.requested_by,
        "reason": run.reason,
        "requested_at": run.requested_at,
        "updated_at": run.updated_at,
        "cases": len(run.cases or []),
    }


def _present(run: LearningRun, *, as_json: bool) -> None:
    if as_json:
        print_json(_document(run))
    else:
        reason = f": {run.state_reason}" if run.state_reason else ""
        say(f"{run.model_name}: {run.kind} {run.run_id[:8]} is {run.state}{reason}")
