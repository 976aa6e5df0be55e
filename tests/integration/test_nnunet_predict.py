"""`seggate predict` beside nnUNetv2_predict itself: the same words, the same results."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from engine.nifti import read_label_map
from gateway.cli import app
from tests.support.nnunet_peer import nnunet_command

pytestmark = [pytest.mark.peer("nnunet", "torch", "shared-data")]

CASES = ("hippocampus_023", "hippocampus_212", "hippocrop_study1")
NIFTI_HEADER = 352
WORDS = (
    *("-d", "4", "-c", "3d_fullres", "-p", "nnUNetSmallPlans", "-tr", "nnUNetTrainer", "-f", "0"),
    *("-step_size", "0.5", "-chk", "checkpoint_final.pth", "-npp", "1", "-nps", "1", "-device", "cpu"),
    *("--save_probabilities", "--disable_progress_bar"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The images, and what nnUNetv2_predict makes of them."""
    from tests.support.peers import require_peer, shared_root

    require_peer("nnunet", "torch")
    root = tmp_path_factory.mktemp("nnunet")
    source, reference = root / "in", root / "reference"
    source.mkdir()
    for case in CASES:
        shutil.copy(shared_root() / "reference" / "inputs" / f"{case}_0000.nii.gz", source)
    words = ("nnUNetv2_predict", "-i", str(source), "-o", str(reference), *WORDS)
    nnunet_command(*words, results=shared_root() / "models")
    return source, reference


def seggate(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, words)])


@pytest.mark.requirement("INF-36", open="GPU against CPU, and memory over 1000 volumes")
def test_the_same_words_give_the_same_label_maps_probabilities_and_files(
    folders: tuple[Path, Path], shared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reference = folders
    monkeypatch.setenv("nnUNet_results", str(shared_root / "models"))
    out = tmp_path / "out"
    ran = seggate("-i", source, "-o", out, *WORDS, "--cache", tmp_path / "cache")
    assert ran.exit_code == 0, ran.output
    for case in CASES:
        mine, theirs = out / f"{case}.nii.gz", reference / f"{case}.nii.gz"
        with gzip.open(mine) as first, gzip.open(theirs) as second:
            assert first.read(NIFTI_HEADER) == second.read(NIFTI_HEADER)
        found, wanted = read_label_map(mine).array, read_label_map(theirs).array
        assert (found == wanted).mean() >= 0.9999
        with (
            np.load(out / f"{case}.npz", allow_pickle=False) as first_npz,
            np.load(reference / f"{case}.npz", allow_pickle=False) as second_npz,
        ):
            ours, nnunets = first_npz["probabilities"], second_npz["probabilities"]
        assert (ours.shape, ours.dtype) == (nnunets.shape, nnunets.dtype)
        np.testing.assert_allclose(ours, nnunets, atol=0.01)  # nnU-Net sums logits in half precision
    assert {path.name for path in reference.iterdir()} - {path.name for path in out.iterdir()} == {
        f"{case}.pkl" for case in CASES
    }
    theirs_arguments = json.loads((reference / "predict_from_raw_data_args.json").read_text())
    arguments = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert set(theirs_arguments) <= set(arguments)
    different = {key for key, value in theirs_arguments.items() if arguments[key] != value}
    assert different == {"output_folder_or_list_of_truncated_output_files"}
    dataset = json.loads((out / "dataset.json").read_text())
    theirs_dataset = json.loads((reference / "dataset.json").read_text())
    for key in ("labels", "channel_names", "file_ending", "numTraining"):
        assert dataset[key] == theirs_dataset[key]
    assert json.loads((out / "plans.json").read_text()) == json.loads((reference / "plans.json").read_text())


def test_a_result_folder_is_converted_once_and_folds_that_are_absent_are_told(
    folders: tuple[Path, Path], shared_root: Path, tmp_path: Path
) -> None:
    """Without -f nnU-Net takes folds 0 to 4; the model has two of them."""
    model = shared_root / "models" / "Dataset004_Hippocampus" / "nnUNetTrainer__nnUNetSmallPlans__3d_fullres"
    file = folders[0] / f"{CASES[0]}_0000.nii.gz"
    words = ("-i", file, "-o", tmp_path / "out", "-m", model, "--cache", tmp_path / "cache", "-device", "cpu")
    first = seggate(*words, "--disable_tta", "--json")
    assert first.exit_code == 0, first.output
    assert "of the folds 0 to 4 there are 0, 1" in first.stderr
    assert "is converted to a bundle, once" in first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["folds"] == ["0", "1"]
    second = seggate(*words, "--verbose", "--disable_tta")
    assert "is converted" not in second.stderr
    assert seggate(*words, "-f", "7").exit_code == 1


@pytest.mark.parametrize(
    ("words", "results", "reason"),
    [
        (("-d", "4", "-c", "3d_fullres"), "", "nnUNet_results is not set"),
        (("-d", "17", "-c", "3d_fullres"), "models", "none under nnUNet_results"),
        (("-d", "Dataset004_Hippocampus", "-c", "3d_fullres"), "models", "check -tr, -p and -c"),
        (("-d", "hippocampus", "-c", "3d_fullres"), "models", "a dataset's number or its name"),
    ],
)
def test_an_address_that_leads_nowhere_says_where(
    shared_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    results: str,
    reason: str,
) -> None:
    monkeypatch.setenv("nnUNet_results", str(shared_root / results) if results else "")
    ran = seggate("-i", tmp_path, "-o", tmp_path / "out", *words)
    assert ran.exit_code in (1, 2)
    assert reason in ran.stderr


def test_without_torch_it_is_said_what_to_install(
    shared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [*sys.modules]:
        if name == "engine.export" or name.startswith("engine.export."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not there
    for name in ("engine.checkpoint", "engine.network", "engine.parity"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = shared_root / "models" / "Dataset004_Hippocampus" / "nnUNetTrainer__nnUNetSmallPlans__2d"
    ran = seggate("-i", tmp_path, "-o", tmp_path / "out", "-m", model, "--cache", tmp_path / "cache")
    assert ran.exit_code == 1
    assert "needs the Python package torch" in ran.stderr
