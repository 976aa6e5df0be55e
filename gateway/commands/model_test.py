"""`seggate models test`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gateway.commands.model_promotion import acting
from gateway.commands.output import local, print_json, printable, say, table
from gateway.learning_settings import Change
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry
from storage.errors import ModelMissing
from storage.models import CANDIDATE, ModelRegistry

ACCEPTED, REJECTED, OUTSIDE_PLAN = 0, 1, 3
"""Exit codes; 1 as well where there is no verdict, with the reason on standard error."""


def test(
    config: Path,
    name: str,
    semver: str | None,
    *,
    change: Change,
    requested_by: str | None,
    report_file: Path | None,
    as_json: bool,
) -> int:
    """Examines a version (the candidate, if none is named), writes the verdict down and prints it. `requested_by`: who
    asked for the version, if not who types this."""
    from engine.errors import EngineError
    from gateway.learning.gate import examine
    from gateway.learning.gate_report import release_note

    settings = load_settings(config)
    registry = open_registry(settings)
    version = semver or _candidate(registry, name)
    if report_file is not None and not report_file.absolute().parent.is_dir():
        say(f"seggate: {report_file.absolute().parent} does not exist")
        return 2
    database = existing_database(settings)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=as_json, transient=True) as bar:
            task = bar.add_task(f"{name} {version}", total=1.0)
            row = examine(
                database,
                registry,
                settings,
                name,
                version,
                change=change,
                requested_by=requested_by or acting(None)[0],
                progress=lambda share, what: bar.update(task, completed=share, description=what),
            )
    except EngineError as error:
        if as_json:
            print_json({"ok": False, "error": str(error)})
        say(f"seggate: not examined: {error}")
        return 1
    finally:
        database.close()
    if report_file is not None:
        report_file.write_text(release_note(row.report, examined_at=local(row.examined_at)), encoding="utf-8")
    if as_json:
        print_json({"ok": True, "report_id": row.report_id, "examined_at": row.examined_at, **row.report})
    else:
        _present(row.report)
        if report_file is not None:
            say(f"report: {report_file}")
    return {"ACCEPTED": ACCEPTED, "REJECTED": REJECTED}.get(row.verdict, OUTSIDE_PLAN)


def _candidate(registry: ModelRegistry, name: str) -> str:
    for model in registry.versions(name):
        if CANDIDATE in model.aliases:
            return model.semver
    raise ModelMissing(f"no version of {name!r} is a candidate; name one: `seggate models test {name} SEMVER`")


def _present(report: Mapping[str, Any]) -> None:
    from gateway.learning.gate_report import figure_rows

    if rows := figure_rows(report):
        table("", ("figure", "this version", "serves", "change"), rows)
    for reason in report["reasons"]:
        say(f"{'outside the plan' if reason['outside'] else 'rejected'}: {printable(reason['text'])}")
    for note in report["notes"]:
        say(f"note: {printable(note)}")
    locked = report["locked"]
    if locked is not None and locked["look"] is not None:
        say(f"{locked['cases']} locked cases of {printable(locked['dataset'])}, look number {locked['look']}")
    champion = report["champion"]
    against = f", compared with {champion['semver']}, which serves" if champion is not None else ""
    say(f"{report['model']} {report['semver']}: {report['verdict']}{against}")
