"""Unpacks the zip that nnU-Net's export makes, or that of a bundle, as a file from a stranger.

Of nnU-Net's only the files that an import reads are unpacked; every name in the archive is checked first. Limits bound
what a bomb can cost, whatever its headers claim.
"""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from engine.errors import ImportRefused

MAX_ENTRIES = 200_000
MAX_TOTAL_BYTES = 64 * 2**30
MAX_FILE_BYTES = 16 * 2**30
# Weights do not compress (measured: under 1.1); JSON of many numbers reaches about 30. Deflate's limit is 1032.
MAX_RATIO = 100
_SMALL_BYTES = 2**20  # below this a ratio says nothing
_CHUNK = 2**20

_MANIFEST = "bundle.json"
_WANTED = re.compile(
    r"plans\.json|dataset\.json|dataset_fingerprint\.json|postprocessing\.json|inference_information\.json"
    r"|checkpoint_(final|best)\.pth"
)


def bundle_folder(archive: Path) -> str | None:
    """The folder of the zip that holds bundle.json ("" at the top), None where it is no bundle."""
    try:
        with zipfile.ZipFile(archive) as container:
            names = container.namelist()
    except (zipfile.BadZipFile, OSError):
        return None
    found = [path.parent for path in map(PurePosixPath, names) if path.name == _MANIFEST and len(path.parts) <= 2]
    return "/".join(found[0].parts) if len(found) == 1 else None


def unpack_model(archive: Path, target: Path, *, everything: bool = False) -> None:
    """Unpack the wanted files of `archive` (`everything`: all) below the empty directory `target`.

    Raises ImportRefused with the entry's name: a path that leads outside, a link or device, a name twice, encryption,
    too many entries, too much content, an implausible ratio, a checksum that fails, or too little free disk.
    """
    try:
        with zipfile.ZipFile(archive) as container:
            entries = container.infolist()
            if len(entries) > MAX_ENTRIES:
                raise ImportRefused(f"{archive.name}: {len(entries)} entries; at most {MAX_ENTRIES} are read")
            wanted = _checked(archive.name, entries, everything)
            claimed = sum(entry.file_size for _, entry in wanted)
            free = shutil.disk_usage(target).free
            if claimed > MAX_TOTAL_BYTES or claimed > free:
                raise ImportRefused(
                    f"{archive.name}: {claimed} bytes to unpack; allowed are {MAX_TOTAL_BYTES}, free are {free}"
                )
            for path, entry in wanted:
                _unpack(archive.name, container, entry, target / path)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as exc:
        raise ImportRefused(f"{archive.name}: damaged or not a zip file: {exc}") from exc
    except OSError as exc:
        raise ImportRefused(f"{archive.name}: cannot be unpacked: {exc.strerror}") from exc


def _checked(
    where: str, entries: list[zipfile.ZipInfo], everything: bool
) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    wanted: list[tuple[PurePosixPath, zipfile.ZipInfo]] = []
    seen: set[str] = set()
    for entry in entries:
        shown = entry.filename[:200]
        path = PurePosixPath(entry.filename)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in entry.filename
            or ":" in entry.filename
            or not entry.filename.isprintable()
            or len(entry.filename) > 1000
        ):
            raise ImportRefused(f"{where}: {shown!r} is not a plain relative path")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ImportRefused(f"{where}: {shown!r} is a link or a device")
        if entry.flag_bits & 0x1:
            raise ImportRefused(f"{where}: {shown!r} is encrypted")
        if path.as_posix() in seen:
            raise ImportRefused(f"{where}: {shown!r} appears twice")
        seen.add(path.as_posix())
        if entry.is_dir() or not (everything or _WANTED.fullmatch(path.name)):
            continue
        if entry.file_size > MAX_FILE_BYTES:
            raise ImportRefused(f"{where}: {shown!r} claims {entry.file_size} bytes; at most {MAX_FILE_BYTES}")
        if entry.file_size > max(_SMALL_BYTES, MAX_RATIO * entry.compress_size):
            raise ImportRefused(f"{where}: {shown!r} would grow from {entry.compress_size} to {entry.file_size} bytes")
        wanted.append((path, entry))
    return wanted


def _unpack(where: str, container: zipfile.ZipFile, entry: zipfile.ZipInfo, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with container.open(entry) as source, file.open("xb") as sink:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > entry.file_size:
                raise ImportRefused(f"{where}: {entry.filename[:200]!r} holds more than it claims")
            sink.write(chunk)
