"""A version in shadow is compared with the champion on live studies, and only its own rows come of it (ART-23)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sqlalchemy import select

from engine.volume import Volume
from gateway.errors import Permanent, Rejected
from gateway.learning import shadow
from gateway.learning.shadow import label_dice, shadow_progress, start_shadow, stop_shadow
from gateway.results.inference import Inferred
from gateway.workflows import SHADOW_RESULT, Story
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import DatabaseAway, ModelChanged, ModelMissing
from storage.learning_records import ShadowRun
from storage.models import ModelRegistry, RegisteredModel
from storage.records import Record, Result
from tests.support.live_studies import GOOD, MODEL, SWAPPED, LiveStudies

pytestmark = pytest.mark.requirement("ART-23")


@pytest.fixture
def live(database: Database, tmp_path: Path) -> LiveStudies:
    """1.0.0 serves; 2.0.0, which exchanges the sides, is registered beside it. Two studies in shadow are asked for."""
    live = LiveStudies(database, tmp_path, shadow_studies=2)
    live.register("1.0.0")
    live.promote("1.0.0")
    live.register("2.0.0", SWAPPED)
    return live


def begin(live: LiveStudies, semver: str = "2.0.0") -> None:
    registry = cast(ModelRegistry, live.models)
    start_shadow(live.database, registry, live.learning, MODEL, semver, actor="user:test")
    live.shelf.forget(MODEL)


def runs(live: LiveStudies) -> list[ShadowRun]:
    with live.database.reading() as session:
        return list(session.scalars(select(ShadowRun).order_by(ShadowRun.shadow_id)))


def compare(live: LiveStudies, run: ShadowRun) -> str:
    """As the workflow does it, with what a failure becomes."""
    story = Story(attempts=1, step=lambda _name, function, *arguments: function(*arguments), wait=lambda _seconds: None)
    return story.shadow_result(live.shadows, str(run.shadow_id), run.workflow_id)


def everything(live: LiveStudies) -> dict[str, Any]:
    """Every row of every table but those of shadow runs and alarms, and every file of the spool with its size."""
    found: dict[str, Any] = {}
    with live.database.reading() as session:
        for table in Record.metadata.sorted_tables:
            if table.name not in ("shadow_runs", "alarms"):
                found[table.name] = sorted(map(repr, session.execute(select(table))))
    root = live.spool.root
    found["spool"] = {str(p.relative_to(root)): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}
    return found


def test_each_judged_result_is_compared_until_enough_studies_are_and_nothing_else_comes_of_it(
    live: LiveStudies,
) -> None:
    begin(live)
    uids = [live.receive(n) for n in range(3)]
    assert [live.make(uid) for uid in uids] == ["released"] * 3
    assert [call["argument"] for call in live.queue.calls if call["workflow"] == SHADOW_RESULT] == [
        str(run.shadow_id) for run in runs(live)
    ]
    assert {call["queue"] for call in live.queue.calls if call["workflow"] == SHADOW_RESULT} == {"shadow"}
    assert [run.result_id for run in runs(live)] == [live.results(uid)[0].result_id for uid in uids[:2]]
    calls, before = len(live.queue.calls), everything(live)

    assert [compare(live, run) for run in runs(live)] == ["done", "done"]

    assert everything(live) == before
    assert len(live.queue.calls) == calls
    first = runs(live)[0]
    assert (first.state, first.verdict, first.attempts) == ("done", "hold", 1)
    assert first.dice == {"left structure": 0.0, "right structure": 0.0}
    assert first.figures is not None
    champion, beside = first.figures["champion"], first.figures["shadow"]
    assert (champion["version"], champion["verdict"], beside["version"], beside["verdict"]) == (
        "1.0.0",
        "pass",
        "2.0.0",
        "hold",
    )
    volumes = champion["volumes_ml"]
    assert beside["volumes_ml"]["left structure"] == pytest.approx(volumes["right structure"])
    assert min(champion["seconds"], beside["seconds"], champion["confidence"], beside["confidence"]) > 0
    assert [check["name"] for check in first.figures["checks"]] == ["laterality"]
    assert compare(live, first) == "done"  # the step again, after a crash behind it
    assert runs(live)[0].attempts == 1

    with live.database.reading() as session:
        progress = shadow_progress(session, MODEL, "2.0.0", wanted=2)
    assert (progress.done, progress.pending, progress.failed, progress.is_enough) == (2, 0, 0, True)
    assert progress.dice["left structure"] == (0.0, 0.0)
    assert progress.other_verdicts == {"pass → hold": 2}


def test_a_good_version_agrees_with_the_champion(live: LiveStudies) -> None:
    live.register("3.0.0", GOOD)
    begin(live, "3.0.0")
    live.make(live.receive(1))
    (run,) = runs(live)
    assert compare(live, run) == "done"
    (run,) = runs(live)
    assert run.dice is not None
    assert min(run.dice.values()) > 0.95
    assert run.verdict == "pass"


def test_what_is_not_in_shadow_or_serves_itself_gets_no_run(live: LiveStudies) -> None:
    live.make(live.receive(1))
    begin(live)
    live.promote("2.0.0")
    live.make(live.receive(2))
    assert runs(live) == []


def test_it_stands_back_while_a_result_waits_for_a_model_and_comes_again_later(live: LiveStudies) -> None:
    begin(live)
    live.make(live.receive(1))
    waiting = live.receive(2)
    delays = []
    for _ in range(3):
        (run,) = runs(live)
        assert compare(live, run) == "waits"
        delays.append(live.queue.calls[-1]["delay_s"])
        assert compare(live, run) == "pending"  # an old turn has nothing to do any more
    assert delays == [5.0, 10.0, 20.0]
    (run,) = runs(live)
    assert (run.state, run.attempts) == ("pending", 0)
    assert live.queue.ids[-1] == run.workflow_id
    live.make(waiting)
    assert compare(live, run) == "done"


def test_a_failure_is_said_of_the_version_in_shadow_and_of_nothing_else(
    live: LiveStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(live)
    uid = live.receive(1)
    live.make(uid)
    before = everything(live)

    def raising(_model: RegisteredModel, _volume: Volume, **_options: Any) -> Any:
        raise ZeroDivisionError("the network divides by zero")

    monkeypatch.setattr(live.shelf, "predict", raising)
    (run,) = runs(live)
    assert compare(live, run) == "failed"
    assert everything(live) == before
    (run,) = runs(live)
    assert (run.state, run.state_reason) == ("failed", "compare: Permanent: the network divides by zero")
    assert live.current(uid) == [("1.0.0", "released")]
    with live.database.reading() as session:
        (alarm,) = [a for a in open_alarms(session) if a.kind == shadow.FAILED]
        progress = shadow_progress(session, MODEL, "2.0.0", wanted=2)
    assert alarm.subject == f"model:{MODEL} 2.0.0"
    assert (progress.failed, progress.reasons) == (1, (run.state_reason,))
    stop_shadow(live.database, cast(ModelRegistry, live.models), MODEL, actor="user:test")
    assert shadow.FAILED not in live.alarms()


def test_a_version_that_fails_as_often_as_it_was_to_be_compared_gets_no_more_runs(
    live: LiveStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(live)
    monkeypatch.setattr(shadow, "infer_part", _refuse)
    for n in range(4):
        live.make(live.receive(n))
        for run in runs(live):
            compare(live, run)
    assert [run.state for run in runs(live)] == ["failed", "failed"]


def _refuse(*_: Any, **__: Any) -> Any:
    raise Rejected("no")


def test_a_version_that_ends_its_worker_is_given_up_and_gets_no_more_runs(
    live: LiveStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(live)
    live.make(live.receive(1))

    def dies(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shadow, "infer_part", dies)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                live.shadows.compare(*_turn(live))
    with pytest.raises(Permanent, match="begun 2 times and never finished"):
        live.shadows.compare(*_turn(live))
    (run,) = runs(live)
    assert compare(live, run) == "failed"
    live.make(live.receive(2))
    assert len(runs(live)) == 1


def test_after_a_crash_in_its_middle_the_run_is_made_again(live: LiveStudies, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(live)
    live.make(live.receive(1))
    with monkeypatch.context() as patch:
        patch.setattr(shadow, "label_dice", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            live.shadows.compare(*_turn(live))
    live.new_process()
    (run,) = runs(live)
    assert compare(live, run) == "done"
    assert runs(live)[0].attempts == 2


def _turn(live: LiveStudies) -> tuple[str, str]:
    (run,) = runs(live)
    return str(run.shadow_id), run.workflow_id


@pytest.mark.parametrize("why", ["stopped", "superseded"])
def test_a_comparison_that_has_lost_its_sense_is_skipped(live: LiveStudies, why: str) -> None:
    begin(live)
    uid = live.receive(1)
    live.make(uid)
    if why == "stopped":
        stop_shadow(live.database, cast(ModelRegistry, live.models), MODEL, actor="user:test")
        live.shelf.forget(MODEL)
    else:
        with live.database.session() as session:
            session.scalars(select(Result)).one().state = "superseded"
    (run,) = runs(live)
    assert compare(live, run) == "skipped"
    assert runs(live)[0].state_reason in (
        "the version no longer runs in shadow",
        "the champion's result was superseded before the shadow ran",
    )


def test_a_series_that_its_contract_excludes_is_a_failed_run_with_the_criterion(live: LiveStudies) -> None:
    begin(live)
    live.make(live.receive(1))
    model = live.models.get(MODEL, "2.0.0")
    bundle = live.shelf.bundle(model)
    object.__setattr__(bundle.contract, "modalities", ("MR",))
    (run,) = runs(live)
    assert compare(live, run) == "failed"
    assert "may not run on this series: modality: Modality (0008,0060) is CT" in str(runs(live)[0].state_reason)


def test_a_registry_that_is_away_keeps_no_study_waiting(live: LiveStudies, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(live)
    uid = live.receive(1)
    live.make(uid, until="infer")

    def away(_name: str) -> RegisteredModel:
        raise DatabaseAway("no answer")

    monkeypatch.setattr(live.shelf, "shadow", away)
    assert live.work.judge(live.results(uid)[0].result_id) == "pass"
    assert runs(live) == []


def test_only_another_registered_version_with_its_files_can_run_in_shadow_and_the_ledger_says_who_wanted_it(
    live: LiveStudies,
) -> None:
    registry = cast(ModelRegistry, live.models)

    def start(semver: str) -> None:
        start_shadow(live.database, registry, live.learning, MODEL, semver, actor="user:test")

    with pytest.raises(ModelMissing):
        start("9.0.0")
    with pytest.raises(Rejected, match="serves already"):
        start("1.0.0")
    live.models.models[1] = _with_other_weights(live.models.models[1])
    with pytest.raises(ModelChanged):
        start("2.0.0")
    live.register("3.0.0")
    for _ in range(2):
        start("3.0.0")
    assert [stop_shadow(live.database, registry, MODEL, actor="user:test") for _ in range(2)] == ["3.0.0", None]
    live.learning = LiveStudies.learning_of(shadow_studies=0)
    with pytest.raises(Rejected, match="asks for no studies in shadow"):
        start("3.0.0")
    with live.database.reading() as session:
        events = [e for e in ledger.events(session, f"model:{MODEL}") if e.kind.startswith("shadow-")]
    assert [(e.kind, e.actor, e.detail["semver"]) for e in events] == [
        ("shadow-started", "user:test", "3.0.0"),
        ("shadow-stopped", "user:test", "3.0.0"),
    ]


def _with_other_weights(model: RegisteredModel) -> RegisteredModel:
    return RegisteredModel(**{**vars(model), "weights_digest": "0" * 64})


class _Labels:
    """Stands for bundle and prediction: names with their regions, and an array."""

    def __init__(self, array: Any, **regions: tuple[int, ...]) -> None:
        self.labels = [type("Spec", (), {"name": name, "region": region}) for name, region in regions.items()]
        self.inferred = cast(
            Inferred,
            type(
                "Made", (), {"bundle": self, "prediction": type("P", (), {"labels": type("L", (), {"array": array})})}
            ),
        )


def test_labels_are_compared_by_name_whatever_value_each_version_gives_them() -> None:
    ours = np.zeros((2, 3, 4), np.uint8)
    theirs = np.zeros((2, 3, 4), np.uint8)
    ours[0, 0, :4] = 1
    theirs[0, 0, :2] = 7
    ours[1, 0, :3] = theirs[1, 0, :3] = 3
    champion = _Labels(ours, liver=(1,), both=(3,), gone=(4,), absent=(5,))
    beside = _Labels(theirs, liver=(7,), both=(3,), new=(8,), absent=(5,))
    assert label_dice(ours, cast(Any, champion), beside.inferred) == {
        "liver": pytest.approx(2 * 2 / 6),
        "both": 1.0,
        "absent": None,
    }
