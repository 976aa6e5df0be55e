"""Left and right, end to end: C-STORE in, and the side read from SEG, SR and report by programs others wrote.

The phantom holds a large bright structure in the patient's left half and a smaller, brighter one in the right half.
The model segments by brightness, so its answer is known voxel by voxel, whatever the orientation of the series.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from engine.volume import Geometry
from tests.support.intensity_model import SWAPPED_BANDS, write_intensity_bundle
from tests.support.peers import require_peer
from tests.support.phantoms import CENTRE_MM, LEFT, RIGHT, PhantomSeries, write_series
from tests.support.result_readers import iod_errors, measurement_report, on_source_grid, patient_masks
from tests.support.running_gateway import RunningGateway, running_gateway

pytestmark = pytest.mark.peer("dcmqi", "dciodvfy", "orthanc")

SPACING_MM = (2.0, 2.0, 2.0)
SHAPE = (24, 26, 30)
SERIES: dict[str, dict[str, Any]] = {
    "axial": {},
    "axial-prone": {"orientation": "axial-prone"},
    "axial-mirrored": {"orientation": "axial-mirrored", "modality": "MR"},
    "sagittal": {"orientation": "sagittal", "modality": "MR"},
    "coronal": {"orientation": "coronal"},
    "oblique": {"orientation": "oblique", "modality": "MR"},
    "double-oblique": {"orientation": "double-oblique"},
    "reversed": {"order": "reversed", "instance_numbers": "against", "rescale": "per-slice"},
    "tilted": {"tilt_deg": 15.0, "order": "shuffled", "instance_numbers": "absent"},
    "enhanced": {"enhanced": True, "order": "shuffled"},
    "enhanced-sagittal": {"enhanced": True, "modality": "MR", "orientation": "sagittal", "order": "reversed"},
}
SWAPPED = "model with exchanged sides"
PATIENT = "PH-0001"
LEFT_CODE, RIGHT_CODE = "7771000", "24028007"  # SNOMED CT: Left, Right

ROUTES = f"""
time_zone = "UTC"

[[rules]]
name = "exchanged"
model = "sides-exchanged"
stop = true
[rules.when]
all = [{{ attribute = "SeriesDescription", op = "equals", value = "{SWAPPED}" }}]

[[rules]]
name = "sides"
model = "sides"
[rules.when]
all = [{{ attribute = "Modality", op = "in", value = ["CT", "MR"] }}]
"""


@dataclass(frozen=True)
class Sent:
    """All phantoms have been sent; each test waits for its own."""

    gateway: RunningGateway
    series: dict[str, PhantomSeries]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    require_peer("dcmqi", "dciodvfy", "orthanc")
    folder = tmp_path_factory.mktemp("sides")
    bundles = [
        write_intensity_bundle(folder / "sides", name="sides", spacing_mm=SPACING_MM),
        write_intensity_bundle(folder / "exchanged", name="sides-exchanged", bands=SWAPPED_BANDS),
    ]
    recipes = {**SERIES, SWAPPED: {"series_description": SWAPPED}}
    with running_gateway(folder, routes=ROUTES, bundles=bundles, patients=[PATIENT]) as gateway:
        series = {
            name: write_series(folder / "sources" / str(seed), spacing_mm=SPACING_MM, shape=SHAPE, seed=seed, **recipe)
            for seed, (name, recipe) in enumerate(recipes.items(), start=100)
        }
        report = gateway.send([file for made in series.values() for file in made.files])
        assert report.failed == ()
        yield Sent(gateway, series)


def by_slice_position(path: Path, segment: int, series: PhantomSeries) -> NDArray[np.bool_]:
    """Frames of one segment, each at the source slice that has its Image Position (Patient); read by pydicom."""
    dataset = pydicom.dcmread(path)
    places = np.array([ds.ImagePositionPatient for ds in series.datasets], dtype=np.float64)
    placed = np.zeros(series.labels.shape, dtype=np.bool_)
    for frame, plane in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=np.float64)
            (index,) = np.flatnonzero(np.abs(places - position).max(axis=1) < 1e-3)
            placed[index] = plane
    return placed


@pytest.mark.requirement("OUT-38", open="rendering in OHIF")
@pytest.mark.requirement("CARD-01", "CARD-03", "CARD-04")
@pytest.mark.parametrize("name", SERIES)
def test_side_and_every_voxel_are_right_in_segmentation_report_and_emr(sent: Sent, name: str, tmp_path: Path) -> None:
    series, gateway = sent.series[name], sent.gateway
    document = gateway.wait_until_ended(series.study_instance_uid)
    assert (document["state"], document["reason"]) == ("verified", None)
    files = gateway.result_files(series.study_instance_uid, tmp_path)
    assert set(files) == {"SEG", "SR"}
    voxel_ml = abs(np.linalg.det(series.affine_lps[:3, :3])) / 1000  # a leaning voxel is smaller than its edges say
    volumes_ml = {side: (series.labels == side).sum() * voxel_ml for side in (LEFT, RIGHT)}
    assert volumes_ml[LEFT] > 2 * volumes_ml[RIGHT] > 0

    assert iod_errors(files["SEG"]) == []
    geometry = Geometry(shape=series.labels.shape, affine_lps=series.affine_lps)
    masks = patient_masks(files["SEG"], tmp_path / "masks")
    assert set(masks) == {LEFT, RIGHT}
    centres = {}
    for side, (mask, affine) in masks.items():
        if name == "tilted":  # an ITK image cannot lean; its slices are where they are, its columns are not
            assert np.array_equal(by_slice_position(files["SEG"], side, series), series.labels == side)
        else:
            assert np.array_equal(on_source_grid(mask, affine, geometry), series.labels == side)
        z, y, x = np.nonzero(mask)
        centres[side] = (affine @ np.stack([x, y, z, np.ones_like(x)]).astype(np.float64))[:3].mean(axis=1)
    assert centres[LEFT][0] > CENTRE_MM[0] > centres[RIGHT][0]

    assert iod_errors(files["SR"]) == []
    groups = {
        g["ReferencedSegment"]: g
        for g in measurement_report(files["SR"], tmp_path)["Measurements"]
        if "ReferencedSegment" in g
    }
    assert {n: g["Laterality"]["CodeValue"] for n, g in groups.items()} == {LEFT: LEFT_CODE, RIGHT: RIGHT_CODE}
    for side, group in groups.items():
        (volume,) = [m for m in group["measurementItems"] if m["quantity"]["CodeMeaning"] == "Volume"]
        assert float(volume["value"]) == pytest.approx(volumes_ml[side], rel=1e-6)

    (report,) = gateway.reports(document)
    sites = {o["bodySite"]["text"]: o for o in gateway.observations(report) if "bodySite" in o}
    assert set(sites) == {"left structure (Lung)", "right structure (Lung)"}
    for side, word, code in ((LEFT, "left", LEFT_CODE), (RIGHT, "right", RIGHT_CODE)):
        observation = sites[f"{word} structure (Lung)"]
        assert observation["valueQuantity"]["value"] == pytest.approx(volumes_ml[side], abs=1e-4)
        sides = [c["valueCodeableConcept"] for c in observation["component"] if "valueCodeableConcept" in c]
        assert [c["coding"][0]["code"] for c in sides] == [code]


@pytest.mark.requirement("CARD-02")
def test_a_model_that_exchanges_the_sides_is_held_and_nothing_leaves(sent: Sent) -> None:
    series, gateway = sent.series[SWAPPED], sent.gateway
    document = gateway.wait_until_ended(series.study_instance_uid)
    assert document["state"] == "held"
    (result,) = document["results"]
    assert (result["state"], result["verdict"]) == ("held", "hold")
    assert [c["name"] for c in result["checks"] if c["verdict"] == "hold"] == ["laterality"]
    assert gateway.in_pacs(series.study_instance_uid) == []
    assert gateway.reports(document) == []
    assert result["deliveries"] == []
    metrics = httpx.get(f"{gateway.web_url}/metrics", timeout=10).text
    labels = 'model="sides-exchanged",state="held",verdict="hold",version="1.0.0"'
    assert f"seggate_results_total{{{labels}}} 1.0" in metrics
    assert 'seggate_alarms_open{kind="result-held"} 1.0' in metrics
    assert "held" in [e["kind"] for e in document["events"]]
