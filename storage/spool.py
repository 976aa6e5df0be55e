"""The spool: acknowledged objects and result files on a local file system, durable before anyone is told.

Layout and naming: docs/architecture.md, "State". A name in `incoming/` sorts by arrival. The rule that everything
rests on (REC-01): bytes go to `tmp/`, are synced, get their name by a rename, the folder is synced, and only then
does the caller hear that the object is kept. Readers never see a partial file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from storage.durable_files import (
    ByteString,
    file_digest,
    is_abandoned,
    partial_name,
    storage_error,
    sync_folder,
    unsafe,
    write_chunks,
    write_file,
)
from storage.errors import ObjectChanged, ObjectMissing, SpoolFull, SpoolUnsafe
from storage.object_writer import ObjectWriter
from storage.part10 import ObjectEvidence, encode_preamble_and_meta, read_meta

_CHUNK_BYTES = 1 << 20
_OBJECT_ID = re.compile(r"[0-9a-f]{32}")
_STUDY_KEY = re.compile(r"[0-9a-f]{32}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ASIDE = ".removed"
_FOLDERS = ("tmp", "incoming", "studies", "quarantine")


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """One name in `incoming/`: an acknowledged object or an event, not yet indexed."""

    id: str
    path: Path
    is_event: bool


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """Where an indexed object belongs: the move that `Spool.settle` makes."""

    object_id: str
    spool_path: str  # relative to the root, as the index row says


def study_key(study_instance_uid: str) -> str:
    """Folder name of a study: the first 32 hex digits of SHA-256 of its UID (no UID appears in a path)."""
    return hashlib.sha256(study_instance_uid.encode("ascii", "replace")).hexdigest()[:32]


def object_path(key: str, object_id: str) -> str:
    """Final place of an object of a study, relative to the spool's root."""
    return f"studies/{_checked(_STUDY_KEY, key)}/objects/{_checked(_OBJECT_ID, object_id)}.dcm"


def _result_path(key: str, result_id: str, name: str) -> str:
    return (
        f"studies/{_checked(_STUDY_KEY, key)}/results/{_checked(_PLAIN_NAME, result_id)}/{_checked(_PLAIN_NAME, name)}"
    )


def quarantine_path(object_id: str) -> str:
    """Final place of an unreadable or illegal object, relative to the spool's root."""
    return f"quarantine/{_checked(_OBJECT_ID, object_id)}.dcm"


class Spool:
    """The spool folder. Safe to share between threads; several processes may use the same folder.

    `reserve_bytes`: free space that is never used up by intake (REC-02).
    """

    def __init__(self, root: Path, reserve_bytes: int) -> None:
        self.root = root
        self.reserve_bytes = reserve_bytes
        self._last_ns = 0
        self._clock = threading.Lock()

    def prepare(self) -> None:
        """Make the folders, every new level synced in its parent: an acknowledged object is no safer than the folder
        that it lies in. Raises SpoolUnsafe."""
        try:
            for name in _FOLDERS:
                self._make_folders(self.root / name)
            sync_folder(self.root)
        except OSError as error:
            raise unsafe(error, self.root) from error

    def new_id(self) -> str:
        """16 hex digits of the time in ns (never going back within a process) + 16 random hex digits."""
        with self._clock:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            return f"{self._last_ns:016x}{secrets.token_hex(8)}"

    # -- writing -----------------------------------------------------------------------------------------------

    def open_object(self, evidence: ObjectEvidence) -> ObjectWriter:
        """Begin an object in `tmp/`; nothing is kept before `commit`. Raises SpoolFull, SpoolUnsafe."""
        _checked(_OBJECT_ID, evidence.object_id)
        return ObjectWriter(self, f"{evidence.object_id}.dcm", encode_preamble_and_meta(evidence))

    def write_object(self, dataset: ByteString | BinaryIO, *, evidence: ObjectEvidence) -> Path:
        """Keep one data set, byte for byte, as a DICOM file; returns its path in `incoming/` once it is durable.

        `dataset`: bytes-like, or a binary stream that is read to its end. Raises SpoolFull or SpoolUnsafe; then
        nothing of the object is kept.
        """
        with self.open_object(evidence) as writer:
            if isinstance(dataset, (bytes, bytearray, memoryview)):
                writer.write(dataset)
            else:
                while chunk := dataset.read(_CHUNK_BYTES):
                    writer.write(chunk)
            return writer.commit()

    def write_event(self, kind: str, detail: dict[str, Any]) -> Path:
        """Keep one association event (JSON) among the objects, in their order. The reserve does not apply: a receiver
        whose disk runs full must still say what became of its associations. Raises SpoolFull, SpoolUnsafe."""
        event_id = self.new_id()
        content = json.dumps({"event_id": event_id, "kind": kind, "detail": detail}, sort_keys=True).encode()
        with ObjectWriter(self, f"{event_id}.json", content, may_use_reserve=True) as writer:
            return writer.commit()

    def store_result_file(self, key: str, result_id: str, name: str, data: bytes) -> tuple[str, str]:
        """Write a result's file once; returns (path relative to the root, SHA-256 of the bytes).

        The same bytes again are fine (a retried step); other bytes raise ObjectChanged. The reserve does not apply:
        it is kept for this. Raises SpoolFull, SpoolUnsafe.
        """
        relative = _result_path(key, result_id, name)
        digest = hashlib.sha256(data).hexdigest()
        try:
            if not (self.root / relative).exists():
                partial = self.root / "tmp" / partial_name(self.new_id())
                try:
                    write_file(partial, data)
                    self._name_result(partial, relative)
                finally:
                    partial.unlink(missing_ok=True)
            self._check_result(relative, digest)
        except OSError as error:
            raise storage_error(error, self.root) from error
        return relative, digest

    def store_result_chunks(
        self, key: str, result_id: str, stem: str, suffix: str, chunks: Iterable[bytes]
    ) -> tuple[str, str, int]:
        """The same for a file that is made while it is written, and named by its content: the stem, the first 16 hex
        digits of its SHA-256, the suffix. Returns (path, SHA-256, bytes)."""
        partial = self.root / "tmp" / partial_name(self.new_id())
        try:
            try:
                digest, size = write_chunks(partial, chunks)
                relative = _result_path(key, result_id, f"{stem}-{digest[:16]}{suffix}")
                self._name_result(partial, relative)
            finally:
                partial.unlink(missing_ok=True)
            self._check_result(relative, digest)
        except OSError as error:
            raise storage_error(error, self.root) from error
        return relative, digest, size

    def _name_result(self, partial: Path, relative: str) -> None:
        target = self.root / relative
        self._make_folders(target.parent)
        # A link fails where a rename would replace what another process wrote meanwhile.
        with suppress(FileExistsError):
            os.link(partial, target)
            sync_folder(target.parent)

    def _check_result(self, relative: str, digest: str) -> None:
        if file_digest(self.root / relative) != digest:
            raise ObjectChanged(
                f"{relative} exists with other bytes; results are written once, so this step is not repeatable"
            )

    # -- after indexing ----------------------------------------------------------------------------------------

    def incoming(self) -> list[Incoming]:
        """All acknowledged and not yet indexed objects and events, oldest first. Raises SpoolUnsafe."""
        found = []
        try:
            with os.scandir(self.root / "incoming") as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            raise unsafe(error, self.root) from error
        for name in names:
            stem, _, suffix = name.partition(".")
            if suffix in {"dcm", "json"} and _OBJECT_ID.fullmatch(stem):
                found.append(Incoming(id=stem, path=self.root / "incoming" / name, is_event=suffix == "json"))
        return found

    def read_event(self, path: Path) -> tuple[str, dict[str, Any]]:
        """(kind, detail) of an event file. Raises ValueError when it is not one of ours, ObjectMissing, SpoolUnsafe."""
        try:
            event = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise ObjectMissing(f"the event {path.name} is not in the spool") from error
        except OSError as error:
            raise unsafe(error, self.root) from error
        if not isinstance(event, dict) or not isinstance(event.get("detail"), dict):
            raise ValueError(f"{path.name} is not an event file")
        return str(event.get("kind")), event["detail"]

    def forget_event(self, path: Path) -> None:
        """Remove an event file after its content is committed to the database."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise unsafe(error, self.root) from error

    def settle(self, moves: Iterable[Settlement]) -> None:
        """Move indexed objects from `incoming/` to the place their rows name; repeating it is harmless.

        Raises SpoolUnsafe; then the objects are still found by `resolve`, and the call can be repeated.
        """
        folders: set[Path] = set()
        try:
            for move in moves:
                target = self._inside(move.spool_path)
                source = self.root / "incoming" / f"{_checked(_OBJECT_ID, move.object_id)}.dcm"
                if not source.exists():
                    continue
                self._make_folders(target.parent)
                source.rename(target)
                folders.add(target.parent)
            for folder in sorted(folders):
                sync_folder(folder)
            if folders:
                sync_folder(self.root / "incoming")
        except OSError as error:
            raise unsafe(error, self.root) from error

    def quarantine(self, object_id: str) -> str:
        """Move an object from `incoming/` to `quarantine/`; returns its path relative to the root."""
        relative = quarantine_path(object_id)
        self.settle([Settlement(object_id=object_id, spool_path=relative)])
        return relative

    def study_folders(self) -> Iterator[Path]:
        """The folders of objects of all studies, in no order. Raises SpoolUnsafe."""
        try:
            with os.scandir(self.root / "studies") as entries:
                for entry in entries:
                    if _STUDY_KEY.fullmatch(entry.name):
                        yield Path(entry.path, "objects")
        except OSError as error:
            raise unsafe(error, self.root) from error

    def objects_in(self, folder: Path) -> list[Path]:
        """The objects of a study, or of the quarantine, oldest first; none without the folder. Raises SpoolUnsafe."""
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise unsafe(error, self.root) from error
        stems = (name.removesuffix(".dcm") for name in sorted(names) if name.endswith(".dcm"))
        return [folder / f"{stem}.dcm" for stem in stems if _OBJECT_ID.fullmatch(stem)]

    def set_study_aside(self, key: str) -> None:
        """Take a study's whole folder, objects and results, out of its place, to be deleted by `sweep_studies_aside`;
        nothing happens where there is none. Raises SpoolUnsafe."""
        folder = self.root / "studies" / _checked(_STUDY_KEY, key)
        aside = self.root / "tmp" / f"{key}{_ASIDE}"
        try:
            # Left by a call that was cut short.
            shutil.rmtree(aside, ignore_errors=True)
            if folder.is_dir():
                folder.rename(aside)
                sync_folder(folder.parent)
        except OSError as error:
            raise unsafe(error, self.root) from error

    def sweep_studies_aside(self) -> int:
        """Delete what was set aside; how many studies. Raises SpoolUnsafe."""
        removed = 0
        try:
            for path in (self.root / "tmp").iterdir():
                if path.name.endswith(_ASIDE) and _STUDY_KEY.fullmatch(path.name.removesuffix(_ASIDE)):
                    # Another process may sweep at the same time.
                    shutil.rmtree(path, ignore_errors=True)
                    if path.exists():
                        shutil.rmtree(path)
                    removed += 1
        except FileNotFoundError:
            return removed
        except OSError as error:
            raise unsafe(error, self.root) from error
        return removed

    def remove_result(self, key: str, result_id: str) -> bool:
        """Delete the files of one result; whether there were any. Raises SpoolUnsafe."""
        folder = self.root / "studies" / _checked(_STUDY_KEY, key) / "results" / _checked(_PLAIN_NAME, result_id)
        if not folder.is_dir():
            return False
        try:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.is_dir():
                shutil.rmtree(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise unsafe(error, self.root) from error
        return True

    def remove_objects(self, key: str, wanted: Callable[[str], bool]) -> int:
        """Delete the objects of a study whose ids are `wanted`; how many there were. Raises SpoolUnsafe."""
        folder = self.root / "studies" / _checked(_STUDY_KEY, key) / "objects"
        found = [path for path in self.objects_in(folder) if wanted(path.stem)]
        try:
            for path in found:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise unsafe(error, self.root) from error
        return len(found)

    def remove_incoming(self, object_id: str) -> None:
        """Delete an object of `incoming/` that belongs to a deleted study. Raises SpoolUnsafe."""
        try:
            (self.root / "incoming" / f"{_checked(_OBJECT_ID, object_id)}.dcm").unlink(missing_ok=True)
        except OSError as error:
            raise unsafe(error, self.root) from error

    def take_back(self, paths: Iterable[Path]) -> None:
        """Move settled objects that no row names back to `incoming/`. Raises SpoolUnsafe; then some are moved."""
        incoming = self.root / "incoming"
        folders = {incoming}
        try:
            for path in paths:
                path.rename(incoming / path.name)
                folders.add(path.parent)
            for folder in sorted(folders):
                sync_folder(folder)
        except OSError as error:
            raise unsafe(error, self.root) from error

    # -- reading -----------------------------------------------------------------------------------------------

    def resolve(self, spool_path: str) -> Path:
        """The file behind a row's path: the final place, else `incoming/`. Raises ObjectMissing."""
        final = self._inside(spool_path)
        early = self.root / "incoming" / final.name
        # The file may move between the two looks, so the final place is looked at twice.
        for candidate in (final, early, final):
            if candidate.is_file():
                return candidate
        raise ObjectMissing(f"{spool_path} is in the index but not in the spool")

    def unchanged(self, spool_path: str, digest: str) -> Path:
        """The file behind a row's path, which has the SHA-256 of the row. Raises ObjectMissing, ObjectChanged."""
        path = self.resolve(spool_path)
        if file_digest(path) != digest:
            raise ObjectChanged(f"{path} was altered or truncated on disk; restore it from a backup of the spool")
        return path

    def read_evidence(self, path: Path) -> ObjectEvidence:
        """What the file meta information says about how the object came here. Raises ObjectMissing, ValueError."""
        with _opened(path) as file:
            return read_meta(file)[0]

    def dataset_offset(self, path: Path) -> int:
        """Where the data set begins in the file. Raises ObjectMissing, ValueError."""
        with _opened(path) as file:
            return read_meta(file)[1]

    def dataset_digest(self, path: Path) -> str:
        """SHA-256 of the data set bytes as received (what follows the file meta information)."""
        digest = hashlib.sha256()
        with _opened(path) as file:
            file.seek(read_meta(file)[1])
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    # -- state of the folder -----------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Free space for an unprivileged writer. Raises SpoolUnsafe."""
        try:
            state = os.statvfs(self.root)
        except OSError as error:
            raise unsafe(error, self.root) from error
        return state.f_bavail * state.f_frsize

    def has_space(self) -> bool:
        return self.free_bytes() >= self.reserve_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raises SpoolFull where a result of this size would not fit (it may use the reserve), SpoolUnsafe."""
        free = self.free_bytes()
        if free < size_bytes:
            raise SpoolFull(
                f"{self.root} has {free >> 20} MB free, a result may take {size_bytes >> 20} MB; remove delivered "
                "studies or enlarge the disk"
            )

    def sweep_tmp(self) -> int:
        """Remove partial writes of processes that are gone; returns how many. Raises SpoolUnsafe."""
        removed = 0
        try:
            for path in (self.root / "tmp").iterdir():
                if path.suffix == ".part" and is_abandoned(path):
                    path.unlink(missing_ok=True)
                    removed += 1
        except OSError as error:
            raise unsafe(error, self.root) from error
        return removed

    def check_sync(self) -> float:
        """Write, sync, rename and sync the folder once, as for an object; returns the seconds it took.

        Raises SpoolUnsafe naming what failed.
        """
        probe = self.root / "tmp" / partial_name(self.new_id())
        renamed = probe.with_suffix(".probe")
        begin = time.monotonic()
        try:
            write_file(probe, b"\0" * 65536)
            probe.rename(renamed)
            sync_folder(renamed.parent)
            if renamed.stat().st_size != 65536:
                raise SpoolUnsafe(f"{self.root}: a synced file has the wrong size")
        except OSError as error:
            raise unsafe(error, self.root) from error
        finally:
            probe.unlink(missing_ok=True)
            renamed.unlink(missing_ok=True)
        return time.monotonic() - begin

    # -- inside ------------------------------------------------------------------------------------------------

    def _inside(self, spool_path: str) -> Path:
        """The absolute path, after a check that it cannot leave the root."""
        parts = spool_path.split("/")
        if parts[0] not in {"studies", "quarantine"} or not all(_PLAIN_NAME.fullmatch(part) for part in parts):
            raise ValueError(f"{spool_path!r} is not a path inside the spool")
        return self.root.joinpath(*parts)

    def _make_folders(self, folder: Path) -> None:
        """mkdir -p, with every new name synced in its parent."""
        missing: list[Path] = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            sync_folder(new.parent)


def received_at(object_id: str) -> datetime:
    """Arrival time that an object or event id carries."""
    return datetime.fromtimestamp(int(_checked(_OBJECT_ID, object_id)[:16], 16) / 1e9, UTC)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise ObjectMissing(f"{path.name} is not in the spool") from error


def _checked(pattern: re.Pattern[str], value: str) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(f"{value!r} cannot be part of a path in the spool")
    return value
