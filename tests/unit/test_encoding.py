"""Step `encode`: under whom a result is filed when the first slice does not say; what finds no room waits."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydicom.dataset import Dataset

from gateway.results.content import EncodedObject
from gateway.results.encoding import Encoding, _identified
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import SpoolFull
from storage.records import ResultObject, ResultState, StudyState
from storage.spool import Spool
from tests.support.story_rows import add_result, add_study, add_version


def _header(**values: str) -> Dataset:
    header = Dataset()
    for keyword, value in values.items():
        setattr(header, keyword, value)
    return header


@pytest.mark.requirement("OUT-39", open="rendering in OHIF")
def test_an_empty_identity_of_the_first_slice_is_filled_from_a_later_one() -> None:
    headers = [_header(PatientID="", StudyID="7"), _header(PatientName="Ärztin^Änne"), _header(PatientID="P1")]
    header = _identified(headers)
    assert (header.PatientID, str(header.PatientName), header.StudyID) == ("P1", "Ärztin^Änne", "7")


def test_what_the_first_slice_says_stays() -> None:
    assert _identified([_header(PatientID="P1"), _header(PatientID="P2")]).PatientID == "P1"


def test_what_no_slice_says_stays_absent() -> None:
    assert "PatientID" not in _identified([_header(), _header()])


@pytest.mark.requirement("QUE-27")
def test_an_object_that_finds_no_room_on_the_disk_is_alarmed_until_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    database.create_all()
    spool = Spool(tmp_path / "spool", reserve_bytes=0)
    spool.prepare()
    with database.session() as session:
        add_study(session, StudyState.PROCESSING)
        add_version(session)
        result = add_result(session, ResultState.PENDING)
    unused = cast(Any, None)
    encoding = Encoding(database=database, spool=spool, shelf=unused, settings=unused, software_version="0")
    source = cast(Any, SimpleNamespace(result=result, study_key="a" * 32))
    made = EncodedObject(
        role="SEG",
        encoding="BINARY",
        data=b"object",
        sop_instance_uid="1.2.3.9",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4",
        series_instance_uid="1.2.3.8",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        repairs=(),
    )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(SpoolFull):
            encoding._keep(source, [made])
    with database.reading() as session:
        assert [a.kind for a in open_alarms(session)] == ["spool-full"]
        assert session.get(ResultObject, "1.2.3.9") is None
    encoding._keep(source, [made])
    with database.reading() as session:
        assert list(open_alarms(session)) == []
        assert session.get(ResultObject, "1.2.3.9") is not None
    database.close()
