"""`seggate learn`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.commands.output import local, print_json, say, table
from gateway.learning.case_choice import CaseChoice, choose_cases
from gateway.settings import load_settings
from gateway.state import existing_database
from storage.records import utc_now

_WHY = {"uncertain": "unsure", "corrected": "was corrected", "random": "by chance, for monitoring"}
_LEFT_OUT = {
    "canary": "synthetic studies of the canary",
    "failed-hard-check": "failed a hard check of QA",
    "learnt": "learnt from already",
    "opened-and-unread": "opened, and nothing was said",
    "other-labels": "have other labels than the version that serves",
    "quarantined": "quarantined",
    "rejected": "rejected by a reader",
    "unfit": "cannot be made a case, as a training found (`seggate learn show`)",
}


def cases(config: Path, model: str, *, as_json: bool) -> int:
    """0, also when more labels are needed; 1 when no study of the model was recorded."""
    settings = load_settings(config)
    with existing_database(settings).reading() as session:
        choice = choose_cases(session, settings.learning.of(model), now=utc_now(), canary=settings.gateway.canary)
    if as_json:
        print_json(_document(choice))
    elif choice.model_version is None:
        say(f"seggate: {model[:80]}: {choice.sentence}")
    else:
        _present(choice)
    return 0 if choice.model_version is not None else 1


def _present(choice: CaseChoice) -> None:
    rows = [
        (
            case.result_id,
            _WHY[case.why],
            "" if case.confidence is None else f"{case.confidence:.3f}",
            case.reading or "waits for a reader",
            case.verdict,
            case.scanner,
            local(case.recorded_at),
        )
        for case in choice.cases
    ]
    columns = ("result", "chosen", "confidence", "labels", "QA", "scanner", "recorded")
    table(f"{choice.model_name} {choice.model_version}", columns, rows, whole=("result",))
    for reason, count in choice.left_out.items():
        say(f"left out: {count} {_LEFT_OUT[reason]}")
    say(choice.sentence)


def _document(choice: CaseChoice) -> dict[str, Any]:
    return {
        "model": choice.model_name,
        "version": choice.model_version,
        "ready": choice.ready,
        "labelled": choice.labelled,
        "least": choice.least,
        "waiting": len(choice.waiting),
        "candidates": choice.candidates,
        "left_out": dict(choice.left_out),
        "read": choice.read,
        "corrected": choice.corrected,
        "corrected_share": choice.corrected_share,
        "corrections_queued": choice.corrections_queued,
        "live_dice": choice.live_dice,
        "live_cases": choice.live_cases,
        "sentence": choice.sentence,
        "cases": [asdict(case) for case in choice.cases],
    }
