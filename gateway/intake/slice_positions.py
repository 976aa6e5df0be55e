"""The slice positions of the studies that are being received, each header read once while the study still grows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.intake.errors import IntakeRejected
from gateway.intake.routing import HeaderReader
from gateway.intake.slice_gaps import SliceGap, SlicePosition, slice_gaps, slice_position
from storage.errors import StorageError
from storage.records import Instance, InstanceState

_HEADERS_PER_TURN = 400  # of one study: a large one must not keep the others waiting
_log = structlog.get_logger(__name__)


class SlicePositions:
    """Used by one thread. What is not in use any more is dropped."""

    def __init__(self, headers: HeaderReader) -> None:
        self._headers = headers
        # study -> object -> position (None: has none)
        self._known: dict[str, dict[str, SlicePosition | None]] = {}

    def keep_only(self, study_instance_uids: Collection[str]) -> None:
        for gone in set(self._known) - set(study_instance_uids):
            del self._known[gone]

    def unread(self, session: Session, study_instance_uid: str) -> Sequence[tuple[str, str]]:
        """(object id, spool path) of objects in use whose header was not yet read; forgets those not in use."""
        known = self._known.setdefault(study_instance_uid, {})
        rows = session.execute(
            select(Instance.object_id, Instance.spool_path).where(
                Instance.study_instance_uid == study_instance_uid, Instance.state == InstanceState.CURRENT
            )
        ).all()
        for gone in set(known) - {object_id for object_id, _ in rows}:
            del known[gone]
        return [(object_id, path) for object_id, path in rows if object_id not in known]

    def read(self, study_instance_uid: str, unread: Sequence[tuple[str, str]]) -> bool:
        """Read some of these headers; returns whether all are read."""
        for object_id, path in unread[:_HEADERS_PER_TURN]:
            try:
                position = slice_position(self._headers(path))
            except (IntakeRejected, StorageError, OSError) as error:
                _log.warning("slice position not readable", object_id=object_id, error=type(error).__name__)
                position = None
            self._known[study_instance_uid][object_id] = position
        return len(unread) <= _HEADERS_PER_TURN

    def gaps(self, study_instance_uid: str) -> tuple[SliceGap, ...]:
        """Missing slices, of what is read."""
        return slice_gaps([p for p in self._known.get(study_instance_uid, {}).values() if p is not None])
