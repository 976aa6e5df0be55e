"""C-STORE and C-FIND: real Orthanc, DCMTK's storescp, and a scripted peer that refuses, breaks off and stalls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pynetdicom import build_context, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind

from gateway.delivery.association import associated
from gateway.delivery.destination import DestinationAway, DestinationRefuses, OutgoingObject
from gateway.delivery.dimse import DimsePacs
from gateway.destination_settings import DimseDestination
from gateway.errors import Permanent
from gateway.setting_types import PeerAddress
from storage.errors import ObjectChanged, ObjectMissing
from tests.support import pacs
from tests.support.outgoing import COMPREHENSIVE_3D_SR, InventedResult

LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"


def _dimse(peer: pacs.RunningPacs, **settings: object) -> DimsePacs:
    fields = {"name": "pacs", "ae_title": peer.ae_title, "host": peer.host, "port": peer.port, "timeout_s": 10}
    return DimsePacs(DimseDestination.model_validate({**fields, **settings}), calling_ae_title="SEGGATE")


def _data_set_bytes(path: Path) -> bytes:
    """Everything after the file meta information (PS3.10 7.1): its group length tells where that ends."""
    content = path.read_bytes()
    meta = pydicom.filereader.read_file_meta_info(path)
    return content[132 + 12 + meta.FileMetaInformationGroupLength :]


@pytest.fixture
def result(tmp_path: Path) -> InventedResult:
    return InventedResult(tmp_path / "result")


@pytest.mark.peer("orthanc")
@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_seg_and_sr_are_stored_and_found_in_orthanc(tmp_path: Path, result: InventedResult) -> None:
    objects = result.objects("BINARY")
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        destination = _dimse(peer)
        assert [v.outcome for v in destination.verify(objects)] == ["absent", "absent"]
        assert [(s.outcome, s.code) for s in destination.send(objects)] == [("stored", 0), ("stored", 0)]
        assert [v.outcome for v in destination.verify(objects)] == ["verified", "verified"]


@pytest.mark.peer("orthanc")
@pytest.mark.requirement("OUT-44", open="RTSTRUCT, GSPS, PDF")
def test_orthanc_says_in_advance_and_when_sent_that_it_takes_no_labelmap(
    tmp_path: Path, result: InventedResult
) -> None:
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        destination = _dimse(peer, encodings=["LABELMAP", "BINARY"])
        report = destination.echo()
        assert dict(report.capability.sop_classes) == {
            "BINARY": "accepted",
            "LABELMAP": "refused",
            "SR": "accepted",
            "SC": "accepted",
        }
        assert (report.reachable, report.accepted, report.query, report.problem) == (True, True, True, "")
        (status,) = destination.send(result.objects("LABELMAP"))
        assert (status.outcome, status.code) == ("refused", None)
        assert "SOP class not supported" in status.meaning


@pytest.mark.peer("dcmtk")
def test_a_store_without_query_stores_the_bytes_unchanged_and_cannot_be_asked(
    tmp_path: Path, result: InventedResult
) -> None:
    objects = result.objects("BINARY")
    with pacs.storescp(tmp_path / "store") as peer:
        destination = _dimse(peer)
        assert [s.outcome for s in destination.send(objects)] == ["stored", "stored"]
        assert [v.outcome for v in destination.verify(objects)] == ["not-queryable", "not-queryable"]
        assert destination.echo().query is False
        stored = {p.name.split(".", 1)[1]: p for p in peer.folder.iterdir()}
    for item in objects:
        assert _data_set_bytes(stored[item.sop_instance_uid]) == _data_set_bytes(item.path)


@pytest.mark.parametrize(
    ("status", "outcome", "words"),
    [
        (0xB000, "warning", "0xB000 coercion of data elements"),
        (0xB006, "warning", "0xB006 elements discarded"),
        (0xB007, "warning", "0xB007 data set does not match SOP class"),
        (0xA700, "failed", "0xA700 out of resources"),
        (0xA900, "refused", "0xA900 data set does not match SOP class"),
        (0xC123, "refused", "0xC123 cannot understand"),
        (0x0122, "refused", "0x0122 SOP class not supported"),
        (0x0110, "doubtful", "0x0110 processing failure"),
    ],
)
def test_every_status_is_shown_as_what_it_is(
    tmp_path: Path, result: InventedResult, status: int, outcome: str, words: str
) -> None:
    item = result.image("BINARY")
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", [status])) as peer:
        (answer,) = _dimse(peer).send([item])
    assert (answer.code, answer.outcome) == (status, outcome)
    assert words in answer.meaning


def test_what_was_answered_before_an_abort_stays_known(tmp_path: Path, result: InventedResult) -> None:
    objects = [result.image("BINARY"), result.image("SC"), result.report("BINARY")]
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", [("then", 0), "abort"])) as peer:
        statuses = _dimse(peer).send(objects)
    assert [(s.sop_instance_uid, s.outcome) for s in statuses] == [
        (objects[0].sop_instance_uid, "stored"),
        (objects[1].sop_instance_uid, "unknown"),
    ]


def test_a_stalling_peer_is_left_after_the_timeout(tmp_path: Path, result: InventedResult) -> None:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs", ["stall"])) as peer:
        (status,) = _dimse(peer, timeout_s=3.0).send(result.objects("BINARY"))
    assert status.outcome == "unknown"
    assert "did not answer" in status.meaning


def test_after_a_refused_object_nothing_more_is_sent(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", [0xC000])
    objects = result.objects("BINARY")
    with pacs.scripted(scripted) as peer:
        _dimse(peer).send(objects)
    assert scripted.received == [objects[0].sop_instance_uid]


def test_a_class_that_is_not_negotiated_is_refused_without_being_sent(tmp_path: Path, result: InventedResult) -> None:
    scripted = pacs.ScriptedPacs(tmp_path / "pacs", refused_classes=[COMPREHENSIVE_3D_SR])
    objects = result.objects("BINARY")
    with pacs.scripted(scripted) as peer:
        assert [s.outcome for s in _dimse(peer).send(objects)] == ["stored", "refused"]
    assert scripted.received == [objects[0].sop_instance_uid]


def test_a_peer_that_does_not_know_the_called_ae_refuses(tmp_path: Path, result: InventedResult) -> None:
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs")) as peer:
        stranger = _dimse(peer, ae_title="OTHER")
        with pytest.raises(DestinationRefuses, match="Called AE title not recognised"):
            stranger.send(result.objects("BINARY"))
        report = stranger.echo()
    assert (report.reachable, report.accepted) == (True, False)
    assert any("SEGGATE" in line for line in report.administrator)


def test_query_at_another_application_entity(tmp_path: Path, result: InventedResult) -> None:
    objects = result.objects("BINARY")
    storing, asking = pacs.ScriptedPacs(tmp_path / "a"), pacs.ScriptedPacs(tmp_path / "b")
    with pacs.scripted(storing) as store, pacs.scripted(asking) as query:
        address = {"ae_title": query.ae_title, "host": query.host, "port": query.port}
        destination = _dimse(store, query=address)
        destination.send(objects)
        assert [v.outcome for v in destination.verify(objects)] == ["absent", "absent"]
        assert destination.echo().query is True


class Endless(pacs.ScriptedPacs):
    """Ignores the UID keys of a query: shows the first object that it holds, and then others without end."""

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        for uid in (self.objects()[0], *(f"1.2.{n}" for n in range(10_000))):
            match = Dataset()
            match.SOPInstanceUID = uid
            yield 0xFF00, match


def test_a_query_whose_answers_have_no_end_is_left_and_the_rest_counts_as_not_asked(
    tmp_path: Path, result: InventedResult
) -> None:
    with pacs.scripted(Endless(tmp_path / "pacs")) as peer:
        destination = _dimse(peer)
        seg, sr = result.objects("BINARY")
        destination.send([seg, sr])
        first, second = (seg, sr) if seg.sop_instance_uid < sr.sop_instance_uid else (sr, seg)
        found = destination.verify([first, second])
    assert [(v.sop_instance_uid, v.outcome) for v in found] == [
        (first.sop_instance_uid, "verified"),
        (second.sop_instance_uid, "not-queryable"),
    ]


def test_an_association_that_the_peer_has_ended_is_away_for_asking_and_leaves_a_sending_unknown(
    tmp_path: Path, result: InventedResult
) -> None:
    item = result.image("BINARY")
    contexts = [build_context(item.sop_class_uid, item.transfer_syntax_uid), build_context(StudyRootFind)]
    with pacs.scripted(pacs.ScriptedPacs(tmp_path / "pacs")) as peer:
        destination = _dimse(peer)
        address = PeerAddress(ae_title=peer.ae_title, host=peer.host, port=peer.port)
        with associated(address, contexts, calling_ae_title="SEGGATE", timeout_s=5, name="pacs") as association:
            association.abort()
            assert destination._store(association, item, 1).outcome == "unknown"
            with pytest.raises(DestinationAway, match="ended the association"):
                destination._find(association, item, 2)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_nothing_there_is_away_and_said_with_the_reason(result: InventedResult, host: str) -> None:
    peer = pacs.RunningPacs(ae_title="GONE", host=host, port=pacs.free_port(), folder=Path())
    destination = _dimse(peer, timeout_s=2)
    with pytest.raises(DestinationAway, match=r"GONE at .* cannot be reached: \w+"):
        destination.send(result.objects("BINARY"))
    with pytest.raises(DestinationAway):
        destination.verify(result.objects("BINARY"))
    assert destination.echo().reachable is False


def test_a_file_that_is_another_object_never_leaves(tmp_path: Path, result: InventedResult) -> None:
    right, other = result.image("BINARY"), result.image("SC")
    fields = {k: getattr(right, k) for k in OutgoingObject.__dataclass_fields__}
    scripted = pacs.ScriptedPacs(tmp_path / "pacs")
    with pacs.scripted(scripted) as peer:
        with pytest.raises(Permanent, match="MediaStorageSOPInstanceUID"):
            _dimse(peer).send([OutgoingObject(**{**fields, "path": other.path, "digest": other.digest})])
        right.path.unlink()
        with pytest.raises(ObjectMissing, match="cannot be read"):
            _dimse(peer).send([right])
    assert scripted.received == []


@pytest.mark.requirement("QUE-27")
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_file_that_was_altered_or_truncated_on_disk_never_leaves(
    tmp_path: Path, result: InventedResult, damage: Callable[[bytes], bytes]
) -> None:
    seg, sr = result.objects("BINARY")
    sr.path.write_bytes(damage(sr.path.read_bytes()))
    scripted = pacs.ScriptedPacs(tmp_path / "pacs")
    with pacs.scripted(scripted) as peer, pytest.raises(ObjectChanged) as caught:
        _dimse(peer).send([seg, sr])
    assert scripted.received == []
    for said in (sr.sop_instance_uid, str(sr.path), "not sent", "seggate retry"):
        assert said in str(caught.value)
