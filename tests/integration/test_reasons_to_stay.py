"""gateway.deletion.reasons_to_stay: each reason keeps the study that it is about, and no other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from gateway.deletion.legal_hold import hold_study
from gateway.deletion.reasons_to_stay import Judged, judge_studies
from gateway.settings import RetentionSettings
from storage import ledger
from storage.alarms import raise_alarm
from storage.database import Database
from storage.learning_records import Correction, LearningRun, ReviewTask, RunState, ServingPeriod, ShadowRun
from storage.records import (
    Delivery,
    DeliveryState,
    Instance,
    InstanceState,
    Result,
    ResultState,
    Study,
    StudyState,
    utc_now,
)
from storage.spool import Spool
from tests.support.canary_rows import add_canary
from tests.support.finished_study import UID, add_finished

OTHER = "1.2.3.5"
Change = Callable[[Session, str], object]


@pytest.fixture
def result_id(database: Database, tmp_path: Path) -> str:
    spool = Spool(tmp_path / "spool", reserve_bytes=0)
    spool.prepare()
    add_finished(database, spool, OTHER, days_ago=20)
    return add_finished(database, spool, UID, days_ago=10)


def judged(database: Database, **how: Any) -> dict[str, Judged]:
    policy = RetentionSettings(**{k: how.pop(k) for k in list(how) if k in RetentionSettings.model_fields})
    with database.reading() as session:
        found = judge_studies(session, policy, now=utc_now(), late_window_s=86400, **how)
    assert [study.done_at for study in found] == sorted(study.done_at for study in found)
    return {study.study_instance_uid: study for study in found}


def _study(**values: Any) -> Change:
    return lambda s, _: s.execute(update(Study).where(Study.study_instance_uid == UID).values(**values))


def _result(**values: Any) -> Change:
    return lambda s, r: s.execute(update(Result).where(Result.result_id == r).values(**values))


def _delivery(**values: Any) -> Change:
    return lambda s, r: s.execute(update(Delivery).where(Delivery.result_id == r).values(**values))


def _instance(state: InstanceState) -> Change:
    def change(session: Session, _: str) -> None:
        query = select(Instance).where(Instance.study_instance_uid == UID).limit(1)
        session.scalars(query).one().state = state

    return change


def _correction(kind: str, learnt_by: str | None = None) -> Change:
    return lambda s, r: s.add(
        Correction(result_id=r, model_name="tiny", kind=kind, by="x", recorded_at=utc_now(), learnt_by=learnt_by)
    )


def _run(state: RunState) -> Change:
    now = utc_now()
    return lambda s, r: s.add(
        LearningRun(
            run_id="run1",
            model_name="tiny",
            kind="fine-tuning",
            base_version="1.0.0",
            requested_by="x",
            reason="r",
            state=state,
            cases=[{"result_id": r}],
            requested_at=now,
            updated_at=now,
            workflow_id="learn-run1",
        )
    )


def _task(closed: bool = False) -> Change:
    now = utc_now()
    return lambda s, r: s.add(
        ReviewTask(
            kind="drift",
            model_name="tiny",
            model_version="1.0.0",
            subject="model:tiny",
            summary="s",
            result_ids=[r],
            opened_at=now,
            closed_at=now if closed else None,
        )
    )


def _period(**values: Any) -> Change:
    return lambda s, _: s.add(
        ServingPeriod(
            model_name="tiny",
            model_version="1.0.0",
            weights_digest="w",
            began_at=utc_now() - timedelta(days=15),
            began_by="x",
            **values,
        )
    )


def _alarm(session: Session, _: str) -> None:
    raise_alarm(session, kind="late-objects", subject=ledger.study_subject(UID), message="m")


def _shadow(session: Session, result_id: str) -> None:
    session.execute(update(ShadowRun).where(ShadowRun.result_id == result_id).values(state="pending"))


REASONS = {
    "legal-hold": lambda s, _: hold_study(s, UID, by="ann", reason="case 7"),
    "state": _study(state=StudyState.HELD),
    "deleting": _study(state=StudyState.DELETING),
    "unmatched": _study(state=StudyState.UNMATCHED),
    "late-window": _study(last_received_at=utc_now()),
    "undelivered": _delivery(state=DeliveryState.PARKED),
    "not-verified": _delivery(state=DeliveryState.STORED),
    "not-finished": _result(state=ResultState.PENDING),
    "aside": _instance(InstanceState.QUARANTINED),
    "review-task": _task(),
    "alarm": _alarm,
    "unreviewed": _result(verdict="review"),
    "labelled": _correction("approved"),
    "learnt-from": _correction("corrected", learnt_by="run1"),
    "chosen-to-learn": _run(RunState.TRAINING),
    "on-trial": _shadow,
}


def test_a_study_that_is_done_with_has_none_and_says_since_when_and_how_large(
    database: Database, result_id: str
) -> None:
    found = judged(database)
    assert [study.reasons for study in found.values()] == [(), ()]
    assert list(found) == [OTHER, UID]
    assert (found[UID].size_bytes, found[UID].state) == (3 * 1000 + 500, "verified")
    assert timedelta(days=9) < utc_now() - found[UID].done_at < timedelta(days=11)


@pytest.mark.requirement("OPS-57")
@pytest.mark.parametrize("kind", REASONS)
def test_it_stays_for(database: Database, result_id: str, kind: str) -> None:
    with database.session() as session:
        REASONS[kind](session, result_id)
    found = judged(database)
    assert found[UID].kinds == {kind}
    assert found[OTHER].kinds == frozenset()
    assert judged(database, only=UID)[UID].kinds == {kind}
    assert judged(database, only=OTHER)[OTHER].kinds == frozenset()


@pytest.mark.requirement("OPS-57")
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param("undelivered", _delivery(state=DeliveryState.STORED, next_attempt_at=utc_now()), id="looked up"),
        pytest.param("undelivered", _delivery(state=DeliveryState.SENT), id="sent"),
        pytest.param("aside", _instance(InstanceState.CONFLICT), id="conflict"),
        pytest.param("chosen-to-learn", _run(RunState.CANDIDATE), id="candidate"),
        pytest.param("chosen-to-learn", _run(RunState.FAILED), id="a run that can be tried again"),
        pytest.param("on-trial", _period(previous_version="0.9.0"), id="watched"),
    ],
)
def test_it_stays_for_this_too(database: Database, result_id: str, kind: str, change: Change) -> None:
    with database.session() as session:
        change(session, result_id)
    assert kind in judged(database)[UID].kinds


@pytest.mark.requirement("OPS-57")
@pytest.mark.parametrize(
    ("change", "policy"),
    [
        pytest.param(_delivery(state=DeliveryState.WITHHELD), {}, id="withheld on purpose"),
        pytest.param(_delivery(state=DeliveryState.STORED), {"stored_is_enough": True}, id="stored is enough"),
        pytest.param(_study(state=StudyState.UNMATCHED), {"unmatched_days": 3}, id="unmatched may go"),
        pytest.param(_result(verdict="review"), {"keep_unreviewed": False}, id="unreviewed may go"),
        pytest.param(_correction("rejected"), {}, id="rejected by a reader"),
        pytest.param(_correction("approved", learnt_by="run1"), {"keep_labelled": False}, id="learnt from may go"),
        pytest.param(_task(closed=True), {}, id="the task is closed"),
        pytest.param(_run(RunState.PROMOTED), {}, id="the training is over"),
        pytest.param(_period(previous_version="0.9.0", watched_until=utc_now()), {}, id="the watch is over"),
        pytest.param(_instance(InstanceState.REPLACED), {}, id="replaced by policy"),
    ],
)
def test_it_need_not_stay_where(database: Database, result_id: str, change: Change, policy: dict[str, Any]) -> None:
    with database.session() as session:
        change(session, result_id)
    assert judged(database, **policy)[UID].reasons == ()


def test_labels_that_nothing_has_learnt_from_stay_whatever_the_policy(database: Database, result_id: str) -> None:
    with database.session() as session:
        _correction("corrected")(session, result_id)
    assert judged(database, keep_labelled=False)[UID].kinds == {"labelled"}


def test_a_reader_who_said_something_has_reviewed_it(database: Database, result_id: str) -> None:
    with database.session() as session:
        _result(verdict="review")(session, result_id)
        _correction("opened")(session, result_id)
    assert judged(database)[UID].kinds == {"unreviewed"}
    with database.session() as session:
        _correction("rejected")(session, result_id)
    assert judged(database)[UID].kinds == frozenset()


def test_what_a_version_in_shadow_was_tried_on_stays_until_it_is_decided(database: Database, result_id: str) -> None:
    assert judged(database, in_shadow={("tiny", "1.1.0")})[UID].kinds == {"on-trial"}
    assert judged(database, in_shadow={("tiny", "1.2.0")})[UID].kinds == frozenset()


def test_canaries_are_left_to_their_own_removal(database: Database, result_id: str) -> None:
    with database.session() as session:
        add_canary(session, ResultState.RELEASED)
    assert set(judged(database)) == {UID, OTHER}
    assert "canary" in judged(database, only="2.25.42")["2.25.42"].kinds
