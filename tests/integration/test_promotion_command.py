"""`seggate models promote|rollback|compare|history`, and what importing a later version does."""

from __future__ import annotations

import getpass
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.settings import Settings, load_settings
from gateway.state import open_database, open_registry, prepare_state
from tests.support.config_folder import write_config
from tests.support.intensity_model import Band, write_intensity_bundle
from tests.support.versions import add_report, add_shadow_runs, write_version

pytestmark = pytest.mark.requirement("ART-22")
NAME = "liver"
ONE_IN_SHADOW = f'[[models]]\nname = "{NAME}"\n[models.change_plan]\nshadow_studies = 1\n'


@pytest.fixture(autouse=True)
def without_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a registry and a database, which take seconds to make: tests work on copies."""
    folder = tmp_path_factory.mktemp("empty")
    config = write_config(folder)
    (config / "learning.toml").write_text(ONE_IN_SHADOW)
    settings = load_settings(config)
    prepare_state(settings).close()
    assert not open_registry(settings).all()
    return folder


@pytest.fixture(scope="module")
def imported(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 1.0.0, which serves, and 1.1.0, which waits, both imported by the command."""
    folder = tmp_path_factory.mktemp("imported") / "all"
    shutil.copytree(empty, folder)
    for number, semver in enumerate(("1.0.0", "1.1.0")):
        bundle = write_version(folder / "bundles", NAME, semver, edge=450 + 10 * number)
        assert run(folder / "config", "import", str(bundle.root)).exit_code == 0
    return folder


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Of a gateway with the versions above where the test asks for them, else of one without models."""
    template = request.getfixturevalue("imported" if "versions" in request.fixturenames else "empty")
    shutil.copytree(template, tmp_path / "all")
    return tmp_path / "all" / "config"


def run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["models", *words, "--config", str(config)])


def document(config: Path, *words: str, code: int = 0) -> Any:
    ran = run(config, *words, "--json")
    assert ran.exit_code == code, ran.output
    return json.loads(ran.stdout)


@pytest.fixture
def versions(config: Path) -> Settings:
    """1.0.0 serves and 1.1.0 waits."""
    return load_settings(config)


def examine(settings: Settings, *, requested_by: str = "user:requester") -> None:
    """What the gate and the shadow would write."""
    database = open_database(settings)
    model = open_registry(settings).get(NAME, "1.1.0")
    add_report(database, model, plan=settings.learning.of(NAME).change_plan, requested_by=requested_by)
    add_shadow_runs(database, model, "done", "done")
    database.close()


def states(config: Path) -> dict[str, str]:
    return {row["semver"]: row["state"] for row in document(config, "list")}


def test_a_later_version_waits_and_is_told_how_to_serve(config: Path, tmp_path: Path) -> None:
    first = write_version(tmp_path / "bundles", NAME, "1.0.0")
    assert "liver 1.0.0 serves" in run(config, "import", str(first.root)).output
    second = write_version(tmp_path / "bundles", NAME, "1.1.0", edge=600)
    imported = run(config, "import", str(second.root))
    assert imported.exit_code == 0
    assert "liver 1.1.0 is registered as candidate" in imported.output
    assert "`seggate models test liver 1.1.0`, then `seggate models promote liver 1.1.0`" in imported.output
    assert states(config) == {"1.0.0": "champion", "1.1.0": "candidate"}


def test_a_version_that_is_too_near_is_refused_with_the_one_to_use(config: Path, versions: Settings) -> None:
    folder = versions.state_dir / "new"
    for semver, why in (("1.1.1", "it has other weights, which is a MINOR step"), ("1.0.5", "versions only go up")):
        refused = run(config, "import", str(write_version(folder, NAME, semver, edge=700).root))
        assert refused.exit_code == 1
        assert why in refused.output
        assert "Give it the version 1.2.0" in refused.output
    bands = {"spleen": Band(low=200, high=500)}
    relabelled = write_intensity_bundle(folder / "labels", name=NAME, bands=bands, semver="1.2.0")
    refused = run(config, "import", str(relabelled.root))
    assert "Give it the version 2.0.0" in refused.output
    assert run(config, "import", str(write_version(folder, NAME, "1.2.0", edge=700).root)).exit_code == 0
    assert states(config) == {"1.0.0": "champion", "1.1.0": "retired", "1.2.0": "candidate"}


def test_the_registry_says_where_a_version_comes_from(config: Path, versions: Settings) -> None:
    shown = document(config, "show", NAME)
    provenance = shown["registry_provenance"]
    assert set(provenance) == {"plans_digest", "dataset_digest", "unknown"}
    assert provenance.pop("unknown").endswith("it has no provenance.json")
    assert all(len(digest) == 64 for digest in provenance.values())


def test_what_is_missing_is_listed_and_a_complete_version_is_promoted(config: Path, versions: Settings) -> None:
    refused = document(config, "promote", NAME, "1.1.0", code=1)
    assert not refused["ok"]
    assert len(refused["missing"]) == 2
    examine(versions)
    promoted = run(config, "promote", NAME, "1.1.0", "--reason", "better on the new scanner")
    assert promoted.exit_code == 0, promoted.output
    assert "liver 1.1.0 serves from now on, before it 1.0.0" in promoted.output
    assert states(config) == {"1.0.0": "previous", "1.1.0": "champion"}
    assert "serves already" in run(config, "promote", NAME, "1.1.0").output


@pytest.mark.requirement("ART-23", open="the suite itself, shadow running, the automatic rollback")
def test_who_asked_cannot_promote_not_even_behind_sudo(
    config: Path, versions: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine(versions, requested_by=f"user:{getpass.getuser()}")
    assert "another person" in run(config, "promote", NAME, "1.1.0").output
    monkeypatch.setenv("SUDO_USER", getpass.getuser())
    assert "another person" in run(config, "promote", NAME, "1.1.0").output
    # The account is the service's; who called sudo is another person.
    monkeypatch.setenv("SUDO_USER", "approver")
    assert run(config, "promote", NAME, "1.1.0").exit_code == 0
    event = document(config, "history", NAME)["events"][-1]
    assert event["actor"] == "user:approver"
    assert event["detail"]["system_user"] == getpass.getuser()


def test_forcing_needs_a_reason_and_is_seen_in_the_history(config: Path, versions: Settings) -> None:
    assert run(config, "promote", NAME, "1.1.0", "--force").exit_code == 1
    words = ["promote", NAME, "1.1.0", "--force", "--reason", "drill", "--by", "somebody"]
    assert document(config, *words) == {
        "ok": True,
        "name": NAME,
        "semver": "1.1.0",
        "weights_digest": open_registry(versions).get(NAME, "1.1.0").weights_digest,
        "before": "1.0.0",
        "registry": "as the ledger says",
    }
    history = run(config, "history", NAME)
    assert "user:somebody" in history.output
    assert "drill" in history.output
    assert "forced without" in " ".join(history.output.split())


def test_a_rollback_serves_the_version_before(config: Path, versions: Settings) -> None:
    assert run(config, "rollback", NAME).exit_code == 1
    run(config, "promote", NAME, "1.1.0", "--force", "--reason", "drill")
    back = document(config, "rollback", NAME, "--reason", "holds half of all")
    assert (back["semver"], back["before"]) == ("1.0.0", "1.1.0")
    assert states(config) == {"1.0.0": "champion", "1.1.0": "retired"}
    told = document(config, "history", NAME)
    assert [(p["semver"], p["rolled_back"]) for p in told["served"]] == [
        ("1.0.0", False),
        ("1.1.0", True),
        ("1.0.0", False),
    ]
    assert told["served"][1]["ended_why"] == "holds half of all"
    assert [e["kind"] for e in told["events"]] == [
        "model-imported",
        "model-promoted",
        "model-imported",
        "model-promoted",
        "model-rolled-back",
    ]
    assert "rolled back: holds half of all" in " ".join(run(config, "history", NAME).output.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("actor = 'user:another'", "event 4 (model-promoted) was changed"),
        ("detail = json_set(detail, '$.forced', json('false'))", "event 4 (model-promoted) was changed"),
    ],
)
def test_a_promotion_whose_row_was_tampered_with_is_found(
    config: Path, versions: Settings, change: str, said: str
) -> None:
    run(config, "promote", NAME, "1.1.0", "--force", "--reason", "drill")
    database = open_database(versions)
    with database.session() as session:
        session.execute(text(f"UPDATE ledger SET {change} WHERE sequence = 4"))
    database.close()
    verified = CliRunner().invoke(app, ["audit", "verify", f"model:{NAME}", "--config", str(config)])
    assert verified.exit_code == 1
    assert said in verified.output


def test_two_versions_are_compared(config: Path, versions: Settings) -> None:
    examine(versions)
    found = document(config, "compare", NAME, "1.0.0", "1.1.0")
    assert (found["change"], found["weights"]["same"], found["channels"]) == ("minor", False, None)
    assert found["labels"] == {"removed": [], "added": [], "changed": {}}
    assert found["gate"]["a"] is None
    assert found["gate"]["b"]["verdict"] == "ACCEPTED"
    assert found["shadow"]["b"] == {
        "studies": {"done": 2},
        "verdicts": {"pass": 2},
        "dice_to_champion": {"left structure": pytest.approx(0.91)},
    }
    assert {(f["name"], f["a"], f["b"]) for f in found["figures"]} == {
        ("dice", 0.9, 0.93),
        ("labels left structure dice", 0.91, 0.95),
    }
    backwards = document(config, "compare", NAME, "1.1.0", "1.0.0")
    assert {(f["name"], f["a"], f["b"]) for f in backwards["figures"]} >= {("dice", 0.93, 0.9)}
    shown = run(config, "compare", NAME, "1.0.0", "1.1.0")
    assert "from 1.0.0 (champion) to 1.1.0 (candidate): MINOR: other weights" in shown.output
    assert "ACCEPTED" in shown.output


def test_what_differs_in_labels_contract_and_thresholds_is_named(
    config: Path, versions: Settings, tmp_path: Path
) -> None:
    bands = {"left structure": Band(low=200, high=500, volume_range_ml=(1, 2)), "spleen": Band(low=500, high=800)}
    other = write_intensity_bundle(
        tmp_path / "other", name=NAME, bands=bands, semver="2.0.0", modalities=["CT"], min_confidence=0.7
    )
    assert run(config, "import", str(other.root)).exit_code == 0
    found = document(config, "compare", NAME, "1.0.0", "2.0.0")
    assert found["change"] == "major"
    assert (found["labels"]["removed"], found["labels"]["added"]) == (["right structure"], ["spleen"])
    assert found["labels"]["changed"]["left structure"]["volume_range_ml"] == {"a": None, "b": [1, 2]}
    assert found["contract"] == {"modalities": {"a": ["CT", "MR"], "b": ["CT"]}}
    assert found["configuration"] == {"quality min_confidence": {"a": 0.5, "b": 0.7}}
    shown = run(config, "compare", NAME, "1.0.0", "2.0.0")
    assert "MAJOR: other labels or channels" in shown.output
    assert "spleen" in shown.output


def test_what_is_not_known_is_named(config: Path, versions: Settings) -> None:
    assert run(config, "history", "nothing").exit_code == 1
    for words in (("promote", NAME, "9.9.9"), ("compare", NAME, "1.0.0", "9.9.9")):
        ran = run(config, *words)
        assert ran.exit_code == 1
        assert "no version 9.9.9" in str(ran.exception)
