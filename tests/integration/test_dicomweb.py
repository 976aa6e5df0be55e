"""STOW-RS and QIDO-RS: with Orthanc's DICOMweb plugin, and with a scripted server for what Orthanc never says."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from gateway.delivery.destination import DestinationAway, DestinationRefuses
from gateway.delivery.dicomweb import DicomWebPacs
from gateway.settings import DicomWebDestination
from storage.errors import ObjectChanged
from tests.support import pacs
from tests.support.http_server import Answer, http_server
from tests.support.outgoing import InventedResult


def _web(url: str, **settings: object) -> DicomWebPacs:
    fields = {"name": "pacs", "url": url, "timeout_s": 5}
    return DicomWebPacs(DicomWebDestination.model_validate({**fields, **settings}))


@pytest.fixture
def result(tmp_path: Path) -> InventedResult:
    return InventedResult(tmp_path / "result")


def _entry(sequence: str, uid: str, **reasons: int) -> bytes:
    item: dict[str, object] = {"00081155": {"vr": "UI", "Value": [uid]}}
    for tag, reason in reasons.items():
        item[tag.removeprefix("t")] = {"vr": "US", "Value": [reason]}
    return json.dumps({sequence: {"vr": "SQ", "Value": [item]}}).encode()


@pytest.mark.peer("orthanc")
@pytest.mark.requirement("OUT-42", open="storage commitment")
def test_objects_are_stored_by_stow_and_found_by_qido_in_orthanc(tmp_path: Path, result: InventedResult) -> None:
    objects = result.objects("LABELMAP")
    with pacs.orthanc(tmp_path / "orthanc") as peer:
        destination = _web(peer.dicomweb_url)
        assert [v.outcome for v in destination.verify(objects)] == ["absent", "absent"]
        assert [s.outcome for s in destination.send(objects)] == ["stored", "stored"]
        assert [v.outcome for v in destination.verify(objects)] == ["verified", "verified"]
        report = destination.echo()
        assert (report.reachable, report.accepted, report.query, report.problem) == (True, True, True, "")


@pytest.mark.parametrize(
    ("code", "sequence", "reasons", "outcome", "words"),
    [
        (200, "00081199", {}, "stored", "HTTP 200"),
        (202, "00081199", {"t00081196": 0xB000}, "warning", "0xB000 coercion of data elements"),
        (202, "00081198", {"t00081197": 0x0122}, "refused", "0x0122 SOP class not supported"),
        (409, "00081198", {"t00081197": 0xA700}, "failed", "0xA700 out of resources"),
        (409, "00081198", {"t00081197": 0xC122}, "refused", "0xC122 transfer syntax not supported"),
        (200, "00081198", {"t00081197": 0xA900}, "refused", "0xA900"),  # a 200 that is none
    ],
)
def test_each_object_has_the_status_of_its_own_entry(
    result: InventedResult, code: int, sequence: str, reasons: dict[str, int], outcome: str, words: str
) -> None:
    item = result.image("BINARY")
    with http_server(lambda r, b: (code, {}, _entry(sequence, item.sop_instance_uid, **reasons))) as url:
        (status,) = _web(url).send([item])
    assert status.outcome == outcome
    assert words in status.meaning


@pytest.mark.parametrize(
    ("code", "body", "outcome"),
    [
        (200, b"", "stored"),
        (200, b"<NativeDicomModel/>", "stored"),
        (200, b"{}", "unknown"),  # Orthanc's answer when it skipped the part
        (202, b"<NativeDicomModel/>", "unknown"),
        (202, _entry("00081199", "1.2.3"), "unknown"),  # speaks of another object
        (400, b"[" * 100_000, "refused"),  # deeper than any parser goes
        (415, b"", "refused"),
        (500, b"\xff\xfe", "doubtful"),
        (503, b"{}", "failed"),
    ],
)
def test_an_answer_without_a_word_on_the_object_is_judged_by_its_http_status(
    result: InventedResult, code: int, body: bytes, outcome: str
) -> None:
    with http_server(lambda r, b: (code, {}, body)) as url:
        (status,) = _web(url).send([result.image("BINARY")])
    assert status.outcome == outcome


def test_the_file_arrives_unchanged_in_one_part(result: InventedResult) -> None:
    item, seen = result.image("BINARY"), list[bytes]()

    def answer(request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        boundary = request.headers["Content-Type"].split("boundary=")[1].encode()
        assert request.headers["Authorization"] == "Bearer secret"
        seen.extend(body.split(b"--" + boundary))
        return 200, {}, b""

    token = item.path.parent / "token"
    token.write_text("secret\n")
    with http_server(answer) as url:
        _web(url, token_file=token).send([item])
    _, part, end = seen
    assert part.startswith(b"\r\nContent-Type: application/dicom\r\n\r\n")
    assert part.split(b"\r\n\r\n", 1)[1] == item.path.read_bytes() + b"\r\n"
    assert end == b"--\r\n"


def test_after_a_refused_object_nothing_more_is_sent(result: InventedResult) -> None:
    with http_server(lambda r, b: (415, {}, b"")) as url:
        statuses = _web(url).send(result.objects("BINARY"))
    assert [s.outcome for s in statuses] == ["refused"]


def test_a_redirect_is_not_followed(result: InventedResult) -> None:
    asked: list[str] = []

    def elsewhere(request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        asked.append(request.path)
        return 200, {}, b""

    with http_server(elsewhere) as other, http_server(lambda r, b: (307, {"Location": other}, b"")) as url:
        with pytest.raises(DestinationRefuses, match="redirect"):
            _web(url).send([result.image("BINARY")])
        with pytest.raises(DestinationRefuses, match="redirect"):
            _web(url).verify([result.image("BINARY")])
    assert asked == []


def test_credentials_that_are_not_accepted_are_a_refusal_of_the_destination(result: InventedResult) -> None:
    with http_server(lambda r, b: (401, {}, b"")) as url:
        with pytest.raises(DestinationRefuses, match="credentials"):
            _web(url).send(result.objects("BINARY"))
        assert "credentials" in _web(url).echo().problem


def test_a_server_without_qido_is_not_queryable(result: InventedResult) -> None:
    with http_server(lambda r, b: (404, {}, b"")) as url:
        assert [v.outcome for v in _web(url).verify(result.objects("BINARY"))] == ["not-queryable"] * 2


def test_a_query_answer_without_our_object_is_absent(result: InventedResult) -> None:
    other = json.dumps([{"00080018": {"vr": "UI", "Value": ["1.2.3"]}}, "nonsense", {"00080018": 7}]).encode()
    with http_server(lambda r, b: (200, {}, other)) as url:
        assert [v.outcome for v in _web(url).verify([result.image("BINARY")])] == ["absent"]


def test_an_answer_to_a_query_that_is_no_dicom_json_says_nothing(result: InventedResult) -> None:
    """A proxy's page with HTTP 200 must not have the object sent again as absent."""
    page = b"<html>please log in</html>"
    with http_server(lambda r, b: (200, {}, page)) as url, pytest.raises(DestinationAway, match="not DICOM JSON"):
        _web(url).verify([result.image("BINARY")])


def test_a_query_answered_without_a_body_found_nothing(result: InventedResult) -> None:
    with http_server(lambda r, b: (204, {}, b"")) as url:
        assert [v.outcome for v in _web(url).verify([result.image("BINARY")])] == ["absent"]


def test_an_answer_that_cannot_be_decoded_is_one_that_broke_off(result: InventedResult) -> None:
    with http_server(lambda r, b: (200, {"Content-Encoding": "gzip"}, b"not gzip")) as url:
        assert [s.outcome for s in _web(url).send([result.image("BINARY")])] == ["unknown"]
        with pytest.raises(DestinationAway):
            _web(url).verify([result.image("BINARY")])


@pytest.mark.parametrize("setting", ["token_file", "password_file", "ca_file"])
def test_a_secret_that_is_briefly_absent_is_waited_for(result: InventedResult, tmp_path: Path, setting: str) -> None:
    settings = {setting: tmp_path / "absent", "username": "seggate"}
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler, _: bytes) -> Answer:
        asked.append(request.path)
        return 200, {}, b""

    with http_server(answer) as url:
        for contact in (_web(url, **settings).send, _web(url, **settings).verify):
            with pytest.raises(DestinationRefuses, match=f"{setting.removesuffix('_file')}.*absent"):
                contact([result.image("BINARY")])
        report = _web(url, **settings).echo()
        assert (report.reachable, "absent" in report.problem) == (False, True)
    assert asked == []


@pytest.mark.parametrize(("code", "problem"), [(404, ""), (501, ""), (200, ""), (401, "credentials"), (503, "503")])
def test_where_nothing_is_read_back_a_server_without_qido_is_no_problem(code: int, problem: str) -> None:
    with http_server(lambda r, b: (code, {}, b"")) as url:
        report = _web(url, verify="none").echo()
    assert (report.reachable, report.accepted, report.query) == (True, not problem, None)
    assert problem in report.problem
    assert bool(report.problem) == bool(problem)
    assert not any("QIDO" in line for line in report.administrator)


def test_nothing_listens(result: InventedResult) -> None:
    destination = _web(f"http://127.0.0.1:{pacs.free_port()}/dicom-web")
    with pytest.raises(DestinationAway):
        destination.send(result.objects("BINARY"))
    with pytest.raises(DestinationAway):
        destination.verify(result.objects("BINARY"))
    assert not destination.echo().reachable


def test_a_file_that_was_altered_on_disk_never_leaves(result: InventedResult) -> None:
    seg = result.image("BINARY")
    seg.path.write_bytes(seg.path.read_bytes()[:-1])
    requests: list[str] = []

    def answer(request: BaseHTTPRequestHandler, _: bytes) -> Answer:
        requests.append(request.path)
        return 200, {}, b""

    with http_server(answer) as url, pytest.raises(ObjectChanged, match="altered or truncated"):
        _web(url).send([seg])
    assert requests == []
