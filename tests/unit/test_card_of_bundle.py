"""The card of a deployed model gives the next version the same codes, sides, limits and contract."""

from __future__ import annotations

import json
from pathlib import Path

import gateway
from engine.bundle import load_bundle
from engine.card_of_bundle import card_document
from engine.model_card import describe_model, parse_card

_MODEL = Path(gateway.__file__).parent / "demo" / "model"


def test_a_model_described_by_the_card_is_described_as_the_deployed_one() -> None:
    bundle = load_bundle(_MODEL)
    card = parse_card(json.loads(json.dumps(card_document(bundle, description="the next one"))))
    described = describe_model(bundle.plans, bundle.dataset_json, bundle.label_manager, card)
    assert described.labels == bundle.labels
    assert described.contract == bundle.contract
    assert described.quality == bundle.quality
    assert (card.licence, card.origin, card.step_size) == (bundle.licence, bundle.origin, bundle.step_size)
    assert card.description == "the next one"
    assert (card.name, card.semver) == (None, None)
