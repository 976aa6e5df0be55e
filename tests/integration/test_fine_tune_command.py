"""`seggate train fine-tune`: what it answers, that it can be stopped, killed and paused, what its results serve for."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.peers import ROOT, require_peer

require_peer("torch")

import torch

from engine.result_folder import open_result
from engine.training_checkpoint import FINAL, LATEST, read_state
from engine.training_pause import PAUSE
from gateway.cli import app
from tests.support.tiny_experiment import NAME, planned, seggate, shown, write_bright
from tests.support.tiny_training import same_weights
from tests.support.waiting import wait_until

MODEL = f"{NAME}/nnUNetTrainer__nnUNetPlans__3d_fullres"
BASE = ("--epochs", "2", "--iterations", "2", "--deterministic", "--precision", "float32", "--threads", "1")
# Long enough to be stopped within.
TUNING = ("--epochs", "3", "--iterations", "4", "--deterministic", "--precision", "float32", "--threads", "1")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    ran = seggate(root, "train", str(planned(root)), *BASE)
    assert ran.exit_code == 0, ran.output
    write_bright(root / "new", cases=3)
    for path in sorted((root / "new").glob("*Tr/*")):
        path.rename(path.with_name(path.name.replace("case_", "new_")))
    return root


def words(trained: Path, results: Path, *more: str) -> list[str]:
    return [
        "train",
        "fine-tune",
        str(trained / "results" / MODEL),
        *("--cases", str(trained / "new")),
        *("--old", str(trained / NAME)),
        *("--preprocessed", str(trained / "preprocessed")),
        *("--results", str(results)),
        *("--processes", "1", "--no-probe"),
        *more,
    ]


def run(trained: Path, results: Path, *more: str) -> Result:
    return CliRunner().invoke(app, words(trained, results, *more))


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a fine-tuning that nobody interrupted."""
    results = tmp_path_factory.mktemp("tuned")
    ran = run(trained, results, *TUNING, "--json")
    assert ran.exit_code == 0, ran.output
    answer = shown(ran)
    assert (answer["ok"], answer["state"], answer["model"]) == (True, "finished", str(results / MODEL))
    assert [(row["fold"], row["state"], row["epochs"]) for row in answer["folds"]] == [
        ("0", "finished", 3),
        ("1", "finished", 3),
    ]
    return results


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", *command], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for(log: Path, line: str, process: subprocess.Popen[str]) -> None:
    def there() -> bool:
        assert process.poll() is None, f"ended before it said {line!r}"
        return log.exists() and line in log.read_text()

    wait_until(there, line, poll_s=0.01)


@pytest.mark.requirement("ART-21")
def test_stopped_killed_and_paused_it_ends_as_one_that_was_left_alone(
    trained: Path, tuned: Path, tmp_path: Path
) -> None:
    """SIGTERM: a checkpoint and exit code 0. SIGKILL while it is paused. Then the same command to the end."""
    command = words(trained, tmp_path, *TUNING, "--json")
    folder = tmp_path / MODEL / "fold_0"
    log = folder / "training_log.txt"
    with _running(command) as process:
        _wait_for(log, "begins at epoch 0", process)
        process.send_signal(signal.SIGTERM)
        answer, _ = process.communicate(timeout=120)
        assert process.returncode == 0
    assert json.loads(answer)["state"] == "stopped"
    assert (folder / LATEST).exists()
    (folder / PAUSE).touch()
    with _running(command) as process:
        _wait_for(log, "paused; it goes on when", process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=120) == -signal.SIGKILL
    (folder / PAUSE).unlink()
    with _running(command) as process:
        answer, _ = process.communicate(timeout=240)
        assert process.returncode == 0
    assert json.loads(answer)["state"] == "finished"
    for number in "01":
        one, other = (read_state(root / MODEL / f"fold_{number}" / FINAL) for root in (tmp_path, tuned))
        assert same_weights(one.weights, other.weights)


def test_status_and_selection_and_export_take_its_results_like_any_training(tuned: Path, tmp_path: Path) -> None:
    raw, preprocessed = tuned / "fine_tuning" / "raw" / NAME, tuned / "fine_tuning" / "preprocessed"
    status = CliRunner().invoke(app, ["train", "status", str(raw), "--results", str(tuned), "--json"])
    assert [row["state"] for row in shown(status)["folds"]] == ["finished", "finished"]
    where = ["--preprocessed", str(preprocessed), "--results", str(tuned), "--processes", "1", "--json"]
    selected = CliRunner().invoke(app, ["select", str(raw), *where])
    assert selected.exit_code == 0, selected.output
    out = ["--out", str(tmp_path / "bundle"), "--no-phantoms", "--no-calibration"]
    exported = CliRunner().invoke(app, ["export", str(raw), *out, *where])
    assert exported.exit_code == 0, exported.output
    assert shown(exported)["configurations"] == {"3d_fullres": ["0", "1"]}


def test_the_results_are_in_nnunets_layout(tuned: Path) -> None:
    with open_result(tuned / MODEL) as found:
        assert [fold.fold for fold in found.configurations[0].folds] == ["0", "1"]
        assert found.fingerprint_json is not None


def test_the_next_fine_tuning_finds_the_joined_dataset_by_itself(
    trained: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    write_bright(tmp_path / "later", cases=2)
    for path in sorted((tmp_path / "later").glob("*Tr/*")):
        path.rename(path.with_name(path.name.replace("case_", "later_")))
    command = ["train", "fine-tune", str(tuned / MODEL), "--cases", str(tmp_path / "later"), "--fold", "1"]
    ran = CliRunner().invoke(app, [*command, "--results", str(tmp_path / "out"), *BASE, "--no-probe", "--json"])
    assert ran.exit_code == 0, ran.output
    request = json.loads((tmp_path / "out" / MODEL / "fold_1" / "training.json").read_text())
    assert {"case_00", "new_00", "later_00"} <= set(request["train"])


def test_the_old_dataset_is_looked_for_where_nnunet_keeps_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "fine-tune", str(trained / "results" / MODEL), "--cases", str(trained / "new")]
    command += ["--results", str(tmp_path / "out"), "--fold", "0", *BASE, "--no-probe"]
    monkeypatch.delenv("nnUNet_raw", raising=False)
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 1
    assert "name its folder with --old" in ran.output
    monkeypatch.setenv("nnUNet_raw", str(trained))
    assert CliRunner().invoke(app, command).exit_code == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--epochs", "11"), "--epochs"),
        (("--rehearsal", "0.6"), "--rehearsal"),
        (("--budget", "soon"), "--budget 'soon'"),
        (("--budget", "1m", "--deterministic"), "exclude each other"),
    ],
)
def test_options_beyond_the_rule_are_wrong_usage(
    trained: Path, tmp_path: Path, more: tuple[str, ...], named: str
) -> None:
    ran = run(trained, tmp_path / "out", *more)
    assert ran.exit_code == 2
    assert named in ran.output
    assert not (tmp_path / "out").exists()


def test_other_labels_fail_with_the_reason(trained: Path, tmp_path: Path) -> None:
    document = json.loads((trained / "new" / "dataset.json").read_text())
    document["labels"] = {"background": 0, "one": 1, "other": 2}
    other = tmp_path / "other"
    write_bright(other, cases=1)
    (other / "dataset.json").write_text(json.dumps({**document, "numTraining": 1}))
    ran = run(trained, tmp_path / "out", "--json", "--cases", str(other))
    assert ran.exit_code == 1
    assert "MAJOR version" in shown(ran)["error"]
