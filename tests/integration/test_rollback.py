"""A bad champion is rolled back by itself, and its unreleased results are done again by the stable version (ART-23)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select

from engine.errors import BackendFailed
from engine.predictor import Prediction
from engine.volume import Volume
from gateway import quarantine
from gateway.durable import ROUTINE, URGENT
from gateway.learning.idle_versions import close_idle_versions
from gateway.learning.rollback import Withdrawal
from storage import ledger
from storage.database import Database
from storage.learning_records import ReviewTask, ServingPeriod
from storage.models import CHAMPION, RegisteredModel
from storage.records import LedgerEvent, Result, ResultState, Study, StudyState
from storage.spool import study_key
from tests.support.live_studies import BLIND, GOOD, HALF_BLIND, MODEL, SWAPPED, LiveStudies

pytestmark = pytest.mark.requirement("ART-23")


@pytest.fixture
def live(database: Database, tmp_path: Path) -> LiveStudies:
    """1.0.0 has served; 2.0.0 exchanges the sides and serves since, watched."""
    live = LiveStudies(database, tmp_path, watch_studies=5)
    live.register("1.0.0")
    live.promote("1.0.0")
    live.register("2.0.0", SWAPPED)
    return live


def kinds(live: LiveStudies, subject: str) -> list[str]:
    with live.database.reading() as session:
        ledger.verify(session)
        kinds = [event.kind for event in ledger.events(session, subject)]
    return [kind for kind in kinds if kind != "model-imported"]


def event(live: LiveStudies, kind: str) -> LedgerEvent:
    with live.database.reading() as session:
        return session.scalars(select(LedgerEvent).where(LedgerEvent.kind == kind)).one()


def task(live: LiveStudies) -> ReviewTask:
    with live.database.reading() as session:
        return session.scalars(select(ReviewTask)).one()


@pytest.mark.parametrize("bad", [SWAPPED, BLIND, "raises"])
def test_the_study_that_reveals_the_fault_is_done_again_by_the_stable_version_and_so_are_those_before(
    live: LiveStudies, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad == BLIND:
        live.register("3.0.0", BLIND)
    version = "3.0.0" if bad == BLIND else "2.0.0"
    live.promote(version)
    if bad == "raises":
        _raise_in(live, version, monkeypatch)
    uids = [live.receive(n, priority="urgent" if n == 1 else "routine") for n in range(3)]
    for uid in uids[:-1]:
        assert _make_or_park(live, uid) in ("held", "parked")
    assert live.models.aliases[CHAMPION] == version
    assert _make_or_park(live, uids[-1]) in ("superseded", "parked")

    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert [live.current(uid) for uid in uids] == [[("1.0.0", "pending")]] * 3
    assert [live.study_state(uid) for uid in uids] == ["processing"] * 3
    assert live.alarms() == {"model-rolled-back"}
    again = [call for call in live.queue.calls if call["workflow"] == "make_result"][3:]
    assert [call["priority"] for call in again] == [ROUTINE, URGENT, ROUTINE]
    assert [call["argument"] for call in again] == [live.results(uid)[-1].result_id for uid in uids]

    assert [live.make(uid) for uid in uids] == ["released"] * 3
    assert [live.current(uid) for uid in uids] == [[("1.0.0", "released")]] * 3
    assert kinds(live, f"model:{MODEL}") == ["model-rolled-back", "results-withdrawn"]
    withdrawn = event(live, "results-withdrawn").detail
    assert withdrawn["done_again"]["count"] == 3
    assert withdrawn["released"] == {"count": 0, "result_ids": []}
    assert (task(live).kind, task(live).model_version, task(live).result_ids) == ("rollback", version, [])
    what = {SWAPPED: "3 were held by QA (limit 50%)", BLIND: "3 were held by QA", "raises": "3 failed (limit 20%)"}
    assert what[bad] in task(live).summary
    # The withdrawn ones say what became of them.
    old = live.results(uids[0])[0]
    assert (old.state, old.state_reason) == (
        ResultState.SUPERSEDED,
        f"{MODEL} {version} was withdrawn; done again by 1.0.0",
    )


def test_asked_again_nothing_more_is_done(live: LiveStudies) -> None:
    live.promote("2.0.0")
    uids = [live.receive(n) for n in range(3)]
    for uid in uids:
        live.make(uid)
    calls, events = len(live.queue.calls), kinds(live, f"model:{MODEL}")
    live.watch.look(MODEL)
    live.new_process()
    live.watch.tend()
    live.watch.look(MODEL)
    assert (len(live.queue.calls), kinds(live, f"model:{MODEL}")) == (calls, events)
    assert len(live.results(uids[0])) == 2


@pytest.mark.parametrize("by", ["tend", "look"])
def test_a_crash_between_the_registry_and_the_results_is_finished_by_whoever_looks_next(
    live: LiveStudies, by: str
) -> None:
    class Dies(Withdrawal):
        def withdraw(self, *_: Any, **__: Any) -> bool:
            raise KeyboardInterrupt

    live.promote("2.0.0")
    live.new_process(withdrawal=Dies)
    uids = [live.receive(n) for n in range(3)]
    for uid in uids[:-1]:
        live.make(uid)
    with pytest.raises(KeyboardInterrupt):
        live.make(uids[-1])
    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert [live.current(uid)[0][0] for uid in uids] == ["2.0.0"] * 3
    # The aliases may be behind our table as well.
    live.models.promote(MODEL, "2.0.0")
    live.new_process()
    if by == "tend":
        live.watch.tend()
    else:
        assert live.make(uids[-1], until="judge") == "superseded"  # the step that was cut short runs again
    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert [live.current(uid) for uid in uids] == [[("1.0.0", "pending")]] * 3
    assert kinds(live, f"model:{MODEL}") == ["model-rolled-back", "results-withdrawn"]


def test_what_was_released_stays_and_is_listed(live: LiveStudies, monkeypatch: pytest.MonkeyPatch) -> None:
    live.promote("2.0.0")
    _with_kind(live, "2.0.0", GOOD, monkeypatch)
    early = live.receive(7)
    assert live.make(early) == "released"
    _with_kind(live, "2.0.0", SWAPPED, monkeypatch)
    uids = [live.receive(n) for n in range(2)]
    for uid in uids:
        live.make(uid)
    assert live.current(early) == [("2.0.0", "released")]
    assert [live.current(uid) for uid in uids] == [[("1.0.0", "pending")]] * 2
    released = [live.results(early)[0].result_id]
    assert event(live, "results-withdrawn").detail["released"] == {"count": 1, "result_ids": released}
    assert task(live).result_ids == released


def test_an_expected_label_that_is_empty_counts_although_qa_lets_the_result_pass_for_review(live: LiveStudies) -> None:
    live.register("3.0.0", HALF_BLIND)
    live.promote("3.0.0")
    uids = [live.receive(n) for n in range(3)]
    assert [live.make(uid) for uid in uids] == ["released", "released", "superseded"]
    assert [live.current(uid) for uid in uids] == [
        [("3.0.0", "released")],
        [("3.0.0", "released")],
        [("1.0.0", "pending")],
    ]
    assert "3 have an empty label (limit 30%)" in task(live).summary
    assert task(live).result_ids == [live.results(uid)[0].result_id for uid in uids[:2]]


def test_a_run_that_is_under_way_ends_without_effect(live: LiveStudies, monkeypatch: pytest.MonkeyPatch) -> None:
    live.promote("2.0.0")
    first = [live.receive(n) for n in range(3)]
    for uid in first[:2]:
        live.make(uid)
    running = live.receive(3)
    predicted = live.shelf.predict

    def meanwhile(model: RegisteredModel, volume: Volume, **options: Any) -> Prediction:
        monkeypatch.setattr(live.shelf, "predict", predicted)
        live.make(first[2])  # another worker's study reveals the fault
        return predicted(model, volume, **options)

    monkeypatch.setattr(live.shelf, "predict", meanwhile)
    assert live.make(running) == "superseded"
    assert live.current(running) == [("1.0.0", "pending")]
    old, _ = live.results(running)
    assert (old.runtime, old.verdict) == (None, None)
    assert not (live.spool.root / "studies" / study_key(running) / "results" / old.result_id).exists()


def test_a_result_of_the_withdrawn_version_that_appears_afterwards_is_done_again_too(live: LiveStudies) -> None:
    """Another worker planned with the version and wrote its rows after the rollback."""
    live.promote("2.0.0")
    late = live.receive(9)
    _set_state(live, late, ResultState.NOT_RUN)
    for n in range(3):
        live.make(live.receive(n))
    _set_state(live, late, ResultState.PENDING)
    assert live.current(late) == [("2.0.0", "pending")]
    assert live.make(late) == "superseded"
    assert live.current(late) == [("1.0.0", "pending")]
    assert live.make(late) == "released"


def _set_state(live: LiveStudies, uid: str, state: ResultState) -> None:
    with live.database.session() as session:
        session.scalars(select(Result).where(Result.study_instance_uid == uid)).one().state = state


def test_results_of_older_study_versions_and_of_quarantined_studies_are_left(live: LiveStudies) -> None:
    live.promote("2.0.0")
    older, aside = live.receive(5), live.receive(6)
    live.make(older)
    live.declare_again(older)
    with live.database.session() as session:
        result = session.scalars(select(Result).where(Result.study_instance_uid == aside)).one()
        session.get_one(Study, aside).state = StudyState.QUARANTINED
        quarantine.hold_result(session, result, str(quarantine.reason_to_stop(session, aside)))
    for n in range(2):
        live.make(live.receive(n))
    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert live.current(older) == [("2.0.0", "held")]
    assert live.current(aside) == [("2.0.0", "held")]
    assert live.study_state(aside) == "quarantined"


def test_a_study_whose_images_are_gone_is_parked_and_the_others_go_on(live: LiveStudies) -> None:
    live.promote("2.0.0")
    uids = [live.receive(n) for n in range(3)]
    for uid in uids[:2]:
        live.make(uid)
    shutil.rmtree(live.spool.root / "studies" / study_key(uids[0]) / "objects")
    live.make(uids[2])
    assert [live.current(uid) for uid in uids] == [
        [("1.0.0", "failed")],
        [("1.0.0", "pending")],
        [("1.0.0", "pending")],
    ]
    assert live.study_state(uids[0]) == "failed"
    assert live.alarms() == {"model-rolled-back", "parked"}


def test_two_workers_that_see_the_same_fault_go_back_one_version(live: LiveStudies) -> None:
    live.register("0.9.0")
    with live.database.session() as session:
        session.scalars(select(ServingPeriod)).one().previous_version = "0.9.0"
    period = live.promote("2.0.0")
    for _ in range(2):
        live.watch._roll_back(period, "seen by both")
    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert kinds(live, f"model:{MODEL}") == ["model-rolled-back", "results-withdrawn"]


def test_a_result_of_the_stable_version_that_went_once_is_taken_up_again(live: LiveStudies) -> None:
    """Back and forth: the result that the stable version has for this study exists already, superseded."""
    live.register("0.9.0", SWAPPED)
    period = live.promote("2.0.0")
    uids = [live.receive(n) for n in range(3)]
    for uid in uids:
        live.make(uid)
    made = live.results(uids[0])[-1]
    with live.database.session() as session:  # withdrawn as well since, and the first one is what is held again
        for result in session.scalars(select(Result).where(Result.study_instance_uid == uids[0])):
            result.state = "superseded" if result.model_version == "1.0.0" else "held"
    Withdrawal(database=live.database, spool=live.spool, shelf=live.shelf, enqueuer=cast(Any, live.queue)).withdraw(
        period, live.models.get(MODEL, "1.0.0")
    )
    assert live.current(uids[0]) == [("1.0.0", "pending")]
    assert live.results(uids[0])[-1].result_id == made.result_id
    assert live.queue.ids[-1] == f"{made.workflow_id}~1"


def test_where_the_version_before_cannot_be_loaded_nothing_is_rolled_back_and_a_person_is_told(
    live: LiveStudies,
) -> None:
    live.promote("2.0.0")
    uids = [live.receive(n) for n in range(3)]
    shutil.rmtree(live.models.folder / "1.0.0")
    live.new_process()
    assert [live.make(uid) for uid in uids] == ["held"] * 3
    assert live.models.aliases[CHAMPION] == "2.0.0"
    assert live.alarms() == {"result-held", "rollback-failed"}


def test_networks_of_a_version_that_nothing_needs_leave_the_memory_and_a_rollback_loads_them_again(
    live: LiveStudies,
) -> None:
    assert live.make(live.receive(0)) == "released"
    waiting = live.receive(1)
    live.promote("2.0.0")
    uids = [live.receive(n) for n in range(2, 5)]
    assert live.make(uids[0]) == "held"
    assert live.shelf.loaded() == {MODEL: {"1.0.0", "2.0.0"}}
    live.watch.tend()  # a study that was ordered from the version before has not run yet
    assert live.shelf.loaded() == {MODEL: {"1.0.0", "2.0.0"}}
    assert live.make(waiting) == "released"
    live.models.set_shadow(MODEL, "1.0.0")
    live.shelf.forget(MODEL)
    close_idle_versions(live.database, live.shelf)
    assert live.shelf.loaded() == {MODEL: {"1.0.0", "2.0.0"}}
    live.models.clear_shadow(MODEL)
    live.shelf.forget(MODEL)
    close_idle_versions(live.database, live.shelf)
    assert live.shelf.loaded() == {MODEL: {"2.0.0"}}
    # The studies that give the new version away are done again by the one before, at once.
    for uid in uids[1:]:
        live.make(uid)
    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert [live.make(uid) for uid in uids] == ["released"] * 3
    close_idle_versions(live.database, live.shelf)
    assert live.shelf.loaded() == {MODEL: {"1.0.0"}}


def test_after_enough_good_studies_the_version_is_kept(live: LiveStudies) -> None:
    live.register("3.0.0", GOOD)
    live.promote("3.0.0")
    for n in range(5):
        with live.database.reading() as session:
            assert session.scalars(select(ServingPeriod.watched_until)).all()[-1] is None
        assert live.make(live.receive(n)) == "released"
    with live.database.reading() as session:
        assert session.scalars(select(ServingPeriod.watched_until)).all()[-1] is not None
    assert kinds(live, f"model:{MODEL}") == ["model-kept"]
    assert event(live, "model-kept").detail["studies"] == 5
    live.watch.look(MODEL)
    assert kinds(live, f"model:{MODEL}") == ["model-kept"]


def _nothing_found(_model: RegisteredModel) -> tuple[str, ...]:
    return ()


def _fault(_model: RegisteredModel) -> tuple[str, ...]:
    return ("case-1: 900 of 1000 voxels changed",)


@pytest.mark.parametrize("fault", ["suite", "files", "gone"])
def test_a_new_champion_that_fails_at_the_start_is_rolled_back_before_any_study(live: LiveStudies, fault: str) -> None:
    live.promote("2.0.0")
    waiting = live.receive(1)
    live.new_process()
    if fault == "files":
        (live.models.folder / "2.0.0" / "3d_fullres" / "fold_0.onnx").write_bytes(b"other")
    if fault == "gone":
        shutil.rmtree(live.models.folder / "2.0.0")
    live.watch.check_at_start(_fault if fault == "suite" else _nothing_found)
    assert live.models.aliases[CHAMPION] == "1.0.0"
    assert live.current(waiting) == [("1.0.0", "pending")]
    assert "at the start of a worker: " in task(live).summary
    assert live.make(waiting) == "released"


def test_a_champion_with_nothing_before_it_that_fails_at_the_start_is_alarmed_until_it_is_mended(
    live: LiveStudies,
) -> None:
    weights = live.models.folder / "1.0.0" / "3d_fullres" / "fold_0.onnx"
    good = weights.read_bytes()
    weights.write_bytes(b"other")
    live.new_process()
    live.watch.check_at_start(_nothing_found)
    assert (live.alarms(), live.models.aliases[CHAMPION]) == ({"model-unusable"}, "1.0.0")
    weights.write_bytes(good)
    live.new_process()
    live.watch.check_at_start(_fault)  # the suite is for versions that are watched
    assert live.alarms() == set()


def test_a_device_that_is_busy_at_the_start_says_nothing_of_the_model(live: LiveStudies) -> None:
    def busy(_model: RegisteredModel) -> tuple[str, ...]:
        raise BackendFailed("out of memory")

    live.promote("2.0.0")
    live.watch.check_at_start(busy)
    assert (live.models.aliases[CHAMPION], live.alarms()) == ("2.0.0", {"rollback-failed"})


def test_a_study_that_meets_a_champion_whose_files_were_changed_is_ordered_from_the_stable_version(
    live: LiveStudies,
) -> None:
    live.promote("2.0.0")
    (live.models.folder / "2.0.0" / "3d_fullres" / "fold_0.onnx").write_bytes(b"other")
    uid = live.receive(1)
    assert live.current(uid) == [("1.0.0", "pending")]
    assert len(live.results(uid)) == 1
    assert live.alarms() == {"model-rolled-back"}


def _make_or_park(live: LiveStudies, uid: str) -> str:
    """As the workflow does it: what a step raises parks the result."""
    (result_id,) = [r.result_id for r in live.results(uid) if r.state == "pending"]
    try:
        return live.make(uid)
    except ZeroDivisionError as error:
        return live.work.park_result(result_id, "infer", f"Permanent: {error}")


def _raise_in(live: LiveStudies, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: Callable[..., Prediction] = live.shelf.predict

    def raising(model: RegisteredModel, volume: Volume, **options: Any) -> Prediction:
        if model.semver == version:
            raise ZeroDivisionError("the network divides by zero")
        return predicted(model, volume, **options)

    monkeypatch.setattr(live.shelf, "predict", raising)


def _with_kind(live: LiveStudies, semver: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchange what a version does, as if studies differed."""
    predictor_of = {GOOD: "1.0.0", SWAPPED: "2.0.0"}
    model = live.models.get(MODEL, predictor_of[kind])
    shelf = type(live.shelf)(cast(Any, live.models), device="cpu", threads=1)
    own = type(live.shelf).predict

    def predict(asked: RegisteredModel, volume: Volume, **options: Any) -> Prediction:
        return own(shelf, model if asked.semver == semver else asked, volume, **options)

    monkeypatch.setattr(live.shelf, "predict", predict)
