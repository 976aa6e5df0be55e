"""Compares the spool with the rows once, at the indexer's start: a database that was restored, or failed over, may be
older than the spool, and a spool older than the database.

Objects without a row go back to `incoming/`, where the indexer takes them like any other: their file meta says all that
a row needs. Rows without a file are counted. Both are alarmed; nothing is deleted. Small steps between the batches of
intake, so that neither waits for the other; the memory needed is that of the largest study's list of names.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import select

from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import ObjectMissing, SpoolUnsafe
from storage.records import Instance
from storage.spool import Spool

LOG = logging.getLogger(__name__)

ALARM_WITHOUT_ROW = "objects-without-row"
ALARM_WITHOUT_FILE = "objects-without-file"
_SUBJECT = "gateway"
_ACTOR = "indexer"
_STEP = 500


class SpoolComparison:
    """`step` until `done`. Used by the indexer's thread, while no other indexer works on the spool.

    From `files_done` on, every object of the spool has a row or lies in `incoming/`.
    """

    def __init__(self, spool: Spool, database: Database) -> None:
        self._spool = spool
        self._database = database
        self._listing = self._settled()
        self._listed: Sequence[Path] | None = None  # of these is still to be found out which have a row
        self._without_row = 0
        self._without_file = 0
        self._compared_to = ""  # object id: the rows up to this one have been looked at
        self.files_done = False
        self.done = False

    def step(self) -> None:
        """Compare some hundred files, or rows once all files are done.

        Raises DatabaseAway, SpoolUnsafe; the next call goes on.
        """
        if self.done:
            return
        if self.files_done:
            self._compare_rows()
            return
        try:
            if self._listed is None:
                self._listed = next(self._listing, ())
            if self._listed:
                self._take_back(self._listed)
            self._listed = next(self._listing, ())
        except SpoolUnsafe:
            self._listing, self._listed = self._settled(), None
            raise
        self.files_done = not self._listed

    def _settled(self) -> Iterator[list[Path]]:
        """Some hundred files at a time; a study's stay together, so that it is not taken for whole in between."""
        found: list[Path] = []
        for folder in itertools.chain(self._spool.study_folders(), [self._spool.root / "quarantine"]):
            try:
                found += self._spool.objects_in(folder)
            except SpoolUnsafe as error:
                LOG.error("its objects are not compared with the index before the next start: %s", error)
            if len(found) >= _STEP:
                yield found
                found = []
        if found:
            yield found

    def _take_back(self, paths: Sequence[Path]) -> None:
        known: set[str] = set()
        with self._database.reading() as session:
            for start in range(0, len(paths), _STEP):
                ids = [path.stem for path in paths[start : start + _STEP]]
                known.update(session.scalars(select(Instance.object_id).where(Instance.object_id.in_(ids))))
        missing = [path for path in paths if path.stem not in known]
        if not missing:
            return
        # Told before they are moved: from `incoming/` they look like any other object.
        with self._database.session() as session:
            raise_alarm(
                session,
                kind=ALARM_WITHOUT_ROW,
                subject=_SUBJECT,
                message=f"{self._without_row + len(missing)} objects of the spool had no row in the database, which is "
                "older than the spool (a restore, or a failover that lost commits); they are indexed again, and their "
                "studies are processed again",
            )
        self._without_row += len(missing)
        LOG.warning("%d objects of the spool have no row and are indexed again", len(missing))
        self._spool.take_back(missing)

    def _compare_rows(self) -> None:
        with self._database.reading() as session:
            rows = session.execute(
                select(Instance.object_id, Instance.spool_path)
                .where(Instance.object_id > self._compared_to)
                .order_by(Instance.object_id)
                .limit(_STEP)
            ).all()
        missing = sum(not self._has_file(spool_path) for _, spool_path in rows)
        if len(rows) < _STEP:
            self._tell_without_file(self._without_file + missing)
            self.done = True
            return
        self._without_file += missing
        self._compared_to = rows[-1].object_id

    def _has_file(self, spool_path: str) -> bool:
        try:
            return self._spool.resolve(spool_path).is_file()
        except (ObjectMissing, OSError):
            return False

    def _tell_without_file(self, count: int) -> None:
        with self._database.session() as session:
            if not count:
                clear_alarms(session, kind=ALARM_WITHOUT_FILE, subject=_SUBJECT, by=_ACTOR)
                return
            raise_alarm(
                session,
                kind=ALARM_WITHOUT_FILE,
                subject=_SUBJECT,
                message=f"{count} objects that the database names are not in the spool, or cannot be read there; "
                "restore the spool from a backup, or have their studies sent again",
            )
