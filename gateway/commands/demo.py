"""`seggate demo`: the whole path on this machine, and what happened, asked from the other side."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from rich.progress import Progress

from gateway.commands.output import console, local, print_json, say, table
from gateway.demo.stage import Pacs, Stage, StageFailed
from gateway.demo.story import Outcome, follow, send, set_the_stage


def demo(*, study: Path | None, keep: bool, state: Path, pacs: Pacs | None, timeout_s: float, as_json: bool) -> int:
    """0 when every released result was found at the PACS and the EMR; 1 otherwise, with the reason."""
    stage = Stage(state.resolve(), pacs)
    if study is not None and study.resolve().is_relative_to(stage.folder):
        say(f"seggate: {study} lies in {stage.folder}, which is emptied at start; give another with --state")
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    for name in [n for n in os.environ if n.startswith("SEGGATE_")]:
        # Settings of a real gateway on this machine must not reach the demo.
        del os.environ[name]
    try:
        source, studies = set_the_stage(stage, study, _routes(), say)
        say("sending by C-STORE")
        with Progress(transient=True, disable=as_json) as bar:
            task = bar.add_task("sending", total=None)
            sent, failed = send(stage, source, lambda done, total: bar.update(task, completed=done, total=total))
        say(f"sent {sent} objects")
        for path, reason in failed:
            say(f"not sent: {path}: {reason}")
        outcomes = [follow(stage, uid, timeout_s=timeout_s, tell=say) for uid in studies]
        _present(outcomes, stage, as_json=as_json)
        if keep:
            say("everything keeps running; Ctrl-C ends it")
            signal.pause()
        return 0 if any(o.verified for o in outcomes) else 1
    except StageFailed as error:
        say(f"seggate: {error}")
        return 1
    except KeyboardInterrupt:
        return 0 if keep else 1
    finally:
        stage.stop()


def _present(outcomes: list[Outcome], stage: Stage, *, as_json: bool) -> None:
    if as_json:
        summaries = [o.summary(str(stage.pacs)) for o in outcomes]
        first = next((s for s in summaries if s["verified"]), summaries[0])
        others = [s for s in summaries if s is not first]
        print_json({**first, **({"other_studies": others} if others else {})})
        return
    for outcome in outcomes:
        _print(outcome, stage)


def _print(outcome: Outcome, stage: Stage) -> None:
    out = console()
    document = outcome.document
    table(
        f"\nStudy {outcome.study_uid}",
        ("time", "event", "what"),
        [(local(e["at"]), e["kind"], _what(e["detail"])) for e in document["events"]],
    )
    for result in document["results"]:
        if result["measurements"]:
            table(
                f"\n{result['model_name']} {result['model_version']}: verdict {result['verdict']}",
                ("segment", "volume (ml)", "voxels", "confidence"),
                [(m["name"], f"{m['volume_ml']:.2f}", m["voxels"], m["confidence"]) for m in result["measurements"]],
            )
        elif result["state_reason"]:
            out.print(f"\n{result['model_name']}: {result['state']}: {result['state_reason']}", markup=False)
    table(
        "\nFound in the PACS (asked by C-FIND)",
        ("modality", "SOP Instance UID"),
        [(o["modality"], o["sop_instance_uid"]) for o in outcome.in_pacs],
    )
    table("\nFound in the EMR (asked by FHIR search)", ("report",), [(r,) for r in outcome.reports])
    if outcome.state == "unmatched":
        for version in document["routing"]:
            out.print(version["text"], markup=False)
    out.print(
        f"\nstate {outcome.state}{': ' + document['reason'] if document['reason'] else ''}, "
        f"{outcome.seconds:.1f} s after the last object; "
        f"{'verified' if outcome.verified else 'not verified'}",
        markup=False,
    )
    if outcome.overlay:
        out.print(f"picture   {outcome.overlay}", markup=False)
    out.print(f"all of it {stage.folder} (spool and database in state/, logs in logs/)", markup=False)


def _what(detail: dict[str, object]) -> str:
    """The few words of an event that a first look needs."""
    words = []
    for key in ("objects", "rule", "outcome", "results", "volumes_ml", "verdict", "destination", "report_id", "reason"):
        value = detail.get(key)
        if value in (None, [], {}, ""):
            continue
        if isinstance(value, list):
            value = len(value)
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
        words.append(f"{key.removesuffix('_ml')}: {value}")
    return "; ".join(words)


def _routes() -> Path:
    """The routes file of a checkout, or the copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "config" / "routes.toml"
    return beside if beside.is_file() else package / "default_config" / "routes.toml"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
