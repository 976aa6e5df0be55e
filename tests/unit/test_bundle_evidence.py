"""engine.evidence and engine.backend_figures: what a bundle says beside its networks, and which digest covers it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import backend_figures
from engine.backend_figures import (
    REFERENCE,
    BackendFigure,
    BackendFigures,
    figures_document,
    read_figures,
    running_backends,
    this_machine,
)
from engine.bundle import Bundle, load_bundle, write_bundle
from engine.errors import BackendFailed, BundleInvalid
from engine.evidence import Evidence, write_evidence
from engine.intensity_baseline import IntensityBaseline, choose_bins, make_baseline, summarize_study
from engine.provenance import Provenance, data_origin
from gateway.demo.make_model import MODEL
from tests.support.invented_study import invented_study

FIGURE = BackendFigure(
    configuration="3d_fullres",
    fold="0",
    backend="onnxruntime",
    version="1.0",
    provider="cpu",
    precision="float32",
    threads=0,
    max_abs_difference=1e-6,
    argmax_agreement=1.0,
    seconds_per_window=0.01,
)


def _baseline(labels: list[str]) -> IntensityBaseline:
    bins = choose_bins(["MRI"], ["zscore"], [(0.0, 1.0)])
    return make_baseline(bins, labels, [summarize_study(*invented_study(), bins, (0.1, 0.2))])


def _evidence(seconds: float = 0.01) -> Evidence:
    return Evidence(
        baseline=_baseline(["Anterior", "Posterior"]),
        provenance=Provenance(
            data=data_origin({}, {}, [], dataset_name="Hippocampus"), training=(), exported_by="seggate 0.1.0"
        ),
        backends=BackendFigures(machine=this_machine(), figures=(replace(FIGURE, seconds_per_window=seconds),)),
    )


def _written(root: Path, evidence: Evidence) -> Bundle:
    """The demo model's bundle with this evidence."""
    shutil.copytree(
        MODEL, root, ignore=shutil.ignore_patterns("sanity", "baseline.json", "provenance.json", "backend*")
    )
    write_evidence(root, evidence)
    bundle = load_bundle(MODEL)
    files = tuple(
        replace(c, folds=tuple(replace(f, file=root / f.file.relative_to(bundle.root)) for f in c.folds))
        for c in bundle.configurations
    )
    documents = {f"{key}_json": json.loads((root / f"{key}.json").read_text()) for key in ("plans", "dataset")}
    return write_bundle(root.resolve(), replace(bundle, configurations=files), **documents)


def test_evidence_is_written_and_read_back(tmp_path: Path) -> None:
    assert _written(tmp_path / "b", _evidence()).evidence == _evidence()


def test_times_and_provenance_change_no_configuration_and_the_baseline_does(tmp_path: Path) -> None:
    first, slower = _written(tmp_path / "a", _evidence()), _written(tmp_path / "b", _evidence(seconds=0.02))
    assert slower.weights_digest == first.weights_digest
    assert slower.configuration_digest == first.configuration_digest
    assert slower.evidence_digest != first.evidence_digest
    without = _written(tmp_path / "c", replace(_evidence(), baseline=None))
    assert without.configuration_digest != first.configuration_digest
    assert without.evidence_digest == first.evidence_digest


def test_a_changed_byte_of_evidence_is_refused(tmp_path: Path) -> None:
    root = _written(tmp_path / "b", _evidence()).root
    for name in ("baseline.json", "provenance.json", "backends.json"):
        content = (root / name).read_text()
        (root / name).write_text(content + " ")
        with pytest.raises(BundleInvalid, match=f"{name}: SHA-256"):
            load_bundle(root)
        (root / name).write_text(content)


def test_a_baseline_of_other_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match="labels and channels are not those"):
        _written(tmp_path / "b", Evidence(baseline=_baseline(["first", "second"])))


@pytest.mark.requirement("ART-13", open="a GPU")
def test_only_backends_that_run_are_measured_and_the_reference_must_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Works:
        def close(self) -> None: ...

    def works(*_: Any, **__: Any) -> Any:
        return Works()

    def fails(*_: Any, **__: Any) -> Any:
        raise BackendFailed("no such device")

    monkeypatch.setattr(backend_figures, "BACKENDS", {REFERENCE: works, "other": fails, "third": works})
    assert len(list(running_backends(tmp_path, channels=1, patch_size=(2, 2)))) == 2
    monkeypatch.setattr(backend_figures, "BACKENDS", {REFERENCE: fails, "other": works})
    with pytest.raises(BackendFailed, match="no such device"):
        list(running_backends(tmp_path, channels=1, patch_size=(2, 2)))


def test_the_machine_is_described_and_not_named() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_gib > 0
    assert machine.system.startswith("Linux")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seconds_per_window", -1),
        ("argmax_agreement", 2),
        ("max_abs_difference", "x"),
        ("threads", -1),
        ("backend", ""),
    ],
)
def test_a_figure_of_wrong_type_or_range_is_refused_with_its_key(key: str, value: object) -> None:
    document = figures_document(BackendFigures(machine=this_machine(), figures=(FIGURE,)))
    assert read_figures(document, error=BundleInvalid).figures == (FIGURE,)
    document["figures"][0][key] = value
    with pytest.raises(BundleInvalid, match=key):
        read_figures(document, error=BundleInvalid)
