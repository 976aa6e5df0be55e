"""The sanity cases of a bundle: images whose label maps torch computed at export, to be computed again anywhere.

    sanity/cases.json     what each case is, and what is expected of it
    sanity/NAME.npz       labels (what torch computed); of a site's own case also image and, if given, reference

A generated case holds the phantom's seed instead of an image (engine/sanity_phantom.py). Names are ours, never those
of files that were given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.array_archive import read_arrays, write_arrays
from engine.errors import BundleInvalid, InputRejected
from engine.json_reader import Reader
from engine.sanity_phantom import MAX_EDGE, MAX_VOXELS, Phantom, make_phantom
from engine.volume import Geometry, LabelMap, Volume, check_orientation

FOLDER = "sanity"
CASES_JSON = f"{FOLDER}/cases.json"
FORMAT = 1
MAX_CASES = 64
_MAX_SITE_EDGE = 8192
MAX_SITE_VOXELS = 2**28
_MAX_VALUE = 1e38
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LABEL_TYPES = ("uint8", "uint16")
_IMAGE_TYPES = ("int16", "float32")


@dataclass(frozen=True, kw_only=True)
class SanityCase:
    """One case without its arrays.

    `phantom` and `image_sha256` (of its float32 voxels) of a generated case, `geometry` of a site's own.
    `voxels`: how many torch gave to each label, by name. `dice`: torch against the reference, None without one; a value
    is None where neither side has the label.
    """

    name: str
    phantom: Phantom | None
    image_sha256: str | None
    geometry: Geometry | None
    voxels: Mapping[str, int]
    dice: Mapping[str, float | None] | None

    @property
    def file(self) -> str:
        return f"{FOLDER}/{self.name}.npz"


@dataclass(frozen=True, kw_only=True)
class SanitySuite:
    """`computed_by`: the reference's backend and version, such as "torch 2.13.0", float32 on a CPU."""

    computed_by: str
    cases: tuple[SanityCase, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedSanityCase:
    """The image (C, Z, Y, X), torch's labels on its grid, and the reference's if there is one."""

    volume: Volume
    labels: LabelMap
    reference: LabelMap | None


def image_digest(volume: Volume) -> str:
    """SHA-256 of the voxels, float32 little-endian in C order."""
    return hashlib.sha256(np.ascontiguousarray(volume.array, dtype="<f4").tobytes()).hexdigest()


def write_case(
    root: Path, case: SanityCase, labels: NDArray[Any], *, image: Volume | None, reference: LabelMap | None
) -> None:
    """The arrays of a case below the bundle's `root`. `image` only of a site's own case; whole numbers that fit are
    stored as int16."""
    (root / FOLDER).mkdir(exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {"labels": labels}
    if image is not None:
        whole = image.array.astype(np.int16) if np.abs(image.array).max() < 2**15 else image.array
        arrays["image"] = whole if np.array_equal(whole, image.array) else image.array
    if reference is not None:
        arrays["reference"] = reference.array.astype(np.uint8 if int(reference.array.max()) < 256 else np.uint16)
    write_arrays(root / case.file, arrays)


def load_case(root: Path, case: SanityCase, *, channels: int, highest: int) -> LoadedSanityCase:
    """The arrays of a case, its label values at most `highest`.

    Raises BundleInvalid for a damaged file, or where this release makes another phantom of the seed than the one that
    torch was given.
    """
    loaded = _load(root, case, channels)
    for labels in (loaded.labels, loaded.reference):
        if labels is not None and int(labels.array.max()) > highest:
            raise BundleInvalid(f"{case.file}: label {int(labels.array.max())}; the model's highest is {highest}")
    return loaded


def _load(root: Path, case: SanityCase, channels: int) -> LoadedSanityCase:
    if case.phantom is not None:
        volume = make_phantom(case.phantom)
        if image_digest(volume) != case.image_sha256:
            raise BundleInvalid(
                f"{CASES_JSON}: {case.name}: the image made from the seed is not the one of the export; export again"
            )
        labels = read_arrays(root / case.file, {"labels": (volume.geometry.shape, _LABEL_TYPES)}, error=BundleInvalid)[
            "labels"
        ]
        return LoadedSanityCase(volume=volume, labels=LabelMap(array=labels, geometry=volume.geometry), reference=None)
    if case.geometry is None:
        raise ValueError(f"{case.name}: neither phantom nor grid")
    shape = case.geometry.shape
    expected: dict[str, tuple[tuple[int, ...], Sequence[str]]] = {
        "labels": (shape, _LABEL_TYPES),
        "image": ((channels, *shape), _IMAGE_TYPES),
    }
    if case.dice is not None:
        expected["reference"] = (shape, _LABEL_TYPES)
    arrays = read_arrays(root / case.file, expected, error=BundleInvalid)
    return LoadedSanityCase(
        volume=Volume(array=arrays["image"].astype(np.float32), geometry=case.geometry),
        labels=LabelMap(array=arrays["labels"], geometry=case.geometry),
        reference=LabelMap(array=arrays["reference"], geometry=case.geometry) if "reference" in arrays else None,
    )


def suite_document(suite: SanitySuite) -> dict[str, Any]:
    """The content of cases.json."""
    return {
        "format": FORMAT,
        "computed_by": suite.computed_by,
        "cases": [
            {
                "name": case.name,
                **({} if case.phantom is None else {"phantom": asdict(case.phantom)}),
                **({} if case.image_sha256 is None else {"image_sha256": case.image_sha256}),
                **(
                    {}
                    if case.geometry is None
                    else {"shape": case.geometry.shape, "affine_lps": case.geometry.affine_lps.tolist()}
                ),
                "voxels": dict(case.voxels),
                "dice": None if case.dice is None else dict(case.dice),
            }
            for case in suite.cases
        ],
    }


def read_suite(
    document: Mapping[str, Any], *, labels: Sequence[str], channels: int, error: type[Exception]
) -> SanitySuite:
    """The suite in a document; raises `error` with the key for what is missing, of wrong type or range, or does not fit
    the model's `labels` (names) and channels."""
    reader = Reader(document, where=CASES_JSON, error=error)
    if reader.integer("format", 0, 2**16) != FORMAT:
        raise reader.fail("format", f"is not {FORMAT}")
    cases = tuple(_read_case(entry, labels, channels) for entry in reader.children("cases", lengths=(1, MAX_CASES)))
    if len({case.name for case in cases}) != len(cases):
        raise reader.fail("cases", "a name appears twice")
    return SanitySuite(computed_by=reader.text("computed_by"), cases=cases)


def _read_case(entry: Reader, labels: Sequence[str], channels: int) -> SanityCase:
    name = entry.text("name")
    if not _NAME.fullmatch(name):
        raise entry.fail("name", f"{name[:80]!r} must be a-z, 0-9 and -")
    voxels = entry.child("voxels")
    for key in voxels.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        if key not in labels:
            raise voxels.fail(key[:80], "is no label of this model")
    dice = None if entry.raw("dice", None) is None else entry.child("dice")
    phantom, digest, geometry = None, None, None
    if "phantom" in entry:
        phantom = _read_phantom(entry.child("phantom"), channels)
        digest = entry.text("image_sha256")
        if not _SHA256.fullmatch(digest):
            raise entry.fail("image_sha256", "is no SHA-256 in lower case hexadecimal")
        if dice is not None:
            raise entry.fail("dice", "a phantom has no reference")
    else:
        geometry = _read_geometry(entry)
    return SanityCase(
        name=name,
        phantom=phantom,
        image_sha256=digest,
        geometry=geometry,
        voxels=MappingProxyType({label: voxels.integer(label, 0, MAX_SITE_VOXELS) for label in labels}),
        dice=None if dice is None else MappingProxyType({label: _dice(dice, label) for label in labels}),
    )


def _dice(entry: Reader, label: str) -> float | None:
    return None if entry.raw(label) is None else entry.number(label, 0.0, 1.0)


def _read_phantom(entry: Reader, channels: int) -> Phantom:
    z, y, x = entry.integers("shape", 1, MAX_EDGE, lengths=(3, 3))
    if z * y * x > MAX_VOXELS:
        raise entry.fail("shape", f"{z * y * x} voxels; at most {MAX_VOXELS}")
    spacing = entry.numbers("spacing_mm", 1e-6, 1e4, lengths=(3, 3))
    codes = [_orientation(entry, key) for key in ("orientation", "stored_orientation")]
    ranges = []
    for index, pair in enumerate(entry.array("ranges", lengths=(channels, channels))):
        place = f"ranges[{index}]"
        low, high = Reader({place: pair}, where=entry.where, error=entry.error).numbers(
            place, -_MAX_VALUE, _MAX_VALUE, lengths=(2, 2)
        )
        ranges.append((low, high))
    return Phantom(
        seed=entry.integer("seed", 0, 2**32 - 1),
        shape=(z, y, x),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        orientation=codes[0],
        stored_orientation=codes[1],
        oblique=entry.boolean("oblique"),
        ranges=tuple(ranges),
    )


def _orientation(entry: Reader, key: str) -> str:
    try:
        return check_orientation(entry.text(key))
    except ValueError as exc:
        raise entry.fail(key, str(exc)[:200]) from exc


def _read_geometry(entry: Reader) -> Geometry:
    z, y, x = entry.integers("shape", 1, _MAX_SITE_EDGE, lengths=(3, 3))
    if z * y * x > MAX_SITE_VOXELS:
        raise entry.fail("shape", f"{z * y * x} voxels; at most {MAX_SITE_VOXELS}")
    rows = []
    for index, row in enumerate(entry.array("affine_lps", lengths=(4, 4))):
        place = f"affine_lps[{index}]"
        rows.append(
            Reader({place: row}, where=entry.where, error=entry.error).numbers(place, -1e9, 1e9, lengths=(4, 4))
        )
    try:
        return Geometry(shape=(z, y, x), affine_lps=np.array(rows))
    except InputRejected as exc:
        raise entry.fail("affine_lps", str(exc)[:200]) from exc
