"""Step `encode`: under whom a result is filed when the first slice does not say; what finds no room waits."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from sqlalchemy import select

from gateway.results.content import EncodedObject
from gateway.results.encoding import Encoding, _Source
from gateway.results.segmentation import LABEL_MAP_STORAGE
from gateway.results.source_header import identified
from storage.alarms import open_alarms
from storage.database import Database
from storage.errors import SpoolFull
from storage.records import DeliveryState, Result, ResultObject, ResultState, StudyState
from storage.spool import Spool
from tests.support.phantoms import write_series
from tests.support.result_contents import content_of, part_of
from tests.support.story_rows import add_delivery, add_result, add_study, add_version, kept_ladder


def _header(**values: str) -> Dataset:
    header = Dataset()
    for keyword, value in values.items():
        setattr(header, keyword, value)
    return header


@pytest.mark.requirement("OUT-39", open="rendering in OHIF")
def test_an_empty_identity_of_the_first_slice_is_filled_from_a_later_one() -> None:
    headers = [_header(PatientID="", StudyID="7"), _header(PatientName="Ärztin^Änne"), _header(PatientID="P1")]
    header = identified(headers)
    assert (header.PatientID, str(header.PatientName), header.StudyID) == ("P1", "Ärztin^Änne", "7")


def test_what_the_first_slice_says_stays() -> None:
    assert identified([_header(PatientID="P1"), _header(PatientID="P2")]).PatientID == "P1"


def test_what_no_slice_says_stays_absent() -> None:
    assert "PatientID" not in identified([_header(), _header()])


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
        chunks=lambda: (b"object",),
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


_SEG_CLASS = {"BINARY": "1.2.840.10008.5.1.4.1.1.66.4", "LABELMAP": LABEL_MAP_STORAGE}


class Desk:
    """Encoding over real rows, with a phantom as source; `encodings` is what the one PACS wants."""

    def __init__(self, folder: Path, *encodings: str) -> None:
        self.database = Database(f"sqlite:///{folder / 'test.sqlite'}")
        self.database.create_all()
        spool = Spool(folder / "spool", reserve_bytes=0)
        spool.prepare()
        series = write_series(folder / "source", shape=(4, 12, 12))
        part = part_of(series.files)
        content = content_of(part, series.labels)
        with self.database.session() as session:
            add_study(session, StudyState.PROCESSING)
            add_version(session)
            self.result = add_result(session, ResultState.PENDING, verdict="pass")
        source = _Source(result=self.result, study_key="a" * 32, content=content, part=part)

        class OfPhantom(Encoding):
            def _source(self, result_id: str, *, pixels: bool = False) -> _Source:
                return source

        pacs = SimpleNamespace(encodings=encodings)
        self.encoding = OfPhantom(
            database=self.database,
            spool=spool,
            shelf=cast(Any, None),
            settings=cast(Any, SimpleNamespace(destinations=SimpleNamespace(pacs=[pacs]))),
            software_version="0",
        )

    def replaces(self, *made: str, taken: Sequence[str] = ()) -> None:
        """An older result with objects "ROLE ENCODING", whose UIDs are 2.25.1, 2.25.2 ..; `taken` by a PACS."""
        with self.database.session() as session:
            add_result(session, ResultState.SUPERSEDED, result_id="old")
            session.get_one(Result, "r1").supersedes = self.result.supersedes = "old"
            for number, (role, encoding) in enumerate((name.split() for name in made), start=1):
                session.add(
                    ResultObject(
                        sop_instance_uid=f"2.25.{number}",
                        result_id="old",
                        role=role,
                        encoding=encoding,
                        sop_class_uid=_SEG_CLASS.get(encoding, "1.2"),
                        series_instance_uid=f"2.25.{number}.1",
                        transfer_syntax_uid="1.2.840.10008.1.2.1",
                        spool_path=f"{number}.dcm",
                        digest="0" * 64,
                        size_bytes=1,
                    )
                )
            add_delivery(session, DeliveryState.VERIFIED, result_id="old", objects=[kept_ladder("SC", *taken)])

    def named(self, encoding: str) -> tuple[str, str]:
        """SOP Instance UIDs of the older image and the older report that the new ones name."""
        image, report = (dcmread(o.path) for o in self.encoding.outgoing("r1", encoding))
        (of_image,) = image.ReferencedImageSequence
        (study,) = report.PredecessorDocumentsSequence
        (of_report,) = study.ReferencedSeriesSequence[0].ReferencedSOPSequence
        assert of_image.ReferencedSOPInstanceUID in image.DerivationDescription
        return of_image.ReferencedSOPInstanceUID, of_report.ReferencedSOPInstanceUID


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, "LABELMAP", "BINARY")
    yield desk
    desk.database.close()


@pytest.mark.requirement("CMP-17")
@pytest.mark.parametrize(("encoding", "named"), [("LABELMAP", ("2.25.3", "2.25.4")), ("BINARY", ("2.25.1", "2.25.2"))])
def test_a_result_names_the_object_of_its_own_encoding_that_it_replaces(
    desk: Desk, encoding: str, named: tuple[str, str]
) -> None:
    desk.replaces("SEG BINARY", "SR SR", "SEG LABELMAP", "SR SR-LABELMAP", taken=("2.25.3", "2.25.4"))
    desk.encoding.encode("r1")
    assert desk.named(encoding) == named


@pytest.mark.requirement("CMP-17")
def test_what_was_never_made_in_this_encoding_is_named_as_a_pacs_has_it(desk: Desk) -> None:
    desk.replaces("SEG BINARY", "SR SR", "SC SC", taken=("2.25.3", "2.25.2"))
    desk.encoding.encode("r1")
    assert desk.named("LABELMAP") == ("2.25.3", "2.25.2")


@pytest.mark.requirement("ART-23")
def test_of_a_result_that_was_withdrawn_no_object_is_made(desk: Desk) -> None:
    with desk.database.session() as session:
        session.get_one(Result, "r1").state = ResultState.SUPERSEDED
    assert desk.encoding.encode("r1") == "superseded"
    with desk.database.reading() as session:
        assert session.scalars(select(ResultObject)).all() == []


@pytest.mark.requirement("OUT-44", "QUE-27")
def test_a_picture_keeps_the_report_it_left_with_whatever_is_made_later(desk: Desk) -> None:
    desk.encoding.encode("r1")
    first = [o.sop_instance_uid for o in desk.encoding.outgoing("r1", "SC")]
    _, report = desk.encoding.outgoing("r1", "LABELMAP")
    assert first[1] == report.sop_instance_uid
    desk.encoding.outgoing("r1", "BINARY")  # another PACS takes no label maps
    assert [o.sop_instance_uid for o in desk.encoding.outgoing("r1", "SC")] == first
