"""What readers say of results (ART-26): approved, corrected, rejected, or looked at without a word.

    approved    the result's own labels are right
    corrected   other labels are right; they lie in the spool beside the result's
    rejected    the images have no usable labels; nothing is learnt from them
    opened      somebody opened the result and said nothing: it is not taken for approval

Each is a row and an event in the study's ledger. A later one counts instead of an earlier one, whose row stays; opening
a result again takes nothing back.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.metrics import measure_case
from engine.volume import LabelMap
from gateway.errors import Rejected
from gateway.learning.corrected_labels import CorrectedLabels
from gateway.results.inference import load_labels, packed_labels, read_labels
from storage import ledger
from storage.database import Database
from storage.learning_records import Correction
from storage.records import Result, ResultState, Study, utc_now
from storage.spool import Spool

Kind = Literal["approved", "corrected", "rejected", "opened"]
USABLE = frozenset({"approved", "corrected"})
"""Kinds that say which labels are right."""
_MOST_BY, _DECIMALS = 128, 6


def record_correction(
    database: Database,
    spool: Spool,
    result_id: str,
    *,
    kind: Kind,
    by: str,
    reason: str | None = None,
    labels: CorrectedLabels | None = None,
    seconds: int | None = None,
) -> Correction:
    """Keeps what `by` said of a result; `labels` belong to `corrected` and to nothing else, `seconds` is how long it
    took. Neither `reason` nor `by` may say anything of the patient.

    Raises Rejected for a result that is not one to judge (none yet, superseded, other grid), and for a correction that
    changes nothing; ObjectMissing and
    ObjectChanged when its own labels are not what they were, SpoolFull, SpoolUnsafe. Done twice it is there twice, and
    means the same.
    """
    if (kind == "corrected") != (labels is not None):
        raise ValueError(f"{kind}: labels belong to a correction, and a correction has them")
    with database.reading() as session:
        result = session.get_one(Result, result_id)
        _check_judgeable(result)
        key = session.get_one(Study, result.study_instance_uid).study_key
    stored: tuple[str, str] | None = None
    dice: dict[str, float | None] | None = None
    if labels is not None:
        predicted = load_labels(spool, result)
        dice = _dice(predicted, labels, result_id)
        # Handed back as it was: read and right, or never read. Only a person knows.
        if np.array_equal(predicted, labels.array):
            raise Rejected(f"result {result_id}: the labels are its own, unchanged; approve it if they are right")
        packed = packed_labels(LabelMap(array=labels.array, geometry=labels.geometry))
        name = f"correction-{hashlib.sha256(packed).hexdigest()[:16]}.npz"
        stored = spool.store_result_file(key, result_id, name, packed)
    elif kind == "approved":
        dice = {str(m["name"]): 1.0 if m["voxels"] else None for m in result.measurements or []}
    with database.session() as session:
        result = session.get_one(Result, result_id)
        _check_judgeable(result)  # a newer version of the study may have come meanwhile
        before = correction_of(session, result_id)
        row = Correction(
            result_id=result_id,
            model_name=result.model_name,
            kind=kind,
            by=by[:_MOST_BY],
            reason=reason,
            recorded_at=utc_now(),
            labels_path=None if stored is None else stored[0],
            labels_digest=None if stored is None else stored[1],
            dice=dice,
            seconds=seconds,
        )
        session.add(row)
        session.flush()
        ledger.append(
            session,
            subject=ledger.study_subject(result.study_instance_uid),
            kind=kind,
            actor=f"user:{by}"[:_MOST_BY],
            detail={
                "result_id": result_id,
                "model": f"{result.model_name} {result.model_version}",
                "correction": row.correction_id,
                "replaces": None if before is None or kind == "opened" else before.correction_id,
                "reason": reason,
                "labels_sha256": row.labels_digest,
                "dice": dice,
            },
        )
        return row


def correction_of(session: Session, result_id: str) -> Correction | None:
    """What counts of all that was said of a result; None where nobody has opened it."""
    rows = session.scalars(
        select(Correction).where(Correction.result_id == result_id).order_by(Correction.correction_id)
    ).all()
    return counting(rows).get(result_id)


def corrections_of_model(session: Session, model_name: str | None = None) -> dict[str, Correction]:
    """What counts of all that was said, by result, in the order in which it was said; of one model or of all."""
    query = select(Correction).order_by(Correction.correction_id)
    if model_name is not None:
        query = query.where(Correction.model_name == model_name)
    found = counting(session.scalars(query).all())
    return dict(sorted(found.items(), key=lambda item: item[1].correction_id))


def counting(rows: Iterable[Correction]) -> dict[str, Correction]:
    """By result the last row that says something, else the last that it was opened; `rows` in their order."""
    found: dict[str, Correction] = {}
    for row in rows:
        before = found.get(row.result_id)
        if row.kind != "opened" or before is None or before.kind == "opened":
            found[row.result_id] = row
    return found


def right_labels(spool: Spool, result: Result, correction: Correction) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The label array (Z, Y, X) that is right for the result's series, in the order of its slices.

    Raises Rejected where nobody said which is; ObjectMissing, ObjectChanged.
    """
    if correction.kind == "approved":
        return load_labels(spool, result)
    if correction.labels_path is None or correction.labels_digest is None:
        raise Rejected(f"result {result.result_id} is {correction.kind}: nobody said which labels are right")
    return read_labels(spool, correction.labels_path, correction.labels_digest)


def mean_dice(dice: Mapping[str, Any] | None) -> float | None:
    """Of the labels that are on either side; None where none is, or nothing was compared."""
    known = [float(value) for value in (dice or {}).values() if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


def _check_judgeable(result: Result) -> None:
    if result.state == ResultState.SUPERSEDED:
        raise Rejected(f"result {result.result_id} was superseded: {result.state_reason or 'a newer one replaced it'}")
    if result.state not in (ResultState.RELEASED, ResultState.HELD) or result.runtime is None:
        raise Rejected(
            f"result {result.result_id} is {result.state}; only one that was released or held by QA can be judged"
        )


def _dice(predicted: NDArray[Any], right: CorrectedLabels, result_id: str) -> dict[str, float | None]:
    """Of the result against the right labels, by label name; None where neither has the label."""
    if predicted.shape != right.array.shape:
        raise Rejected(
            f"result {result_id} has the shape {predicted.shape} (z, y, x), the corrected labels {right.array.shape}"
        )
    foreground = right.labels.foreground
    found = measure_case(
        right.array,
        predicted,
        right.geometry.spacing_mm,
        [label.region for label in foreground],
        ignore_label=right.labels.ignore_label,
        surfaces=False,
    )
    values = {label.name: found[label.region].dice for label in foreground}
    return {name: None if value is None else round(value, _DECIMALS) for name, value in values.items()}
