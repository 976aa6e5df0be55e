"""calibration.json of a bundle (docs/model-bundle.md): a calibration as JSON, and back with every value checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from engine.errors import BundleInvalid
from engine.json_reader import Reader
from engine.quality_estimate import (
    COMPONENTS,
    CONFIDENCE,
    FEATURES,
    FEATURES_VERSION,
    LARGE,
    SMALL,
    TERMS,
    VOLUME,
    Calibration,
    Found,
    LabelCalibration,
    Line,
)

CALIBRATION_JSON = "calibration.json"
SCHEMA_VERSION = 1


def calibration_document(calibration: Calibration) -> dict[str, Any]:
    """The JSON form (docs/model-bundle.md); numbers with six digits."""

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.6g}")

    def line(of: Line) -> dict[str, Any]:
        return {
            "intercept": short(of.intercept),
            "weights": {term: short(weight) for term, weight in of.weights.items()},
            "margin": short(of.margin),
        }

    return {
        "schema_version": SCHEMA_VERSION,
        "features_version": FEATURES_VERSION,
        "confidence": CONFIDENCE,
        "limits": {"dice": calibration.min_dice, "hd95_mm": calibration.max_hd95_mm},
        "labels": {
            name: {
                "cases": label.cases,
                "patients": label.patients,
                "missed": label.missed,
                "rightly_empty": label.rightly_empty,
                "touching_border": short(label.touching_border),
                "volume_log_ml": {"centre": short(label.volume_centre), "scale": short(label.volume_scale)},
                "ranges": {feature: [short(low), short(high)] for feature, (low, high) in label.ranges.items()},
                "dice": line(label.dice),
                "hd95_mm": line(label.hd95),
                "found": {
                    key: value if isinstance(value, int) else short(value) for key, value in vars(label.found).items()
                },
            }
            for name, label in calibration.labels.items()
        },
        "notes": list(calibration.notes),
    }


def read_calibration(document: Mapping[str, Any], names: Sequence[str]) -> Calibration:
    """`names` are the labels of the model. Raises BundleInvalid for what is of the wrong type or range, of another
    version, or about another label."""
    reader = Reader(document, where=CALIBRATION_JSON, error=BundleInvalid)
    for key, known in (("schema_version", SCHEMA_VERSION), ("features_version", FEATURES_VERSION)):
        if reader.integer(key, 0, 10**6) != known:
            raise reader.fail(key, f"{reader.raw(key)} is unknown; this release reads {known}")
    if reader.number("confidence", 0.0, 1.0) != CONFIDENCE:
        raise reader.fail("confidence", f"this release judges bounds of {CONFIDENCE}")
    limits, labels = reader.child("limits"), reader.child("labels")
    found: dict[str, LabelCalibration] = {}
    for name in labels.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
        if name not in names:
            raise labels.fail(name[:80], "is no label of this model")
        found[name] = _read_label(labels.child(name))
    return Calibration(
        min_dice=limits.number("dice", 0.0, 1.0),
        max_hd95_mm=limits.number("hd95_mm", 0.0, 1e6),
        labels=MappingProxyType(found),
        notes=reader.texts("notes", lengths=(0, 10_000)),
    )


def _read_label(reader: Reader) -> LabelCalibration:
    volume, listed = reader.child("volume_log_ml"), reader.child("ranges")
    ranges: dict[str, tuple[float, float]] = {}
    for name in FEATURES:
        if name in listed:
            low, high = listed.numbers(name, -1e3, 1e3, lengths=(2, 2))
            if low > high:
                raise listed.fail(name, "the lower end must not be above the upper")
            ranges[name] = (low, high)
        elif name in (VOLUME, COMPONENTS):
            raise listed.fail(name, "is missing")
    listed.only(frozenset(FEATURES))
    terms = {SMALL, LARGE} | (ranges.keys() - {VOLUME})
    return LabelCalibration(
        cases=reader.integer("cases", 1, 10**7),
        patients=reader.integer("patients", 1, 10**7),
        missed=reader.integer("missed", 0, 10**7),
        rightly_empty=reader.integer("rightly_empty", 0, 10**7),
        touching_border=reader.number("touching_border", 0.0, 1.0),
        volume_centre=volume.number("centre", -1e3, 1e3),
        volume_scale=volume.number("scale", 1e-6, 1e3),
        ranges=MappingProxyType(ranges),
        dice=_read_line(reader.child("dice"), terms),
        hd95=_read_line(reader.child("hd95_mm"), terms),
        found=_read_found(reader.child("found")),
    )


def _read_line(reader: Reader, terms: set[str]) -> Line:
    weights = reader.child("weights")
    weights.only(frozenset(terms))
    return Line(
        intercept=reader.number("intercept", -1e6, 1e6),
        weights=MappingProxyType({term: weights.number(term, 0.0, 1e6) for term in TERMS if term in weights}),
        margin=_number_or_none(reader, "margin", 0.0, 1e6),
    )


def _read_found(reader: Reader) -> Found:
    def share(key: str, low: float = 0.0, high: float = 1.0) -> float | None:
        return _number_or_none(reader, key, low, high)

    return Found(
        cases=reader.integer("cases", 0, 10**7),
        outside=reader.integer("outside", 0, 10**7),
        dice_coverage=share("dice_coverage"),
        hd95_coverage=share("hd95_coverage"),
        dice_correlation=share("dice_correlation", -1.0),
        hd95_correlation=share("hd95_correlation", -1.0),
        bad=reader.integer("bad", 0, 10**7),
        sensitivity=share("sensitivity"),
        specificity=share("specificity"),
        dice_lower=share("dice_lower"),
        hd95_upper_mm=share("hd95_upper_mm", 0.0, 1e12),
    )


def _number_or_none(reader: Reader, key: str, low: float, high: float) -> float | None:
    return None if reader.raw(key) is None else reader.number(key, low, high)
