"""engine.model_report: one file, whichever of several commands writes it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.dataset import read_dataset_json
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
