"""Up to when the index is complete: the mark that the indexer leaves in the spool, and the alarm when it stays behind.

The mark says: whatever was acknowledged before this moment is in the index, or an alarm names it. Assembly counts
quiet time up to the mark, not up to now, so that a sender never looks quiet because its objects wait to be indexed.

It is the time of an empty file in the spool. It moves with every look of the indexer into `incoming/`, which would be
as many synced transactions; and it is true of one spool, whichever host's indexer works on it. Losing it is harmless:
without a mark studies wait until the indexer has looked once.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.durable_files import unsafe

ALARM_INDEX_BEHIND = "index-behind"
_SUBJECT = "gateway"
_ACTOR = "assembly"
_BEHIND = timedelta(seconds=60)


class IndexMark:
    """The mark of one spool; written by its indexer, read by the workers."""

    def __init__(self, spool_root: Path) -> None:
        self._path = spool_root / "indexed"

    def write(self, until: datetime) -> None:
        """Raises SpoolUnsafe."""
        ns = int(until.timestamp() * 1e6) * 1000
        try:
            try:
                os.utime(self._path, ns=(ns, ns))
            except FileNotFoundError:
                self._path.touch()
                os.utime(self._path, ns=(ns, ns))
        except OSError as error:
            raise unsafe(error, self._path.parent) from error

    def remove(self) -> None:
        """Nothing is known any more. Raises SpoolUnsafe."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise unsafe(error, self._path.parent) from error

    def read(self) -> datetime | None:
        """None where no indexer has finished a look yet, or the spool cannot be read now."""
        try:
            with self._path.open("rb") as file:  # opened, for a network file system may answer stat() from its cache
                return datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime_ns // 1000 / 1e6, UTC)
        except OSError:
            return None


class IndexWatch:
    """Raises the alarm `index-behind` once while the index stays behind, and clears it. Used by one thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._behind_since: datetime | None = None
        self._alarmed: bool | None = None  # None: an alarm of the process before may be open

    def look(self, now: datetime, mark: datetime | None) -> None:
        """Call with every tick. Raises DatabaseAway."""
        # A mark from the future is as far from the truth: two hosts differ about the time.
        if mark is not None and abs(now - mark) <= _BEHIND:
            self._behind_since = None
            if self._alarmed is not False:
                with self._database.session() as session:
                    clear_alarms(session, kind=ALARM_INDEX_BEHIND, subject=_SUBJECT, by=_ACTOR)
                self._alarmed = False
            return
        # At a start the mark is old, and the indexer needs a moment too.
        self._behind_since = min(self._behind_since or now, now)
        if now - self._behind_since >= _BEHIND and not self._alarmed:
            until = f"up to {mark.isoformat(timespec='seconds')} only" if mark is not None else "up to no known time"
            with self._database.session() as session:
                raise_alarm(
                    session,
                    kind=ALARM_INDEX_BEHIND,
                    subject=_SUBJECT,
                    message=f"the index is complete {until}, so studies wait to be declared whole: no indexer runs, it "
                    "is far behind, it still compares the spool with the rows after its start, or the clocks of two "
                    "hosts differ; look at seggate_spool_incoming and at the log of the indexer",
                )
            self._alarmed = True
