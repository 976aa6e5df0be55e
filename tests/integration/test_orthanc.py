"""Orthanc's REST interface, with a real Orthanc."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from gateway.delivery.destination import DestinationAway, DestinationRefuses
from gateway.delivery.orthanc import OrthancPacs
from gateway.settings import OrthancDestination
from storage.errors import ObjectChanged
from tests.support import pacs
from tests.support.http_server import http_server
from tests.support.outgoing import InventedResult

pytestmark = pytest.mark.peer("orthanc")


def _rest(url: str, **settings: object) -> OrthancPacs:
    fields = {"name": "pacs", "url": url, "timeout_s": 10}
    return OrthancPacs(OrthancDestination.model_validate({**fields, **settings}))


@pytest.fixture
def result(tmp_path: Path) -> InventedResult:
    return InventedResult(tmp_path / "result")


@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_objects_are_stored_and_read_back_by_digest(tmp_path: Path, result: InventedResult) -> None:
    objects = result.objects("LABELMAP")
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        destination = _rest(peer.http_url.rstrip("/"))
        assert [v.outcome for v in destination.verify(objects)] == ["absent", "absent"]
        assert [s.outcome for s in destination.send(objects)] == ["stored", "stored"]
        assert [(v.outcome, v.detail) for v in destination.verify(objects)] == [
            ("verified", "found in Orthanc, same MD5")
        ] * 2
        again = destination.send(objects)
        assert [(s.outcome, s.meaning) for s in again] == [("stored", "Orthanc: it was there already")] * 2
        report = destination.echo()
        assert (report.reachable, report.accepted, report.query, report.problem) == (True, True, True, "")


def test_other_content_under_the_same_uid_is_never_called_verified(tmp_path: Path, result: InventedResult) -> None:
    item = result.report("BINARY")
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        destination = _rest(peer.http_url)
        destination.send([item])
        changed = pydicom.dcmread(item.path)
        changed.SeriesDescription = "changed behind our back"
        changed.save_as(item.path)
        with pytest.raises(ObjectChanged):  # not sent, and not held against Orthanc, which has what we wrote
            destination.send([item])
        with pytest.raises(ObjectChanged):
            destination.verify([item])
        item = replace(item, digest=hashlib.sha256(item.path.read_bytes()).hexdigest())
        # Orthanc keeps the first: the answer to sending alone would look like a success.
        assert destination.send([item])[0].meaning == "Orthanc: it was there already"
        assert destination.verify([item])[0].outcome == "differs"


def test_wrong_password_is_a_refusal_and_the_right_one_works(tmp_path: Path, result: InventedResult) -> None:
    objects = result.objects("BINARY")
    (tmp_path / "right").write_text("correct horse\n")
    (tmp_path / "wrong").write_text("battery staple\n")
    with pacs.orthanc(tmp_path / "orthanc", users={"seggate": "correct horse"}) as peer:
        with pytest.raises(DestinationRefuses, match="HTTP 401"):
            _rest(peer.http_url, username="seggate", password_file=tmp_path / "wrong").send(objects)
        right = _rest(peer.http_url, username="seggate", password_file=tmp_path / "right")
        assert [s.outcome for s in right.send(objects)] == ["stored", "stored"]


def test_a_password_file_that_is_briefly_absent_is_waited_for(tmp_path: Path, result: InventedResult) -> None:
    destination = _rest("http://127.0.0.1:1", username="seggate", password_file=tmp_path / "absent")
    for contact in (destination.send, destination.verify):
        with pytest.raises(DestinationRefuses, match=r"password_file.*absent"):
            contact(result.objects("BINARY"))
    report = destination.echo()
    assert (report.reachable, "absent" in report.problem) == (False, True)


@pytest.mark.parametrize("answer", [b"<html>please log in</html>", b"{}", b"[1]"])
def test_an_answer_to_a_lookup_that_is_none_of_an_orthanc_says_nothing(result: InventedResult, answer: bytes) -> None:
    with http_server(lambda r, b: (200, {}, answer)) as url, pytest.raises(DestinationAway, match="as an Orthanc does"):
        _rest(url).verify(result.objects("BINARY"))


def test_a_lookup_that_cannot_be_decoded_says_nothing(result: InventedResult) -> None:
    broken = {"Content-Encoding": "gzip"}
    with http_server(lambda r, b: (200, broken, b"not gzip")) as url, pytest.raises(DestinationAway):
        _rest(url).verify(result.objects("BINARY"))


def test_what_a_filter_keeps_out_is_a_refusal_although_http_says_200(tmp_path: Path, result: InventedResult) -> None:
    script = tmp_path / "filter.lua"
    script.write_text("function ReceivedInstanceFilter(dicom, origin, info) return dicom['Modality'] ~= 'SEG' end\n")
    objects = result.objects("BINARY")
    with pacs.orthanc(tmp_path / "orthanc", LuaScripts=[str(script)]) as peer:
        statuses = _rest(peer.http_url).send(objects)
    assert [(s.sop_instance_uid, s.outcome) for s in statuses] == [(objects[0].sop_instance_uid, "refused")]


def test_nothing_listens(result: InventedResult) -> None:
    destination = _rest(f"http://127.0.0.1:{pacs.free_port()}/")
    with pytest.raises(DestinationAway):
        destination.send(result.objects("BINARY"))
    report = destination.echo()
    assert not report.reachable
    assert report.problem
