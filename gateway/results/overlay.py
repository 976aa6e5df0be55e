"""Pictures of a result over its own source series: a PNG for people, and the frames of a secondary capture.

Only the series that went through the model is drawn on: a sister series may share the frame of reference UID and lie
elsewhere. No patient data appears in a picture. Pixels are stretched to the true aspect ratio, and the letters at the
edges are patient directions taken from the affine (L, R, A, P, H, F).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gateway.results.content import ResultContent
from gateway.results.result_modules import NOT_REVIEWED

WARNING_TEXT = f"{NOT_REVIEWED}. Not for diagnosis."
_SMALLEST_SIDE = 256
_LARGEST_SIDE = 512
_FILL = 0.4
_TEXT_SIZE = 13
_LINE = 18
_MARGIN = 8
_GREY = (235, 235, 235)
# Positive direction of the LPS axes x, y, z, then the negative one.
_LETTERS = (("L", "R"), ("P", "A"), ("H", "F"))
_SECOND_LETTER_FROM = 0.35


def overlay_png(
    content: ResultContent, image: NDArray[np.floating[Any]], path: Path, *, pictures: int = 3
) -> tuple[int, ...]:
    """Write a PNG with up to `pictures` slices, a legend with name and volume, and the warning; returns the slices.

    image: (Z, Y, X) of the source series, on the grid of `content.labels`. The foreground's slices are split into
    equal thirds and the fullest of each is shown; the middle slice when nothing was found. The file appears whole.
    """
    _check(content, image)
    chosen = fullest_slices(content, pictures)
    window = intensity_window(image)
    tiles = [slice_picture(content, image, z, window) for z in chosen]
    legend = legend_lines(content)
    width = max(sum(t.width for t in tiles) + _MARGIN * (len(tiles) + 1), 420)
    top = _LINE + 2 * _MARGIN
    height = top + tiles[0].height + _LINE + _MARGIN + _LINE * len(legend) + _MARGIN
    sheet = Image.new("RGB", (width, height), (18, 18, 18))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT_SIZE)
    title = f"{content.identity.model.name} {content.identity.model.version}: {WARNING_TEXT}"
    draw.text((_MARGIN, _MARGIN), title, fill=(255, 200, 80), font=font)
    left = _MARGIN
    for z, tile in zip(chosen, tiles, strict=True):
        sheet.paste(tile, (left, top))
        text = f"slice {z + 1} of {len(content.frames)}"
        draw.text((left, top + tile.height + 2), text, fill=_GREY, font=font)
        left += tile.width + _MARGIN
    _draw_legend(draw, legend, _MARGIN, top + tiles[0].height + _LINE + _MARGIN, font)
    buffer = BytesIO()
    sheet.save(buffer, format="PNG")
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)
    return tuple(chosen)


def fullest_slices(content: ResultContent, count: int) -> list[int]:
    """Indices z, ascending: the slice with most foreground in each of `count` equal stretches of the foreground."""
    filled = np.count_nonzero(content.labels, axis=(1, 2))
    planes = np.nonzero(filled)[0]
    if planes.size == 0:
        return [len(content.frames) // 2]
    stretches = np.array_split(planes, min(count, planes.size))
    return [int(s[np.argmax(filled[s])]) for s in stretches]


def intensity_window(image: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Grey levels from the 1st to the 99.5th percentile (of at most about a million voxels)."""
    step = max(1, image.size // 1_000_000)
    low, high = np.percentile(image.reshape(-1)[::step], (1.0, 99.5))
    return float(low), float(high) if high > low else float(low) + 1.0


def slice_picture(
    content: ResultContent, image: NDArray[np.floating[Any]], z: int, window: tuple[float, float]
) -> Image.Image:
    """Slice z with the segments filled and outlined, true to scale, with orientation letters."""
    low, high = window
    plane = np.clip((image[z].astype(np.float64) - low) / (high - low), 0.0, 1.0) * 255.0
    size = picture_size(content)
    grey = Image.fromarray(np.rint(plane).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    rgb = np.repeat(np.asarray(grey, dtype=np.float64)[..., None], 3, axis=2)
    labels = content.labels[z]
    for segment in content.segments:
        mask = np.isin(labels, [value for value in segment.region if value > 0])
        if not mask.any():
            continue
        scaled = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        inside = np.asarray(scaled) > 0
        colour = np.array(segment.colour, dtype=np.float64)
        rgb[inside] = (1.0 - _FILL) * rgb[inside] + _FILL * colour
        rgb[_outline(inside)] = colour
    picture = Image.fromarray(np.rint(rgb).astype(np.uint8))
    _draw_letters(picture, content)
    return picture


def picture_size(content: ResultContent) -> tuple[int, int]:
    """(width, height) in pixels: square millimetres, the smaller side at least 256, the larger at most 512."""
    _, rows, columns = content.geometry.shape
    _, row_mm, column_mm = content.geometry.spacing_mm
    width_mm, height_mm = columns * column_mm, rows * row_mm
    finest = min(row_mm, column_mm)
    width, height = width_mm / finest, height_mm / finest
    scale = max(1.0, _SMALLEST_SIDE / min(width, height))
    scale = min(scale, _LARGEST_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def legend_lines(content: ResultContent) -> list[tuple[tuple[int, int, int], str]]:
    """Colour and text per segment."""
    return [(s.colour, f"{s.name}: {s.volume_ml:.2f} ml") for s in content.segments]


def direction_letters(direction_lps: Sequence[float] | NDArray[np.float64]) -> str:
    """Patient direction of a vector: the nearest axis first, a second letter where the vector is clearly oblique."""
    direction = [float(v) for v in direction_lps]
    order = sorted(range(3), key=lambda axis: -abs(direction[axis]))
    letters = [_LETTERS[axis][0 if direction[axis] > 0 else 1] for axis in order]
    return letters[0] + (letters[1] if abs(direction[order[1]]) > _SECOND_LETTER_FROM else "")


def add_legend(picture: Image.Image, content: ResultContent) -> Image.Image:
    """The picture with the warning and the legend burnt in below it."""
    lines = legend_lines(content)
    height = picture.height + _LINE * (1 + len(lines)) + 2 * _MARGIN
    sheet = Image.new("RGB", (max(picture.width, 320), height), (0, 0, 0))
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT_SIZE)
    draw.text((_MARGIN, picture.height + _MARGIN), WARNING_TEXT, fill=(255, 200, 80), font=font)
    _draw_legend(draw, lines, _MARGIN, picture.height + _MARGIN + _LINE, font)
    return sheet


def _check(content: ResultContent, image: NDArray[Any]) -> None:
    if image.shape != content.labels.shape:
        raise ValueError(f"image {image.shape} and labels {content.labels.shape} are not on one grid")


def _outline(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask that have a neighbour outside it."""
    padded = np.pad(inside, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: NDArray[np.bool_] = inside & ~surrounded
    return edge


def _draw_letters(picture: Image.Image, content: ResultContent) -> None:
    cosines = content.geometry.direction
    right, down = cosines[:, 0], cosines[:, 1]
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(_TEXT_SIZE + 2)
    width, height = picture.size
    for text, position, anchor in (
        (direction_letters(right), (width - 4, height / 2), "rm"),
        (direction_letters(-right), (4, height / 2), "lm"),
        (direction_letters(down), (width / 2, height - 4), "md"),
        (direction_letters(-down), (width / 2, 4), "ma"),
    ):
        draw.text(position, text, fill=(255, 255, 120), font=font, anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0))


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[tuple[tuple[int, int, int], str]],
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    for index, (colour, text) in enumerate(lines):
        y = top + index * _LINE
        draw.rectangle((left, y + 2, left + 12, y + 14), fill=colour)
        draw.text((left + 20, y), text, fill=_GREY, font=font)
