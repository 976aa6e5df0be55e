"""engine.model_card: defaults from names and plans, and what a card overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ImportRefused
from engine.labels import LabelManager
from engine.model_card import Description, ModelCard, describe_model, parse_card, read_card, read_channels
from engine.plans import read_plans
from tests.support.peers import require_peer

require_peer("torch")

from tests.support.nnunet_results import TWO_D, TrainedModel, dataset_json, plans_json  # noqa: E402

KIDNEYS = TrainedModel(labels={"background": 0, "kidney_left": 1, "kidney_right": 2, "flurb": 3}, heads=4)


def _describe(model: TrainedModel = KIDNEYS, card: dict[str, Any] | None = None, **plans: Any) -> Description:
    document = dataset_json(model)
    return describe_model(
        read_plans({**plans_json(model), **plans}),
        document,
        LabelManager.from_dataset_json(document),
        ModelCard() if card is None else parse_card(card),
    )


def test_names_give_codes_sides_and_pairs() -> None:
    left, right, flurb = _describe().labels
    assert (left.type.value, left.laterality, left.pair) == ("64033007", "left", "kidney_right")
    assert (right.laterality, right.pair) == ("right", "kidney_left")
    assert (flurb.type.value, flurb.laterality, flurb.pair) == ("91723000", None, None)


def test_what_a_person_should_look_at_is_a_warning() -> None:
    warnings = "\n".join(_describe().warnings)
    assert "'flurb'" in warnings
    assert "'kidney_left'" not in warnings
    assert "orientation" in warnings
    assert "volume" in warnings


def test_modality_comes_from_the_channel_names() -> None:
    assert _describe().contract.modalities == ("CT",)
    assert _describe(TrainedModel(channels=("T1w", "FLAIR"))).contract.modalities == ("MR",)
    assert _describe(TrainedModel(channels=("CT", "PET"))).contract.modalities == ("CT", "PT")
    strange = _describe(TrainedModel(channels=("thing",)))
    assert strange.contract.modalities == ("MR",)
    assert any("'thing'" in warning for warning in strange.warnings)


def test_spacing_limits_are_a_quarter_and_four_times_the_plan_in_image_order() -> None:
    contract = _describe().contract
    assert contract.spacing_min_mm == (0.75, 0.25, 0.25)
    assert contract.spacing_max_mm == (12.0, 4.0, 4.0)
    # Network axis 0 is image axis x: the 3 mm belong to x.
    turned = _describe(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0]).contract
    assert turned.spacing_max_mm == (4.0, 4.0, 12.0)


def test_slice_distance_of_a_2d_model_is_hardly_limited() -> None:
    contract = _describe(TWO_D).contract
    assert contract.spacing_max_mm == (50.0, 4.0, 4.0)


def test_reader_that_reorients_says_the_orientation() -> None:
    description = _describe(image_reader_writer="NibabelIOWithReorient")
    assert description.contract.orientation == "RAS"
    assert not any("orientation" in warning for warning in description.warnings)
    assert _describe().contract.orientation == "LPS"


def test_card_overrides_single_values_and_silences_their_warnings() -> None:
    card = {
        "contract": {"orientation": "RAS", "modalities": ["CT"], "min_slices": 10},
        "labels": {
            "flurb": {"type": {"scheme": "SCT", "value": "10200004", "meaning": "Liver"}, "colour": [1, 2, 3]},
            "kidney_left": {"volume_range_ml": [50, 400], "pair": None, "laterality": None},
        },
        "quality": {"min_confidence": 0.25, "max_components": {"flurb": 1}},
    }
    description = _describe(card=card)
    left, _, flurb = description.labels
    assert description.contract.orientation == "RAS"
    assert description.contract.min_slices == 10
    assert description.contract.max_slice_gap_ratio == 1.05
    assert (flurb.type.value, flurb.colour) == ("10200004", (1, 2, 3))
    assert (left.volume_range_ml, left.pair, left.laterality) == ((50.0, 400.0), None, None)
    assert description.quality.min_confidence == 0.25
    assert description.quality.min_fold_dice == 0.7
    assert dict(description.quality.max_components) == {"flurb": 1}
    assert not any("'flurb': no code" in warning for warning in description.warnings)


def test_a_pair_stated_for_one_side_holds_for_both_and_undoes_what_the_names_say() -> None:
    sides = {"flurb": {"laterality": "right", "pair": "kidney_left"}}
    left, right, flurb = _describe(card={"labels": sides}).labels
    assert (left.pair, right.pair, flurb.pair) == ("flurb", None, "kidney_left")
    alone = _describe(card={"labels": {"kidney_left": {"pair": None}}}).labels
    assert [label.pair for label in alone] == [None, None, None]
    unsided = _describe(card={"labels": {"kidney_left": {"laterality": None}}}).labels
    assert [label.pair for label in unsided] == [None, None, None]


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"contract": {"orientaton": "RAS"}}, "orientaton"),
        ({"contract": {"orientation": "LLS"}}, "orientation"),
        ({"contract": {"modalities": "CT"}}, "modalities"),
        ({"contract": {"slice_axis": "oblique"}}, "slice_axis"),
        ({"contract": {"spacing_mm": {"min": [2, 2, 2], "max": [1, 1, 1]}}}, "above max"),
        ({"contract": {"min_slices": 10, "max_slices": 5}}, "max_slices"),
        ({"labels": {"nothing": {}}}, "no label of this model"),
        ({"labels": {"flurb": {"side": "left"}}}, "side"),
        ({"labels": {"flurb": {"laterality": "both"}}}, "laterality"),
        ({"labels": {"flurb": {"pair": "flurb"}}}, "pair"),
        ({"labels": {"flurb": {"pair": "nobody"}}}, "'nobody' is no other label"),
        ({"labels": {"flurb": {"pair": "kidney_left"}}}, "none for its pair 'flurb'"),
        ({"labels": {"kidney_left": {"pair": "kidney_right"}, "kidney_right": {"pair": None}}}, "name each other"),
        (
            {"labels": {n: {"pair": "kidney_right"} for n in ("kidney_left", "flurb")}},
            "'kidney_right' has 'flurb' as its pair",
        ),
        (
            {
                "labels": {
                    n: {"pair": o, "laterality": "left"}
                    for n, o in (("kidney_left", "flurb"), ("flurb", "kidney_left"))
                }
            },
            "laterality",
        ),
        ({"labels": {"flurb": {"colour": [0, 0, 256]}}}, "colour"),
        ({"labels": {"flurb": {"volume_range_ml": [2, 1]}}}, "lower limit"),
        ({"labels": {"flurb": {"type": {"scheme": "SCT", "value": "1" * 17, "meaning": "x"}}}}, "value"),
        ({"quality": {"max_components": {"nothing": 1}}}, "nothing"),
        ({"quality": {"min_confidence": 2}}, "min_confidence"),
        ({"step_size": 0}, "step_size"),
    ],
)
def test_card_with_mistakes_is_refused_with_the_key(card: dict[str, Any], named: str) -> None:
    with pytest.raises(ImportRefused, match=named):
        _describe(card=card)


def test_cards_are_toml_or_json(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('name = "a"\n[contract]\norientation = "RAS"\n')
    (tmp_path / "c.json").write_text('{"name": "a", "contract": {"orientation": "RAS"}}')
    assert read_card(tmp_path / "c.toml") == read_card(tmp_path / "c.json")
    (tmp_path / "broken.toml").write_text("= 1")
    (tmp_path / "c.yaml").write_text("name: a")
    for name in ("broken.toml", "c.yaml", "absent.toml", "absent.json"):
        with pytest.raises(ImportRefused, match=name):
            read_card(tmp_path / name)


@pytest.mark.parametrize("names", [{"0": "CT", "2": "PET"}, {"a": "CT"}, {}, {"0": 5}, ["CT"]])
def test_channels_must_be_numbered_from_zero(names: object) -> None:
    with pytest.raises(ImportRefused, match="channel_names"):
        read_channels({"channel_names": names})


def test_old_name_of_the_channels_is_read() -> None:
    assert [channel.name for channel in read_channels({"modality": {"0": "CT"}})] == ["CT"]
