"""`seggate dataset check`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from engine.dataset_check import CheckReport, Severity, check_dataset
from engine.errors import EngineError
from engine.parallel import default_processes
from gateway.commands.output import console, print_json, progress_bar, say, table


def check(folder: Path, *, processes: int | None, as_json: bool) -> int:
    """0 when the dataset can be trained on (warnings are allowed), 1 otherwise."""
    try:
        with progress_bar("reading cases", hidden=as_json) as advance:
            report = check_dataset(folder, processes=processes or default_processes(), progress=advance)
    except (EngineError, OSError) as error:
        if as_json:
            print_json({"ok": False, "error": str(error), "cases": 0, "findings": []})
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json(_document(report))
    else:
        _present(report)
    return 0 if report.is_usable else 1


def _document(report: CheckReport) -> dict[str, Any]:
    return {
        "ok": report.is_usable,
        "cases": report.num_cases,
        "findings": [
            {
                "severity": str(f.severity),
                "kind": f.kind,
                "case": f.case,
                "file": f.file,
                "cause": f.cause,
                "remedy": f.remedy,
            }
            for f in report.findings
        ],
    }


def _present(report: CheckReport) -> None:
    if report.findings:
        columns = ("", "case", "file", "what is wrong", "what to do")
        table("", columns, [(f.severity, f.case, f.file, f.cause, f.remedy) for f in report.findings])
    counts = Counter(f.severity for f in report.findings)
    console().print(
        f"{report.num_cases} cases, {counts[Severity.ERROR]} errors, {counts[Severity.WARNING]} warnings", markup=False
    )
