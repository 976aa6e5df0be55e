"""`seggate audit verify`."""

from __future__ import annotations

from pathlib import Path

from gateway.commands.output import print_json, say
from gateway.settings import load_settings
from gateway.state import existing_database
from storage import ledger
from storage.errors import LedgerBroken


def verify(config: Path, subject: str | None, *, as_json: bool) -> int:
    """0 when every chain is whole, 1 when one is not, or there is none of that subject."""
    database = existing_database(load_settings(config))
    broken: dict[str, str] = {}
    with database.reading() as session:
        if subject is None:
            checked, broken = ledger.verify_all(session)
        else:
            try:
                checked = ledger.verify(session, subject)
            except LedgerBroken as error:
                checked, broken = 0, {subject: str(error)}
    unknown = subject is not None and not checked and not broken
    if as_json:
        print_json({"ok": not broken and not unknown, "events": checked, "broken": broken})
    for text in broken.values():
        say(f"broken: {text}")
    if unknown:
        say(f"seggate: the ledger has no events of {subject}; subjects are study:UID, model:NAME and gateway")
    elif not as_json:
        say(f"{checked} events in whole chains" + (f", {len(broken)} chains broken" if broken else ""))
    return int(bool(broken) or unknown)
