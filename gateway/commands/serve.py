"""`seggate serve`."""

from __future__ import annotations

from pathlib import Path

from gateway.commands.output import say
from gateway.logs import configure
from gateway.settings import load_settings
from gateway.supervisor import PROCESSES, Supervisor


def serve(config: Path, roles: str) -> int:
    """Prepare the state, then supervise the processes of `roles`; 2 for an unknown role."""
    wanted = [r.strip() for r in roles.split(",") if r.strip()]
    unknown = [r for r in wanted if r not in PROCESSES]
    if unknown or not wanted:
        say(f"seggate: unknown role {', '.join(unknown) or '(none)'}; choose from {', '.join(PROCESSES)}")
        return 2
    settings = load_settings(config)
    configure(settings.logging, process="supervisor")
    from gateway.state import prepare_state

    database = prepare_state(settings)
    return Supervisor(
        config.resolve(), wanted, database=database, drain_s=settings.gateway.receiver.drain_timeout_s + 10
    ).run()
