"""engine.provenance: licence, origin and training are told, names of cases and patients are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import BundleInvalid, ImportRefused
from engine.model_card import parse_card
from engine.provenance import (
    DataOrigin,
    LabelValidation,
    Provenance,
    Validation,
    cases_digest,
    data_origin,
    describe_fold,
    provenance_document,
    public_dataset_json,
    public_fingerprint_json,
    read_provenance,
)

VALIDATION = Validation(
    cases=12,
    dice=0.91,
    labels={
        "liver": LabelValidation(dice=0.95, hd95_mm=2.5, surface_dice=0.97),
        "rare": LabelValidation(dice=None, hd95_mm=None, surface_dice=None),
    },
)
TRAINING = {
    "software": "seggate 0.1.0",
    "schedule": {"epochs": 20, "iterations": 100},
    "seed": 7,
    "precision": "bf16",
    "deterministic": True,
    "train": ["b", "a"],
    "hold_out": ["c"],
    "val": ["d"],
}


def _describe(folder: Path) -> Any:
    return describe_fold(
        folder,
        configuration="3d_fullres",
        fold="0",
        trainer="nnUNetTrainer",
        checkpoint="final",
        epochs=5,
        error=ImportRefused,
    )


def _write(folder: Path, **changes: Any) -> Path:
    (folder / "training.json").write_text(json.dumps(TRAINING | changes))
    (folder / "training_log.jsonl").write_text("{}\n" * 12)
    return folder


def test_a_fold_of_ours_says_how_it_was_trained(tmp_path: Path) -> None:
    fold, names = _describe(_write(tmp_path))
    assert (fold.software, fold.epochs, fold.planned_epochs, fold.iterations) == ("seggate 0.1.0", 12, 20, 100)
    assert (fold.precision, fold.seed, fold.deterministic) == ("bf16", 7, True)
    assert (fold.training_cases, fold.validation_cases) == (2, 1)
    assert fold.training_cases_digest == cases_digest(["a", "b"])
    assert names == {"a", "b", "c", "d"}


def test_a_fold_of_nnunet_says_what_its_checkpoint_says(tmp_path: Path) -> None:
    fold, names = _describe(tmp_path)
    assert (fold.epochs, fold.software, fold.training_cases, names) == (5, None, None, frozenset())


def test_a_damaged_training_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="seed"):
        _describe(_write(tmp_path, seed="seven"))


def test_the_digest_is_of_the_names_in_any_order_and_can_be_made_again() -> None:
    lines = sorted(hashlib.sha256(name.encode()).hexdigest() + "\n" for name in ("a", "b"))
    assert cases_digest(["b", "a"]) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert cases_digest(["a", "b", "c"]) != cases_digest(["a", "b"])


def test_the_data_is_described_by_dataset_json_and_by_the_card_before_it() -> None:
    dataset = {"name": "Hippo\ncampus", "license": "CC0", "reference": 3, "release": "1.0", "numTraining": 260}
    found = data_origin(dataset, {}, [], dataset_name="Dataset004")
    assert found == DataOrigin(
        name="Hippo campus", licence="CC0", reference="", release="1.0", cases=260, cases_digest=None
    )
    card = parse_card({"licence": "Apache-2.0", "data": {"licence": "CC BY 4.0", "reference": "example.org"}})
    found = data_origin(dataset, card.data, ["x", "y"], dataset_name="Dataset004")
    assert (found.licence, found.reference, found.cases) == ("CC BY 4.0", "example.org", 2)
    assert data_origin({"numTraining": True}, {}, [], dataset_name="Dataset004").cases is None
    assert data_origin({}, {}, [], dataset_name="Dataset004").name == "Dataset004"
    with pytest.raises(ImportRefused, match="owner"):
        parse_card({"data": {"owner": "x"}})


def test_what_names_cases_patients_and_files_stays_at_home() -> None:
    dataset = {
        "labels": {"background": 0},
        "patients": {"case": "Doe"},
        "dataset": {"case": {"images": ["/home/somebody/x"]}},
        "training": [{"image": "./imagesTr/doe.nii.gz"}],
        "test": ["./imagesTs/doe.nii.gz"],
    }
    assert public_dataset_json(dataset) == {"labels": {"background": 0}}
    fingerprint = {"spacings": [[1, 1, 1]], "seggate": {"num_cases": 1, "cases": {"doe": {"foreground_ml": 1.0}}}}
    assert public_fingerprint_json(fingerprint) == {"spacings": [[1, 1, 1]], "seggate": {"num_cases": 1}}
    assert public_fingerprint_json({"spacings": []}) == {"spacings": []}
    assert public_fingerprint_json(None) is None


def _provenance(folder: Path) -> Provenance:
    fold, names = _describe(_write(folder))
    return Provenance(
        data=data_origin({"name": "x"}, {}, names, dataset_name="D", excluded={"e", "f"}),
        training=(fold,),
        exported_by="seggate 0.1.0",
        validation=VALIDATION,
    )


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    document = json.loads(json.dumps(provenance_document(_provenance(tmp_path))))
    assert read_provenance(document, error=BundleInvalid) == _provenance(tmp_path)


@pytest.mark.requirement("ART-22")
def test_excluded_cases_label_versions_and_figures_are_told_without_names(tmp_path: Path) -> None:
    fold, names = _describe(_write(tmp_path, data="0123456789ab"))
    data = data_origin({}, {}, names, dataset_name="D", excluded={"e", "f"})
    assert (data.excluded, data.exclusions_digest) == (2, cases_digest(["f", "e"]))
    assert fold.data_digest == "0123456789ab"
    nobody_knows = data_origin({}, {}, names, dataset_name="D")
    none = data_origin({}, {}, names, dataset_name="D", excluded=())
    assert (nobody_knows.excluded, none.excluded, none.exclusions_digest) == (None, 0, None)


def test_a_provenance_from_before_these_were_written_stays_the_same(tmp_path: Path) -> None:
    fold, names = _describe(_write(tmp_path))
    old = Provenance(data=data_origin({}, {}, names, dataset_name="D"), training=(fold,), exported_by="seggate 0.1.0")
    document = provenance_document(old)
    assert not {"validation", "excluded", "data_digest"} & {*document, *document["data"], *document["training"][0]}
    assert read_provenance(json.loads(json.dumps(document)), error=BundleInvalid) == old


def _at(*path: str | int, value: object) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_at("format", value=2), "format"),
        (_at("data", "licence", value=None), "licence"),
        (_at("data", "cases", value=-1), "cases"),
        (_at("data", "cases_digest", value="x"), "cases_digest"),
        (_at("training", 0, "epochs", value="many"), "epochs"),
        (_at("training", 0, "deterministic", value=1), "deterministic"),
        (_at("training", 0, "training_cases_digest", value="A" * 64), "training_cases_digest"),
        (_at("training", value={}), "training"),
        (_at("exported_by", value=""), "exported_by"),
        (_at("data", "exclusions_digest", value="x"), "exclusions_digest"),
        (_at("validation", "dice", value=1.5), "dice"),
        (_at("validation", "labels", "liver", "hd95_mm", value="far"), "hd95_mm"),
    ],
)
def test_a_value_of_wrong_type_or_range_is_refused_with_its_key(
    tmp_path: Path, edit: Callable[[Any], None], named: str
) -> None:
    document = json.loads(json.dumps(provenance_document(_provenance(tmp_path))))
    edit(document)
    with pytest.raises(BundleInvalid, match=named):
        read_provenance(document, error=BundleInvalid)
