"""Rows for received objects: instance, series, study, and what is to be decided about them.

Everything happens inside the caller's transaction; one object_id gives one row, whatever is repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

from pydicom.dataset import Dataset
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway.intake.errors import IntakeRejected
from gateway.intake.examination import Examined, differences
from gateway.intake.identity import PatientIdentity, conflicts, merged
from storage import ledger
from storage.alarms import raise_alarm
from storage.deletion_records import deleted_objects, object_tail
from storage.errors import ObjectMissing
from storage.records import Association, Instance, InstanceState, ResultObject, Series, Study, StudyState
from storage.spool import Settlement, Spool, object_path, quarantine_path, study_key

ConflictPolicy = Literal["keep-first", "newest", "quarantine"]

ACTOR = "indexer"
ALARM_UNREADABLE = "object-quarantined"
ALARM_CONFLICT = "conflicting-retransmit"
ALARM_IDENTITY = "identity-conflict"
GATEWAY_SUBJECT = "gateway"

# A new object in one of these opens the study again; assembly decides about a new version (CMP-17).
_CLOSED_STATES = frozenset(StudyState) - {StudyState.RECEIVING, StudyState.QUARANTINED, StudyState.DELETING}
_COMPARED_STATES = (InstanceState.CURRENT, InstanceState.CONFLICT, InstanceState.REPLACED, InstanceState.QUARANTINED)


class StudyIndex:
    """Places a batch of examined objects within one transaction.

    `is_own_result` says, from a header, why an object is a result of this or another gateway (OUT-46), or None.
    """

    def __init__(
        self,
        session: Session,
        spool: Spool,
        *,
        conflict_policy: ConflictPolicy,
        is_own_result: Callable[[Dataset], str | None],
    ) -> None:
        self._session = session
        self._spool = spool
        self._policy = conflict_policy
        self._is_own_result = is_own_result
        self._known: dict[str, Instance] = {}
        self._same_uid: dict[str, list[Instance]] = defaultdict(list)
        self._own: set[str] = set()
        self._deleting: set[str] = set()
        self._deleted: dict[tuple[str, bytes], str] = {}

    def prepare(self, batch: Sequence[Examined]) -> None:
        """Load what the batch will be compared with, in a few queries."""
        self._look_for_deletions(batch)
        ids = [item.object_id for item in batch]
        uids = {item.header.sop_instance_uid for item in batch if item.header is not None}
        for row in self._session.scalars(select(Instance).where(Instance.object_id.in_(ids))):
            self._known[row.object_id] = row
        for row in self._session.scalars(
            select(Instance)
            .where(Instance.sop_instance_uid.in_(uids), Instance.state.in_(_COMPARED_STATES))
            .order_by(Instance.object_id)
        ):
            self._same_uid[str(row.sop_instance_uid)].append(row)
        self._own.update(
            self._session.scalars(select(ResultObject.sop_instance_uid).where(ResultObject.sop_instance_uid.in_(uids)))
        )

    def _look_for_deletions(self, batch: Sequence[Examined]) -> None:
        """Before anything else is read: behind the locks no deletion goes on, so what is read next stays true."""
        studies = {item.study_instance_uid for item in batch if item.study_instance_uid}
        states = self._session.execute(
            select(Study.study_instance_uid, Study.state)
            .where(Study.study_instance_uid.in_(studies))
            .order_by(Study.study_instance_uid)
            .with_for_update()
        )
        self._deleting = {uid for uid, state in states if state == StudyState.DELETING}
        self._deleted = deleted_objects(self._session, {study_key(uid) for uid in studies})

    def waits(self, item: Examined) -> bool:
        """Whether its study is just being deleted: afterwards the object opens it anew."""
        return item.study_instance_uid in self._deleting and item.object_id not in self._known

    def deleted_by(self, item: Examined) -> str | None:
        """The deletion that this very object went with: it came back with an old copy of the spool."""
        if not self._deleted or not item.study_instance_uid or item.object_id in self._known:
            return None
        return self._deleted.get((study_key(item.study_instance_uid), object_tail(item.object_id)))

    def place(self, item: Examined) -> Settlement:
        """Write the rows of one object; returns where its file belongs."""
        known = self._known.get(item.object_id)
        if known is not None:  # committed before, but not yet moved
            return Settlement(object_id=item.object_id, spool_path=known.spool_path)
        if item.header is None:
            row = self._quarantine_unreadable(item, item.fault or IntakeRejected("cannot be read"))
        else:
            row = self._place_readable(item)
        self._session.add(row)
        self._known[item.object_id] = row
        self._count(item)
        return Settlement(object_id=item.object_id, spool_path=row.spool_path)

    # -- decisions ---------------------------------------------------------------------------------------------

    def _place_readable(self, item: Examined) -> Instance:
        header = item.header
        if header is None:
            raise ValueError("not a readable object")
        own = "its SOP Instance UID is one that we made" if header.sop_instance_uid in self._own else None
        own = own or self._is_own_result(header.dataset)
        if own is not None:
            self._tell(item, "own-result-returned", {"reason": own})
            return self._row(item, InstanceState.OWN_RESULT, own)
        earlier = self._same_uid[header.sop_instance_uid]
        twin = self._twin(item, earlier)
        if twin is not None:
            return self._place_twin(item, twin)
        study = self._study(item)
        # Before any policy for contents: it would let a second patient pass as a conflict of one object (CMP-18).
        differing = conflicts(_identity_of(study), item.identity)
        if differing and (known := _same_other_patient(item, earlier)) is not None:
            return self._place_twin(item, known)
        current = next((row for row in earlier if row.state == InstanceState.CURRENT), None)
        if differing:
            row = self._quarantine_identity(item, study, differing)
        elif current is None:
            row = self._place_new(item, study)
        else:
            row = self._place_conflicting(item, study, current)
        earlier.append(row)
        return row

    def _twin(self, item: Examined, earlier: Sequence[Instance]) -> Instance | None:
        """The object whose identical copy this one is, or None.

        A quarantined object is no twin: what was wrong may have been its command, or the moment. Under `newest` a
        replaced one is none either: its content has come back.
        """
        no_twins = {InstanceState.QUARANTINED}
        if self._policy == "newest":
            no_twins.add(InstanceState.REPLACED)
        return next((row for row in earlier if row.digest == item.digest and row.state not in no_twins), None)

    def _place_twin(self, item: Examined, twin: Instance) -> Instance:
        """An identical copy is counted, and nothing else; where the first one's file is lost, it serves for both."""
        self._touch_if_receiving(item)
        row = self._row(item, InstanceState.DUPLICATE, f"identical to object {twin.object_id}")
        try:
            self._spool.resolve(twin.spool_path)
        except ObjectMissing:
            # The twin's row stays, so that the versions that name it can be made again.
            twin.spool_path = row.spool_path
            row.state_reason = f"{row.state_reason}, whose file was lost: this file serves for both"
            self._tell(item, "lost-file-replaced", {"lost_object": twin.object_id})
        return row

    def _place_new(self, item: Examined, study: Study) -> Instance:
        _take_identity(study, merged(_identity_of(study), item.identity))
        self._describe(study, item)
        self._series(item)
        self._reopen(study, item)
        note = (
            "text was not in its declared character set" if item.header and item.header.character_set_repaired else None
        )
        return self._row(item, InstanceState.CURRENT, note)

    def _place_conflicting(self, item: Examined, study: Study, current: Instance) -> Instance:
        """The same SOP Instance UID with other content: both are kept, and a person is told (REC-09)."""
        differing = self._differences(item, current)
        uid = current.sop_instance_uid
        other = _elsewhere(item, current)
        # Another study or series must not lose an object of its own.
        policy = "keep-first" if other == "study" or (other and self._policy == "newest") else self._policy
        self._tell(
            item,
            "conflicting-retransmit",
            {
                "policy": policy,
                "first_object": current.object_id,
                "differs_in": differing,
            },
        )
        message = (
            f"SOP Instance UID {uid} came again with other content "
            f"(differs in {', '.join(differing) or 'its encoding'}); both are kept, policy {policy}"
        )
        if other:
            message += f"; the first is of another {other}, and this {other} lacks the object until it has its own UID"
        self._alarm(item, ALARM_CONFLICT, message)
        if policy == "newest":
            row = self._place_new(item, study)
            current.state = InstanceState.REPLACED
            current.state_reason = f"replaced by object {item.object_id} (policy newest)"
            return row
        if policy == "quarantine":
            study.state = StudyState.QUARANTINED
            study.state_reason = f"SOP Instance UID {uid} exists with two contents"
        else:
            self._list(item)
        return self._row(item, InstanceState.CONFLICT, f"other content than object {current.object_id}")

    def _quarantine_identity(self, item: Examined, study: Study, differing: list[str]) -> Instance:
        """Two patients under one study (CMP-18): nothing is made from it until a person decides."""
        reason = f"two patient identities: {', '.join(differing)} differ"
        self._tell(item, "identity-conflict", {"differs_in": differing, "state_before": study.state})
        self._alarm(
            item,
            ALARM_IDENTITY,
            f"study {study.study_instance_uid} holds objects of two patients ({', '.join(differing)} differ); "
            "it is quarantined: ask the sender which one is right; seggate release keeps the first",
        )
        study.state = StudyState.QUARANTINED
        study.state_reason = reason
        study.last_received_at = max(study.last_received_at, item.arrived_at)
        return self._row(
            item, InstanceState.QUARANTINED, f"{', '.join(differing)}: another patient than the study's first"
        )

    def _quarantine_unreadable(self, item: Examined, fault: IntakeRejected) -> Instance:
        """Kept, never used; where its study is known, the study is listed."""
        if item.study_instance_uid:
            self._list(item)
        self._tell(item, "object-quarantined", {"reason": fault.reason, "attribute": fault.attribute})
        self._alarm(
            item,
            ALARM_UNREADABLE,
            f"object {item.object_id} from {item.evidence.calling_ae or 'an unknown sender'} is quarantined: {fault}",
        )
        row = self._row(item, InstanceState.QUARANTINED, str(fault))
        row.spool_path = quarantine_path(item.object_id)
        return row

    # -- rows --------------------------------------------------------------------------------------------------

    def _row(self, item: Examined, state: InstanceState, reason: str | None) -> Instance:
        header, evidence = item.header, item.evidence
        return Instance(
            object_id=item.object_id,
            study_instance_uid=item.study_instance_uid,
            series_instance_uid=header.series_instance_uid if header else None,
            sop_instance_uid=header.sop_instance_uid if header else (evidence.sop_instance_uid or None),
            sop_class_uid=header.sop_class_uid if header else (evidence.sop_class_uid or None),
            transfer_syntax_uid=evidence.transfer_syntax_uid or None,
            state=state,
            state_reason=reason,
            digest=item.digest,
            size_bytes=item.size_bytes,
            spool_path=(
                object_path(study_key(item.study_instance_uid), item.object_id)
                if item.study_instance_uid
                else quarantine_path(item.object_id)
            ),
            received_at=evidence.received_at,
            association_id=evidence.association_id,
            calling_ae=evidence.calling_ae,
            called_ae=evidence.called_ae,
            peer_address=evidence.peer_address,
        )

    def _study(self, item: Examined) -> Study:
        uid = str(item.study_instance_uid)
        study = self._session.get(Study, uid, with_for_update=True)
        if study is None:
            evidence = item.evidence
            study = Study(
                study_instance_uid=uid,
                study_key=study_key(uid),
                state=StudyState.RECEIVING,
                first_received_at=evidence.received_at,
                last_received_at=item.arrived_at,
                calling_ae=evidence.calling_ae,
                version=0,
            )
            self._session.add(study)
            self._session.flush()
            self._tell(item, "study-opened", {"calling_ae": evidence.calling_ae, "peer_address": evidence.peer_address})
        return study

    def _describe(self, study: Study, item: Examined) -> None:
        """Fill what is still empty, and note who sent last."""
        study.patient_sex = study.patient_sex or item.text("PatientSex", 16)
        study.accession_number = study.accession_number or item.text("AccessionNumber", 64)
        study.study_id = study.study_id or item.text("StudyID", 64)
        study.study_date = study.study_date or item.text("StudyDate", 32)
        study.study_description = study.study_description or item.text("StudyDescription")
        study.last_received_at = max(study.last_received_at, item.arrived_at)
        study.calling_ae = item.evidence.calling_ae

    def _series(self, item: Examined) -> None:
        if item.header is None:
            return
        key = (str(item.study_instance_uid), item.header.series_instance_uid)
        series = self._session.get(Series, key)
        received: datetime = item.arrived_at
        if series is None:
            self._session.add(
                Series(
                    study_instance_uid=key[0],
                    series_instance_uid=key[1],
                    modality=item.text("Modality", 16),
                    series_description=item.text("SeriesDescription"),
                    first_received_at=received,
                    last_received_at=received,
                )
            )
            self._session.flush()
            return
        series.modality = series.modality or item.text("Modality", 16)
        series.series_description = series.series_description or item.text("SeriesDescription")
        series.last_received_at = max(series.last_received_at, received)

    def _reopen(self, study: Study, item: Examined) -> None:
        if study.state in _CLOSED_STATES:
            self._tell(item, "reopened", {"state_before": study.state, "version": study.version})
            study.state = StudyState.RECEIVING
            study.state_reason = None

    def _list(self, item: Examined) -> None:
        """A study is listed even when nothing of it can be used: assembly settles it, with the counts."""
        study = self._study(item)
        if study.state == StudyState.UNMATCHED and study.version == 0:  # settled before: the counts have changed
            study.state, study.state_reason = StudyState.RECEIVING, None
        self._touch_if_receiving(item)

    def _touch_if_receiving(self, item: Examined) -> None:
        """A sender that starts over after an abort is at work: the study waits for it. Otherwise nothing changes."""
        study = self._session.get(Study, str(item.study_instance_uid), with_for_update=True)
        if study is not None and study.state == StudyState.RECEIVING:
            study.last_received_at = max(study.last_received_at, item.arrived_at)

    def _count(self, item: Examined) -> None:
        evidence = item.evidence
        if not evidence.association_id:
            return
        association = self._session.get(Association, evidence.association_id)
        if association is None:  # the index is rebuilt from the objects alone
            association = Association(
                association_id=evidence.association_id,
                calling_ae=evidence.calling_ae,
                called_ae=evidence.called_ae,
                peer_address=evidence.peer_address,
                opened_at=evidence.received_at,
                instances=0,
            )
            self._session.add(association)
            self._session.flush()
        association.instances += 1

    # -- record ------------------------------------------------------------------------------------------------

    def _differences(self, item: Examined, current: Instance) -> list[str]:
        try:
            return differences(self._spool.resolve(current.spool_path), item.path)
        except ObjectMissing:
            return []

    def _subject(self, item: Examined) -> str:
        return ledger.study_subject(item.study_instance_uid) if item.study_instance_uid else GATEWAY_SUBJECT

    def _tell(self, item: Examined, kind: str, detail: dict[str, object]) -> None:
        uid = item.header.sop_instance_uid if item.header else item.evidence.sop_instance_uid
        common = {
            "object_id": item.object_id,
            "sop_instance_uid": uid,
            "association_id": item.evidence.association_id,
        }
        ledger.append(self._session, subject=self._subject(item), kind=kind, actor=ACTOR, detail=common | detail)

    def _alarm(self, item: Examined, kind: str, message: str) -> None:
        raise_alarm(self._session, kind=kind, subject=self._subject(item), message=message)


def _same_other_patient(item: Examined, earlier: Sequence[Instance]) -> Instance | None:
    """The identical copy that was quarantined as another patient's; one that could not be read has no series."""
    return next(
        (
            row
            for row in earlier
            if row.state == InstanceState.QUARANTINED and row.digest == item.digest and row.series_instance_uid
        ),
        None,
    )


def _elsewhere(item: Examined, current: Instance) -> Literal["study", "series"] | None:
    """Whether the object in use is of another study or series than the new one."""
    if current.study_instance_uid != item.study_instance_uid:
        return "study"
    if item.header is None or current.series_instance_uid != item.header.series_instance_uid:
        return "series"
    return None


def _identity_of(study: Study) -> PatientIdentity:
    return PatientIdentity(
        patient_id=study.patient_id,
        issuer_of_patient_id=study.issuer_of_patient_id,
        patient_name=study.patient_name,
        patient_birth_date=study.patient_birth_date,
    )


def _take_identity(study: Study, identity: PatientIdentity) -> None:
    study.patient_id = identity.patient_id
    study.issuer_of_patient_id = identity.issuer_of_patient_id
    study.patient_name = identity.patient_name
    study.patient_birth_date = identity.patient_birth_date
