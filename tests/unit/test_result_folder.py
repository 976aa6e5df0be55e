"""engine.result_folder: what is found, what is chosen, and what is refused with advice."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ImportRefused
from engine.result_folder import ResultFolder, open_result
from tests.support.peers import require_peer, shared_root

require_peer("torch")

from tests.support.nnunet_results import TWO_D, TrainedModel, plans_json, write_results  # noqa: E402

FULL = TrainedModel()
LOWRES = TrainedModel(name="3d_lowres", spacing=(4.0, 2.0, 2.0))
CASCADE = TrainedModel(name="3d_cascade_fullres", previous_stage="3d_lowres", extra_channels=2)
PLANS = plans_json(FULL, TWO_D, LOWRES, CASCADE)


def _open(path: Path, **chosen: Any) -> ResultFolder:
    with open_result(path, **chosen) as result:
        return result


def _summary(result: ResultFolder) -> dict[str, list[str]]:
    return {c.name: [fold.fold for fold in c.folds] for c in result.configurations}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset folder with four result folders; each checkpoint is an empty file, since none is read here."""
    dataset = tmp_path / "Dataset901_Tiny"
    for model in (FULL, TWO_D, LOWRES, CASCADE):
        folder = write_results(dataset, model, plans=PLANS, folds=())
        for fold in ("0", "1", "all"):
            (folder / f"fold_{fold}").mkdir()
            (folder / f"fold_{fold}" / "checkpoint_final.pth").touch()
    return dataset


def _folder(dataset: Path, name: str) -> Path:
    return dataset / f"nnUNetTrainer__nnUNetPlans__{name}"


def test_one_result_folder_is_one_configuration_with_its_folds(dataset: Path) -> None:
    result = _open(_folder(dataset, "2d"))
    assert _summary(result) == {"2d": ["0", "1", "all"]}
    assert result.configurations[0].trainer == "nnUNetTrainer"
    assert list(result.plans.configurations) == ["2d"]


def test_folder_of_folders_takes_all_and_says_so(dataset: Path) -> None:
    result = _open(dataset)
    assert set(_summary(result)) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    assert any("--configuration" in note for note in result.notes)
    assert any("3d_lowres is run for 3d_cascade_fullres" in note for note in result.notes)


def test_results_root_with_one_dataset_is_taken_and_with_two_refused(dataset: Path) -> None:
    assert "2d" in _summary(_open(dataset.parent))
    shutil.copytree(dataset, dataset.parent / "Dataset902_Other")
    with pytest.raises(ImportRefused, match="several datasets"):
        _open(dataset.parent)


def test_configurations_and_folds_can_be_chosen(dataset: Path) -> None:
    assert _summary(_open(dataset, configurations=["2d"], folds=["1"])) == {"2d": ["1"]}
    with pytest.raises(ImportRefused, match="no configuration '3d_huge'; there are 2d"):
        _open(dataset, configurations=["3d_huge"])
    with pytest.raises(ImportRefused, match="no fold '4'; there are 0, 1, all"):
        _open(dataset, folds=["4"])


def test_nnunets_own_choice_of_a_pair_is_followed(dataset: Path) -> None:
    chosen = [
        {"configuration": name, "trainer": "nnUNetTrainer", "plans_identifier": "nnUNetPlans"}
        for name in ("2d", "3d_fullres")
    ]
    information = {"best_model_or_ensemble": {"selected_model_or_models": chosen}}
    (dataset / "inference_information.json").write_text(json.dumps(information))
    assert set(_summary(_open(dataset))) == {"2d", "3d_fullres"}
    shutil.rmtree(_folder(dataset, "2d"))
    with pytest.raises(ImportRefused, match="not there"):
        _open(dataset)


def test_cascade_brings_its_sister_folder_and_is_refused_without(dataset: Path) -> None:
    assert set(_summary(_open(_folder(dataset, "3d_cascade_fullres")))) == {"3d_lowres", "3d_cascade_fullres"}
    shutil.rmtree(_folder(dataset, "3d_lowres"))
    with pytest.raises(ImportRefused, match="previous stage '3d_lowres' is needed"):
        _open(_folder(dataset, "3d_cascade_fullres"))


def test_best_checkpoint_is_used_where_final_is_missing_and_said(dataset: Path) -> None:
    folder = _folder(dataset, "2d")
    (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "checkpoint_best.pth")
    (folder / "fold_1" / "checkpoint_final.pth").unlink()
    result = _open(folder)
    assert [(fold.fold, fold.kind) for fold in result.configurations[0].folds] == [("0", "best"), ("all", "final")]
    assert any("fold 0" in note and "checkpoint_best.pth is used" in note for note in result.notes)
    assert any("fold 1 has no checkpoint and is left out" in note for note in result.notes)


def test_folder_without_any_checkpoint_is_refused(dataset: Path) -> None:
    for file in _folder(dataset, "2d").rglob("*.pth"):
        file.unlink()
    with pytest.raises(ImportRefused, match="no fold has a checkpoint"):
        _open(_folder(dataset, "2d"))


def test_two_trainers_of_one_configuration_are_two_models(dataset: Path) -> None:
    shutil.copytree(_folder(dataset, "2d"), dataset / "nnUNetTrainerOther__nnUNetPlans__2d")
    with pytest.raises(ImportRefused, match="several models"):
        _open(dataset, configurations=["2d"])


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("dataset.json", {"labels": {"background": 0, "spleen": 1, "liver": 2}}, "labels differs"),
        ("dataset.json", {"channel_names": {"0": "MR"}}, "channel_names differs"),
        ("plans.json", {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}, "transpose"),
        (
            "plans.json",
            {"configurations": {**PLANS["configurations"], "2d": {**PLANS["configurations"]["2d"], "batch_size": 9}}},
            "configurations differ",
        ),
    ],
)
def test_folders_that_contradict_each_other_are_refused(
    dataset: Path, file: str, change: dict[str, Any], named: str
) -> None:
    path = _folder(dataset, "3d_fullres") / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ImportRefused, match=named):
        _open(dataset, configurations=["2d", "3d_fullres"])


def test_plans_that_gained_configurations_since_are_joined(dataset: Path) -> None:
    path = _folder(dataset, "2d") / "plans.json"
    path.write_text(json.dumps(plans_json(TWO_D)))
    result = _open(dataset, configurations=["2d", "3d_fullres"])
    assert set(result.plans.configurations) == {"2d", "3d_fullres"}


def _postprocessing(folder: Path, labels: object, function: str | None = None) -> None:
    folder.mkdir(parents=True)
    function = function or "remove_all_but_largest_component_from_segmentation"
    content = {"postprocessing_fns": [function], "postprocessing_kwargs": [{"labels_or_regions": labels}]}
    (folder / "postprocessing.json").write_text(json.dumps(content))


def test_postprocessing_is_that_of_the_imported_folds(dataset: Path) -> None:
    folder = _folder(dataset, "2d")
    _postprocessing(folder / "crossval_results_folds_0", [1])
    _postprocessing(folder / "crossval_results_folds_0_1", 2)
    chosen = _open(folder, folds=["0", "1"]).postprocessing
    assert chosen is not None
    assert chosen["postprocessing_kwargs"] == [{"labels_or_regions": 2, "background_label": 0}]
    with pytest.raises(ImportRefused, match=r"several postprocessing\.json"):
        _open(folder, folds=["1"])


def test_postprocessing_of_a_pair_comes_from_its_ensemble_not_from_a_member(dataset: Path) -> None:
    first, second = _folder(dataset, "2d"), _folder(dataset, "3d_fullres")
    _postprocessing(first / "crossval_results_folds_0_1", [1])
    assert _open(dataset, configurations=["2d", "3d_fullres"], folds=["0", "1"]).postprocessing is None
    _postprocessing(dataset / "ensembles" / f"ensemble___{second.name}___{first.name}___0_1", [[1, 2]])
    chosen = _open(dataset, configurations=["2d", "3d_fullres"], folds=["0", "1"]).postprocessing
    assert chosen is not None
    assert chosen["postprocessing_kwargs"][0]["labels_or_regions"] == [[1, 2]]


@pytest.mark.parametrize(
    ("labels", "function", "named"),
    [([9], None, "no label"), (["a"], None, "labels_or_regions"), ([1], "os.system", "postprocessing_fns")],
)
def test_strange_postprocessing_is_refused(dataset: Path, labels: object, function: str | None, named: str) -> None:
    _postprocessing(_folder(dataset, "2d") / "crossval_results_folds_0", labels, function)
    with pytest.raises(ImportRefused, match=named):
        _open(_folder(dataset, "2d"))


def test_pickled_postprocessing_is_not_read_and_said(dataset: Path) -> None:
    crossval = _folder(dataset, "2d") / "crossval_results_folds_0"
    crossval.mkdir()
    (crossval / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    result = _open(_folder(dataset, "2d"))
    assert result.postprocessing is None
    assert any("postprocessing.pkl is not read" in note for note in result.notes)


def test_lone_checkpoint_is_taken_from_its_fold_folder_and_beside_its_plans(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "D", FULL, folds=(3,))
    file = folder / "fold_3" / "checkpoint_final.pth"
    assert _summary(_open(file)) == {"3d_fullres": ["3"]}
    lone = tmp_path / "lone"
    lone.mkdir()
    for source in (file, folder / "plans.json", folder / "dataset.json"):
        shutil.copy(source, lone)
    result = _open(lone / "checkpoint_final.pth")
    assert _summary(result) == {"3d_fullres": ["3"]}
    assert result.configurations[0].folds[0].kind == "given"
    (lone / "plans.json").unlink()
    with pytest.raises(ImportRefused, match=r"plans\.json and dataset\.json must lie beside it"):
        _open(lone / "checkpoint_final.pth")


def test_zip_is_unpacked_only_as_long_as_it_is_used(dataset: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for file in _folder(dataset, "2d").rglob("*"):
            archive.write(file, Path("Dataset901_Tiny") / file.relative_to(dataset))
    with open_result(tmp_path / "m.zip") as result:
        assert _summary(result) == {"2d": ["0", "1", "all"]}
        unpacked = result.configurations[0].folder
        assert unpacked.is_dir()
    assert not unpacked.exists()


def test_folder_whose_name_says_nothing_is_taken_only_when_the_plans_do(dataset: Path, tmp_path: Path) -> None:
    renamed = _folder(dataset, "2d").rename(tmp_path / "mine")
    with pytest.raises(ImportRefused, match="Trainer__Plans__configuration"):
        _open(renamed)
    (renamed / "plans.json").write_text(json.dumps(plans_json(TWO_D)))
    assert set(_summary(_open(renamed))) == {"2d"}


def test_empty_folder_and_absent_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="no result folder of nnU-Net v2 found"):
        _open(tmp_path)
    with pytest.raises(ImportRefused, match="no such file"):
        _open(tmp_path / "absent")


@pytest.mark.peer("shared-data")
def test_nnunets_own_export_zip_is_read() -> None:
    assert _summary(_open(shared_root() / "models" / "hippocampus_3d.zip")) == {"3d_fullres": ["0", "1"]}


def test_a_checkpoint_of_another_name_is_taken_where_it_is_asked_for(dataset: Path) -> None:
    folder = _folder(dataset, "3d_fullres")
    (folder / "fold_0" / "checkpoint_best.pth").touch()
    (folder / "fold_1" / "mine.pth").touch()
    best = _open(folder, checkpoint="checkpoint_best.pth")
    assert [(f.fold, f.checkpoint.name, f.kind) for f in best.configurations[0].folds] == [
        ("0", "checkpoint_best.pth", "best")
    ]
    mine = _open(folder, checkpoint="mine.pth", folds=["1"])
    assert [(f.fold, f.kind) for f in mine.configurations[0].folds] == [("1", "given")]
    with pytest.raises(ImportRefused, match=r"fold 0 has no mine\.pth"):
        _open(folder, checkpoint="mine.pth", folds=["0"])
    with pytest.raises(ImportRefused, match=r"no fold has a other\.pth"):
        _open(folder, checkpoint="other.pth")
