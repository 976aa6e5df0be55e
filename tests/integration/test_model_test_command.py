"""`seggate models test` and what `seggate check` says of learning.toml."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.learning_checks import check_learning
from gateway.settings import load_settings
from tests.support.config_folder import write_config
from tests.support.intensity_model import PHANTOM_BANDS, SWAPPED_BANDS, Band, write_intensity_bundle
from tests.support.locked_dataset import DIM_BANDS, LABELS, write_locked

PLAN = "[models.change_plan]\nleast_locked_cases = 3\nmax_runtime_ratio = 1000\n"


def _run(config: Path, *words: str) -> Result:
    ran = CliRunner().invoke(app, [*words, "--config", str(config)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def _import(config: Path, semver: str, bands: Mapping[str, Band], *words: str) -> None:
    folder = config.parent / f"made-{semver}"
    write_intensity_bundle(folder, name="phantom", bands=bands, semver=semver)
    assert _run(config, "models", "import", str(folder), *words).exit_code == 0


def _learning(config: Path, text: str) -> None:
    (config / "learning.toml").write_text(f'[[models]]\nname = "phantom"\non_drift = "nothing"\n{text}')


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gateway with a champion and three candidates; the last one imported is the candidate."""
    config = write_config(tmp_path_factory.mktemp("gateway"))
    _import(config, "1.0.0", PHANTOM_BANDS)
    _import(config, "1.1.0", SWAPPED_BANDS, "--candidate")
    _import(config, "1.2.0", DIM_BANDS, "--candidate")
    _import(config, "1.3.0", PHANTOM_BANDS, "--candidate")
    return config.parent


@pytest.fixture
def config(imported: Path, tmp_path: Path) -> Path:
    """A copy of that gateway with learning.toml and four locked cases."""
    shutil.copytree(imported, tmp_path / "gateway")
    config = tmp_path / "gateway" / "config"
    write_locked(config.parent / "locked", cases=4, bright=(0, 0, 0, 72))
    _learning(config, f'locked = "locked"\n{PLAN}')
    return config


@pytest.mark.requirement("ART-23")
def test_the_exit_code_is_the_verdict(config: Path) -> None:
    accepted = _run(config, "models", "test", "phantom", "--json")
    assert accepted.exit_code == 0, accepted.output
    document = json.loads(accepted.stdout)
    assert (document["verdict"], document["semver"], document["champion"]["semver"]) == ("ACCEPTED", "1.3.0", "1.0.0")
    assert document["requested_by"].startswith("user:")
    assert document["change"] == "import"
    rejected = _run(config, "models", "test", "phantom", "1.1.0", "--change", "fine-tuning", "--json")
    assert rejected.exit_code == 1
    assert json.loads(rejected.stdout)["verdict"] == "REJECTED"
    _learning(config, f'locked = "locked"\n{PLAN}allowed = ["import"]\n')
    outside = _run(config, "models", "test", "phantom", "1.1.0", "--change", "fine-tuning", "--json")
    assert outside.exit_code == 3
    assert json.loads(outside.stdout)["verdict"] == "OUTSIDE_PLAN"


@pytest.mark.requirement("ART-23")
def test_a_person_reads_figures_reasons_and_looks_and_keeps_a_note(config: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    ran = _run(config, "models", "test", "phantom", "1.2.0", "--report", str(note))
    assert ran.exit_code == 1
    assert "Dice, right structure" in ran.stdout
    assert "rejected: mean Dice: " in ran.stderr
    assert "4 locked cases of locked, look number 1" in ran.stderr
    assert "phantom 1.2.0: REJECTED, compared with 1.0.0, which serves" in ran.stderr
    assert note.read_text().startswith("# phantom 1.2.0: REJECTED\n")
    assert "look number 2" in _run(config, "models", "test", "phantom", "1.2.0").stderr


def test_what_cannot_be_examined_is_said_and_has_no_verdict(config: Path) -> None:
    (config.parent / "locked" / "labelsTr" / "case_02.nii.gz").unlink()
    ran = _run(config, "models", "test", "phantom", "--json")
    assert ran.exit_code == 1
    document = json.loads(ran.stdout)
    assert (document["ok"], "verdict" in document) == (False, False)
    assert "case_02" in document["error"]
    nowhere = _run(config, "models", "test", "phantom", "--report", str(config / "nowhere" / "x.md"))
    assert nowhere.exit_code == 2


def test_without_a_candidate_a_version_must_be_named(config: Path) -> None:
    ran = CliRunner().invoke(app, ["models", "test", "nobody", "--config", str(config)])
    assert ran.exit_code == 1
    assert "name one: `seggate models test nobody SEMVER`" in str(ran.exception)


def _findings(config: Path) -> list[tuple[str, str]]:
    return [(str(f.status), f.detail) for f in check_learning(load_settings(config))]


def _trained(config: Path, *folds: str) -> None:
    folder = config.parent / "trained"
    folder.mkdir()
    (folder / "plans.json").write_text("{}")
    for fold in folds:
        (folder / f"fold_{fold}").mkdir()
        (folder / f"fold_{fold}" / "checkpoint_final.pth").touch()


def test_a_model_that_can_learn_is_well(config: Path) -> None:
    _trained(config, "0", "3")
    write_locked(config.parent / "raw", cases=5, first=100)
    names = {f"case_{index:02}": "site a" for index in range(4)}
    (config.parent / "locked" / "strata.json").write_text(json.dumps(names))
    _learning(config, f'trained = "trained"\ndataset = "raw"\nlocked = "locked"\n{PLAN}')
    said = "phantom: trained folds 0, 3, 5 cases to train on, 4 locked cases in 1 strata"
    assert _findings(config) == [("ok", said)]
    ran = _run(config, "check", "--json")
    assert ["ok", said] in [[c["status"], c["detail"]] for c in json.loads(ran.stdout)["checks"]]


@pytest.mark.parametrize(
    ("learning", "status", "words"),
    [
        ('locked = "nowhere"\n', "failed", "locked = 'nowhere': dataset.json: cannot be read"),
        ("", "warning", "no `locked` cases: every new version will be OUTSIDE_PLAN"),
        ('locked = "locked"\n[models.change_plan]\nleast_locked_cases = 9\n', "failed", "has 4 cases; change_plan"),
        ('locked = "other"\n', "failed", "labels left structure = 1, right structure = 2, third = 3; phantom 1.0.0"),
        ('trained = "nowhere"\ndataset = "raw"\n', "failed", "trained = 'nowhere' is no model folder of nnU-Net"),
        ('trained = "empty"\ndataset = "raw"\n', "failed", "trained = 'empty' has no finished fold"),
        (
            'trained = "trained"\ndataset = "raw"\n[models.fine_tuning]\nfolds = ["4"]\n',
            "failed",
            "fine_tuning.folds: 4: not among the finished folds, which are 0",
        ),
        ('trained = "trained"\ndataset = "locked"\nlocked = "locked"\n', "failed", "is what is trained on"),
        ('trained = "trained"\ndataset = "torn"\n', "failed", "case_01: case_01.nii.gz is missing"),
    ],
)
def test_what_is_wrong_with_learning_toml_is_told_with_the_place(
    config: Path, learning: str, status: str, words: str
) -> None:
    root = config.parent
    _trained(config, "0")
    (root / "empty").mkdir()
    (root / "empty" / "plans.json").write_text("{}")
    write_locked(root / "raw", cases=2, first=100)
    write_locked(root / "torn", cases=2, first=100)
    (root / "torn" / "labelsTr" / "case_01.nii.gz").unlink()
    others: dict[str, Any] = {"labels": {**LABELS, "third": 3}}
    write_locked(root / "other", cases=4, **others)
    _learning(config, learning)
    assert any(found == status and words in detail for found, detail in _findings(config)), _findings(config)


def test_a_model_that_is_not_registered_or_cannot_learn_is_told(config: Path) -> None:
    (config / "learning.toml").write_text('[[models]]\nname = "liver"\n[[models]]\nname = "phantom"\n')
    found = _findings(config)
    assert any(s == "failed" and "learning.toml names 'liver', which is not registered" in d for s, d in found)
    assert any(s == "warning" and "on_drift = 'fine-tune' needs `trained`" in d for s, d in found)
    (config / "learning.toml").unlink()
    assert _findings(config) == []
