"""`seggate train --all`: from images to a bundle, whatever happens in between, and the profile `article` in whole."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.known_cases import of_labels
from tests.support.peers import ROOT, require_peer

require_peer("torch")

import torch

from engine.bundle import load_bundle
from engine.training_checkpoint import BEST, FINAL, read_state
from tests.support.tiny_experiment import NAME, planned, seggate, shown, write_bright
from tests.support.tiny_training import same_weights

SHORT = ("--epochs", "2", "--iterations", "2", "--precision", "float32", "--threads", "1", "--deterministic")
ARTICLE = f"results/{NAME}/nnUNetTrainerArticle__nnUNetArticlePlans__"


@pytest.fixture(scope="module", autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _all(root: Path, raw: Path, *words: str) -> Any:
    ran = seggate(root, "train", "--all", str(raw), *words, "--json")
    assert ran.exit_code == 0, ran.output
    return shown(ran)


def _figures(document: Any) -> Any:
    """What must not depend on interruptions."""
    selection = document["selection"]
    return selection["labels"], selection["foreground_mean"], sorted(selection["candidates"].values())


@pytest.mark.requirement("ART-13", open="a GPU")
def test_killed_in_the_middle_and_started_again_it_ends_with_the_same_figures_and_weights(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    expected = _all(whole, planned(whole), *SHORT)
    assert expected["state"] == "finished"
    assert len(expected["folds"]) == 4
    assert set(expected["selection"]["candidates"]) >= {
        "nnUNetTrainer__nnUNetPlans__2d",
        "nnUNetTrainer__nnUNetPlans__3d_fullres",
    }
    assert load_bundle(Path(expected["bundle"])).calibration is None
    assert any(note.startswith("6 cases were validated; an estimate of quality") for note in expected["notes"])

    killed = tmp_path / "killed"
    raw = planned(killed)
    model = killed / "results" / NAME / "nnUNetTrainer__nnUNetPlans__2d"
    _kill_when(killed, raw, lambda: "epoch 0" in _text(model / "fold_1" / "training_log.txt"))
    assert not (model / "fold_1" / FINAL).exists()
    _kill_when(killed, raw, lambda: (model / "crossval_results_folds_0_1").exists())
    found = _all(killed, raw, *SHORT)
    assert _figures(found) == _figures(expected)
    assert found["weights_digest"] == expected["weights_digest"]
    assert _all(killed, raw, *SHORT)["weights_digest"] == expected["weights_digest"]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _kill_when(root: Path, raw: Path, happened: Any) -> None:
    """SIGKILL to `train --all` in a process of its own, once something happened."""
    words = ["train", "--all", str(raw), *SHORT, "--no-probe", "--results", str(root / "results")]
    words += ["--preprocessed", str(root / "preprocessed"), "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not happened():
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
        finally:
            process.kill()


def test_a_folder_of_images_is_planned_first_and_each_model_gets_a_bundle_of_its_own(tmp_path: Path) -> None:
    raw = write_bright(tmp_path / NAME, cases=4, shape=(8, 14, 14))
    names = [f"case_{index:02}" for index in range(4)]
    (raw / "splits_final.json").write_text(json.dumps([{"train": names[1:], "val": names[:1]}]))
    words = ("--epochs", "1", "--iterations", "1", "--configuration", "2d", "--precision", "float32")
    found = _all(tmp_path, raw, *words)
    assert (tmp_path / "preprocessed" / NAME / "nnUNetPlans.json").exists()
    assert load_bundle(Path(found["bundle"])).final_configurations[0].name == "2d"
    again = _all(tmp_path, raw, *words)
    assert again["bundle"] == found["bundle"]
    assert "was there already, of these very networks" in again["notes"][-1]
    # The same figures by other weights.
    shutil.rmtree(next((tmp_path / "results").rglob("fold_0")))
    other = _all(tmp_path, raw, *words, "--seed", "3")
    assert (found["semver"], other["semver"]) == ("1.0.0", "1.1.0")
    assert Path(other["bundle"]) == Path(found["bundle"]).with_name("1.1.0")
    assert other["weights_digest"] != found["weights_digest"]
    assert "1.0.0 is of other networks: this is 1.1.0" in other["notes"]
    assert _all(tmp_path, raw, *words, "--seed", "3")["bundle"] == other["bundle"]


@pytest.mark.parametrize(
    ("where", "trained"),
    [
        ("gateway.commands.train_all.plan_folder", False),
        ("gateway.commands.select.select_trained", True),
        ("gateway.commands.export.extract_baseline", True),
        ("gateway.commands.export.calibrate_bundle", True),
    ],
)
def test_a_signal_outside_of_the_training_ends_it_there_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, trained: bool
) -> None:
    raw, words = planned(tmp_path), ("--configuration", "2d", *SHORT)
    if not trained:
        shutil.rmtree(tmp_path / "preprocessed")
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def told_to_stop(*_: Any, **__: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    with monkeypatch.context() as patched:
        patched.setattr(where, told_to_stop)
        found = _all(tmp_path, raw, *words)
    assert found["state"] == "stopped"
    assert bool(found["folds"]) == trained
    assert not list((tmp_path / "results").rglob("bundle.json"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    if trained:
        monkeypatch.setattr("gateway.commands.export.calibrate_bundle", lambda *_, **__: of_labels())
        again = _all(tmp_path, raw, *words)
        assert again["state"] == "finished"
        assert load_bundle(Path(again["bundle"])).calibration is None


@pytest.mark.parametrize(
    ("where", "trained"),
    [("gateway.commands.train_all.plan_folder", False), ("gateway.commands.export.extract_baseline", True)],
)
def test_train_stop_and_status_know_a_run_that_trains_no_fold_at_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, trained: bool
) -> None:
    raw, words = planned(tmp_path), ("--configuration", "2d", *SHORT)
    if not trained:
        shutil.rmtree(tmp_path / "preprocessed")
    said: list[str] = []

    def ask_and_wait(*_: Any, **__: Any) -> Any:
        said.append(seggate(tmp_path, "train", "status", str(raw)).stderr)
        assert seggate(tmp_path, "train", "stop", str(raw)).exit_code == 0
        threading.Event().wait(60)
        raise AssertionError("went on")

    with monkeypatch.context() as patched:
        patched.setattr(where, ask_and_wait)
        found = _all(tmp_path, raw, *words)
    assert (found["state"], bool(found["folds"])) == ("stopped", trained)
    assert "plans, selects or exports" in said[0]
    assert seggate(tmp_path, "train", "stop", str(raw)).exit_code == 1


@pytest.mark.requirement("ART-05")
@pytest.mark.requirement("ART-10")
@pytest.mark.requirement("ART-11")
@pytest.mark.requirement("ART-12")
def test_the_profile_article_from_hold_out_to_the_ensemble_of_everything(tmp_path: Path) -> None:
    raw = planned(tmp_path, profile="article", cases=20, shape=(16, 18, 20))
    words = ("--profile", "article", "--patience", "2", "--epochs", "8", "--iterations", "4", *SHORT[4:])
    found = _all(tmp_path, raw, *words)
    for configuration in ("2d", "3d_fullres"):
        for fold in ("fold_0", "fold_1"):
            _check_fold(tmp_path / f"{ARTICLE}{configuration}" / fold)
    bundle = load_bundle(Path(found["bundle"]))
    assert {c.name: len(c.folds) for c in bundle.configurations} == {"2d": 2, "3d_fullres": 2}
    assert bundle.ensemble == "probabilities-of-folds"
    assert found["selection"]["selected"] == ["2d", "3d_fullres"]


def _check_fold(folder: Path) -> None:
    request = json.loads((folder / "training.json").read_text())
    train, held_out, val = (set(request[key]) for key in ("train", "hold_out", "val"))
    assert (len(train), len(held_out), len(val)) == (9, 1, 10)
    assert not train & held_out
    assert not (train | held_out) & val
    epochs = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    scores = [epoch["score"] for epoch in epochs]
    for epoch in epochs:
        whole = epoch["hold_out"]
        assert epoch["score"] == pytest.approx(0.7 * (1 - whole["dice"]) + 0.3 * whole["hd95_mm"] / 10)
    best = scores.index(min(scores))
    assert len(epochs) == 8 or len(epochs) - 1 - best == 2
    stored = read_state(folder / BEST)
    assert stored.epoch == best + 1
    assert same_weights(read_state(folder / FINAL).weights, stored.weights)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--all", "--fold", "0"], "it needs no --fold"),
        (["--all", "--profile", "article", "--no-keep-logits"], "needs their logits"),
        (["--patience", "3"], "--patience needs a hold-out"),
        (["--no-calibration"], "--no-calibration needs --all"),
    ],
)
def test_options_that_do_not_go_together_end_with_2(tmp_path: Path, words: list[str], named: str) -> None:
    ran = seggate(tmp_path, "train", *words, str(tmp_path))
    assert ran.exit_code == 2
    assert named in ran.stderr
