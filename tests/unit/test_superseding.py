"""What a newer version of a study makes of the older results, with and without a result of its own (CMP-17)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import steps, superseding
from gateway.delivery.release import Release
from gateway.destination_settings import DestinationSettings
from gateway.steps import StudyWork
from storage.alarms import open_alarms, raise_alarm
from storage.database import Database
from storage.records import Delivery, DeliveryState, LedgerEvent, Result, ResultState, StudyState, StudyVersion
from tests.support.story_rows import STUDY_UID, NotedQueue, add_delivery, add_result, add_study, add_version

_HOLD = [{"name": "volume", "segment": "Anterior", "value": 9.5, "limit": "0.79 to 3.1 ml", "verdict": "hold"}]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


def add_versions(session: Session, count: int) -> None:
    add_study(session, StudyState.PROCESSING, version=count)
    for number in range(1, count + 1):
        add_version(session, number)


def add(session: Session, state: ResultState, version: int, *, part: str = "", verdict: str = "pass") -> Result:
    """A result of a version; what was released is on its way to the EMR and has arrived in the PACS."""
    result_id = f"v{version}{part}"
    result = add_result(session, state, result_id=result_id, version=version, verdict=verdict)
    result.part = part
    if state == ResultState.PENDING and verdict == "hold":
        result.checks = _HOLD
    if state == ResultState.RELEASED:
        add_delivery(session, DeliveryState.VERIFIED, result_id=result_id, destination="pacs")
        add_delivery(session, DeliveryState.QUEUED, result_id=result_id, destination="emr")
    session.flush()
    return result


def predecessor(session: Session, result: Result, *parts: str) -> str | None:
    version = session.get_one(StudyVersion, result.version_id)
    return superseding.predecessor(session, version, result, parts or (result.part,))


def release(database: Database, result_id: str) -> str:
    return Release(database=database, destinations=DestinationSettings(), enqueuer=NotedQueue()).release(result_id)


def states(database: Database) -> dict[str, str]:
    with database.reading() as session:
        return {r.result_id: r.state for r in session.scalars(select(Result))}


def emr_delivery(database: Database, result_id: str = "v1") -> tuple[str, str | None]:
    with database.reading() as session:
        delivery = session.get_one(Delivery, f"{result_id} to emr")
        return delivery.state, delivery.state_reason


def alarms(database: Database) -> set[str]:
    with database.reading() as session:
        return {a.kind for a in open_alarms(session)} - {"no-destination"}


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_the_third_version_refers_to_the_released_first_and_not_to_the_held_second(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 3)
        add(session, ResultState.RELEASED, 1)
        add(session, ResultState.HELD, 2, verdict="hold")
        third = add(session, ResultState.PENDING, 3)
        assert predecessor(session, third) == "v1"
    assert release(database, "v3") == "released"
    assert states(database) == {"v1": "superseded", "v2": "superseded", "v3": "released"}
    assert emr_delivery(database) == ("withheld", "replaced by result v3")


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_a_held_version_supersedes_without_replacement_and_the_next_still_refers_to_the_first(
    database: Database,
) -> None:
    with database.session() as session:
        add_versions(session, 2)
        add(session, ResultState.RELEASED, 1)
        add(session, ResultState.PENDING, 2, verdict="hold")
    assert release(database, "v2") == "held"
    assert states(database) == {"v1": "superseded", "v2": "held"}
    state, reason = emr_delivery(database)
    assert state == "withheld"
    assert str(reason).startswith("a newer version of the study gave no result: held by QA: volume Anterior")
    assert alarms(database) == {"result-held", "result-superseded-without-replacement"}
    with database.session() as session:
        detail = session.scalars(select(LedgerEvent).where(LedgerEvent.kind == "superseded")).one().detail
        assert (detail["result_id"], detail["by"], detail["withheld"]) == ("v1", None, ["emr"])
        add_version(session, 3)
        assert predecessor(session, add(session, ResultState.PENDING, 3)) == "v1"


@pytest.mark.parametrize(
    ("old", "new", "referred"),
    [
        pytest.param([""], ["EchoTime=4.9"], {"EchoTime=4.9": "v1"}, id="one volume under another key"),
        pytest.param([""], ["a", "b"], {"a": "v1", "b": "v1"}, id="one volume falls into two"),
        pytest.param(["a", "b"], [""], {"": None}, id="two volumes become one: no single predecessor"),
        pytest.param(["a", "b"], ["a", "c"], {"a": "v1a", "c": "v1b"}, id="one of two has another key"),
        pytest.param(["a"], ["a", "b"], {"a": "v1a", "b": None}, id="a new part replaces nothing"),
    ],
)
def test_parts_that_changed_their_key_are_matched_by_series_and_model(
    database: Database, old: list[str], new: list[str], referred: dict[str, str | None]
) -> None:
    with database.session() as session:
        add_versions(session, 2)
        for part in old:
            add(session, ResultState.RELEASED, 1, part=part)
        made = [add(session, ResultState.PENDING, 2, part=part) for part in new]
        assert {r.part: predecessor(session, r, *new) for r in made} == referred
    for part in new:
        assert release(database, f"v2{part}") == "released"
    found = states(database)
    assert {found[f"v1{part}"] for part in old} == {"superseded"}
    assert alarms(database) == set()


def test_a_part_waits_for_its_own_successor(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 2)
        for part in ("a", "b"):
            add(session, ResultState.RELEASED, 1, part=part)
            add(session, ResultState.PENDING, 2, part=part, verdict="hold" if part == "b" else "pass")
    assert release(database, "v2a") == "released"
    assert states(database)["v1b"] == "released"
    assert release(database, "v2b") == "held"
    assert states(database)["v1b"] == "superseded"
    assert "result-superseded-without-replacement" in alarms(database)


def test_results_of_other_series_and_models_are_left_alone(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 2)
        add_result(session, ResultState.RELEASED, result_id="other model").model_name = "other"
        add_result(session, ResultState.RELEASED, result_id="other series").series_instance_uid = "1.9"
        made = add(session, ResultState.PENDING, 2)
        assert predecessor(session, made) is None
    assert release(database, "v2") == "released"
    assert states(database) == {"other model": "released", "other series": "released", "v2": "released"}


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_a_version_that_no_rule_wants_supersedes_what_was_released(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.session() as session:
        add_versions(session, 2)
        add(session, ResultState.RELEASED, 1)
    monkeypatch.setattr(steps, "route_version", lambda *_, **_more: SimpleNamespace(outcome="unmatched"))
    routes: Any = SimpleNamespace(current=lambda: None)
    work = StudyWork(database=database, routes=routes, headers=cast(Any, None), orders=cast(Any, None))
    assert [work.route(f"{STUDY_UID} v2") for _ in range(2)] == ["unmatched"] * 2
    assert states(database) == {"v1": "superseded"}
    assert emr_delivery(database)[0] == "withheld"
    assert alarms(database) == {"result-superseded-without-replacement"}
    with database.reading() as session:
        assert len(session.scalars(select(LedgerEvent)).all()) == 1


# -- the alarm of a held result ------------------------------------------------------------------------------------


def held(session: Session, version: int, *, part: str = "") -> None:
    add(session, ResultState.HELD, version, part=part, verdict="hold")
    raise_alarm(session, kind="result-held", subject=f"study:{STUDY_UID}", message="held")


def test_the_alarm_of_a_held_result_goes_when_a_newer_version_replaces_it(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 2)
        held(session, 1)
        add(session, ResultState.PENDING, 2)
    assert alarms(database) == {"result-held"}
    assert [release(database, "v2") for _ in range(2)] == ["released"] * 2
    assert alarms(database) == set()


def test_the_alarm_stays_while_another_result_is_held(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 2)
        for part in ("a", "b"):
            held(session, 1, part=part)
            add(session, ResultState.PENDING, 2, part=part)
    assert release(database, "v2a") == "released"
    assert alarms(database) == {"result-held"}
    assert release(database, "v2b") == "released"
    assert alarms(database) == set()


def test_a_newer_result_that_is_held_too_keeps_the_alarm(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 2)
        held(session, 1)
        add(session, ResultState.PENDING, 2, verdict="hold")
    assert release(database, "v2") == "held"
    assert states(database) == {"v1": "superseded", "v2": "held"}
    assert alarms(database) == {"result-held"}


def test_the_alarm_goes_when_no_rule_wants_the_series_any_more(database: Database) -> None:
    with database.session() as session:
        add_versions(session, 2)
        held(session, 1)
        superseding.no_longer_wanted(session, session.get_one(StudyVersion, f"{STUDY_UID} v2"))
    assert states(database) == {"v1": "superseded"}
    assert alarms(database) == set()
