"""gateway.monitoring.canary: what is sent, what is not and why, and how a result is compared."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import select

from engine.bundle import Bundle
from engine.errors import BundleInvalid
from engine.volume import Geometry
from gateway.learning.pauses import pause
from gateway.monitoring.canary import Canary
from gateway.settings import Settings
from storage.alarms import open_alarms
from storage.canary_records import CanaryRun
from storage.database import Database
from storage.models import RegisteredModel
from storage.records import Result, ResultObject, ResultState, utc_now
from storage.spool import Spool, study_key
from tests.support.canary_rows import UID, add_canary
from tests.support.config_folder import settings_in
from tests.support.intensity_model import write_intensity_bundle
from tests.support.pacs import free_port
from tests.support.sanity_bundle import SPACING_MM, asymmetric_case, with_sanity_cases
from tests.support.story_rows import NotedQueue

NAME = "tiny"


class Registry:
    """One model that serves; also the shelf, which gives its bundle or raises what stands there."""

    def __init__(self, bundle: Bundle | Exception) -> None:
        self.found = bundle

    def version(self, name: str, semver: str) -> RegisteredModel:
        return RegisteredModel(
            name=name,
            semver=semver,
            registry_version=1,
            folder=Path(),
            weights_digest="w" * 64,
            configuration_digest="c" * 64,
            licence="",
            description="",
            aliases=("champion",),
            registered_at_ms=0,
        )

    def all(self) -> list[RegisteredModel]:
        return [self.version(NAME, "1.0.0"), replace(self.version(NAME, "0.9.0"), aliases=("previous",))]

    def bundle(self, model: RegisteredModel) -> Bundle:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    plain = write_intensity_bundle(tmp_path_factory.mktemp("bundle"), name=NAME, spacing_mm=SPACING_MM)
    return with_sanity_cases(plain, {"plans-grid": asymmetric_case()})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    yield database
    database.close()


class Nest:
    """A canary's surroundings: nobody listens at its receiver."""

    def __init__(self, folder: Path, database: Database, bundle: Bundle | Exception) -> None:
        self.database, self.queue = database, NotedQueue()
        self.settings: Settings = settings_in(folder, port=free_port())
        self.spool = Spool(self.settings.spool_dir, reserve_bytes=0)
        self.spool.prepare()
        self.registry = Registry(bundle)
        self.canary = Canary(
            database=database,
            spool=self.spool,
            settings=self.settings,
            registry=cast(Any, self.registry),
            shelf=cast(Any, self.registry),
            enqueuer=self.queue,
        )

    def start(self) -> str:
        """The reason why nothing was sent."""
        (model,) = self.canary.champions()
        started = self.canary.start(model)
        assert started.study_instance_uid is None
        return started.reason

    def run(self) -> CanaryRun:
        with self.database.reading() as session:
            return session.get_one(CanaryRun, UID)

    def alarms(self) -> list[str]:
        with self.database.reading() as session:
            return [alarm.message for alarm in open_alarms(session) if alarm.kind == "canary"]


@pytest.mark.requirement("OPS-59")
def test_a_receiver_that_does_not_answer_is_told_and_the_study_was_known_before_it_was_sent(
    tmp_path: Path, database: Database, bundle: Bundle
) -> None:
    nest = Nest(tmp_path, database, bundle)
    assert "cannot be reached" in nest.start()
    with database.reading() as session:
        (run,) = session.scalars(select(CanaryRun))
    assert (run.outcome, run.sent_at, run.case_name) == ("wrong", None, "plans-grid")
    assert run.calling_ae == "SEGGATE_CANARY"
    assert [call["delay_s"] for call in nest.queue.calls] == [901.0]
    (message,) = nest.alarms()
    assert "it could not be sent" in message


def test_what_cannot_be_sent_says_why_and_is_no_alarm(tmp_path: Path, database: Database, bundle: Bundle) -> None:
    def reason(changed: Bundle) -> str:
        nest.registry.found = changed
        return nest.start()

    nest = Nest(tmp_path, database, bundle)
    contract = bundle.contract
    assert reason(replace(bundle, evidence=replace(bundle.evidence, sanity=None))) == "its bundle has no sanity case"
    assert "2 channels" in reason(replace(bundle, channels=(*bundle.channels, bundle.channels[0])))
    assert "the model takes US" in reason(replace(bundle, contract=replace(contract, modalities=("US",))))
    said = reason(replace(bundle, contract=replace(contract, min_slices=200)))
    assert said.startswith("its contract takes none of its sanity cases (plans-grid: ")
    with database.session() as session:
        pause(session, NAME, by="user:ann", reason="a new scanner")
    assert reason(bundle) == "the model is paused"
    assert nest.alarms() == []


def test_a_bundle_that_cannot_be_used_is_an_alarm(tmp_path: Path, database: Database) -> None:
    nest = Nest(tmp_path, database, BundleInvalid("plans.json: damaged"))
    assert nest.start() == "plans.json: damaged"
    assert nest.alarms() == ["the canary of tiny: its bundle cannot be used: plans.json: damaged"]


def test_one_at_a_time_is_under_way(tmp_path: Path, database: Database, bundle: Bundle) -> None:
    nest = Nest(tmp_path, database, bundle)
    with database.session() as session:
        add_canary(session)
    assert nest.start() == "one of it is under way"
    assert nest.canary.run().endswith("started: none; not started: tiny 1.0.0: one of it is under way")


def finished(
    nest: Nest, labels: NDArray[np.uint8], geometry: Geometry, *, roles: tuple[str, ...] = ("SEG", "SR")
) -> None:
    """The study has a released result with these labels and objects."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, labels=labels, affine_lps=geometry.affine_lps)
    path, digest = nest.spool.store_result_file(study_key(UID), "canary", "labels.npz", buffer.getvalue())
    with nest.database.session() as session:
        result = add_canary(session, ResultState.RELEASED)
        result.finished_at = utc_now()
        result.runtime = {"labels": {"path": path, "sha256": digest}}
        for role in roles:
            path, digest = nest.spool.store_result_file(study_key(UID), "canary", f"{role}.dcm", role.encode())
            session.add(
                ResultObject(
                    sop_instance_uid=f"1.2.{len(role)}",
                    result_id="canary",
                    role=role,
                    encoding="BINARY",
                    sop_class_uid="1",
                    series_instance_uid="2",
                    transfer_syntax_uid="3",
                    spool_path=path,
                    digest=digest,
                    size_bytes=3,
                )
            )


@pytest.mark.requirement("OPS-59")
def test_labels_are_compared_in_the_patient_whatever_the_order_of_the_series(
    tmp_path: Path, database: Database, bundle: Bundle
) -> None:
    nest = Nest(tmp_path, database, bundle)
    volume, labels = asymmetric_case()
    turned, change = volume.reoriented("PIR")
    finished(nest, change.apply(labels), turned.geometry)
    assert nest.canary.judge(UID) == "good"
    run = nest.run()
    assert run.dice == {"left structure": 1.0, "right structure": 1.0}
    assert run.seconds is not None
    assert nest.canary.check() == "0 compared, 0 of them not good"


@pytest.mark.requirement("OPS-59")
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shifted", "left structure: Dice 0."),
        ("elsewhere", "they lie on another grid than the sanity case"),
        ("no report", "there is no SR"),
        ("damaged", "SEG.dcm was altered or truncated on disk"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, database: Database, bundle: Bundle, what: str, says: str) -> None:
    nest = Nest(tmp_path, database, bundle)
    volume, labels = asymmetric_case()
    geometry = volume.geometry
    if what == "shifted":
        labels = np.roll(labels, 3, axis=2)
    if what == "elsewhere":
        affine = geometry.affine_lps.copy()
        affine[0, 3] += 2.0
        geometry = Geometry(shape=geometry.shape, affine_lps=affine)
    finished(nest, labels, geometry, roles=("SEG",) if what == "no report" else ("SEG", "SR"))
    if what == "damaged":
        (path,) = (nest.spool.root / "studies" / study_key(UID)).rglob("SEG.dcm")
        path.write_bytes(b"SEX")
    assert nest.canary.judge(UID) == "wrong"
    (message,) = nest.alarms()
    assert says in message


def test_a_few_voxels_of_a_small_label_are_not_wrong(tmp_path: Path, database: Database, bundle: Bundle) -> None:
    volume, labels = asymmetric_case()
    small = np.zeros_like(labels)
    small[5, 5, 5:8], small[10, 5, 5:8] = 1, 2
    tiny = with_sanity_cases(
        write_intensity_bundle(tmp_path / "tiny", name=NAME, spacing_mm=SPACING_MM), {"plans-grid": (volume, small)}
    )
    nest = Nest(tmp_path, database, tiny)
    found = small.copy()
    found[5, 5, 5] = 0
    finished(nest, found, volume.geometry)
    assert nest.canary.judge(UID) == "good"
    assert (nest.run().dice or {})["left structure"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("state", "reason", "outcome"),
    [
        (ResultState.PENDING, None, None),
        (ResultState.HELD, "the study is quarantined: x", None),
        (ResultState.FAILED, "infer: no memory", "wrong"),
        (ResultState.NOT_RUN, "modality", "wrong"),
    ],
)
def test_a_result_that_is_not_there_yet_is_waited_for_and_one_that_failed_is_not(
    tmp_path: Path, database: Database, bundle: Bundle, state: ResultState, reason: str | None, outcome: str | None
) -> None:
    nest = Nest(tmp_path, database, bundle)
    with database.session() as session:
        add_canary(session, state).state_reason = reason
    assert nest.canary.judge(UID) == outcome
    assert len(nest.alarms()) == int(outcome == "wrong")


def test_a_result_of_another_version_and_one_of_a_paused_model_say_nothing(
    tmp_path: Path, database: Database, bundle: Bundle
) -> None:
    nest = Nest(tmp_path, database, bundle)
    volume, labels = asymmetric_case()
    finished(nest, labels, volume.geometry)
    with database.session() as session:
        session.get_one(Result, "canary").model_version = "1.1.0"
        other = add_canary(session, ResultState.HELD, uid="2.25.44", result_id="held")
        other.state_reason = "model paused: a new scanner"
        pause(session, NAME, by="user:ann", reason="a new scanner")
    assert [nest.canary.judge(uid) for uid in (UID, "2.25.44")] == ["void", "void"]
    assert nest.alarms() == []
