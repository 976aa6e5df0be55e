"""nnU-Net's post-processing, from its JSON form (nnU-Net v2). Its pickle is never read.

The function names of the file are looked up in a list here; nothing is imported by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine.errors import BundleInvalid

KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"
"""nnU-Net's function; ours, which nnU-Net does not have, keeps `count` of them."""
KEEP_SEVERAL = "keep_largest_components"
KNOWN_ARGUMENTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        KEEP_LARGEST: frozenset({"labels_or_regions", "background_label"}),
        KEEP_SEVERAL: frozenset({"labels_or_regions", "background_label", "count"}),
    }
)
MAX_COMPONENTS = 1000
_MAX_STEPS = 1000
_FULL_CONNECTIVITY = np.ones((3, 3, 3), dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class KeepLargest:
    """Keeps the `count` largest components of the union of `values`; the rest of the union becomes `background`.

    Components touch by faces, edges or corners. Components as large as the last one that is kept are kept too.
    """

    values: tuple[int, ...]
    background: int = 0
    count: int = 1

    def apply(self, labels: NDArray[Any]) -> None:
        """Changes the label map (Z, Y, X) in place."""
        mask = np.isin(labels, self.values)
        boxes = ndimage.find_objects(mask.astype(np.uint8))
        if not boxes or boxes[0] is None:
            return
        part, inside = labels[boxes[0]], mask[boxes[0]]
        components, count = ndimage.label(inside, structure=_FULL_CONNECTIVITY)
        if count <= self.count:
            return
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        kept = sizes >= np.partition(sizes, -self.count)[-self.count]
        part[inside & ~kept[components]] = self.background


def read_postprocessing(document: Mapping[str, Any] | None) -> tuple[KeepLargest, ...]:
    """The steps of postprocessing.json, in order; none without a document.

    Raises BundleInvalid with the key for an unknown function or argument, or a list of the wrong length or type.
    """
    if document is None:
        return ()
    functions, arguments = document.get("postprocessing_fns"), document.get("postprocessing_kwargs")
    if not isinstance(functions, list) or not isinstance(arguments, list) or len(functions) != len(arguments):
        raise BundleInvalid(
            "postprocessing.json: postprocessing_fns and postprocessing_kwargs must be lists alike long"
        )
    if len(functions) > _MAX_STEPS:
        raise BundleInvalid(f"postprocessing.json: {len(functions)} steps; at most {_MAX_STEPS}")
    return tuple(
        _step(function, argument, index)
        for index, (function, argument) in enumerate(zip(functions, arguments, strict=True))
    )


def apply_postprocessing(labels: NDArray[Any], steps: Sequence[KeepLargest]) -> None:
    """Applies the steps in order, in place, to a label map (Z, Y, X)."""
    for step in steps:
        step.apply(labels)


def _step(function: object, argument: object, index: int) -> KeepLargest:
    where = f"postprocessing.json: step {index + 1}"
    if not isinstance(function, str) or function not in KNOWN_ARGUMENTS:
        raise BundleInvalid(f"{where}: function {str(function)[:80]!r} is unknown; known: {', '.join(KNOWN_ARGUMENTS)}")
    known = KNOWN_ARGUMENTS[function]
    if not isinstance(argument, dict) or not set(argument) <= known:
        raise BundleInvalid(f"{where}: only {', '.join(sorted(known))} are known arguments")
    count = argument.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_COMPONENTS:
        raise BundleInvalid(f"{where}: count {str(count)[:40]!r} is no number from 1 to {MAX_COMPONENTS}")
    values: list[int] = []
    pending = [argument.get("labels_or_regions")]
    while pending:
        item = pending.pop(0)
        if isinstance(item, list):
            pending = [*item, *pending]
        else:
            values.append(_label_value(item, where))
    if not values:
        raise BundleInvalid(f"{where}: labels_or_regions names no label")
    background = _label_value(argument.get("background_label", 0), where)
    return KeepLargest(values=tuple(dict.fromkeys(values)), background=background, count=count)


def _label_value(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 65534:
        raise BundleInvalid(f"{where}: {str(value)[:40]!r} is no label value")
    return value
