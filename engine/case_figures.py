"""What a bundle made of one labelled case, and such figures kept in a file: a version's figures on a case that has not
changed are not computed again.

    <folder>/<weights>-<configuration>.json     the first 16 digits of both digests; entries by the case's digest
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import DatasetInvalid
from engine.json_reader import Reader, read_json
from engine.json_writer import write_json
from engine.labels import LabelManager
from engine.metrics import CaseMetrics, Region, RegionMetrics, evaluated_regions
from engine.provenance import this_software

FORMAT = 1
_MAX_VOXELS = 2**48
_MAX_MM = 1e7
_MAX_SECONDS = 1e7
_MAX_BYTES = 2**60


@dataclass(frozen=True, kw_only=True)
class CaseFigures:
    """`metrics` by region, with surfaces. `seconds`: wall time from the decoded image to labels and statistics.
    `peak_bytes`: what the memory estimate says, networks included (engine/memory.py)."""

    metrics: CaseMetrics
    seconds: float
    peak_bytes: int


class FigureStore:
    """Figures of one bundle by one runtime (its name, version, provider and precision; another may differ by a voxel)
    and one release of this software, which resamples, post-processes and measures. `folder` None keeps nothing."""

    def __init__(
        self,
        folder: Path | None,
        *,
        weights_digest: str,
        configuration_digest: str,
        runtime: str,
        labels: LabelManager,
    ) -> None:
        self._identity = {
            "format": FORMAT,
            "weights_digest": weights_digest,
            "configuration_digest": configuration_digest,
            "runtime": runtime,
            "software": this_software(),
        }
        self._path = folder / f"{weights_digest[:16]}-{configuration_digest[:16]}.json" if folder is not None else None
        self._known: dict[str, CaseFigures] = {}
        if self._path is not None:
            try:
                document = read_json(self._path, error=DatasetInvalid)
                if {key: document.get(key) for key in self._identity} == self._identity:
                    cases = Reader(document, where=self._path.name, error=DatasetInvalid).child("cases")
                    self._known = {
                        digest: _read(cases.child(digest), evaluated_regions(labels))
                        for digest in cases.keys()  # noqa: SIM118 - keys() checks each key
                    }
            except DatasetInvalid:
                self._known = {}  # absent, of another release, or cut short by a power failure: computed again

    def get(self, digest: str) -> CaseFigures | None:
        """The figures of the case with this digest, if they are known."""
        return self._known.get(digest)

    def put(self, digest: str, figures: CaseFigures) -> None:
        """Keeps them, on disk at once: an examination may be ended at any time. Raises OSError."""
        self._known[digest] = figures
        if self._path is not None:
            cases = {digest: _plain(found) for digest, found in self._known.items()}
            write_json({**self._identity, "cases": cases}, self._path)


def _plain(figures: CaseFigures) -> dict[str, object]:
    return {
        "seconds": figures.seconds,
        "peak_bytes": figures.peak_bytes,
        "regions": [{"region": list(region), **vars(metrics)} for region, metrics in figures.metrics.items()],
    }


def _read(entry: Reader, regions: tuple[Region, ...]) -> CaseFigures:
    found: dict[Region, RegionMetrics] = {}
    for part in entry.children("regions", lengths=(1, 10_000)):
        counts = {
            name: part.integer(name, 0, _MAX_VOXELS)
            for name in ("true_positives", "false_positives", "false_negatives", "true_negatives")
        }
        found[part.integers("region", 0, 65534, lengths=(1, 10_000))] = RegionMetrics(
            **counts,
            hd95_mm=None if part.raw("hd95_mm") is None else part.number("hd95_mm", 0.0, _MAX_MM),
            surface_dice=None if part.raw("surface_dice") is None else part.number("surface_dice", 0.0, 1.0),
        )
    if tuple(found) != regions:
        raise entry.fail("regions", "are not those of the model")
    return CaseFigures(
        metrics=found,
        seconds=entry.number("seconds", 0.0, _MAX_SECONDS),
        peak_bytes=entry.integer("peak_bytes", 0, _MAX_BYTES),
    )
