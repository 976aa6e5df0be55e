"""The listener under legal and illegal peers: what is acknowledged is in the spool, everything else is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest

from gateway.intake.header import read_header
from gateway.intake.indexer import Indexer
from gateway.intake.presentation_contexts import (
    TRANSFER_SYNTAXES,
    VERIFICATION,
    refusal_reason,
    storage_sop_classes,
    supported_contexts,
)
from gateway.intake.scp import Receiver
from gateway.intake.structure import MAX_DEPTH
from gateway.settings import SenderSettings
from storage.database import Database
from storage.errors import SpoolFull
from storage.records import Association, Instance, Refusal, Series, Study
from storage.spool import Spool
from tests.support import peers
from tests.support.received_objects import data_set, element, intake_settings
from tests.support.scripted_peer import (
    CT_IMAGE,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    Aborted,
    Rejected,
    ScriptedPeer,
    command_set,
    store_command,
)

UID = b"1.2.3.1"


@contextmanager
def receiving(folder: Path, **how: Any) -> Iterator[Receiver]:
    settings = intake_settings(folder, **how)
    receiver = Receiver(settings, Spool(settings.spool_dir, settings.gateway.receiver.reserve_mb << 20))
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with receiving(tmp_path) as running:
        yield running


def stored(receiver: Receiver) -> list[Path]:
    return [entry.path for entry in receiver.spool.incoming() if not entry.is_event]


def events(receiver: Receiver, kind: str) -> list[dict[str, Any]]:
    read = [receiver.spool.read_event(entry.path) for entry in receiver.spool.incoming() if entry.is_event]
    return [detail for found, detail in read if found == kind]


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def data_bytes(receiver: Receiver, path: Path) -> bytes:
    return path.read_bytes()[receiver.spool.dataset_offset(path) :]


def test_a_second_receiver_on_the_same_address_leaves_the_first_one_and_its_associations_alone(
    receiver: Receiver, tmp_path: Path
) -> None:
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        assert peer.store(data_set("1.2.3.1"), sop_instance=UID).status == 0x0000
        with pytest.raises(OSError, match="in use"):
            Receiver(intake_settings(tmp_path, port=receiver.port), receiver.spool).start()
        assert len(events(receiver, "started")) == 1
        peer.release()


def test_a_receiver_that_cannot_record_its_start_gives_the_address_back(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = intake_settings(tmp_path / "other")
    other = Receiver(settings, Spool(settings.spool_dir, 0))

    def full(*_: object) -> Path:
        raise SpoolFull("full")

    monkeypatch.setattr(other.spool, "write_event", full)
    made: list[Any] = []
    make_server = other.entity.make_server

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(make_server(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(other.entity, "make_server", noted)
    with pytest.raises(SpoolFull):
        other.start()
    assert made[0].socket.fileno() == -1


# -- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("REC-01", open="power cut by a block-layer recorder")
def test_success_means_the_bytes_are_in_the_spool_with_their_evidence(receiver: Receiver) -> None:
    data = os.urandom(300_000)
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        assert peer.store(data, sop_instance=UID).status == 0x0000
        (path,) = stored(receiver)
        assert data_bytes(receiver, path) == data
        evidence = receiver.spool.read_evidence(path)
        peer.release()
    assert (evidence.calling_ae, evidence.called_ae, evidence.peer_address) == ("CT1", "SEGGATE", "127.0.0.1")
    assert (evidence.sop_instance_uid, evidence.transfer_syntax_uid) == ("1.2.3.1", EXPLICIT_LITTLE)
    wait_for(lambda: events(receiver, "ended"))
    (ended,) = events(receiver, "ended")
    assert (ended["ended"], ended["objects"]) == ("released", 1)
    assert ended["association_id"] == evidence.association_id
    order = [entry.path.suffix for entry in receiver.spool.incoming()]
    assert order == [".json", ".json", ".dcm", ".json"]  # started, opened, object, ended


@pytest.mark.requirement("REC-01", open="power cut by a block-layer recorder")
def test_killed_process_keeps_every_acknowledged_object(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from gateway.intake.scp import run_receiver
        from tests.support.received_objects import intake_settings
        run_receiver(intake_settings(Path(sys.argv[1])), ready=lambda port: print(port, flush=True))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=peers.ROOT
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        acknowledged: dict[str, bytes] = {}
        with ScriptedPeer(port) as peer:
            peer.associate()
            for number in range(20):
                data = os.urandom(50_000)
                assert peer.store(data, sop_instance=f"1.2.3.{number}".encode()).status == 0
                acknowledged[f"1.2.3.{number}"] = data
            peer.send_fragment(store_command(CT_IMAGE.encode(), b"1.2.3.99"), command=True, last=True)
            peer.send_fragment(os.urandom(1000), command=False, last=False)
            process.send_signal(signal.SIGKILL)
            process.wait(10)
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
    settings = intake_settings(tmp_path)
    spool = Spool(settings.spool_dir, 0)
    kept = {}
    for entry in spool.incoming():
        if not entry.is_event:
            kept[spool.read_evidence(entry.path).sop_instance_uid] = entry.path.read_bytes()[
                spool.dataset_offset(entry.path) :
            ]
    assert kept == acknowledged
    with receiving(tmp_path) as again:
        assert list((again.spool.root / "tmp").iterdir()) == []
        assert len(stored(again)) == 20


def test_sigterm_drains_and_ends_with_success(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from gateway.intake.scp import run_receiver
        from tests.support.received_objects import intake_settings
        run_receiver(intake_settings(Path(sys.argv[1])), ready=lambda port: print(port, flush=True))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=peers.ROOT
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with ScriptedPeer(port) as peer:
            peer.associate()
            peer.send_fragment(store_command(CT_IMAGE.encode(), UID), command=True, last=True)
            process.send_signal(signal.SIGTERM)
            peer.send_fragment(b"first half", command=False, last=False)
            peer.send_fragment(b", second half.", command=False, last=True)
            assert peer.receive_response().status == 0
            peer.release()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.requirement("REC-06", open="HTJ2K from a real sender")
@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
def test_every_transfer_syntax_is_stored_byte_for_byte(receiver: Receiver, syntax: str) -> None:
    data = os.urandom(10_001)
    with ScriptedPeer(receiver.port) as peer:
        accepted = peer.associate(contexts={1: (CT_IMAGE, [syntax]), 3: ("1.2.840.10008.5.1.4.1.1.2.1", [syntax])})
        assert accepted == {1: (0, syntax), 3: (0, syntax)}
        assert peer.store(data, sop_instance=UID).status == 0
        enhanced = {"sop_class": b"1.2.840.10008.5.1.4.1.1.2.1", "context_id": 3}
        assert peer.store(data, sop_instance=b"1.2.3.2", **enhanced).status == 0
        peer.release()
    assert [data_bytes(receiver, path) for path in stored(receiver)] == [data, data]
    assert {receiver.spool.read_evidence(path).transfer_syntax_uid for path in stored(receiver)} == {syntax}


@pytest.mark.requirement("REC-06")
@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.102.1", "1.2.840.10008.1.2.4.55", "1.2.3.4.5"]
)
def test_other_transfer_syntaxes_are_refused_at_negotiation_with_a_reason(receiver: Receiver, syntax: str) -> None:
    assert refusal_reason(syntax)
    with ScriptedPeer(receiver.port) as peer:
        accepted = peer.associate(contexts={1: (CT_IMAGE, [syntax]), 3: (CT_IMAGE, [IMPLICIT_LITTLE])})
        assert accepted[1][0] == 4  # transfer syntaxes not supported
        assert accepted[3] == (0, IMPLICIT_LITTLE)
        peer.release()


def test_every_storage_class_is_offered_once_and_newer_ones_too() -> None:
    classes = storage_sop_classes()
    assert len(classes) == len(set(classes))
    assert len(classes) > 150
    assert {"1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.66.4", CT_IMAGE} <= set(classes)
    assert all(refusal_reason(syntax) is None for syntax in TRANSFER_SYNTAXES)
    assert [str(c.abstract_syntax) for c in supported_contexts()] == [VERIFICATION, *classes]


@pytest.mark.requirement("REC-07")
def test_unknown_sop_class_is_refused_by_default(receiver: Receiver) -> None:
    with ScriptedPeer(receiver.port) as peer:
        accepted = peer.associate(contexts={1: ("1.2.392.200036.9116.7", [EXPLICIT_LITTLE])})
        assert accepted[1][0] == 3  # abstract syntax not supported
        with pytest.raises(Aborted):
            peer.store(b"x" * 10, sop_instance=UID, sop_class=b"1.2.392.200036.9116.7")
    assert stored(receiver) == []


@pytest.mark.requirement("REC-07")
def test_unknown_sop_class_is_stored_by_policy_but_no_other_service(tmp_path: Path) -> None:
    with receiving(tmp_path, unknown_sop_classes="store") as receiver, ScriptedPeer(receiver.port) as peer:
        private, new, find = "1.2.392.200036.9116.7", "1.2.840.10008.5.1.4.1.1.999", "1.2.840.10008.5.1.4.1.2.2.1"
        accepted = peer.associate(
            contexts={1: (private, [EXPLICIT_LITTLE]), 3: (new, [EXPLICIT_LITTLE]), 5: (find, [EXPLICIT_LITTLE])}
        )
        assert [accepted[i][0] for i in (1, 3, 5)] == [0, 0, 3]
        assert peer.store(b"private", sop_instance=UID, sop_class=private.encode()).status == 0
        assert data_bytes(receiver, stored(receiver)[0]) == b"private"
        peer.release()


def test_negotiation_leaves_the_shared_contexts_alone(receiver: Receiver) -> None:
    def snapshot() -> list[tuple[str, tuple[str, ...], object]]:
        assert receiver._server is not None
        return [
            (str(c.abstract_syntax), tuple(str(s) for s in c.transfer_syntax), c.result)
            for c in receiver._server.contexts
        ]

    before = snapshot()
    for syntax in TRANSFER_SYNTAXES[:4]:
        with ScriptedPeer(receiver.port) as peer:
            peer.associate(contexts={1: (CT_IMAGE, [syntax]), 3: (CT_IMAGE, ["1.2.3"]), 5: ("1.2.3", [syntax])})
            peer.release()
    assert snapshot() == before


# -- who may send --------------------------------------------------------------------------------------------------


@pytest.mark.requirement("REC-04", open="one-click add")
def test_unknown_caller_is_rejected_and_counted(receiver: Receiver) -> None:
    for _ in range(3):
        with ScriptedPeer(receiver.port) as peer, pytest.raises(Rejected) as refused:
            peer.associate(calling_ae="STRANGER")
        assert (refused.value.result, refused.value.source, refused.value.diagnostic) == (1, 1, 3)
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        peer.release()
    wait_for(lambda: sum(r["count"] for e in events(receiver, "refused") for r in e["refusals"]) == 3, 25)
    settings = receiver.settings
    database = Database(settings.database_url)
    database.create_all()
    Indexer(receiver.spool, database, settings).run_once()
    with database.reading() as session:
        (row,) = session.query(Refusal).all()
        assert (row.kind, row.calling_ae, row.peer_address, row.count) == ("association", "STRANGER", "127.0.0.1", 3)
        assert "not recognized" in row.reason
    database.close()


@pytest.mark.requirement("REC-04", open="one-click add")
def test_empty_configuration_admits_nobody(tmp_path: Path) -> None:
    with receiving(tmp_path, senders=()) as receiver, ScriptedPeer(receiver.port) as peer, pytest.raises(Rejected):
        peer.associate()


@pytest.mark.requirement("REC-04", open="one-click add")
@pytest.mark.parametrize(
    ("addresses", "admitted"),
    [(("127.0.0.1",), True), (("127.0.0.0/8",), True), (("192.0.2.0/24",), False), (("::1",), False), ((), True)],
)
def test_address_must_be_one_that_the_sender_has(tmp_path: Path, addresses: tuple[str, ...], admitted: bool) -> None:
    senders = (SenderSettings(ae_title="CT1", addresses=addresses),)
    with receiving(tmp_path, senders=senders) as receiver, ScriptedPeer(receiver.port) as peer:
        if admitted:
            peer.associate()
            peer.release()
            return
        with pytest.raises(Rejected) as refused:
            peer.associate()
        assert refused.value.diagnostic == 3


def test_called_ae_is_checked_unless_switched_off(tmp_path: Path) -> None:
    with receiving(tmp_path / "on") as receiver, ScriptedPeer(receiver.port) as peer:
        with pytest.raises(Rejected) as refused:
            peer.associate(called_ae="OTHER")
        assert (refused.value.result, refused.value.source, refused.value.diagnostic) == (1, 1, 7)
    with receiving(tmp_path / "off", check_called_ae=False) as receiver, ScriptedPeer(receiver.port) as peer:
        peer.associate(called_ae="OTHER")
        peer.release()


def test_error_while_judging_a_request_refuses_it(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(receiver.admission, "request", broken)
    with ScriptedPeer(receiver.port) as peer, pytest.raises(Rejected) as refused:
        peer.associate()
    assert refused.value.result == 2


def test_associations_over_the_limit_are_refused_for_now(tmp_path: Path) -> None:
    with receiving(tmp_path, max_associations=2) as receiver:
        with ScriptedPeer(receiver.port) as first, ScriptedPeer(receiver.port) as second:
            first.associate()
            second.associate()
            with ScriptedPeer(receiver.port) as third, pytest.raises(Rejected) as refused:
                third.associate()
            assert (refused.value.result, refused.value.source, refused.value.diagnostic) == (2, 3, 2)
            first.release()
            second.release()
        wait_for(lambda: receiver.admission.open_associations == 0)
        with ScriptedPeer(receiver.port) as fourth:
            fourth.associate()
            fourth.release()


def test_connections_that_say_nothing_do_not_pile_up(tmp_path: Path) -> None:
    with ExitStack() as open_peers:
        receiver = open_peers.enter_context(receiving(tmp_path, max_associations=1, acse_timeout_s=5))
        for _ in range(80):
            open_peers.callback(ScriptedPeer(receiver.port).socket.close)
        wait_for(lambda: receiver._server is not None and len(receiver._server.active_associations) >= 60)
        assert receiver._server is not None
        assert len(receiver._server.active_associations) <= 65
        wait_for(lambda: receiver._server is not None and not receiver._server.active_associations, 30)
        with ScriptedPeer(receiver.port) as peer:
            peer.associate()
            peer.release()


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize(
    ("sop_class", "sop_instance", "status", "attribute"),
    [
        (CT_IMAGE.encode(), b"", 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (CT_IMAGE.encode(), None, 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (CT_IMAGE.encode(), b"../../../etc/passwd", 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (CT_IMAGE.encode(), b"1.2/../3", 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (CT_IMAGE.encode(), b"1.2\0.3", 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (CT_IMAGE.encode(), b"1." + b"2" * 70, 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (CT_IMAGE.encode(), b"\xff\xfe", 0x0117, "AffectedSOPInstanceUID (0000,1000)"),
        (b"", UID, 0x0122, "AffectedSOPClassUID (0000,0002)"),
        (None, UID, 0x0122, "AffectedSOPClassUID (0000,0002)"),
        (b"1.2.840.10008.5.1.4.1.1.4", UID, 0x0122, "AffectedSOPClassUID (0000,0002)"),
        (b"x" * 100, UID, 0x0122, "AffectedSOPClassUID (0000,0002)"),
    ],
)
def test_bad_uid_in_the_command_is_answered_with_its_name(
    receiver: Receiver, sop_class: bytes | None, sop_instance: bytes | None, status: int, attribute: str
) -> None:
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        begin = time.monotonic()
        answer = peer.store(os.urandom(40_000), sop_instance=sop_instance, sop_class=sop_class)
        assert time.monotonic() - begin < 5
        assert answer.status == status
        assert answer.comment.startswith(attribute)
        assert peer.store(b"good", sop_instance=UID).status == 0
        peer.release()
    assert [data_bytes(receiver, path) for path in stored(receiver)] == [b"good"]
    wait_for(lambda: not list((receiver.spool.root / "tmp").iterdir()))  # an event may just be on its way


def test_request_without_a_data_set_is_answered_at_once(receiver: Receiver) -> None:
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        peer.send_fragment(store_command(CT_IMAGE.encode(), UID, data=False), command=True, last=True)
        answer = peer.receive_response()
        assert answer.status == 0xC000
        assert "(0000,0800)" in answer.comment
        peer.release()


@pytest.mark.requirement("REC-02")
def test_no_space_refuses_new_associations_and_objects_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving(tmp_path) as receiver, ScriptedPeer(receiver.port) as peer:
        peer.associate()
        assert peer.store(b"before", sop_instance=UID).status == 0
        receiver.spool.reserve_bytes = 1 << 62
        answer = peer.store(b"x" * 100_000, sop_instance=b"1.2.3.2")
        assert answer.status == 0xA700
        with ScriptedPeer(receiver.port) as other, pytest.raises(Rejected) as refused:
            other.associate()
        assert (refused.value.result, refused.value.source, refused.value.diagnostic) == (2, 3, 1)
        receiver.spool.reserve_bytes = 0
        assert peer.store(b"after", sop_instance=b"1.2.3.3").status == 0
        with ScriptedPeer(receiver.port) as other:
            other.associate()
            other.release()
        peer.release()
        assert [data_bytes(receiver, path) for path in stored(receiver)] == [b"before", b"after"]


@pytest.mark.requirement("REC-02")
def test_a_receiver_that_starts_without_space_refuses_for_now_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(Spool, "free_bytes", lambda _: -1)
        with receiving(tmp_path) as receiver:
            with ScriptedPeer(receiver.port) as peer, pytest.raises(Rejected) as refused:
                peer.associate()
            assert (refused.value.result, refused.value.source, refused.value.diagnostic) == (2, 3, 1)
            full.undo()
            with ScriptedPeer(receiver.port) as peer:
                peer.associate()
                assert peer.store(b"data", sop_instance=UID).status == 0
                peer.release()


@pytest.mark.requirement("REC-02")
@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 0xA700), (errno.EIO, 0x0110)])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_failed_write_is_never_a_success(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, number: int, status: int, call: str
) -> None:
    real = getattr(os, call)
    failing = threading.Event()

    def fail(*arguments: Any) -> Any:
        if failing.is_set():
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        assert peer.store(b"first", sop_instance=UID).status == 0
        failing.set()
        begin = time.monotonic()
        assert peer.store(b"second" * 10_000, sop_instance=b"1.2.3.2").status == status
        assert time.monotonic() - begin < 5
        failing.clear()
        assert peer.store(b"third", sop_instance=b"1.2.3.3").status == 0
        peer.release()
    assert [data_bytes(receiver, path) for path in stored(receiver)] == [b"first", b"third"]
    wait_for(lambda: not list((receiver.spool.root / "tmp").iterdir()))  # an event may just be on its way


@pytest.mark.requirement("REC-03")
def test_spool_that_vanished_is_answered_with_failure(receiver: Receiver) -> None:
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        assert peer.store(b"first", sop_instance=UID).status == 0
        (receiver.spool.root / "incoming").rename(receiver.spool.root / "gone")
        begin = time.monotonic()
        assert peer.store(b"second", sop_instance=b"1.2.3.2").status == 0x0110
        assert time.monotonic() - begin < 5
        (receiver.spool.root / "gone").rename(receiver.spool.root / "incoming")
        assert peer.store(b"second", sop_instance=b"1.2.3.2").status == 0
        peer.release()


def test_unexpected_error_is_never_a_success(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.object_writer import ObjectWriter

    def broken(self: ObjectWriter) -> Path:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(ObjectWriter, "commit", broken)
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        assert peer.store(b"data", sop_instance=UID).status == 0x0110
        monkeypatch.undo()
        assert peer.store(b"data", sop_instance=UID).status == 0
        peer.release()


# -- how associations end ------------------------------------------------------------------------------------------


@pytest.mark.requirement("REC-13")
@pytest.mark.parametrize("way", ["abort", "close"])
def test_objects_before_an_abort_stay_and_the_half_one_goes(receiver: Receiver, way: str) -> None:
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        for number in range(3):
            assert peer.store(b"whole", sop_instance=f"1.2.3.{number}".encode()).status == 0
        peer.send_fragment(store_command(CT_IMAGE.encode(), b"1.2.3.9"), command=True, last=True)
        peer.send_fragment(b"half", command=False, last=False)
        wait_for(lambda: list((receiver.spool.root / "tmp").iterdir()))
        if way == "abort":
            peer.abort()
    wait_for(lambda: events(receiver, "ended"))
    (ended,) = events(receiver, "ended")
    assert (ended["ended"], ended["objects"]) == ("aborted" if way == "abort" else "lost", 3)
    assert len(stored(receiver)) == 3
    wait_for(lambda: not list((receiver.spool.root / "tmp").iterdir()))  # an event may just be on its way


def test_stalled_peer_is_closed_within_its_timeout(tmp_path: Path) -> None:
    with receiving(tmp_path, network_timeout_s=1, acse_timeout_s=1) as receiver, ScriptedPeer(receiver.port) as peer:
        peer.associate()
        peer.send_fragment(store_command(CT_IMAGE.encode(), UID), command=True, last=True)
        peer.socket.sendall(b"\x04\x00\x00\x00\x10\x00\x00\x00")  # the first bytes of a PDU, and then nothing
        wait_for(lambda: events(receiver, "ended"), 10)
        assert events(receiver, "ended")[0]["ended"] == "lost"
        wait_for(lambda: not list((receiver.spool.root / "tmp").iterdir()))  # an event may just be on its way


Violation = Callable[[ScriptedPeer], None]


def _fragments(*fragments: tuple[bytes, bool, bool, int]) -> Violation:
    """(data, is command, is last, context id), one PDU each."""

    def send(peer: ScriptedPeer) -> None:
        for data, command, last, context_id in fragments:
            peer.send_fragment(data, command=command, last=last, context_id=context_id)

    return send


_STORE = store_command(CT_IMAGE.encode(), UID)
VIOLATIONS: dict[str, Violation] = {
    "data before command": _fragments((b"x", False, True, 1)),
    "command inside data": _fragments((_STORE, True, True, 1), (_STORE, True, True, 1)),
    "data on another context": _fragments((_STORE, True, True, 1), (b"x", False, True, 3)),
    "context never accepted": lambda peer: peer.send_store(b"x", sop_instance=UID, context_id=99),
    "no message id": _fragments(
        (command_set({0x0002: CT_IMAGE.encode(), 0x0100: b"\1\0", 0x0800: b"\0\0"}), True, True, 1)
    ),
    "junk command": _fragments((b"\xff" * 40, True, True, 1)),
    "endless command": _fragments(*[(bytes(16000), True, False, 1)] * 5),
    "PDV longer than its PDU": lambda peer: peer.send_pdu(0x04, b"\0\0\xff\xff\1\2abc"),
    "PDV of length 0": lambda peer: peer.send_pdu(0x04, b"\0\0\0\0"),
    "PDV without header": lambda peer: peer.send_pdu(0x04, b"\0\0\0\1\1"),
    "PDU of 4 GiB": lambda peer: peer.socket.sendall(b"\x04\x00\xff\xff\xff\xffabc"),
    "unknown PDU": lambda peer: peer.send_pdu(0x77, b"abc"),
    "second association request": lambda peer: peer.send_pdu(0x01, bytes(100)),
}


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize("name", VIOLATIONS)
def test_broken_protocol_ends_that_association_alone(receiver: Receiver, name: str) -> None:
    with ScriptedPeer(receiver.port) as good:
        good.associate()
        with ScriptedPeer(receiver.port) as bad:
            bad.associate()
            VIOLATIONS[name](bad)
            with pytest.raises(Aborted):
                bad.receive_response()
        assert good.store(b"good", sop_instance=UID).status == 0
        good.release()
    wait_for(lambda: receiver.admission.open_associations == 0, 15)
    assert [data_bytes(receiver, path) for path in stored(receiver)] == [b"good"]
    wait_for(lambda: not list((receiver.spool.root / "tmp").iterdir()))  # an event may just be on its way


@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.1\r\n\r\n", bytes(1000), os.urandom(5000), b"\x01\x00\x00\x00\x00\x04junk"]
)
def test_junk_instead_of_an_association_does_no_harm(tmp_path: Path, junk: bytes) -> None:
    with receiving(tmp_path, acse_timeout_s=2, network_timeout_s=2) as receiver:
        with ScriptedPeer(receiver.port) as peer:
            peer.socket.sendall(junk)
            with ScriptedPeer(receiver.port) as good:
                good.associate()
                assert good.store(b"good", sop_instance=UID).status == 0
                good.release()
        wait_for(lambda: receiver._server is not None and not receiver._server.active_associations, 15)


def test_echo_is_answered_and_leaves_no_evidence(receiver: Receiver) -> None:
    with ScriptedPeer(receiver.port) as peer:
        peer.associate()
        peer.send_fragment(
            command_set({0x0002: VERIFICATION.encode(), 0x0100: b"\x30\0", 0x0110: b"\1\0", 0x0800: b"\1\1"}),
            command=True,
            last=True,
            context_id=3,
        )
        assert peer.receive_response().status == 0
        peer.release()
    wait_for(lambda: receiver.admission.open_associations == 0)
    assert [entry.is_event for entry in receiver.spool.incoming()] == [True]  # that the receiver started


def test_many_small_fragments_and_a_small_answer_pdu(receiver: Receiver) -> None:
    data = os.urandom(3001)
    with ScriptedPeer(receiver.port) as peer:
        peer.associate(max_pdu_bytes=128)
        command = store_command(CT_IMAGE.encode(), UID)
        peer.send_fragment(command[:10], command=True, last=False)
        peer.send_fragment(command[10:], command=True, last=True)
        for start in range(0, len(data), 100):
            peer.send_fragment(data[start : start + 100], command=False, last=start + 100 >= len(data))
        assert peer.receive_response().status == 0
        peer.release()
    assert data_bytes(receiver, stored(receiver)[0]) == data


@pytest.mark.requirement("REC-10")
def test_eight_associations_with_one_study_give_one_row_each(receiver: Receiver) -> None:
    settings = receiver.settings
    database = Database(settings.database_url)
    database.create_all()
    indexer = Indexer(receiver.spool, database, settings)
    stop = threading.Event()
    indexing = threading.Thread(target=indexer.run, args=(stop,))
    indexing.start()
    failures: list[BaseException] = []

    def send(part: int) -> None:
        try:
            with ScriptedPeer(receiver.port) as peer:
                peer.associate(calling_ae="CT1" if part % 2 else "CT2")
                for number in range(10):
                    sop = f"1.2.3.{part}.{number}"
                    data = data_set(sop, id="P1", name="Doe^Jane")
                    assert peer.store(data, sop_instance=sop.encode()).status == 0
                peer.release()
        except (AssertionError, OSError, Aborted, Rejected) as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wait_for(lambda: receiver.admission.open_associations == 0)
    wait_for(lambda: not receiver.spool.incoming(), 30)
    stop.set()
    indexing.join(10)
    assert failures == []
    with database.reading() as session:
        assert session.query(Study).count() == 1
        assert session.query(Series).count() == 1
        assert session.query(Instance).filter_by(state="current").count() == 80
        assert sorted((a.instances, a.ended) for a in session.query(Association)) == [(10, "released")] * 8
    database.close()


# -- real senders and real data ------------------------------------------------------------------------------------


@pytest.mark.peer("dcmtk", "shared-data")
@pytest.mark.requirement("REC-06", open="HTJ2K from a real sender")
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("-xi", "CTImage.dcm_LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2.dcm"),
        ("-xe", "CTImage.dcm_LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1.dcm"),
        ("-xb", "CTImage.dcm_BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2.dcm"),
        ("-xd", "CTImage.dcm_DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99.dcm"),
        ("-xr", "CTImage.dcm_RLELosslessTransferSyntax_1.2.840.10008.1.2.5.dcm"),
        ("-xy", "CTImage.dcm_JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50.dcm"),
        ("-xx", "CTImage.dcm_JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm"),
        ("-xs", "CTImage.dcm_JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70.dcm"),
        ("-xt", "CTImage.dcm_JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80.dcm"),
        ("-xu", "CTImage.dcm_JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81.dcm"),
        ("-xv", "CTImage.dcm_JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90.dcm"),
        ("-xw", "CTImage.dcm_JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91.dcm"),
    ],
)
def test_storescu_object_is_stored_and_readable(receiver: Receiver, shared_data: Path, option: str, name: str) -> None:
    source = shared_data / "dicom" / "transfer-syntaxes" / name
    command = [peers.program("storescu"), "-aet", "CT1", "-aec", "SEGGATE", option, "127.0.0.1", str(receiver.port)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = stored(receiver)
    sent, kept = pydicom.dcmread(source), pydicom.dcmread(path)
    assert kept.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID
    assert kept.PixelData == sent.PixelData
    assert read_header(path).sop_instance_uid == sent.SOPInstanceUID


@pytest.mark.peer("dcmtk")
def test_echoscu_is_answered_and_a_stranger_is_told_why(receiver: Receiver) -> None:
    command = [peers.program("echoscu"), "-aec", "SEGGATE", "127.0.0.1", str(receiver.port)]
    assert subprocess.run([*command, "-aet", "CT1"], capture_output=True, timeout=30, check=False).returncode == 0
    refused = subprocess.run([*command, "-aet", "X"], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode != 0
    assert "Calling AE Title Not Recognized" in refused.stderr


@pytest.mark.peer("shared-data")
@pytest.mark.requirement("REC-14", open="a fuzz corpus that runs for hours")
def test_known_bad_files_end_in_quarantine_with_their_attribute(receiver: Receiver, shared_data: Path) -> None:
    pydicom_files = shared_data / "dicom" / "pydicom" / "test_files"
    blank = sorted((shared_data / "dicom" / "ct-organs" / "series-with-blank-uids").iterdir())[0]
    cases = [
        (pydicom_files / "MR_truncated.dcm", "PixelData (7FE0,0010)"),
        (pydicom_files / "badVR.dcm", "NumberOfFrames (0028,0008)"),
        (pydicom_files / "rtplan_truncated.dcm", "BeamSequence (300A,00B0)"),
        (blank, "SOPClassUID (0008,0016)"),
    ]
    with ScriptedPeer(receiver.port) as peer:
        for number, (path, _) in enumerate(cases):
            meta = pydicom.dcmread(path, stop_before_pixels=True)
            sop_class = str(meta.file_meta.MediaStorageSOPClassUID or CT_IMAGE)
            sop_instance = str(meta.get("SOPInstanceUID") or f"1.2.3.{number}")
            syntax = str(meta.file_meta.TransferSyntaxUID)
            with ScriptedPeer(receiver.port) as sender:
                sender.associate(contexts={1: (sop_class, [syntax])})
                with path.open("rb") as file:
                    from storage.part10 import read_meta_elements

                    _, offset = read_meta_elements(file)
                answer = sender.store(
                    path.read_bytes()[offset:], sop_instance=sop_instance.encode(), sop_class=sop_class.encode()
                )
                assert answer.status == 0
                sender.release()
        peer.associate()
        assert peer.store(data_set("1.2.9.9"), sop_instance=b"1.2.9.9").status == 0
        peer.release()
    settings = receiver.settings
    database = Database(settings.database_url)
    database.create_all()
    Indexer(receiver.spool, database, settings).run_once()
    with database.reading() as session:
        rows = session.query(Instance).order_by(Instance.object_id).all()
    assert [row.state for row in rows] == ["quarantined"] * len(cases) + ["current"]
    for row, (_, attribute) in zip(rows, cases, strict=False):
        assert str(row.state_reason).startswith(attribute)
        assert receiver.spool.resolve(row.spool_path).is_file()
    database.close()


# -- the process ---------------------------------------------------------------------------------------------------


def test_receiver_process_is_light(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = textwrap.dedent(
        """
        import json, sys, threading, time
        begin = time.process_time()
        from pathlib import Path
        from gateway.intake.scp import run_receiver
        from gateway.settings import load_settings
        stop = threading.Event()
        def ready(port):
            print(json.dumps({
                "cpu_s": round(time.process_time() - begin, 3),
                "rss_mb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024,
                "heavy": sorted({"engine", "torch", "onnxruntime", "sqlalchemy", "dbos", "mlflow", "scipy",
                                 "SimpleITK", "highdicom", "fhir", "emr"} & set(sys.modules)),
            }))
            stop.set()
        run_receiver(load_settings(Path(sys.argv[1])), ready=ready, stop=stop)
        """
    )
    config = tmp_path / "config"
    config.mkdir()
    (config / "gateway.toml").write_text('[receiver]\nport = 0\nhost = "127.0.0.1"\nreserve_mb = 0\n')
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=peers.ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\nreceiver start: {found}, process from start to end {time.monotonic() - begin:.2f} s")
    assert found["heavy"] == []
    assert found["rss_mb"] < 100


def test_depth_limit_is_above_what_real_reports_have() -> None:
    assert MAX_DEPTH >= 32
    assert element(0x00080018, "UI", "1.2")  # the support module builds what the parser reads
