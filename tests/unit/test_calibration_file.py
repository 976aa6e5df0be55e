"""engine.calibration_file: what is written is what is read, and a file that lies is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine.calibration import calibrate
from engine.calibration_file import calibration_document, read_calibration
from engine.errors import BundleInvalid
from engine.quality_estimate import Calibration, Estimate, estimate
from tests.support.known_cases import drawn, evidence


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate({"organ": drawn(1, 40), "few": drawn(2, 3)})


def test_what_is_written_judges_as_before(calibration: Calibration) -> None:
    document = json.loads(json.dumps(calibration_document(calibration), allow_nan=False))
    again = read_calibration(document, ["organ", "few"])
    assert again.notes == calibration.notes
    assert (again.min_dice, again.max_hd95_mm) == (0.7, 15.0)
    before, after = (estimate(c.labels["organ"], evidence()) for c in (calibration, again))
    assert isinstance(before, Estimate)
    assert isinstance(after, Estimate)
    assert vars(after) == {key: pytest.approx(value, rel=1e-4) for key, value in vars(before).items()}
    assert again.labels["organ"].found.cases == calibration.labels["organ"].found.cases
    assert calibration_document(again) == calibration_document(calibration)


def test_no_patient_is_named(calibration: Calibration) -> None:
    assert "patient 1" not in json.dumps(calibration_document(calibration))


def _label(document: dict[str, Any]) -> Any:
    return document["labels"]["organ"]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d.update(features_version=2), "features_version"),
        (lambda d: d.update(confidence=0.5), "confidence"),
        (lambda d: d.pop("limits"), "limits"),
        (lambda d: d["limits"].update(dice=7), "dice"),
        (lambda d: d["labels"].update(other=_label(d)), "other: is no label"),
        (lambda d: d.update(labels=[]), "labels"),
        (lambda d: d.update(notes=["x" * 20_000]), "notes"),
        (lambda d: _label(d).update(cases=10**9), "cases"),
        (lambda d: _label(d)["volume_log_ml"].update(scale=0.0), "scale"),
        (lambda d: _label(d)["ranges"].pop("volume"), "volume"),
        (lambda d: _label(d)["ranges"].update(volume=[1.0, -1.0]), "lower end"),
        (lambda d: _label(d)["ranges"].update(volume=[1.0] * 10_000), "entries"),
        (lambda d: _label(d)["ranges"].update(other=[0, 1]), "unknown key 'other'"),
        (lambda d: _label(d)["dice"]["weights"].update({"border-entropy": -1.0}), "border-entropy"),
        (lambda d: _label(d)["dice"]["weights"].update(other=1.0), "unknown key 'other'"),
        (lambda d: _label(d)["dice"].update(margin=-0.1), "margin"),
        (lambda d: _label(d)["dice"].update(intercept="1"), "intercept"),
        (lambda d: _label(d)["hd95_mm"].pop("margin"), "margin"),
        (lambda d: _label(d)["ranges"].pop("mirror-disagreement"), "unknown key 'mirror-disagreement'"),
        (lambda d: _label(d)["found"].update(dice_coverage=1.5), "dice_coverage"),
    ],
)
def test_what_is_out_of_place_or_range_is_refused_and_named(
    calibration: Calibration, edit: Callable[[dict[str, Any]], Any], named: str
) -> None:
    document = json.loads(json.dumps(calibration_document(calibration)))
    edit(document)
    with pytest.raises(BundleInvalid, match=named) as refused:
        read_calibration(document, ["organ", "few"])
    assert "calibration.json" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_numbers_at_their_limits_overflow_nothing(calibration: Calibration) -> None:
    document = json.loads(json.dumps(calibration_document(calibration)))
    for line in (_label(document)["dice"], _label(document)["hd95_mm"]):
        line.update(intercept=1e6, margin=1e6, weights=dict.fromkeys(line["weights"], 1e6))
    _label(document)["volume_log_ml"].update(centre=1e3, scale=1e-6)
    _label(document)["ranges"] = {name: [-1e3, 1e3] for name in _label(document)["ranges"]}
    label = read_calibration(document, ["organ"]).labels["organ"]
    for volume in (1e-300, 1.0, 1e300):
        estimate(label, evidence(volume_ml=volume))
    _label(document)["volume_log_ml"].update(centre=0.0, scale=1.0)
    found = estimate(read_calibration(document, ["organ"]).labels["organ"], evidence())
    assert isinstance(found, Estimate)
    assert (found.dice, found.dice_lower) == (0.0, 0.0)
