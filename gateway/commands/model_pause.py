"""`seggate models pause` and `resume`."""

from __future__ import annotations

import getpass
from pathlib import Path

from gateway.commands.output import local, print_json, say
from gateway.errors import Rejected
from gateway.learning.pauses import is_paused, pause, resume
from gateway.logs import keep_off_standard_output
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry, registry_exists


def pause_model(config: Path, name: str, *, reason: str, as_json: bool) -> int:
    """0 when the model is paused now, also where it was before; 1 where there is no such model, or no reason."""
    keep_off_standard_output()
    settings = load_settings(config)
    if not registry_exists(settings) or not open_registry(settings).versions(name):
        say(f"seggate: no model {name[:80]!r} is registered here")
        return 1
    try:
        with existing_database(settings).session() as session:
            was = is_paused(session, name)
            found = pause(session, name, by=f"user:{getpass.getuser()}", reason=reason)
    except Rejected as error:
        say(f"seggate: {error}")
        return 1
    if as_json:
        document = {"model": name, "since": found.since, "by": found.by, "reason": found.reason, "was_paused": was}
        print_json(document)
    else:
        since = f"paused since {local(found.since)} by {found.by}: {found.reason}"
        say(f"{name}: {since if was else 'paused; new studies wait'}")
    return 0


def resume_model(config: Path, name: str, *, as_json: bool) -> int:
    """0 when the model runs again, 1 where it was not paused."""
    from gateway.durable import Enqueuer

    database = existing_database(load_settings(config))
    enqueuer = Enqueuer(database)
    try:
        with database.session() as session:
            resumed = resume(session, enqueuer, name, by=f"user:{getpass.getuser()}")
    except Rejected as error:
        say(f"seggate: {error}")
        return 1
    finally:
        enqueuer.close()
    if as_json:
        print_json({"model": name, "results": resumed.results, "ordered_again": resumed.studies})
    else:
        again = f", {resumed.studies} studies are ordered again for the version that serves" if resumed.studies else ""
        say(f"{name}: runs again; {resumed.results} results are back on their queue{again}")
    return 0
