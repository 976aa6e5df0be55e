"""Superseding (CMP-17): what a newer version of a study makes of the results of the older ones.

A result replaces those of the same series and model, whatever part of the series they were made from: which parts a
series falls into may change with what arrives late. A newer version that gives no result replaces them as well, by
nothing: what was said about the older images does not hold for the newer ones, and a person is told.
Each function works in the caller's transaction and does nothing to what is superseded already.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.records import Delivery, DeliveryState, Result, ResultState, StudyVersion, utc_now

ALARM_HELD = "result-held"
ALARM_WITHOUT_REPLACEMENT = "result-superseded-without-replacement"


def predecessor(session: Session, version: StudyVersion, result: Result, parts: Collection[str]) -> str | None:
    """The result that the new one refers to as its older version: one that was released, never one that was held.

    The newest of the same part; else, among the newest version's, the only one whose part the series no longer has.
    `parts`: all parts that the series now has for this model. None where there is no such result or several.
    """
    # Superseded by a version that was held or gave nothing, it still is what the destinations have.
    left = select(Delivery.delivery_id).where(Delivery.result_id == Result.result_id)
    was_released = (Result.state == ResultState.RELEASED) | (
        (Result.state == ResultState.SUPERSEDED) & Result.verdict.in_(["pass", "review"]) & exists(left)
    )
    found = session.execute(
        select(Result.result_id, Result.part, StudyVersion.number)
        .join(StudyVersion, StudyVersion.version_id == Result.version_id)
        .where(
            Result.study_instance_uid == version.study_instance_uid,
            Result.series_instance_uid == result.series_instance_uid,
            Result.model_name == result.model_name,
            StudyVersion.number < version.number,
            was_released,
        )
        .order_by(StudyVersion.number.desc(), Result.created_at.desc(), Result.result_id)
    ).all()
    same = next((row.result_id for row in found if row.part == result.part), None)
    if same is not None:
        return str(same)
    plausible = [row.result_id for row in found if row.number == found[0].number and row.part not in parts]
    return str(plausible[0]) if len(plausible) == 1 else None


def replaced_by(session: Session, result: Result) -> None:
    """The older results that a released one stands for are superseded."""
    for old in _older_of(session, result):
        _supersede(session, old, f"replaced by result {result.result_id}", by=result.result_id)


def replaced_by_none(session: Session, result: Result) -> None:
    """The newer version ran no model, or its result is held: the older results go without a replacement."""
    _without_replacement(session, _older_of(session, result), result.state_reason or str(result.state))


def no_longer_wanted(session: Session, version: StudyVersion) -> None:
    """Older results of series and models for which the newer version has no result at all: no rule wants them."""
    mine = session.execute(
        select(Result.series_instance_uid, Result.model_name).where(Result.version_id == version.version_id)
    )
    wanted = {(series, model) for series, model in mine}
    gone = [r for r in _older(session, version) if (r.series_instance_uid, r.model_name) not in wanted]
    _without_replacement(session, gone, "no rule sends the series to the model")


def withdrawn(session: Session, old: Result, reason: str, *, by: str | None) -> None:
    """A result that was never released goes with the version of the model that made it; `by` stands instead of it."""
    if old.finished_at is None:
        old.finished_at = utc_now()
    _supersede(session, old, reason, by=by, unsent=(DeliveryState.QUEUED, DeliveryState.PARKED))


def clear_if_none_is_held(session: Session, study_instance_uid: str, *, by: str) -> None:
    """The alarm `result-held` goes with the last held result of the study, whatever became of it."""
    session.flush()
    held = select(Result.result_id).where(
        Result.study_instance_uid == study_instance_uid, Result.state == ResultState.HELD
    )
    if session.scalars(held.limit(1)).first() is None:
        clear_alarms(session, kind=ALARM_HELD, subject=ledger.study_subject(study_instance_uid), by=by)


def _older(session: Session, version: StudyVersion) -> Sequence[Result]:
    return session.scalars(
        select(Result)
        .join(StudyVersion, StudyVersion.version_id == Result.version_id)
        .where(
            Result.study_instance_uid == version.study_instance_uid,
            StudyVersion.number < version.number,
            Result.state.in_([ResultState.RELEASED, ResultState.HELD]),
        )
        .order_by(StudyVersion.number, Result.result_id)
    ).all()


def _older_of(session: Session, result: Result) -> list[Result]:
    """Of the same series and model. A part that the newer version has a result of its own for is left to that one."""
    version = session.get_one(StudyVersion, result.version_id)
    same_work = (Result.series_instance_uid == result.series_instance_uid, Result.model_name == result.model_name)
    parts = set(session.scalars(select(Result.part).where(Result.version_id == result.version_id, *same_work)))
    return [
        old
        for old in _older(session, version)
        if (old.series_instance_uid, old.model_name) == (result.series_instance_uid, result.model_name)
        and (old.part == result.part or old.part not in parts)
    ]


def _without_replacement(session: Session, older: Sequence[Result], reason: str) -> None:
    words = f"a newer version of the study gave no result: {reason}"
    # A result that was held has never been seen by anyone: nothing to warn of.
    shown = [old for old in older if old.state == ResultState.RELEASED]
    for old in older:
        _supersede(session, old, words, by=None)
    if shown:
        models = ", ".join(sorted({f"{old.model_name} {old.model_version}" for old in shown}))
        raise_alarm(
            session,
            kind=ALARM_WITHOUT_REPLACEMENT,
            subject=ledger.study_subject(shown[0].study_instance_uid),
            message=f"{models}: {words}; what was sent before does not stand for the newer images",
        )


def _supersede(
    session: Session,
    old: Result,
    reason: str,
    *,
    by: str | None,
    unsent: Collection[DeliveryState] = (DeliveryState.QUEUED,),
) -> None:
    """What of the old result is still waiting to be sent is withheld."""
    was_held = old.state == ResultState.HELD
    old.state, old.state_reason = ResultState.SUPERSEDED, reason
    waiting = session.scalars(
        select(Delivery).where(Delivery.result_id == old.result_id, Delivery.state.in_(unsent))
    ).all()
    for delivery in waiting:
        delivery.state, delivery.state_reason = DeliveryState.WITHHELD, reason
        delivery.next_attempt_at, delivery.updated_at = None, utc_now()
    ledger.append(
        session,
        subject=ledger.study_subject(old.study_instance_uid),
        kind="superseded",
        actor="worker",
        detail={
            "result_id": old.result_id,
            "by": by,
            "reason": reason,
            "withheld": [delivery.destination for delivery in waiting],
        },
    )
    if was_held:
        clear_if_none_is_held(session, old.study_instance_uid, by="worker")
