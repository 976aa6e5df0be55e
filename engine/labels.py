"""What the heads of an nnU-Net network mean: labels, regions and the ignore label, from dataset.json.

Shape legend: K heads, Z Y X voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ImportRefused
from engine.json_reader import Reader

LabelMap = NDArray[np.unsignedinteger[Any]]
"""A label map, uint8 or uint16."""

_MAX_LABEL = 65534  # label maps are at most uint16, and one value stays free
_MAX_LABELS = 4096


@dataclass(frozen=True, kw_only=True)
class Label:
    """A foreground label: `value` is what the label map holds; `region` are the label values that belong to it.

    Without regions `region == (value,)`. With regions, voxels of the region are those whose value is in `region`.
    """

    name: str
    value: int
    region: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LabelManager:
    """The rules of dataset.json's `labels`. `foreground` is in the order of declaration (regions) or as declared
    (labels); `values` are all label values that a map may hold, background first."""

    foreground: tuple[Label, ...]
    values: tuple[int, ...]
    has_regions: bool
    regions_class_order: tuple[int, ...] | None
    ignore_label: int | None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> LabelManager:
        """Raises ImportRefused with the label's name when nnU-Net's rules are broken: background is 0, values are
        consecutive, `ignore` is the highest, `regions_class_order` has one entry per region."""
        dataset = Reader(dataset_json, where="dataset.json", error=ImportRefused)
        labels = dataset.child("labels")
        declared: dict[str, tuple[int, ...]] = {}
        for name in labels.keys():  # noqa: SIM118 - Reader is no mapping; keys() checks each key
            if len(declared) >= _MAX_LABELS:
                raise dataset.fail("labels", f"more than {_MAX_LABELS}")
            labels.check_text("label name", name)
            value = labels.raw(name)
            if isinstance(value, list | tuple):
                declared[name] = labels.integers(name, 0, _MAX_LABEL, lengths=(1, _MAX_LABELS))
            else:
                declared[name] = (labels.check_integer(name, value, 0, _MAX_LABEL),)
        if declared.get("background") != (0,):
            raise labels.fail("background", "must be there and be 0")
        ignore_label = _ignore_label(labels, declared)
        has_regions = any(len(region) > 1 for region in declared.values())
        values = tuple(sorted({value for name, r in declared.items() if name != "ignore" for value in r}))
        if values != tuple(range(len(values))):
            raise dataset.fail("labels", f"values must be 0, 1, 2, ... without gaps; found {list(values)[:50]}")
        if len(values) < 2:
            raise dataset.fail("labels", "there is no foreground")
        regions = {name: region for name, region in declared.items() if name != "ignore" and any(region)}
        if not has_regions:
            scalars = [region[0] for region in regions.values()]
            if len(set(scalars)) != len(scalars):
                raise dataset.fail("labels", "two names have the same value")
            return cls(
                foreground=tuple(Label(name=n, value=r[0], region=r) for n, r in regions.items()),
                values=values,
                has_regions=False,
                regions_class_order=None,
                ignore_label=ignore_label,
            )
        order = _class_order(dataset, regions)
        return cls(
            foreground=tuple(
                Label(name=name, value=value, region=region)
                for (name, region), value in zip(regions.items(), order, strict=True)
            ),
            values=values,
            has_regions=True,
            regions_class_order=order,
            ignore_label=ignore_label,
        )

    @property
    def num_heads(self) -> int:
        """Channels of the network's output: regions, or labels including background; never the ignore label."""
        return len(self.foreground) if self.has_regions else len(self.values)

    @property
    def foreground_labels(self) -> tuple[int, ...]:
        """All label values but background and ignore, ascending: what a cascade one-hot encodes."""
        return self.values[1:]

    @property
    def highest_value(self) -> int:
        """The highest value that a reference or a result may hold, the ignore label included."""
        return max(*self.values, *(self.regions_class_order or (0,)), self.ignore_label or 0)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Type of a label map that holds every value (nnU-Net: uint8 while all values are below 255)."""
        highest = max(*self.values, *(self.regions_class_order or (0,)))
        return np.uint8 if highest < 255 else np.uint16

    def logits_to_labels(self, logits_KZYX: NDArray[np.floating[Any]]) -> LabelMap:
        """Label map (Z, Y, X) or, for (K, Y, X) input, (Y, X). Labels: the highest head wins, the lowest index in a
        tie. Regions: sigmoid above 0.5, that is logit above 0; later regions overwrite earlier ones."""
        self._check_heads(logits_KZYX)
        if not self.has_regions:
            # Values are consecutive from 0, so the index of the head is the value.
            winners: LabelMap = np.argmax(logits_KZYX, axis=0).astype(self.dtype)
            return winners
        labels: LabelMap = np.zeros(logits_KZYX.shape[1:], dtype=self.dtype)
        for head, label in zip(logits_KZYX, self.foreground, strict=True):
            labels[head > 0] = label.value
        return labels

    def probabilities(self, logits_KZYX: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Same shape as the logits, float32: softmax over the heads, or sigmoid per region."""
        self._check_heads(logits_KZYX)
        logits = logits_KZYX.astype(np.float32)
        if self.has_regions:
            # The split by sign keeps exp() from overflowing.
            decay = np.exp(-np.abs(logits))
            above = np.where(logits >= 0, np.float32(1.0), decay)
            result: NDArray[np.float32] = (above / (np.float32(1.0) + decay)).astype(np.float32)
            return result
        logits -= logits.max(axis=0, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=0, keepdims=True)
        return logits

    def probabilities_to_labels(self, probabilities_KZYX: NDArray[np.floating[Any]]) -> LabelMap:
        """As `logits_to_labels`, from probabilities (regions: above 0.5)."""
        if self.has_regions:
            return self.logits_to_labels(probabilities_KZYX - np.float32(0.5))
        return self.logits_to_labels(probabilities_KZYX)

    def _check_heads(self, array_KZYX: NDArray[np.floating[Any]]) -> None:
        if array_KZYX.shape[0] != self.num_heads:
            raise ValueError(f"{array_KZYX.shape[0]} heads where the labels need {self.num_heads}")


def _class_order(dataset: Reader, regions: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The value that is written for each region, in the order of the regions: one of the region's own values, and no
    value twice, so that a label map still says which region a voxel is in."""
    order = dataset.integers("regions_class_order", 0, _MAX_LABEL, lengths=(0, _MAX_LABELS))
    if len(order) != len(regions):
        raise dataset.fail("regions_class_order", f"{len(order)} values for {len(regions)} regions")
    for index, ((name, region), value) in enumerate(zip(regions.items(), order, strict=True)):
        if value not in region:
            problem = f"{value} for region {name!r} is none of its values {list(region)[:50]}"
            raise dataset.fail("regions_class_order", problem)
        if value in order[:index]:
            raise dataset.fail("regions_class_order", f"{value} is given twice; each region needs a value of its own")
    return order


def _ignore_label(labels: Reader, declared: Mapping[str, tuple[int, ...]]) -> int | None:
    if "ignore" not in declared:
        return None
    ignore = declared["ignore"]
    others = [value for name, region in declared.items() if name != "ignore" for value in region]
    if len(ignore) != 1 or ignore[0] != max(others) + 1 or isinstance(labels.raw("ignore"), list | tuple):
        raise labels.fail("ignore", f"must be one value, the highest label plus 1 ({max(others) + 1})")
    return ignore[0]
