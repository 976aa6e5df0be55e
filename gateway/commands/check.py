"""`seggate check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from gateway.checks import (
    Finding,
    Status,
    check_clock,
    check_configuration,
    check_database,
    check_disk,
    check_models,
    check_runtime,
    check_senders,
    check_state_folders,
)
from gateway.commands.output import console, print_json, table
from gateway.delivery.destination import EchoReport
from gateway.learning_checks import check_learning
from gateway.peer_checks import (
    Advice,
    advice,
    check_emrs,
    check_pacs,
    check_receiver_port,
    check_sender_queries,
    check_web_port,
)


def check(config: Path, *, as_json: bool) -> int:
    """0 when nothing failed (warnings are allowed), 1 otherwise. Works before the first start and beside a gateway."""
    with Console(stderr=True).status("checking") as status:
        if as_json:
            status.stop()
        findings, echoes, others = _run(config, tell=lambda what: status.update(f"checking {what}"))
    well = all(f.status is not Status.FAILED for f in findings)
    if as_json:
        print_json(_document(findings, echoes, others, well=well))
    else:
        _present(findings, others)
    return 0 if well else 1


def _run(config: Path, *, tell: Callable[[str], None]) -> tuple[list[Finding], list[EchoReport], list[Advice]]:
    findings, settings, rules = check_configuration(config)
    if settings is None:
        return findings, [], []  # everything else depends on what the files say
    tell("disk")
    findings += [check_senders(settings), check_state_folders(settings), *check_disk(settings)]
    tell("database and clock")
    database_finding, database = check_database(settings)
    try:
        findings += [database_finding, *check_clock(database, rules)]
    finally:
        if database is not None:
            database.close()
    tell("ports")
    findings += [check_receiver_port(settings), check_web_port(settings)]
    tell("models")
    findings += [check_runtime(settings), *check_models(settings, rules)]
    tell("learning")
    findings += check_learning(settings)
    tell("PACS and EMR")
    pacs, echoes = check_pacs(settings)
    findings += [*check_sender_queries(settings), *pacs, *check_emrs(settings)]
    return findings, echoes, advice(settings, echoes)


def _document(findings: list[Finding], echoes: list[EchoReport], others: list[Advice], *, well: bool) -> dict[str, Any]:
    return {
        "ok": well,
        "checks": [{"check": f.check, "status": str(f.status), "detail": f.detail} for f in findings],
        "destinations": [e.as_dict() for e in echoes],
        "must_enter": [{"who": a.who, "lines": list(a.lines)} for a in others],
    }


def _present(findings: list[Finding], others: list[Advice]) -> None:
    table("", ("check", "result", "detail"), [(f.check, f.status, f.detail) for f in findings])
    out = console()
    if others:
        out.print("\nWhat the other side must enter", markup=False)
    for other in others:
        out.print(f"  {other.who}", markup=False)
        for line in other.lines:
            out.print(f"    {line}", markup=False)
    counts = Counter(f.status for f in findings)
    out.print(
        f"\n{counts[Status.OK]} ok, {counts[Status.WARNING]} warnings, {counts[Status.FAILED]} failed", markup=False
    )
