"""What `bundle.json` says: the values of docs/model-bundle.md, read with every type and range checked.

engine/bundle.py does the files around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from engine.errors import BundleInvalid
from engine.json_reader import Reader

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
MAX_FILES = 1000
# What the registry and the routes take as well.
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SEMVER = re.compile(r"(0|[1-9][0-9]{0,5})(\.(0|[1-9][0-9]{0,5})){2}")
_ORIENTATION = re.compile(r"[LR][PA][SI]|[LR][SI][PA]|[PA][LR][SI]|[PA][SI][LR]|[SI][LR][PA]|[SI][PA][LR]")
_MAX_LABELS = 4096

Laterality = Literal["left", "right"]
Ensemble = Literal["probabilities", "probabilities-of-folds"]
"""How networks are joined. `probabilities`: the folds of a configuration by the mean of their logits, configurations by
the mean of their probabilities (nnU-Net). `probabilities-of-folds`: all networks by the mean of their probabilities."""
Weights = Literal["float32", "fp16"]
"""How the convolutions' weights are stored. All else, and all arithmetic, is float32."""
SliceAxis = Literal["axial", "sagittal", "coronal"]


@dataclass(frozen=True, kw_only=True)
class Code:
    """A coded concept (PS3.3 8.8): coding scheme designator, code value, code meaning."""

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """A segment of the result. `value` and `region` as in engine.labels.Label; `colour` is sRGB 0..255;
    `volume_range_ml` is the population's (low, high), None = not checked; `pair` is the other side's label."""

    value: int
    name: str
    region: tuple[int, ...]
    category: Code
    type: Code
    laterality: Laterality | None
    pair: str | None
    colour: tuple[int, int, int]
    volume_range_ml: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Channel:
    index: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Which series the model may run on. Spacings are (z, y, x) in the model's `orientation`, which is a code of
    docs/architecture.md or "as-stored" (voxels are not reordered)."""

    modalities: tuple[str, ...]
    anatomy: Code | None
    orientation: str
    slice_axis: SliceAxis | None
    spacing_min_mm: tuple[float, float, float]
    spacing_max_mm: tuple[float, float, float]
    min_slices: int
    max_slices: int
    max_slice_gap_ratio: float
    max_gantry_tilt_deg: float
    allow_duplicates: bool
    allow_mixed_contents: bool = False
    allow_partial_extent: bool = False


@dataclass(frozen=True, kw_only=True)
class Fold:
    """`fold` is nnU-Net's name, "0" to "4" or "all". `file` is absolute in a loaded bundle."""

    fold: str
    file: Path


@dataclass(frozen=True, kw_only=True)
class BundleConfiguration:
    """`mirror_axes` are spatial axes in network order (0 is the first of the patch); () = no mirroring."""

    name: str
    folds: tuple[Fold, ...]
    mirror_axes: tuple[int, ...]
    previous_stage: str | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the exported network is from the original, torch's in float32, on the test input of the export."""

    configuration: str
    fold: str
    max_abs_difference: float
    argmax_agreement: float


@dataclass(frozen=True, kw_only=True)
class QualityThresholds:
    """Limits of the checks on a result; `max_components` is by label name, absent = not checked."""

    min_confidence: float
    min_fold_dice: float
    min_mirror_dice: float
    max_components: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `bundle.json` says, without the list of files."""

    name: str
    semver: str
    description: str
    licence: str
    origin: str
    channels: tuple[Channel, ...]
    labels: tuple[LabelSpec, ...]
    contract: Contract
    configurations: tuple[BundleConfiguration, ...]
    ensemble: Ensemble
    step_size: float
    parity: tuple[Parity, ...]
    quality: QualityThresholds
    weights: Weights = "float32"


def manifest_document(manifest: Manifest, root: Path) -> dict[str, Any]:
    """The JSON form of a manifest; fold files as paths relative to `root`."""

    def relative(file: Path) -> str:
        return (file.relative_to(root) if file.is_absolute() else file).as_posix()

    contract = manifest.contract
    return {
        "schema_version": SCHEMA_VERSION,
        "name": manifest.name,
        "semver": manifest.semver,
        "description": manifest.description,
        "licence": manifest.licence,
        "origin": manifest.origin,
        "channels": [vars(channel) for channel in manifest.channels],
        "labels": [
            {**vars(label), "category": vars(label.category), "type": vars(label.type)} for label in manifest.labels
        ],
        "contract": {
            "modalities": contract.modalities,
            "anatomy": None if contract.anatomy is None else vars(contract.anatomy),
            "orientation": contract.orientation,
            "slice_axis": contract.slice_axis,
            "spacing_mm": {"min": contract.spacing_min_mm, "max": contract.spacing_max_mm},
            "min_slices": contract.min_slices,
            "max_slices": contract.max_slices,
            "max_slice_gap_ratio": contract.max_slice_gap_ratio,
            "max_gantry_tilt_deg": contract.max_gantry_tilt_deg,
            "allow_duplicates": contract.allow_duplicates,
            # Only where set, so that a bundle from before they existed keeps its digest.
            **({"allow_mixed_contents": True} if contract.allow_mixed_contents else {}),
            **({"allow_partial_extent": True} if contract.allow_partial_extent else {}),
        },
        "configurations": [
            {
                "name": configuration.name,
                "folds": [{"fold": fold.fold, "file": relative(fold.file)} for fold in configuration.folds],
                "mirror_axes": configuration.mirror_axes,
                "previous_stage": configuration.previous_stage,
            }
            for configuration in manifest.configurations
        ],
        "ensemble": manifest.ensemble,
        "step_size": manifest.step_size,
        "parity": [vars(parity) for parity in manifest.parity],
        "quality": {**vars(manifest.quality), "max_components": dict(manifest.quality.max_components)},
        **({} if manifest.weights == "float32" else {"weights": manifest.weights}),
    }


def read_manifest(reader: Reader, root: Path) -> Manifest:
    name, semver = reader.text("name"), reader.text("semver")
    check_identity(name, semver, error=BundleInvalid)
    ensemble = reader.text("ensemble")
    if ensemble not in get_args(Ensemble):
        raise reader.fail("ensemble", f"{ensemble[:40]!r} is not one of {', '.join(get_args(Ensemble))}")
    weights = reader.text("weights", "float32")
    if weights not in get_args(Weights):
        raise reader.fail("weights", f"{weights[:40]!r} is not one of {', '.join(get_args(Weights))}")
    quality = reader.child("quality")
    components = quality.child("max_components", {})
    return Manifest(
        name=name,
        semver=semver,
        description=reader.text("description", empty=True),
        licence=reader.text("licence", empty=True),
        origin=reader.text("origin", empty=True),
        channels=tuple(
            Channel(index=entry.integer("index", 0, 255), name=entry.text("name"))
            for entry in reader.children("channels", lengths=(1, 256))
        ),
        labels=tuple(_label(entry) for entry in reader.children("labels", lengths=(1, _MAX_LABELS))),
        contract=read_contract(reader.child("contract")),
        configurations=tuple(
            _bundle_configuration(entry, root) for entry in reader.children("configurations", lengths=(1, 32))
        ),
        ensemble=cast(Ensemble, ensemble),
        step_size=reader.number("step_size", 0.05, 1.0),
        parity=tuple(
            Parity(
                configuration=entry.text("configuration"),
                fold=entry.text("fold"),
                max_abs_difference=entry.number("max_abs_difference", 0.0, 1e6),
                argmax_agreement=entry.number("argmax_agreement", 0.0, 1.0),
            )
            for entry in reader.children("parity", lengths=(0, MAX_FILES))
        ),
        quality=QualityThresholds(
            min_confidence=quality.number("min_confidence", 0.0, 1.0),
            min_fold_dice=quality.number("min_fold_dice", 0.0, 1.0),
            min_mirror_dice=quality.number("min_mirror_dice", 0.0, 1.0),
            max_components=MappingProxyType(
                {key: components.integer(key, 1, 10**6) for key in components.keys()}  # noqa: SIM118
            ),
        ),
        weights=cast(Weights, weights),
    )


def check_identity(name: str, semver: str, *, error: type[Exception]) -> None:
    """A bundle's name and version go into paths and UIDs, and a version into an order; anything else raises `error`."""
    if not _NAME.fullmatch(name):
        raise error(f"name: {name[:80]!r} must be a-z, 0-9 and -, 1 to 63 characters, not starting with -")
    check_semver(semver, error=error)


def check_semver(semver: str, *, error: type[Exception]) -> None:
    """A version is MAJOR.MINOR.PATCH; anything else raises `error`."""
    if not _SEMVER.fullmatch(semver):
        raise error(
            f"semver: {semver[:80]!r} is not MAJOR.MINOR.PATCH, for example 1.0.0; "
            "suffixes such as -rc.1 and numbers above 999999 are not taken"
        )


def semver_numbers(semver: str) -> tuple[int, int, int]:
    """By which versions are ordered: "1.10.0" is higher than "1.9.0"."""
    major, minor, patch = map(int, semver.split("."))
    return major, minor, patch


def check_pairs(labels: Sequence[LabelSpec], *, where: str, error: type[Exception]) -> None:
    """Two labels of a pair name each other, and one is left and the other right; anything else raises `error`."""
    by_name = {label.name: label for label in labels}
    for label in labels:
        if label.pair is None:
            continue
        other = by_name.get(label.pair)
        if other is None or other is label:
            raise error(f"{where}: labels: {label.name}: pair: {label.pair[:80]!r} is no other label of this model")
        if other.pair != label.name:
            named = "no pair" if other.pair is None else f"{other.pair!r} as its pair"
            raise error(
                f"{where}: labels: {label.name}: pair: {other.name!r} has {named}; both sides must name each other"
            )
        if {label.laterality, other.laterality} != {"left", "right"}:
            sides = f"{label.laterality or 'none'}, and {other.laterality or 'none'} for its pair {other.name!r}"
            raise error(
                f"{where}: labels: {label.name}: laterality: {sides}; one side must be left and the other right"
            )


def read_code(entry: Reader) -> Code:
    """A coded concept; lengths as PS3.5 6.2 allows for SH and LO."""
    code = Code(scheme=entry.text("scheme"), value=entry.text("value"), meaning=entry.text("meaning"))
    for key, value, length in (("scheme", code.scheme, 16), ("value", code.value, 16), ("meaning", code.meaning, 64)):
        if len(value) > length or "\\" in value or value != value.strip() or not value.isprintable():
            raise entry.fail(key, f"at most {length} printable characters, no backslash")
    return code


def read_colour(entry: Reader, key: str) -> tuple[int, int, int]:
    red, green, blue = entry.integers(key, 0, 255, lengths=(3, 3))
    return red, green, blue


def read_volume_range(entry: Reader, key: str) -> tuple[float, float] | None:
    if entry.raw(key, None) is None:
        return None
    low, high = entry.numbers(key, 0.0, 1e6, lengths=(2, 2))
    if low >= high:
        raise entry.fail(key, "the lower limit must be below the upper")
    return low, high


def read_laterality(entry: Reader, key: str) -> Laterality | None:
    side = entry.text_or_none(key)
    if side is None or side == "left" or side == "right":
        return side  # type: ignore[return-value]
    raise entry.fail(key, "left, right or null is needed")


def _label(entry: Reader) -> LabelSpec:
    return LabelSpec(
        value=entry.integer("value", 1, 65534),
        name=entry.text("name"),
        region=entry.integers("region", 0, 65534, lengths=(1, _MAX_LABELS)),
        category=read_code(entry.child("category")),
        type=read_code(entry.child("type")),
        laterality=read_laterality(entry, "laterality"),
        pair=entry.text_or_none("pair"),
        colour=read_colour(entry, "colour"),
        volume_range_ml=read_volume_range(entry, "volume_range_ml"),
    )


def read_contract(entry: Reader) -> Contract:
    """A contract as bundle.json and a card write it."""
    orientation = entry.text("orientation")
    if orientation != "as-stored" and not _ORIENTATION.fullmatch(orientation):
        raise entry.fail("orientation", f"{orientation[:20]!r} is neither a code like LPS nor as-stored")
    axis = entry.text_or_none("slice_axis")
    if axis not in (None, "axial", "sagittal", "coronal"):
        raise entry.fail("slice_axis", "axial, sagittal, coronal or null is needed")
    modalities = entry.texts("modalities", lengths=(1, 32))
    if not all(re.fullmatch(r"[A-Z0-9_ ]{1,16}", modality) for modality in modalities):
        raise entry.fail("modalities", "a code string like CT or MR is needed (PS3.3 C.7.3.1.1.1)")
    spacing = entry.child("spacing_mm")
    low, high = (spacing.numbers(key, 1e-6, 1e4, lengths=(3, 3)) for key in ("min", "max"))
    if any(a > b for a, b in zip(low, high, strict=True)):
        raise spacing.fail("min", "is above max")
    min_slices = entry.integer("min_slices", 1, 10**6)
    return Contract(
        modalities=modalities,
        anatomy=None if entry.raw("anatomy", None) is None else read_code(entry.child("anatomy")),
        orientation=orientation,
        slice_axis=axis,  # type: ignore[arg-type]
        spacing_min_mm=(low[0], low[1], low[2]),
        spacing_max_mm=(high[0], high[1], high[2]),
        min_slices=min_slices,
        max_slices=entry.integer("max_slices", min_slices, 10**6),
        max_slice_gap_ratio=entry.number("max_slice_gap_ratio", 1.0, 1000.0),
        max_gantry_tilt_deg=entry.number("max_gantry_tilt_deg", 0.0, 90.0),
        allow_duplicates=entry.boolean("allow_duplicates"),
        allow_mixed_contents=entry.boolean("allow_mixed_contents", False),
        allow_partial_extent=entry.boolean("allow_partial_extent", False),
    )


def _bundle_configuration(entry: Reader, root: Path) -> BundleConfiguration:
    axes = entry.integers("mirror_axes", 0, 2, lengths=(0, 3))
    if len(set(axes)) != len(axes):
        raise entry.fail("mirror_axes", "an axis is named twice")
    return BundleConfiguration(
        name=entry.text("name"),
        folds=tuple(
            Fold(fold=fold.text("fold"), file=root / safe_path(fold, fold.text("file")))
            for fold in entry.children("folds", lengths=(1, 100))
        ),
        mirror_axes=axes,
        previous_stage=entry.text_or_none("previous_stage"),
    )


def safe_path(reader: Reader, name: str) -> PurePosixPath:
    """A relative path of plain names. Refuses what could lead outside or mean two things."""
    path = PurePosixPath(name)
    plain = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}", part) for part in path.parts)
    if not plain or not path.parts or path.as_posix() != name or name == MANIFEST:
        raise reader.fail(name[:120], "is not a plain relative path inside the bundle")
    return path
