"""gateway.monitoring.drift_pictures: what has drifted can be seen, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.drift_check import StreamPair
from engine.drift_streams import Categories, Histograms, Numbers
from gateway.monitoring.drift_pictures import (
    MOST_STREAMS,
    category_shares,
    draw_streams,
    mean_shares,
    picture_path,
)

SIDES = ("the first 200 studies", "the last 40 studies")
BLUE, ORANGE = (160, 205, 230), (213, 94, 0)


def histograms(reference: int, live: int) -> StreamPair:
    """Each side has one bin of 8 filled."""

    def at(place: int, studies: int) -> NDArray[np.float64]:
        return np.tile(np.eye(8)[place], (studies, 1))

    return StreamPair(
        reference=Histograms(name="intensities 0", shares=at(reference, 5)),
        live=Histograms(name="intensities 0", shares=at(live, 3)),
    )


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def columns_of(picture: NDArray[np.int64], colour: tuple[int, int, int], *, below: int) -> NDArray[np.int64]:
    """Where a colour is, from the left, in the panels alone."""
    near = np.abs(picture[below:] - np.array(colour)).max(axis=2) < 40
    return np.flatnonzero(near.sum(axis=0) > 20)


def test_reference_and_window_of_a_histogram_are_where_their_values_are(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "picture.png"
    draw_streams([histograms(1, 6)], path, title="tiny 1.0.0", sides=SIDES)
    picture = pixels(path)
    width = picture.shape[1]
    reference, live = columns_of(picture, BLUE, below=110), columns_of(picture, ORANGE, below=110)
    assert 0.15 * width < reference.mean() < 0.35 * width
    assert 0.7 * width < live.mean() < 0.95 * width
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "pair",
    [
        StreamPair(
            reference=Numbers(name="kvp", values=np.array([120.0, np.nan, 120.0])),
            live=Numbers(name="kvp", values=np.array([np.nan, np.nan])),
        ),
        StreamPair(
            reference=Numbers(name="kvp", values=np.array([np.nan])),
            live=Numbers(name="kvp", values=np.array([np.nan])),
        ),
        StreamPair(
            reference=Histograms(name="intensities 0", shares=np.zeros((2, 4))),
            live=Histograms(name="intensities 0", shares=np.zeros((2, 4))),
        ),
        StreamPair(
            reference=Categories(name="manufacturer", values=("", "\x1b[2J\n$^_", "A" * 64)),
            live=Categories(name="manufacturer", values=tuple(f"scanner {n}" for n in range(30))),
        ),
    ],
    ids=["missing numbers", "no numbers at all", "no histograms", "strange and many categories"],
)
def test_what_is_absent_or_strange_is_drawn_too(tmp_path: Path, pair: StreamPair) -> None:
    draw_streams([pair], tmp_path / "p.png", title="t", sides=SIDES)
    assert pixels(tmp_path / "p.png").std() > 0


def test_more_streams_than_fit_are_counted_and_not_drawn(tmp_path: Path) -> None:
    for count in (MOST_STREAMS, MOST_STREAMS + 3):
        draw_streams([histograms(1, 2)] * count, tmp_path / f"{count}.png", title="t", sides=SIDES)
    fits, more = (pixels(tmp_path / f"{count}.png").shape[0] for count in (MOST_STREAMS, MOST_STREAMS + 3))
    assert 0 < more - fits < 60


def test_categories_that_differ_most_come_first_and_the_rest_are_one() -> None:
    reference = ["A"] * 10 + ["B"] * 10
    live = ["A"] * 10 + ["\x07C"] * 9 + [f"D{n}" for n in range(20)]
    rows = category_shares(reference, live)
    assert [row[0] for row in rows[:2]] == ["B", "A"]
    assert "?C" in {row[0] for row in rows}
    assert rows[-1][0].endswith("others")
    assert sum(row[1] for row in rows) == pytest.approx(1)
    assert sum(row[2] for row in rows) == pytest.approx(1)


def test_studies_without_a_histogram_do_not_make_the_others_smaller() -> None:
    assert mean_shares(np.array([[0.5, 0.5], [0.0, 0.0]])).tolist() == [0.5, 0.5]


def test_the_file_is_named_by_nothing_that_can_be_read() -> None:
    path = picture_path("drift", "model:tiny 1.0.0 on ACME One")
    assert path.startswith("pictures/drift/")
    assert "ACME" not in path
    assert path == picture_path("drift", "model:tiny 1.0.0 on ACME One")
    assert path != picture_path("drift", "model:tiny 1.0.0")
