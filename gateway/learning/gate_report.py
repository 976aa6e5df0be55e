"""What an examination found: as a document for the database and --json, and as a release note for people (Markdown)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.case_figures import CaseFigures
from engine.labels import Label
from engine.locked_cases import LockedCases
from engine.regression_suite import SuiteFigures
from engine.sanity_check import CaseAgreement
from engine.version_comparison import Comparison, Figure
from gateway.learning.verdict import Reason, Verdict
from gateway.learning_settings import Change, ChangePlan
from storage.models import RegisteredModel

FORMAT = 1


@dataclass(kw_only=True)
class Examination:
    """What was found so far. `locked` and after are None where an examination ended before; `labels` are those of the
    version. `look` counts the examinations that measured on these locked cases, this one included; 0 without."""

    model: RegisteredModel
    champion: RegisteredModel | None
    plan: ChangePlan
    change: Change
    requested_by: str
    reasons: list[Reason] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sanity: tuple[CaseAgreement, ...] = ()
    runtime: str = ""
    labels: tuple[Label, ...] = ()
    locked_name: str | None = None
    overlap: tuple[str, ...] = ()
    locked: LockedCases | None = None
    figures: SuiteFigures | None = None
    comparison: Comparison | None = None
    look: int = 0


def report_document(found: Examination, verdict: Verdict) -> dict[str, Any]:
    """The content of GateReport.report: plain values, null for what was not measured."""
    model, champion = found.model, found.champion
    return {
        "format": FORMAT,
        "model": model.name,
        "semver": model.semver,
        "weights_digest": model.weights_digest,
        "configuration_digest": model.configuration_digest,
        "champion": None
        if champion is None
        else {"semver": champion.semver, "weights_digest": champion.weights_digest},
        "change": found.change,
        "requested_by": found.requested_by,
        "verdict": verdict.value,
        "reasons": [asdict(reason) for reason in found.reasons],
        "notes": list(found.notes),
        "runtime": found.runtime,
        "plan": found.plan.model_dump(mode="json"),
        "sanity": [
            {
                "case": case.name,
                "voxels": case.voxels,
                "changed": case.changed,
                "lowest_dice": case.lowest_dice,
                "faults": list(case.faults),
            }
            for case in found.sanity
        ],
        "locked": None if found.locked_name is None else _locked(found),
        "figures": None if found.comparison is None else _figures(found.comparison),
        "cases": [] if found.figures is None else _cases(found.figures, found.labels),
    }


def release_note(report: Mapping[str, Any], *, examined_at: str) -> str:
    """A report as Markdown: verdict, reasons, what changed. `examined_at` as it is to be shown."""
    return "\n".join(_note(report, examined_at)) + "\n"


def figure_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, version, the one that serves, change) of every figure, as texts; none where nothing was measured."""
    figures = report["figures"]
    if figures is None:
        return []
    rows = [_row("mean Dice", figures["dice"])] if figures["dice"] is not None else []
    if figures["old_dice"] is not None and figures["old_dice"] != figures["dice"]:
        rows.append(_row("mean Dice, old test", figures["old_dice"]))
    rows += [_row(f"Dice, {name}", entry["dice"]) for name, entry in figures["labels"].items()]
    rows += [_row(f"HD95 (mm), {name}", entry["hd95_mm"], digits=2) for name, entry in figures["labels"].items()]
    rows += [_row(f"mean Dice, stratum {name}", entry) for name, entry in figures["strata"].items()]
    rows.append(_row("seconds a case", figures["seconds"], digits=2, ratio=True))
    rows.append(_row("MiB at the peak", figures["peak_bytes"], digits=0, ratio=True, unit=2.0**20))
    return rows


def _locked(found: Examination) -> dict[str, Any]:
    cases = found.locked.cases if found.locked is not None else ()
    strata = Counter(case.stratum for case in cases if case.stratum is not None)
    return {
        "dataset": found.locked_name,
        "overlap": list(found.overlap),
        "digest": found.locked.digest if found.locked is not None else None,
        "cases": len(cases) or None,
        "strata": dict(sorted(strata.items())),
        "look": found.look or None,
    }


def _figures(comparison: Comparison) -> dict[str, Any]:
    return {
        "dice": _figure(comparison.dice),
        "old_dice": _figure(comparison.old_dice),
        "backward_transfer": comparison.backward_transfer,
        "labels": {
            name: {"dice": asdict(dice), "hd95_mm": asdict(comparison.label_hd95_mm[name])}
            for name, dice in comparison.label_dice.items()
        },
        "strata": {name: asdict(dice) for name, dice in comparison.stratum_dice.items()},
        "untested": list(comparison.untested),
        "newly_empty": [asdict(empty) for empty in comparison.newly_empty],
        "seconds": asdict(comparison.seconds),
        "runtime_ratio": comparison.seconds.ratio,
        "peak_bytes": asdict(comparison.peak_bytes),
        "memory_ratio": comparison.peak_bytes.ratio,
    }


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)


def _cases(figures: SuiteFigures, labels: Sequence[Label]) -> list[dict[str, Any]]:
    timed = set(figures.timing.cases) if figures.timing is not None else set()
    champions: Sequence[CaseFigures | None] = figures.champion or [None] * len(figures.cases)
    return [
        {
            "case": case.name,
            "stratum": case.stratum,
            "timed": case.name in timed,
            "candidate": _case(own, labels),
            "champion": None if theirs is None else _case(theirs, labels),
        }
        for case, own, theirs in zip(figures.cases, figures.candidate, champions, strict=True)
    ]


def _case(figures: CaseFigures, labels: Sequence[Label]) -> dict[str, Any]:
    return {
        "dice": {label.name: figures.metrics[label.region].dice for label in labels},
        "hd95_mm": {label.name: figures.metrics[label.region].hd95_mm for label in labels},
        "empty": [
            label.name
            for label in labels
            if not figures.metrics[label.region].true_positives + figures.metrics[label.region].false_positives
        ],
        "seconds": round(figures.seconds, 4),
        "peak_bytes": figures.peak_bytes,
    }


def _note(report: Mapping[str, Any], examined_at: str) -> Iterator[str]:
    champion = report["champion"]
    yield f"# {report['model']} {report['semver']}: {report['verdict']}"
    yield ""
    against = "nothing: no other version serves" if champion is None else f"{champion['semver']}, which serves"
    yield f"- compared with {against}"
    yield f"- change: {report['change']}, asked for by {report['requested_by']}, examined {examined_at}"
    yield f"- weights {report['weights_digest'][:16]}, configuration {report['configuration_digest'][:16]}"
    locked = report["locked"]
    if locked is not None and locked["look"] is not None:
        strata = ", ".join(f"{_cell(name)} {count}" for name, count in locked["strata"].items())
        yield (
            f"- {locked['cases']} locked cases of {_cell(locked['dataset'])}{f' ({strata})' if strata else ''}, "
            f"look number {locked['look']}"
        )
    if report["runtime"]:
        yield f"- computed by {report['runtime']}"
    if report["reasons"]:
        yield from ("", "## Why", "")
        yield from (f"- {_cell(reason['text'])}" for reason in report["reasons"])
    if rows := figure_rows(report):
        yield from ("", "## Figures", "", "| | this version | serves | change |", "| --- | --- | --- | --- |")
        yield from (f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    if transfer := (report["figures"] or {}).get("backward_transfer"):
        yield from ("", f"Backward transfer (Dice of the old test, new less old): {transfer:+.4f}")
    if report["sanity"]:
        yield from ("", "## Sanity cases", "", "| case | voxels changed | lowest Dice to the export |")
        yield "| --- | --- | --- |"
        yield from (
            f"| {case['case']} | {case['changed']} of {case['voxels']} | {case['lowest_dice']:.6f} |"
            for case in report["sanity"]
        )
    if report["notes"]:
        yield from ("", "## Notes", "")
        yield from (f"- {_cell(note)}" for note in report["notes"])
    yield from ("", "## Change plan", "", "| | |", "| --- | --- |")
    for key, value in report["plan"].items():
        yield f"| {key} | {', '.join(value) if isinstance(value, list) else value} |"


def _row(
    what: str, figure: Mapping[str, Any], *, digits: int = 4, ratio: bool = False, unit: float = 1.0
) -> tuple[str, str, str, str]:
    own, theirs = figure["candidate"] / unit, figure["champion"]
    if theirs is None:
        return what, f"{own:.{digits}f}", "", ""
    theirs /= unit
    change = (f"{own / theirs:.2f} times" if theirs else "") if ratio else f"{own - theirs:+.{digits}f}"
    return what, f"{own:.{digits}f}", f"{theirs:.{digits}f}", change


def _cell(text: str) -> str:
    """Text of a user in a table of Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
