"""Channels of a dataset: which series of a study is which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gateway.errors import Rejected
from gateway.training_data.source_scan import SourceSeries

# What nnU-Net normalises as CT is called so; other names say what a person would.
_NAMES = {"PT": "PET"}


@dataclass(frozen=True, kw_only=True)
class Channel:
    """`modality` and `description` (of SeriesDescription, with * and ?, without regard to capitals) say which series it
    is; None where they say nothing."""

    name: str
    modality: str | None = None
    description: str | None = None

    def takes(self, series: SourceSeries) -> bool:
        if self.modality is not None and series.modality.upper() != self.modality:
            return False
        return self.description is None or fnmatchcase(series.description.casefold(), self.description.casefold())


def channels_of_words(words: Sequence[str]) -> tuple[Channel, ...]:
    """From NAME, NAME=MODALITY or NAME=MODALITY:DESCRIPTION. Raises Rejected."""
    channels = []
    for word in words:
        match = re.fullmatch(r"([^=]+)(?:=([A-Za-z0-9_]{1,16}|\*)(?::(.+))?)?", word.strip())
        if match is None:
            raise Rejected(f"--channel {word[:80]!r}: NAME, NAME=MODALITY or NAME=MODALITY:DESCRIPTION is needed")
        name, modality, description = match.groups()
        channels.append(
            Channel(
                name=name.strip(),
                modality=None if modality in (None, "*") else modality.upper(),
                description=description,
            )
        )
    names = [channel.name for channel in channels]
    if len(set(names)) != len(names):
        raise Rejected("--channel: two channels have one name")
    return tuple(channels)


def channel_of_modality(modalities: Sequence[str]) -> Channel:
    """The only channel of series that are all of one modality. Raises Rejected when they are not."""
    counts = {modality: modalities.count(modality) for modality in sorted(set(modalities))}
    if len(counts) > 1:
        found = ", ".join(f"{modality or 'no modality'} ({count})" for modality, count in counts.items())
        raise Rejected(f"the labelled series are of several modalities: {found}; choose one, e.g. --channel CT=CT")
    (modality,) = counts
    return Channel(name=_NAMES.get(modality, modality) or "image")
