"""Live studies for tests of the loop: a database, a spool and a model of several versions, without any process.

What a worker would do by its queues is done by calls: `receive` a phantom, `make` its results. The versions are
bundles that segment by brightness, so that a good, a swapped and a blind one differ in what QA says.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from gateway.delivery.release import Release
from gateway.destination_settings import DestinationSettings
from gateway.device_share import DeviceShare
from gateway.learning.rollback import Withdrawal
from gateway.learning.shadow import Shadows
from gateway.learning.watch import Watch
from gateway.learning_settings import ChangePlan, LearningSettings, ModelLearning
from gateway.model_shelf import ModelShelf
from gateway.results.encoding import Encoding
from gateway.results.inference import Inference
from gateway.results.orders import Orders
from gateway.steps import ResultWork
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import ModelMissing
from storage.learning_records import ServingPeriod
from storage.models import CHAMPION, PREVIOUS, SHADOW, ModelRegistry, RegisteredModel
from storage.records import (
    Instance,
    InstanceState,
    Result,
    RoutingDecision,
    Study,
    StudyState,
    StudyVersion,
    utc_now,
)
from storage.spool import Spool, study_key
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, Band, write_intensity_bundle
from tests.support.phantoms import write_series
from tests.support.story_rows import NotedQueue

MODEL = "sides"
GOOD, SWAPPED, BLIND, HALF_BLIND = "good", "swapped", "blind", "half-blind"
BLIND_BANDS: Mapping[str, Band] = {
    "left structure": Band(low=5000, high=6000, laterality="left", pair="right structure"),
    "right structure": Band(low=7000, high=8000, laterality="right", pair="left structure"),
}
"""Finds nothing in any phantom."""
_WHOLE = {"objects": 12, "own_results": 0, "quarantined": 0, "released": True, "interrupted": False, "gaps": []}
_SPACING_MM = (2.0, 2.0, 2.0)


def write_version(folder: Path, semver: str, kind: str) -> Bundle:
    """A bundle of MODEL. The good ones of two versions have other weights and the same answer."""
    number = int(semver.split(".")[0])
    bands = {
        GOOD: {
            "left structure": Band(low=200, high=500 - number, laterality="left", pair="right structure"),
            "right structure": Band(low=500, high=800 - number, laterality="right", pair="left structure"),
        },
        SWAPPED: SWAPPED_BANDS,
        BLIND: BLIND_BANDS,
        HALF_BLIND: {**PHANTOM_BANDS, "right structure": BLIND_BANDS["right structure"]},
    }[kind]
    return write_intensity_bundle(folder / semver, name=MODEL, semver=semver, spacing_mm=_SPACING_MM, bands=bands)


@dataclass
class KnownModels:
    """A registry in memory."""

    folder: Path
    models: list[RegisteredModel] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)  # of MODEL: alias → semver
    settled: int | None = None

    def add(self, bundle: Bundle) -> None:
        self.models.append(
            RegisteredModel(
                name=bundle.name,
                semver=bundle.semver,
                registry_version=len(self.models) + 1,
                folder=bundle.root,
                weights_digest=bundle.weights_digest,
                configuration_digest=bundle.configuration_digest,
                licence="",
                description="",
                aliases=(),
                registered_at_ms=0,
            )
        )

    def versions(self, name: str) -> list[RegisteredModel]:
        return [
            replace(m, aliases=tuple(sorted(a for a, semver in self.aliases.items() if semver == m.semver)))
            for m in self.models
            if m.name == name
        ]

    def get(self, name: str, semver: str) -> RegisteredModel:
        for model in self.versions(name):
            if model.semver == semver:
                return model
        raise ModelMissing(f"no version {semver} of model {name!r} is registered")

    def champion(self, name: str) -> RegisteredModel:
        return self.get(name, self.aliases.get(CHAMPION, "none"))

    def promote(self, name: str, semver: str) -> RegisteredModel:
        if self.aliases.get(CHAMPION) != semver:
            self.aliases = {**self.aliases, PREVIOUS: self.aliases.get(CHAMPION, semver), CHAMPION: semver}
        return self.get(name, semver)

    def serve(self, name: str, semver: str, *, previous: str | None) -> RegisteredModel:
        self.aliases = {a: v for a, v in self.aliases.items() if a not in (CHAMPION, PREVIOUS) and v != semver}
        self.aliases |= {CHAMPION: semver} | ({PREVIOUS: previous} if previous else {})
        return self.get(name, semver)

    def settled_period(self, _name: str) -> int | None:
        return self.settled

    def note_settled(self, _name: str, period_id: int) -> None:
        self.settled = period_id

    def set_shadow(self, name: str, semver: str) -> RegisteredModel:
        self.aliases[SHADOW] = self.get(name, semver).semver
        return self.get(name, semver)

    def clear_shadow(self, _name: str) -> None:
        self.aliases.pop(SHADOW, None)


def begin_period(session: Session, model: RegisteredModel, *, previous: str | None) -> ServingPeriod:
    """A version serves from now on, as a promotion writes it: the period before is closed."""
    now = utc_now()
    for period in session.scalars(
        select(ServingPeriod).where(ServingPeriod.model_name == model.name, ServingPeriod.ended_at.is_(None))
    ):
        period.ended_at, period.ended_why = now, "another version was promoted"
    period = ServingPeriod(
        model_name=model.name,
        model_version=model.semver,
        weights_digest=model.weights_digest,
        previous_version=previous,
        began_at=now,
        began_by="user:test",
        rolled_back=False,
    )
    session.add(period)
    session.flush()
    return period


class LiveStudies:
    """The gateway's parts around one model; `plan` is its change plan."""

    def __init__(self, database: Database, folder: Path, **plan: Any) -> None:
        self.database, self.folder, self.queue = database, folder, NotedQueue()
        self.spool = Spool(folder / "spool", reserve_bytes=0)
        self.spool.prepare()
        self.models = KnownModels(folder / "models")
        self.models.folder.mkdir()
        self.learning = self.learning_of(**plan)
        self.new_process()

    @staticmethod
    def learning_of(**plan: Any) -> LearningSettings:
        return LearningSettings(models=(ModelLearning(name=MODEL, change_plan=ChangePlan(**plan)),))

    def new_process(self, *, withdrawal: type[Withdrawal] = Withdrawal) -> None:
        """Everything that a worker makes at its start; a new one has forgotten what the old one had in memory."""
        registry = cast(ModelRegistry, self.models)
        self.shelf = ModelShelf(registry, device="cpu", threads=1)
        self.share = DeviceShare()
        parts: dict[str, Any] = {"database": self.database, "spool": self.spool, "shelf": self.shelf}
        self.watch = Watch(
            database=self.database,
            registry=registry,
            shelf=self.shelf,
            learning=self.learning,
            withdrawal=withdrawal(**parts, enqueuer=self.queue),
        )
        self.shadows = Shadows(
            **parts,
            enqueuer=self.queue,
            learning=self.learning,
            attempts=2,
            share=self.share,
            disabled_checks=(),
            busy=lambda _work: None,
            idle=lambda _work: None,
        )
        self.inference = Inference(
            **parts, attempts=3, share=self.share, busy=lambda _work: None, idle=lambda _work: None
        )
        self.orders = Orders(**parts, enqueuer=self.queue, unusable=self.watch.unusable)
        release = Release(database=self.database, destinations=DestinationSettings(), enqueuer=self.queue)
        self.work = ResultWork(
            database=self.database,
            inference=self.inference,
            encoding=cast(Encoding, None),
            release=release,
            shelf=self.shelf,
            disabled_checks=(),
            watch=self.watch.look,
            shadow=self.shadows.order,
        )

    def register(self, semver: str, kind: str = GOOD) -> RegisteredModel:
        bundle = write_version(self.models.folder, semver, kind)
        self.models.add(bundle)
        detail = {
            "semver": semver,
            "weights_digest": bundle.weights_digest,
            "configuration_digest": bundle.configuration_digest,
            "evidence_digest": bundle.evidence_digest,
        }
        with self.database.session() as session:
            ledger.append(
                session, subject=ledger.model_subject(MODEL), kind="model-imported", actor="user:test", detail=detail
            )
        return self.models.get(MODEL, semver)

    def promote(self, semver: str) -> ServingPeriod:
        """The version serves, and the shelf knows at once."""
        before = self.models.aliases.get(CHAMPION)
        model = self.models.promote(MODEL, semver)
        self.shelf.forget(MODEL)
        with self.database.session() as session:
            return begin_period(session, model, previous=before)

    def receive(self, number: int, *, priority: str = "routine") -> str:
        """A phantom study, declared whole, routed to MODEL and ordered; its UID."""
        series = write_series(self.folder / f"source{number}", spacing_mm=_SPACING_MM, shape=(12, 16, 18), seed=number)
        uid, now = series.study_instance_uid, utc_now()
        key = study_key(uid)
        object_ids = [f"{number:016x}{z:016x}" for z in range(len(series.files))]
        objects = self.spool.root / "studies" / key / "objects"
        objects.mkdir(parents=True)
        with self.database.session() as session:
            session.add(
                Study(
                    study_instance_uid=uid,
                    study_key=key,
                    state=StudyState.PROCESSING,
                    version=1,
                    first_received_at=now,
                    last_received_at=now,
                    calling_ae="CT1",
                )
            )
            session.flush()
            for object_id, file in zip(object_ids, series.files, strict=True):
                shutil.copy(file, objects / f"{object_id}.dcm")
                session.add(
                    Instance(
                        object_id=object_id,
                        study_instance_uid=uid,
                        series_instance_uid=series.series_instance_uid,
                        sop_instance_uid=f"{uid}.{object_ids.index(object_id)}"[:64],
                        state=InstanceState.CURRENT,
                        digest="d" * 64,
                        size_bytes=1,
                        spool_path=f"studies/{key}/objects/{object_id}.dcm",
                        received_at=now,
                        association_id="a",
                        calling_ae="CT1",
                        called_ae="SEGGATE",
                        peer_address="127.0.0.1",
                    )
                )
            self._declare(session, uid, 1, object_ids, series.series_instance_uid, priority)
        self.orders.order(f"v1 {key}")
        return uid

    def declare_again(self, uid: str) -> None:
        """A second version of the study with the same objects, not yet ordered."""
        with self.database.session() as session:
            first = session.scalars(select(StudyVersion).where(StudyVersion.study_instance_uid == uid)).one()
            series = session.scalars(select(Instance.series_instance_uid)).first()
            self._declare(session, uid, 2, first.object_ids, str(series), "routine")
            session.get_one(Study, uid).version = 2

    def _declare(
        self, session: Session, uid: str, number: int, object_ids: list[str], series: str, priority: str
    ) -> None:
        version_id = f"v{number} {study_key(uid)}"
        session.add(
            StudyVersion(
                version_id=version_id,
                study_instance_uid=uid,
                number=number,
                content_digest=f"{number}" * 64,
                declared_at=utc_now(),
                rule="quiet-after-release",
                evidence=_WHOLE,
                object_ids=object_ids,
                workflow_id=f"study {uid} {number}",
                routed_at=utc_now(),
            )
        )
        session.flush()
        session.add(
            RoutingDecision(
                version_id=version_id,
                series_instance_uid=series,
                rule="all",
                matched=True,
                model=MODEL,
                explanation={"verdict": "matched", "priority": priority},
            )
        )

    def make(self, uid: str, *, until: str = "release") -> str:
        """The steps of the study's pending result, but the encoding, up to `until`; what the last of them said."""
        (result_id,) = [r.result_id for r in self.results(uid) if r.state == "pending"]
        steps: dict[str, Callable[[str], str]] = {
            "infer": self.work.infer,
            "judge": self.work.judge,
            "release": self.work.release,
        }
        said = ""
        for name, step in steps.items():
            said = step(result_id)
            if name == until or said == "superseded":
                break
        return said

    def results(self, uid: str) -> list[Result]:
        """All results of a study, oldest first."""
        with self.database.reading() as session:
            return list(
                session.scalars(
                    select(Result)
                    .where(Result.study_instance_uid == uid)
                    .order_by(Result.created_at, Result.model_version.desc())
                )
            )

    def current(self, uid: str) -> list[tuple[str, str]]:
        """(version of the model, state) of each result that is not superseded."""
        return [(r.model_version, r.state) for r in self.results(uid) if r.state != "superseded"]

    def study_state(self, uid: str) -> str:
        with self.database.reading() as session:
            return session.get_one(Study, uid).state

    def alarms(self) -> set[str]:
        with self.database.reading() as session:
            return {alarm.kind for alarm in open_alarms(session)} - {"no-destination"}
