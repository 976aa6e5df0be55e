"""`seggate send`."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gateway.commands.output import console, print_json, printable, say, table
from gateway.sending import PeerRefused, SendReport, send_files
from gateway.sending import Progress as Step
from gateway.setting_types import AeTitle, PeerAddress

_MAX_SKIPPED_NAMED = 5
_ADDRESS = re.compile(r"(?P<ae>[^@]+)@(?P<host>\[[0-9A-Fa-f:.%]+\]|[^@:\[\]\s]+):(?P<port>[0-9]{1,5})")


def send(path: Path, *, to: str, calling_ae: str, as_json: bool) -> int:
    """0 when every DICOM file was stored, 1 when one was not (each is named), 2 for an address that is none."""
    try:
        peer = parse_address(to)
        TypeAdapter(AeTitle).validate_python(calling_ae)
    except ValidationError:
        say(f"seggate: --from {calling_ae!r}: an AE title has 1 to 16 characters, no backslash (PS3.5 6.2)")
        return 2
    except ValueError as error:
        say(f"seggate: --to {to!r}: {error}")
        return 2
    bar = Progress(
        TextColumn("sending"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=as_json,
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("sending", total=None)

            def advance(step: Step) -> None:
                bar.update(task, completed=step.done, total=step.total)

            report = send_files(path, peer, calling_ae=calling_ae.strip(), progress=advance)
    except (PeerRefused, OSError) as error:
        if as_json:
            print_json({"ok": False, "to": to, "error": str(error), "sent": [], "failed": []})
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json({"ok": report.is_complete, "to": to} | _document(report))
    else:
        _present(report, to)
    return 0 if report.is_complete else 1


def parse_address(text: str) -> PeerAddress:
    """`AE@host:port`, an IPv6 address in brackets. Raises ValueError saying which part is wrong."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        raise ValueError("use AE@host:port, for example PACS@10.1.1.5:104 (an IPv6 address in brackets)")
    try:
        return PeerAddress(ae_title=match["ae"], host=match["host"].strip("[]"), port=int(match["port"]))
    except ValidationError as error:
        wrong = {str(e["loc"][0]) for e in error.errors()}
        if "port" in wrong:
            raise ValueError("the port must be 1 to 65535") from None
        raise ValueError("an AE title has 1 to 16 characters, no backslash (PS3.5 6.2)") from None


def _document(report: SendReport) -> dict[str, object]:
    return {
        "sent": [{"file": str(s.path), "sop_instance_uid": s.sop_instance_uid} for s in report.sent],
        "warnings": [
            {
                "file": str(s.path),
                "sop_instance_uid": s.sop_instance_uid,
                "status": f"0x{s.status:04X}",
                "comment": s.comment,
            }
            for s in report.warnings
        ],
        "failed": [
            {
                "file": str(f.path),
                "reason": f.reason,
                "status": None if f.status is None else f"0x{f.status:04X}",
            }
            for f in report.failed
        ],
        "skipped": [{"file": str(path), "reason": word} for path, word in report.skipped],
    }


def _present(report: SendReport, to: str) -> None:
    if report.failed:
        table("Not sent", ("file", "reason"), [(f.path, f.reason) for f in report.failed])
    if report.warnings:
        rows = [(s.path, f"0x{s.status:04X} {s.comment}".rstrip()) for s in report.warnings]
        table("Stored with a warning", ("file", "answer"), rows)
    stored = len(report.sent) + len(report.warnings)
    line = f"{stored} stored at {to}, {len(report.failed)} not sent"
    if report.skipped:
        named = [f"{path} ({word})" for path, word in report.skipped[:_MAX_SKIPPED_NAMED]]
        more = len(report.skipped) - len(named)
        line += f", {len(report.skipped)} are no DICOM objects: " + ", ".join(named)
        line += f" and {more} more" if more else ""
    console().print(printable(line), markup=False, soft_wrap=True)
