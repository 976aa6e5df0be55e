"""What a canary study is for the rest of the gateway: routed past the rules, released to nobody, counted nowhere."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from sqlalchemy import func, select
from typer.testing import CliRunner

from gateway import study_state
from gateway.cli import app
from gateway.delivery.release import Release, send_unsent, unsent_studies
from gateway.destination_settings import DestinationSettings
from gateway.intake.routing import route_version
from gateway.intake.routing_rules import parse_rules
from gateway.metrics import exposition
from gateway.monitoring.canary_removal import remove_old
from gateway.monitoring.canary_watch import CanaryWatch, overdue, record
from gateway.settings import GatewaySettings, SchedulerSettings, Settings, load_settings
from gateway.state import prepare_state
from gateway.web import readiness
from storage import ledger
from storage.alarms import open_alarms, raise_alarm, take_on
from storage.canary_records import CANARY_RULE, CanaryRun
from storage.database import Database
from storage.learning_records import ShadowRun
from storage.records import (
    Association,
    Delivery,
    Instance,
    LedgerEvent,
    Record,
    Result,
    ResultObject,
    ResultState,
    RoutingDecision,
    Series,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)
from storage.spool import Spool, study_key
from tests.support.canary_rows import AE, SERIES, UID, add_canary, add_objects, add_run
from tests.support.config_folder import write_config
from tests.support.story_rows import NotedQueue, add_result, add_study, add_version

RULES = parse_rules(
    'time_zone = "UTC"\n[[rules]]\nname = "mr"\nmodel = "liver"\n'
    'when.all = [{ attribute = "Modality", op = "equals", value = "MR" }]\n',
    source="test",
)
DESTINATIONS = DestinationSettings.model_validate(
    {"dimse": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}]}
)


def header(_path: str) -> Dataset:
    dataset = Dataset()
    dataset.Modality = "MR"
    return dataset


def routed(
    database: Database, *, with_run: bool = True, calling_ae: str = AE, peer_address: str = "127.0.0.1"
) -> tuple[str, list[RoutingDecision], Study]:
    with database.session() as session:
        if with_run:
            add_run(session)
        add_study(session, StudyState.WHOLE, uid=UID)
        objects = add_objects(session, calling_ae=calling_ae, peer_address=peer_address)
        version = add_version(session, uid=UID, routed=False)
        version.object_ids = [row.object_id for row in objects]
    found = route_version(database, header, f"{UID} v1", RULES, canary_ae=AE)
    with database.reading() as session:
        return found.outcome, list(session.scalars(select(RoutingDecision))), session.get_one(Study, UID)


@pytest.mark.requirement("OPS-59")
def test_a_canary_goes_to_its_model_and_the_rules_are_not_asked(database: Database) -> None:
    outcome, (decision,), study = routed(database)
    assert (outcome, study.state) == ("matched", StudyState.PROCESSING)
    assert (decision.rule, decision.model, decision.matched) == (CANARY_RULE, "tiny", True)
    assert decision.explanation["reason"] == "a canary of tiny 1.0.0"


@pytest.mark.parametrize(
    ("with_run", "calling_ae", "peer_address", "reason"),
    [
        (False, AE, "127.0.0.1", "no canary was sent with its UID"),
        (True, "CT1", "127.0.0.1", "came from elsewhere"),
        (True, AE, "10.1.2.3", "came from elsewhere"),
    ],
)
def test_what_only_looks_like_a_canary_is_run_by_nobody(
    database: Database, with_run: bool, calling_ae: str, peer_address: str, reason: str
) -> None:
    outcome, (decision,), study = routed(database, with_run=with_run, calling_ae=calling_ae, peer_address=peer_address)
    assert (outcome, study.state, decision.model) == ("unmatched", StudyState.UNMATCHED, None)
    assert reason in decision.explanation["reason"]


def test_any_other_study_is_judged_by_the_rules(database: Database) -> None:
    outcome, (decision,), _ = routed(database, with_run=False, calling_ae="CT1", peer_address="10.1.2.3")
    assert (outcome, decision.rule, decision.model) == ("matched", "mr", "liver")


@pytest.mark.requirement("OPS-59")
@pytest.mark.parametrize("verdict", ["pass", "hold"])
def test_it_is_released_without_a_delivery_and_nothing_makes_one_later(database: Database, verdict: str) -> None:
    with database.session() as session:
        add_canary(session, verdict=verdict)
    queue = NotedQueue()
    step = Release(database=database, destinations=DESTINATIONS, enqueuer=queue)
    assert [step.release("canary") for _ in range(2)] == ["released"] * 2
    assert [(call["workflow"], call["argument"]) for call in queue.calls] == [("run_job", "canary-check")]
    with database.reading() as session:
        assert unsent_studies(session) == []
        study = session.get_one(Study, UID)
        assert (study.state, study.state_reason) == (StudyState.VERIFIED, study_state.OF_A_CANARY)
        (event,) = ledger.events(session, ledger.study_subject(UID))
        assert (event.kind, event.detail["destinations"], event.detail["canary"]) == ("released", [], True)
    assert send_unsent(database, queue, DESTINATIONS) == 0
    with database.reading() as session:
        assert session.scalars(select(Delivery)).all() == []
        assert open_alarms(session) == []


def test_it_is_in_no_figure_and_in_no_list(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    settings = load_settings(config)
    database = prepare_state(settings)
    with database.session() as session:
        add_canary(session, ResultState.RELEASED)
        study_state.refresh(session, UID)
        add_study(session, StudyState.VERIFIED, uid="1.2")
        add_version(session, uid="1.2")
        add_result(session, ResultState.RELEASED, uid="1.2", verdict="pass", finished_at=utc_now())
    spool = Spool(settings.spool_dir, reserve_bytes=0)
    lines = exposition(database, spool).decode().splitlines()
    assert 'seggate_studies{state="verified"} 1.0' in lines
    assert [line for line in lines if line.startswith("seggate_results_total")] == [
        'seggate_results_total{model="tiny",state="released",verdict="pass",version="1.0.0"} 1.0'
    ]
    listed = json.loads(CliRunner().invoke(app, ["studies", "--json", "--config", str(config)]).stdout)
    assert [row["study_uid"] for row in listed] == ["1.2"]


# -- what became of it ---------------------------------------------------------------------------------------------


def alarms(database: Database) -> dict[str, str]:
    with database.reading() as session:
        return {alarm.subject: alarm.message for alarm in open_alarms(session) if alarm.kind == "canary"}


@pytest.mark.requirement("OPS-59")
def test_a_wrong_one_is_an_alarm_of_its_model_until_a_good_one(database: Database) -> None:
    with database.session() as session:
        first, second = add_run(session), add_run(session, uid="2.25.44")
        record(session, first, outcome="wrong", detail="there is no SR")
        assert record(session, first, outcome="good", detail=None) == "wrong"  # judged once
    assert alarms(database) == {"model:tiny": "the canary of tiny: version 1.0.0, there is no SR"}
    with database.session() as session:
        record(session, add_run(session, uid="2.25.45"), outcome="void", detail="another version serves")
    assert len(alarms(database)) == 1
    with database.session() as session:
        record(session, session.merge(second), outcome="good", detail=None, seconds=2.0, dice={"a": 1.0, "b": None})
    assert alarms(database) == {}
    with database.reading() as session:
        assert session.get_one(CanaryRun, "2.25.44").dice == {"a": 1.0, "b": None}


@pytest.mark.requirement("OPS-59")
def test_a_late_one_says_where_it_stands(database: Database) -> None:
    with database.session() as session:
        run = add_run(session, within_s=60)
        assert overdue(session, run, run.due_at) is None
        later = run.due_at + timedelta(seconds=1)
        assert overdue(session, run, later) == (
            "wrong",
            "slow: no result within 60 s; none of its objects is in the index, is the indexer up?",
        )
        study = add_study(session, StudyState.RECEIVING, uid=UID)
        study.state_reason = "waiting for quiet"
        found = overdue(session, run, later)
        assert found is not None
        assert found[1].endswith("its study is receiving: waiting for quiet")
        add_version(session, uid=UID)
        result = add_result(session, ResultState.PENDING, uid=UID)
        for attempts, says in ((0, "no worker has begun its inference"), (1, "an inference was begun")):
            result.attempts = attempts
            found = overdue(session, run, later)
            assert found is not None
            assert found[1].endswith(says)
        result.state, result.finished_at = ResultState.RELEASED, run.due_at
        assert overdue(session, run, later) is None  # in time, and only not compared yet
        result.finished_at = later
        assert overdue(session, run, later) is not None
        run.sent_at = None
        assert overdue(session, run, later) == ("void", "its sender ended before all of it was sent")


@pytest.mark.requirement("OPS-59")
def test_where_no_worker_is_there_the_scheduler_tells(database: Database) -> None:
    watch, queue = CanaryWatch(database, within_s=60), NotedQueue()
    due = utc_now()
    watch.note("job canary 1", due)
    assert watch.look(queue, due + timedelta(seconds=50)) == 0
    assert watch.look(queue, due + timedelta(seconds=70)) == 1
    assert list(alarms(database)) == ["gateway"]
    assert "has not ended; is a worker up?" in alarms(database)["gateway"]
    queue.gone["job canary 1"] = "SUCCESS"
    with database.session() as session:
        run = add_run(session)
    assert watch.look(queue, run.due_at + timedelta(seconds=10)) == 0  # a worker has a moment to say it
    assert watch.look(queue, run.due_at + timedelta(seconds=40)) == 1
    assert "no worker has compared it" in alarms(database)["model:tiny"]
    assert watch.look(queue, run.due_at + timedelta(seconds=50)) == 0  # once
    with database.session() as session:
        record(session, add_run(session, uid="2.25.44"), outcome="good", detail=None)
    assert alarms(database) == {}


def test_readiness_depends_on_it_where_one_is_configured(database: Database, tmp_path: Path) -> None:
    spool = Spool(tmp_path, reserve_bytes=0)
    spool.prepare()

    def said(cron: str) -> str | None:
        settings = Settings(
            folder=tmp_path,
            gateway=GatewaySettings(scheduler=SchedulerSettings(canary_cron=cron)),
            destinations=DestinationSettings(),
        )
        return readiness(settings, database, spool).get("canary")

    assert (said(""), said("*/5 * * * *")) == (None, "ok")
    with database.session() as session:
        alarm = raise_alarm(session, kind="canary", subject="model:tiny", message="wrong")
    assert said("*/5 * * * *") == "wrong: model:tiny; see `seggate alarms`"
    with database.session() as session:
        take_on(session, session.merge(alarm), by="ann", reason="known")
    assert said("*/5 * * * *") == "ok"


# -- its end -------------------------------------------------------------------------------------------------------


def _rows(database: Database, *tables: type[Record]) -> dict[str, int]:
    with database.reading() as session:
        return {t.__tablename__: session.scalar(select(func.count()).select_from(t)) or 0 for t in tables}


EVERYTHING = (Study, Series, Instance, Association, StudyVersion, RoutingDecision, Result, ResultObject, ShadowRun)


@pytest.mark.requirement("OPS-59")
def test_old_ones_go_with_rows_and_files_and_nothing_else_does(database: Database, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", reserve_bytes=0)
    spool.prepare()
    long_ago = utc_now() - timedelta(days=3)
    patient = "1.2.3.4"
    with database.session() as session:
        add_study(session, StudyState.VERIFIED, uid=patient).study_key = study_key(patient)
        add_objects(session, uid=patient, calling_ae="CT1")
        add_version(session, uid=patient)
        add_result(session, ResultState.RELEASED, uid=patient, result_id="patient")
        for uid, started in (("2.25.1", long_ago), ("2.25.2", utc_now()), ("2.25.3", long_ago)):
            result = add_canary(session, ResultState.RELEASED, uid=uid, result_id=f"r{uid}", started_at=started)
            session.add(
                RoutingDecision(
                    version_id=f"{uid} v1", series_instance_uid=SERIES, rule=CANARY_RULE, matched=True, explanation={}
                )
            )
            session.add(
                Series(
                    study_instance_uid=uid,
                    series_instance_uid=SERIES,
                    first_received_at=started,
                    last_received_at=started,
                )
            )
            session.add(
                ShadowRun(
                    result_id=result.result_id,
                    model_name="tiny",
                    model_version="1.1.0",
                    workflow_id=f"shadow {uid}",
                    ordered_at=started,
                    state="done",
                )
            )
            ledger.append(session, subject=ledger.study_subject(uid), kind="study-opened", actor="indexer")
            raise_alarm(session, kind="incomplete-study", subject=ledger.study_subject(uid), message="slices")
            if uid != "2.25.3":  # that one is under way, however long
                record(session, session.get_one(CanaryRun, uid), outcome="good", detail=None)
    for uid in (patient, "2.25.1", "2.25.2", "2.25.3"):
        spool.store_result_file(study_key(uid), "r", "seg.dcm", b"SEG")
    before = _rows(database, *EVERYTHING)
    assert remove_old(database, spool, keep_days=2) == 1
    after = _rows(database, *EVERYTHING)
    one_study = {"instances": 2}
    assert {name: before[name] - after[name] for name in before} == {
        name: one_study.get(name, 0 if name == "result_objects" else 1) for name in before
    }
    assert not (spool.root / "studies" / study_key("2.25.1")).exists()
    assert list((spool.root / "tmp").iterdir()) == []
    for uid in (patient, "2.25.2", "2.25.3"):
        assert (spool.root / "studies" / study_key(uid) / "results" / "r" / "seg.dcm").read_bytes() == b"SEG"
    with database.reading() as session:
        assert session.get_one(CanaryRun, "2.25.1").removed_at is not None
        events = [event.kind for event in ledger.events(session, ledger.study_subject("2.25.1"))]
        assert events == ["study-opened", "canary-removed"]
        assert ledger.verify(session) == session.scalar(select(func.count()).select_from(LedgerEvent))
        assert ledger.study_subject("2.25.1") not in {alarm.subject for alarm in open_alarms(session)}
        assert len(open_alarms(session)) == 2
    assert remove_old(database, spool, keep_days=2) == 0


def test_a_removal_that_was_cut_short_is_finished_by_the_next(database: Database, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", reserve_bytes=0)
    spool.prepare()
    with database.session() as session:
        add_canary(session, ResultState.RELEASED, started_at=utc_now() - timedelta(days=3))
        record(session, session.get_one(CanaryRun, UID), outcome="good", detail=None)
    spool.store_result_file(study_key(UID), "r", "seg.dcm", b"SEG")
    spool.set_study_aside(study_key(UID))  # and then the process died: its rows are there, its files are not in place
    assert remove_old(database, spool, keep_days=2) == 1
    assert list((spool.root / "tmp").iterdir()) == []
    assert set(_rows(database, *EVERYTHING).values()) == {0}
