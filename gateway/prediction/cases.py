"""A case: what one prediction is made of, whether it comes from files or from a DICOM series."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from engine.manifest import Contract
from engine.volume import Geometry, LabelMap, Volume


class Case(Protocol):
    """`name` is that of the output files. `size_bytes`: of its files, for the progress. `source`: what a line of --json
    says of where it comes from. `ending`: of the label map that is written."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def ending(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def source(self) -> Mapping[str, Any]: ...

    def geometry(self) -> Geometry:
        """From headers alone. Raises EngineError, Rejected or OSError."""
        ...

    def doubts(self, contract: Contract) -> list[str]:
        """What a person should know of the case and this model. Raises Rejected where the model may not run on it."""
        ...

    def read(self) -> Volume:
        """The voxels. Raises as `geometry`."""
        ...

    def write_labels(self, labels: LabelMap, path: Path) -> None:
        """The label map as a file on the case's own grid, whole or not at all. Raises Rejected, OSError."""
        ...

    def grid_properties(self) -> Mapping[str, Any]:
        """Where the voxels lie, as nnU-Net's properties name it: spacing (z, y, x), and sitk_stuff (x, y, z)."""
        ...
