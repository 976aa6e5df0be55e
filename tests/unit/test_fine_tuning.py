"""engine.fine_tuning: all weights and plans are kept, old cases are rehearsed, and what does not fit is refused."""
# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

from tests.support.peers import require_peer

require_peer("torch")

import torch

from engine.checkpoint import read_checkpoint
from engine.errors import DatasetInvalid, ImportRefused, TrainingRefused
from engine.fine_tuning import FineTuned, FineTuning, fine_tune, profile_of
from engine.fold_request import FoldReport, FoldRequest
from engine.rehearsal import SHARE, Rehearsal
from engine.starting_weights import StartingWeights
from engine.trained_model import open_trained_model
from engine.training import Trainer
from engine.training_checkpoint import FINAL, LATEST, read_state, weights_digest
from tests.support.tiny_experiment import NAME, planned, seggate, write_bright
from tests.support.tiny_training import same_weights, tiny_setup, weights

MODEL = f"results/{NAME}/nnUNetTrainer__nnUNetPlans__3d_fullres"
SHORT = ("--epochs", "2", "--iterations", "2", "--deterministic", "--precision", "float32", "--threads", "1")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the folds 0 and 1, and three new cases beside its dataset."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    ran = seggate(root, "train", str(planned(root)), "--mirror", "lateral", *SHORT)
    assert ran.exit_code == 0, ran.output
    write_new(root / "new")
    return root


def write_new(folder: Path, *, cases: int = 3, **changes: Any) -> Path:
    write_bright(folder, cases=cases, **changes)
    for sub in ("imagesTr", "labelsTr"):
        for path in sorted((folder / sub).iterdir()):
            path.rename(path.with_name(path.name.replace("case_", "new_")))
    return folder


def tuning(root: Path, results: Path, **changes: Any) -> FineTuning:
    asked = FineTuning(
        model=root / MODEL,
        old=root / NAME,
        cases=root / "new",
        results=results,
        preprocessed=root / "preprocessed",
        epochs=2,
        iterations=3,
        device=torch.device("cpu"),
        precision="float32",
        deterministic=True,
        probes=False,
    )
    return replace(asked, **changes)


def fold(found: FineTuned, name: str = "0") -> Path:
    return found.model_folder / f"fold_{name}"


@pytest.fixture(scope="module")
def tuned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> FineTuned:
    torch.set_num_threads(1)
    return fine_tune(tuning(trained, tmp_path_factory.mktemp("tuned")))


@pytest.mark.requirement("ART-21")
def test_every_weight_is_kept_at_first_the_heads_of_deep_supervision_too(tmp_path: Path) -> None:
    """Before the first step the network is the trained one, parameter by parameter; another seed changes nothing."""
    setup = tiny_setup(tmp_path)
    source = Trainer(setup, tmp_path / "source")
    assert source.run()
    start = StartingWeights.of(tmp_path / "source" / FINAL)
    begun = Trainer(replace(setup, seed=99, start=start), tmp_path / "tuned")
    heads = [name for name in weights(source) if ".seg_layers." in name]
    assert len(heads) == 2 * 2  # weight and bias of each decoder level
    assert same_weights(weights(begun), weights(source))
    # Not overwritten by the start of an ordinary training either (engine/head_start.py).
    assert not begun.run(stop=lambda: True)
    assert same_weights(read_state(tmp_path / "tuned" / LATEST).weights, weights(source))
    assert begun.run()
    assert not same_weights(weights(begun), weights(source))


def test_weights_that_changed_or_are_another_networks_are_refused(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    assert Trainer(setup, tmp_path / "source").run()
    start = StartingWeights.of(tmp_path / "source" / FINAL)
    with pytest.raises(ImportRefused, match="has changed since"):
        Trainer(replace(setup, start=replace(start, digest="0")), tmp_path / "changed")
    architecture = replace(setup.configuration.architecture, features_per_stage=(4, 6, 10))
    configuration = replace(setup.configuration, architecture=architecture)
    with pytest.raises(ImportRefused, match="does not fit the network"):
        Trainer(replace(setup, configuration=configuration, start=start), tmp_path / "other")


@pytest.mark.requirement("ART-21")
def test_plans_normalisation_and_folds_are_the_models_and_new_cases_are_trained_on(
    trained: Path, tuned: FineTuned
) -> None:
    assert tuned.is_finished
    assert [path.name for path in tuned.folds] == ["fold_0", "fold_1"]
    for name in ("plans.json", "dataset_fingerprint.json"):
        assert json.loads((tuned.model_folder / name).read_text()) == json.loads((trained / MODEL / name).read_text())
    for number in "01":
        before = json.loads((trained / MODEL / f"fold_{number}" / "training.json").read_text())
        now = json.loads((fold(tuned, number) / "training.json").read_text())
        assert now["train"] == sorted([*before["train"], "new_00", "new_01", "new_02"])
        assert now["val"] == before["val"]
        assert now["mirror_axes"] == before["mirror_axes"] == [2]
        assert now["schedule"]["learning_rate"] == 1e-4
        assert now["schedule"]["encoder_factor"] == 0.5
        start = weights_digest(read_checkpoint(trained / MODEL / f"fold_{number}" / FINAL).weights)
        assert now["identity"]["start"] == start == before["weights"]


def test_where_the_model_comes_from_is_written_down(trained: Path, tuned: FineTuned) -> None:
    written = json.loads((tuned.model_folder / "fine_tuning.json").read_text())
    known = json.loads((trained / MODEL / "fold_1" / "training.json").read_text())
    assert written["base"]["model"] == f"{NAME}/nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert written["base"]["folds"]["1"] == {"weights": known["weights"], "checkpoint": known["checkpoint"]}
    assert written["new_cases"] == ["new_00", "new_01", "new_02"]
    assert written["rehearsal_share"] == SHARE
    assert written["factors"] == {"encoder": 0.5, "decoder": 1.0}
    assert (written["epochs"], written["iterations"], written["learning_rate"]) == (2, 3, 1e-4)
    assert written["software"].startswith("seggate ")


def test_old_cases_of_the_fold_are_rehearsed_never_its_validation_cases(trained: Path, tmp_path: Path) -> None:
    seen: list[FoldRequest] = []

    class Seen(Exception):
        pass

    def reporting(request: FoldRequest) -> Any:
        seen.append(request)
        raise Seen

    with pytest.raises(Seen):
        fine_tune(tuning(trained, tmp_path, folds=("1",), rehearsal=0.4), reporting=reporting)
    split = json.loads((trained / MODEL / "fold_1" / "training.json").read_text())
    assert seen[0].rehearsal == Rehearsal(old=tuple(split["train"]), share=0.4)


@pytest.mark.requirement("ART-21")
@pytest.mark.parametrize("calls", [3, 7])
def test_stopped_and_started_again_it_ends_as_if_it_had_not_been(
    trained: Path, tuned: FineTuned, tmp_path: Path, calls: int
) -> None:
    """Stopped while it preprocesses or in the middle of an epoch; what is finished is left as it is."""
    asked = iter(range(10**6))
    first = fine_tune(tuning(trained, tmp_path), stop=lambda: next(asked) >= calls)
    assert not first.is_finished
    again = fine_tune(tuning(trained, tmp_path))
    assert again.is_finished
    for number in "01":
        one, other = (read_state(fold(found, number) / FINAL) for found in (again, tuned))
        assert same_weights(one.weights, other.weights)
    written = (fold(again) / FINAL).stat().st_mtime_ns
    assert fine_tune(tuning(trained, tmp_path)).is_finished
    assert (fold(again) / FINAL).stat().st_mtime_ns == written


def test_a_stop_in_the_middle_of_an_epoch_leaves_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    def stop() -> bool:
        log = tmp_path / NAME / (trained / MODEL).name / "fold_0" / "training_log.txt"
        return log.exists() and "begins at" in log.read_text()

    assert not fine_tune(tuning(trained, tmp_path), stop=stop).is_finished
    assert (tmp_path / NAME / (trained / MODEL).name / "fold_0" / LATEST).exists()


@pytest.mark.requirement("ART-21")
def test_a_fine_tuned_model_can_be_fine_tuned_again_and_rehearses_all_it_knows(
    tuned: FineTuned, tmp_path: Path
) -> None:
    results = tuned.model_folder.parents[1]
    write_bright(tmp_path / "later", cases=2)
    for path in sorted((tmp_path / "later").glob("*Tr/*")):
        path.rename(path.with_name(path.name.replace("case_", "later_")))
    again = fine_tune(
        FineTuning(
            model=tuned.model_folder,
            old=results / "fine_tuning" / "raw" / NAME,
            cases=tmp_path / "later",
            results=tmp_path / "results",
            preprocessed=results / "fine_tuning" / "preprocessed",
            folds=("0",),
            epochs=1,
            iterations=1,
            device=torch.device("cpu"),
            precision="float32",
            probes=False,
        )
    )
    train = json.loads((fold(again) / "training.json").read_text())["train"]
    assert {"case_01", "new_00", "later_00"} <= set(train)


def test_the_fold_of_every_case_is_trained_and_validated_on_the_new_ones_too(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    ran = seggate(root, "train", str(root / NAME), "--fold", "all", "--mirror", "lateral", *SHORT)
    assert ran.exit_code == 0, ran.output
    found = fine_tune(tuning(root, tmp_path / "tuned", folds=("all",)))
    now = json.loads((fold(found, "all") / "training.json").read_text())
    assert len(now["train"]) == len(now["val"]) == 6 + 3


def test_cases_are_preprocessed_with_the_models_plans_and_old_ones_not_again(trained: Path, tuned: FineTuned) -> None:
    joined = tuned.model_folder.parents[1] / "fine_tuning" / "preprocessed" / NAME / "nnUNetPlans_3d_fullres"
    before = trained / "preprocessed" / NAME / "nnUNetPlans_3d_fullres"
    assert (joined / "case_00.npy").samefile(before / "case_00.npy")
    assert (joined / "new_02.npy").exists()


def _labels(root: Path) -> None:
    document = json.loads((root / "new" / "dataset.json").read_text())
    document["labels"] = {"background": 0, "first": 1, "third": 2}
    (root / "new" / "dataset.json").write_text(json.dumps(document))


def _channels(root: Path) -> None:
    document = json.loads((root / "new" / "dataset.json").read_text())
    document["channel_names"] = {"0": "T2"}
    (root / "new" / "dataset.json").write_text(json.dumps(document))


def _plans(root: Path) -> None:
    path = root / MODEL / "plans.json"
    document = json.loads(path.read_text())
    document["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    path.write_text(json.dumps(document))


def _names(root: Path) -> None:
    for path in sorted((root / "new").glob("*Tr/new_00*")):
        path.rename(path.with_name(path.name.replace("new_", "case_")))


def _gone(root: Path) -> None:
    for path in sorted((root / NAME).glob("*Tr/case_01*")):
        path.unlink()


@pytest.mark.requirement("ART-21")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_labels, "labels are .* MAJOR version"),
        (_channels, "channels are .* MAJOR version"),
        (_plans, "fold 0 was trained with other plans"),
        (_names, "case_00 is the name of a case of Dataset901_Tiny too"),
        (_gone, "case_01, which fold 0 was trained with, is not there"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    trained: Path, tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    change(root)
    with pytest.raises(DatasetInvalid, match=named):
        fine_tune(tuning(root, tmp_path / "tuned"), reporting=lambda _request: pytest.fail("it trains"))
    assert not list((tmp_path / "tuned").glob("*/*/fold_*/*.pth"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 3}, "epochs differs"),
        ({"rehearsal": 0.25}, "rehearsal_share differs"),
        ({"seed": 5}, "seed differs"),
        ({"cases": "other"}, "new_cases differs"),
    ],
)
def test_another_fine_tuning_in_the_same_results_is_refused(
    trained: Path, tuned: FineTuned, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    if "cases" in changes:
        changes = {"cases": write_new(tmp_path / "other", cases=2)}
    with pytest.raises(TrainingRefused, match=f"is another fine-tuning's .{named}"):
        fine_tune(tuning(trained, tuned.model_folder.parents[1], **changes))


def test_a_fold_that_was_trained_anew_since_is_refused(trained: Path, tuned: FineTuned, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    shutil.copyfile(root / MODEL / "fold_1" / FINAL, root / MODEL / "fold_0" / FINAL)
    with pytest.raises(TrainingRefused, match="fold 0 began with other weights"):
        fine_tune(tuning(root, tuned.model_folder.parents[1]))


def test_the_model_itself_is_never_written_to(trained: Path) -> None:
    with pytest.raises(TrainingRefused, match="is the model itself"):
        fine_tune(tuning(trained, trained / "results"))


@pytest.mark.parametrize("changes", [{"epochs": 11}, {"epochs": 0}, {"rehearsal": 0.2}, {"rehearsal": 0.6}])
def test_more_epochs_or_another_share_than_allowed_are_no_fine_tuning(trained: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"1 to 10|0\.25 to 0\.5"):
        tuning(trained, trained, **changes)


def test_a_folder_that_is_no_models_is_named(trained: Path, tmp_path: Path) -> None:
    for folder in (trained / NAME, trained / MODEL / "fold_0"):
        with pytest.raises(DatasetInvalid, match="is no model's folder"):
            open_trained_model(folder)
    empty = tmp_path / NAME / (trained / MODEL).name
    empty.mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(trained / MODEL / name, empty / name)
    with pytest.raises(DatasetInvalid, match="there is nothing to fine-tune"):
        open_trained_model(empty)
    with pytest.raises(DatasetInvalid, match="no fold '7'; there are 0, 1"):
        open_trained_model(trained / MODEL).fold("7")


def test_new_cases_stored_from_the_other_side_are_refused_where_labels_are_sides(tmp_path: Path) -> None:
    labels = {"background": 0, "kidney_left": 1, "kidney_right": 2}
    ran = seggate(tmp_path, "train", str(planned(tmp_path, labels=labels)), "--fold", "0", *SHORT)
    assert ran.exit_code == 0, ran.output
    new = write_new(tmp_path / "new", cases=2, labels=labels)
    assert fine_tune(tuning(tmp_path, tmp_path / "alike", epochs=1, iterations=1)).is_finished
    for path in sorted(new.glob("*Tr/*")):
        image = sitk.ReadImage(str(path))
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(path))
    with pytest.raises(DatasetInvalid, match="left and right are not on the same side"):
        fine_tune(tuning(tmp_path, tmp_path / "exchanged", epochs=1, iterations=1))


def test_without_training_json_the_folds_are_those_of_the_splits(trained: Path, tmp_path: Path) -> None:
    """A fold that nnU-Net trained says nothing about its cases."""
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    before = json.loads((root / MODEL / "fold_0" / "training.json").read_text())
    for path in (root / MODEL).glob("fold_*/training.json"):
        path.unlink()
    found = fine_tune(tuning(root, tmp_path / "tuned", folds=("0",), epochs=1, iterations=1))
    assert json.loads((fold(found) / "training.json").read_text())["val"] == before["val"]
    for path in (*root.rglob("splits_final.json"), *(tmp_path / "tuned").rglob("splits_final.json")):
        path.unlink()
    with pytest.raises(
        DatasetInvalid, match=r"fold 0 does not say which cases it was trained on; put the splits_final"
    ):
        fine_tune(tuning(root, tmp_path / "other"))


def test_nothing_is_held_out_whatever_the_model_was_trained_with() -> None:
    found = profile_of("nnUNetTrainerArticle")
    assert (found.trainer, found.hold_out_share, found.patience) == ("nnUNetTrainerArticle", None, None)
    assert found.augmentation != profile_of("nnUNetTrainer").augmentation
    assert profile_of("nnUNetTrainer_250epochs").trainer == "nnUNetTrainer_250epochs"


def test_who_wants_to_hear_gets_a_report_for_each_fold(trained: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    class Listening:
        def __enter__(self) -> FoldReport:
            return FoldReport(line=lines.append)

        def __exit__(self, *_: object) -> None:
            lines.append("left")

    assert fine_tune(tuning(trained, tmp_path, epochs=1, iterations=1), reporting=lambda _request: Listening())
    assert lines.count("left") == 2
    assert any("validated: " in line for line in lines)
