"""A picture of what has drifted: per stream the reference and the window, in one PNG.

Histograms as steps, numbers as cumulative distributions, categories as bars; shares of studies, so that two groups of
different sizes can be compared. The reference is a blue surface or broad line, the window a thin orange line or a
hatched bar: told apart without colours too (Okabe and Ito 2008). No patient's data: streams are facts of scanners,
images and results, and what a header calls them is shown in printable letters only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.drift_check import StreamPair
from engine.drift_streams import Categories, FloatArray, Histograms, Numbers

MOST_STREAMS = 6
"""Of one picture; a line says how many more there are."""
_FOLDER = "pictures"
_WIDTH, _PANEL, _HEAD = 900, 250, 70
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 34, 34
_SCALE = 2  # drawn larger and reduced: smooth lines
_BLUE, _LIGHT_BLUE, _ORANGE = (0, 114, 178), (160, 205, 230), (213, 94, 0)
_INK, _GRID, _PAPER = (30, 30, 30), (215, 215, 215), (255, 255, 255)
_MOST_BARS, _MOST_LETTERS = 8, 68
_TEXT, _SMALL = 15, 12


def picture_path(kind: str, subject: str) -> str:
    """Where the picture of an alarm lies, relative to the state folder: one for each, drawn anew when it repeats."""
    return f"{_FOLDER}/{kind}/{hashlib.sha256(subject.encode()).hexdigest()[:24]}.png"


def draw_streams(
    pairs: Sequence[StreamPair],
    path: Path,
    *,
    title: str,
    sides: tuple[str, str],
    edges: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write the picture of these streams, at least one. `sides`: what reference and live are called; `edges`: of the
    bins of a histogram, by stream, where they are known. The file appears whole."""
    shown, more = list(pairs[:MOST_STREAMS]), max(0, len(pairs) - MOST_STREAMS)
    height = _HEAD + _PANEL * len(shown) + (24 if more else 0)
    image = Image.new("RGB", (_WIDTH * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(image)
    _text(draw, (16, 10), title, _TEXT)
    _swatches(draw, sides)
    for index, pair in enumerate(shown):
        _panel(draw, pair, _HEAD + index * _PANEL, (edges or {}).get(pair.name))
    if more:
        _text(draw, (16, height - 22), f"and {more} more", _SMALL)
    buffer = BytesIO()
    image.resize((_WIDTH, height), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _swatches(draw: ImageDraw.ImageDraw, sides: tuple[str, str]) -> None:
    y = 42
    _box(draw, (16, y, 40, y + 14), fill=_LIGHT_BLUE, outline=_BLUE)
    _text(draw, (48, y - 1), sides[0], _SMALL)
    _hatched(draw, (420, y, 444, y + 14))
    _text(draw, (452, y - 1), sides[1], _SMALL)


def _panel(draw: ImageDraw.ImageDraw, pair: StreamPair, top: int, edges: Sequence[float] | None) -> None:
    _text(draw, (16, top + 8), _printable(pair.name), _TEXT)
    frame = (_LEFT, top + _TOP, _WIDTH - _RIGHT, top + _PANEL - _BOTTOM)
    reference, live = pair.reference, pair.live
    if isinstance(reference, Histograms) and isinstance(live, Histograms):
        _histograms(draw, frame, mean_shares(reference.shares), mean_shares(live.shares), edges)
    elif isinstance(reference, Numbers) and isinstance(live, Numbers):
        _numbers(draw, frame, reference.values, live.values)
    elif isinstance(reference, Categories) and isinstance(live, Categories):
        _categories(draw, frame, reference.values, live.values)
    else:
        raise TypeError(f"{pair.name}: two kinds of streams")


def mean_shares(shares: FloatArray) -> FloatArray:
    """(B,): the mean histogram of those studies (N, B) that have one; zeros where none has."""
    known = shares[shares.sum(axis=1) > 0]
    mean: FloatArray = known.mean(axis=0) if len(known) else np.zeros(shares.shape[1])
    return mean


def _histograms(
    draw: ImageDraw.ImageDraw,
    frame: tuple[int, int, int, int],
    reference: FloatArray,
    live: FloatArray,
    edges: Sequence[float] | None,
) -> None:
    highest = float(max(reference.max(), live.max(), 1e-9)) * 1.05
    bins = len(reference)
    known = edges is not None and len(edges) == bins - 1
    middle = bins // 2
    labels = [("lowest", 0.0), ("highest", 1.0)]
    if edges is not None and known:
        labels = [(f"{edges[place]:.4g}", (place + 1) / bins) for place in (0, middle - 1, bins - 2)]
    _axes(draw, frame, labels, highest)
    left, top, right, bottom = frame

    def steps(values: FloatArray) -> list[tuple[float, float]]:
        points = []
        for place, value in enumerate(values):
            y = bottom - (bottom - top) * float(value) / highest
            points += [(left + (right - left) * place / bins, y), (left + (right - left) * (place + 1) / bins, y)]
        return points

    of_reference = steps(reference)
    surface = [(left, float(bottom)), *of_reference, (right, float(bottom))]
    draw.polygon([(x * _SCALE, y * _SCALE) for x, y in surface], fill=_LIGHT_BLUE)
    _line(draw, of_reference, _BLUE, 1)
    _line(draw, steps(live), _ORANGE, 2)


def _numbers(
    draw: ImageDraw.ImageDraw, frame: tuple[int, int, int, int], reference: FloatArray, live: FloatArray
) -> None:
    known = [np.sort(values[~np.isnan(values)]) for values in (reference, live)]
    together = np.concatenate(known)
    low, high = (float(together.min()), float(together.max())) if together.size else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    _axes(draw, frame, [(f"{low + (high - low) * part:.4g}", part) for part in (0.0, 0.5, 1.0)], 1.0)
    left, top, right, bottom = frame
    for values, colour, width in ((known[0], _LIGHT_BLUE, 6), (known[0], _BLUE, 1), (known[1], _ORANGE, 2)):
        points = [(float(left), float(bottom))]
        for place, value in enumerate(values):
            x = left + (right - left) * (float(value) - low) / (high - low)
            points += [(x, points[-1][1]), (x, bottom - (bottom - top) * (place + 1) / len(values))]
        points.append((float(right), points[-1][1]))
        _line(draw, points, colour, width)
    missing = [int(np.isnan(values).sum()) for values in (reference, live)]
    if any(missing):
        note = f"without a value: {missing[0]} of {len(reference)}, {missing[1]} of {len(live)}"
        _text(draw, (right - 260, top - 24), note, _SMALL)


def _categories(
    draw: ImageDraw.ImageDraw, frame: tuple[int, int, int, int], reference: Sequence[str], live: Sequence[str]
) -> None:
    rows = category_shares(reference, live)
    left, top, right, bottom = frame
    start, step = left + 250, (bottom - top) / len(rows)
    for part in (0.0, 0.5, 1.0):
        x = start + (right - start) * part
        _line(draw, [(x, top), (x, bottom)], _GRID, 1)
        _text(draw, (x - 12, bottom + 6), f"{part:.0%}", _SMALL)
    for index, (name, of_reference, of_live) in enumerate(rows):
        y = top + index * step
        _text(draw, (left - 54, y + step / 2 - 8), _cut(name, 40), _SMALL)
        thick = max(3.0, min(14.0, step / 2 - 2))
        middle = y + step / 2
        _box(draw, (start, middle - thick, start + (right - start) * of_reference, middle), _LIGHT_BLUE, _BLUE)
        _hatched(draw, (start, middle, start + (right - start) * of_live, middle + thick))


def category_shares(reference: Sequence[str], live: Sequence[str]) -> list[tuple[str, float, float]]:
    """Name and both shares of each category, those that differ most first; the rest together as the last one."""
    shares = {
        value: (reference.count(value) / max(1, len(reference)), live.count(value) / max(1, len(live)))
        for value in sorted({*reference, *live})
    }
    ordered = sorted(shares.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
    kept = ordered if len(ordered) <= _MOST_BARS else ordered[: _MOST_BARS - 1]
    rows = [(_printable(value) or "(absent)", one, other) for value, (one, other) in kept]
    if rest := ordered[len(kept) :]:
        rows.append((f"{len(rest)} others", sum(s[0] for _, s in rest), sum(s[1] for _, s in rest)))
    return rows


def _axes(
    draw: ImageDraw.ImageDraw,
    frame: tuple[int, int, int, int],
    labels: Sequence[tuple[str, float]],
    highest: float,
) -> None:
    left, top, right, bottom = frame
    for part in (0.0, 0.5, 1.0):
        y = bottom - (bottom - top) * part
        _line(draw, [(left, y), (right, y)], _GRID, 1)
        _text(draw, (14, y - 8), f"{highest * part:.3g}", _SMALL)
    for text, part in labels:
        x = left + (right - left) * part
        _line(draw, [(x, bottom), (x, bottom + 4)], _INK, 1)
        _text(draw, (min(x - 12, right - 40), bottom + 8), text, _SMALL)


def _printable(text: str) -> str:
    """What a header calls something: printable letters, and not too many of them."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return _cut(clean, _MOST_LETTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int) -> None:
    font = ImageFont.load_default(size * _SCALE)
    draw.text((place[0] * _SCALE, place[1] * _SCALE), text, fill=_INK, font=font)


def _line(
    draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: int
) -> None:
    draw.line([(x * _SCALE, y * _SCALE) for x, y in points], fill=colour, width=width * _SCALE, joint="curve")


def _box(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    fill: tuple[int, int, int] | None,
    outline: tuple[int, int, int],
) -> None:
    left, top, right, bottom = (value * _SCALE for value in box)
    draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=fill, outline=outline, width=_SCALE)


def _hatched(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float]) -> None:
    _box(draw, box, None, _ORANGE)
    left, top, right, bottom = box
    x = left - (bottom - top)
    while x < right:
        x += 5
        # From the lower edge up to the right, cut at both ends of the box.
        low, high = max(x, left), min(x + bottom - top, right)
        if low < high:
            _line(draw, [(low, bottom - (low - x)), (high, bottom - (high - x))], _ORANGE, 1)
