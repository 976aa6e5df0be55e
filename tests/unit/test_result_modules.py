"""What all result objects say about themselves: dates and times in one zone (PS3.3 C.12.1.1.8)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from gateway.results.content import EncodedObject, ResultContent
from gateway.results.secondary_capture import encode_secondary_capture
from gateway.results.segmentation import encode_segmentation
from gateway.results.structured_report import encode_notice, encode_structured_report
from tests.support.phantoms import write_series
from tests.support.result_contents import CREATED_AT, content_of, later, part_of
from tests.support.result_readers import iod_errors


@pytest.fixture
def host_in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def content(folder: Path, offset: str | None) -> ResultContent:
    series = write_series(folder / "source", shape=(4, 12, 12))
    made = content_of(part_of(series.files), series.labels)
    source = Dataset()
    source.update(made.header)
    if offset is not None:
        source.TimezoneOffsetFromUTC = offset
    return later(made, header=source)


def encoded(content: ResultContent) -> list[EncodedObject]:
    return [
        encode_segmentation(content),
        encode_segmentation(content, encoding="LABELMAP"),
        encode_structured_report(content),
        encode_notice(content),
        encode_secondary_capture(content, np.zeros(content.labels.shape)),
    ]


DATES = ("SeriesDate", "ContentDate", "InstanceCreationDate")
TIMES = ("SeriesTime", "ContentTime", "InstanceCreationTime")
# Made at 05:06:07 UTC.
CASES = [
    (None, "20260304", "140607", "+0900"),
    ("-0530", "20260303", "233607", "-0530"),
    ("+0000", "20260304", "050607", "+0000"),
]


@pytest.mark.requirement("OUT-39")
@pytest.mark.usefixtures("host_in_tokyo")
@pytest.mark.parametrize(("offset", "date", "at", "zone"), CASES)
def test_dates_are_in_the_zone_of_the_source_or_else_of_the_host(
    tmp_path: Path, offset: str | None, date: str, at: str, zone: str
) -> None:
    assert CREATED_AT.isoformat() == "2026-03-04T05:06:07+00:00"
    for made in encoded(content(tmp_path, offset)):
        dataset = dcmread(BytesIO(made.data))
        assert {dataset[k].value for k in DATES if k in dataset} == {date}, made.role
        assert {dataset[k].value for k in TIMES if k in dataset} == {at}, made.role
        assert dataset.get("TimezoneOffsetFromUTC") == offset
        assert (dataset.StudyDate, dataset.StudyTime) == ("20240105", "101500")
        ours = dataset.ContributingEquipmentSequence[-1]
        assert ours.ContributionDateTime == f"{date}{at}{zone}"


@pytest.mark.peer("dciodvfy")
def test_objects_with_an_offset_are_legal(tmp_path: Path) -> None:
    for number, made in enumerate(encoded(content(tmp_path, "+0100"))):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(made.data)
        if made.encoding != "LABELMAP":
            assert iod_errors(path) == []
