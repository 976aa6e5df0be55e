from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from gateway.results.attributes import AttributeRejected
from gateway.results.series import SeriesPart, read_series
from gateway.results.slice_geometry import MAX_PART_LENGTH
from tests.support.phantoms import PhantomSeries, write_series


def edit(file: Path, change: Callable[[Dataset], object], *, copy_as: Path | None = None) -> Path:
    """Change one file; as a copy with a new SOP Instance UID when copy_as is given."""
    ds = dcmread(file)
    if copy_as is not None:
        ds.SOPInstanceUID = generate_uid(entropy_srcs=[str(copy_as)])
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    change(ds)
    target = copy_as or file
    ds.save_as(target)
    return target


def set_to(keyword: str, value: object) -> Callable[[Dataset], object]:
    return lambda ds: setattr(ds, keyword, value)


def headers(files: Sequence[Path]) -> tuple[SeriesPart, ...]:
    return read_series(files, only_headers=True)


def second_set(series: PhantomSeries, folder: Path, keyword: str, first: object, second: object) -> list[Path]:
    """The series twice at the same positions, told apart by one attribute."""
    folder.mkdir()
    files = [edit(file, set_to(keyword, first)) for file in series.files]
    copies = [edit(file, set_to(keyword, second), copy_as=folder / file.name) for file in series.files]
    return files + copies


@pytest.mark.requirement("CMP-20")
@pytest.mark.parametrize(
    ("keyword", "first", "second", "parts"),
    [
        ("ImageType", ["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"], None),
        ("EchoTime", "4.9", "9.8", ["EchoTime=4.9", "EchoTime=9.8"]),
        ("EchoNumbers", 1, 2, ["EchoNumbers=1", "EchoNumbers=2"]),
        ("DiffusionBValue", 0.0, 1000.0, ["DiffusionBValue=0.0", "DiffusionBValue=1000.0"]),
        ("TemporalPositionIdentifier", 1, 2, ["TemporalPositionIdentifier=1", "TemporalPositionIdentifier=2"]),
        ("TriggerTime", "0", "30", ["TriggerTime=0", "TriggerTime=30"]),
        ("ContrastBolusAgent", "NONE", "ARTERIAL", ["ContrastBolusAgent=ARTERIAL", "ContrastBolusAgent=NONE"]),
        ("KVP", "80", "140", ["KVP=140", "KVP=80"]),
        ("ConvolutionKernel", "B30f", "B60f", ["ConvolutionKernel=B30f", "ConvolutionKernel=B60f"]),
        ("AcquisitionNumber", 1, 2, ["AcquisitionNumber=1", "AcquisitionNumber=2"]),
        ("AcquisitionTime", "101500", "101600", ["AcquisitionTime=101500", "AcquisitionTime=101600"]),
    ],
)
def test_images_at_the_same_positions_are_split_by_a_documented_key(
    tmp_path: Path, keyword: str, first: object, second: object, parts: list[str] | None
) -> None:
    series = write_series(tmp_path / "a", shape=(5, 8, 8))
    found = headers(second_set(series, tmp_path / "b", keyword, first, second))

    assert [len(part.frames) for part in found] == [5, 5]
    assert all(part.split_by[0][0] == keyword for part in found)
    assert all(part.finding("duplicate-positions") is None for part in found)
    assert all(part.finding("split") is not None for part in found)
    for part in found:
        np.testing.assert_allclose(part.geometry.affine_lps, series.affine_lps, atol=1e-6)
    if parts is not None:
        assert [part.part for part in found] == parts


@pytest.mark.requirement("CMP-20")
def test_two_echoes_of_two_phases_make_four_parts(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(4, 8, 8), modality="MR")
    echoes = second_set(series, tmp_path / "b", "EchoTime", "5", "10")
    copies = tmp_path / "c"
    copies.mkdir()
    for file in echoes:
        edit(file, set_to("TemporalPositionIdentifier", 1))
    later = [
        edit(file, set_to("TemporalPositionIdentifier", 2), copy_as=copies / f"{file.parent.name}{file.name}")
        for file in echoes
    ]
    found = headers(echoes + later)

    assert [part.part for part in found] == [
        "EchoTime=10;TemporalPositionIdentifier=1",
        "EchoTime=10;TemporalPositionIdentifier=2",
        "EchoTime=5;TemporalPositionIdentifier=1",
        "EchoTime=5;TemporalPositionIdentifier=2",
    ]
    assert [len(part.frames) for part in found] == [4, 4, 4, 4]


@pytest.mark.requirement("CMP-20")
def test_acquisition_number_that_rises_with_every_slice_splits_nothing(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(6, 8, 8))
    for number, file in enumerate(series.ordered_files, start=1):
        edit(file, set_to("AcquisitionNumber", number))
    edit(series.ordered_files[2], set_to("AcquisitionNumber", 99), copy_as=tmp_path / "again.dcm")
    (part,) = headers([*series.files, tmp_path / "again.dcm"])

    assert len(part.frames) == 6
    duplicate = part.finding("duplicate-positions")
    assert duplicate is not None
    assert duplicate.value == 1
    assert set(duplicate.sop_instance_uids) == {
        str(dcmread(series.ordered_files[2]).SOPInstanceUID),
        str(dcmread(tmp_path / "again.dcm").SOPInstanceUID),
    }


@pytest.mark.requirement("CMP-20")
def test_trigger_times_that_drift_from_slice_to_slice_split_by_rank(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(4, 8, 8), modality="MR")
    (tmp_path / "b").mkdir()
    files = []
    for index, file in enumerate(series.ordered_files):
        files.append(edit(file, set_to("TriggerTime", f"{index * 0.5}")))
        files.append(edit(file, set_to("TriggerTime", f"{30 + index * 0.7}"), copy_as=tmp_path / "b" / file.name))
    found = headers(files)

    assert [part.part for part in found] == ["TriggerTimeRank=001", "TriggerTimeRank=002"]
    assert [len(part.frames) for part in found] == [4, 4]


@pytest.mark.requirement("CMP-20")
def test_a_localizer_never_joins_the_volume(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(5, 8, 8))
    scout = edit(
        series.ordered_files[0],
        set_to("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        copy_as=tmp_path / "AAAA.dcm",
    )
    found = headers([scout, *series.files])

    assert [part.part for part in found] == ["ImageType=LOCALIZER", "ImageType=volume"]
    assert found[0].finding("localizer") is not None
    assert found[1].finding("localizer") is None
    assert len(found[1].frames) == 5


@pytest.mark.requirement("CMP-20")
def test_orientations_sizes_and_frames_of_reference_are_never_mixed(tmp_path: Path) -> None:
    axial = write_series(tmp_path / "a", shape=(4, 8, 8))
    coronal = write_series(tmp_path / "c", shape=(3, 8, 8), orientation="coronal")
    small = write_series(tmp_path / "s", shape=(2, 8, 6))
    moved = write_series(tmp_path / "f", shape=(6, 8, 8), seed=5)
    for series in (coronal, small, moved):
        for file in series.files:

            def join(ds: Dataset) -> None:
                ds.StudyInstanceUID, ds.SeriesInstanceUID = axial.study_instance_uid, axial.series_instance_uid

            edit(file, join)
    found = headers([*axial.files, *coronal.files, *small.files, *moved.files])

    assert sorted(part.geometry.shape for part in found) == [(2, 8, 6), (3, 8, 8), (4, 8, 8), (6, 8, 8)]
    assert len({part.part for part in found}) == 4
    assert all(len(part.part) <= MAX_PART_LENGTH for part in found)


def test_names_of_parts_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(3, 8, 8))
    files = second_set(series, tmp_path / "b", "EchoTime", "5", "10")

    forward, backward = headers(files), headers(files[::-1])

    assert [part.part for part in forward] == [part.part for part in backward]
    assert [[f.sop_instance_uid for f in part.frames] for part in forward] == [
        [f.sop_instance_uid for f in part.frames] for part in backward
    ]


def test_long_and_odd_values_make_short_printable_names(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(3, 8, 8))
    files = second_set(series, tmp_path / "b", "ContrastBolusAgent", "../é;'\"" + "x" * 50, "../é;'\"" + "y" * 50)
    names = [part.part for part in headers(files)]

    assert len(set(names)) == 2
    assert all(len(name) <= MAX_PART_LENGTH and name.isascii() and "/" not in name for name in names)


@pytest.mark.requirement("CMP-16")
def test_missing_slices_are_counted_and_named(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(10, 8, 8), orientation="oblique")
    kept = [f for i, f in enumerate(series.ordered_files) if i not in (4, 5)]
    (part,) = headers(kept)

    missing = part.finding("missing-slices")
    assert missing is not None
    assert missing.value == 2
    assert missing.sop_instance_uids == (
        str(series.datasets[3].SOPInstanceUID),
        str(series.datasets[6].SOPInstanceUID),
    )
    assert part.slice_gap_ratio == pytest.approx(3.0)
    assert part.finding("irregular-spacing") is not None


@pytest.mark.requirement("CMP-16")
def test_a_shifted_slice_is_irregular_but_not_missing(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(8, 8, 8), spacing_mm=(2.0, 1.0, 1.0))

    def shift(ds: Dataset) -> None:
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y, z + 0.4]

    edit(series.ordered_files[3], shift)
    (part,) = headers(series.files)

    irregular = part.finding("irregular-spacing")
    assert irregular is not None
    assert irregular.value == pytest.approx(0.2, abs=1e-3)
    assert part.finding("missing-slices") is None


def test_a_slice_beside_the_line_is_found(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(6, 8, 8))

    def shift(ds: Dataset) -> None:
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x + 3.0, y, z]

    edit(series.ordered_files[2], shift)
    (part,) = headers(series.files)

    aside = part.finding("not-collinear")
    assert aside is not None
    assert aside.value == pytest.approx(3.0, abs=1e-3)


@pytest.mark.requirement("CMP-16")
def test_of_doubles_the_lowest_instance_number_is_kept(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(4, 8, 8))
    edit(series.ordered_files[1], set_to("InstanceNumber", 50), copy_as=tmp_path / "a_later.dcm")
    (part,) = headers([tmp_path / "a_later.dcm", *series.files])

    assert part.frames[1].sop_instance_uid == series.datasets[1].SOPInstanceUID
    assert part.finding("duplicate-positions") is not None


def test_the_same_object_twice_counts_once(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(4, 8, 8))
    copy = tmp_path / "copy.dcm"
    copy.write_bytes(series.files[0].read_bytes())
    (part,) = headers([*series.files, copy])

    repeated = part.finding("repeated-instances")
    assert repeated is not None
    assert repeated.value == 1
    assert part.finding("duplicate-positions") is None


@pytest.mark.parametrize("tilt_deg", [-20.0, 0.5, 12.5, 30.0])
def test_gantry_tilt_is_measured_and_stays_in_the_affine(tmp_path: Path, tilt_deg: float) -> None:
    series = write_series(tmp_path, shape=(6, 8, 8), tilt_deg=tilt_deg, order="shuffled")
    (part,) = headers(series.files)

    tilt = part.finding("gantry-tilt")
    assert tilt is not None
    assert tilt.value == pytest.approx(abs(tilt_deg), abs=1e-4)
    np.testing.assert_allclose(part.geometry.affine_lps, series.affine_lps, atol=1e-6)
    for z, frame in enumerate(part.frames):
        np.testing.assert_allclose(frame.position_mm, (series.affine_lps @ [0, 0, z, 1])[:3], atol=1e-6)


def test_one_slice_takes_its_extent_from_the_thickness(tmp_path: Path) -> None:
    series = write_series(tmp_path, single_slice=True, spacing_mm=(4.0, 2.0, 1.5))
    (part,) = headers(series.files)

    single = part.finding("single-slice")
    assert single is not None
    assert single.value == 4.0
    assert part.geometry.spacing_mm == pytest.approx((4.0, 2.0, 1.5))


def test_one_slice_without_thickness_says_so(tmp_path: Path) -> None:
    series = write_series(tmp_path, single_slice=True)
    edit(series.files[0], lambda ds: delattr(ds, "SliceThickness"))
    (part,) = headers(series.files)

    assert part.finding("slice-thickness-absent") is not None
    assert part.geometry.spacing_mm[0] == 1.0


def test_images_of_two_series_are_refused(tmp_path: Path) -> None:
    one = write_series(tmp_path / "a", shape=(2, 8, 8))
    other = write_series(tmp_path / "b", shape=(2, 8, 8), series_number=2)

    with pytest.raises(AttributeRejected, match=r"SeriesInstanceUID \(0020,000E\) differs"):
        headers([*one.files, *other.files])


def shifted(z_mm: float, keyword: str, value: object) -> Callable[[Dataset], object]:
    def change(ds: Dataset) -> None:
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y, z + z_mm]
        setattr(ds, keyword, value)

    return change


def moved_set(
    series: PhantomSeries, folder: Path, z_mm: float, keyword: str, first: object, other: object
) -> list[Path]:
    """The series, and once more z_mm higher, told apart by one attribute."""
    folder.mkdir()
    files = [edit(file, set_to(keyword, first)) for file in series.files]
    return files + [edit(f, shifted(z_mm, keyword, other), copy_as=folder / f.name) for f in series.files]


CONTRASTS = [
    ("ImageType", ["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
    ("ImageType", ["DERIVED", "PRIMARY", "AXIAL", "WATER"], ["DERIVED", "PRIMARY", "AXIAL", "FAT"]),
    ("EchoTime", "5", "80"),
    ("EchoNumbers", 1, 2),
    ("DiffusionBValue", 0.0, 1000.0),
    ("TemporalPositionIdentifier", 1, 2),
    ("InversionTime", "150", "2500"),
    ("FlipAngle", "5", "20"),
    ("ContrastBolusAgent", None, "IOHEXOL"),
    ("KVP", "80", "140"),
    ("ConvolutionKernel", "B30f", "B60f"),
]


@pytest.mark.requirement("CMP-20")
@pytest.mark.parametrize(("keyword", "first", "other"), CONTRASTS)
def test_contrasts_that_interleave_are_two_volumes(tmp_path: Path, keyword: str, first: object, other: object) -> None:
    series = write_series(tmp_path / "a", shape=(6, 8, 8), spacing_mm=(2.0, 1.0, 1.0))
    found = headers(moved_set(series, tmp_path / "b", 1.0, keyword, first, other))

    assert [part.split_by[0][0] for part in found] == [keyword, keyword]
    for part in found:
        assert part.distances_mm == pytest.approx([2.0] * 5)
        assert {str(h.get(keyword)) for h in part.headers} in ({str(part.headers[0].get(keyword))},)
        assert [f.kind for f in part.findings] == ["split"]


@pytest.mark.requirement("CMP-20")
@pytest.mark.parametrize(("keyword", "first", "other"), CONTRASTS)
def test_contrasts_end_to_end_are_found(tmp_path: Path, keyword: str, first: object, other: object) -> None:
    series = write_series(tmp_path / "a", shape=(6, 8, 8), spacing_mm=(2.0, 1.0, 1.0))
    (part,) = headers(moved_set(series, tmp_path / "b", 12.0, keyword, first, other))

    mixed = part.finding("mixed-contents")
    assert mixed is not None
    assert mixed.keywords == (keyword,)


@pytest.mark.requirement("CMP-20")
def test_one_slice_of_another_contrast_is_found(tmp_path: Path) -> None:
    series = write_series(tmp_path, shape=(8, 8, 8), modality="MR")
    edit(series.ordered_files[3], set_to("EchoTime", "80"))
    (part,) = headers(series.files)

    mixed = part.finding("mixed-contents")
    assert mixed is not None
    assert mixed.keywords == ("EchoTime",)


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("EchoTime", ["4.9", "4.900000095", "4.905"]),
        ("KVP", ["120", "120.0"]),
        ("ImageType", [["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL"]]),
        ("ImageType", [["ORIGINAL", "PRIMARY", "M", "ND"], ["ORIGINAL", "PRIMARY", "M", "ND", "NORM"]]),
        ("TriggerTime", ["10", "520", "1030"]),
        ("RepetitionTime", ["812", "790", "835"]),
        ("SliceThickness", ["1.25", "2.5"]),
        ("ExposureTime", ["500", "510"]),
    ],
)
def test_what_varies_within_a_normal_volume_is_no_finding(tmp_path: Path, keyword: str, values: list[object]) -> None:
    series = write_series(tmp_path, shape=(9, 8, 8))
    for index, file in enumerate(series.ordered_files):
        edit(file, set_to(keyword, values[index % len(values)]))
    (part,) = headers(series.files)

    assert part.findings == ()


def acquired(number: int, time: str) -> Callable[[Dataset], object]:
    def change(ds: Dataset) -> None:
        ds.AcquisitionNumber, ds.AcquisitionTime = number, time

    return change


@pytest.mark.parametrize("interleaved", [False, True])
def test_acquisitions_side_by_side_and_slices_taken_in_turn_are_one_volume(tmp_path: Path, interleaved: bool) -> None:
    series = write_series(tmp_path, shape=(10, 8, 8), spacing_mm=(2.0, 1.0, 1.0))
    for index, file in enumerate(series.ordered_files):
        second = index % 2 if interleaved else index // 5
        edit(file, acquired(1 + second, f"1017{30 + 10 * second}"))
    (part,) = headers(series.files)

    assert part.findings == ()


@pytest.mark.requirement("CMP-20")
def test_acquisitions_whose_slices_overlap_in_turn_are_two_volumes(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(6, 8, 8), spacing_mm=(2.0, 1.0, 1.0))
    files = moved_set(series, tmp_path / "b", 1.0, "AcquisitionNumber", 1, 2)
    for index, file in enumerate(files):
        edit(file, acquired(1 + index // 6, f"1017{30 + 10 * (index // 6)}"))
    found = headers(files)

    assert [part.split_by[0][0] for part in found] == ["AcquisitionNumber", "AcquisitionNumber"]
    assert [len(part.frames) for part in found] == [6, 6]


def in_turn(series: PhantomSeries, folder: Path, *, evening: str, morning: str) -> list[Path]:
    """A dynamic of two time points, 16 s each, that begins ten seconds before midnight; the dates may be empty."""
    folder.mkdir()
    files = []
    for point in range(2):
        for index, file in enumerate(series.ordered_files):
            second = -10 + 16 * point + 2 * index
            hour, rest = divmod(second % 86400, 3600)

            def change(ds: Dataset, second: int = second, hour: int = hour, rest: int = rest) -> None:
                ds.AcquisitionDate = evening if second < 0 else morning
                ds.AcquisitionTime = f"{hour:02d}{rest // 60:02d}{rest % 60:02d}.5"
                ds.SeriesDescription = f"point {second}"

            files.append(edit(file, change, copy_as=folder / f"{point}{file.name}"))
    return files


@pytest.mark.requirement("CMP-20")
def test_time_points_on_both_sides_of_midnight_are_ranked_by_date_and_time(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(8, 8, 8), modality="MR")
    found = headers(in_turn(series, tmp_path / "b", evening="20240105", morning="20240106"))

    assert [part.part for part in found] == ["AcquisitionTimeRank=001", "AcquisitionTimeRank=002"]
    for number, part in enumerate(found):
        assert [str(h.SeriesDescription) for h in part.headers] == [
            f"point {second}" for second in range(-10 + 16 * number, 6 + 16 * number, 2)
        ]


@pytest.mark.requirement("CMP-20")
@pytest.mark.parametrize("date", ["", "20240105"])
def test_times_across_midnight_without_their_dates_are_no_guess(tmp_path: Path, date: str) -> None:
    series = write_series(tmp_path / "a", shape=(8, 8, 8), modality="MR")
    (part,) = headers(in_turn(series, tmp_path / "b", evening=date, morning=date))

    ambiguous = part.finding("ambiguous-times")
    assert ambiguous is not None
    assert 23 < ambiguous.value < 24
    assert ambiguous.keywords == ("AcquisitionDate", "AcquisitionTime")
    assert part.finding("duplicate-positions") is not None


@pytest.mark.requirement("CMP-20")
def test_an_echo_of_two_image_types_is_not_cut_in_halves(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(8, 8, 8), modality="MR")
    files = second_set(series, tmp_path / "b", "EchoTime", "5", "80")
    upper = {str(ds.ImagePositionPatient) for ds in series.datasets[4:]}
    for file in files[8:]:
        if str(dcmread(file).ImagePositionPatient) in upper:
            edit(file, set_to("ImageType", ["ORIGINAL", "PRIMARY", "M", "X"]))
    first, second = headers(files)

    assert [part.part for part in (first, second)] == ["EchoTime=5", "EchoTime=80"]
    assert [len(part.frames) for part in (first, second)] == [8, 8]
    assert first.finding("mixed-contents") is None
    mixed = second.finding("mixed-contents")
    assert mixed is not None
    assert mixed.keywords == ("ImageType",)


@pytest.mark.requirement("CMP-20")
def test_a_key_that_separates_all_goes_before_one_that_separates_some(tmp_path: Path) -> None:
    # Three images at each position: EchoTime comes first and leaves two of them together, FlipAngle leaves none.
    series = write_series(tmp_path / "a", shape=(4, 8, 8), modality="MR")
    files = []
    for name, echo, flip in (("a1", "5", "10"), ("a2", "5", "20"), ("a3", "10", "30")):
        (tmp_path / name).mkdir()
        for file in series.files:

            def change(ds: Dataset, echo: str = echo, flip: str = flip) -> None:
                ds.EchoTime, ds.FlipAngle = echo, flip

            files.append(edit(file, change, copy_as=tmp_path / name / file.name))

    assert [part.part for part in headers(files)] == ["FlipAngle=10", "FlipAngle=20", "FlipAngle=30"]


@pytest.mark.requirement("CMP-20")
def test_halves_that_share_a_position_say_that_they_are_halves(tmp_path: Path) -> None:
    series = write_series(tmp_path / "a", shape=(6, 8, 8), spacing_mm=(2.0, 1.0, 1.0), modality="MR")
    found = headers(moved_set(series, tmp_path / "b", 10.0, "AcquisitionNumber", 1, 2))

    assert [len(part.frames) for part in found] == [6, 6]
    partial = [part.finding("partial-extent") for part in found]
    assert [f.value for f in partial if f is not None] == pytest.approx([0.5, 0.5])
