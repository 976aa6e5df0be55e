"""Bundles of one dataset: which is made of what, and what version the next one has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.bundle_versions import MadeOf, find_bundle, next_version, note_bundle

FIRST = MadeOf(interface="labels", weights={"2d/0": "w0", "2d/1": "w1"}, joining="by mean")


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of the weights in a bundle, by its folder's name; "its" unless a test says otherwise."""
    found: dict[str, str] = {}

    def load(root: Path, *, verify: bool = True) -> Any:
        return SimpleNamespace(root=root, weights_digest=found.get(root.name, "its"))

    monkeypatch.setattr("engine.bundle_versions.load_bundle", load)
    return found


def _add(folder: Path, version: str, made: MadeOf, *, calibrates: bool = True) -> None:
    (folder / version).mkdir(parents=True)
    (folder / version / "bundle.json").touch()
    bundle: Any = SimpleNamespace(root=folder / version, weights_digest="its")
    note_bundle(bundle, made, calibrates=calibrates)


@pytest.mark.parametrize(
    ("wanted", "version", "why"),
    [
        (replace(FIRST, weights={"2d/0": "w0", "2d/1": "other"}), "1.3.0", "is of other networks"),
        (replace(FIRST, weights={"2d/0": "w0"}), "1.3.0", "is of other networks"),
        (replace(FIRST, joining="by logits"), "1.2.1", "joined or post-processed otherwise"),
        (replace(FIRST, interface="more labels"), "2.0.0", "other labels or channels"),
    ],
)
def test_the_next_version_says_what_changed(
    tmp_path: Path, digests: dict[str, str], wanted: MadeOf, version: str, why: str
) -> None:
    assert next_version(tmp_path, FIRST) == ("1.0.0", "")
    _add(tmp_path, "1.2.0", FIRST)
    assert find_bundle(tmp_path, wanted) is None
    found = next_version(tmp_path, wanted)
    assert found[0] == version
    assert f"1.2.0 {why}" in found[1].replace("has the same networks, ", "").replace("has ", "")


def test_the_latest_bundle_made_of_just_that_is_found(tmp_path: Path, digests: dict[str, str]) -> None:
    for version, made in (("1.9.0", FIRST), ("1.10.0", FIRST), ("1.11.0", replace(FIRST, joining="other"))):
        _add(tmp_path, version, made)
    found = find_bundle(tmp_path, FIRST)
    assert found is not None
    assert found.root.name == "1.10.0"
    assert next_version(tmp_path, FIRST)[0] == "1.11.1"


def test_a_bundle_for_which_no_calibration_was_tried_is_not_that_of_whoever_wants_one(
    tmp_path: Path, digests: dict[str, str]
) -> None:
    _add(tmp_path, "1.0.0", FIRST, calibrates=False)
    assert find_bundle(tmp_path, FIRST) is not None
    assert find_bundle(tmp_path, FIRST, calibrates=True) is None
    assert next_version(tmp_path, FIRST) == ("1.0.1", "1.0.0 was made without a calibration")
    _add(tmp_path, "1.0.1", FIRST)
    for calibrates in (False, True):
        found = find_bundle(tmp_path, FIRST, calibrates=calibrates)
        assert found is not None
        assert found.root.name == "1.0.1"


def test_a_bundle_that_was_exchanged_or_never_noted_is_nobodys(tmp_path: Path, digests: dict[str, str]) -> None:
    _add(tmp_path, "1.0.0", FIRST)
    digests["1.0.0"] = "another's"
    assert find_bundle(tmp_path, FIRST) is None
    assert next_version(tmp_path, FIRST) == ("1.1.0", "nobody noted what 1.0.0 was made of")


def test_a_bundle_that_was_removed_is_not_found(tmp_path: Path, digests: dict[str, str]) -> None:
    _add(tmp_path, "1.0.0", FIRST)
    (tmp_path / "1.0.0" / "bundle.json").unlink()
    (tmp_path / "1.0.0").rmdir()
    assert find_bundle(tmp_path, FIRST) is None
    assert next_version(tmp_path, FIRST) == ("1.0.0", "")
