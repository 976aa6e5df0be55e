"""Trainings of a model: one at a time, waiting for labels or queued, each fold counted, every change in the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from gateway.durable import TRAINING
from gateway.errors import Rejected
from gateway.learning import runs
from gateway.learning.case_choice import CaseChoice, ChosenCase
from gateway.monitoring.review_tasks import open_task, open_tasks
from storage import alarms, ledger
from storage.database import Database
from storage.learning_records import RunState
from storage.records import utc_now
from tests.support.story_rows import NotedQueue


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    database.create_all()
    yield database
    database.close()


def choice(*, labelled: int = 0, waiting: int = 0, drawn: int = 0, least: int = 2) -> CaseChoice:
    def case(number: int, why: Any, reading: str | None) -> ChosenCase:
        return ChosenCase(
            result_id=f"r{number}",
            study_instance_uid=f"1.2.{number}",
            why=why,
            confidence=0.5,
            scanner="",
            recorded_at=utc_now(),
            verdict="pass",
            reading=reading,
        )

    kinds = [("uncertain", "corrected")] * labelled + [("uncertain", None)] * waiting + [("random", "approved")] * drawn
    return CaseChoice(
        model_name="liver",
        model_version="1.0.0",
        cases=tuple(case(number, why, reading) for number, (why, reading) in enumerate(kinds)),
        candidates=len(kinds),
        left_out={},
        read=labelled,
        corrected=labelled,
        least=least,
        queued_from=0.3,
        live_dice=None,
        live_cases=0,
    )


def ask(session: Session, queue: NotedQueue, chosen: CaseChoice, *, kind: runs.Kind = "fine-tuning") -> Any:
    return runs.request_run(
        session, queue, chosen, kind=kind, base_version="1.0.0", requested_by="policy", reason="drift of noise"
    )


def kinds(session: Session) -> list[str]:
    return [event.kind for event in ledger.events(session, ledger.model_subject("liver"))]


def test_with_enough_labels_it_is_queued_with_the_cases_that_have_them(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        run = ask(session, queue, choice(labelled=2, waiting=3, drawn=1))
        assert run.state == RunState.QUEUED
        assert [case["result_id"] for case in run.cases or []] == ["r0", "r1"]
        assert [(call["queue"], call["argument"]) for call in queue.calls] == [(TRAINING, run.run_id)]
        assert kinds(session) == ["training-waiting", "training-queued"]


def test_with_too_few_it_waits_and_nothing_is_queued(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        run = ask(session, queue, choice(labelled=1, waiting=3))
        assert run.state == RunState.WAITING
        assert "1 of 4 cases" in str(run.state_reason)
    assert queue.calls == []


def test_cases_drawn_for_monitoring_do_not_count(database: Database) -> None:
    with database.session() as session:
        assert ask(session, NotedQueue(), choice(labelled=1, drawn=5)).state == RunState.WAITING


def test_a_full_training_needs_no_new_case(database: Database) -> None:
    with database.session() as session:
        assert ask(session, NotedQueue(), choice(), kind="retraining").state == RunState.QUEUED


def test_a_model_has_one_run_at_a_time(database: Database) -> None:
    with database.session() as session:
        ask(session, NotedQueue(), choice(labelled=2))
        with pytest.raises(Rejected, match="one runs at a time"):
            ask(session, NotedQueue(), choice(labelled=2))


def test_each_fold_is_a_workflow_and_the_last_one_finishes_the_run_once(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        run = ask(session, queue, choice(labelled=2))
        runs.begin_folds(session, queue, run, ["0", "1"])
        assert [call["argument"] for call in queue.calls[1:]] == [f"{run.run_id}/0", f"{run.run_id}/1"]
        assert not runs.fold_done(session, queue, run, "1")
        assert not runs.fold_done(session, queue, run, "1")  # a repeated step
        assert runs.fold_done(session, queue, run, "0")
        assert runs.fold_done(session, queue, run, "0")
    finishing = [call["workflow_id"] for call in queue.calls if call["argument"] == run.run_id][1:]
    assert len(set(finishing)) == 1  # the same workflow id is the same workflow


def test_what_failed_is_alarmed_and_goes_on_under_another_workflow(database: Database) -> None:
    queue = NotedQueue()
    with database.session() as session:
        run = ask(session, queue, choice(labelled=2))
        first = run.workflow_id
        assert runs.fail_run(session, run, "train", "Permanent: no disk") == "failed"
        assert run.state_reason == "train: Permanent: no disk"
        assert [alarm.kind for alarm in alarms.open_alarms(session)] == [runs.FAILED]
        assert not runs.is_wanted(session, run.run_id)
        runs.retry_run(session, queue, run, actor="user:x")
        assert run.state == RunState.QUEUED
        assert run.workflow_id != first
        assert alarms.open_alarms(session) == []
        with pytest.raises(Rejected, match="only one that has failed"):
            runs.retry_run(session, queue, run, actor="user:x")


def test_a_run_that_is_given_up_is_wanted_no_more_and_cannot_fail(database: Database) -> None:
    with database.session() as session:
        run = ask(session, NotedQueue(), choice(labelled=2))
        runs.give_up(session, run, actor="user:x", reason="wrong cases")
        assert not runs.is_wanted(session, run.run_id)
        assert runs.fail_run(session, run, "train", "stopped") == RunState.REFUSED
        assert alarms.open_alarms(session) == []
        with pytest.raises(Rejected, match="already"):
            runs.give_up(session, run, actor="user:x", reason="again")


def test_a_candidate_that_is_given_up_waits_for_nobody_any_more(database: Database) -> None:
    with database.session() as session:
        run = ask(session, NotedQueue(), choice(labelled=2))
        runs.move(session, run, RunState.CANDIDATE, "ACCEPTED")
        for kind in (runs.WAITS, runs.FAILED):  # the second is of an earlier run
            alarms.raise_alarm(session, kind=kind, subject="model:liver", message="...")
        runs.give_up(session, run, actor="user:x", reason="the site has changed")
        assert [alarm.kind for alarm in alarms.open_alarms(session)] == [runs.FAILED]


def test_readers_are_not_asked_for_labels_of_a_training_that_was_given_up(database: Database) -> None:
    with database.session() as session:
        run = ask(session, NotedQueue(), choice(labelled=1, waiting=3))
        open_task(
            session,
            kind=runs.LABEL,
            model_name="liver",
            model_version="1.0.0",
            subject=runs.label_subject(run),
            summary="1 of 4 cases",
            result_ids=["r1"],
            picture=None,
        )
        runs.give_up(session, run, actor="user:x", reason="wrong cases")
        assert list(open_tasks(session)) == []
        assert kinds(session)[-1] == "review-task-closed"


def test_the_chain_of_the_model_holds(database: Database) -> None:
    with database.session() as session:
        run = ask(session, NotedQueue(), choice(labelled=2))
        runs.move(session, run, RunState.TRAINING)
        runs.move(session, run, RunState.TRAINING)
        assert kinds(session) == ["training-waiting", "training-queued", "training-training"]
        assert ledger.verify(session, ledger.model_subject("liver")) == 3
