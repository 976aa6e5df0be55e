"""Semantic versions of a model: what a new version must be called, given what has changed (ART-22).

    MAJOR  other labels or other input channels: who reads the results must look again
    MINOR  other weights
    PATCH  the same weights; contract, codes, post-processing, thresholds or evidence may differ

Versions of a model only go up, and no number is given twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from engine.bundle import Bundle
from engine.manifest import semver_numbers
from gateway.errors import Rejected

Change = Literal["major", "minor", "patch"]
_SIZES: dict[Change, str] = {"major": "MAJOR", "minor": "MINOR", "patch": "PATCH"}
_WHY: dict[Change, str] = {
    "major": "has other labels or channels",
    "minor": "has other weights",
    "patch": "has the same labels, channels and weights",
}


class VersionRefused(Rejected):
    """A bundle's version is not higher than those that are registered, or its step is smaller than the change.

    `instead` is the lowest version that would be taken.
    """

    def __init__(self, message: str, *, instead: str) -> None:
        super().__init__(message)
        self.instead = instead


def kind_of_change(before: Bundle, after: Bundle) -> Change:
    """What makes `after` another model than `before`. Order and codes of labels are no part of their set; the order of
    channels matters."""
    if _labels(before) != _labels(after) or _channels(before) != _channels(after):
        return "major"
    return "minor" if before.weights_digest != after.weights_digest else "patch"


def step(semver: str, change: Change) -> str:
    """The version after `semver` for a change of that kind."""
    major, minor, patch = semver_numbers(semver)
    if change == "major":
        return f"{major + 1}.0.0"
    return f"{major}.{minor + 1}.0" if change == "minor" else f"{major}.{minor}.{patch + 1}"


def next_semver(champion: Bundle, candidate: Bundle, *, taken: Iterable[str] = ()) -> str:
    """The version of a candidate that is to follow a champion; `taken` are all that were ever registered."""
    return step(max((champion.semver, *taken), key=semver_numbers), kind_of_change(champion, candidate))


def check_step(newest: Bundle | None, candidate: Bundle, *, taken: Iterable[str]) -> None:
    """Raises VersionRefused unless the candidate's version is above all that are `taken` and as far above the `newest`
    bundle's as the change between the two demands.

    Compared with the newest alone: each step was as large as its change, so the sum of them is, too. `newest` is None
    where the files of no earlier version can be read; then only the order counts.
    """
    highest = max(taken, key=semver_numbers, default=None)
    if highest is None:
        return
    if newest is None:
        if semver_numbers(candidate.semver) <= semver_numbers(highest):
            raise _refused(
                candidate, f"{highest} is registered already, and versions only go up", step(highest, "minor")
            )
        return
    change = kind_of_change(newest, candidate)
    instead = step(highest, change)
    if semver_numbers(candidate.semver) <= semver_numbers(highest):
        raise _refused(candidate, f"{highest} is registered already, and versions only go up", instead)
    if semver_numbers(candidate.semver) < semver_numbers(step(newest.semver, change)):
        raise _refused(
            candidate, f"compared with {newest.semver} it {_WHY[change]}, which is a {_SIZES[change]} step", instead
        )


def _refused(candidate: Bundle, why: str, instead: str) -> VersionRefused:
    return VersionRefused(
        f"{candidate.name} {candidate.semver} is not taken: {why}. Give it the version {instead}: export it again with "
        f"--semver {instead} (an nnU-Net model: import it with --semver {instead})",
        instead=instead,
    )


def _labels(bundle: Bundle) -> frozenset[tuple[str, int, tuple[int, ...]]]:
    return frozenset((label.name, label.value, label.region) for label in bundle.labels)


def _channels(bundle: Bundle) -> tuple[str, ...]:
    return tuple(channel.name for channel in bundle.channels)
