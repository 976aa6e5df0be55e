"""Declares studies whole: state, version, ledger event and enqueued workflow in one transaction.

One `tick` looks at every study that is being received. What it may declare is decided by the rules of
`gateway.intake.evidence`; here is how a declaration is made so that it happens once, whoever ticks at the same time,
and what becomes of objects that come late (CMP-17).
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from gateway import study_state
from gateway.intake.errors import without_values
from gateway.intake.evidence import (
    Decision,
    ExpectedCount,
    StudyEvidence,
    decide,
    gather,
    object_counts,
)
from gateway.intake.index_mark import IndexWatch
from gateway.intake.reopening import reopen_missed
from gateway.intake.routing import HeaderReader, state_after_routing
from gateway.intake.slice_positions import SlicePositions
from gateway.setting_types import PeerAddress
from gateway.settings import Completeness, Settings
from storage import ledger
from storage.alarms import clear_alarms, raise_alarm
from storage.database import Database
from storage.deletion_records import times_deleted
from storage.errors import DatabaseAway
from storage.records import Instance, InstanceState, LedgerEvent, Study, StudyState, StudyVersion, utc_now
from storage.spool import study_key

ALARM_INCOMPLETE = "incomplete-study"
ALARM_LATE = "late-objects"
ALARM_FAILED = "assembly-failed"
_ACTOR = "assembly"
_LONGEST_PAUSE_S = 300
_INDEX_LAG = timedelta(seconds=5)  # a working indexer is far below one second behind
_HELD_LATE = 'objects came after the late window; an operator\'s "complete" makes a new version of the study'
_log = structlog.get_logger(__name__)


class ExpectedCountSource(Protocol):
    """Knows, or asks in the background, how many instances a study has (gateway.intake.expected_count)."""

    def latest(self, study_instance_uid: str, peer: PeerAddress) -> ExpectedCount: ...

    def forget(self, study_instance_uid: str) -> None: ...


class Assembly:
    """One per worker process; used by one thread. Several processes may tick over the same database.

    `enqueue` puts the study's workflow into its queue within the given transaction. `indexed_until` says up to when
    the index is complete (IndexMark.read).
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        expected_count: ExpectedCountSource,
        headers: HeaderReader,
        enqueue: Callable[[Session, StudyVersion], None],
        indexed_until: Callable[[], datetime | None],
        clock: Callable[[], datetime] = utc_now,
        sweep_s: float = 30.0,
    ) -> None:
        self._database = database
        self._settings = settings
        self._expected_count = expected_count
        self._enqueue = enqueue
        self._indexed_until = indexed_until
        self._index_watch = IndexWatch(database)
        self._clock = clock
        self._sweep = timedelta(seconds=sweep_s)
        self._swept_at: datetime | None = None
        # Dropped when the study is no longer being received:
        self._positions = SlicePositions(headers)
        self._interruptions: dict[str, set[str]] = {}  # study -> associations already noted
        self._failures: dict[str, tuple[int, datetime]] = {}  # study -> how often it failed, and when last

    def tick(self) -> list[str]:
        """Look at all studies that are being received; returns the ids of the versions declared now.

        A study whose rows or files cannot be read now stays open and does not hold up the others. Raises DatabaseAway.
        """
        now = self._clock()
        indexed_until = self._indexed_until()  # before the rows are read: they may only be newer than it says
        self._index_watch.look(now, indexed_until)
        self._sweep_missed(now)
        with self._database.reading() as session:
            open_studies = session.scalars(
                select(Study.study_instance_uid)
                .where(Study.state == StudyState.RECEIVING)
                .order_by(Study.last_received_at)
            ).all()
        self._positions.keep_only(open_studies)
        for noted in (self._interruptions, self._failures):
            for gone in set(noted) - set(open_studies):
                del noted[gone]
        declared = []
        for uid in open_studies:
            if self._pauses(uid, now):
                continue
            try:
                version_id = self._consider(uid, now, indexed_until)
                self._note_success(uid)
            except DatabaseAway:
                raise
            except Exception as error:  # noqa: BLE001 - the edge of this loop. Around the tick it would come too late:
                # what one study's content brings to light would stop every other study, again after each restart.
                self._note_failure(uid, error, now)
                continue
            if version_id is not None:
                declared.append(version_id)
        return declared

    def _consider(self, uid: str, now: datetime, indexed_until: datetime | None) -> str | None:
        with self._database.reading() as session:
            study = session.get(Study, uid)
            if study is None or study.state != StudyState.RECEIVING:
                return None
            if study.state_reason == _HELD_LATE and study.wish != "complete":
                return None
            settings = self._settings.completeness_of(study.calling_ae)
            evidence = gather(session, study)
            unread = self._positions.unread(session, uid) if evidence is not None and settings.gap_check else ()
        if evidence is None:
            seen_until = indexed_until or study.last_received_at
            if (seen_until - study.last_received_at).total_seconds() >= settings.quiet_s:
                self._settle_without_objects(uid)
            return None
        # Quiet is what the index has seen to be quiet. Both times are the indexer's, so no other clock matters.
        seen_until = max(indexed_until or evidence.last_object_at, evidence.last_object_at)
        evidence = replace(evidence, expected=self._expected(study, evidence, settings, seen_until))
        finished = self._positions.read(uid, unread)
        if settings.gap_check:
            evidence = replace(evidence, gaps=self._positions.gaps(uid), gaps_checked=finished)
        decision = decide(evidence, settings, seen_until)
        if decision.rule is None and now - seen_until > _INDEX_LAG and decide(evidence, settings, now).rule is not None:
            decision = Decision(rule=None, waiting_for="the index, which is behind: older objects may still come")
        if decision.rule in {"quiet-after-release", "quiet-open"} and settings.gap_check and not finished:
            decision = Decision(rule=None, waiting_for="the slice positions to be read")
        self._note_interruptions(evidence)
        if decision.rule is None:
            self._note_waiting(study, evidence, decision)
            return None
        return self._declare(study, evidence, decision, seen_until)

    def _expected(
        self, study: Study, evidence: StudyEvidence, settings: Completeness, seen_until: datetime
    ) -> ExpectedCount | None:
        sender = self._settings.sender(study.calling_ae)
        if settings.expected_count == "off" or sender is None or sender.query is None:
            return None
        quiet = (seen_until - evidence.last_object_at).total_seconds()
        if not evidence.ended and quiet < settings.quiet_s:
            return None  # more is coming; the answer would be old before it is used
        return self._expected_count.latest(study.study_instance_uid, sender.query)

    # -- declaring ---------------------------------------------------------------------------------------------

    def _declare(self, study: Study, evidence: StudyEvidence, decision: Decision, seen_until: datetime) -> str | None:
        uid = study.study_instance_uid
        try:
            with self._database.session() as session:
                version_id = self._declare_within(session, uid, evidence, decision, seen_until)
        except IntegrityError:
            # Another worker declared the same content between our look and our write.
            _log.info("study was declared elsewhere", study_key=study.study_key)
            return None
        if version_id is not None:
            self._expected_count.forget(uid)
        return version_id

    def _declare_within(
        self, session: Session, uid: str, evidence: StudyEvidence, decision: Decision, seen_until: datetime
    ) -> str | None:
        now = self._clock()
        study = session.get(Study, uid, with_for_update=True)
        if study is None or study.state != StudyState.RECEIVING or study.wish != evidence.wish:
            return None
        if object_counts(session, uid) != dict(evidence.object_states):
            return None  # something arrived since the evidence was gathered: the next tick sees it
        instances = session.scalars(
            select(Instance).where(Instance.study_instance_uid == uid, Instance.state == InstanceState.CURRENT)
        ).all()
        content = sorted((str(i.sop_instance_uid), i.digest, i.object_id) for i in instances)
        digest = content_digest([(sop, object_digest) for sop, object_digest, _ in content])
        earlier = session.scalars(
            select(StudyVersion).where(StudyVersion.study_instance_uid == uid).order_by(StudyVersion.number)
        ).all()
        last = earlier[-1] if earlier else None
        if last is not None and last.content_digest == digest:
            self._close_unchanged(session, study, last, now)
            return None
        known = set(last.object_ids) if last is not None else set()
        late = [i for i in instances if i.object_id not in known] if last is not None else []
        if last is not None and decision.rule != "operator" and self._too_late(last, late):
            self._hold_late(session, study, last, len(late))
            return None
        workflow_id = f"study-{study.study_key}-{digest[:32]}"
        if any(v.content_digest == digest for v in earlier):
            # The content of an older version has come back: work of its own, or the queue would say it is done.
            workflow_id = f"{workflow_id}-{study.version + 1}"
        if deleted := times_deleted(session, study.study_key):
            workflow_id = f"{workflow_id}-after-{deleted}"  # it was here, was deleted, and is new work
        version = StudyVersion(
            version_id=uuid.uuid4().hex,
            study_instance_uid=uid,
            number=study.version + 1,
            content_digest=digest,
            declared_at=now,
            rule=str(decision.rule),
            evidence={**evidence.to_json(seen_until), "because": list(decision.because)},
            object_ids=[object_id for _, _, object_id in content],
            workflow_id=workflow_id,
            rule_set_digest=None,
            routed_at=None,
        )
        session.add(version)
        study.state, study.state_reason, study.wish = StudyState.WHOLE, None, None
        study.version = version.number
        session.flush()
        self._record(session, version, decision, late, last)
        self._enqueue(session, version)
        return version.version_id

    def _record(
        self,
        session: Session,
        version: StudyVersion,
        decision: Decision,
        late: Sequence[Instance],
        last: StudyVersion | None,
    ) -> None:
        subject = ledger.study_subject(version.study_instance_uid)
        detail = {
            "version": version.number,
            "rule": version.rule,
            "content_digest": version.content_digest,
            "workflow_id": version.workflow_id,
            "evidence": version.evidence,
        }
        if last is not None:
            detail["late_objects"] = len(late)
            detail["replaces_version"] = last.number
        actor = "operator" if decision.rule == "operator" else _ACTOR
        ledger.append(session, subject=subject, kind="declared-whole", actor=actor, detail=detail)
        if decision.because:
            raise_alarm(session, kind=ALARM_INCOMPLETE, subject=subject, message=_incomplete(version, decision))
        else:
            clear_alarms(session, kind=ALARM_INCOMPLETE, subject=subject, by=_ACTOR)
        for settled in (ALARM_LATE, ALARM_FAILED):
            clear_alarms(session, kind=settled, subject=subject, by=_ACTOR)

    # -- what comes late ---------------------------------------------------------------------------------------

    def _too_late(self, last: StudyVersion, late: Sequence[Instance]) -> bool:
        window = timedelta(seconds=self._settings.gateway.late_window_s)
        return bool(late) and max(i.received_at for i in late) > last.declared_at + window

    def _hold_late(self, session: Session, study: Study, last: StudyVersion, late: int) -> None:
        """Outside the window only the operator decides: the study stays open, with the reason, until "complete"."""
        study.state_reason = _HELD_LATE
        subject = ledger.study_subject(study.study_instance_uid)
        detail = {"late_objects": late, "version": last.number, "declared_at": last.declared_at.isoformat()}
        ledger.append(session, subject=subject, kind="late-objects-held", actor=_ACTOR, detail=detail)
        raise_alarm(
            session,
            kind=ALARM_LATE,
            subject=subject,
            message=f"study {study.study_instance_uid}: {late} objects came after the late window of "
            f"{self._settings.gateway.late_window_s:g} s; the results of version {last.number} do not contain them",
        )

    def _close_unchanged(self, session: Session, study: Study, last: StudyVersion, now: datetime) -> None:
        """Nothing in use has changed since the last version: no new work, back to where that version is."""
        study.wish = None
        study.state, study.state_reason = state_after_routing(session, last)
        study_state.refresh(session, study.study_instance_uid)
        ledger.append(
            session,
            subject=ledger.study_subject(study.study_instance_uid),
            kind="unchanged",
            actor=_ACTOR,
            detail={"version": last.number, "content_digest": last.content_digest, "at": now.isoformat()},
        )

    def _settle_without_objects(self, uid: str) -> None:
        """Own results and quarantined objects alone are no study to process; it is listed, with the reason."""
        with self._database.session() as session:
            study = session.get(Study, uid, with_for_update=True)
            counts = object_counts(session, uid)
            if study is None or study.state != StudyState.RECEIVING or counts.get(InstanceState.CURRENT):
                return
            listed = ", ".join(f"{state}: {count}" for state, count in sorted(counts.items())) or "none"
            study.state, study.state_reason = StudyState.UNMATCHED, f"no object to process ({listed})"
            ledger.append(
                session,
                subject=ledger.study_subject(uid),
                kind="nothing-to-process",
                actor=_ACTOR,
                detail={"object_states": counts},
            )

    def _sweep_missed(self, now: datetime) -> None:
        """Open again every study that got an object after it was declared whole.

        The indexer does this as it writes the rows; here are the objects that were indexed while the study was being
        declared, or while its workflow moved the state on.
        """
        if self._swept_at is not None and abs(now - self._swept_at) < self._sweep:  # the clock may be put back
            return
        reopen_missed(self._database, now=now, first=self._swept_at is None)
        self._swept_at = now

    # -- studies that fail to be judged ------------------------------------------------------------------------

    def _pauses(self, uid: str, now: datetime) -> bool:
        failures, failed_at = self._failures.get(uid, (0, now))
        pause_s = min(2**failures, _LONGEST_PAUSE_S)
        return failures > 0 and abs(now - failed_at).total_seconds() < pause_s  # the clock may be put back

    def _note_failure(self, uid: str, error: Exception, now: datetime) -> None:
        """The study is tried again after a growing pause; people see it, and that it waits."""
        self._failures[uid] = (self._failures.get(uid, (0, now))[0] + 1, now)
        what = without_values(error)
        _log.error("a study cannot be judged; the others go on", study_key=study_key(uid), error=what)
        with self._database.session() as session:
            study = session.get(Study, uid, with_for_update=True)
            if study is not None and study.state == StudyState.RECEIVING:
                study.state_reason = f"waiting for another try: judging it failed ({type(error).__name__})"
            raise_alarm(
                session,
                kind=ALARM_FAILED,
                subject=ledger.study_subject(uid),
                message=f"study {uid} cannot be judged whole or not: {what}; it is tried again, at most every "
                f"{_LONGEST_PAUSE_S} s, and the others go on. This is a fault of the gateway: report it with the log",
            )

    def _note_success(self, uid: str) -> None:
        if self._failures.pop(uid, None) is not None:
            with self._database.session() as session:
                clear_alarms(session, kind=ALARM_FAILED, subject=ledger.study_subject(uid), by=_ACTOR)

    # -- what people see ---------------------------------------------------------------------------------------

    def _note_waiting(self, study: Study, evidence: StudyEvidence, decision: Decision) -> None:
        """Keep in the row what an open study waits for; written only when it changes."""
        reason = f"waiting for {decision.waiting_for}"
        if evidence.interrupted:
            reason = f"interrupted; {reason}"
        if study.state_reason == reason:
            return
        with self._database.session() as session:
            session.execute(
                update(Study)
                .where(
                    Study.study_instance_uid == study.study_instance_uid,
                    Study.state == StudyState.RECEIVING,
                    Study.state_reason.is_(None) | (Study.state_reason != reason),
                )
                .values(state_reason=reason)
            )

    def _note_interruptions(self, evidence: StudyEvidence) -> None:
        """One ledger event per association that broke off (REC-13), also when a resend has made up for it."""
        broken = [a for a in evidence.associations if a.ended in {"aborted", "lost"}]
        noted_here = self._interruptions.setdefault(evidence.study_instance_uid, set())
        fresh = [a for a in broken if a.association_id not in noted_here]
        if not fresh:
            return
        subject = ledger.study_subject(evidence.study_instance_uid)
        with self._database.session() as session:
            # The row lock queues up two workers that see the same interruption.
            session.get(Study, evidence.study_instance_uid, with_for_update=True)
            noted = {
                e.detail.get("association_id")
                for e in session.scalars(
                    select(LedgerEvent).where(LedgerEvent.subject == subject, LedgerEvent.kind == "interrupted")
                )
            }
            for association in fresh:
                if association.association_id not in noted:
                    detail = {
                        "association_id": association.association_id,
                        "ended": association.ended,
                        "objects": association.objects,
                    }
                    ledger.append(session, subject=subject, kind="interrupted", actor=_ACTOR, detail=detail)
        noted_here.update(a.association_id for a in fresh)


def _incomplete(version: StudyVersion, decision: Decision) -> str:
    """What a person is told of a study that was declared whole although something speaks against it."""
    evidence = version.evidence
    reasons = []
    if decision.rule == "give-up":
        reasons.append(f"{(evidence['expected'] or {}).get('count')} are expected")
    if evidence["quarantined"]:
        reasons.append(f"{evidence['quarantined']} more are quarantined")
    if evidence["conflicting"]:
        reasons.append(f"{evidence['conflicting']} more have a UID that an object of another series or study holds")
    if "slice gaps" in decision.because:
        reasons.append(f"slices are missing at {evidence['gaps_total']} places")
    if "interrupted association" in decision.because:
        reasons.append("an association broke off and nothing made up for it")
    return (
        f"study {version.study_instance_uid} was declared whole with {evidence['objects']} objects although "
        f"{', '.join(reasons)}; send the rest again, or look at the sender"
    )


def content_digest(content: Sequence[tuple[str, str]]) -> str:
    """SHA-256 over the sorted (SOP Instance UID, digest) pairs of the objects in use."""
    lines = "".join(f"{sop_instance_uid} {digest}\n" for sop_instance_uid, digest in sorted(content))
    return hashlib.sha256(lines.encode()).hexdigest()
