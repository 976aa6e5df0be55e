"""engine.baseline_extraction: every case once, and none again after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engine import baseline_extraction
from engine.baseline_extraction import FOLDER, extract_baseline
from engine.dataset import Case, DatasetJson, LoadedCase, read_case
from engine.errors import DatasetInvalid, InputRejected
from engine.experiment import Experiment, open_experiment
from engine.intensity_baseline import baseline_text, label_volumes_ml, summarize_study
from tests.support.tiny_experiment import planned


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planned")
    planned(root)
    return root


@pytest.fixture
def experiment(root: Path) -> Experiment:
    opened = open_experiment(root / "Dataset901_Tiny", root / "preprocessed", plans_name=None)
    for path in (opened.folder / FOLDER).glob("*.json"):
        path.unlink()
    return opened


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that were read."""
    names: list[str] = []

    def counting(case: Case, dataset_json: DatasetJson) -> LoadedCase:
        names.append(case.name)
        return read_case(case, dataset_json)

    monkeypatch.setattr(baseline_extraction, "read_case", counting)
    return names


def test_each_study_is_what_its_files_give_and_none_is_named(experiment: Experiment) -> None:
    steps: list[tuple[int, int]] = []
    baseline = extract_baseline(experiment, processes=1, progress=lambda done, total: steps.append((done, total)))
    assert (baseline.cases, baseline.labels) == (6, ("first", "second"))
    assert steps[-1] == (6, 6)
    loaded = read_case(experiment.dataset.cases[2], experiment.dataset.json)
    assert baseline.studies[2] == summarize_study(
        loaded.volume, loaded.labels, baseline.channels, label_volumes_ml(loaded.labels, [(1,), (2,)])
    )
    assert "case_0" not in baseline_text(baseline)


def test_several_processes_give_the_same(experiment: Experiment) -> None:
    alone = extract_baseline(experiment, processes=1)
    for path in (experiment.folder / FOLDER).glob("*.json"):
        path.unlink()
    assert extract_baseline(experiment, processes=2) == alone


def test_after_an_interruption_only_what_is_missing_torn_or_changed_is_read(
    experiment: Experiment, reads: list[str]
) -> None:
    whole = extract_baseline(experiment, processes=1)
    reads.clear()
    folder = experiment.folder / FOLDER
    (folder / "case_01.json").unlink()
    (folder / "case_03.json").write_text((folder / "case_03.json").read_text()[:50])
    image = experiment.dataset.cases[4].channels[0]
    os.utime(image, ns=(0, 0))
    assert extract_baseline(experiment, processes=1) == whole
    assert reads == ["case_01", "case_03", "case_04"]


def test_a_case_that_cannot_be_read_is_named(experiment: Experiment) -> None:
    label = experiment.dataset.cases[5].label
    content = label.read_bytes()
    try:
        label.write_bytes(b"no image")
        with pytest.raises(InputRejected, match="case_05"):
            extract_baseline(experiment, processes=1)
    finally:
        label.write_bytes(content)


def test_a_fingerprint_of_other_channels_is_refused(experiment: Experiment) -> None:
    path = experiment.folder / "dataset_fingerprint.json"
    content = path.read_text()
    fingerprint = json.loads(content)
    channels = fingerprint["foreground_intensity_properties_per_channel"]
    channels["1"] = channels["0"]
    try:
        path.write_text(json.dumps(fingerprint))
        with pytest.raises(DatasetInvalid, match=r"1 channel\(s\), the fingerprint has 2"):
            extract_baseline(experiment, processes=1)
    finally:
        path.write_text(content)
