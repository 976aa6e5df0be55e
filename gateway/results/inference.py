"""Step `infer`: series → volume → labels and their statistics, written to the spool and the row."""

from __future__ import annotations

import hashlib
import io
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from engine.bundle import Bundle
from engine.predictor import Prediction
from engine.segment_statistics import SegmentStatistics
from engine.volume import LabelMap
from gateway import quarantine
from gateway.device_share import DeviceShare, Turn
from gateway.disk_space import alarmed_when_full
from gateway.durable import ROUTINE, URGENT
from gateway.errors import Permanent, Rejected, is_of_the_machine
from gateway.intake.header import text_of
from gateway.learning import pauses
from gateway.model_shelf import ModelShelf
from gateway.monitoring.study_facts import facts_of
from gateway.results.orders import series_files
from gateway.results.series import SeriesPart, decode, read_series
from gateway.routed_work import is_urgent
from storage import ledger
from storage.canary_records import CANARY_RULE
from storage.database import Database
from storage.errors import ObjectMissing, StorageError
from storage.models import RegisteredModel
from storage.records import Result, ResultState, Study, StudyVersion, utc_now
from storage.spool import Spool


@dataclass(frozen=True, kw_only=True, eq=False)
class Inferred:
    """What a model made of one part of a series. `read_s`: seconds to read and decode it."""

    part: SeriesPart
    prediction: Prediction
    bundle: Bundle
    read_s: float

    def measurements(self) -> list[dict[str, Any]]:
        """Per segment of the bundle its statistics, as the row keeps them."""
        regions = {spec.name: spec.region for spec in self.bundle.labels}
        return [_measurement(s, regions[s.name], self.prediction.labels) for s in self.prediction.segments]

    def runtime(self) -> dict[str, Any]:
        """Backend, seconds per stage, memory, as the row keeps them."""
        return _runtime(self.prediction, self.part, self.read_s)


def infer_part(
    shelf: ModelShelf,
    model: RegisteredModel,
    files: Sequence[Path],
    key: str,
    *,
    admitted: Callable[[int], AbstractContextManager[Turn]],
    before_pixels: Callable[[SeriesPart], None],
) -> Inferred:
    """Read the part `key` of a series and run a model on it, when it is `admitted` with the memory that it needs.

    `before_pixels` sees the part before a pixel is decoded and may refuse it. Raises MemoryExceeded, also before that,
    Rejected for a series that cannot be read, and what the predictor raises.
    """
    began = time.monotonic()
    headers = select_part(read_series(files, only_headers=True), key)
    headers_s = time.monotonic() - began
    with admitted(shelf.needed_bytes(model, headers.geometry)) as turn:
        # Before a pixel is decoded: what does not fit must not take the worker's memory first.
        shelf.check_memory(model, headers.geometry, budget_bytes=turn.budget_bytes)
        before_pixels(headers)
        began = time.monotonic()
        part = decode(headers)
        if part.volume is None:
            raise Rejected(f"series {part.series_instance_uid}: no pixel data")
        read_s = headers_s + time.monotonic() - began
        prediction = shelf.predict(
            model, part.volume, budget_bytes=turn.budget_bytes, progress=lambda _share: turn.pass_on()
        )
    return Inferred(part=part, prediction=prediction, bundle=shelf.bundle(model), read_s=read_s)


class Inference:
    """Step `infer` of the story. `busy(result_id)` and `idle(result_id)` announce the work to the supervisor."""

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        shelf: ModelShelf,
        attempts: int,
        share: DeviceShare,
        busy: Callable[[str], None],
        idle: Callable[[str], None],
    ) -> None:
        self._database = database
        self._spool = spool
        self._shelf = shelf
        self._attempts = attempts
        self._share = share
        self._busy = busy
        self._idle = idle

    def infer(self, result_id: str) -> str:
        """ "inferred"; "superseded" when a newer version of the study was declared whole before the start, or the model
        was withdrawn meanwhile; "held" when the study has been quarantined or the model paused."""
        with self._database.session() as session:
            result = session.get_one(Result, result_id, with_for_update=True)
            if result.state != ResultState.PENDING:
                return str(result.state)  # a repeated step: it was superseded or parked, and that is recorded
            if result.runtime is not None:
                return "inferred"
            version = session.get_one(StudyVersion, result.version_id)
            newest = session.scalars(
                select(Study.version).where(Study.study_instance_uid == result.study_instance_uid)
            ).one()
            if newest > version.number:
                result.state, result.finished_at = ResultState.SUPERSEDED, utc_now()
                result.state_reason = f"version {newest} of the study was declared whole before this one was processed"
                ledger.append(
                    session,
                    subject=ledger.study_subject(result.study_instance_uid),
                    kind="superseded",
                    actor="worker",
                    detail={"result_id": result_id, "reason": result.state_reason},
                )
                return "superseded"
            stop = quarantine.reason_to_stop(session, result.study_instance_uid)
            if stop is not None:
                return quarantine.hold_result(session, result, stop)
            wait = pauses.reason_to_wait(session, result.model_name)
            if wait is not None:
                return pauses.hold_result(session, result, wait)
            # Counted before the work: a study that kills its worker each time is parked after `attempts`.
            result.attempts += 1
            attempt = result.attempts
            files = series_files(session, self._spool, version, result)
            urgency = URGENT if is_urgent(session, result) else ROUTINE
        if attempt > self._attempts:
            raise Permanent(f"inference was begun {self._attempts} times and never finished; see the worker's log")
        self._busy(result_id)
        try:
            with alarmed_when_full(self._database):
                return self._run(result_id, files, urgency)
        except StorageError as error:
            if is_of_the_machine(error):  # waited for however long, so such a beginning does not count
                with self._database.session() as session:
                    session.get_one(Result, result_id).attempts -= 1
            raise
        finally:
            self._idle(result_id)

    def _run(self, result_id: str, files: tuple[Any, ...], urgency: int) -> str:
        with self._database.reading() as session:
            result = session.get_one(Result, result_id)
            study = session.get_one(Study, result.study_instance_uid)
        model = self._shelf.version(result.model_name, result.model_version)
        if model.weights_digest != result.weights_digest:
            raise Permanent(f"{model.name} {model.semver} has other weights than when the result was ordered")
        inferred = infer_part(
            self._shelf,
            model,
            files,
            result.part,
            # What rests is not stuck: its deadline begins anew when it goes on.
            admitted=lambda needed: self._share.admitted(
                urgency, needed, rests=lambda: self._idle(result_id), goes_on=lambda: self._busy(result_id)
            ),
            # Or else a model would run each time only to find no room for its labels.
            before_pixels=lambda part: self._spool.check_room(math.prod(part.geometry.shape)),
        )
        part, prediction = inferred.part, inferred.prediction
        with self._database.reading() as session:
            row = session.get_one(Result, result_id)
            if row.state != ResultState.PENDING:  # the model was withdrawn while it ran
                return str(row.state)
        # Named by content: a run repeated after a crash may differ in the last bit and must not clash.
        packed = packed_labels(prediction.labels)
        labels_path, labels_digest = self._spool.store_result_file(
            study.study_key, result_id, f"labels-{hashlib.sha256(packed).hexdigest()[:16]}.npz", packed
        )
        facts = facts_of(result, part, prediction, inferred.bundle)
        measurements = inferred.measurements()
        runtime = inferred.runtime()
        runtime["labels"] = {"path": labels_path, "sha256": labels_digest}
        with self._database.session() as session:
            row = session.get_one(Result, result_id, with_for_update=True)
            if row.state != ResultState.PENDING:
                return str(row.state)
            if row.runtime is not None:  # another run of the same step was faster
                return "inferred"
            row.measurements, row.runtime = measurements, runtime
            if row.rule != CANARY_RULE:  # it says nothing of the site's images
                session.merge(facts)
            ledger.append(
                session,
                subject=ledger.study_subject(row.study_instance_uid),
                kind="inferred",
                actor="worker",
                detail={
                    "result_id": result_id,
                    "model": f"{row.model_name} {row.model_version}",
                    "weights_digest": row.weights_digest,
                    "runtime": {k: v for k, v in runtime.items() if k != "labels"},
                    "volumes_ml": {m["name"]: m["volume_ml"] for m in measurements},
                    "findings": [f"{f.kind}: {f.detail}" for f in part.findings],
                },
            )
        return "inferred"


def select_part(parts: tuple[SeriesPart, ...], key: str) -> SeriesPart:
    """The part of a series that a result was ordered for."""
    for part in parts:
        if part.part == key:
            return part
    raise Rejected(f"the series no longer has a part {key!r}; its objects changed since the result was ordered")


def load_labels(spool: Spool, result: Result) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The label array (Z, Y, X) of a result, in the order of the series' slices.

    Raises ObjectMissing, ObjectChanged when the file no longer has the bytes that were written.
    """
    if result.runtime is None:
        raise ObjectMissing(f"result {result.result_id} has no labels yet")
    file = result.runtime["labels"]
    return read_labels(spool, file["path"], file["sha256"])


def read_labels(spool: Spool, path: str, digest: str) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The labels of a file in the spool, by its path there and its SHA-256. Raises as `load_labels` does."""
    with np.load(spool.unchanged(path, digest), allow_pickle=False) as archive:
        labels: NDArray[np.uint8] | NDArray[np.uint16] = archive["labels"]
    return labels


def packed_labels(labels: LabelMap) -> bytes:
    """The bytes of a file of labels, which `read_labels` reads."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, labels=labels.array, affine_lps=labels.geometry.affine_lps)
    return buffer.getvalue()


def _measurement(segment: SegmentStatistics, region: tuple[int, ...], labels: LabelMap) -> dict[str, Any]:
    """Statistics of one segment as JSON; the centroid is in patient coordinates (L, P, S), millimetres."""
    return {
        "value": segment.value,
        "name": segment.name,
        "voxels": segment.voxels,
        "volume_ml": segment.volume_ml,
        "confidence": segment.confidence,
        "mean_intensity": list(segment.mean_intensity) if segment.mean_intensity is not None else None,
        "components": segment.components,
        "touches_border": list(segment.touches_border),
        "fold_dice": segment.fold_dice,
        "mirror_dice": segment.mirror_dice,
        "border_entropy": segment.border_entropy,
        "dilated_entropy": segment.dilated_entropy,
        "centroid_lps_mm": _centroid(segment, region, labels),
    }


def _centroid(segment: SegmentStatistics, region: tuple[int, ...], labels: LabelMap) -> list[float] | None:
    if segment.voxels == 0:
        return None
    _, height, width = labels.array.shape
    total = np.zeros(4)  # x, y, z and 1, summed over the voxels; slice by slice, as indices take 24 bytes per voxel
    for z, plane in enumerate(labels.array):
        inside = np.isin(plane, region)
        rows, columns, count = inside.sum(axis=1), inside.sum(axis=0), int(inside.sum())
        total += (columns @ np.arange(width), rows @ np.arange(height), count * z, count)
    point = labels.geometry.affine_lps @ (total / total[3])
    return [round(float(v), 3) for v in point[:3]]


def _series_number(part: SeriesPart) -> int | None:
    text = text_of(part.headers[0], "SeriesNumber") or ""
    return int(text) if re.fullmatch(r"-?[0-9]{1,10}", text) else None


def _runtime(prediction: Prediction, part: SeriesPart, read_s: float) -> dict[str, Any]:
    info, missing = prediction.runtime, part.finding("missing-slices")
    return {
        "backend": info.backend,
        "provider": info.provider,
        "precision": info.precision,
        "threads": info.threads,
        "versions": dict(info.versions),
        "seconds": {"read": round(read_s, 4), **{k: round(v, 4) for k, v in info.seconds.items()}},
        "peak_estimate_bytes": info.peak_estimate_bytes,
        **({"left_out": list(info.left_out)} if info.left_out else {}),
        "mean_confidence": prediction.mean_confidence,
        "unit": "[hnsf'U]" if part.modality == "CT" else "1",
        "series_number": _series_number(part),
        "slices": len(part.frames),
        "missing_slices": int(missing.value) if missing is not None else 0,
        "spacing_mm": list(part.geometry.spacing_mm),
    }
