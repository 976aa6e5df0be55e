"""Answers of a peer reach the one who asked, also when the association's own thread looks at the wrong moment."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification

from gateway.demo.archive import Archive
from gateway.service_user import keep_answers


class UnluckilyTimed(queue.Queue):  # type: ignore[type-arg]
    """The caller looks for its answer a little after the answer came: whoever polls meanwhile gets it."""

    def __init__(self) -> None:
        super().__init__()
        self._came = threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._came.set()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if block:
            self._came.wait(5)
            threading.Event().wait(0.05)
            timeout = 0.5
        return super().get(block, timeout)


class NeverPaused(threading.Event):
    """The pause that comes too late, made certain: the thread says that it is pausing, and goes on."""

    def clear(self) -> None:
        return

    def wait(self, timeout: float | None = None) -> bool:
        threading.Event().wait(0.012)
        return True


@pytest.fixture
def association(tmp_path: Path) -> Iterator[Association]:
    """An association whose own thread looks for messages at every moment."""
    archive = Archive(tmp_path / "archive", ae_title="PACS")
    archive.start()
    entity = AE(ae_title="ASKER")
    entity.add_requested_context(Verification)
    opened = entity.associate("127.0.0.1", archive.port, ae_title="PACS")
    assert opened.is_established
    opened.dimse.msg_queue = UnluckilyTimed()
    opened._reactor_checkpoint = NeverPaused()
    opened._reactor_checkpoint.set()
    yield opened
    opened.abort()
    archive.stop()


def test_an_answer_reaches_the_one_who_asked(association: Association) -> None:
    keep_answers(association)
    assert association.send_c_echo().Status == 0x0000


def test_without_it_the_associations_own_thread_throws_the_answer_away(association: Association) -> None:
    """Why `keep_answers` exists; when this fails, pynetdicom has closed the race and it can go."""
    assert association.send_c_echo().get("Status") is None
