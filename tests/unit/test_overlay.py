"""The picture of a result: right slices, right sides, volumes in the legend, no patient data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gateway.results.content import ResultContent
from gateway.results.overlay import (
    direction_letters,
    fullest_slices,
    intensity_window,
    legend_lines,
    overlay_png,
    picture_size,
    slice_picture,
)
from gateway.results.series import SeriesPart
from tests.support.phantoms import LEFT, RIGHT, Orientation, write_series
from tests.support.result_contents import content_of, part_of


def phantom(folder: Path, **recipe: Any) -> tuple[SeriesPart, ResultContent]:
    series = write_series(folder / "source", **recipe)
    part = part_of(series.files)
    return part, content_of(part, series.labels)


def test_the_picture_is_written_whole_and_is_the_same_twice(tmp_path: Path) -> None:
    part, content = phantom(tmp_path)
    assert part.volume is not None
    shown = overlay_png(content, part.volume.array[0], tmp_path / "one.png")
    overlay_png(content, part.volume.array[0], tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.png", "source", "two.png"]
    assert all(content.labels[z].any() for z in shown)
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"
        assert picture.info == {}
        colours = {c for _, c in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {s.colour for s in content.segments} <= colours


def test_the_fullest_slices_are_shown(tmp_path: Path) -> None:
    part, content = phantom(tmp_path)
    labels = np.zeros_like(content.labels)
    labels[2:11, 5, 5] = LEFT
    for z in (3, 7, 10):
        labels[z, 5, 5:9] = LEFT
    assert fullest_slices(content_of(part, labels), 3) == [3, 7, 10]
    assert fullest_slices(content_of(part, np.zeros_like(labels)), 3) == [6]


@pytest.mark.parametrize(
    ("orientation", "letters"),
    [
        ("axial", ("L", "P")),
        ("axial-prone", ("R", "A")),
        ("sagittal", ("P", "F")),
        ("coronal", ("L", "F")),
        ("oblique", ("L", "PH")),
    ],
)
def test_letters_name_the_patient_directions(
    tmp_path: Path, orientation: Orientation, letters: tuple[str, str]
) -> None:
    """Of the right and the lower edge."""
    part, _ = phantom(tmp_path, orientation=orientation)
    cosines = part.geometry.direction
    assert (direction_letters(cosines[:, 0]), direction_letters(cosines[:, 1])) == letters


def test_pixels_are_square_millimetres(tmp_path: Path) -> None:
    _, content = phantom(tmp_path, spacing_mm=(3.0, 4.0, 1.0), shape=(3, 20, 40))
    width, height = picture_size(content)
    assert height / width == pytest.approx(2.0, rel=0.01)  # 80 mm high, 40 mm wide


def test_the_legend_has_name_and_volume(tmp_path: Path) -> None:
    _, content = phantom(tmp_path)
    assert legend_lines(content)[0][1] == f"left structure: {content.segments[0].volume_ml:.2f} ml"


def test_segments_are_drawn_on_their_voxels(tmp_path: Path) -> None:
    part, content = phantom(tmp_path)
    assert part.volume is not None
    image = part.volume.array[0]
    z = fullest_slices(content, 1)[0]
    picture = np.asarray(slice_picture(content, image, z, intensity_window(image))).astype(int)
    height, width = picture.shape[:2]
    for number in (LEFT, RIGHT):
        rows, columns = np.nonzero(content.labels[z] == number)
        drawn = np.nonzero(np.abs(picture - content.segments[number - 1].colour).max(axis=-1) == 0)
        assert drawn[0].mean() / height == pytest.approx((rows.mean() + 0.5) / content.labels.shape[1], abs=0.03)
        assert drawn[1].mean() / width == pytest.approx((columns.mean() + 0.5) / content.labels.shape[2], abs=0.03)


def test_a_flat_image_does_not_divide_by_zero(tmp_path: Path) -> None:
    part, content = phantom(tmp_path)
    overlay_png(content, np.zeros(part.geometry.shape, dtype=np.float32), tmp_path / "flat.png")
    assert (tmp_path / "flat.png").exists()


def test_another_grid_is_refused(tmp_path: Path) -> None:
    _, content = phantom(tmp_path)
    with pytest.raises(ValueError, match="not on one grid"):
        overlay_png(content, np.zeros((1, 2, 3), dtype=np.float32), tmp_path / "x.png")
