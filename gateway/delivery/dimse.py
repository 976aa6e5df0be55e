"""A PACS that is reached by C-STORE and asked by C-FIND (PS3.4 B and C, PS3.7 9.1).

The data set bytes of the file go out unchanged; only its own transfer syntax is proposed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import _config
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind
from pynetdicom.sop_class import Verification as EchoSopClass

from gateway.delivery.association import associated
from gateway.delivery.destination import (
    STORED_CLASSES,
    Capability,
    DestinationAway,
    DestinationRefuses,
    EchoReport,
    ObjectStatus,
    OutgoingObject,
    Support,
    Verification,
    check_file,
)
from gateway.delivery.status import status_meaning
from gateway.settings import DimseDestination, PeerAddress

_MAX_MATCHES = 64  # a peer that ignores the UID keys answers with everything it has
_KEYS_IGNORED = "the query's UID keys are ignored: the answers are other objects"
_PENDING = (0xFF00, 0xFF01)
_UNCOMPRESSED = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]

# PS3.8 9.3.3.2: results of a presentation context.
_CONTEXT_RESULT = {
    1: "rejected by the user",
    2: "rejected without a reason",
    3: "SOP class not supported",
    4: "transfer syntax not supported",
}


class DimsePacs:
    """`Destination` over DIMSE. `calling_ae_title` is used where the settings name none."""

    def __init__(self, settings: DimseDestination, *, calling_ae_title: str) -> None:
        self._settings = settings
        self._calling_ae_title = settings.calling_ae_title or calling_ae_title
        self._peer = PeerAddress(ae_title=settings.ae_title, host=settings.host, port=settings.port)

    @property
    def name(self) -> str:
        return self._settings.name

    def send(self, objects: Sequence[OutgoingObject]) -> tuple[ObjectStatus, ...]:
        for item in objects:
            check_file(item)
        # With a path, pynetdicom then streams the file's own bytes instead of decoding and encoding them again. The
        # switch is a documented one, concerns sending by path only, and is never set to anything else.
        _config.STORE_SEND_CHUNKED_DATASET = True
        pairs = dict.fromkeys((o.sop_class_uid, o.transfer_syntax_uid) for o in objects)
        # Verification is proposed as well: an association without any accepted context would look like a failure.
        contexts = [build_context(EchoSopClass), *(build_context(cls, [syntax]) for cls, syntax in pairs)]
        statuses: list[ObjectStatus] = []
        with self._associated(self._peer, contexts) as association:
            for message_id, item in enumerate(objects, start=1):
                status = _rejected_context(association, item) or self._store(association, item, message_id)
                statuses.append(status)
                if status.outcome not in ("stored", "warning"):
                    break
        return tuple(statuses)

    def verify(self, objects: Sequence[OutgoingObject]) -> tuple[Verification, ...]:
        if self._settings.verify == "none":
            return tuple(_not_queryable(o, "verification is switched off (verify = 'none')") for o in objects)
        peer = self._settings.query or self._peer
        contexts = [build_context(EchoSopClass), build_context(StudyRootFind, _UNCOMPRESSED)]
        with self._associated(peer, contexts) as association:
            if not _accepts(association, StudyRootFind):
                return tuple(_not_queryable(o, f"{peer.ae_title} does not offer Study Root C-FIND") for o in objects)
            found: list[Verification] = []
            endless = False
            for message_id, item in enumerate(objects, start=1):
                if endless:  # so the association was ended by us
                    found.append(_not_queryable(item, _KEYS_IGNORED))
                    continue
                verification, endless = self._find(association, item, message_id)
                found.append(verification)
            return tuple(found)

    def echo(self) -> EchoReport:
        started = time.monotonic()
        reachable, accepted, query, problem = False, False, None, ""
        capability = Capability(sop_classes={})
        same_peer = self._settings.query is None
        contexts = [build_context(EchoSopClass), *_store_contexts(), build_context(StudyRootFind, _UNCOMPRESSED)]
        try:
            with self._associated(self._peer, contexts) as association:
                reachable, accepted = True, True
                capability = _capability(association)
                if self._settings.verify == "c-find" and same_peer:
                    query = _accepts(association, StudyRootFind)
                if _accepts(association, EchoSopClass) and association.send_c_echo().get("Status") != 0x0000:
                    problem = "C-ECHO was not answered with success"
            if self._settings.query is not None and self._settings.verify == "c-find":
                with self._associated(self._settings.query, [build_context(StudyRootFind, _UNCOMPRESSED)]):
                    query = True
        except DestinationRefuses as error:
            reachable, problem = True, str(error)
        except DestinationAway as error:
            problem = str(error)
        except RuntimeError:  # pynetdicom: the association is no longer established
            problem = f"{self._settings.ae_title} ended the association before C-ECHO"
        if not problem:
            refused = [e for e in self._settings.encodings if capability.of(e) == "refused"]
            if len(refused) == len(self._settings.encodings):
                problem = f"none of the configured encodings is accepted: {', '.join(refused)}"
            elif self._settings.send_sr and capability.of("SR") == "refused":
                problem = "no SR class is accepted; allow one or set send_sr = false"
            elif query is False:
                problem = "C-FIND (Study Root) is not offered; deliveries will end at 'stored'"
        return EchoReport(
            name=self.name,
            reachable=reachable,
            accepted=accepted,
            capability=capability,
            query=query,
            problem=problem,
            administrator=self._administrator(),
            seconds=time.monotonic() - started,
        )

    def _administrator(self) -> tuple[str, ...]:
        wanted = [*self._settings.encodings, *(["SR"] if self._settings.send_sr else [])]
        lines = [
            f"Enter the application entity {self._calling_ae_title} (this host) as a known sender.",
            "Allow it to store: " + ", ".join(f"{n} ({' or '.join(STORED_CLASSES[n])})" for n in wanted) + ".",
        ]
        if self._settings.verify == "c-find":
            peer = self._settings.query or self._peer
            lines.append(f"Allow it to query {peer.ae_title} by C-FIND, Study Root, down to the image level.")
        return tuple(lines)

    def _store(self, association: Association, item: OutgoingObject, message_id: int) -> ObjectStatus:
        try:
            code = association.send_c_store(item.path, msg_id=message_id).get("Status")
        except RuntimeError:  # pynetdicom: the association is no longer established
            code = None
        if code is None:
            return ObjectStatus(
                sop_instance_uid=item.sop_instance_uid,
                code=None,
                outcome="unknown",
                meaning=f"{self._settings.ae_title} broke off or did not answer within {self._settings.timeout_s:g} s",
            )
        meaning = status_meaning(int(code))
        return ObjectStatus(
            sop_instance_uid=item.sop_instance_uid, code=meaning.code, outcome=meaning.outcome, meaning=meaning.text
        )

    def _find(self, association: Association, item: OutgoingObject, message_id: int) -> tuple[Verification, bool]:
        """IMAGE level query with the unique keys of all levels (PS3.4 C.4.1.2.1).

        Also returns whether the answers had no end; then the association is aborted. Raises DestinationAway.
        """
        identifier = Dataset()
        identifier.QueryRetrieveLevel = "IMAGE"
        identifier.StudyInstanceUID = item.study_instance_uid
        identifier.SeriesInstanceUID = item.series_instance_uid
        identifier.SOPInstanceUID = item.sop_instance_uid
        try:
            answers = association.send_c_find(identifier, StudyRootFind, msg_id=message_id)
        except RuntimeError as error:  # pynetdicom: the association is no longer established
            raise DestinationAway(f"{self.name} ended the association before it was asked") from error
        found, matches = False, 0
        for answer, match in answers:
            code = answer.get("Status")
            if code is None:
                raise DestinationAway(f"{self.name}: C-FIND broke off or was not answered in time")
            if code in _PENDING:
                matches += 1
                found = found or (match is not None and match.get("SOPInstanceUID") == item.sop_instance_uid)
                if matches >= _MAX_MATCHES:
                    association.abort()
                    break
            elif code in (0x0122, 0x0118) or 0xA900 <= code <= 0xA9FF:
                return _not_queryable(item, f"C-FIND at image level is refused: 0x{code:04X}"), False
            elif code != 0x0000:
                raise DestinationAway(f"{self.name}: C-FIND failed with 0x{code:04X}")
        endless = matches >= _MAX_MATCHES
        uid = item.sop_instance_uid
        if found:
            detail = "found by C-FIND at image level"
            return Verification(sop_instance_uid=uid, outcome="verified", detail=detail), endless
        if endless:
            return _not_queryable(item, _KEYS_IGNORED), True
        detail = "C-FIND at image level found nothing"
        return Verification(sop_instance_uid=uid, outcome="absent", detail=detail), False

    def _associated(
        self, peer: PeerAddress, contexts: list[PresentationContext]
    ) -> AbstractContextManager[Association]:
        return associated(
            peer,
            contexts,
            calling_ae_title=self._calling_ae_title,
            timeout_s=self._settings.timeout_s,
            name=self.name,
        )


def _not_queryable(item: OutgoingObject, detail: str) -> Verification:
    return Verification(sop_instance_uid=item.sop_instance_uid, outcome="not-queryable", detail=detail)


def _store_contexts() -> list[PresentationContext]:
    return [build_context(uid, _UNCOMPRESSED) for uids in STORED_CLASSES.values() for uid in uids]


def _accepts(association: Association, abstract_syntax: str) -> bool:
    return any(context.abstract_syntax == abstract_syntax for context in association.accepted_contexts)


def _capability(association: Association) -> Capability:
    """A class group counts as accepted when one of its SOP classes is."""
    support: dict[str, Support] = {
        name: "accepted" if any(_accepts(association, uid) for uid in uids) else "refused"
        for name, uids in STORED_CLASSES.items()
    }
    return Capability(sop_classes=support)


def _rejected_context(association: Association, item: OutgoingObject) -> ObjectStatus | None:
    """The refusal of an object whose SOP class and transfer syntax were not accepted together; None if they were."""
    for context in association.accepted_contexts:
        if context.abstract_syntax == item.sop_class_uid and item.transfer_syntax_uid in context.transfer_syntax:
            return None
    # The transfer syntax of a rejected context is not significant (PS3.8 9.3.3.2), so only the class is compared.
    results = [c.result for c in association.rejected_contexts if c.abstract_syntax == item.sop_class_uid]
    words = _CONTEXT_RESULT.get(results[0], "rejected") if results else "accepted with another transfer syntax only"
    return ObjectStatus(
        sop_instance_uid=item.sop_instance_uid,
        code=None,
        outcome="refused",
        meaning=f"presentation context rejected: {words} ({item.sop_class_uid}, {item.transfer_syntax_uid})",
    )
