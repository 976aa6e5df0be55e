"""How many instances does the study have? Asked of the sender or its PACS by C-FIND (PS3.4 C.4.1, Study Root).

Number of Study Related Instances (0020,1208) is asked at STUDY level; where the answer lacks it, Number of Series
Related Instances (0020,1209) is summed, and where that lacks too, the IMAGE level answers are counted.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from pydicom.dataset import Dataset
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind
from pynetdicom.transport import AddressInformation, AssociationSocket

from gateway.intake.evidence import ExpectedCount
from gateway.service_user import keep_answers
from gateway.setting_types import PeerAddress

_PENDING = frozenset({0xFF00, 0xFF01})
_MAX_RESPONSES = 50_000
_log = structlog.get_logger(__name__)


class _Transport(AssociationSocket):  # type: ignore[misc]
    """pynetdicom forgets to close a socket that never was connected."""

    def _shutdown_socket(self) -> None:
        connection = self.socket
        super()._shutdown_socket()
        if connection is not None:
            connection.close()


class _Entity(ApplicationEntity):  # type: ignore[misc]
    """An application entity whose sockets are closed in every case and send without delay."""

    def _create_socket(
        self, assoc: Association, address: AddressInformation, tls_args: tuple[object, str] | None
    ) -> AssociationSocket:
        transport = _Transport(assoc, address=address)
        transport.tls_args = tls_args
        # Command set and identifier leave in separate writes; Nagle would wait for a delayed ACK in between.
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return transport


class QueryFailed(Exception):
    """The peer gave no usable answer; the message says why and never quotes the answer."""


def query_instance_count(
    study_instance_uid: str, peer: PeerAddress, *, calling_ae: str, timeout_s: float, deadline_s: float
) -> int:
    """Ask one peer over one association; `timeout_s` bounds each wait, `deadline_s` the whole.

    Raises QueryFailed where the peer cannot be reached, refuses, does not know the study or does not answer in time.
    """
    end = time.monotonic() + deadline_s
    ae = _Entity(ae_title=calling_ae)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = timeout_s
    ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    try:
        association = ae.associate(peer.host, peer.port, ae_title=peer.ae_title)
    except OSError as error:  # the host name does not resolve, or no socket can be had
        raise QueryFailed("it cannot be reached") from error
    if not association.is_established:
        reason = "it refused the association" if association.is_rejected else "it cannot be reached"
        raise QueryFailed(reason)
    keep_answers(association)
    try:
        count = _count(association, study_instance_uid, end)
    except (RuntimeError, ValueError, AttributeError) as error:
        # pynetdicom raises these when the association breaks or the peer did not accept the query's SOP class.
        raise QueryFailed(f"the query failed ({type(error).__name__})") from error
    finally:
        if association.is_established:
            association.release()
    return count


def _count(association: Association, uid: str, end: float) -> int:
    study = _identifier("STUDY", uid, "NumberOfStudyRelatedInstances")
    answers = list(_answers(association, study, uid, end))
    if not answers:
        raise QueryFailed("it does not know the study")
    counts = [n for a in answers if (n := _number(a, "NumberOfStudyRelatedInstances")) is not None]
    if counts:
        return max(counts)
    series = _identifier("SERIES", uid, "NumberOfSeriesRelatedInstances")
    series.SeriesInstanceUID = ""
    per_series: dict[str, int | None] = {}
    for answer in _answers(association, series, uid, end):
        per_series[str(answer.get("SeriesInstanceUID", ""))] = _number(answer, "NumberOfSeriesRelatedInstances")
    total = 0
    for series_uid, count in per_series.items():
        total += count if count is not None else _count_images(association, uid, series_uid, end)
    return total


def _count_images(association: Association, uid: str, series_uid: str, end: float) -> int:
    image = _identifier("IMAGE", uid)
    image.SeriesInstanceUID = series_uid
    image.SOPInstanceUID = ""
    found = {str(a.get("SOPInstanceUID", "")) for a in _answers(association, image, uid, end)}
    found.discard("")
    return len(found)


def _identifier(level: str, uid: str, *asked: str) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    identifier.StudyInstanceUID = uid
    for keyword in asked:
        setattr(identifier, keyword, None)
    return identifier


def _answers(association: Association, identifier: Dataset, uid: str, end: float) -> Iterator[Dataset]:
    """The matches for this study; a peer that ignores the key and sends everything is not believed."""
    seen = 0
    for status, answer in association.send_c_find(identifier, StudyRootQueryRetrieveInformationModelFind):
        code = status.get("Status") if status else None
        if code is None:
            raise QueryFailed("it did not answer in time")
        if time.monotonic() > end:
            association.abort()
            raise QueryFailed("it did not finish in time")
        if code in _PENDING:
            seen += 1
            if seen > _MAX_RESPONSES:
                association.abort()
                raise QueryFailed(f"it sent more than {_MAX_RESPONSES} answers")
            if answer is not None and str(answer.get("StudyInstanceUID", uid)) == uid:
                yield answer
        elif code != 0x0000:
            raise QueryFailed(f"it answered with status 0x{code:04X}")


def _number(answer: Dataset, keyword: str) -> int | None:
    try:
        value = answer.get(keyword)
        number = int(value) if value not in (None, "") else None
    except (ValueError, TypeError):
        return None
    return number if number is not None and number >= 0 else None


@dataclass(frozen=True, kw_only=True)
class _Known:
    answer: ExpectedCount
    until: float  # monotonic clock


class ExpectedCounts:
    """Answers from memory and asks in the background, so that a peer that hangs delays no other study.

    `calling_ae` is our own title. A count is asked again after `fresh_s`, a failure after `retry_s`.
    """

    def __init__(
        self,
        *,
        calling_ae: str,
        timeout_s: float = 5.0,
        deadline_s: float = 30.0,
        fresh_s: float = 5.0,
        retry_s: float = 30.0,
        threads: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calling_ae = calling_ae
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._fresh_s = fresh_s
        self._retry_s = retry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._asking: set[str] = set()
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="expected-count")

    def latest(self, study_instance_uid: str, peer: PeerAddress) -> ExpectedCount:
        """The newest answer; `pending` before the first one. Never blocks."""
        with self._lock:
            known = self._known.get(study_instance_uid)
            stale = known is None or known.until <= self._clock()
            if stale and study_instance_uid not in self._asking:
                self._asking.add(study_instance_uid)
                self._pool.submit(self._ask, study_instance_uid, peer)
            return known.answer if known is not None else ExpectedCount(source=_source(peer), pending=True)

    def forget(self, study_instance_uid: str) -> None:
        """Drop what is known of a study that is decided."""
        with self._lock:
            self._known.pop(study_instance_uid, None)

    def close(self) -> None:
        """End the threads; a query under way is waited for, at most its deadline."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, uid: str, peer: PeerAddress) -> None:
        answer = ExpectedCount(source=_source(peer), problem="the query failed")
        lasts_s = self._retry_s
        try:
            count = query_instance_count(
                uid, peer, calling_ae=self._calling_ae, timeout_s=self._timeout_s, deadline_s=self._deadline_s
            )
            answer, lasts_s = ExpectedCount(source=_source(peer), count=count), self._fresh_s
        except (QueryFailed, OSError) as error:
            problem = str(error) if isinstance(error, QueryFailed) else f"network error ({type(error).__name__})"
            answer = ExpectedCount(source=_source(peer), problem=f"asked, no answer: {problem}")
            _log.warning("expected count not known", peer=answer.source, reason=problem)
        finally:
            with self._lock:
                self._known[uid] = _Known(answer=answer, until=self._clock() + lasts_s)
                self._asking.discard(uid)


def _source(peer: PeerAddress) -> str:
    return f"{peer.ae_title}@{peer.host}:{peer.port}"
