"""How exactly and how fast each backend runs the networks of a bundle on the machine that made it: backends.json.

Times differ from run to run and machine to machine, so the file says what the machine was, and no digest covers it.
Whatever is to be measured at an export is in `BACKENDS`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.backends import Backend
from engine.errors import BackendFailed
from engine.json_reader import Reader
from engine.machine import allowed_cores, memory_gib, processor_name
from engine.onnx_backend import OnnxBackend
from engine.openvino_backend import OpenVinoBackend

BACKENDS_JSON = "backends.json"
FORMAT = 1
_MAX_FIGURES = 10_000

REFERENCE = "onnxruntime on cpu"
"""What every export is proven with; the others are measured where they run."""
BACKENDS: Mapping[str, Callable[..., Backend]] = MappingProxyType(
    {
        REFERENCE: partial(OnnxBackend, device="cpu"),
        "openvino on cpu": OpenVinoBackend,
        "onnxruntime on cuda": partial(OnnxBackend, device="cuda"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where figures were measured; nothing that names it."""

    processor: str
    cores: int
    memory_gib: float
    system: str


@dataclass(frozen=True, kw_only=True)
class BackendFigure:
    """One network on one backend. Differences are to torch in float32 with the weights that were trained, on the test
    images of the export; `seconds_per_window` is the wall time of the fastest of two to six runs of one window, after
    one to warm up. `threads`: 0 is the runtime's own choice."""

    configuration: str
    fold: str
    backend: str
    version: str
    provider: str
    precision: str
    threads: int
    max_abs_difference: float
    argmax_agreement: float
    seconds_per_window: float


@dataclass(frozen=True, kw_only=True)
class BackendFigures:
    machine: Machine
    figures: tuple[BackendFigure, ...]


def running_backends(file: Path, *, channels: int, patch_size: Sequence[int]) -> Iterator[Backend]:
    """Each backend that runs the network here, the reference first; to be closed by the caller. One that is offered and
    fails is left out, but for the reference: raises BackendFailed, BundleInvalid."""
    for name, open_backend in BACKENDS.items():
        try:
            yield open_backend(file, channels=channels, patch_size=patch_size)
        except BackendFailed:
            if name == REFERENCE:
                raise


def this_machine() -> Machine:
    return Machine(
        processor=processor_name(),
        cores=allowed_cores(),
        memory_gib=memory_gib(),
        system=f"{platform.system()} {platform.machine()}",
    )


def figures_document(figures: BackendFigures) -> dict[str, Any]:
    """The content of backends.json."""
    return {
        "format": FORMAT,
        "machine": asdict(figures.machine),
        "figures": [asdict(figure) for figure in figures.figures],
    }


def read_figures(document: Mapping[str, Any], *, error: type[Exception]) -> BackendFigures:
    """The figures in a document; raises `error` with the key for what is missing or of wrong type or range."""
    reader = Reader(document, where=BACKENDS_JSON, error=error)
    if reader.integer("format", 0, 2**16) != FORMAT:
        raise reader.fail("format", f"is not {FORMAT}")
    machine = reader.child("machine")
    return BackendFigures(
        machine=Machine(
            processor=machine.text("processor", empty=True),
            cores=machine.integer("cores", 1, 2**20),
            memory_gib=machine.number("memory_gib", 0.0, 2.0**30),
            system=machine.text("system", empty=True),
        ),
        figures=tuple(
            BackendFigure(
                **{
                    key: entry.text(key)
                    for key in ("configuration", "fold", "backend", "version", "provider", "precision")
                },
                threads=entry.integer("threads", 0, 2**20),
                max_abs_difference=entry.number("max_abs_difference", 0.0, 1e6),
                argmax_agreement=entry.number("argmax_agreement", 0.0, 1.0),
                seconds_per_window=entry.number("seconds_per_window", 0.0, 1e6),
            )
            for entry in reader.children("figures", lengths=(0, _MAX_FIGURES))
        ),
    )
