"""Turns what lies in `incoming/` into rows, then moves it to its place: one process per spool.

The database may be away for as long as it likes: the objects wait in the spool, in their order (REC-03). The rows
are committed first, with the final path, and the file is moved afterwards; a crash in between leaves a row whose
object is found in `incoming/` and moved by the next round. After each round the mark says up to when the index is
complete (gateway.intake.index_mark).
"""

from __future__ import annotations

import fcntl
import logging
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from pydicom.dataset import Dataset
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from gateway.intake.association_index import apply_event
from gateway.intake.errors import IntakeRejected, without_values
from gateway.intake.examination import Examined, examine
from gateway.intake.index_mark import IndexMark
from gateway.intake.spool_comparison import SpoolComparison
from gateway.intake.study_index import ACTOR, GATEWAY_SUBJECT, StudyIndex
from gateway.settings import Settings
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.errors import DatabaseAway, ObjectMissing, SpoolUnsafe
from storage.records import Instance, Series, Study, utc_now
from storage.spool import Incoming, Settlement, Spool, study_key

LOG = logging.getLogger(__name__)

_POLL_S = 0.03  # what is declared whole waits for the mark, so this is part of every study's way
_BATCH = 100
_FIRST_RETRY_S = 0.5
_MAX_RETRY_S = 10.0
_SKIPPED_RETRY_S = 60.0  # an entry that could not be indexed is tried again after so long
_STUDY_GOES, _STUDY_GOES_RETRY_S = "study-goes", 0.5  # its study is being deleted; this one opens it anew
_RETURNED = "deleted-objects-returned"
_MAX_NAMED = 5  # entries named in an alarm

ALARM_ENTRY_UNREADABLE = "spool-entry-unreadable"
ALARM_INDEX_REFUSED = "index-refused"
ALARM_CLOCK = "clock-ahead"
_CLOCK_TOLERANCE = timedelta(seconds=60)  # smaller differences only lengthen a wait by as much
_WHAT_TO_DO = {
    ALARM_ENTRY_UNREADABLE: "cannot be read; look at the disk, the owner and the kind of file",
    ALARM_INDEX_REFUSED: "are refused by the database, also as faulty objects; the log names the error",
}

Event = tuple[str, dict[str, Any]]


class _EntryUnreadable(Exception):
    """One entry of `incoming/` cannot be read, or is no file; the others can."""


def no_foreign_results(_dataset: Dataset) -> str | None:
    """Recognises nothing: only the index of our own SOP Instance UIDs counts."""
    return None


class Indexer:
    """`run` until stopped, or `run_once`. Used by one thread.

    `is_own_result` says from a header why an object is some gateway's result, or None (OUT-46).
    """

    def __init__(
        self,
        spool: Spool,
        database: Database,
        settings: Settings,
        *,
        is_own_result: Callable[[Dataset], str | None] = no_foreign_results,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._spool = spool
        self._database = database
        self._policy = settings.gateway.receiver.conflict_policy
        self._is_own_result = is_own_result
        self._clock = clock
        self._wall_clock = wall_clock
        self._mark = IndexMark(spool.root)
        self._indexed_until: datetime | None = None  # the mark, once a round has begun
        self._comparison = SpoolComparison(spool, database)
        self._skipped: dict[str, tuple[str, str, float]] = {}  # entry id -> alarm kind, file name, when to try again
        self._alarmed: dict[str, list[str]] | None = None  # names per kind as last told; None: not told yet

    def run(self, stop: threading.Event) -> None:
        """Index until `stop`; waits for the database and for the spool instead of failing."""
        retry_s = _FIRST_RETRY_S
        with self._only_one(stop):
            while not stop.is_set():
                try:
                    done = self.run_once()
                except (DatabaseAway, SpoolUnsafe) as error:
                    LOG.warning("indexing waits %.1f s: %s", retry_s, error)
                    stop.wait(retry_s)
                    retry_s = min(retry_s * 2, _MAX_RETRY_S)
                    continue
                retry_s = _FIRST_RETRY_S
                if not done and self.compared:
                    stop.wait(_POLL_S)

    @property
    def compared(self) -> bool:
        """Whether everything that was in the spool and in the rows at the start has been compared."""
        return self._comparison.done

    def run_once(self) -> int:
        """Index everything that is in `incoming/` now; returns how many objects and events. In the first rounds,
        some of the rest of the spool is compared with the rows before that.

        Raises DatabaseAway, SpoolUnsafe: what was not committed stays in `incoming/`. An entry that cannot be read,
        or that the database refuses, stays there too: an alarm names it, and it is tried again every minute.
        """
        now, listed_at = self._clock(), self._wall_clock()
        self._take_up_mark(listed_at)
        self._comparison.step()
        incoming = self._spool.incoming()
        for gone in set(self._skipped) - {entry.id for entry in incoming}:
            del self._skipped[gone]
        waiting = [e for e in incoming if e.id not in self._skipped or self._skipped[e.id][2] <= now]
        for start in range(0, len(waiting), _BATCH):
            self._index(waiting[start : start + _BATCH])
        self._tell_skipped()
        self._indexed_until = max(self._indexed_until or listed_at, listed_at)
        if self._comparison.files_done:  # until then, the spool may hold objects of a study that no row names
            self._mark.write(self._indexed_until)
        return len(waiting)

    def _take_up_mark(self, now: datetime) -> None:
        """Go on from the last mark. One from the future shows that the clock was ahead and was put back since.

        What was stamped meanwhile would keep its study waiting until the wrong time has come, so it counts from now.
        """
        if self._indexed_until is None:
            self._indexed_until = self._mark.read()
            self._mark.remove()  # the spool and the rows may have changed since: not true before it is written again
        if self._indexed_until is None or self._indexed_until <= now + _CLOCK_TOLERANCE:
            return
        ahead = self._indexed_until - now
        with self._database.session() as session:
            for column in (Instance.received_at, Series.last_received_at, Study.last_received_at):
                session.execute(update(column.class_).where(column > now).values({column.key: now}))
            self._alarm_clock(session, f"this host's clock was put back by {ahead}; what was stamped ahead counts as")
        self._indexed_until = now

    def _index(self, batch: Sequence[Incoming]) -> None:
        try:
            self._commit(batch)
        except (DatabaseAway, SpoolUnsafe):
            raise
        except Exception as error:  # noqa: BLE001 - the edge: one entry must not hold up the others
            if len(batch) == 1:
                self._index_alone(batch[0])
                return
            LOG.warning("a batch of %d is indexed one by one: %s", len(batch), without_values(error))
            for entry in batch:
                self._index_alone(entry)

    def _index_alone(self, entry: Incoming) -> None:
        try:
            self._commit([entry])
        except (DatabaseAway, SpoolUnsafe):
            raise
        except _EntryUnreadable as error:
            self._skip(entry, ALARM_ENTRY_UNREADABLE, str(error))
        except Exception as error:  # noqa: BLE001 - the edge
            LOG.error("%s cannot be indexed as it is: %s", entry.path.name, without_values(error))
            self._index_as_faulty(entry, IntakeRejected(f"the index cannot hold it ({type(error).__name__})"))

    def _index_as_faulty(self, entry: Incoming, fault: IntakeRejected) -> None:
        try:
            self._commit([entry], fault=fault)
        except (DatabaseAway, SpoolUnsafe):
            raise
        except _EntryUnreadable as error:
            self._skip(entry, ALARM_ENTRY_UNREADABLE, str(error))
        except Exception as error:  # noqa: BLE001 - the edge
            self._skip(entry, ALARM_INDEX_REFUSED, without_values(error))

    def _skip(self, entry: Incoming, kind: str, why: str) -> None:
        LOG.error("%s stays in incoming/ and is tried again in %.0f s: %s", entry.path.name, _SKIPPED_RETRY_S, why)
        self._skipped[entry.id] = (kind, entry.path.name, self._clock() + _SKIPPED_RETRY_S)

    def _tell_skipped(self) -> None:
        """One alarm per kind, for as long as an entry is skipped; written when the entries change."""
        names = {
            kind: sorted(name for skipped_kind, name, _ in self._skipped.values() if skipped_kind == kind)
            for kind in _WHAT_TO_DO
        }
        if names == self._alarmed:
            return
        with self._database.session() as session:
            for kind, skipped in names.items():
                if not skipped:
                    clear_alarms(session, kind=kind, subject=GATEWAY_SUBJECT, by=ACTOR)
                elif self._alarmed is None or skipped != self._alarmed[kind]:
                    listed = ", ".join(skipped[:_MAX_NAMED]) + (", ..." if len(skipped) > _MAX_NAMED else "")
                    raise_alarm(
                        session,
                        kind=kind,
                        subject=GATEWAY_SUBJECT,
                        message=f"{len(skipped)} entries of the spool's incoming/ {_WHAT_TO_DO[kind]}: {listed}",
                    )
        self._alarmed = names

    def _commit(self, batch: Sequence[Incoming], *, fault: IntakeRejected | None = None) -> None:
        """Read, write the rows in one transaction, then move the files. `fault` replaces what was found."""
        read: list[tuple[Incoming, Examined | Event]] = []
        for entry in batch:
            content = self._read(entry)
            if isinstance(content, Examined) and fault is not None:
                content = replace(content, header=None, fault=fault)
            if content is not None:
                read.append((entry, content))
        moves: list[Settlement] = []
        waiting: list[Incoming] = []
        deleted: list[Examined] = []
        with self._database.session() as session:
            index = StudyIndex(session, self._spool, conflict_policy=self._policy, is_own_result=self._is_own_result)
            index.prepare([content for _, content in read if isinstance(content, Examined)])
            for entry, content in read:
                if isinstance(content, Examined):
                    if index.waits(content):
                        waiting.append(entry)
                        continue
                    if index.deleted_by(content) is not None:
                        deleted.append(content)
                        continue
                    moves.append(index.place(self._in_time(session, content)))
                    continue
                kind, detail = content
                try:
                    apply_event(session, kind, detail)
                except (KeyError, TypeError, ValueError):
                    LOG.exception("the event %s is damaged and left out", entry.path.name)
            without_study = self._tell_deleted(session, index, deleted)
        self._spool.settle(moves)
        for item in deleted:
            self._spool.remove_incoming(item.object_id)
        for key in without_study:
            self._spool.set_study_aside(key)
        if without_study:
            self._spool.sweep_studies_aside()
        for entry in batch:
            self._skipped.pop(entry.id, None)
        for entry in waiting:
            self._skipped[entry.id] = (_STUDY_GOES, entry.path.name, self._clock() + _STUDY_GOES_RETRY_S)
        for entry in batch:
            if entry.is_event:
                self._spool.forget_event(entry.path)

    def _tell_deleted(self, session: Session, index: StudyIndex, deleted: Sequence[Examined]) -> set[str]:
        """Objects of deleted studies came back with an old copy of the spool: they go again. Returns the keys of the
        studies that are not there anew, whose whole folders are such a copy."""
        by_deletion = Counter(str(index.deleted_by(item)) for item in deleted)
        for deletion_id, count in sorted(by_deletion.items()):
            detail = {"deletion": deletion_id, "objects": count}
            ledger.append(session, subject=ledger.DELETIONS, kind=_RETURNED, actor=ACTOR, detail=detail)
            LOG.warning("%d objects of a deleted study came back (an old copy of the spool?) and are deleted", count)
        studies = {str(item.study_instance_uid) for item in deleted}
        there = set(session.scalars(select(Study.study_instance_uid).where(Study.study_instance_uid.in_(studies))))
        return {study_key(uid) for uid in studies - there}

    def _in_time(self, session: Session, item: Examined) -> Examined:
        """The object with times that fit this indexer's clock, by which quiet time is measured.

        No object comes from the future. And it arrived after the mark of the round before, or that round would have
        seen it; its stamp may be earlier where the transfer took long, or the receiver is another host.
        """
        now, stamped = self._wall_clock(), item.evidence.received_at
        if stamped > now + _CLOCK_TOLERANCE:
            self._alarm_clock(session, f"objects are stamped {stamped - now} ahead of this host's clock; they count as")
        received_at = min(stamped, now)
        return replace(
            item,
            evidence=replace(item.evidence, received_at=received_at),
            arrived_at=max(received_at, min(self._indexed_until or received_at, now)),
        )

    def _alarm_clock(self, session: Session, what: str) -> None:
        message = f"{what} received now. Look at the clocks of the receivers and of this host (NTP)"
        raise_alarm(session, kind=ALARM_CLOCK, subject=GATEWAY_SUBJECT, message=message)

    def _read(self, entry: Incoming) -> Examined | Event | None:
        try:
            if not stat.S_ISREG(entry.path.stat().st_mode):
                raise _EntryUnreadable("it is no regular file")
            return self._spool.read_event(entry.path) if entry.is_event else examine(self._spool, entry)
        except (ObjectMissing, FileNotFoundError):
            return None  # moved or forgotten since the folder was listed
        except ValueError:
            LOG.exception("the event %s is damaged and left out", entry.path.name)
            return None
        except OSError as error:
            raise _EntryUnreadable(f"it cannot be read: {error.strerror or type(error).__name__}") from error
        except SpoolUnsafe as error:
            raise _EntryUnreadable(str(error)) from error

    @contextmanager
    def _only_one(self, stop: threading.Event) -> Iterator[None]:
        """Wait until no other indexer works on this spool; a crashed one's lock ended with its process."""
        self._spool.prepare()
        with (self._spool.root / "indexer.lock").open("w") as lock:
            while not stop.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    stop.wait(_FIRST_RETRY_S)
            yield
