"""Recognises results of a gateway that come back by auto-routing, so that they are never processed again (OUT-46).

The header alone decides: our own SOP Instance UIDs are known to the indexer besides, and another gateway's are not.
"""

from __future__ import annotations

from pydicom.dataset import Dataset

from gateway.results.identity import MANUFACTURER

_NAMES = ("Manufacturer", "ManufacturerModelName")
# What pydicom raises on damaged elements; a sequence that ends too early is an OSError.
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, NotImplementedError, EOFError, OSError)


def is_own_result(header: Dataset) -> str | None:
    """Why this object is a result of this or another gateway, or None.

    True for an object whose Manufacturer or Manufacturer's Model Name is ours, or that names us in its Contributing
    Equipment: nothing made from our results goes through a model either. Attributes that cannot be read do not count.
    """
    for keyword in _NAMES:
        if _is_ours(header, keyword):
            return f"{keyword} is {MANUFACTURER}"
    try:
        equipment = header.get("ContributingEquipmentSequence")
        items = list(equipment) if equipment is not None else []
    except _UNREADABLE:
        return None
    for item in items:
        for keyword in _NAMES:
            if isinstance(item, Dataset) and _is_ours(item, keyword):
                return f"ContributingEquipmentSequence names {MANUFACTURER} as {keyword}"
    return None


def _is_ours(dataset: Dataset, keyword: str) -> bool:
    if keyword not in dataset:
        return False
    try:
        value = dataset[keyword].value
    except _UNREADABLE:
        return False
    return str(value).strip(" \0").casefold() == MANUFACTURER
