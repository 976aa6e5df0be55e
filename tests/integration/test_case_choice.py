"""gateway.learning.case_choice: candidates, what is left out, when corrections are queued, `seggate learn cases`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from gateway.cli import app
from gateway.learning.case_choice import CaseChoice, choose_cases, confidence_of
from gateway.learning_settings import ModelLearning, SelectionSettings
from gateway.settings import CanarySettings, load_settings
from gateway.state import prepare_state
from storage.database import Database
from storage.learning_records import Correction, LearningRun, ServingPeriod
from storage.records import Result, ResultState, StudyFacts, StudyState, utc_now
from tests.support.config_folder import write_config
from tests.support.story_rows import add_result, add_study, add_version

NOW = utc_now()
SERVES = "1.0.0"
CHECKS: dict[str, dict[str, Any]] = {
    "empty": {"name": "empty", "segment": None, "value": "all", "limit": "some segment", "verdict": "hold"},
    "laterality": {"name": "laterality", "segment": "a", "value": -3.0, "limit": "more", "verdict": "hold"},
    "confidence": {"name": "confidence", "segment": None, "value": 0.2, "limit": "at least 0.5", "verdict": "hold"},
    "volume": {"name": "volume", "segment": "a", "value": 9.0, "limit": "1 to 2 ml", "verdict": "review"},
}


def learning(**selection: Any) -> ModelLearning:
    defaults = {"least": 5, "most": 20, "random_share": 0.0}
    return ModelLearning(name="tiny", selection=SelectionSettings(**(defaults | selection)))


def add_case(
    session: Session,
    index: int,
    *,
    entropy: float | None = None,
    version: str = SERVES,
    days_ago: float = 1.0,
    state: ResultState = ResultState.RELEASED,
    study_state: StudyState = StudyState.VERIFIED,
    checks: list[dict[str, Any]] | None = None,
    verdict: str | None = "pass",
    patient: str | None = None,
    calling_ae: str = "CT1",
    names: tuple[str, ...] = ("a", "b"),
    **columns: Any,
) -> str:
    """A judged result; the surer the higher its number."""
    uid, result_id = f"1.2.{index}", f"r{index:03}"
    study = add_study(session, study_state, uid=uid)
    study.patient_id, study.calling_ae, study.study_key = patient or f"P{index}", calling_ae, f"{index:032x}"
    add_version(session, uid=uid)
    doubt = 0.9 - index / 1000 if entropy is None else entropy
    measured = [
        {
            "value": value, "name": name, "voxels": 90 * value, "volume_ml": 3.0 * value, "confidence": 0.9,
            "components": 1, "fold_dice": None, "mirror_dice": 0.9, "border_entropy": 0.5, "dilated_entropy": doubt,
        }
        for value, name in enumerate(names, start=1)
    ]  # fmt: skip
    result = add_result(
        session,
        state,
        result_id=result_id,
        uid=uid,
        verdict=verdict,
        checks=checks or [],
        measurements=measured if verdict is not None else None,
        runtime={"labels": {"path": "x", "sha256": "0" * 64}},
        **columns,
    )
    result.model_version = version
    session.add(
        StudyFacts(
            result_id=result_id,
            model_name="tiny",
            model_version=version,
            scanner="ACME One",
            recorded_at=NOW - timedelta(days=days_ago, seconds=index),
            acquisition={"categories": {}, "numbers": {"slices": 30.0}},
            image=None,
        )
    )
    session.flush()
    return result_id


def say(
    session: Session, result_id: str, kind: str, *, dice: float | None = None, learnt_by: str | None = None
) -> None:
    """`learnt_by`: the training that made the version which serves in these tests."""
    if learnt_by is not None and session.get(LearningRun, learnt_by) is None:
        add_run(session, learnt_by, semver=SERVES)
    session.add(
        Correction(
            result_id=result_id,
            model_name="tiny",
            kind=kind,
            by="reader",
            recorded_at=NOW,
            dice=None if dice is None else {"a": dice, "b": dice},
            learnt_by=learnt_by,
        )
    )
    session.flush()


def add_run(session: Session, run_id: str, *, semver: str | None, base: str = "0.1.0", **columns: Any) -> None:
    session.add(
        LearningRun(
            run_id=run_id,
            model_name="tiny",
            kind="fine-tuning",
            base_version=base,
            semver=semver,
            requested_by="policy",
            reason="",
            state="promoted",
            requested_at=NOW,
            updated_at=NOW,
            workflow_id=run_id,
            **columns,
        )
    )
    session.flush()


def choose(database: Database, settings: ModelLearning | None = None, **options: Any) -> CaseChoice:
    with database.reading() as session:
        return choose_cases(session, settings or learning(), now=NOW, **options)


def ids(choice: CaseChoice, why: str | None = None) -> set[str]:
    return {case.result_id for case in choice.cases if why in (None, case.why)}


@pytest.mark.requirement("ART-19", "ART-21")
def test_recent_results_of_low_confidence_are_chosen_held_ones_too(database: Database) -> None:
    with database.session() as session:
        for index in range(60):
            add_case(session, index)
        add_case(session, 60, entropy=0.95, state=ResultState.HELD, checks=[CHECKS["confidence"]], verdict="hold")
        add_case(session, 61, entropy=0.99, days_ago=200)
    found = choose(database)
    assert (len(found.cases), found.candidates) == (20, 61)
    first = found.cases[0]
    assert (first.result_id, first.why, first.verdict, first.reading) == ("r060", "uncertain", "hold", None)
    assert first.confidence == pytest.approx(0.05)
    assert "r061" not in ids(found)
    assert ids(found) <= {f"r{i:03}" for i in range(40)} | {"r060"}


def test_every_label_counts_the_same_however_large() -> None:
    large, small = {"voxels": 10**6, "dilated_entropy": 0.0}, {"voxels": 10, "dilated_entropy": 0.8}
    assert confidence_of([large, small]) == pytest.approx(0.6)
    assert confidence_of([large, {"voxels": 0, "dilated_entropy": None}]) == 1.0
    assert confidence_of([{"voxels": 3}]) is None


@pytest.mark.requirement("ART-21")
def test_garbage_and_what_nobody_vouches_for_is_left_out_with_the_reason(database: Database) -> None:
    with database.session() as session:
        for index in range(3):
            add_case(session, index)
        held: dict[str, Any] = {"state": ResultState.HELD, "verdict": "hold"}
        add_case(session, 10, checks=[CHECKS["empty"]], **held)
        add_case(session, 11, checks=[CHECKS["confidence"], CHECKS["laterality"]], **held)
        add_case(session, 12, checks=[CHECKS["volume"]], verdict="review")  # a candidate: looked at, not garbage
        add_case(session, 13, study_state=StudyState.QUARANTINED)
        add_case(session, 14, **held, state_reason="the study is quarantined: two patients")
        add_case(session, 15, calling_ae="SEGGATE_CANARY")
        add_case(session, 16, names=("a",), version="0.9.0")
        for index, state in enumerate((ResultState.SUPERSEDED, ResultState.FAILED, ResultState.PENDING), start=17):
            add_case(session, index, state=state)
        for index, kind in enumerate(("rejected", "opened", "approved"), start=20):
            say(session, add_case(session, index), kind)
        say(session, add_case(session, 23), "corrected", learnt_by="run-1")
    found = choose(database)
    assert ids(found) == {"r000", "r001", "r002", "r012", "r022"}
    assert found.left_out == {
        "canary": 1,
        "failed-hard-check": 2,
        "learnt": 1,
        "opened-and-unread": 1,
        "other-labels": 1,
        "quarantined": 2,
        "rejected": 1,
    }
    other = choose(database, canary=CanarySettings(ae_title="OTHER"))
    assert "r015" in ids(other)


def test_results_of_earlier_versions_with_the_same_labels_are_candidates(database: Database) -> None:
    with database.session() as session:
        add_case(session, 1, version="1.0.0", days_ago=3)
        add_case(session, 2, version="1.1.0", days_ago=2)
        add_case(session, 3, version="2.0.0", names=("a", "c"), days_ago=1)
        session.add(
            ServingPeriod(
                model_name="tiny",
                model_version="1.2.0",
                weights_digest="0" * 64,
                began_at=NOW,
                began_by="x",
                rolled_back=False,
            )
        )
    found = choose(database)
    assert (found.model_version, ids(found)) == ("1.2.0", {"r001", "r002"})
    with database.session() as session:
        session.query(ServingPeriod).one().model_version = "3.0.0"  # with labels that no result has yet
    assert choose(database).cases == ()


@pytest.mark.requirement("ART-26")
@pytest.mark.parametrize(("corrected", "is_queued"), [(29, False), (30, True)])
def test_corrections_are_queued_from_30_percent_of_what_was_read(
    database: Database, corrected: int, is_queued: bool
) -> None:
    """The 100 that were read are the surest of all; queued, those that were corrected come first all the same."""
    with database.session() as session:
        for index in range(200):
            result_id = add_case(session, index)
            if index >= 100:
                say(session, result_id, "corrected" if index < 100 + corrected else "approved", dice=0.5)
        say(session, add_case(session, 300), "opened")  # was not read
    found = choose(database, learning(most=40))
    assert (found.read, found.corrected) == (100, corrected)
    assert found.corrected_share == pytest.approx(corrected / 100)
    assert found.corrections_queued is is_queued
    assert ids(found, "corrected") == ({f"r{i:03}" for i in range(100, 130)} if is_queued else set())
    assert ids(found, "uncertain") <= {f"r{i:03}" for i in range(100)}
    assert found.labelled == (30 if is_queued else 0)
    assert found.ready is is_queued
    assert ("are queued" if is_queued else "are not queued") in found.sentence


@pytest.mark.requirement("ART-26")
def test_rejected_results_were_read_and_a_correction_of_garbage_is_one(database: Database) -> None:
    with database.session() as session:
        for index in range(3):
            say(session, add_case(session, index), "rejected")
        garbage = add_case(session, 3, state=ResultState.HELD, verdict="hold", checks=[CHECKS["empty"]])
        say(session, garbage, "corrected")
    found = choose(database)
    assert (found.read, found.corrected, found.corrections_queued) == (4, 1, False)
    assert (ids(found), found.left_out["failed-hard-check"]) == (set(), 1)
    found = choose(database, learning(corrected_share=0.25))
    assert (ids(found, "corrected"), found.left_out) == ({"r003"}, {"rejected": 3})


@pytest.mark.requirement("ART-21")
def test_it_is_ready_with_as_many_labels_as_are_needed_and_says_what_it_waits_for(database: Database) -> None:
    with database.session() as session:
        for index in range(10):
            result_id = add_case(session, index)
            if index < 4:
                say(session, result_id, "approved", dice=1.0)
    few = choose(database)
    assert (few.labelled, few.ready, len(few.waiting)) == (4, False, 6)
    assert few.sentence.startswith("4 of 10 cases to learn from have labels, 5 are needed: 1 more")
    assert {case.result_id for case in few.to_learn} == {f"r{i:03}" for i in range(4)}
    with database.session() as session:
        say(session, "r004", "corrected", dice=0.7)
    enough = choose(database)
    assert (enough.labelled, enough.ready) == (5, True)
    assert "needed: enough" in enough.sentence


@pytest.mark.requirement("ART-21")
def test_what_was_drawn_by_chance_measures_the_version_that_serves_and_is_never_learnt(database: Database) -> None:
    """However unsure, and also where it was corrected and the corrections are queued."""
    with database.session() as session:
        for index in range(120):
            add_case(session, index)
    settings = learning(most=20, random_share=0.2)
    drawn = ids(choose(database, settings), "random")
    assert len(drawn) == 5
    with database.session() as session:
        for number, result_id in enumerate(sorted(drawn)):
            say(session, result_id, "corrected", dice=0.5 + number / 10)
    found = choose(database, settings)
    assert ids(found, "random") == drawn
    assert found.corrections_queued
    assert drawn.isdisjoint(case.result_id for case in found.to_learn)
    assert (found.labelled, found.live_cases) == (0, 5)
    assert found.live_dice == pytest.approx(0.7)
    assert "Dice 0.700 on 5 that were drawn by chance" in found.sentence
    # Of another version's results nothing is said about this one.
    with database.session() as session:
        session.get_one(Result, min(drawn)).model_version = "0.9.0"
    assert choose(database, settings).live_cases == 4


def test_a_patient_who_was_learnt_from_is_no_longer_drawn(database: Database) -> None:
    with database.session() as session:
        for index in range(60):
            add_case(session, index, patient=f"P{index % 30} ")
    settings = learning(most=50, random_share=0.3)
    drawn = ids(choose(database, settings), "random")
    patients = {int(name[1:]) % 30 for name in drawn}
    with database.session() as session:
        for index in sorted(patients):
            say(session, add_case(session, 100 + index, patient=f"p{index}"), "approved", learnt_by="run-1")
    after = ids(choose(database, settings), "random")
    assert patients.isdisjoint({int(name[1:]) % 30 for name in after})


def test_a_word_after_the_training_makes_no_new_case_of_it(database: Database) -> None:
    with database.session() as session:
        result_id = add_case(session, 1)
        say(session, result_id, "approved", learnt_by="run-1")
    assert choose(database).left_out == {"learnt": 1}
    with database.session() as session:
        say(session, result_id, "corrected", dice=0.6)
    assert choose(database).left_out == {"learnt": 1}


def test_what_only_a_refused_or_withdrawn_version_learnt_can_be_chosen_again(database: Database) -> None:
    with database.session() as session:
        result_id = add_case(session, 1)
        add_run(session, "refused", semver="9.9.0", base=SERVES)
        say(session, result_id, "approved", learnt_by="refused")
    assert {case.result_id for case in choose(database).to_learn} == {result_id}


def test_what_a_version_before_the_one_that_serves_learnt_is_learnt(database: Database) -> None:
    with database.session() as session:
        result_id = add_case(session, 1)
        add_run(session, "first", semver="0.5.0")
        add_run(session, "second", semver=SERVES, base="0.5.0")
        say(session, result_id, "approved", learnt_by="first")
    assert choose(database).left_out == {"learnt": 1}


def test_what_could_not_be_made_a_case_is_not_chosen_again(database: Database) -> None:
    with database.session() as session:
        result_id = add_case(session, 1)
        say(session, result_id, "approved")
        add_run(session, "failed", semver=None, cases=[{"result_id": result_id, "left_out": "tilted gantry"}])
    assert choose(database).left_out == {"unfit": 1}


def test_the_same_rows_give_the_same_choice(database: Database) -> None:
    with database.session() as session:
        for index in range(80):
            add_case(session, index)
    assert choose(database, learning(random_share=0.1)) == choose(database, learning(random_share=0.1))


def test_a_model_without_studies_has_no_choice(database: Database) -> None:
    found = choose(database)
    assert (found.model_version, found.cases, found.ready) == (None, (), False)
    assert found.corrected_share is None
    assert replace(found, read=0).corrections_queued is False


def test_the_command_shows_the_choice_and_what_it_waits_for(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (config / "learning.toml").write_text(
        '[[models]]\nname = "tiny"\n[models.selection]\nleast = 2\nmost = 10\nrandom_share = 0\n'
    )
    database = prepare_state(load_settings(config))
    with database.session() as session:
        for index in range(12):
            add_case(session, index, days_ago=0.5, patient="SECRET")
        say(session, "r000", "approved", dice=1.0)
        say(session, "r011", "opened")
    database.close()
    shown = CliRunner().invoke(app, ["learn", "cases", "tiny", "--config", str(config)])
    assert shown.exit_code == 0, shown.output
    assert "waits for a reader" in shown.output
    assert "left out: 1 opened, and nothing was said" in shown.output
    assert "1 of 10 cases to learn from have labels, 2 are needed: 1 more" in shown.output
    assert "SECRET" not in shown.output
    document = json.loads(CliRunner().invoke(app, ["learn", "cases", "tiny", "--json", "--config", str(config)]).stdout)
    assert (document["ready"], document["labelled"], document["waiting"]) == (False, 1, 9)
    assert Counter(case["why"] for case in document["cases"]) == {"uncertain": 10}
    unknown = CliRunner().invoke(app, ["learn", "cases", "nobody", "--config", str(config)])
    assert unknown.exit_code == 1
    assert "no study of this model was recorded yet" in unknown.output
