"""Results as a worker leaves them: a phantom series in the spool, its rows, and what a model of known answers found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from engine.bundle import Bundle, load_bundle
from gateway.device_share import DeviceShare
from gateway.model_shelf import ModelShelf
from gateway.results.inference import Inference
from storage.database import Database
from storage.models import ModelRegistry, RegisteredModel
from storage.records import (
    Instance,
    InstanceState,
    Result,
    ResultState,
    Series,
    Study,
    StudyFacts,
    StudyState,
    StudyVersion,
    utc_now,
)
from storage.spool import Spool, object_path, study_key
from tests.support.intensity_model import write_intensity_bundle
from tests.support.phantoms import PhantomPatient, PhantomSeries, write_series

MODEL = "phantom"
SPACING_MM = (2.0, 2.0, 2.0)
SHAPE = (14, 18, 20)


class _Registry:
    """The one bundle, whatever is asked for."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def get(self, name: str, semver: str) -> RegisteredModel:
        return RegisteredModel(
            name=name,
            semver=semver,
            registry_version=1,
            folder=self._bundle.root,
            weights_digest=self._bundle.weights_digest,
            configuration_digest=self._bundle.configuration_digest,
            licence="",
            description="",
            aliases=("champion",),
            registered_at_ms=0,
        )


@dataclass
class LiveModel:
    """A database and a spool in `folder`, and a model that serves there."""

    folder: Path
    database: Database
    spool: Spool
    bundle: Bundle
    registry: ModelRegistry = field(init=False)
    shelf: ModelShelf = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self.registry = cast(ModelRegistry, _Registry(self.bundle))
        self.shelf = ModelShelf(self.registry, device="cpu", threads=1)

    def serve(
        self,
        series: PhantomSeries | None = None,
        *,
        state: ResultState = ResultState.RELEASED,
        verdict: str = "pass",
        recorded_at: datetime | None = None,
        patient_id: str | None = None,
        calling_ae: str = "CT1",
        **phantom: Any,
    ) -> str:
        """A study of one series goes through the model; the id of the result, which is in `state`."""
        self._count += 1
        if series is None:
            patient = PhantomPatient(patient_id=patient_id or f"PID-{self._count}")
            options: dict[str, Any] = {
                "shape": SHAPE,
                "spacing_mm": SPACING_MM,
                "seed": self._count,
                "patient": patient,
            }
            options |= phantom
            series = write_series(self.folder / "scanner" / str(self._count), **options)
        uid = series.study_instance_uid
        result_id = hashlib.sha256(series.series_instance_uid.encode()).hexdigest()[:40]
        with self.database.session() as session:
            _add_rows(session, self.spool, series, calling_ae)
            session.add(
                Result(
                    result_id=result_id,
                    version_id=hashlib.sha256(uid.encode()).hexdigest()[:40],
                    study_instance_uid=uid,
                    series_instance_uid=series.series_instance_uid,
                    part="",
                    rule="phantoms",
                    model_name=MODEL,
                    model_version=self.bundle.semver,
                    weights_digest=self.bundle.weights_digest,
                    configuration_digest=self.bundle.configuration_digest,
                    state=ResultState.PENDING,
                    workflow_id=f"result-{result_id}",
                    created_at=utc_now(),
                    attempts=0,
                )
            )
        work = Inference(
            database=self.database,
            spool=self.spool,
            shelf=self.shelf,
            attempts=3,
            share=DeviceShare(),
            busy=lambda _: None,
            idle=lambda _: None,
        )
        assert work.infer(result_id) == "inferred"
        with self.database.session() as session:
            result = session.get_one(Result, result_id)
            result.state, result.verdict, result.checks = state, verdict, []
            result.finished_at = utc_now()
            if recorded_at is not None:
                session.get_one(StudyFacts, result_id).recorded_at = recorded_at
        return result_id


def _add_rows(session: Any, spool: Spool, series: PhantomSeries, calling_ae: str) -> None:
    uid, now = series.study_instance_uid, utc_now()
    key = study_key(uid)
    session.add(
        Study(
            study_instance_uid=uid,
            study_key=key,
            state=StudyState.VERIFIED,
            patient_id=str(series.datasets[0].PatientID),
            patient_name="Confidential^Somebody",
            first_received_at=now,
            last_received_at=now,
            calling_ae=calling_ae,
            version=1,
        )
    )
    session.flush()
    session.add(
        Series(
            study_instance_uid=uid,
            series_instance_uid=series.series_instance_uid,
            modality="CT",
            first_received_at=now,
            last_received_at=now,
        )
    )
    object_ids = []
    for file in series.files:
        object_id, data = spool.new_id(), file.read_bytes()
        path = spool.root / object_path(key, object_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        object_ids.append(object_id)
        session.add(
            Instance(
                object_id=object_id,
                study_instance_uid=uid,
                series_instance_uid=series.series_instance_uid,
                sop_instance_uid=f"{uid}.{object_id[:8]}",
                state=InstanceState.CURRENT,
                digest=hashlib.sha256(data).hexdigest(),
                size_bytes=len(data),
                spool_path=object_path(key, object_id),
                received_at=now,
                association_id="a" * 32,
                calling_ae=calling_ae,
                called_ae="SEGGATE",
                peer_address="127.0.0.1",
            )
        )
    session.add(
        StudyVersion(
            version_id=hashlib.sha256(uid.encode()).hexdigest()[:40],
            study_instance_uid=uid,
            number=1,
            content_digest=hashlib.sha256("".join(object_ids).encode()).hexdigest(),
            declared_at=now,
            rule="quiet-after-release",
            evidence={},
            object_ids=object_ids,
            workflow_id=f"study-{uid}",
            routed_at=now,
        )
    )
    session.flush()


@contextmanager
def live_model(
    folder: Path, *, database: Database | None = None, spool: Path | None = None, **bundle: Any
) -> Iterator[LiveModel]:
    """`bundle`: options of `write_intensity_bundle`. Without a database one in SQLite is made."""
    written = write_intensity_bundle(
        folder / "bundle", **({"name": MODEL, "spacing_mm": SPACING_MM, "orientation": "RAS"} | bundle)
    )
    own = database or Database(f"sqlite:///{folder / 'live.sqlite'}")
    if database is None:
        own.create_all()
    place = Spool(spool or folder / "spool", reserve_bytes=0)
    place.prepare()
    live = LiveModel(folder=folder, database=own, spool=place, bundle=load_bundle(written.root, verify=False))
    try:
        yield live
    finally:
        live.shelf.close()
        if database is None:
            own.close()
