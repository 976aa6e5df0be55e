"""engine.anatomy: names of labels, their codes and sides."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes

from engine import anatomy


def _known_codes() -> dict[str, set[str]]:
    """Code value to the meanings that pydicom's dictionary has for it, in small letters."""
    known: dict[str, set[str]] = {}
    for keyword in codes.SCT.dir():
        # A keyword may stand for several codes; getattr then refuses, and none of these is in the table.
        try:
            code = getattr(codes.SCT, keyword)
        except RuntimeError:
            continue
        known.setdefault(code.value, set()).add(code.meaning.casefold())
    return known


def test_every_code_is_in_the_dicom_dictionary_with_its_meaning() -> None:
    known = _known_codes()
    entries = [(value, meaning) for value, meaning, _ in anatomy.ANATOMY.values()]
    for code in (anatomy.ANATOMICAL_STRUCTURE, anatomy.MORPHOLOGICALLY_ABNORMAL):
        entries.append((code.value, code.meaning))
    for value, meaning in entries:
        assert value in known, (value, meaning)
        plain = {text.split(" (")[0].removeprefix("structure of ") for text in known[value]}
        assert meaning.casefold() in plain | known[value], (value, meaning, known[value])


def test_colours_are_srgb_and_meanings_fit_dicom() -> None:
    for name, (value, meaning, colour) in anatomy.ANATOMY.items():
        assert all(0 <= part <= 255 for part in colour), name
        assert len(meaning) <= 64
        assert len(value) <= 16


@pytest.mark.parametrize(
    ("name", "value", "side"),
    [
        ("liver", "10200004", None),
        ("Liver", "10200004", None),
        ("kidney_right", "64033007", "right"),
        ("Left Kidney", "64033007", "left"),
        ("kidneys", "64033007", None),
        ("kidney_l", "64033007", "left"),
        ("lung_upper_lobe_left", "45653009", "left"),
        ("heart_atrium_left", "82471001", None),
        ("right ventricle", "53085002", None),
        ("rib_left_7", "113197003", "left"),
        ("vertebrae_L5", "49668003", None),
        ("urinary_bladder", "89837001", None),
        ("iliac_vena_right", "46027005", "right"),
        ("clavicula_left", "51299004", "left"),
        ("PZ", "279706003", None),
        ("liver_tumor", "108369006", None),
        ("left-lung-lesion", "52988006", "left"),
        ("LeftKidney", "64033007", "left"),
        ("BrainStem", "119238007", None),
        ("LeftAtrium", "82471001", None),
        ("kidney_lt", "64033007", "left"),
        ("RT_Lung", "39607008", "right"),
        ("lhippocampus", "5366008", "left"),
        ("lung", "39607008", None),
    ],
)
def test_names_give_code_and_side(name: str, value: str, side: str | None) -> None:
    found = anatomy.describe(name, index=0)
    assert (found.type.value, found.laterality, found.known) == (value, side, True)


def test_lesions_are_abnormal_structures() -> None:
    assert anatomy.describe("kidney_cyst_left", index=0).category == anatomy.MORPHOLOGICALLY_ABNORMAL
    assert anatomy.describe("liver", index=0).category == anatomy.ANATOMICAL_STRUCTURE


def test_unknown_name_gets_the_generic_code_its_side_and_its_own_colour() -> None:
    first, second = (anatomy.describe("flurb_left", index=index) for index in (0, 1))
    assert first.type == anatomy.ANATOMICAL_STRUCTURE
    assert not first.known
    assert first.laterality == "left"
    assert first.colour != second.colour


def test_anterior_is_a_part_of_the_hippocampus_only_in_such_a_dataset() -> None:
    assert anatomy.describe("Anterior", index=0, dataset_name="Dataset004_Hippocampus").type.value == "5366008"
    assert not anatomy.describe("Anterior", index=0, dataset_name="Dataset005_Prostate").known


def test_pairs_need_both_sides_and_the_same_rest() -> None:
    names = ["kidney_left", "kidney_right", "Left Lung", "lung right", "femur_left", "heart_atrium_left", "left_right"]
    found = anatomy.pairs(names)
    assert found["kidney_left"] == "kidney_right"
    assert found["kidney_right"] == "kidney_left"
    assert found["Left Lung"] == "lung right"
    assert "femur_left" not in found
    assert "left_right" not in found


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("LeftKidney", "RightKidney"),
        ("kidneyLeft", "kidneyRight"),
        ("kidneyL", "kidneyR"),
        ("LKidney", "RKidney"),
        ("kidney_lt", "kidney_rt"),
        ("Lt Kidney", "Rt Kidney"),
        ("lhippocampus", "rhippocampus"),
        ("leftkidney", "rightkidney"),
        ("l_kidney", "r_kidney"),
        ("kidney-L", "kidney-R"),
        ("lh_cortex", "rh_cortex"),
        ("lung_l_upper", "lung_r_upper"),
    ],
)
def test_sides_are_found_in_however_they_are_written(left: str, right: str) -> None:
    names = [left, "liver", right, "lung", "spleen"]
    assert anatomy.pairs(names) == {left: right, right: left}
    assert anatomy.unpaired(names) == []


@pytest.mark.parametrize(
    "names",
    [
        ["liver", "lung", "rib", "lt", "rt"],
        ["vertebrae_L5", "vertebrae_L4", "vertebrae_T5"],
        ["left_right", "l_r"],
        ["cleft", "bright", "leftover", "copyright", "upright position", "lung_rib", "RT_PTV", "RT plan"],
        [],
    ],
)
def test_names_without_a_side_are_neither_paired_nor_called_unpaired(names: list[str]) -> None:
    assert anatomy.pairs(names) == {}
    assert anatomy.unpaired(names) == []


def test_a_side_without_its_other_is_named() -> None:
    names = ["kidney_left", "kidney_right", "left_atrium", "leftkidney", "Lung R", "liver"]
    assert anatomy.unpaired(names) == ["left_atrium", "leftkidney", "Lung R"]


@pytest.mark.parametrize("name", ["kidney_lt", "LtKidney", "Rt_Lung", "lhippocampus", "ctx_lh", "kidneyl", "Kidney-R"])
def test_a_side_that_is_known_in_a_pair_is_known_alone(name: str) -> None:
    assert anatomy.unpaired([name, "liver"]) == [name]
