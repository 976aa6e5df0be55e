"""The registry: versions never change, the champion is always exactly one."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import ModelChanged, ModelMissing
from storage.models import CANDIDATE, CHAMPION, PREVIOUS, ModelRegistry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> ModelRegistry:
    return ModelRegistry(tmp_path_factory.mktemp("models"))


def _bundle(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text(content)
    return folder


def _register(registry: ModelRegistry, bundle: Path, name: str, semver: str, digest: str, *, serve: bool) -> None:
    registry.register(
        bundle,
        name=name,
        semver=semver,
        weights_digest=digest,
        configuration_digest="c" * 64,
        licence="CC0",
        description="test",
        serve=serve,
    )


def test_first_model_serves_and_the_next_one_waits_as_candidate(registry: ModelRegistry, tmp_path: Path) -> None:
    _register(registry, _bundle(tmp_path / "1", "one"), "liver", "1.0.0", "a" * 64, serve=True)
    _register(registry, _bundle(tmp_path / "2", "two"), "liver", "1.1.0", "b" * 64, serve=False)
    assert registry.champion("liver").semver == "1.0.0"
    assert registry.get("liver", "1.1.0").aliases == (CANDIDATE,)
    assert (registry.champion("liver").folder / "bundle.json").read_text() == "one"

    registry.promote("liver", "1.1.0")
    assert registry.champion("liver").semver == "1.1.0"
    assert registry.get("liver", "1.0.0").state == PREVIOUS
    assert [m.semver for m in registry.all() if CHAMPION in m.aliases] == ["1.1.0"]


def test_registering_the_same_content_again_is_free(registry: ModelRegistry, tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "b", "x")
    _register(registry, bundle, "spleen", "1.0.0", "a" * 64, serve=True)
    _register(registry, bundle, "spleen", "1.0.0", "a" * 64, serve=True)
    assert len(registry.versions("spleen")) == 1


def test_a_version_never_changes_its_content(registry: ModelRegistry, tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "b", "x")
    _register(registry, bundle, "kidney", "1.0.0", "a" * 64, serve=True)
    with pytest.raises(ModelChanged, match="choose a new version number"):
        _register(registry, bundle, "kidney", "1.0.0", "f" * 64, serve=True)


@pytest.mark.parametrize(
    ("name", "semver"),
    [("../x", "1.0.0"), ("x", "1.0"), ("x", "v1.0.0"), ("x", "1.0.0-rc.1"), ("x", "1.0.0\n"), ("X", "1.0.0")],
)
def test_malformed_names_and_versions_are_refused(
    registry: ModelRegistry, tmp_path: Path, name: str, semver: str
) -> None:
    with pytest.raises(ValueError, match="use "):
        _register(registry, _bundle(tmp_path / "b", "x"), name, semver, "a" * 64, serve=True)


def test_a_model_that_is_not_there_is_named(registry: ModelRegistry) -> None:
    with pytest.raises(ModelMissing, match="'nothing'"):
        registry.champion("nothing")
