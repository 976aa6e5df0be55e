"""`seggate corrections`."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import load_bundle
from engine.errors import EngineError
from gateway.commands.output import local, print_json, progress_bar, say, table
from gateway.errors import Rejected
from gateway.learning.annotation_export import ExportedCases, export_for_annotation
from gateway.learning.case_choice import choose_cases
from gateway.learning.corrected_labels import CorrectedLabels, Missing, read_corrected_labels
from gateway.learning.corrections import Kind, corrections_of_model, mean_dice, record_correction
from gateway.learning.result_source import result_source
from gateway.results.inference import load_labels
from gateway.settings import Settings, load_settings
from gateway.state import existing_database, open_registry, open_spool
from storage.database import Database
from storage.learning_records import Correction
from storage.records import Result, ResultState, Study, utc_now
from storage.spool import Spool

_ABLE = (ResultState.RELEASED, ResultState.HELD)
_NIFTI = (".nii", ".nii.gz")
_MOST = 20
_WORDS = {"approved": "approved", "corrected": "corrected", "rejected": "rejected", "opened": "noted as opened"}


def add(
    config: Path,
    words: str,
    *,
    kind: str,
    file: Path | None,
    is_nifti: bool,
    missing: Missing,
    by: str | None,
    reason: str | None,
    seconds: int | None,
    as_json: bool,
) -> int:
    """0 when it was kept; 1 where the result cannot be judged or the labels are not its own, with what differs."""
    settings = load_settings(config)
    database, spool = existing_database(settings), open_spool(settings)
    with database.reading() as session:
        result = _find(session, words)
    if result is None:
        return 1
    try:
        labels = None if file is None else _labels(settings, database, spool, result, file, is_nifti, missing)
        row = record_correction(
            database,
            spool,
            result.result_id,
            kind=cast(Kind, kind),
            by=by or getpass.getuser(),
            reason=reason,
            labels=labels,
            seconds=seconds,
        )
    except (Rejected, EngineError) as error:
        say(f"seggate: {error}")
        return 1
    if as_json:
        print_json(_document(row))
        return 0
    mean = mean_dice(row.dice)
    found = "" if mean is None or kind != "corrected" else f"; its Dice against these labels is {mean:.3f}"
    say(f"result {row.result_id} is {_WORDS[kind]} by {row.by}{found}")
    if kind == "corrected":
        rows = [(name, "" if dice is None else f"{dice:.4f}") for name, dice in (row.dice or {}).items()]
        table("", ("label", "Dice"), rows)
    return 0


def list_(config: Path, model: str | None, *, as_json: bool) -> int:
    """In the order in which it was said."""
    database = existing_database(load_settings(config))
    with database.reading() as session:
        found = list(corrections_of_model(session, model).values())
    if as_json:
        print_json([_document(row) for row in found])
    elif not found:
        say("no result was read yet")
    else:
        rows = [
            (
                row.result_id,
                row.model_name,
                row.kind,
                row.by,
                local(row.recorded_at),
                "" if (mean := mean_dice(row.dice)) is None else f"{mean:.3f}",
                row.learnt_by,
                row.reason,
            )
            for row in found
        ]
        columns = ("result", "model", "kind", "by", "at", "Dice", "learnt by", "reason")
        table("", columns, rows, whole=("result",))
    return 0


def export(config: Path, folder: Path, *, model: str | None, as_json: bool) -> int:
    """0 when everything that waits is there; 1 where a case could not be written, or there is no model to ask for."""
    settings = load_settings(config)
    database, spool = existing_database(settings), open_spool(settings)
    names = [model] if model is not None else [entry.name for entry in settings.learning.models]
    if not names:
        say("seggate: learning.toml names no model; give --model NAME")
        return 1
    exported: dict[str, ExportedCases] = {}
    for name in names:
        with database.reading() as session:
            choice = choose_cases(session, settings.learning.of(name), now=utc_now(), canary=settings.gateway.canary)
        if choice.model_version is None:
            say(f"seggate: {name[:80]}: {choice.sentence}")
            if model is not None:
                return 1
            continue
        waiting = [case.result_id for case in choice.waiting]
        with progress_bar(name, hidden=as_json) as progress:
            exported[name] = export_for_annotation(database, spool, waiting, folder / name, progress=progress)
    if as_json:
        print_json(
            {
                name: {"written": done.written, "there": done.there, "left_out": done.left_out}
                for name, done in exported.items()
            }
        )
    else:
        for name, done in exported.items():
            say(f"{name}: {len(done.written)} cases written to {done.folder}, {len(done.there)} were there")
            for result_id, why in done.left_out.items():
                say(f"  left out: {result_id}: {why}")
    return int(any(done.left_out for done in exported.values()))


def _labels(
    settings: Settings,
    database: Database,
    spool: Spool,
    result: Result,
    file: Path,
    is_nifti: bool,
    missing: Missing,
) -> CorrectedLabels:
    if is_nifti != file.name.endswith(_NIFTI):
        raise Rejected(f"{file.name}: --nifti takes .nii and .nii.gz, --seg a DICOM file")
    model = open_registry(settings).get(result.model_name, result.model_version)
    source = result_source(database, spool, result.result_id)
    return read_corrected_labels(
        file,
        source.part(),
        load_bundle(model.folder, verify=False).label_manager,
        load_labels(spool, result),
        missing=missing,
        patient_id=source.study.patient_id,
    )


def _find(session: Session, words: str) -> Result | None:
    """The only result that can be judged by its id or by its study's UID, or the beginning of either; says what is
    wrong when it is none or several."""
    exact = session.get(Result, words)
    if exact is not None:
        return exact
    if not words or not all(c in "0123456789abcdef." for c in words):
        say(f"seggate: {words[:80]!r} is neither a result's id nor a study's UID")
        return None
    column = Result.study_instance_uid if "." in words else Result.result_id
    # A whole UID is that study's, also where it begins another one's.
    is_whole = session.get(Study, words) is not None
    found = session.scalars(
        select(Result)
        .where(
            column == words if is_whole else column.startswith(words, autoescape=True),
            Result.state.in_(_ABLE),
        )
        .order_by(Result.created_at, Result.result_id)
        .limit(_MOST + 1)
    ).all()
    if len(found) == 1:
        return found[0]
    if not found:
        say(f"seggate: no result that was released or held begins with {words}, or is of a study that does")
        return None
    say(f"seggate: several results: {words}; give one of them")
    for result in found[:_MOST]:
        say(
            f"  {result.result_id}  {result.model_name} {result.model_version} on series {result.series_instance_uid} "
            f"{result.part}".rstrip()
        )
    return None


def _document(row: Correction) -> dict[str, Any]:
    fields = (
        "correction_id",
        "result_id",
        "model_name",
        "kind",
        "by",
        "reason",
        "recorded_at",
        "labels_digest",
        "dice",
        "seconds",
        "learnt_by",
    )
    return {field: getattr(row, field) for field in fields} | {"mean_dice": mean_dice(row.dice)}
