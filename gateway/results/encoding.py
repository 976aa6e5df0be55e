"""Step `encode`: labels and statistics → SEG and SR in the spool, each written once; fallbacks when first asked for.

The objects are a pure function of the result's row, its labels, the source headers and the result that this one
replaces, so that a step repeated after a crash writes the same bytes and the same UIDs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from engine.bundle import Bundle
from gateway.delivery.destination import OutgoingObject, Role
from gateway.delivery.reported import taken_by_a_pacs
from gateway.disk_space import alarmed_when_full
from gateway.errors import Permanent, Rejected
from gateway.model_shelf import ModelShelf
from gateway.results.content import EncodedObject, ObjectReference, ResultContent, SegmentContent, Superseded
from gateway.results.content import Encoding as SegEncoding
from gateway.results.identity import ModelIdentity, ResultIdentity
from gateway.results.inference import load_labels, select_part
from gateway.results.orders import content_key, series_files
from gateway.results.overlay import overlay_png
from gateway.results.quality import Check, Verdict
from gateway.results.secondary_capture import encode_secondary_capture
from gateway.results.segmentation import encode_segmentation
from gateway.results.series import SeriesPart, decode, read_series
from gateway.results.source_header import identified
from gateway.results.structured_report import SR_ENCODING, encode_notice, encode_structured_report
from gateway.settings import Settings
from storage import ledger
from storage.canary_records import CANARY_RULE
from storage.database import Database
from storage.records import Result, ResultObject, ResultState, Study, StudyVersion
from storage.spool import Spool


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a result is encoded from."""

    result: Result
    study_key: str
    content: ResultContent
    part: SeriesPart


class Encoding:
    """Step `encode`, and the objects that a delivery asks for."""

    def __init__(
        self, *, database: Database, spool: Spool, shelf: ModelShelf, settings: Settings, software_version: str
    ) -> None:
        self._database = database
        self._spool = spool
        self._shelf = shelf
        self._settings = settings
        self._software_version = software_version

    def encode(self, result_id: str) -> str:
        """ "encoded": SEG (in the encoding that destinations want first) and SR, or on hold the notice, or nothing.

        "superseded" where the model was withdrawn meanwhile. A canary has SEG and SR whatever its verdict: that they
        can be made is part of what it shows.
        """
        with self._database.reading() as session:
            result = session.get_one(Result, result_id)
            is_held = result.verdict == Verdict.HOLD and result.rule != CANARY_RULE
            if result.state == ResultState.SUPERSEDED:
                return "superseded"
            if session.scalars(select(ResultObject).where(ResultObject.result_id == result_id)).first() is not None:
                return "encoded"
        if is_held and not self._settings.gateway.quality.notice_on_hold:
            return "encoded"
        source = self._source(result_id, pixels=False)
        if is_held:
            self._keep(source, [encode_notice(source.content)])
            return "encoded"
        self._keep(source, self._encoded(source, self._first_encoding(source.content)))
        return "encoded"

    def outgoing(self, result_id: str, encoding: str) -> Sequence[OutgoingObject]:
        """The objects to send in one encoding, the image first; a fallback encoding is made when first asked for.

        A held result has only its notice, whatever the encoding.
        """
        with self._database.reading() as session:
            result = session.get_one(Result, result_id)
            objects = _objects(session, result_id)
            study = result.study_instance_uid
        notices = [o for o in objects if o.role == "notice"]
        if notices:
            return [_outgoing(o, study, self._spool) for o in notices]
        # Segments that overlap have no label map; the same frames as BINARY lose nothing.
        if encoding == "LABELMAP" and not any(o.encoding == "LABELMAP" for o in objects):
            encoding = "BINARY" if self._source(result_id).content.overlapping else encoding
        image = next((o for o in objects if o.encoding == encoding), None)
        if image is None:
            objects = self._fallback(result_id, encoding)
            image = next(o for o in objects if o.encoding == encoding)
        # The report points at the segmentation that goes with it; beside a picture, at the one that was made first.
        wanted = self._first_report(result) if encoding == "SC" else SR_ENCODING[_of_segmentation(encoding)]
        reports = [o for o in objects if o.role == "SR" and o.encoding == wanted]
        return [_outgoing(o, study, self._spool) for o in (image, *reports)]

    def overlay(self, result_id: str, path: Path) -> None:
        """A PNG of the result on its own source series; raises Rejected when the series cannot be read again."""
        source = self._source(result_id, pixels=True)
        overlay_png(source.content, _image(source.part), path)

    def _first_encoding(self, content: ResultContent) -> SegEncoding:
        """What most destinations name first among BINARY and LABELMAP; overlapping segments need BINARY."""
        if content.overlapping:
            return "BINARY"
        wanted = [
            next(e for e in d.encodings if e != "SC")
            for d in self._settings.destinations.pacs
            if any(e != "SC" for e in d.encodings)
        ]
        return "LABELMAP" if wanted and all(e == "LABELMAP" for e in wanted) else "BINARY"

    def _first_report(self, result: Result) -> str | None:
        """Encoding of the SR that was made first; the ledger alone knows it."""
        with self._database.reading() as session:
            for event in ledger.events(session, ledger.study_subject(result.study_instance_uid)):
                if event.kind == "encoded" and event.detail["result_id"] == result.result_id:
                    return next((str(o["encoding"]) for o in event.detail["objects"] if o["role"] == "SR"), None)
        return None

    def _fallback(self, result_id: str, encoding: str) -> Sequence[ResultObject]:
        source = self._source(result_id, pixels=encoding == "SC")
        self._keep(source, self._encoded(source, encoding))
        with self._database.reading() as session:
            return _objects(session, result_id)

    def _encoded(self, source: _Source, encoding: str) -> list[EncodedObject]:
        """The picture, or a SEG and the SR that points at it."""
        with self._database.reading() as session:
            content = replace(source.content, supersedes=_superseded(session, source.result, encoding))
        if encoding == "SC":
            return [encode_secondary_capture(content, _image(source.part))]
        wanted = _of_segmentation(encoding)
        return [
            encode_segmentation(content, encoding=wanted),
            encode_structured_report(content, segmentation=wanted),
        ]

    def _source(self, result_id: str, *, pixels: bool = False) -> _Source:
        with self._database.reading() as session:
            result = session.get_one(Result, result_id)
            version = session.get_one(StudyVersion, result.version_id)
            study = session.get_one(Study, result.study_instance_uid)
            files = series_files(session, self._spool, version, result)
            superseded = _superseded(session, result, "")
            content_digest = content_key(session, version)
        part = select_part(read_series(files, only_headers=True), result.part)
        if pixels:
            part = decode(part)
        bundle = self._shelf.bundle(self._shelf.version(result.model_name, result.model_version))
        content = ResultContent(
            identity=ResultIdentity(
                study_instance_uid=result.study_instance_uid,
                series_instance_uid=result.series_instance_uid,
                part=result.part,
                model=ModelIdentity(
                    name=result.model_name,
                    version=result.model_version,
                    weights_digest=result.weights_digest,
                    configuration_digest=result.configuration_digest,
                ),
                content_digest=content_digest,
            ),
            labels=load_labels(self._spool, result),
            geometry=part.geometry,
            frames=part.frames,
            header=identified(part.headers),
            modality=part.modality,
            frame_of_reference_uid=part.frame_of_reference_uid,
            segments=_segments(result, bundle),
            verdict=str(result.verdict),
            checks=[_check(c) for c in result.checks or []],
            software_version=self._software_version,
            created_at=result.created_at,
            supersedes=superseded,
        )
        return _Source(result=result, study_key=study.study_key, content=content, part=part)

    def _keep(self, source: _Source, made: Sequence[EncodedObject]) -> None:
        """Files first, then rows and the ledger event in one transaction."""
        result_id = source.result.result_id
        rows = []
        for item in made:
            # Named by content: what a crash left behind before its row may be of an older release of this program.
            stem = f"{item.role}-{item.encoding}".lower()
            with alarmed_when_full(self._database):
                path, digest, size = self._spool.store_result_chunks(
                    source.study_key, result_id, stem, ".dcm", item.chunks()
                )
            rows.append(
                ResultObject(
                    sop_instance_uid=item.sop_instance_uid,
                    result_id=result_id,
                    role=item.role,
                    encoding=item.encoding,
                    sop_class_uid=item.sop_class_uid,
                    series_instance_uid=item.series_instance_uid,
                    transfer_syntax_uid=item.transfer_syntax_uid,
                    spool_path=path,
                    digest=digest,
                    size_bytes=size,
                    repairs=[asdict(r) for r in item.repairs],
                )
            )
        try:
            self._record(source, rows)
        except IntegrityError:
            # Two deliveries asked for the same fallback at the same time; the other one was faster.
            self._record(source, rows)

    def _record(self, source: _Source, rows: Sequence[ResultObject]) -> None:
        result_id = source.result.result_id
        with self._database.session() as session:
            new = [_copy(r) for r in rows if session.get(ResultObject, r.sop_instance_uid) is None]
            session.add_all(new)
            if not new:
                return
            ledger.append(
                session,
                subject=ledger.study_subject(source.result.study_instance_uid),
                kind="encoded",
                actor="worker",
                detail={
                    "result_id": result_id,
                    "objects": [
                        {
                            "role": r.role,
                            "encoding": r.encoding,
                            "sop_instance_uid": r.sop_instance_uid,
                            "sha256": r.digest,
                            "bytes": r.size_bytes,
                            "repairs": [f"{x['attribute']} {x['action']}: {x['reason']}" for x in r.repairs or []],
                        }
                        for r in new
                    ],
                },
            )


def _copy(row: ResultObject) -> ResultObject:
    """A row that is not bound to a transaction that failed."""
    return ResultObject(**{column.key: getattr(row, column.key) for column in ResultObject.__table__.columns})


def _image(part: SeriesPart) -> NDArray[np.float32]:
    if part.volume is None:
        raise Permanent("a picture needs the source's pixels, which cannot be read")
    image: NDArray[np.float32] = part.volume.array[0]
    return image


def _objects(session: Session, result_id: str) -> Sequence[ResultObject]:
    return session.scalars(
        select(ResultObject).where(ResultObject.result_id == result_id).order_by(ResultObject.spool_path)
    ).all()


def _outgoing(item: ResultObject, study_instance_uid: str, spool: Spool) -> OutgoingObject:
    roles: dict[str, Role] = {"SEG": "SEG", "SR": "SR", "SC": "SC", "notice": "notice"}
    if item.role not in roles:
        raise Rejected(f"object {item.sop_instance_uid} has the unknown role {item.role}")
    return OutgoingObject(
        sop_instance_uid=item.sop_instance_uid,
        sop_class_uid=item.sop_class_uid,
        transfer_syntax_uid=item.transfer_syntax_uid,
        series_instance_uid=item.series_instance_uid,
        study_instance_uid=study_instance_uid,
        path=spool.resolve(item.spool_path),
        digest=item.digest,
        role=roles[item.role],
    )


def _of_segmentation(encoding: str) -> SegEncoding:
    return "LABELMAP" if encoding == "LABELMAP" else "BINARY"


def _superseded(session: Session, result: Result, encoding: str) -> Superseded:
    """What the objects of this encoding replace (CMP-17): the same of the earlier result; where it was not made in
    this encoding, what a PACS has of it, else any."""
    if result.supersedes is None:
        return Superseded()
    taken = taken_by_a_pacs(session, result.supersedes)
    old = sorted(_objects(session, result.supersedes), key=lambda o: o.sop_instance_uid not in taken)

    def reference(roles: Sequence[str], wanted: str) -> ObjectReference | None:
        able = [o for o in old if o.role in roles]
        item = next((o for o in able if o.encoding == wanted), next(iter(able), None))
        return (
            None
            if item is None
            else ObjectReference(
                sop_class_uid=item.sop_class_uid,
                sop_instance_uid=item.sop_instance_uid,
                series_instance_uid=item.series_instance_uid,
            )
        )

    return Superseded(
        image=reference(("SEG", "SC"), encoding),
        report=reference(("SR",), SR_ENCODING.get(encoding, "")),  # type: ignore[call-overload]
    )


def _segments(result: Result, bundle: Bundle) -> tuple[SegmentContent, ...]:
    measured = {m["name"]: m for m in result.measurements or []}
    unit = (result.runtime or {}).get("unit", "1")
    return tuple(
        SegmentContent(
            number=number,
            value=spec.value,
            region=spec.region,
            name=spec.name,
            category=spec.category,
            type=spec.type,
            laterality=spec.laterality,
            colour=spec.colour,
            voxels=measured[spec.name]["voxels"],
            volume_ml=measured[spec.name]["volume_ml"],
            mean_intensity=(measured[spec.name]["mean_intensity"] or [None])[0],
            confidence=measured[spec.name]["confidence"],
            unit=unit,
        )
        for number, spec in enumerate(bundle.labels, start=1)
    )


def _check(check: dict[str, object]) -> Check:
    bound = check.get("bound")
    return Check(
        name=str(check["name"]),
        segment=str(check["segment"]) if check["segment"] is not None else None,
        value=check["value"] if isinstance(check["value"], float) else str(check["value"]),
        limit=str(check["limit"]),
        verdict=Verdict(str(check["verdict"])),
        bound=bound if isinstance(bound, float) else None,
    )
