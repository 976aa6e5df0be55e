"""`seggate models`: what is imported serves only when it is safe to, and every change of what serves is recorded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from typer.testing import CliRunner, Result

from engine.bundle import Bundle, load_bundle, write_bundle
from engine.evidence import Evidence, write_evidence
from engine.onnx_backend import OnnxBackend
from engine.phantom_planning import plan_phantoms
from engine.predictor import Predictor
from engine.sanity_cases import SanityCase, SanitySuite, image_digest, write_case
from engine.sanity_phantom import make_phantom
from gateway.cli import app
from gateway.demo.story import model_folder
from gateway.settings import load_settings
from gateway.state import open_database
from storage.records import LedgerEvent
from tests.support.raw_datasets import write_dataset


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


@pytest.fixture
def with_sanity(tmp_path: Path) -> Path:
    """The demo model's networks in a bundle that expects of itself, in one sanity case, what they give."""
    root = Path(shutil.copytree(model_folder(), tmp_path / "with-sanity", ignore=shutil.ignore_patterns("sanity")))
    bundle = _written(root, Evidence())
    with Predictor(bundle, device="cpu", threads=1) as predictor:
        phantom = dict(plan_phantoms(bundle))["thick-slices"]
        volume = make_phantom(phantom)
        found = predictor.predict(volume)
    case = SanityCase(
        name="thick-slices",
        phantom=phantom,
        image_sha256=image_digest(volume),
        geometry=None,
        voxels={segment.name: segment.voxels for segment in found.segments},
        dice=None,
    )
    write_case(root, case, found.labels.array, image=None, reference=None)
    _written(root, Evidence(sanity=SanitySuite(computed_by="a test", cases=(case,))))
    return root


def _written(root: Path, evidence: Evidence) -> Bundle:
    """The bundle in `root` anew, with this evidence instead of its own."""
    original = load_bundle(model_folder())
    files = tuple(
        replace(c, folds=tuple(replace(f, file=root / f.file.relative_to(original.root)) for f in c.folds))
        for c in original.configurations
    )
    write_evidence(root, evidence)
    documents = {f"{key}_json": json.loads((root / f"{key}.json").read_text()) for key in ("plans", "dataset")}
    return write_bundle(root, replace(original, configurations=files), **documents)


@pytest.mark.requirement("ART-13", open="a GPU")
def test_verify_computes_the_sanity_cases_again(config: Path, with_sanity: Path) -> None:
    assert _run(config, "import", str(with_sanity)).exit_code == 0
    verified = _run(config, "verify", "--json")
    assert verified.exit_code == 0, verified.output
    [row] = json.loads(verified.stdout)
    assert "onnxruntime" in row["sanity"]["runtime"]
    assert [(case["name"], case["changed"], case["lowest_dice"]) for case in row["sanity"]["cases"]] == [
        ("thick-slices", 0, 1.0)
    ]
    assert json.loads(_run(config, "verify", "--files-only", "--json").stdout)[0]["sanity"] is None


def test_a_model_that_answers_otherwise_than_at_its_export_fails_with_figures(
    config: Path, with_sanity: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(config, "import", str(with_sanity)).exit_code == 0
    run = OnnxBackend.run

    def otherwise(self: OnnxBackend, batch: Any) -> Any:
        logits = run(self, batch)
        logits[:, 1] += np.float32(0.5)
        return logits

    monkeypatch.setattr(OnnxBackend, "run", otherwise)
    verified = _run(config, "verify", "--json")
    assert verified.exit_code == 1
    verdict = json.loads(verified.stdout)[0]["verdict"]
    assert "differs from its export on onnxruntime" in verdict
    assert "voxels changed (at most 1 in 10,000)" in verdict


def test_sanity_cases_that_were_replaced_together_with_their_hashes_are_found(config: Path, with_sanity: Path) -> None:
    assert _run(config, "import", str(with_sanity)).exit_code == 0
    root = load_settings(config).models_dir / "hippocampus-mr" / "1.0.0"
    shutil.rmtree(root / "sanity")
    document = json.loads((root / "bundle.json").read_text())
    document["files"] = {name: sha for name, sha in document["files"].items() if not name.startswith("sanity/")}
    (root / "bundle.json").write_text(json.dumps(document))
    verified = _run(config, "verify", "--json")
    assert verified.exit_code == 1
    assert "sanity cases" in json.loads(verified.stdout)[0]["verdict"]


@pytest.mark.parametrize("words", [["--weights", "fp16"], ["--no-phantoms"], ["--sanity", "."]])
def test_what_needs_torch_is_refused_for_a_finished_bundle(config: Path, words: list[str]) -> None:
    assert _run(config, "import", str(model_folder()), *words).exit_code == 2


@pytest.mark.peer("torch")
def test_a_model_is_imported_with_images_of_the_site_as_sanity_cases(config: Path, tmp_path: Path) -> None:
    from tests.support.nnunet_results import TrainedModel, write_results

    write_results(tmp_path / "D", TrainedModel())
    write_dataset(tmp_path / "site", cases=2, shape=(5, 12, 12))
    words = ["--orientation", "LPS", "--sanity", str(tmp_path / "site"), "--no-phantoms"]
    imported = _run(config, "import", str(tmp_path / "D"), *words)
    assert imported.exit_code == 0, imported.output
    shown = json.loads(_run(config, "show", "tiny", "--json").stdout)
    assert [(case["name"], case["generated"]) for case in shown["sanity"]["cases"]] == [
        ("site-1", False),
        ("site-2", False),
    ]
    assert shown["sanity"]["cases"][0]["dice"] is not None
    assert _run(config, "verify").exit_code == 0


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
    unstated = _run(config, "import", str(folder), "--name", "hippo", "--no-phantoms", "--json")
    assert unstated.exit_code == 0
    document = json.loads(unstated.stdout)
    assert document["state"] == "candidate"
    assert any("orientation" in note for note in document["notes"])
    assert _run(config, "show", "hippo").exit_code == 1

    stated = _run(
        config, "import", str(folder), "--name", "hippo", "--semver", "1.0.1", "--orientation", "RAS", "--no-phantoms"
    )
    assert stated.exit_code == 0
    assert "hippo 1.0.1 serves from now on" in stated.output


def test_what_is_not_a_model_is_refused_with_the_reason(config: Path, tmp_path: Path) -> None:
    assert _run(config, "import", str(tmp_path / "absent")).exit_code == 1
    (tmp_path / "empty").mkdir()
    refused = _run(config, "import", str(tmp_path / "empty"))
    assert refused.exit_code == 1
    assert "not imported" in refused.output
