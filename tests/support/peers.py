"""Finds the programs and data that tests need from outside, and skips with the reason where they are absent.

With `SEGGATE_REQUIRE_PEERS=1` (set by `.ci/run`) an absent peer fails instead of skipping.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _on_path(*programs: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        absent = [p for p in programs if shutil.which(p) is None and not Path("/usr/sbin", p).exists()]
        return f"not on the PATH: {', '.join(absent)}" if absent else None

    return missing


def _importable(module: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if importlib.util.find_spec(module) else f"Python package {module} is not installed"

    return missing


def _node_modules() -> str | None:
    if shutil.which("node") is None:
        return "node is not on the PATH"
    folder = ROOT / "tests" / "support" / "node" / "node_modules"
    return None if folder.is_dir() else "run `make node-peers` (npm packages of tests/support/node)"


def _postgresql() -> str | None:
    return None if postgresql_bin() is not None else "no PostgreSQL server binaries found"


def postgresql_bin() -> Path | None:
    """The folder that holds initdb and postgres, or None."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def nnunet_python() -> Path:
    """nnU-Net has requirements of its own and lives in an environment of its own (`make nnunet-peer`)."""
    return Path(os.environ.get("SEGGATE_NNUNET_PYTHON", ROOT / ".venv-nnunet" / "bin" / "python"))


def _nnunet() -> str | None:
    if nnunet_python().exists():
        return None
    return "not installed: run `make nnunet-peer`, or name a Python that has nnunetv2 in SEGGATE_NNUNET_PYTHON"


_PEERS: dict[str, Callable[[], str | None]] = {
    "orthanc": _on_path("Orthanc"),
    "dcmtk": _on_path("storescu", "echoscu", "findscu", "storescp"),
    "dciodvfy": _on_path("dciodvfy"),
    "dcmqi": _on_path("segimage2itkimage", "tid1500reader"),
    "node": _node_modules,
    "surface-distance": _importable("surface_distance"),
    "torch": _importable("torch"),
    "blosc2": _importable("blosc2"),
    "nnunet": _nnunet,
    "postgresql": _postgresql,
}


def _absent(what: str, reason: str) -> None:
    message = f"{what}: {reason}"
    if os.environ.get("SEGGATE_REQUIRE_PEERS") == "1":
        pytest.fail(f"required peer is absent: {message}")
    pytest.skip(message, allow_module_level=True)


def require_peer(*names: str) -> None:
    """Skip (or fail, under SEGGATE_REQUIRE_PEERS=1) unless every named peer is there."""
    for name in names:
        reason = _PEERS[name]()
        if reason is not None:
            _absent(name, reason)


def program(name: str) -> str:
    """Absolute path of a program that `require_peer` found."""
    found = shutil.which(name) or (str(Path("/usr/sbin", name)) if Path("/usr/sbin", name).exists() else None)
    if found is None:
        _absent(name, "not on the PATH")
        raise AssertionError("unreachable")
    return found


def shared_root() -> Path:
    """The folder `shared` beside the checkout (or $SEGGATE_SHARED); skips where it is absent."""
    folder = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        _absent("shared data", "the folder shared/data is not beside the checkout")
    return folder


def shared_data() -> Path:
    """The folder `shared/data`; skips where it is absent."""
    return shared_root() / "data"
