"""The start-up check: what died halfway is finished, what somebody did by hand is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete

from gateway.learning.promotion import promote, roll_back, serve_first
from gateway.learning.registration import register_bundle
from gateway.learning.registry_check import ALARM, check_model, check_registry
from gateway.learning.serving import open_period
from storage import ledger
from storage.alarms import open_alarms
from storage.database import Database
from storage.learning_records import ServingPeriod
from storage.models import CHAMPION, PREVIOUS, ModelRegistry
from tests.support.versions import PLAN, register_versions, write_version

pytestmark = pytest.mark.requirement("ART-22")


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def registry(models_folder: Path) -> ModelRegistry:
    return ModelRegistry(models_folder)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    found.create_all()
    yield found
    found.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model of this test alone: the registry is shared."""
    return str(request.node.name).replace("_", "-")[:60]


def two_versions(database: Database, registry: ModelRegistry, folder: Path, name: str) -> None:
    """1.1.0 serves, 1.0.0 served before."""
    register_versions(database, registry, folder, name, "1.0.0", "1.1.0")
    promote(database, registry, name, "1.1.0", actor="user:x", plan=PLAN, force=True, reason="a test")


def aliases(registry: ModelRegistry, name: str) -> dict[str, str]:
    return {alias: model.semver for model in registry.versions(name) for alias in model.aliases}


def alarms(database: Database, name: str) -> list[str]:
    with database.reading() as session:
        return [a.message for a in open_alarms(session) if (a.kind, a.subject) == (ALARM, ledger.model_subject(name))]


def test_a_registry_as_it_was_left_is_in_order(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    two_versions(database, registry, tmp_path, name)
    assert check_model(database, registry, name) == ""
    roll_back(database, registry, name, actor="user:x", reason="a test")
    assert check_model(database, registry, name) == ""
    assert alarms(database, name) == []


def test_an_intent_whose_aliases_were_not_moved_is_finished(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0")
    monkeypatch.setattr("gateway.learning.promotion.settle", lambda *_: False)  # it died after its transaction
    promote(database, registry, name, "1.1.0", actor="user:x", plan=PLAN, force=True, reason="a test")
    assert registry.champion(name).semver == "1.0.0"
    assert name not in check_registry(database, registry)
    assert aliases(registry, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}
    assert alarms(database, name) == []


def test_an_alias_that_was_moved_by_hand_is_alarmed_until_it_is_put_back(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    two_versions(database, registry, tmp_path, name)
    registry.serve(name, "1.0.0", previous=None)
    for _ in range(2):
        assert "someone moved it by hand" in check_registry(database, registry)[name]
    [alarm] = alarms(database, name)
    assert "the alias champion is at 1.0.0, and 1.1.0 was promoted" in alarm
    assert registry.champion(name).semver == "1.0.0"  # a person decides
    promote(database, registry, name, "1.1.0", actor="user:x", plan=PLAN)  # what the alarm says
    assert check_model(database, registry, name) == ""
    assert alarms(database, name) == []


def test_a_previous_that_was_moved_by_hand_is_alarmed(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    register_versions(database, registry, tmp_path, name, "1.0.0", "1.1.0", "1.2.0")
    promote(database, registry, name, "1.1.0", actor="user:x", plan=PLAN, force=True, reason="a test")
    registry.serve(name, "1.1.0", previous="1.2.0")
    assert "the alias previous is at 1.2.0, and 1.1.0 followed 1.0.0" in check_model(database, registry, name)


@pytest.mark.parametrize("alias", [CHAMPION, PREVIOUS])
def test_an_alias_that_is_gone_is_set_again_as_the_ledger_says(
    database: Database, registry: ModelRegistry, tmp_path: Path, alias: str
) -> None:
    name = f"gone-{alias}"
    two_versions(database, registry, tmp_path, name)
    registry._mlflow().delete_registered_model_alias(name, alias)
    assert check_model(database, registry, name) == ""
    assert aliases(registry, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}


def test_a_version_that_was_deleted_is_alarmed_and_may_be_imported_again(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    two_versions(database, registry, tmp_path, name)
    champion = registry.champion(name)
    registry._mlflow().delete_model_version(name, str(champion.registry_version))
    assert "1.1.0 was registered and is not there any more" in check_model(database, registry, name)
    bundle = write_version(tmp_path / "again", name, "1.1.0", edge=460)
    assert bundle.weights_digest == champion.weights_digest
    register_bundle(database, registry, bundle, candidate=False, actor="user:x")
    assert check_model(database, registry, name) == ""
    assert aliases(registry, name) == {CHAMPION: "1.1.0", PREVIOUS: "1.0.0"}


def test_what_is_restored_serves_only_if_it_is_what_is_to_serve(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    """The models folder is lost, the database is not: versions come back in any order."""
    register_versions(database, registry, tmp_path / "a", name, "1.0.0", "1.1.0")
    promote(database, registry, name, "1.1.0", actor="user:x", plan=PLAN, force=True, reason="a test")
    fresh = ModelRegistry(tmp_path / "models")
    older = write_version(tmp_path / "b", name, "1.0.0", edge=450)
    newer = write_version(tmp_path / "b", name, "1.1.0", edge=460)
    assert register_bundle(database, fresh, older, candidate=False, actor="user:x").state == "candidate"
    assert "1.1.0" in check_model(database, fresh, name)
    assert register_bundle(database, fresh, newer, candidate=False, actor="user:x").state == CHAMPION
    assert check_model(database, fresh, name) == ""
    assert aliases(fresh, name)[PREVIOUS] == "1.0.0"


def test_a_champion_from_before_there_were_periods_is_adopted_if_the_ledger_says_the_same(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    two_versions(database, registry, tmp_path, name)
    with database.session() as session:
        session.execute(delete(ServingPeriod))
    assert check_model(database, registry, name) == ""
    with database.reading() as session:
        period = open_period(session, name)
    assert period is not None
    assert (period.model_version, period.previous_version, period.began_by) == ("1.1.0", "1.0.0", "user:x")


def test_a_champion_that_the_ledger_does_not_know_is_alarmed(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    bundle = write_version(tmp_path, name, "1.0.0")
    register_bundle(database, registry, bundle, candidate=True, actor="user:x")
    registry.promote(name, "1.0.0")
    assert "1.0.0 serves and the ledger knows no promotion of it" in check_model(database, registry, name)
    assert len(alarms(database, name)) == 1
    # Importing it again, as the alarm says, is a decision of a person.
    assert register_bundle(database, registry, bundle, candidate=False, actor="user:x").state == CHAMPION
    assert check_model(database, registry, name) == ""
    assert alarms(database, name) == []


def test_a_first_version_whose_import_died_before_its_alias_serves_after_the_check(
    database: Database, registry: ModelRegistry, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_version(tmp_path, name, "1.0.0")
    register_bundle(database, registry, bundle, candidate=True, actor="user:x")
    with monkeypatch.context() as patched:
        patched.setattr("gateway.learning.promotion.settle", lambda *_: False)
        serve_first(database, registry, name, "1.0.0", actor="user:x")
    assert aliases(registry, name) == {"candidate": "1.0.0"}
    assert check_model(database, registry, name) == ""
    assert aliases(registry, name) == {CHAMPION: "1.0.0"}
