"""The expected count by C-FIND, against archives of the test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind

from gateway.intake.evidence import ExpectedCount
from gateway.intake.expected_count import ExpectedCounts, QueryFailed, query_instance_count
from gateway.settings import PeerAddress
from tests.support.pacs import orthanc

STUDY = "1.2.840.99"
Answers = Iterator[tuple[int, Dataset | None]]
Handler = Callable[[Dataset], Answers]


def match(**attributes: Any) -> tuple[int, Dataset]:
    dataset = Dataset()
    dataset.StudyInstanceUID = STUDY
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return 0xFF00, dataset


@contextmanager
def archive(handler: Handler) -> Iterator[PeerAddress]:
    """A C-FIND SCP on a free loopback port."""

    def on_find(event: Any) -> Answers:
        identifier = event.identifier
        assert identifier.StudyInstanceUID == STUDY
        yield from handler(identifier)

    ae = AE(ae_title="PACS")
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, on_find)])
    try:
        yield PeerAddress(ae_title="PACS", host="127.0.0.1", port=server.socket.getsockname()[1])
    finally:
        server.shutdown()


def ask(peer: PeerAddress, *, timeout_s: float = 5, deadline_s: float = 20) -> int:
    return query_instance_count(STUDY, peer, calling_ae="SEGGATE", timeout_s=timeout_s, deadline_s=deadline_s)


def at_study_level(identifier: Dataset) -> Answers:
    assert identifier.QueryRetrieveLevel == "STUDY"
    yield match(NumberOfStudyRelatedInstances=123)


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_the_count_of_the_study_level_is_taken() -> None:
    with archive(at_study_level) as peer:
        assert ask(peer) == 123


def test_without_it_the_series_are_summed() -> None:
    def handler(identifier: Dataset) -> Answers:
        if identifier.QueryRetrieveLevel == "STUDY":
            yield match()
        else:
            yield match(SeriesInstanceUID="1.1", NumberOfSeriesRelatedInstances=20)
            yield match(SeriesInstanceUID="1.2", NumberOfSeriesRelatedInstances=3)

    with archive(handler) as peer:
        assert ask(peer) == 23


def test_without_both_the_images_are_counted() -> None:
    def handler(identifier: Dataset) -> Answers:
        if identifier.QueryRetrieveLevel == "STUDY":
            yield match(NumberOfStudyRelatedInstances=None)
        elif identifier.QueryRetrieveLevel == "SERIES":
            yield match(SeriesInstanceUID="1.1")
            yield match(SeriesInstanceUID="1.2", NumberOfSeriesRelatedInstances=3)
        else:
            assert identifier.SeriesInstanceUID == "1.1"
            for n in (1, 2, 2, 3, 4):
                yield match(SOPInstanceUID=f"1.1.{n}")

    with archive(handler) as peer:
        assert ask(peer) == 7


def test_answers_about_other_studies_are_not_believed() -> None:
    def handler(identifier: Dataset) -> Answers:
        yield match(StudyInstanceUID="1.2.999", NumberOfStudyRelatedInstances=900)
        yield match(NumberOfStudyRelatedInstances=4)

    with archive(handler) as peer:
        assert ask(peer) == 4


def test_a_peer_that_does_not_know_the_study_gives_no_count() -> None:
    def handler(identifier: Dataset) -> Answers:
        yield from ()

    with archive(handler) as peer, pytest.raises(QueryFailed, match="does not know the study"):
        ask(peer)


def test_a_failure_status_gives_no_count() -> None:
    def handler(identifier: Dataset) -> Answers:
        yield 0xA700, None

    with archive(handler) as peer, pytest.raises(QueryFailed, match="0xA700"):
        ask(peer)


def test_a_peer_that_is_away_gives_no_count() -> None:
    with archive(at_study_level) as peer:
        pass
    with pytest.raises(QueryFailed, match="cannot be reached"):
        ask(peer)


def until(check: Callable[[], ExpectedCount], wanted: Callable[[ExpectedCount], bool]) -> ExpectedCount:
    end = time.monotonic() + 20
    while not wanted(found := check()):
        assert time.monotonic() < end, found
        threading.Event().wait(0.01)
    return found


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
def test_a_peer_that_hangs_blocks_nobody() -> None:
    release = threading.Event()

    def stalled(identifier: Dataset) -> Answers:
        release.wait(20)
        yield match(NumberOfStudyRelatedInstances=1)

    counts = ExpectedCounts(calling_ae="SEGGATE", timeout_s=0.5, deadline_s=2)
    try:
        with archive(stalled) as slow, archive(at_study_level) as fast:
            begin = time.monotonic()
            assert counts.latest(STUDY, slow).pending
            assert time.monotonic() - begin < 0.4
            other = ExpectedCounts(calling_ae="SEGGATE")
            assert until(lambda: other.latest(STUDY, fast), lambda a: not a.pending).count == 123
            other.close()
            failed = until(lambda: counts.latest(STUDY, slow), lambda a: not a.pending)
            assert failed.count is None
            assert "asked, no answer" in failed.problem
            release.set()
    finally:
        release.set()
        counts.close()


def test_answers_are_kept_for_a_while_and_then_asked_again() -> None:
    asked = []
    now = [0.0]

    def handler(identifier: Dataset) -> Answers:
        asked.append(1)
        yield match(NumberOfStudyRelatedInstances=len(asked))

    counts = ExpectedCounts(calling_ae="SEGGATE", fresh_s=10, clock=lambda: now[0])
    try:
        with archive(handler) as peer:
            assert until(lambda: counts.latest(STUDY, peer), lambda a: not a.pending).count == 1
            now[0] = 9
            assert counts.latest(STUDY, peer).count == 1
            now[0] = 10
            assert until(lambda: counts.latest(STUDY, peer), lambda a: a.count == 2).count == 2
            assert len(asked) == 2
    finally:
        counts.close()


@pytest.mark.requirement("CMP-15", open="MPPS, IAN, orders, storage commitment; settings per modality")
@pytest.mark.peer("orthanc", "shared-data")
def test_orthanc_answers_with_the_number_that_it_holds(tmp_path: Path, shared_data: Path) -> None:
    files = sorted((shared_data / "dicom" / "mr-hippocampus" / "study3" / "36468-FLAIRreg-58706").glob("*.dcm"))
    study = str(pydicom.dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
    with orthanc(tmp_path / "orthanc") as pacs:
        peer = PeerAddress(ae_title=pacs.ae_title, host=pacs.host, port=pacs.port)
        with pytest.raises(QueryFailed, match="does not know the study"):
            query_instance_count(study, peer, calling_ae="SEGGATE", timeout_s=10, deadline_s=30)
        for path in files:
            httpx.post(f"{pacs.http_url}instances", content=path.read_bytes(), timeout=30).raise_for_status()
        assert query_instance_count(study, peer, calling_ae="SEGGATE", timeout_s=10, deadline_s=30) == len(files) == 22
