"""gateway.training_data.label_names: which structure becomes which label and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.errors import Rejected
from gateway.training_data.label_names import table_of_file, table_of_names, table_of_words


def test_without_a_choice_all_names_are_labels_sorted() -> None:
    table = table_of_names(["Vertebra 10", "liver", "Vertebra 9", "Liver", "BACKGROUND", "Ignore", "a*b"])
    assert table.document == {
        "background": 0, "a*b": 1, "Liver": 2, "Vertebra 9": 3, "Vertebra 10": 4, "ignore": 5,
    }  # fmt: skip
    assert table.value("  LIVER ") == 2
    assert table.value("vertebra  10") == 4
    assert table.value("a*b") == 1
    assert table.value("aXb") is None
    assert table.value("background") is None


def test_values_of_label_maps_are_sorted_as_numbers() -> None:
    assert list(table_of_names(["10", "2", "1"]).document) == ["background", "1", "2", "10"]


def test_labels_take_what_their_patterns_say_in_the_order_given() -> None:
    table = table_of_words(["tumour=GTV*|Tumor ?", "liver", "lung = Lunge L|Lunge R"])
    assert table.document == {"background": 0, "tumour": 1, "liver": 2, "lung": 3}
    assert [table.value(n) for n in ("gtv_1", "tumor 2", "tumor 12", "LIVER", "lunge r", "heart")] == [
        1, 1, None, 2, 3, None,
    ]  # fmt: skip


def test_only_a_pattern_with_a_wildcard_gathers_structures_of_one_name() -> None:
    table = table_of_words(["liver", "tumour=GTV|GTV ?|Tumor*"])
    names = ("Liver", "gtv", "GTV 1", "tumor")
    assert [any(label.gathers(name) for label in table.labels) for name in names] == [False, False, True, True]
    assert not table_of_names(["a*b"]).labels[0].gathers("a*b")


def test_brackets_are_no_wildcards() -> None:
    assert table_of_words(["a=x[1]"]).value("x[1]") == 1
    assert table_of_words(["a=x[1]"]).value("x1") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["liver", "liver"], "twice"),
        (["Background"], "value 0"),
        (["ignore", "liver"], "list it last"),
        (["=x"], "NAME"),
        (["liver="], "NAME"),
    ],
)
def test_labels_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(Rejected, match=message):
        table_of_words(words)


def test_a_structure_that_two_labels_take_is_refused() -> None:
    with pytest.raises(Rejected, match="'GTV_1' belongs to the labels 'a' and 'b'"):
        table_of_words(["a=GTV*", "b=*_1"]).value("GTV_1")


def _file(tmp_path: Path, labels: object) -> Path:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"labels": labels}))
    return path


def test_a_file_gives_values_and_names(tmp_path: Path) -> None:
    table = table_of_file(_file(tmp_path, {"tumour": {"value": 2, "names": ["GTV*"]}, "liver": {"value": 1}}))
    assert table.document == {"background": 0, "liver": 1, "tumour": 2}
    assert table.value("gtv 3") == 2
    assert table_of_file(_file(tmp_path, {"b": {}, "a": {}})).document == {"background": 0, "b": 1, "a": 2}


@pytest.mark.parametrize(
    "labels",
    [
        {"a": {"value": 2}},
        {"a": {"value": 1}, "b": {"value": 1}},
        {"a": {"values": 1}},
        {"a": 1},
        {"a": {"names": "x"}},
        {},
        [],
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, labels: object) -> None:
    with pytest.raises(Rejected):
        table_of_file(_file(tmp_path, labels))
