"""`seggate dataset convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.dataset_lock import changing_dataset
from engine.errors import EngineError
from engine.parallel import default_processes
from gateway.commands.output import print_json, progress_bar, say, table
from gateway.errors import Rejected
from gateway.training_data.channels import channels_of_words
from gateway.training_data.contour_masks import BetweenSlices
from gateway.training_data.conversion import (
    ConversionOptions,
    ConversionReport,
    NothingToConvert,
    Prepared,
    check_target,
    prepare,
)
from gateway.training_data.conversion import convert as convert_cases
from gateway.training_data.faults import Fault
from gateway.training_data.label_names import LabelTable, table_of_file, table_of_words
from gateway.training_data.label_painting import Overlap

_MOST_SHOWN = 50


def convert(
    source: Path,
    folder: Path,
    *,
    words: Sequence[str],
    labels: Path | None,
    channels: Sequence[str],
    cases: Path | None,
    nifti: str | None,
    overlap: Overlap,
    between: BetweenSlices,
    ignores_references: bool,
    threshold: float,
    orientation: str,
    skip_faulty: bool,
    identities: Path | None,
    processes: int | None,
    as_json: bool,
) -> int:
    """0 when the dataset is whole (or, with `skip_faulty`, as whole as can be), 1 when not, 2 for options that cannot
    be used."""
    if words and labels is not None:
        say("seggate: give --label, or --labels FILE, not both")
        return 2
    name = folder.resolve().name
    try:
        options = ConversionOptions(
            source=source,
            folder=folder,
            identities=identities or folder.resolve().parent / f"{name}.identities.json",
            channels=channels_of_words(channels),
            table=_table(words, labels),
            cases=cases,
            nifti=nifti,
            overlap=overlap,
            between=between,
            ignores_references=ignores_references,
            threshold=threshold,
            orientation=orientation,
            skip_faulty=skip_faulty,
        )
        check_target(options)
    except Rejected as error:
        return _failed(error, (), 2, as_json=as_json)
    workers = processes or default_processes()
    try:
        # From the first look at what was converted before: names of cases come from there.
        with changing_dataset(folder):
            with progress_bar("looking through the source", hidden=as_json) as advance:
                prepared = prepare(options, processes=workers, progress=advance)
            with progress_bar("converting cases", hidden=as_json) as advance:
                report = convert_cases(prepared, processes=workers, progress=advance)
    except NothingToConvert as error:
        return _failed(error, error.faults, 1, as_json=as_json)
    except (Rejected, EngineError, OSError) as error:
        return _failed(error, (), 1, as_json=as_json)
    if as_json:
        print_json(_document(prepared, report))
    else:
        _present(prepared, report)
    return 0 if report.document is not None else 1


def _table(words: Sequence[str], labels: Path | None) -> LabelTable | None:
    if labels is not None:
        return table_of_file(labels)
    return table_of_words(words) if words else None


def _failed(error: Exception, faults: tuple[Fault, ...], code: int, *, as_json: bool) -> int:
    if as_json:
        print_json({"ok": False, "error": str(error), "faults": [vars(fault) for fault in faults]})
    elif faults:
        _present_faults(faults)
    say(f"seggate: not converted: {error}")
    return code


def _document(prepared: Prepared, report: ConversionReport) -> dict[str, Any]:
    written = report.document is not None
    return {
        "ok": written,
        "dataset": str(prepared.options.folder),
        "dataset_json_written": written,
        "identities": str(prepared.options.identities),
        "cases": list(report.cases),
        "made": report.made,
        "channels": [channel.name for channel in prepared.channels],
        "labels": prepared.table.document,
        "faults": [vars(fault) for fault in report.faults],
        "notes": [{"about": about, "note": note} for about, note in report.notes],
        "passed_over": dict(prepared.source.passed_over),
    }


def _present(prepared: Prepared, report: ConversionReport) -> None:
    options, written = prepared.options, report.document is not None
    if report.faults:
        _present_faults(report.faults)
    _present_notes(report.notes)
    passed = ", ".join(f"{count} x {kind}" for kind, count in prepared.source.passed_over.items())
    if passed:
        say(f"passed over: {passed}")
    names = ", ".join(f"{value} {name}" for name, value in prepared.table.document.items())
    say(f"labels: {names}; channels: {', '.join(channel.name for channel in prepared.channels)}")
    say(f"{len(report.cases)} cases, {report.made} of them made now, {len(report.faults)} errors")
    say(f"private, keep apart: {options.identities}")
    if written:
        say(f"dataset: {options.folder}; next: seggate dataset check {options.folder}")
    else:
        say(
            "seggate: dataset.json is not written while there are errors; correct them and start again (what is made "
            "stays), or finish without these cases: --skip-faulty"
        )


def _present_faults(faults: Sequence[Fault]) -> None:
    table("", ("case", "file or series", "what is wrong"), [(f.case, f.file, f.cause) for f in faults[:_MOST_SHOWN]])
    if len(faults) > _MOST_SHOWN:
        say(f"and {len(faults) - _MOST_SHOWN} more errors; --json lists all")


def _present_notes(notes: Sequence[tuple[str, str]]) -> None:
    """Notes of the same words once, with how many they are about."""
    about: dict[str, list[str]] = {}
    for subject, note in notes:
        about.setdefault(note, []).append(subject)
    for note, subjects in list(about.items())[:_MOST_SHOWN]:
        more = f" and {len(subjects) - 3} more" if len(subjects) > 3 else ""
        say(f"note: {', '.join(subjects[:3])}{more}: {note}")
    if len(about) > _MOST_SHOWN:
        say(f"and {len(about) - _MOST_SHOWN} more notes; --json lists all")
