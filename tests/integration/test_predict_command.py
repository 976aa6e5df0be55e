"""`seggate predict`: files and DICOM series in, label maps and DICOM Segmentations out."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from engine.bundle import Bundle
from engine.nifti import read_label_map
from gateway.cli import app
from gateway.prediction.series_cases import case_name
from tests.support.intensity_model import Band, write_intensity_bundle
from tests.support.peers import ROOT
from tests.support.phantoms import write_series
from tests.support.raw_datasets import write_array
from tests.support.result_readers import iod_errors, on_source_grid, patient_masks
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle
from tests.unit.test_nifti import as_nnunet_writes
from tests.unit.test_volume import oblique

SPACING = (2.0, 2.0, 2.0)
SHAPE = (18, 20, 22)
# Rows of direction matrices (x, y, z of the index axes in LPS).
DIRECTIONS = {
    "LPS": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    "RAI": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0),
    "PSL": (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "oblique": tuple(oblique().direction.ravel().tolist()),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Labels 1 between 200 and 500, 2 between 500 and 800; voxels are turned to RAS."""
    return write_intensity_bundle(tmp_path_factory.mktemp("bundle") / "phantom", name="phantom")


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    """Blocks of intensities in the middle of each band, other ones in each place, so that a turned result is seen."""
    array = np.full(shape, 100, dtype=np.float32)
    array[2:7, 3:9, 4:12] = 350
    array[9:15, 10:16, 2 + seed : 7 + seed] = 650
    return array


def expected(array: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.select([array > 500, array > 200], [2, 1], 0).astype(np.uint8)


def predict(*words: Any) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, words), "-device", "cpu"])


def lines(ran: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_result_lies_on_the_grid_of_its_image_however_that_is_stored(
    bundle: Bundle, tmp_path: Path, direction: str, ending: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    array = image()
    file = write_array(source / f"a_0000{ending}", array, SPACING, (7.5, -3.25, 11.0), DIRECTIONS[direction])
    ran = predict("-i", source, "-o", tmp_path / "out", "-m", bundle.root, "--json")
    assert ran.exit_code == 0, ran.output
    written = tmp_path / "out" / f"a{ending}"
    np.testing.assert_array_equal(read_label_map(written).array, expected(array))
    wanted = as_nnunet_writes(expected(array), file, tmp_path / f"wanted{ending}")
    assert written.read_bytes() == wanted.read_bytes()
    case, summary = lines(ran)
    assert (case["case"], case["files"]) == ("a", [str(written)])
    assert case["volumes_ml"]["left structure"] == pytest.approx((expected(array) == 1).sum() * 0.008)
    assert set(case["seconds"]) >= {"read", "preprocess", "network", "export", "statistics", "write"}
    assert (summary["ok"], summary["cases"], summary["predicted"], summary["model"]) == (True, 1, 1, "phantom")
    assert summary["weights_digest"] == bundle.weights_digest


def test_nnunets_files_lie_beside_the_results(bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_array(source / "a_0000.mha", image(), SPACING)
    assert predict("-i", source, "-o", tmp_path / "out", "-m", bundle.root, "--disable_tta").exit_code == 0
    out = tmp_path / "out"
    assert json.loads((out / "dataset.json").read_text()) == {**bundle.dataset_json, "file_ending": ".mha"}
    assert json.loads((out / "plans.json").read_text()) == json.loads((bundle.root / "plans.json").read_text())
    arguments = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert arguments["list_of_lists_or_source_folder"] == str(source)
    assert (arguments["num_parts"], arguments["overwrite"], arguments["seggate"]["mirroring"]) == (1, True, False)
    assert sorted(path.name for path in out.iterdir()) == [
        *("a.mha", "dataset.json", "plans.json", "predict_from_raw_data_args.json")
    ]


@pytest.fixture
def two_channels(tmp_path: Path) -> Bundle:
    """Labels voxels where the first channel is more than 10 above the second."""
    root = tmp_path / "two"
    weights = np.array([[0, 0], [1, -1]], dtype=np.float32)
    write_pointwise_network(root / "3d_fullres" / "fold_0.onnx", weights, np.array([0, -10], np.float32), (8, 8, 8))
    planned = configuration_json((8, 8, 8), SPACING, schemes=("NoNormalization", "NoNormalization"))
    return write_tiny_bundle(
        root, labels={"background": 0, "more": 1}, configurations={"3d_fullres": planned}, channels=2
    )


def test_several_channels_are_one_case_from_a_folder_and_as_files(two_channels: Bundle, tmp_path: Path) -> None:
    first, second = image(), np.full(SHAPE, 300, dtype=np.float32)
    source = tmp_path / "in"
    source.mkdir()
    files = [write_array(source / f"a_000{n}.nii.gz", array, SPACING) for n, array in enumerate((first, second))]
    assert predict("-i", source, "-o", tmp_path / "out", "-m", two_channels.root).exit_code == 0
    wanted = (first > 310).astype(np.uint8)
    np.testing.assert_array_equal(read_label_map(tmp_path / "out" / "a.nii.gz").array, wanted)
    plain = [shutil.copy(file, tmp_path / name) for file, name in zip(files, ("t1.nii.gz", "t2.nii.gz"), strict=True)]
    ran = predict("-i", *plain, "-o", tmp_path / "out", "-m", two_channels.root, "--name", "mine")
    assert ran.exit_code == 0, ran.output
    np.testing.assert_array_equal(read_label_map(tmp_path / "out" / "mine.nii.gz").array, wanted)
    ran = predict("-i", files[0], "-o", tmp_path / "out", "-m", two_channels.root)
    assert ran.exit_code == 1
    assert "channels 0000; the model takes 2" in ran.stderr


def test_a_corrupt_file_is_named_and_the_others_are_predicted(bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "abc":
        write_array(source / f"{name}_0000.nii.gz", image(), SPACING)
    whole = (source / "b_0000.nii.gz").read_bytes()
    (source / "b_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (source / "d_0000.nii.gz").write_bytes(b"no image")
    ran = predict("-i", source, "-o", tmp_path / "out", "-m", bundle.root, "--json")
    assert ran.exit_code == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    assert [(line["case"], line["ok"]) for line in lines(ran)[:-1]] == [
        ("a", True),
        ("b", False),
        ("c", True),
        ("d", False),
    ]
    summary = lines(ran)[-1]
    assert (summary["ok"], summary["predicted"]) == (False, 2)
    assert set(summary["failed"]) == {"b", "d"}
    assert "seggate: b: b_0000.nii.gz" in ran.stderr


def test_predictions_are_continued_and_only_what_is_missing_is_made(bundle: Bundle, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        write_array(source / f"{name}_0000.nii.gz", image(), SPACING)
    assert predict("-i", source, "-o", out, "-m", bundle.root).exit_code == 0
    (out / "b.nii.gz").unlink()
    (out / "a.nii.gz").write_bytes(b"kept")
    ran = predict("-i", source, "-o", out, "-m", bundle.root, "--continue_prediction", "--json")
    assert ran.exit_code == 0, ran.output
    assert [line.get("case") for line in lines(ran)] == ["b", None]
    assert (lines(ran)[-1]["skipped"], lines(ran)[-1]["predicted"]) == (2, 1)
    assert (out / "a.nii.gz").read_bytes() == b"kept"
    ran = predict("-i", source, "-o", out, "-m", bundle.root, "--continue_prediction", "--disable_tta")
    assert ran.exit_code == 2
    assert "was begun with another mirroring" in ran.stderr
    assert predict("-i", source, "-o", out, "-m", bundle.root).exit_code == 0  # all again
    assert (out / "a.nii.gz").read_bytes() != b"kept"


def test_cases_are_divided_between_calls(bundle: Bundle, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        write_array(source / f"{name}_0000.nii.gz", image(), SPACING)
    ran = predict("-i", source, "-o", out, "-m", bundle.root, "-num_parts", "2", "-part_id", "1", "--json")
    assert [line.get("case") for line in lines(ran)] == ["b", None]
    predict("-i", source, "-o", out, "-m", bundle.root, "-num_parts", 2, "-part_id", 0, "-npp", 2, "-nps", 2)
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_probabilities_and_where_they_lie_are_written_without_a_pickle(bundle: Bundle, tmp_path: Path) -> None:
    array = image()
    array[:1] = 0
    file = write_array(tmp_path / "a_0000.nii.gz", array, SPACING, (1.0, 2.0, 3.0), DIRECTIONS["PSL"])
    ran = predict("-i", file, "-o", tmp_path / "out", "-m", bundle.root, "--save_probabilities")
    assert ran.exit_code == 0, ran.output
    with np.load(tmp_path / "out" / "a.npz", allow_pickle=False) as archive:
        probabilities = archive["probabilities"]
    assert (probabilities.shape, probabilities.dtype) == ((3, *SHAPE), np.float32)
    np.testing.assert_array_equal(probabilities.argmax(axis=0), expected(array))
    np.testing.assert_array_equal(read_label_map(tmp_path / "out" / "a.nii.gz").array, expected(array))
    properties = json.loads((tmp_path / "out" / "a.properties.json").read_text())
    assert properties["spacing"] == [2.0, 2.0, 2.0]
    assert properties["sitk_stuff"]["origin"] == [1.0, 2.0, 3.0]
    assert properties["shape_after_cropping_and_before_resampling"] != properties["shape_before_cropping"]


def test_a_result_never_takes_the_place_of_an_image(bundle: Bundle, tmp_path: Path) -> None:
    file = write_array(tmp_path / "scan.nii.gz", image(), SPACING)
    before = file.read_bytes()
    ran = predict("-i", file, "-o", tmp_path, "-m", bundle.root)
    assert ran.exit_code == 2
    assert "would be written over an image" in ran.stderr
    assert file.read_bytes() == before


def test_folds_configurations_and_checkpoints_that_a_bundle_has_not_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    file = write_array(tmp_path / "a_0000.nii.gz", image(), SPACING)
    common = ("-i", file, "-o", tmp_path / "out", "-m", bundle.root)
    assert predict(*common, "-f", "0", "-c", "3d_fullres").exit_code == 0
    for words, reason in (
        (("-f", "3"), "has no fold 3; it has 0"),
        (("-c", "2d"), "no configuration '2d'"),
        (("-chk", "checkpoint_best.pth"), "a bundle has no checkpoints"),
        (("-prev_stage_predictions", tmp_path), "brings that stage"),
        (("--format", "seg"), "refers to DICOM images"),
        (("--orientation", "XYZ"), "three letters are needed"),
    ):
        ran = predict(*common, *words)
        assert ran.exit_code in (1, 2)
        assert reason in ran.stderr


def test_a_bundle_is_taken_from_a_zip_and_kept_and_a_damaged_copy_is_made_anew(bundle: Bundle, tmp_path: Path) -> None:
    file = write_array(tmp_path / "a_0000.nii.gz", image(), SPACING)
    archive = tmp_path / "phantom.zip"
    with zipfile.ZipFile(archive, "w") as container:
        for path in sorted(bundle.root.rglob("*")):
            if path.is_file():
                container.write(path, Path("phantom") / path.relative_to(bundle.root))
    words = ("-i", file, "-o", tmp_path / "out", "-m", archive, "--cache", tmp_path / "cache")
    assert predict(*words).exit_code == 0
    (kept,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "plans"]
    (kept / "plans.json").write_text("{}")
    assert predict(*words).exit_code == 0
    assert json.loads((kept / "plans.json").read_text())["dataset_name"] == "Dataset999_Tiny"


def test_a_registered_model_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gateway.toml").write_text('state_dir = "state"\n')
    config = ("--config", str(tmp_path / "config"))
    file = write_array(tmp_path / "a_0000.nii.gz", image(), SPACING)
    ran = predict("-i", file, "-o", tmp_path / "out", "-m", "phantom", *config)
    assert "nothing is registered" in str(ran.exception)
    assert CliRunner().invoke(app, ["models", "import", str(bundle.root), *config]).exit_code == 0
    ran = predict("-i", file, "-o", tmp_path / "out", "-m", "phantom", "--json", *config)
    assert ran.exit_code == 0, ran.output
    assert lines(ran)[-1]["version"] == "1.0.0"
    assert predict("-i", file, "-o", tmp_path / "out", "-m", "phantom:1.0.0", *config).exit_code == 0
    assert "no version 2.0.0" in str(predict("-i", file, "-o", "out", "-m", "phantom:2.0.0", *config).exception)
    assert "no such file or folder" in predict("-i", file, "-o", "out", "-m", "no/such/model").stderr


@pytest.mark.peer("dciodvfy", "dcmqi")
@pytest.mark.parametrize("orientation", ["axial", "sagittal", "double-oblique"])
@pytest.mark.parametrize("enhanced", [False, True])
def test_a_series_becomes_a_valid_segmentation_and_a_label_map_that_agree(
    bundle: Bundle, tmp_path: Path, orientation: Any, enhanced: bool
) -> None:
    series = write_series(
        tmp_path / "in", orientation=orientation, spacing_mm=SPACING, enhanced=enhanced, modality="MR"
    )
    ran = predict("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle.root, "--format", "both", "--json")
    assert ran.exit_code == 0, ran.output
    case, _ = lines(ran)
    name = case_name(series.series_instance_uid, "")
    assert (case["case"], case["series_instance_uid"]) == (name, series.series_instance_uid)
    labels = read_label_map(tmp_path / "out" / f"{name}.nii.gz")
    np.testing.assert_array_equal(labels.array, series.labels)
    np.testing.assert_allclose(labels.geometry.affine_lps, series.affine_lps, atol=1e-4)
    file = tmp_path / "out" / f"{name}.seg.dcm"
    assert iod_errors(file) == []
    for number, (mask, affine) in patient_masks(file, tmp_path / "dcmqi").items():
        assert np.array_equal(on_source_grid(mask, affine, labels.geometry), series.labels == number)
    made = pydicom.dcmread(file, stop_before_pixels=True)
    assert made.StudyInstanceUID == series.study_instance_uid
    assert made.PatientID == series.datasets[0].PatientID
    text = (tmp_path / "out" / "predict_from_raw_data_args.json").read_text()
    assert json.loads(text)["list_of_lists_or_source_folder"] is None
    assert series.datasets[0].PatientID not in "".join(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.peer("dciodvfy")
def test_a_tilted_stack_has_a_segmentation_and_no_nifti(bundle: Bundle, tmp_path: Path) -> None:
    write_series(tmp_path / "in", spacing_mm=SPACING, tilt_deg=15.0)
    words = ("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle.root)
    ran = predict(*words)
    assert ran.exit_code == 1
    assert "sheared" in ran.stderr
    assert "--format seg" in ran.stderr
    assert predict(*words, "--format", "seg", "--seg-encoding", "BINARY").exit_code == 0
    (file,) = (tmp_path / "out").glob("*.seg.dcm")
    assert iod_errors(file) == []


def test_every_series_is_predicted_and_what_the_contract_excludes_says_why(bundle: Bundle, tmp_path: Path) -> None:
    good = write_series(tmp_path / "in" / "1", spacing_mm=SPACING, modality="MR", series_number=1)
    other = write_series(tmp_path / "in" / "2", spacing_mm=SPACING, modality="CT", series_number=2)
    coarse = write_series(tmp_path / "in" / "3", spacing_mm=(9.0, 2.0, 2.0), modality="MR", series_number=3)
    ran = predict("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle.root, "--json")
    assert ran.exit_code == 1
    by_series = {line["series_instance_uid"]: line for line in lines(ran)[:-1]}
    assert by_series[good.series_instance_uid]["ok"]
    assert by_series[other.series_instance_uid]["ok"]
    assert "spacing" in by_series[coarse.series_instance_uid]["error"]
    ran = predict("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle.root, "--name", "one")
    assert ran.exit_code == 2
    assert "--name is for one case, and there are 3" in ran.stderr
    files = good.files if len(good.files) > 1 else ()
    ran = predict("-i", *files, "-o", tmp_path / "out", "-m", bundle.root, "--name", "one")
    assert ran.exit_code == 0, ran.output
    np.testing.assert_array_equal(read_label_map(tmp_path / "out" / "one.nii.gz").array, good.labels)


def test_dicom_for_a_model_of_unknown_voxel_order_is_refused_until_somebody_states_it(tmp_path: Path) -> None:
    bands = {"left structure": Band(low=200, high=500), "right structure": Band(low=500, high=800)}
    unknown = write_intensity_bundle(tmp_path / "b", name="unknown", bands=bands, orientation="as-stored")
    series = write_series(tmp_path / "in", spacing_mm=SPACING, modality="MR")
    words = ("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", unknown.root, "--name", "a")
    ran = predict(*words)
    assert ran.exit_code == 2
    assert "give --orientation" in ran.stderr
    for stated in ("RAS", "as-stored"):
        assert predict(*words, "--orientation", stated).exit_code == 0
        np.testing.assert_array_equal(read_label_map(tmp_path / "out" / "a.nii.gz").array, series.labels)


def test_a_folder_without_images_says_what_was_looked_for(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ran = predict("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", bundle.root)
    assert ran.exit_code == 2
    assert "neither CASE_0000.nii.gz as nnU-Net names its files, nor DICOM" in ran.stderr


def test_a_spacing_that_the_model_is_not_meant_for_is_told(bundle: Bundle, tmp_path: Path) -> None:
    file = write_array(tmp_path / "a_0000.nii.gz", image(), (9.0, 2.0, 2.0))
    ran = predict("-i", file, "-o", tmp_path / "out", "-m", bundle.root, "--json")
    assert ran.exit_code == 0, ran.output
    assert "outside what the model is meant for" in lines(ran)[0]["notes"][0]


def test_a_process_loads_nothing_that_it_does_not_need(bundle: Bundle, tmp_path: Path) -> None:
    """What makes a start slow: each of these takes a part of a second or more."""
    file = write_array(tmp_path / "a_0000.nii.gz", image(), SPACING)
    script = (
        "import sys\nfrom gateway.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write('\\n' + ' '.join(m for m in sys.modules if '.' not in m))"
    )
    for _ in range(2):  # the first measures an execution plan
        ran = subprocess.run(
            [sys.executable, "-c", script, "predict", "-i", file, "-o", tmp_path / "out", "-m", bundle.root, "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}", "PATH": "/usr/bin", "XDG_CACHE_HOME": str(tmp_path)},
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stderr.splitlines()[-1].split())
    assert {"engine", "numpy"} <= loaded
    assert len(loaded & {"onnxruntime", "openvino"}) == 1
    assert not loaded & {
        *("torch", "dbos", "mlflow", "fastapi", "sqlalchemy", "pydicom", "highdicom", "structlog", "matplotlib"),
        *("pydantic_settings", "httpx", "pynetdicom", "apscheduler", "alembic"),
    }
    assert json.loads(ran.stdout.splitlines()[-1])["first_window_s"] > 0


@pytest.mark.parametrize("stopped_by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_whole_files_and_the_same_command_goes_on(
    bundle: Bundle, tmp_path: Path, stopped_by: signal.Signals
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    first = write_array(source / "case_000_0000.nii.gz", image(), SPACING)
    for index in range(1, 120):
        (source / f"case_{index:03}_0000.nii.gz").symlink_to(first)
    words = [sys.executable, "-m", "gateway.cli", "predict", "-m", str(bundle.root), "--json"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'fhir'}", "PATH": "/usr/bin"}
    with subprocess.Popen(
        [*words, "-i", source, "-o", out, "-device", "cpu"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["case"] == "case_000"
        running.send_signal(stopped_by)
        rest, _ = running.communicate(timeout=120)
        assert running.returncode == 1
    summary = json.loads(rest.splitlines()[-1])
    assert (summary["state"], summary["ok"]) == ("stopped", False)
    assert 1 <= summary["predicted"] < 120
    whole = sorted(path.name for path in out.glob("*.nii.gz"))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    ran = predict("-i", source, "-o", out, "-m", bundle.root, "--continue_prediction", "--json")
    assert (lines(ran)[-1]["skipped"], lines(ran)[-1]["predicted"]) == (len(whole), 120 - len(whole))
    for name in whole:
        np.testing.assert_array_equal(read_label_map(out / name).array, expected(image()))


def test_the_label_map_of_a_flat_image_is_flat(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    write_pointwise_network(
        root / "2d" / "fold_0.onnx", np.array([[0], [1]], np.float32), np.array([0, -200], np.float32), (8, 8)
    )
    flat = write_tiny_bundle(
        root, labels={"background": 0, "high": 1}, configurations={"2d": configuration_json((8, 8), (2.0, 2.0))}
    )
    array = image()[4]
    file = tmp_path / "a_0000.nii.gz"
    picture = sitk.GetImageFromArray(array)
    picture.SetSpacing((2.0, 2.0))
    sitk.WriteImage(picture, str(file))
    ran = predict("-i", file, "-o", tmp_path / "out", "-m", flat.root)
    assert ran.exit_code == 0, ran.output
    back = sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz"))
    assert back.GetDimension() == 2
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), array > 200)
