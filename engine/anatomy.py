"""Names of anatomy as models use them, with SNOMED CT codes and recommended display colours.

Codes and their meanings are those of the DICOM content mapping resource (PS3.16); a test compares them with pydicom's
dictionary. Colours follow what anatomical viewers commonly use, sRGB 0 to 255. A side is no part of a name here, but
where the two sides are different organs (the chambers of the heart).
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine.manifest import Code, Laterality

ANATOMICAL_STRUCTURE = Code(scheme="SCT", value="91723000", meaning="Anatomical Structure")
MORPHOLOGICALLY_ABNORMAL = Code(scheme="SCT", value="49755003", meaning="Morphologically Abnormal Structure")

Colour = tuple[int, int, int]

ANATOMY: Mapping[str, tuple[str, str, Colour]] = MappingProxyType(
    {
        "adrenal_gland": ("23451007", "Adrenal gland", (249, 186, 150)),
        "amygdala": ("4958002", "Amygdala", (130, 90, 160)),
        "aorta": ("15825003", "Aorta", (224, 97, 76)),
        "brachiocephalic_trunk": ("12691009", "Brachiocephalic trunk", (196, 121, 79)),
        "brachiocephalic_vein": ("8887007", "Brachiocephalic vein", (0, 161, 196)),
        "brain": ("12738006", "Brain", (250, 250, 225)),
        "brainstem": ("119238007", "Brain Stem", (90, 120, 150)),
        "breast": ("76752008", "Breast", (255, 244, 209)),
        "caudate": ("11000004", "Caudate nucleus", (122, 101, 38)),
        "cerebellum": ("113305005", "Cerebellum", (194, 195, 164)),
        "clavicle": ("51299004", "Clavicle", (255, 238, 170)),
        "colon": ("71854001", "Colon", (204, 168, 143)),
        "common_carotid_artery": ("32062004", "Common carotid artery", (0, 112, 165)),
        "costal_cartilages": ("50016007", "Costal Cartilage", (111, 184, 210)),
        "cyst": ("367643001", "Cyst", (205, 205, 100)),
        "duodenum": ("38848004", "Duodenum", (255, 253, 229)),
        "edema": ("79654002", "Edema", (140, 224, 228)),
        "esophagus": ("32849002", "Esophagus", (211, 171, 143)),
        "eye": ("81745001", "Eye", (194, 142, 0)),
        "femur": ("71341001", "Femur", (255, 238, 170)),
        "gallbladder": ("28231008", "Gallbladder", (139, 150, 98)),
        "heart": ("80891009", "Heart", (206, 110, 84)),
        "heart_atrium_left": ("82471001", "Left atrium", (203, 108, 81)),
        "heart_atrium_right": ("73829009", "Right atrium", (210, 115, 89)),
        "heart_myocardium": ("49848007", "Left ventricle myocardium", (192, 104, 88)),
        "heart_ventricle_left": ("87878005", "Left ventricle", (152, 55, 13)),
        "heart_ventricle_right": ("53085002", "Right ventricle", (181, 85, 57)),
        "hepatic_vein": ("8993003", "Hepatic vein", (0, 112, 165)),
        "hip": ("29836001", "Hip", (212, 188, 102)),
        "hippocampus": ("5366008", "Hippocampus", (88, 106, 215)),
        "humerus": ("85050009", "Humerus", (205, 205, 100)),
        "iliac_artery": ("73634005", "Common iliac artery", (216, 101, 79)),
        "iliac_vena": ("46027005", "Common iliac vein", (0, 134, 192)),
        "inferior_vena_cava": ("64131007", "Inferior vena cava", (0, 151, 206)),
        "kidney": ("64033007", "Kidney", (185, 102, 83)),
        "lesion": ("52988006", "Lesion", (220, 120, 90)),
        "liver": ("10200004", "Liver", (221, 130, 101)),
        "lung": ("39607008", "Lung", (197, 165, 145)),
        "lung_lower_lobe": ("90572001", "Lower lobe of lung", (224, 186, 162)),
        "lung_middle_lobe": ("40020002", "Middle lobe of lung", (202, 164, 140)),
        "lung_upper_lobe": ("45653009", "Upper lobe of lung", (172, 138, 115)),
        "lymph_node": ("59441001", "Lymph Node", (68, 172, 100)),
        "mandible": ("91609006", "Mandible", (222, 198, 101)),
        "necrosis": ("6574001", "Necrosis", (216, 191, 216)),
        "optic_nerve": ("18234004", "Optic nerve", (250, 230, 66)),
        "ovary": ("15497006", "Ovary", (213, 141, 113)),
        "pancreas": ("15776009", "Pancreas", (249, 180, 111)),
        "parotid_gland": ("45289007", "Parotid gland", (219, 244, 20)),
        "peripheral_zone": ("279706003", "Peripheral zone of the prostate", (180, 190, 90)),
        "pleural_effusion": ("60046008", "Pleural effusion", (110, 150, 210)),
        "portal_vein": ("32764006", "Portal vein", (0, 151, 206)),
        "prostate": ("41216001", "Prostate", (230, 158, 140)),
        "pulmonary_artery": ("81040000", "Pulmonary artery", (0, 122, 171)),
        "pulmonary_vein": ("122972007", "Pulmonary vein", (186, 77, 64)),
        "putamen": ("89278009", "Putamen", (110, 184, 209)),
        "rib": ("113197003", "Rib", (253, 232, 158)),
        "sacrum": ("54735007", "Sacrum", (212, 188, 102)),
        "scapula": ("79601000", "Scapula", (212, 208, 122)),
        "skull": ("89546000", "Skull", (241, 213, 144)),
        "small_bowel": ("30315005", "Small intestine", (205, 167, 142)),
        "spinal_cord": ("2748008", "Spinal cord", (244, 214, 49)),
        "spleen": ("78961009", "Spleen", (157, 108, 162)),
        "sternum": ("56873002", "Sternum", (244, 217, 154)),
        "stomach": ("69695003", "Stomach", (216, 132, 105)),
        "subclavian_artery": ("36765005", "Subclavian artery", (216, 101, 79)),
        "submandibular_gland": ("54019009", "Submandibular gland", (170, 250, 250)),
        "superior_vena_cava": ("48345005", "Superior vena cava", (0, 145, 200)),
        "testis": ("40689003", "Testis", (192, 104, 88)),
        "thalamus": ("42695009", "Thalamus", (123, 93, 120)),
        "thyroid_gland": ("69748006", "Thyroid", (62, 162, 114)),
        "trachea": ("44567001", "Trachea", (182, 228, 255)),
        "transition_zone": ("399384005", "Transition zone of the prostate", (230, 140, 120)),
        "tumor": ("108369006", "Neoplasm", (144, 238, 144)),
        "urinary_bladder": ("89837001", "Bladder", (222, 154, 132)),
        "uterus": ("35039007", "Uterus", (255, 181, 158)),
        "vertebrae": ("51282000", "Vertebra", (226, 202, 134)),
        "vertebrae_c1": ("14806007", "C1 vertebra", (255, 255, 207)),
        "vertebrae_c2": ("39976000", "C2 vertebra", (255, 255, 207)),
        "vertebrae_c3": ("113205007", "C3 vertebra", (255, 255, 207)),
        "vertebrae_c4": ("5329002", "C4 vertebra", (255, 255, 207)),
        "vertebrae_c5": ("36978003", "C5 vertebra", (255, 255, 207)),
        "vertebrae_c6": ("36054005", "C6 vertebra", (255, 255, 207)),
        "vertebrae_c7": ("87391001", "C7 vertebra", (255, 255, 207)),
        "vertebrae_l1": ("66794005", "L1 vertebra", (212, 188, 102)),
        "vertebrae_l2": ("14293000", "L2 vertebra", (212, 188, 102)),
        "vertebrae_l3": ("36470004", "L3 vertebra", (212, 188, 102)),
        "vertebrae_l4": ("11994002", "L4 vertebra", (212, 188, 102)),
        "vertebrae_l5": ("49668003", "L5 vertebra", (212, 188, 102)),
        "vertebrae_t1": ("64864005", "T1 vertebra", (226, 202, 134)),
        "vertebrae_t10": ("7610001", "T10 vertebra", (226, 202, 134)),
        "vertebrae_t11": ("12989004", "T11 vertebra", (226, 202, 134)),
        "vertebrae_t12": ("23215003", "T12 vertebra", (226, 202, 134)),
        "vertebrae_t2": ("53733008", "T2 vertebra", (226, 202, 134)),
        "vertebrae_t3": ("1626008", "T3 vertebra", (226, 202, 134)),
        "vertebrae_t4": ("73071006", "T4 vertebra", (226, 202, 134)),
        "vertebrae_t5": ("56401006", "T5 vertebra", (226, 202, 134)),
        "vertebrae_t6": ("45296009", "T6 vertebra", (226, 202, 134)),
        "vertebrae_t7": ("62487009", "T7 vertebra", (226, 202, 134)),
        "vertebrae_t8": ("11068009", "T8 vertebra", (226, 202, 134)),
        "vertebrae_t9": ("82687006", "T9 vertebra", (226, 202, 134)),
    }
)
"""Name to (SNOMED CT code, meaning, colour)."""

_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "adrenal": "adrenal_gland",
        "bladder": "urinary_bladder",
        "clavicula": "clavicle",
        "costal_cartilage": "costal_cartilages",
        "eyeball": "eye",
        "iliac_vein": "iliac_vena",
        "ivc": "inferior_vena_cava",
        "left_atrium": "heart_atrium_left",
        "left_ventricle": "heart_ventricle_left",
        "oesophagus": "esophagus",
        "parotid": "parotid_gland",
        "postcava": "inferior_vena_cava",
        "pz": "peripheral_zone",
        "right_atrium": "heart_atrium_right",
        "right_ventricle": "heart_ventricle_right",
        "small_intestine": "small_bowel",
        "thyroid": "thyroid_gland",
        "tumour": "tumor",
        "tz": "transition_zone",
        "vertebra": "vertebrae",
    }
)
_ABNORMAL = frozenset({"tumor", "lesion", "cyst", "edema", "necrosis", "pleural_effusion"})
# Parts that have no code of their own in the DICOM dictionary, by a word in the dataset's name: the whole's code and
# a colour for each part.
_PARTS: Mapping[str, Mapping[str, tuple[str, Colour]]] = MappingProxyType(
    {"hippocampus": {"anterior": ("hippocampus", (88, 106, 215)), "posterior": ("hippocampus", (110, 184, 209))}}
)
_SIDES: Mapping[str, Laterality] = MappingProxyType({"left": "left", "right": "right", "l": "left", "r": "right"})
# lh and rh are FreeSurfer's hemispheres.
_SHORT_SIDES: Mapping[str, Laterality] = MappingProxyType(
    {"l": "left", "r": "right", "lt": "left", "rt": "right", "lh": "left", "rh": "right"}
)
# What is left of a word that begins or ends with a side must be long enough to be a word.
_LEAST_WORD = 3
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a label's name says. `known` is False when only the generic code could be given."""

    category: Code
    type: Code
    laterality: Laterality | None
    colour: Colour
    known: bool


def describe(name: str, *, index: int, dataset_name: str = "") -> Anatomy:
    """Code, side and colour for a label's name (English, any case, words apart by blanks, -, _ or a capital letter).

    An unknown name gets the generic type "Anatomical Structure" and the `index`-th colour of an even palette.
    """
    words = _words(name)
    side, rest = split_side(words)
    for word, parts in _PARTS.items():
        if word in dataset_name.casefold() and "_".join(rest) in parts:
            whole, colour = parts["_".join(rest)]
            return _entry(whole, side, colour)
    sided = [(without, other) for other, without in sorted(_readings(words))] if side is None else [(rest, side)]
    for candidate, laterality in ((_plain_words(name), None), (words, None), *sided):
        key = _find(candidate)
        if key is not None:
            return _entry(key, laterality, ANATOMY[key][2])
    abnormal = _find(rest[-1:])
    if abnormal is not None and abnormal in _ABNORMAL:
        return _entry(abnormal, side, ANATOMY[abnormal][2])
    return Anatomy(
        category=ANATOMICAL_STRUCTURE, type=ANATOMICAL_STRUCTURE, laterality=side, colour=_palette(index), known=False
    )


def pairs(names: list[str]) -> dict[str, str]:
    """Label names that differ in nothing but the side, each mapped to the other.

    Beside what `split_side` knows, l, r, lt, rt, lh and rh count anywhere, and a side that is written together with
    another word (lhippocampus), where both sides are there.
    """
    found: dict[str, str] = {}
    for read in (_stated_side, _readings):
        sided: dict[tuple[Laterality, tuple[str, ...]], list[str]] = {}
        for name in names:
            if name not in found:
                for reading in read(_words(name)):
                    sided.setdefault(reading, []).append(name)
        for (side, rest), own in sided.items():
            other = sided.get(("right" if side == "left" else "left", rest), [])
            if len(own) == 1 and len(other) == 1:
                found[own[0]] = other[0]
    return found


def unpaired(names: list[str]) -> list[str]:
    """Names that say left or right, of which no other name is the other side: what `split_side` finds, lh and rh
    anywhere, lt and rt beside a word of anatomy, and a side that is written together with one (lhippocampus,
    leftkidney; not leftover)."""
    paired = pairs(names)
    return [name for name in names if name not in paired and _says_side(_words(name))]


def split_side(words: tuple[str, ...]) -> tuple[Laterality | None, tuple[str, ...]]:
    """The side that the words name and the words without it. `left` and `right` count anywhere, `l` and `r` only as
    the first or last word; two sides in one name are none."""
    found = [
        position
        for position, word in enumerate(words)
        if word in _SIDES and len(words) > 1 and (len(word) > 1 or position in (0, len(words) - 1))
    ]
    if len(found) != 1:
        return None, words
    return _SIDES[words[found[0]]], words[: found[0]] + words[found[0] + 1 :]


def _stated_side(words: tuple[str, ...]) -> set[tuple[Laterality, tuple[str, ...]]]:
    side, rest = split_side(words)
    return set() if side is None else {(side, rest)}


def _readings(words: tuple[str, ...]) -> set[tuple[Laterality, tuple[str, ...]]]:
    """Sides with the other words, as the words may be meant; what `split_side` finds is the only one where it finds
    any. A short form means nothing for itself: "lung" could be the left "ung"."""
    found = _stated_side(words)
    if found or not words:
        return found
    for position, word in enumerate(words):
        if word in _SHORT_SIDES and len(words) > 1:
            found.add((_SHORT_SIDES[word], words[:position] + words[position + 1 :]))
    for text, side in {**_SIDES, **_SHORT_SIDES}.items():
        for position, rest in ((0, words[0].removeprefix(text)), (len(words) - 1, words[-1].removesuffix(text))):
            if rest != words[position] and len(rest) >= _LEAST_WORD:
                found.add((side, (*words[:position], rest, *words[position + 1 :])))
    return found


def _says_side(words: tuple[str, ...]) -> bool:
    if not words:
        return False
    short = [word for word in words if word in _SHORT_SIDES and len(word) > 1]
    # RT is radiotherapy too; beside a word of anatomy it is a side.
    is_sided = any(word in ("lh", "rh") for word in short) or any(
        _find(rest) is not None for word in short if (rest := tuple(other for other in words if other != word))
    )
    if _stated_side(words) or (len(words) > 1 and is_sided):
        return True
    return any(
        rest != words[position] and _find((rest,)) is not None
        for text in (*_SIDES, *_SHORT_SIDES)
        for position, rest in ((0, words[0].removeprefix(text)), (-1, words[-1].removesuffix(text)))
        if len(rest) >= _LEAST_WORD
    )


def _words(name: str) -> tuple[str, ...]:
    """Words apart by anything that is no letter or digit, or by a capital letter (LeftKidney)."""
    return _plain_words(_CAPITAL.sub(" ", name))


def _plain_words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[^a-z0-9]+", name.casefold()) if word)


def _find(words: tuple[str, ...]) -> str | None:
    """The table's key for the words: as they are, in the singular, or without a number at the end (rib 7)."""
    name = "_".join(words)
    candidates = [name, name.removesuffix("s")]
    if words and words[-1].isdecimal():
        candidates.append("_".join(words[:-1]))
    for candidate in candidates:
        candidate = _ALIASES.get(candidate, candidate)
        if candidate in ANATOMY:
            return candidate
    return None


def _entry(key: str, side: Laterality | None, colour: Colour) -> Anatomy:
    value, meaning, _ = ANATOMY[key]
    return Anatomy(
        category=MORPHOLOGICALLY_ABNORMAL if key in _ABNORMAL else ANATOMICAL_STRUCTURE,
        type=Code(scheme="SCT", value=value, meaning=meaning),
        laterality=side,
        colour=colour,
        known=True,
    )


def _palette(index: int) -> Colour:
    # The golden ratio spreads any number of hues evenly.
    red, green, blue = colorsys.hsv_to_rgb((index * 0.6180339887498949) % 1.0, 0.55, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
