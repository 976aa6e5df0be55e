"""Orders: one result per series part and model; what one model cannot be had for stops no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydicom import dcmread
from sqlalchemy import select

import gateway
from engine.bundle import Bundle, load_bundle
from engine.errors import BundleInvalid
from engine.manifest import Channel, Contract
from gateway.destination_settings import DestinationSettings
from gateway.durable import ROUTINE, URGENT
from gateway.errors import Transient
from gateway.learning.pauses import pause, resume
from gateway.learning.serving import PROMOTED, begin_period
from gateway.results.orders import Orders
from gateway.retrying import retry_study
from gateway.study_state import refresh
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import ModelChanged, ModelMissing
from storage.models import RegisteredModel
from storage.records import (
    Delivery,
    DeliveryState,
    Instance,
    InstanceState,
    LedgerEvent,
    Result,
    ResultState,
    RoutingDecision,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)
from tests.support.phantoms import write_series
from tests.support.story_rows import STUDY_UID, NotedQueue, add_delivery, add_result, add_study, add_version

_MODEL = Path(gateway.__file__).parent / "demo" / "model"
_CONTRACT = Contract(
    modalities=("CT",),
    anatomy=None,
    orientation="LPS",
    slice_axis=None,
    spacing_min_mm=(0.5, 0.5, 0.5),
    spacing_max_mm=(10.0, 10.0, 10.0),
    min_slices=2,
    max_slices=100,
    max_slice_gap_ratio=1.05,
    max_gantry_tilt_deg=10.0,
    allow_duplicates=False,
)


class Shelf:
    """Models by name; a name in `broken` raises what stands there."""

    def __init__(self, **broken: Exception) -> None:
        self.broken = broken
        self.bundles: dict[str, Bundle] = {}
        self.default = replace(load_bundle(_MODEL, verify=False), contract=_CONTRACT)

    def champion(self, name: str) -> RegisteredModel:
        if isinstance(self.broken.get(name), ModelMissing):
            raise self.broken[name]
        return self.version(name, "1.0.0")

    def version(self, name: str, semver: str) -> RegisteredModel:
        return RegisteredModel(
            name=name,
            semver=semver,
            registry_version=1,
            folder=_MODEL,
            weights_digest="w" * 64,
            configuration_digest="c" * 64,
            licence="",
            description="",
            aliases=("champion",),
            registered_at_ms=0,
        )

    def bundle(self, model: RegisteredModel) -> Bundle:
        if model.name in self.broken:
            raise self.broken[model.name]
        return self.bundles.get(model.name, self.default)


class Ward:
    """A study of one CT series, routed; `models` names what its series was sent to."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database, self.queue, self.shelf = database, NotedQueue(), Shelf()
        files = write_series(folder / "series", modality="CT").files
        with database.session() as session:
            add_study(session, StudyState.PROCESSING)
            version = add_version(session)
            version.object_ids = [f"o{number:03}" for number in range(len(files))]
            for object_id, file in zip(version.object_ids, files, strict=True):
                session.add(_instance(object_id, file))

    def route(self, *models: str, version: int = 1, priority: str = "routine", **detail: str) -> None:
        with self.database.session() as session:
            for model in models:
                session.add(
                    RoutingDecision(
                        version_id=f"{STUDY_UID} v{version}",
                        series_instance_uid=_SERIES,
                        rule=f"rule of {model}",
                        matched=not detail,
                        model=model,
                        explanation={"verdict": "matched", "priority": priority, **detail},
                    )
                )

    def order(self, version: int = 1) -> str:
        spool: Any = _Spool()
        orders = Orders(
            database=self.database, spool=spool, shelf=cast(Any, self.shelf), enqueuer=cast(Any, self.queue)
        )
        return orders.order(f"{STUDY_UID} v{version}")

    def results(self) -> dict[str, tuple[str, str | None]]:
        with self.database.reading() as session:
            return {r.model_name: (r.state, r.state_reason) for r in session.scalars(select(Result))}

    def study(self) -> tuple[str, str | None]:
        with self.database.reading() as session:
            study = session.get_one(Study, STUDY_UID)
            return study.state, study.state_reason


class _Spool:
    def resolve(self, path: str) -> Path:
        return Path(path)


_SERIES = "1.2.3.4.5"


def _instance(object_id: str, file: Path) -> Instance:
    return Instance(
        object_id=object_id,
        study_instance_uid=STUDY_UID,
        series_instance_uid=_SERIES,
        sop_instance_uid=f"1.2.3.{object_id[1:]}",
        state=InstanceState.CURRENT,
        digest="d" * 64,
        size_bytes=1,
        spool_path=str(file),
        received_at=utc_now(),
        association_id="a",
        calling_ae="CT1",
        called_ae="SEGGATE",
        peer_address="127.0.0.1",
    )


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield Ward(database, tmp_path)
    database.close()


@pytest.mark.parametrize(
    "error", [ModelMissing("no model 'sick' serves here"), ModelChanged("other files"), BundleInvalid("plans.json")]
)
def test_a_model_that_cannot_be_had_stops_no_other(ward: Ward, error: Exception) -> None:
    ward.shelf = Shelf(sick=error)
    ward.route("sick", "healthy")
    assert [ward.order() for _ in range(2)] == ["ordered"] * 2
    reason = f"order: Permanent: {error}"
    assert ward.results() == {"sick": (ResultState.FAILED, reason), "healthy": (ResultState.PENDING, None)}
    assert len(ward.queue.calls) == 1
    assert ward.study() == (StudyState.FAILED, reason)
    with ward.database.reading() as session:
        assert [(a.kind, a.count) for a in open_alarms(session)] == [("parked", 1)]


def test_after_a_retry_the_missing_model_is_ordered_and_the_other_is_not_again(ward: Ward) -> None:
    ward.shelf = Shelf(sick=ModelMissing("no model 'sick' serves here"))
    ward.route("sick", "healthy")
    ward.order()
    retried = retry_study(ward.database, ward.queue, DestinationSettings(), STUDY_UID, actor="user:test")
    assert (retried.routing, retried.results) == (1, 0)
    assert [call["workflow"] for call in ward.queue.calls] == ["make_result", "process_study"]
    assert ward.study() == (StudyState.WHOLE, None)
    ward.shelf = Shelf()
    assert ward.order() == "ordered"
    assert ward.results() == {"sick": (ResultState.PENDING, None), "healthy": (ResultState.PENDING, None)}
    assert [call["workflow"] for call in ward.queue.calls] == ["make_result", "process_study", "make_result"]


@pytest.mark.requirement("RTE-23")
@pytest.mark.parametrize(("spacing_max", "becomes"), [(0.6, "unmatched"), (10.0, "processing")])
def test_a_series_that_a_contract_excluded_is_ordered_anew_when_the_study_is_retried(
    ward: Ward, spacing_max: float, becomes: str
) -> None:
    strict = replace(_CONTRACT, spacing_max_mm=(0.6, 0.6, 0.6))
    ward.shelf.bundles["organs"] = replace(ward.shelf.default, contract=strict)
    ward.route("organs")
    assert ward.order() == "nothing-to-run"
    assert ward.study()[0] == StudyState.UNMATCHED
    with ward.database.reading() as session:
        (before,) = session.scalars(select(Result))
    retried = retry_study(ward.database, ward.queue, DestinationSettings(), STUDY_UID, actor="user:test")
    assert (retried.routing, retried.results) == (1, 0)
    assert not retry_study(ward.database, ward.queue, DestinationSettings(), STUDY_UID, actor="user:test").anything
    with ward.database.session() as session:
        session.get_one(Study, STUDY_UID).state = StudyState.PROCESSING  # as routing leaves it
        (event,) = [e for e in session.scalars(select(LedgerEvent)) if e.kind == "retried"]
    assert event.detail["reason"] == before.state_reason
    contract = replace(_CONTRACT, spacing_max_mm=(spacing_max,) * 3)
    ward.shelf.bundles["organs"] = replace(ward.shelf.default, contract=contract)
    ward.order()
    assert ward.study()[0] == becomes
    with ward.database.reading() as session:
        (after,) = session.scalars(select(Result))
        assert len(session.scalars(select(StudyVersion)).all()) == 1
    assert after.result_id == before.result_id


@pytest.mark.parametrize(("second", "expected"), [("urgent", URGENT), ("routine", ROUTINE)])
def test_a_result_is_urgent_if_any_rule_for_it_says_so(ward: Ward, second: str, expected: int) -> None:
    ward.route("organs")
    ward.route("organs", priority=second, verdict="already-routed")
    assert ward.order() == "ordered"
    assert [call["priority"] for call in ward.queue.calls] == [expected]


@pytest.mark.requirement("CMP-18")
def test_for_a_study_quarantined_meanwhile_nothing_is_queued(ward: Ward) -> None:
    ward.route("organs")
    with ward.database.session() as session:
        study = session.get_one(Study, STUDY_UID)
        study.state, study.state_reason = StudyState.QUARANTINED, "two patients"
    assert ward.order() == "nothing-to-run"
    assert ward.results() == {"organs": (ResultState.HELD, "the study is quarantined: two patients")}
    assert ward.queue.calls == []
    assert ward.study() == (StudyState.QUARANTINED, "two patients")


@pytest.mark.requirement("OPS-66", open="edit and reject rates of readers; what starts a shadow")
def test_for_a_paused_model_the_result_waits_and_the_others_run(ward: Ward) -> None:
    with ward.database.session() as session:
        pause(session, "organs", by="user:ann", reason="a new scanner")
    ward.route("organs", "other")
    assert [ward.order() for _ in range(2)] == ["ordered"] * 2
    waits = (ResultState.HELD, "model paused: a new scanner")
    assert ward.results() == {"organs": waits, "other": (ResultState.PENDING, None)}
    assert ward.study()[0] == StudyState.PROCESSING
    with ward.database.session() as session:
        (other,) = session.scalars(select(Result).where(Result.model_name == "other"))
        other.state = ResultState.RELEASED
        refresh(session, STUDY_UID)
    assert ward.study() == waits  # held, and not finished
    before = len(ward.queue.calls)
    with ward.database.session() as session:
        assert resume(session, ward.queue, "organs", by="user:ann").results == 1
    assert ward.results()["organs"] == (ResultState.PENDING, None)
    assert [call["workflow"] for call in ward.queue.calls[before:]] == ["make_result"]
    assert ward.study()[0] == StudyState.PROCESSING
    assert ward.order() == "ordered"
    assert len(ward.results()) == 2


@pytest.mark.requirement("CMP-17", open="withdrawal of the old result in the PACS")
def test_a_version_that_the_model_may_not_run_on_supersedes_the_released_result(ward: Ward) -> None:
    ward.shelf.bundles["organs"] = replace(ward.shelf.default, contract=replace(_CONTRACT, modalities=("MR",)))
    with ward.database.session() as session:
        session.get_one(Study, STUDY_UID).version = 2
        add_version(session, 2).object_ids = session.get_one(StudyVersion, f"{STUDY_UID} v1").object_ids
        for name in ("organs", "other"):
            old = add_result(session, ResultState.RELEASED, result_id=f"old {name}")
            old.model_name, old.series_instance_uid = name, _SERIES
            add_delivery(session, DeliveryState.QUEUED, result_id=f"old {name}")
    ward.route("organs", version=2)
    assert ward.order(2) == "nothing-to-run"
    with ward.database.reading() as session:
        old_reasons = {n: session.get_one(Result, f"old {n}").state_reason or "" for n in ("organs", "other")}
        assert session.get_one(Result, "old organs").state == ResultState.SUPERSEDED
        assert {d.state for d in session.scalars(select(Delivery))} == {DeliveryState.WITHHELD}
        assert "result-superseded-without-replacement" in {a.kind for a in open_alarms(session)}
    assert "modality: Modality (0008,0060) is CT" in old_reasons["organs"]
    assert old_reasons["other"].endswith("no rule sends the series to the model")


@pytest.mark.requirement("INF-37")
def test_a_model_of_two_channels_is_not_run_and_says_so(ward: Ward) -> None:
    ward.route("organs")
    channels = (Channel(index=0, name="T1"), Channel(index=1, name="T2"))
    ward.shelf.bundles["organs"] = replace(ward.shelf.default, channels=channels)
    assert ward.order() == "nothing-to-run"
    reason = "channels: the model wants 2 channels; one series gives 1"
    assert ward.results() == {"organs": (ResultState.NOT_RUN, reason)}


@pytest.mark.requirement("INF-37")
@pytest.mark.requirement("CMP-20")
def test_a_volume_of_two_contrasts_is_not_run_and_the_ledger_names_the_attribute(ward: Ward, tmp_path: Path) -> None:
    for file in sorted((tmp_path / "series").iterdir())[:3]:
        ds = dcmread(file)
        ds.KVP = "80"
        ds.save_as(file)
    ward.shelf.bundles["organs"] = replace(ward.shelf.default, contract=_CONTRACT)
    ward.route("organs")
    assert ward.order() == "nothing-to-run"
    state, reason = ward.results()["organs"]
    assert state == ResultState.NOT_RUN
    assert reason is not None
    assert reason.startswith("contents: slices differ in KVP (0018,0060)")
    with ward.database.reading() as session:
        (event,) = [e for e in session.scalars(select(LedgerEvent)) if e.kind == "ordered"]
    assert event.detail["results"][0]["refused"] == [{"criterion": "contents", "value": ["KVP"], "limit": []}]


def serve(ward: Ward, semver: str) -> None:
    """Another version of "organs" is to serve: the shelf has not noticed."""
    model = ward.shelf.version("organs", semver)
    with ward.database.session() as session:
        begin_period(session, model, kind=PROMOTED, actor="t", previous=None, ended_why="", detail={})


def ordered_versions(ward: Ward) -> list[str]:
    with ward.database.reading() as session:
        return [r.model_version for r in session.scalars(select(Result))]


@pytest.mark.requirement("ART-23", open="the suite, shadow running, what watches the first studies")
def test_a_withdrawn_version_that_a_worker_still_has_at_hand_gets_no_new_study(ward: Ward) -> None:
    ward.route("organs")
    serve(ward, "0.9.0")
    assert ward.order() == "ordered"
    assert ordered_versions(ward) == ["0.9.0"]


def test_what_is_promoted_while_a_study_is_planned_is_what_it_is_ordered_with(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward.route("organs")
    serve(ward, "1.0.0")
    bundle = ward.shelf.bundle

    def promoted_meanwhile(model: RegisteredModel) -> Bundle:
        if model.semver == "1.0.0":
            serve(ward, "1.1.0")
        return bundle(model)

    monkeypatch.setattr(ward.shelf, "bundle", promoted_meanwhile)
    with pytest.raises(Transient, match="is planned again"):  # the story repeats the step
        ward.order()
    assert (ordered_versions(ward), ward.queue.calls) == ([], [])
    assert ward.order() == "ordered"
    assert ordered_versions(ward) == ["1.1.0"]
    assert len(ward.queue.calls) == 1
