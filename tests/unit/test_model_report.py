"""engine.model_report: one file, whichever of several commands writes it."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.dataset import read_dataset_json
from engine.metrics import SUMMARY, summarize, write_summary_document
from engine.model_report import REPORT, write_report
from tests.support.raw_datasets import write_dataset


def test_two_writers_of_one_report_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = read_dataset_json(write_dataset(tmp_path / "Dataset001_A", cases=1) / "dataset.json")
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__2d"
    model.mkdir()
    written, both = Path.write_text, threading.Barrier(2, timeout=30)

    def write_and_wait(self: Path, text: str, encoding: str) -> int:
        length = written(self, text, encoding=encoding)
        both.wait()
        return length

    monkeypatch.setattr(Path, "write_text", write_and_wait)
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write_report, model, described) for _ in range(2)]
        assert [writer.result() for writer in writers] == [model / REPORT] * 2
    assert [path.name for path in model.iterdir()] == [REPORT]
    assert "first, second" in (model / REPORT).read_text()


def test_the_fold_all_is_left_out_of_the_means_of_the_labels_and_that_is_said(tmp_path: Path) -> None:
    """It was trained on what it validates."""
    described = read_dataset_json(write_dataset(tmp_path / "Dataset001_A", cases=1) / "dataset.json")
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__2d"
    for fold, dice in (("0", 0.5), ("all", 0.9)):
        (model / f"fold_{fold}" / "validation").mkdir(parents=True)
        metrics = {key: {"Dice": dice, "HD95": 1.0, "SurfaceDice": 1.0} for key in ("1", "2")}
        case = {"reference_file": "a", "prediction_file": "a", "metrics": metrics}
        write_summary_document(model / f"fold_{fold}" / "validation" / SUMMARY, summarize([case]))
    page = write_report(model, described).read_text()
    assert "<td>first</td><td>1</td><td>0.5</td>" in page
    assert "fold <code>all</code> is left out" in page
    shutil.rmtree(model / "fold_all")
    assert "left out of these means" not in write_report(model, described).read_text()
