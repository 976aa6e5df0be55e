"""What the registry says of a version's origin: digests and figures, no names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.evidence import Evidence
from engine.provenance import FoldTraining, LabelValidation, Provenance, Validation, data_origin
from gateway.learning.model_provenance import provenance_of
from tests.support.intensity_model import write_intensity_bundle

pytestmark = pytest.mark.requirement("ART-22")


def _fold(fold: str) -> FoldTraining:
    return FoldTraining(
        configuration="3d_fullres",
        fold=fold,
        trainer="nnUNetTrainer",
        checkpoint="final",
        software="seggate 0.1.0",
        epochs=10,
        planned_epochs=10,
        iterations=250,
        precision="float32",
        seed=1,
        deterministic=True,
        training_cases=2,
        validation_cases=1,
        training_cases_digest="a" * 64,
        data_digest="0123456789ab",
    )


def _provenance(folds: int) -> Provenance:
    return Provenance(
        data=data_origin({}, {}, ["doe_john", "roe_jane"], dataset_name="D", excluded=["smith_x"]),
        training=tuple(_fold(str(number)) for number in range(folds)),
        exported_by="seggate 0.1.0",
        validation=Validation(
            cases=2, dice=0.9, labels={"left structure": LabelValidation(dice=0.9, hd95_mm=1.0, surface_dice=None)}
        ),
    )


def test_a_bundle_without_evidence_is_known_by_its_files(tmp_path: Path) -> None:
    bundle = write_intensity_bundle(tmp_path / "b", name="liver")
    digests = {
        name: hashlib.sha256((bundle.root / f"{name}.json").read_bytes()).hexdigest() for name in ("plans", "dataset")
    }
    assert provenance_of(bundle) == {
        "plans_digest": digests["plans"],
        "dataset_digest": digests["dataset"],
        "unknown": "cases, exclusions, training and validation: it has no provenance.json",
    }


def test_cases_exclusions_labels_code_and_figures_are_told_by_digest_and_no_name_is(tmp_path: Path) -> None:
    bundle = write_intensity_bundle(tmp_path / "b", name="liver")
    found = provenance_of(replace(bundle, evidence=Evidence(provenance=_provenance(2))))
    assert (found["cases"], found["exclusions"], found["code_version"]) == ("2", "1", "seggate 0.1.0")
    assert all(len(found[key]) == 64 for key in ("cases_digest", "exclusions_digest"))
    training = json.loads(found["training"])
    assert training["3d_fullres/1"] == {
        "trainer": "nnUNetTrainer",
        "software": "seggate 0.1.0",
        "cases_digest": "a" * 64,
        "data_digest": "0123456789ab",
    }
    assert json.loads(found["validation"])["labels"]["left structure"]["dice"] == 0.9
    assert not any(name in text for name in ("doe", "roe", "smith") for text in found.values())


def test_what_a_bundle_does_not_say_is_said(tmp_path: Path) -> None:
    bundle = write_intensity_bundle(tmp_path / "b", name="liver")
    whole = _provenance(2)
    found = provenance_of(replace(bundle, evidence=Evidence(provenance=whole)))
    assert found["unknown"] == "whether a single case is among them: the digest is of all their names together"
    # As of an nnU-Net model: its files name no cases.
    fold = replace(_fold("0"), training_cases_digest=None, data_digest=None)
    bare = replace(
        whole,
        data=data_origin({"numTraining": 7}, {}, [], dataset_name="D"),
        training=(fold, _fold("1")),
        validation=None,
    )
    found = provenance_of(replace(bundle, evidence=Evidence(provenance=bare)))
    assert found["cases"] == "7"
    assert found["unknown"] == (
        "names of the cases; exclusions; cases of 1 of 2 networks; content of the cases of 1 of 2 networks; validation"
    )


def test_more_networks_than_a_tag_holds_are_known_by_a_digest(tmp_path: Path) -> None:
    bundle = write_intensity_bundle(tmp_path / "b", name="liver")
    found = provenance_of(replace(bundle, evidence=Evidence(provenance=_provenance(3000))))
    assert found["training"].startswith("sha256:")
