"""gateway.learning.corrections: a reader's labels from SEG and NIfTI, what is refused, and what counts of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from sqlalchemy import select

from engine.errors import InputRejected
from engine.labels import LabelManager
from engine.volume import Geometry, reorientation
from gateway.errors import Rejected
from gateway.learning.corrected_labels import CorrectedLabels, read_corrected_labels
from gateway.learning.corrections import (
    correction_of,
    corrections_of_model,
    mean_dice,
    record_correction,
    right_labels,
)
from gateway.learning.result_source import result_source
from gateway.results.content import Encoding
from gateway.results.inference import load_labels
from gateway.results.segmentation import encode_segmentation
from gateway.results.series import SeriesPart
from storage import ledger
from storage.errors import ObjectChanged
from storage.learning_records import Correction
from storage.records import Result, ResultState
from tests.support.live_results import SHAPE, SPACING_MM, LiveModel, live_model
from tests.support.phantoms import PhantomPatient, PhantomSeries, write_series
from tests.support.result_contents import content_of, part_of

OWNER = PhantomPatient().patient_id
LABELS = LabelManager.from_dataset_json({"labels": {"background": 0, "left structure": 1, "right structure": 2}})


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    with live_model(tmp_path) as live:
        yield live


def phantom(folder: Path, **options: Any) -> PhantomSeries:
    return write_series(folder, **({"shape": SHAPE, "spacing_mm": SPACING_MM, "instance_numbers": "against"} | options))


def edited(labels: NDArray[Any]) -> NDArray[Any]:
    """What a reader might make of it: a plane of the one is cut away, some voxels are added to the other."""
    right = labels.copy()
    right[:, : SHAPE[1] // 2][right[:, : SHAPE[1] // 2] == 1] = 0
    right[2:4, 2:5, 2:6] = 2
    return right


def write_seg(part: SeriesPart, labels: NDArray[Any], path: Path, encoding: Encoding = "BINARY") -> Path:
    path.write_bytes(encode_segmentation(content_of(part, labels), encoding=encoding).data)
    return path


def write_nifti(part: SeriesPart, labels: NDArray[Any], path: Path, code: str, **changes: Any) -> Path:
    """The labels in another voxel order, the origin moved by `shift_mm`."""
    change = reorientation(Geometry(shape=labels.shape, affine_lps=part.geometry.affine_lps), code)
    array = change.apply(labels)
    image = sitk.GetImageFromArray(array[changes.get("crop", slice(None))])
    image.SetSpacing(change.target.spacing_mm[::-1])
    shift = np.asarray(changes.get("shift_mm", (0.0, 0.0, 0.0)))
    image.SetOrigin((np.asarray(change.target.origin_mm) + shift).tolist())
    image.SetDirection(change.target.direction.ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


def read(live: LiveModel, result_id: str, file: Path, **options: Any) -> CorrectedLabels:
    source = result_source(live.database, live.spool, result_id)
    options = {"patient_id": source.study.patient_id} | options
    return read_corrected_labels(file, source.part(), LABELS, load_labels(live.spool, source.result), **options)


def dice(one: NDArray[Any], other: NDArray[Any], value: int) -> float:
    return float(2 * ((one == value) & (other == value)).sum() / ((one == value).sum() + (other == value).sum()))


@pytest.mark.requirement("ART-26", open="the viewer in which readers approve, edit and reject")
@pytest.mark.parametrize("encoding", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize(
    ("orientation", "order"),
    [("axial", "ascending"), ("axial-mirrored", "reversed"), ("double-oblique", "shuffled"), ("coronal", "reversed")],
)
def test_an_edited_segmentation_is_kept_voxel_by_voxel_with_its_dice(
    live: LiveModel, tmp_path: Path, orientation: Any, order: Any, encoding: Encoding
) -> None:
    series = phantom(tmp_path / "s", orientation=orientation, order=order)
    result_id = live.serve(series)
    right = edited(series.labels)
    file = write_seg(part_of(series.files), right, tmp_path / "seg.dcm", encoding)
    row = record_correction(
        live.database,
        live.spool,
        result_id,
        kind="corrected",
        by="reader",
        reason="border",
        labels=read(live, result_id, file),
        seconds=90,
    )
    with live.database.reading() as session:
        result = session.get_one(Result, result_id)
        kept = correction_of(session, result_id)
        events = ledger.events(session, ledger.study_subject(series.study_instance_uid))
        assert ledger.verify(session) > 0
    assert kept is not None
    assert kept.correction_id == row.correction_id
    found = right_labels(live.spool, result, kept)
    assert found.dtype == np.uint8
    assert np.array_equal(found, right)
    predicted = load_labels(live.spool, result)
    assert np.array_equal(predicted, series.labels)
    assert kept.dice == {
        name: pytest.approx(dice(predicted, right, value), abs=1e-6)
        for value, name in ((1, "left structure"), (2, "right structure"))
    }
    assert mean_dice(kept.dice) == pytest.approx(np.mean(list(kept.dice.values())))
    event = events[-1]
    assert (event.kind, event.actor) == ("corrected", "user:reader")
    assert event.detail["labels_sha256"] == kept.labels_digest
    said = json.dumps(event.detail)
    assert OWNER not in said
    assert "Confidential" not in said
    assert str(kept.labels_path).startswith("studies/")
    assert result_id in str(kept.labels_path)


@pytest.mark.requirement("ART-26")
@pytest.mark.parametrize("code", ["LPS", "RAS", "SAL", "PIR"])
@pytest.mark.parametrize("orientation", ["axial-mirrored", "double-oblique"])
def test_a_nifti_label_map_counts_in_any_voxel_order(
    live: LiveModel, tmp_path: Path, orientation: Any, code: str
) -> None:
    series = phantom(tmp_path / "s", orientation=orientation, order="reversed")
    result_id = live.serve(series)
    right = edited(series.labels)
    file = write_nifti(part_of(series.files), right, tmp_path / "x.nii.gz", code)
    assert np.array_equal(read(live, result_id, file).array, right)


def test_the_labels_of_another_series_are_refused_with_both_uids(live: LiveModel, tmp_path: Path) -> None:
    result_id = live.serve(phantom(tmp_path / "s"))
    other = phantom(tmp_path / "other", series_number=2)
    with pytest.raises(Rejected, match=rf"refers to series {other.series_instance_uid}; the result is of series"):
        read(live, result_id, write_seg(part_of(other.files), other.labels, tmp_path / "seg.dcm"))
    foreign = phantom(tmp_path / "foreign", seed=9)
    with pytest.raises(Rejected, match=r"StudyInstanceUID \(0020,000D\) is .* that of the result is"):
        read(live, result_id, write_seg(part_of(foreign.files), foreign.labels, tmp_path / "foreign.dcm"))


def with_changes(path: Path, **values: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        for keyword, value in values.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
        ds.save_as(path)
    return path


def test_another_frame_of_reference_patient_or_no_reference_is_refused(live: LiveModel, tmp_path: Path) -> None:
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)
    part = part_of(series.files)

    def seg(**values: Any) -> Path:
        return with_changes(write_seg(part, series.labels, tmp_path / "seg.dcm"), **values)

    with pytest.raises(Rejected, match=r"FrameOfReferenceUID \(0020,0052\) is 1\.2\.3, that of series"):
        read(live, result_id, seg(FrameOfReferenceUID="1.2.3"))
    with pytest.raises(Rejected, match=r"PatientID .* is another one") as refused:
        read(live, result_id, seg(PatientID="SECRET-7"))
    assert "SECRET-7" not in str(refused.value)
    plain = seg(ReferencedSeriesSequence=None, SourceImageSequence=None)
    ds = pydicom.dcmread(plain)
    for frame in ds.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence
    ds.save_as(plain)
    with pytest.raises(Rejected, match="names no images"):
        read(live, result_id, plain)
    assert np.array_equal(read(live, result_id, seg()).array, series.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift_mm": (1.0, 0.0, 0.0)}, "another grid than its images, up to 0.50 voxels"),
        ({"shift_mm": (2.0, 0.0, 0.0)}, "lies 1 voxels away"),
        ({"crop": slice(1, None)}, r"has 20 x 18 x 13 voxels \(x, y, z\), its images 20 x 18 x 14"),
    ],
)
def test_a_label_map_on_another_grid_is_refused_with_what_differs(
    live: LiveModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)
    file = write_nifti(part_of(series.files), series.labels, tmp_path / "x.nii.gz", "LPS", **changes)
    with pytest.raises(Rejected, match=message):
        read(live, result_id, file)


def test_labels_that_the_model_does_not_know_are_refused_by_name_and_value(live: LiveModel, tmp_path: Path) -> None:
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)
    part = part_of(series.files)
    seg = write_seg(part, series.labels, tmp_path / "seg.dcm")
    ds = pydicom.dcmread(seg)
    ds.SegmentSequence[1].SegmentLabel = "Spleen"
    ds.save_as(seg)
    with pytest.raises(Rejected, match=r"the model has no label 'Spleen' \(it has 1 'left structure', 2 'right"):
        read(live, result_id, seg)
    unknown = series.labels.copy()
    unknown[0, 0, :3] = 7
    with pytest.raises(Rejected, match="label 7 in 3 voxels; declared are 0 to 2"):
        read(live, result_id, write_nifti(part, unknown, tmp_path / "x.nii.gz", "LPS"))
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputRejected, match="not readable"):
        read(live, result_id, tmp_path / "broken.nii.gz")
    (tmp_path / "broken.dcm").write_bytes(b"no object")
    with pytest.raises(Rejected, match=r"broken\.dcm"):
        read(live, result_id, tmp_path / "broken.dcm")


def test_a_segmentation_of_one_organ_says_nothing_of_the_other_unless_it_is_told(
    live: LiveModel, tmp_path: Path
) -> None:
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)
    right = np.where(series.labels == 1, 1, 0).astype(np.uint8)
    right[0, 0, :4] = 1
    seg = write_seg(part_of(series.files), right, tmp_path / "seg.dcm")
    ds = pydicom.dcmread(seg)
    del ds.SegmentSequence[1]
    ds.save_as(seg)
    with pytest.raises(Rejected, match="has no segment for 'right structure', which the result has; --missing keep"):
        read(live, result_id, seg)
    assert np.array_equal(read(live, result_id, seg, missing="erase").array, right)
    kept = read(live, result_id, seg, missing="keep").array
    assert np.array_equal(kept, np.where(series.labels == 2, 2, right))


@pytest.mark.requirement("ART-26")
def test_a_later_word_counts_and_opening_again_takes_nothing_back(live: LiveModel, tmp_path: Path) -> None:
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)

    def said(kind: Any, **options: Any) -> str:
        record_correction(live.database, live.spool, result_id, kind=kind, by="reader", **options)
        with live.database.reading() as session:
            counts = correction_of(session, result_id)
        assert counts is not None
        return counts.kind

    with live.database.reading() as session:
        assert correction_of(session, result_id) is None
    assert said("opened") == "opened"
    assert said("approved") == "approved"
    assert said("opened") == "approved"
    file = write_nifti(part_of(series.files), edited(series.labels), tmp_path / "x.nii.gz", "RAS")
    assert said("corrected", labels=read(live, result_id, file)) == "corrected"
    assert said("opened") == "corrected"
    assert said("rejected", reason="motion") == "rejected"
    with live.database.reading() as session:
        rows = session.scalars(select(Correction)).all()
        assert len(rows) == 6  # all of them stay
        events = [e for e in ledger.events(session, ledger.study_subject(series.study_instance_uid))][-6:]
        assert {r: c.kind for r, c in corrections_of_model(session, "phantom").items()} == {result_id: "rejected"}
        assert corrections_of_model(session, "other") == {}
    assert [e.kind for e in events] == ["opened", "approved", "opened", "corrected", "opened", "rejected"]
    assert [e.detail["replaces"] for e in events] == [None, 1, None, 2, None, 4]
    approved = next(row for row in rows if row.kind == "approved")
    assert approved.dice == {"left structure": 1.0, "right structure": 1.0}


def test_only_a_result_that_was_released_or_held_is_judged(live: LiveModel) -> None:
    result_id = live.serve()
    for state, message in ((ResultState.SUPERSEDED, "was superseded"), (ResultState.FAILED, "is failed")):
        with live.database.session() as session:
            session.get_one(Result, result_id).state = state
        with pytest.raises(Rejected, match=message):
            record_correction(live.database, live.spool, result_id, kind="approved", by="reader")
    with pytest.raises(ValueError, match="a correction has them"):
        record_correction(live.database, live.spool, result_id, kind="corrected", by="reader")
    with live.database.reading() as session:
        assert session.scalars(select(Correction)).all() == []


def test_labels_of_a_correction_that_were_altered_on_disk_are_not_used(live: LiveModel, tmp_path: Path) -> None:
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)
    file = write_nifti(part_of(series.files), edited(series.labels), tmp_path / "x.nii.gz", "RAS")
    row = record_correction(
        live.database, live.spool, result_id, kind="corrected", by="r", labels=read(live, result_id, file)
    )
    (live.spool.root / str(row.labels_path)).write_bytes(b"other")
    with live.database.reading() as session:
        result = session.get_one(Result, result_id)
    with pytest.raises(ObjectChanged, match="altered"):
        right_labels(live.spool, result, row)


def test_the_dice_of_regions_and_of_ignored_voxels(live: LiveModel, tmp_path: Path) -> None:
    """A region holds the voxels of all its labels; what the reader ignores counts nowhere."""
    series = phantom(tmp_path / "s")
    result_id = live.serve(series)
    regions = LabelManager.from_dataset_json(
        {
            "labels": {"background": 0, "both": [1, 2], "core": [2], "ignore": 3},
            "regions_class_order": [1, 2],
        }
    )
    right = series.labels.copy()
    right[right == 2] = 1
    right[:, :, : SHAPE[2] // 2][right[:, :, : SHAPE[2] // 2] == 0] = 3
    labels = CorrectedLabels(array=right, geometry=part_of(series.files).geometry, labels=regions)
    row = record_correction(live.database, live.spool, result_id, kind="corrected", by="r", labels=labels)
    assert row.dice == {"both": 1.0, "core": 0.0}


def test_overlapping_regions_of_a_segmentation_are_one_label_map(tmp_path: Path) -> None:
    series = phantom(tmp_path / "s")
    regions = LabelManager.from_dataset_json(
        {"labels": {"background": 0, "structure 1": [1, 2], "structure 2": [2]}, "regions_class_order": [1, 2]}
    )
    part = part_of(series.files)
    file = tmp_path / "seg.dcm"
    file.write_bytes(encode_segmentation(content_of(part, series.labels, regions=[(1, 2), (2,)])).data)
    found = read_corrected_labels(file, part, regions, series.labels)
    assert np.array_equal(found.array, series.labels)
