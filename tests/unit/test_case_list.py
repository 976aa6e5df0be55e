"""gateway.training_data.case_list: CSV and JSON say the same; what cannot be used is named by its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import Rejected
from gateway.training_data.case_list import ListedCase, read_case_list

CSV = "case,series,label,patient\nliver_01,1.2.3|1.2.4,a/seg.dcm,p1\n,series/7, b.nii.gz | c.dcm ,\n"
CASES = [
    {"case": "liver_01", "series": ["1.2.3", "1.2.4"], "label": ["a/seg.dcm"], "patient": "p1"},
    {"series": "series/7", "label": ["b.nii.gz", "c.dcm"]},
]


def _plain(cases: tuple[ListedCase, ...]) -> list[ListedCase]:
    return [replace(case, where="") for case in cases]


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(json.dumps({"cases": CASES}))
    cases = _plain(read_case_list(tmp_path / "a.csv"))
    assert cases == _plain(read_case_list(tmp_path / "a.json"))
    assert cases == [
        ListedCase(where="", case="liver_01", patient="p1", series=("1.2.3", "1.2.4"), labels=("a/seg.dcm",)),
        ListedCase(where="", case=None, patient=None, series=("series/7",), labels=("b.nii.gz", "c.dcm")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("series,label,side\n1,2,3\n", "line 2: column 'side' is unknown"),
        ("series\n1\n", "line 2: the columns series and label are needed"),
        ("series,label\n1,\n", "line 2: label is empty"),
        ("case,series,label\n../x,1,2\n", "line 2: case: letters, digits"),
        ("case,series,label\na,1,2\nA,3,4\n", "line 3: its case is in a.csv, line 2 already"),
        ("series,label\n1,2,3\n", "line 2: column 'None'"),
        ("series,label\n", "lists no case"),
        ("", "lists no case"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(Rejected, match=message):
        read_case_list(tmp_path / "a.csv")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"series,label\n\xe4,b\n"])
def test_what_is_no_utf_8_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(Rejected, match="not readable as CSV"):
        read_case_list(tmp_path / "a.csv")


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="cannot be read"):
        read_case_list(tmp_path / "a.csv")
