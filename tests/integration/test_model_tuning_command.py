"""`seggate models tune`: a plan is measured, kept beside the model, told in the ledger, shown, and verified by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import select
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.settings import load_settings
from gateway.state import open_database
from storage.records import LedgerEvent
from tests.support.execution_plans import brightness_bundle
from tests.support.raw_datasets import write_dataset

QUICK = ("--device", "cpu", "--threads", "1", "--budget", "60s")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "gateway.toml").write_text('state_dir = "state"\n')
    brightness_bundle(tmp_path / "bundle", mirror_axes=(0,), sanity=True)
    assert _run(folder, "import", str(tmp_path / "bundle")).exit_code == 0
    return folder


def _run(config: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["models", *words, "--config", str(config)])


def test_a_plan_is_kept_shown_recorded_and_verified_by(config: Path) -> None:
    before = json.loads(_run(config, "show", "tiny", "--json").stdout)
    assert before["execution_plans"] == []
    assert "seggate models tune tiny" in _run(config, "show", "tiny").stdout
    tuned = _run(config, "tune", "tiny", "--backend", "openvino", *QUICK, "--json")
    assert tuned.exit_code == 0, tuned.output
    plan = json.loads(tuned.stdout)
    assert (plan["choice"]["runtime"], plan["choice"]["precision"], plan["origin"]) == ("openvino", "float32", "tuned")
    assert plan["cases"] == ["thick-slices", "plans-grid", "turned"]
    assert plan["in_force_here"]
    assert Path(plan["file"]).is_file()
    shown = json.loads(_run(config, "show", "tiny", "--json").stdout)["execution_plans"]
    assert [(p["choice"], p["in_force_here"]) for p in shown] == [(plan["choice"], True)]
    assert "Execution plan (tuned" in _run(config, "show", "tiny").stdout
    verified = json.loads(_run(config, "verify", "--json").stdout)
    assert verified[0]["sanity"]["runtime"].startswith("openvino")
    database = open_database(load_settings(config))
    with database.reading() as session:
        event = session.scalars(select(LedgerEvent).where(LedgerEvent.kind == "model-tuned")).one()
    database.close()
    assert event.detail["choice"] == "openvino on cpu, float32"
    assert event.detail["tolerance"] == 1e-4


def test_a_tolerance_tells_what_it_costs(config: Path) -> None:
    tuned = _run(config, "tune", "tiny", "--tolerance", "1e-2", "--mirroring", "none", *QUICK)
    assert tuned.exit_code == 0, tuned.output
    assert "the tolerance costs" in tuned.stderr
    assert "times as fast as" in tuned.stderr
    assert _run(config, "verify").exit_code == 0


def test_images_of_the_site_are_compared_on_and_their_names_are_not_kept(config: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "site", cases=1, shape=(5, 12, 12))
    tuned = _run(config, "tune", "tiny", "--cases", str(tmp_path / "site"), *QUICK, "--json")
    assert tuned.exit_code == 0, tuned.output
    assert "added-1" in json.loads(tuned.stdout)["cases"]


def test_a_worker_that_is_set_otherwise_will_not_use_it_and_that_is_said(config: Path) -> None:
    (config / "gateway.toml").write_text('state_dir = "state"\n[worker]\nthreads = 2\n')
    tuned = _run(config, "tune", "tiny", *QUICK)
    assert tuned.exit_code == 0, tuned.output
    assert "the worker will not use it: it takes 1 threads, and the settings say 2" in tuned.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--tolerance", "0.5"], 2, "--tolerance 0.5"),
        (["--tolerance", "1e-6"], 2, "--tolerance 1e-06"),
        (["--budget", "soon"], 2, "a time like 90s"),
        (["--backend", "tensorflow"], 2, "'tensorflow' is none of"),
        (["--backend", "openvino", "--device", "cuda"], 1, "nothing computes in float32"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_do(config: Path, words: list[str], code: int, said: str) -> None:
    tuned = _run(config, "tune", "tiny", *words)
    assert tuned.exit_code == code
    assert said in tuned.stderr
