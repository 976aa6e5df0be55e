"""gateway.training_data.series_matching: which series a NIfTI label map belongs to, by its name and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import Rejected
from gateway.training_data.label_objects import LabelObject
from gateway.training_data.series_matching import SeriesIndex
from gateway.training_data.source_scan import Source, SourceSeries

_FIRST, _SECOND, _STUDY, _IMAGE = "1.2.840.7.1", "1.2.840.7.2", "1.2.840.7", "1.2.840.7.1.1"


def _series(root: Path, uid: str, folder: str) -> SourceSeries:
    return SourceSeries(
        study_instance_uid=_STUDY,
        series_instance_uid=uid,
        frames_of_reference=frozenset(),
        modality="CT",
        description="",
        patient_id="",
        issuer="",
        patient_name="",
        files=(root / folder / f"{uid}.dcm",),
        instances=frozenset({f"{uid}.1"}),
    )


def _matched(root: Path, name: str, *, ignores_references: bool = False) -> tuple[str, str | None]:
    """The series that a label map of this name beside the first series goes to. The second lies elsewhere."""
    label = LabelObject(file=root / "first" / name, digest="", kind="NIfTI", structures=())
    series = {_FIRST: _series(root, _FIRST, "first"), _SECOND: _series(root, _SECOND, "second")}
    source = Source(root=root, series=series, labels=(label,), faults=(), passed_over={})
    (found,), note = SeriesIndex(source, ignores_references=ignores_references).candidates(label)
    return found.series_instance_uid, note


@pytest.mark.parametrize(
    "uid",
    [
        "1.2.840.99.1",  # another phase, which was not copied
        "2.25.329800735698586629295641978511506172918",
        "1.3.12345678901234567",
        f"{_FIRST}.7",
        f"12.{_FIRST}",
        f"{_FIRST}_1.2.840.99.1",
        f"{_STUDY}.99.{_IMAGE}",
    ],
)
def test_a_name_with_the_uid_of_other_images_is_not_of_the_series_beside_it(tmp_path: Path, uid: str) -> None:
    with pytest.raises(Rejected, match=rf"its name has the UID .*, which is not of series {_FIRST}.*--cases"):
        _matched(tmp_path, f"{uid}_seg.nii.gz")
    # Where UIDs were changed apart: asked for, and told.
    found, note = _matched(tmp_path, f"{uid}_seg.nii.gz", ignores_references=True)
    assert (found, "its name has a UID that is not of its series" in str(note)) == (_FIRST, True)


def test_a_name_with_the_uids_of_two_series_is_of_neither(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=f"UIDs of 2 series .{_SECOND}, {_FIRST}.*--cases"):
        _matched(tmp_path, f"{_SECOND}_to_{_FIRST}.nii.gz")


def test_the_uid_of_another_study_beside_that_of_the_series_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match=r"its name has the UID 1\.2\.840\.8\.9, which is not of series"):
        _matched(tmp_path, f"1.2.840.8.9_{_SECOND}.nii.gz")


@pytest.mark.parametrize(
    "name",
    [
        "seg.nii.gz",
        "2024.01.15_seg.nii.gz",
        "seg_2023.05.06.12.30.15.nii.gz",
        "liver_v1.2.3.4.nii.gz",
        f"{_FIRST}_{_FIRST}.nii.gz",
        f"{_STUDY}_{_FIRST}.nii.gz",
        f"seg.{_IMAGE}.nii.gz",
    ],
)
def test_versions_dates_and_the_series_own_uids_do_not_part_a_label_from_it(tmp_path: Path, name: str) -> None:
    assert _matched(tmp_path, name) == (_FIRST, None)


def test_a_uid_in_the_name_counts_more_than_the_place(tmp_path: Path) -> None:
    assert _matched(tmp_path, f"seg_{_SECOND}_0000.nii.gz") == (_SECOND, None)
