"""Semantic versions of a model: what a change demands, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.bundle import Bundle
from engine.manifest import Channel
from gateway.errors import Rejected, meaning
from gateway.learning.versions import VersionRefused, check_step, kind_of_change, next_semver, step
from tests.support.intensity_model import Band, write_intensity_bundle

pytestmark = pytest.mark.requirement("ART-22")
OTHER_LABELS = {"left structure": Band(low=200, high=500), "middle": Band(low=500, high=800)}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_intensity_bundle(tmp_path_factory.mktemp("bundle") / "b", name="liver", semver="1.4.2")


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return write_intensity_bundle(folder, name="liver", bands=OTHER_LABELS, semver="1.4.3")


def _weights(bundle: Bundle, digest: str = "f" * 64) -> Bundle:
    return replace(bundle, weights_digest=digest)


def _named(bundle: Bundle, semver: str) -> Bundle:
    return replace(bundle, semver=semver)


def test_other_labels_or_channels_are_a_major_change(first: Bundle, relabelled: Bundle) -> None:
    assert kind_of_change(first, relabelled) == "major"
    assert next_semver(first, relabelled) == "2.0.0"
    renamed = replace(first, channels=(Channel(index=0, name="T2"),))
    more = replace(first, channels=(*first.channels, Channel(index=1, name="T2")))
    renumbered = replace(first, labels=(replace(first.labels[0], value=7, region=(7,)), *first.labels[1:]))
    for other in (renamed, more, renumbered):
        assert kind_of_change(first, other) == "major"


def test_other_weights_are_a_minor_change_and_anything_else_a_patch(first: Bundle) -> None:
    assert next_semver(first, _weights(first)) == "1.5.0"
    other_codes = replace(first, labels=tuple(replace(label, colour=(1, 2, 3)) for label in first.labels))
    other_contract = replace(first, contract=replace(first.contract, max_slices=99), configuration_digest="e" * 64)
    turned = replace(first, labels=first.labels[::-1])
    for other in (other_codes, other_contract, turned):
        assert kind_of_change(first, other) == "patch"
        assert next_semver(first, other) == "1.4.3"


def test_the_next_version_is_above_all_that_were_ever_registered(first: Bundle) -> None:
    assert next_semver(first, _weights(first), taken=["1.9.9", "1.10.0", "1.4.2"]) == "1.11.0"
    assert step("1.9.3", "minor") == "1.10.0"
    assert step("1.9.3", "major") == "2.0.0"


@pytest.mark.parametrize("semver", ["1.5.0", "1.6.0", "1.5.7", "2.0.0", "1.10.0"])
def test_a_step_as_large_as_the_change_or_larger_is_taken(first: Bundle, semver: str) -> None:
    check_step(first, _named(_weights(first), semver), taken=["1.0.0", "1.4.2"])


@pytest.mark.parametrize(
    ("semver", "why"),
    [
        ("1.4.3", "compared with 1.4.2 it has other weights, which is a MINOR step"),
        ("1.4.1", "1.4.2 is registered already, and versions only go up"),
        ("0.9.0", "versions only go up"),
    ],
)
def test_a_step_that_is_too_small_or_backwards_is_refused_with_the_version_to_use(
    first: Bundle, semver: str, why: str
) -> None:
    with pytest.raises(VersionRefused, match=why) as refused:
        check_step(first, _named(_weights(first), semver), taken=["1.0.0", "1.4.2"])
    assert refused.value.instead == "1.5.0"
    assert "--semver 1.5.0" in str(refused.value)
    assert meaning(refused.value) is Rejected


def test_other_labels_need_a_major_step(first: Bundle, relabelled: Bundle) -> None:
    with pytest.raises(VersionRefused, match=r"other labels or channels, which is a MAJOR step.* 2\.0\.0"):
        check_step(first, _named(relabelled, "1.5.0"), taken=["1.4.2"])
    check_step(first, _named(relabelled, "2.0.0"), taken=["1.4.2"])


def test_without_a_readable_earlier_version_the_order_still_counts(first: Bundle) -> None:
    check_step(None, first, taken=[])
    check_step(None, first, taken=["1.4.1"])
    with pytest.raises(VersionRefused, match=r"1\.5\.0 is registered already"):
        check_step(None, first, taken=["1.4.1", "1.5.0"])


def test_a_version_that_was_lost_is_not_given_twice(first: Bundle) -> None:
    """The newest bundle that can be read is older than the highest version."""
    with pytest.raises(VersionRefused, match=r"2\.0\.0 is registered already.* 2\.1\.0"):
        check_step(first, _named(_weights(first), "1.5.0"), taken=["1.4.2", "2.0.0"])


def test_the_rule_holds_for_bundles_that_are_loaded(tmp_path: Path, first: Bundle) -> None:
    same = write_intensity_bundle(tmp_path / "b", name="liver", semver="1.4.3", min_confidence=0.4)
    assert kind_of_change(first, same) == "patch"
    swapped = write_intensity_bundle(
        tmp_path / "s",
        name="liver",
        bands={
            "left structure": Band(low=100, high=500, laterality="left", pair="right structure"),
            "right structure": Band(low=500, high=800, laterality="right", pair="left structure"),
        },
        semver="1.5.0",
    )
    assert kind_of_change(first, swapped) == "minor"
