"""How a study is deleted (OPS-57): decided once, then finished by whoever comes to it, however often somebody dies.

    begin    one transaction: the reasons to stay are looked at behind the study's lock; its state is `deleting`, so
             that nothing reads or writes it any more; the deletion is written down, and a worker finishes it in a
             minute if the one that began does not
    finish   one transaction: the folder leaves its place, all rows go, the ledger gets its tombstone; then the files

What arrives meanwhile waits in `incoming/` and opens the study anew: it is new work, with new results. The objects that
were deleted are known by their ids, so that an old copy of the spool does not bring them back.

On request nothing is left that names the study: its chain of events is replaced by one event of the chain `deletions`.
Retention leaves the chain, which holds UIDs and no more, and says at its end that the study was removed; what is kept
for drift goes on counting, without anything that leads to the study.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.deletion.reasons_to_stay import ALWAYS, NEED_FORCE, Judged, Reason, judge_studies
from gateway.deletion.study_removal import keep_facts, remove_rows, study_ids, subjects_of
from gateway.due_work import enqueue_deletion
from gateway.durable import Enqueuer
from gateway.errors import Rejected
from gateway.settings import Settings
from storage import ledger
from storage.database import Database
from storage.deletion_records import DeletionState, StudyDeletion, object_tail, tails_of
from storage.learning_records import LearningRun
from storage.records import Instance, LedgerEvent, Study, StudyState, utc_now
from storage.spool import Spool, study_key

REMOVED, TOMBSTONE = "study-removed", "study-deleted"
_FINISHED_BY_A_WORKER_S = 60.0
_LATE_WRITES = timedelta(days=2)
"""For so long a step that was at work may still write files of the study; they are looked for and go, too."""

Why = Literal["retention", "request"]
Boundary = Callable[[str], None]


class StudyStays(Rejected):
    """A study is not deleted; `reasons` say why, `with_force` whether --force would."""

    def __init__(self, message: str, reasons: Sequence[Reason], *, with_force: bool) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)
        self.with_force = with_force


@dataclass(frozen=True, kw_only=True)
class Deleted:
    """What is gone. `copies`: cases in the datasets of trainings that were made of the study and are still there."""

    deletion_id: str
    objects: int
    results: int
    size_bytes: int
    in_spite_of: tuple[str, ...]
    copies: tuple[str, ...]


class Deletions:
    """Begins and finishes deletions; `boundary` hears of every point between two changes."""

    def __init__(
        self,
        *,
        database: Database,
        spool: Spool,
        enqueuer: Enqueuer,
        settings: Settings,
        boundary: Boundary = lambda _name: None,
    ) -> None:
        self._database = database
        self._spool = spool
        self._enqueuer = enqueuer
        self._settings = settings
        self._boundary = boundary

    # -- deciding ----------------------------------------------------------------------------------------------

    def delete(self, study_instance_uid: str, *, by: str, reason: str, force: bool = False) -> Deleted:
        """On request, whatever its age. One that retention has removed leaves its events, which go, too.

        Raises KeyError where nothing is known of the study, StudyStays, Rejected without a reason; SpoolUnsafe and
        DatabaseAway: then it is finished by a worker, if it was decided.
        """
        reason = reason.strip()
        if not reason:
            raise Rejected("a deletion needs a reason: it is kept in the ledger")
        return self.finish(self._begin(study_instance_uid, why="request", by=by, reason=reason, force=force))

    def retire(self, study: Judged, *, reason: str, in_shadow: Collection[tuple[str, str]]) -> Deleted:
        """By retention. Raises StudyStays where something stands against it by now; SpoolUnsafe, DatabaseAway."""
        uid = study.study_instance_uid
        return self.finish(self._begin(uid, why="retention", by="retention", reason=reason, in_shadow=in_shadow))

    def _begin(
        self,
        uid: str,
        *,
        why: Why,
        by: str,
        reason: str,
        force: bool = False,
        in_shadow: Collection[tuple[str, str]] = (),
    ) -> str:
        with self._database.session() as session:
            study = session.get(Study, uid, with_for_update=True)
            if study is not None and study.state == StudyState.DELETING:
                return _under_way(session, uid)
            if study is None:
                return self._erase_events(session, uid, why=why, by=by, reason=reason)
            spite = self._objections(session, uid, why=why, force=force, in_shadow=in_shadow)
            ids = study_ids(session, uid)
            deletion = StudyDeletion(
                deletion_id=secrets.token_hex(16),
                study_key=study_key(uid),
                study_instance_uid=uid,
                why=why,
                by=by,
                reason=reason,
                in_spite_of=spite,
                state=DeletionState.UNDER_WAY,
                asked_at=utc_now(),
                result_ids=list(ids.results),
                workflow_ids=list(ids.workflows),
            )
            session.add(deletion)
            study.state, study.state_reason = StudyState.DELETING, f"{why}, by {by}"
            session.flush()
            for name, delay_s in (("finish", _FINISHED_BY_A_WORKER_S), ("late writes", self._late_s(spite))):
                if delay_s:
                    enqueue_deletion(session, self._enqueuer, deletion.deletion_id, why=name, delay_s=delay_s)
        self._boundary("decided")
        return deletion.deletion_id

    def _erase_events(self, session: Session, uid: str, *, why: Why, by: str, reason: str) -> str:
        """Of a study that retention has removed only the events are left; they go at once."""
        ledger.hold(session, ledger.study_subject(uid))
        if why == "retention" or session.get(Study, uid) is not None or not _has_events(session, uid):
            raise KeyError(uid)
        now = utc_now()
        deletion = StudyDeletion(
            deletion_id=secrets.token_hex(16),
            study_key=study_key(uid),
            why=why,
            by=by,
            reason=reason,
            in_spite_of=[],
            state=DeletionState.DONE,
            asked_at=now,
            done_at=now,
        )
        session.add(deletion)
        session.flush()
        _tombstone(session, deletion, results=0, erased=ledger.erase(session, [ledger.study_subject(uid)]))
        return deletion.deletion_id

    def _objections(
        self, session: Session, uid: str, *, why: Why, force: bool, in_shadow: Collection[tuple[str, str]]
    ) -> list[str]:
        """What stands against it and does not count; raises StudyStays for what counts."""
        gateway = self._settings.gateway
        (judged,) = judge_studies(
            session,
            gateway.retention,
            now=utc_now(),
            late_window_s=gateway.late_window_s,
            in_shadow=in_shadow,
            only=uid,
        )
        if why == "retention":
            counting = list(judged.reasons)
        else:
            counting = [r for r in judged.reasons if r.kind in ALWAYS or (r.kind in NEED_FORCE and not force)]
        if counting:
            words = "; ".join(dict.fromkeys(reason.words for reason in counting))
            forced = not any(reason.kind in ALWAYS for reason in counting)
            raise StudyStays(f"study {uid} is not deleted: {words}", counting, with_force=forced)
        return sorted(judged.kinds & NEED_FORCE)

    def _late_s(self, spite: Sequence[str]) -> float:
        """When a step that was at work has ended, or was ended; 0 where none was."""
        return 2 * self._settings.gateway.worker.inference_deadline_s if spite else 0.0

    # -- doing -------------------------------------------------------------------------------------------------

    def finish_all(self) -> str:
        """What was begun and not finished, and what steps that were at work have written since. The job `deletion`,
        and the first thing that retention does."""
        with self._database.reading() as session:
            unfinished = session.scalars(
                select(StudyDeletion.deletion_id)
                .where(StudyDeletion.state == DeletionState.UNDER_WAY)
                .order_by(StudyDeletion.asked_at)
            ).all()
        for deletion_id in unfinished:
            self.finish(deletion_id)
        self._sweep(utc_now())
        return (
            f"{len(unfinished)} deletions finished that were cut short" if unfinished else "no deletion was cut short"
        )

    def finish(self, deletion_id: str) -> Deleted:
        """Rows, files and events go; done already, it says what was. Raises DatabaseAway, SpoolUnsafe."""
        with self._database.reading() as session:
            workflows = session.get_one(StudyDeletion, deletion_id).workflow_ids or []
        self._enqueuer.forget(workflows)
        self._boundary("workflows forgotten")
        with self._database.session() as session:
            deletion = session.get_one(StudyDeletion, deletion_id, with_for_update=True)
            is_due = deletion.state == DeletionState.UNDER_WAY
            deleted = self._remove(session, deletion) if is_due else _said(deletion)
            self._boundary("before commit")
        self._boundary("rows gone")
        self._spool.sweep_studies_aside()
        self._boundary("files gone")
        return deleted

    def _remove(self, session: Session, deletion: StudyDeletion) -> Deleted:
        uid = str(deletion.study_instance_uid)
        session.get_one(Study, uid, with_for_update=True)
        sizes = session.execute(
            select(Instance.object_id, Instance.size_bytes).where(Instance.study_instance_uid == uid)
        ).all()
        deletion.objects, deletion.size_bytes = len(sizes), sum(row.size_bytes for row in sizes)
        deletion.object_tails = b"".join(sorted(object_tail(row.object_id) for row in sizes))
        if deletion.why == "retention":
            keep_facts(session, deletion.result_ids or [])
        ids = remove_rows(session, uid)
        self._boundary("rows going")
        # Committed, its objects would come back at the next start of the indexer; not committed, this is done again.
        self._spool.set_study_aside(deletion.study_key)
        self._boundary("folder aside")
        subject = ledger.study_subject(uid)
        erased: dict[str, Any] = {"events": 0}
        if deletion.why == "retention":
            detail = {"deletion": deletion.deletion_id, "reason": deletion.reason, "objects": deletion.objects}
            ledger.append(session, subject=subject, kind=REMOVED, actor=deletion.by, detail=detail)
        else:
            erased = ledger.erase(session, subjects_of(uid, ids))
        copies = copies_in_datasets(session, ids.results, self._settings)
        _tombstone(session, deletion, results=len(ids.results), erased=erased, copies=len(copies))
        deletion.state, deletion.done_at, deletion.study_instance_uid = DeletionState.DONE, utc_now(), None
        session.flush()
        return _said(deletion, results=len(ids.results), copies=copies)

    def _sweep(self, now: datetime) -> None:
        """Files that were written after the rows had gone, by ids that no new study can have."""
        with self._database.reading() as session:
            recent = session.scalars(
                select(StudyDeletion).where(
                    StudyDeletion.state == DeletionState.DONE, StudyDeletion.result_ids.is_not(None)
                )
            ).all()
        for deletion in recent:
            for result_id in deletion.result_ids or []:
                self._spool.remove_result(deletion.study_key, result_id)
            self._spool.remove_objects(deletion.study_key, partial(_is_one_of, tails_of(deletion.object_tails)))
            if deletion.done_at is None or deletion.done_at > now - _LATE_WRITES:
                continue
            self._enqueuer.forget(deletion.workflow_ids or [])
            with self._database.session() as session:
                row = session.get_one(StudyDeletion, deletion.deletion_id)
                row.result_ids = row.workflow_ids = None
        self._spool.sweep_studies_aside()


def _is_one_of(tails: frozenset[bytes], object_id: str) -> bool:
    return object_tail(object_id) in tails


def _under_way(session: Session, uid: str) -> str:
    return session.scalars(
        select(StudyDeletion.deletion_id).where(
            StudyDeletion.study_instance_uid == uid, StudyDeletion.state == DeletionState.UNDER_WAY
        )
    ).one()


def _has_events(session: Session, uid: str) -> bool:
    query = select(LedgerEvent.event_id).where(LedgerEvent.subject == ledger.study_subject(uid)).limit(1)
    return session.scalars(query).first() is not None


def _tombstone(
    session: Session, deletion: StudyDeletion, *, results: int, erased: dict[str, Any], copies: int = 0
) -> None:
    """What the ledger keeps, which names no study and no patient."""
    detail = {
        "deletion": deletion.deletion_id,
        "why": deletion.why,
        "reason": deletion.reason,
        "in_spite_of": deletion.in_spite_of,
        "objects": deletion.objects,
        "bytes": deletion.size_bytes,
        "results": results,
        "copies_in_datasets": copies,
        "erased": erased,
    }
    ledger.append(session, subject=ledger.DELETIONS, kind=TOMBSTONE, actor=deletion.by, detail=detail)


def copies_in_datasets(session: Session, result_ids: Sequence[str], settings: Settings) -> list[str]:
    """Cases that trainings made of these results, each with the folder of the training: images and labels of the study,
    which a deletion leaves to a person, since networks were trained on them."""
    wanted = set(result_ids)
    return [
        f"{settings.models_dir / str(run.folder)}: {case['case']}"
        for run in session.scalars(select(LearningRun).order_by(LearningRun.requested_at, LearningRun.run_id))
        for case in run.cases or []
        if case.get("case") and case["result_id"] in wanted
    ]


def _said(deletion: StudyDeletion, *, results: int | None = None, copies: Sequence[str] = ()) -> Deleted:
    return Deleted(
        deletion_id=deletion.deletion_id,
        objects=deletion.objects,
        results=len(deletion.result_ids or []) if results is None else results,
        size_bytes=deletion.size_bytes,
        in_spite_of=tuple(deletion.in_spite_of),
        copies=tuple(copies),
    )
