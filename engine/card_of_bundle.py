"""The card of a model that is deployed, for the next version of it: what a person once said about it stays said."""

from __future__ import annotations

from typing import Any

from engine.bundle import Bundle
from engine.manifest import manifest_document

_LABEL_KEYS = ("category", "type", "laterality", "pair", "colour", "volume_range_ml")


def card_document(bundle: Bundle, *, description: str | None = None) -> dict[str, Any]:
    """The content of a card (engine/model_card.py) from which a model with the same labels and channels gets the codes,
    sides, colours, limits and contract of `bundle`. Name and version are not in it."""
    document = manifest_document(bundle, bundle.root)
    labels = {label["name"]: {key: label[key] for key in _LABEL_KEYS} for label in document["labels"]}
    return {
        **({} if description is None else {"description": description}),
        "licence": bundle.licence,
        "origin": bundle.origin,
        "step_size": bundle.step_size,
        "contract": document["contract"],
        "labels": labels,
        "quality": document["quality"],
    }
