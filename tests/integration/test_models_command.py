"""`seggate models`: what is imported serves only when it is safe to, and every change of what serves is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.demo.story import model_folder
from gateway.settings import load_settings
from gateway.state import open_database
from storage.records import LedgerEvent


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "gateway.toml").write_text('state_dir = "state"\n')
    return folder


def _run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["models", *words, "--config", str(config)])


def _events(config: Path) -> list[str]:
    database = open_database(load_settings(config))
    with database.reading() as session:
        kinds = list(session.scalars(select(LedgerEvent.kind).order_by(LedgerEvent.event_id)))
    database.close()
    return kinds


@pytest.mark.requirement("INF-35", open="licence enforced, GPU named")
def test_a_bundle_is_imported_listed_shown_and_verified(config: Path) -> None:
    assert _run(config, "import", str(model_folder())).exit_code == 0
    listed = json.loads(_run(config, "list", "--json").stdout)
    assert [(m["name"], m["semver"], m["state"]) for m in listed] == [("hippocampus-mr", "1.0.0", "champion")]
    shown = json.loads(_run(config, "show", "hippocampus-mr", "--json").stdout)
    assert shown["contract"]["orientation"] == "RAS"
    assert shown["weights_digest"] == listed[0]["weights_digest"]
    assert _run(config, "verify").exit_code == 0
    assert _events(config) == ["model-imported", "model-promoted"]


def test_importing_the_same_again_changes_nothing(config: Path) -> None:
    for _ in range(2):
        assert _run(config, "import", str(model_folder())).exit_code == 0
    assert _events(config) == ["model-imported", "model-promoted"]


@pytest.mark.requirement("INF-35", open="licence enforced, GPU named")
def test_a_changed_weight_file_is_found(config: Path) -> None:
    assert _run(config, "import", str(model_folder())).exit_code == 0
    weights = next(load_settings(config).models_dir.rglob("*.onnx"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    verified = _run(config, "verify", "--json")
    assert verified.exit_code == 1
    assert weights.name in json.loads(verified.stdout)[0]["verdict"]


def test_options_that_would_change_a_finished_bundle_are_refused(config: Path) -> None:
    refused = _run(config, "import", str(model_folder()), "--name", "other")
    assert refused.exit_code == 2
    assert json.loads(_run(config, "list", "--json").stdout) == []


def test_a_bundle_that_was_changed_is_not_imported(config: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_folder(), tmp_path / "copy")
    (copy / "plans.json").write_text("{}")
    refused = _run(config, "import", str(copy))
    assert refused.exit_code == 1
    assert "plans.json" in refused.output


@pytest.mark.peer("torch", "shared-data")
@pytest.mark.requirement("ART-13", open="a GPU")
def test_a_model_of_unknown_voxel_order_waits_until_it_is_stated(config: Path, shared_root: Path) -> None:
    folder = shared_root / "models" / "Dataset004_Hippocampus" / "nnUNetTrainer__nnUNetSmallPlans__2d"
    unstated = _run(config, "import", str(folder), "--name", "hippo", "--json")
    assert unstated.exit_code == 0
    document = json.loads(unstated.stdout)
    assert document["state"] == "candidate"
    assert any("orientation" in note for note in document["notes"])
    assert _run(config, "show", "hippo").exit_code == 1

    stated = _run(config, "import", str(folder), "--name", "hippo", "--semver", "1.0.1", "--orientation", "RAS")
    assert stated.exit_code == 0
    assert "hippo 1.0.1 serves from now on" in stated.output


def test_what_is_not_a_model_is_refused_with_the_reason(config: Path, tmp_path: Path) -> None:
    assert _run(config, "import", str(tmp_path / "absent")).exit_code == 1
    (tmp_path / "empty").mkdir()
    refused = _run(config, "import", str(tmp_path / "empty"))
    assert refused.exit_code == 1
    assert "not imported" in refused.output
