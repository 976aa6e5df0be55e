"""What nnU-Net's files do not say about a model: codes, sides, colours, volumes, and which series it may run on.

Defaults come from the names in dataset.json and the spacing in the plans; a card (TOML or JSON, `--card FILE`)
overrides any of them. docs/model-bundle.md describes the fields; a card has the same names:

    name = "hippocampus-mr"
    semver = "1.0.0"
    description = "..."
    licence = "..."
    origin = "..."
    [data]
    licence = "..."
    [contract]
    orientation = "RAS"
    [labels.Anterior]
    type = {scheme = "SCT", value = "5366008", meaning = "Hippocampus"}
    volume_range_ml = [0.8, 3.1]
    [quality]
    min_confidence = 0.5
    max_components = {Anterior = 1}
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine import anatomy
from engine.errors import ImportRefused
from engine.json_reader import Reader, read_json
from engine.labels import LabelManager
from engine.manifest import (
    Channel,
    Contract,
    LabelSpec,
    QualityThresholds,
    check_pairs,
    read_code,
    read_colour,
    read_contract,
    read_laterality,
    read_volume_range,
)
from engine.plans import Plans
from engine.provenance import DATA_KEYS

_CARD_KEYS = frozenset(
    {"name", "semver", "description", "licence", "origin", "step_size", "data", "contract", "labels", "quality"}
)
_CONTRACT_KEYS = frozenset(
    {
        "modalities",
        "anatomy",
        "orientation",
        "slice_axis",
        "spacing_mm",
        "min_slices",
        "max_slices",
        "max_slice_gap_ratio",
        "max_gantry_tilt_deg",
        "allow_duplicates",
        "allow_mixed_contents",
        "allow_partial_extent",
    }
)
_LABEL_KEYS = frozenset({"category", "type", "laterality", "pair", "colour", "volume_range_ml"})
_QUALITY_KEYS = frozenset({"min_confidence", "min_fold_dice", "min_mirror_dice", "max_components"})

# A series may be this many times finer or coarser than what the model was planned for.
_SPACING_FACTOR = 4.0
_MODALITIES: Mapping[str, str] = MappingProxyType({"ct": "CT", "cbct": "CT", "pet": "PT", "pt": "PT", "suv": "PT"})
_MR_NAMES = ("mr", "t1", "t2", "flair", "adc", "dwi", "pd", "swi", "mprage")
# Readers of nnU-Net that turn the image before the network sees it.
_REORIENTING = frozenset({"NibabelIOWithReorient", "SimpleITKIOWithReorient"})


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The overrides of a card, checked for known keys; the values are checked where they are used. `data`: licence and
    origin of the training data, where dataset.json does not say them."""

    name: str | None = None
    semver: str | None = None
    description: str | None = None
    licence: str | None = None
    origin: str | None = None
    step_size: float = 0.5
    contract: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a bundle says about its model. `warnings` are what a person should look at before the model is used."""

    channels: tuple[Channel, ...]
    labels: tuple[LabelSpec, ...]
    contract: Contract
    quality: QualityThresholds
    warnings: tuple[str, ...]


def read_card(path: Path) -> ModelCard:
    """A card from a .toml or .json file. Raises ImportRefused with the key for anything unknown or of wrong type."""
    document: Mapping[str, Any]
    if path.suffix == ".toml":
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ImportRefused(f"{path.name}: not readable as TOML: {exc}") from exc
        except OSError as exc:
            raise ImportRefused(f"{path.name}: cannot be read: {exc.strerror}") from exc
    elif path.suffix == ".json":
        document = read_json(path, error=ImportRefused)
    else:
        raise ImportRefused(f"{path.name}: a card is a .toml or a .json file")
    return parse_card(document, where=path.name)


def parse_card(document: Mapping[str, Any], *, where: str = "card") -> ModelCard:
    """A card from its content. Raises ImportRefused."""
    card = Reader(document, where=where, error=ImportRefused)
    card.only(_CARD_KEYS)
    contract, labels, quality, data = (card.child(key, {}) for key in ("contract", "labels", "quality", "data"))
    data.only(frozenset(DATA_KEYS))
    contract.only(_CONTRACT_KEYS)
    quality.only(_QUALITY_KEYS)
    for name in labels.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        labels.child(name).only(_LABEL_KEYS)
    return ModelCard(
        name=card.text_or_none("name"),
        semver=card.text_or_none("semver"),
        description=card.text_or_none("description"),
        licence=card.text_or_none("licence"),
        origin=card.text_or_none("origin"),
        step_size=card.number("step_size", 0.05, 1.0, 0.5),
        contract=dict(card.raw("contract", {})),
        labels={name: dict(labels.raw(name)) for name in labels.keys()},  # noqa: SIM118
        quality=dict(card.raw("quality", {})),
        data={key: data.text(key) for key in data.keys()},  # noqa: SIM118
    )


def describe_model(
    plans: Plans, dataset_json: Mapping[str, Any], label_manager: LabelManager, card: ModelCard
) -> Description:
    """Joins what the names and plans say with the card. Raises ImportRefused with the key."""
    warnings: list[str] = []
    channels = read_channels(dataset_json)
    labels = _labels(plans.dataset_name, label_manager, card, warnings)
    quality = Reader(card.quality, where="card: quality", error=ImportRefused)
    components = quality.child("max_components", {})
    for name in components.keys():  # noqa: SIM118
        if name not in {label.name for label in labels}:
            raise components.fail(name[:80], "is no label of this model")
    return Description(
        channels=channels,
        labels=labels,
        contract=_contract(plans, channels, card, warnings),
        quality=QualityThresholds(
            min_confidence=quality.number("min_confidence", 0.0, 1.0, 0.5),
            min_fold_dice=quality.number("min_fold_dice", 0.0, 1.0, 0.7),
            min_mirror_dice=quality.number("min_mirror_dice", 0.0, 1.0, 0.7),
            max_components={name: components.integer(name, 1, 10**6) for name in components.keys()},  # noqa: SIM118
        ),
        warnings=tuple(warnings),
    )


def read_channels(dataset_json: Mapping[str, Any]) -> tuple[Channel, ...]:
    """`channel_names` (or `modality`, as older files call it) of dataset.json, by index. Raises ImportRefused."""
    dataset = Reader(dataset_json, where="dataset.json", error=ImportRefused)
    key = "channel_names" if "channel_names" in dataset else "modality"
    names = dataset.child(key)
    indices = list(names.keys())
    if not 1 <= len(indices) <= 256 or sorted(indices) != sorted(str(index) for index in range(len(indices))):
        raise dataset.fail(key, "indices must be 0, 1, 2, ...")
    return tuple(Channel(index=index, name=names.text(str(index))) for index in range(len(indices)))


def _labels(
    dataset_name: str, label_manager: LabelManager, card: ModelCard, warnings: list[str]
) -> tuple[LabelSpec, ...]:
    names = [label.name for label in label_manager.foreground]
    for name in card.labels:
        if name not in names:
            raise ImportRefused(
                f"card: labels: {name[:80]!r} is no label of this model; it has {', '.join(names[:20])}"
            )
    specs = []
    stated: dict[str, str | None] = {}
    for index, label in enumerate(label_manager.foreground):
        known = anatomy.describe(label.name, index=index, dataset_name=dataset_name)
        entry = Reader(card.labels.get(label.name, {}), where=f"card: labels: {label.name}", error=ImportRefused)
        if "pair" in entry:
            stated[label.name] = entry.text_or_none("pair")
        if not known.known and "type" not in entry:
            warnings.append(
                f"label {label.name!r}: no code is known for this name; it is coded as "
                f"{known.type.value} (SCT) {known.type.meaning}. Give `type` in a card."
            )
        specs.append(
            LabelSpec(
                value=label.value,
                name=label.name,
                region=label.region,
                category=read_code(entry.child("category")) if "category" in entry else known.category,
                type=read_code(entry.child("type")) if "type" in entry else known.type,
                laterality=read_laterality(entry, "laterality") if "laterality" in entry else known.laterality,
                pair=None,
                colour=read_colour(entry, "colour") if "colour" in entry else known.colour,
                volume_range_ml=read_volume_range(entry, "volume_range_ml"),
            )
        )
    specs = _paired(specs, stated)
    check_pairs(specs, where="card", error=ImportRefused)
    without = [spec.name for spec in specs if spec.volume_range_ml is None]
    if without:
        warnings.append(
            f"no population volume range for {', '.join(without[:10])}{' and more' if len(without) > 10 else ''}: "
            "implausible volumes will not be noticed. Give `volume_range_ml` in a card."
        )
    return tuple(specs)


def _paired(specs: Sequence[LabelSpec], stated: Mapping[str, str | None]) -> list[LabelSpec]:
    """The labels with their pairs: as the card states for either side, else by the names, where these differ in
    nothing but the side and no statement concerns them."""
    claimed = {other: name for name, other in stated.items() if other is not None}
    sides = {spec.name: spec.laterality for spec in specs}
    usual = {
        name: other
        for name, other in anatomy.pairs(list(sides)).items()
        if not {name, other} & {*stated, *claimed} and {sides[name], sides[other]} == {"left", "right"}
    }
    return [replace(s, pair=stated.get(s.name, claimed.get(s.name, usual.get(s.name)))) for s in specs]


def _contract(plans: Plans, channels: tuple[Channel, ...], card: ModelCard, warnings: list[str]) -> Contract:
    low, high = _spacing_limits_mm(plans)
    defaults: dict[str, Any] = {
        "modalities": _modalities(channels, warnings if "modalities" not in card.contract else []),
        "anatomy": None,
        "orientation": _orientation(plans, warnings if "orientation" not in card.contract else []),
        "slice_axis": None,
        "spacing_mm": {"min": low, "max": high},
        "min_slices": 4,
        "max_slices": 5000,
        "max_slice_gap_ratio": 1.05,
        "max_gantry_tilt_deg": 30.0,
        "allow_duplicates": False,
    }
    return read_contract(Reader({**defaults, **card.contract}, where="contract", error=ImportRefused))


def _modalities(channels: tuple[Channel, ...], warnings: list[str]) -> list[str]:
    """CT and PET by their channel names, anything else MR; a name that is not usual for MR is worth a warning."""
    found: list[str] = []
    for channel in channels:
        name = channel.name.casefold()
        modality = _MODALITIES.get(name, "MR")
        if modality == "MR" and not any(part in name for part in _MR_NAMES):
            warnings.append(f"channel {channel.name!r}: taken for MR. Give contract `modalities` in a card.")
        if modality not in found:
            found.append(modality)
    return found


def orientation_is_stated(plans: Plans, card: ModelCard | None) -> bool:
    """Whether somebody said in which voxel order the model was trained: the card, or a reader that reorients."""
    return plans.image_reader_writer in _REORIENTING or (card is not None and "orientation" in card.contract)


def _orientation(plans: Plans, warnings: list[str]) -> str:
    """nnU-Net trains on voxels as stored and does not say how that was, unless its reader reorients."""
    if plans.image_reader_writer in _REORIENTING:
        return "RAS"
    warnings.append(
        "orientation: nnU-Net's files do not say in which voxel order the model was trained; LPS is assumed (axial "
        "images as DICOM stores them), and the model does not serve until it is stated. Look at the affine of the "
        "training images and give --orientation, or contract `orientation` in a card."
    )
    return "LPS"


def _spacing_limits_mm(plans: Plans) -> tuple[list[float], list[float]]:
    """Limits (z, y, x): the finest and coarsest spacing of the configurations, a quarter and four times of them.
    The axis that a 2D network does not resample is limited only where a 3D configuration says something."""
    finest: list[float] = [0.01, 0.01, 0.01]
    coarsest: list[float] = [50.0, 50.0, 50.0]
    for axis in range(3):
        network_axis = plans.transpose_backward[axis]
        planned = [
            configuration.spacing_mm[network_axis - 1 if configuration.is_2d else network_axis]
            for configuration in plans.configurations.values()
            if not (configuration.is_2d and network_axis == 0)
        ]
        if planned:
            finest[axis] = round(min(planned) / _SPACING_FACTOR, 6)
            coarsest[axis] = round(max(planned) * _SPACING_FACTOR, 6)
    return finest, coarsest
