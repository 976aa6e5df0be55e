"""`seggate canary`: a canary of each model now, and its answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gateway.commands.output import print_json, say, table
from gateway.logs import keep_off_standard_output
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry, open_spool, registry_exists
from storage.canary_records import CanaryRun
from storage.database import Database

_LOOK_S = 0.25


def canary(config: Path, model: str | None, *, as_json: bool) -> int:
    """0 when every canary was good, 1 when one was not or none could be sent, 2 where no canary is configured."""
    from gateway.durable import Enqueuer
    from gateway.model_shelf import ModelShelf
    from gateway.monitoring.canary import Canary

    keep_off_standard_output()
    settings = load_settings(config)
    if not settings.gateway.scheduler.canary_cron:
        say("seggate: scheduler.canary_cron is empty, so the receiver takes no canary; set it, and restart the gateway")
        return 2
    database = existing_database(settings)
    if not registry_exists(settings):
        say("seggate: no model serves; import one with `seggate models import`")
        return 1
    registry, enqueuer = open_registry(settings), Enqueuer(database)
    try:
        own = Canary(
            database=database,
            spool=open_spool(settings),
            settings=settings,
            registry=registry,
            shelf=ModelShelf(registry),
            enqueuer=enqueuer,
        )
        serving = own.champions()
        if model is not None and model not in {one.name for one in serving}:
            names = ", ".join(one.name for one in serving) or "none"
            say(f"seggate: no version of a model {model[:80]!r} serves; there are {names}")
            return 1
        started = [own.start(one) for one in serving if model in (None, one.name)]
        waiting = [one.study_instance_uid for one in started if one.study_instance_uid is not None]
        for one in started:
            if one.study_instance_uid is not None:
                say(f"{one.model}: sent ({one.reason}); waiting for the result")
        left = list(waiting)
        while left:
            left = [uid for uid in left if own.judge(uid) is None]
            if left:
                time.sleep(_LOOK_S)
    finally:
        enqueuer.close()
    documents: list[dict[str, Any]] = [
        _document(database, one.model, one.study_instance_uid)
        if one.study_instance_uid is not None
        else {"model": one.model, "outcome": "not-sent", "detail": one.reason}
        for one in started
    ]
    if as_json:
        print_json(documents)
    elif not documents:
        say("no model serves")
    else:
        rows = [(d["model"], d["outcome"], d.get("seconds"), _words(d.get("dice")), d["detail"]) for d in documents]
        table("", ("model", "outcome", "seconds", "Dice", "why"), rows)
    return int(not documents or any(document["outcome"] != "good" for document in documents))


def _document(database: Database, model: str, study_instance_uid: str) -> dict[str, Any]:
    with database.reading() as session:
        run = session.get_one(CanaryRun, study_instance_uid)
    return {
        "model": model,
        "study": study_instance_uid,
        "case": run.case_name,
        "outcome": run.outcome,
        "detail": run.detail,
        "seconds": None if run.seconds is None else round(run.seconds, 2),
        "dice": run.dice,
    }


def _words(dice: dict[str, float | None] | None) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in (dice or {}).items() if value is not None)
