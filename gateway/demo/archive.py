"""A small archive for the demonstration where no Orthanc is installed: C-ECHO, C-STORE, C-FIND (Study Root).

    python -m gateway.demo.archive --port 0 --port-file F --folder D --ae-title PACS

It listens on loopback, keeps each object as a file named by a digest of its UID, and forgets nothing at a restart.
Not a PACS: no queue, no rights, no C-MOVE.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind
from pynetdicom.sop_class import Verification

from gateway.stop_signal import set_on_stop_signals

_SUCCESS, _PENDING, _CANCELLED = 0x0000, 0xFF00, 0xFE00
_OUT_OF_RESOURCES, _IDENTIFIER_MISMATCH, _CANNOT_UNDERSTAND = 0xA700, 0xA900, 0xC000
_MAX_PDU_BYTES = 131072

# The attributes that can be asked for, by level (PS3.4 C.6.2.1); a level includes those above it.
_LEVELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "STUDY": (
        "StudyInstanceUID",
        (
            "StudyInstanceUID",
            "PatientID",
            "PatientName",
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "StudyDescription",
            "StudyID",
            "AccessionNumber",
        ),
    ),
    "SERIES": ("SeriesInstanceUID", ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription")),
    "IMAGE": ("SOPInstanceUID", ("SOPInstanceUID", "SOPClassUID", "InstanceNumber")),
}
_COUNTS = {"NumberOfStudyRelatedInstances": "StudyInstanceUID", "NumberOfSeriesRelatedInstances": "SeriesInstanceUID"}
_KEPT = [*(keyword for _, keywords in _LEVELS.values() for keyword in keywords), "SpecificCharacterSet"]


class Archive:
    """The objects of one folder and the server in front of them. `start` makes it listen, `stop` ends it."""

    def __init__(self, folder: Path, *, ae_title: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder = folder
        self.ae_title = ae_title
        self._address = (host, port)
        self._index: dict[str, Dataset] = {}
        self._lock = threading.Lock()
        self._server: Any = None

    @property
    def port(self) -> int:
        """The port it listens on (the system's choice where 0 was asked for)."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.dcm")):
            try:
                self._remember(dcmread(path, specific_tags=_KEPT, stop_before_pixels=True))
            except (InvalidDicomError, AttributeError):
                continue  # not one of ours
        entity = ApplicationEntity(self.ae_title)
        entity.require_called_aet = True
        entity.add_supported_context(Verification)
        entity.add_supported_context(StudyRootFind)
        for sop_class_uid in self.storage_classes():
            entity.add_supported_context(sop_class_uid, ALL_TRANSFER_SYNTAXES)
        entity.maximum_pdu_size = _MAX_PDU_BYTES
        handlers = [(evt.EVT_C_STORE, self.store), (evt.EVT_C_FIND, self.find)]
        self._server = entity.start_server(self._address, block=False, evt_handlers=handlers)

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def storage_classes(self) -> Sequence[str]:
        """The SOP classes that it takes."""
        return [str(context.abstract_syntax) for context in AllStoragePresentationContexts]

    def objects(self) -> tuple[str, ...]:
        """SOP Instance UIDs of everything it holds."""
        with self._lock:
            return tuple(sorted(self._index))

    def path(self, sop_instance_uid: str) -> Path:
        return self.folder / f"{hashlib.sha256(sop_instance_uid.encode()).hexdigest()[:32]}.dcm"

    def store(self, event: evt.Event) -> int:
        """C-STORE: the bytes as received; an object that is held already is kept as it is."""
        uid = str(event.request.AffectedSOPInstanceUID)
        try:
            content = event.encoded_dataset()
            path = self.path(uid)
            if path.exists():
                return _SUCCESS
            partial = path.with_suffix(f".{threading.get_ident()}.part")
            partial.write_bytes(content)
            kept = dcmread(partial, specific_tags=_KEPT, stop_before_pixels=True)
            if kept.get("SOPInstanceUID") != uid or not kept.get("StudyInstanceUID"):
                partial.unlink()
                return _CANNOT_UNDERSTAND
            os.replace(partial, path)
        except OSError:
            return _OUT_OF_RESOURCES
        self._remember(kept)
        return _SUCCESS

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        """C-FIND at study, series and image level; every key that is listed above can be matched."""
        identifier = event.identifier
        level = str(identifier.get("QueryRetrieveLevel", ""))
        if level not in _LEVELS:
            yield _IDENTIFIER_MISMATCH, None
            return
        for answer in self._answers(identifier, level):
            if event.is_cancelled:
                yield _CANCELLED, None
                return
            yield _PENDING, answer

    def _answers(self, identifier: Dataset, level: str) -> list[Dataset]:
        unique_key, _ = _LEVELS[level]
        offered = [k for name in _upto(level) for k in _LEVELS[name][1]]
        with self._lock:
            held = list(self._index.values())
        matching: dict[str, Dataset] = {}
        for item in held:
            if all(_matches(identifier.get(k), item.get(k)) for k in offered if k in identifier):
                matching.setdefault(str(item.get(unique_key, "")), item)
        return [self._answer(identifier, level, offered, item, held) for item in matching.values()]

    def _answer(
        self, identifier: Dataset, level: str, offered: Sequence[str], item: Dataset, held: Sequence[Dataset]
    ) -> Dataset:
        answer = Dataset()
        answer.QueryRetrieveLevel = level
        answer.RetrieveAETitle = self.ae_title
        if "SpecificCharacterSet" in item:
            answer.SpecificCharacterSet = item.SpecificCharacterSet
        for keyword in offered:
            if keyword in identifier:
                setattr(answer, keyword, item.get(keyword, ""))
        for keyword, parent in _COUNTS.items():
            if keyword in identifier:
                setattr(answer, keyword, sum(other.get(parent) == item.get(parent) for other in held))
        return answer

    def _remember(self, item: Dataset) -> None:
        with self._lock:
            self._index[str(item.SOPInstanceUID)] = item


def _upto(level: str) -> list[str]:
    names = list(_LEVELS)
    return names[: names.index(level) + 1]


def _matches(wanted: Any, value: Any) -> bool:
    """Universal, single value, list of UID and wild card matching (PS3.4 C.2.2.2)."""
    if wanted is None or str(wanted) == "":
        return True
    choices = (
        [str(w) for w in wanted] if not isinstance(wanted, str) and isinstance(wanted, Sequence) else [str(wanted)]
    )
    text = "" if value is None else str(value)
    return any(fnmatch.fnmatchcase(text, choice.replace("[", "[[]")) for choice in choices)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway.demo.archive", description="A small DICOM archive.")
    parser.add_argument("--folder", type=Path, required=True, help="where the objects are kept")
    parser.add_argument("--ae-title", default="PACS")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = any free port, see --port-file")
    parser.add_argument("--port-file", type=Path, help="written once it listens")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    set_on_stop_signals(ended)
    archive = Archive(options.folder, ae_title=options.ae_title, host=options.host, port=options.port)
    archive.start()
    if options.port_file is not None:
        partial = options.port_file.with_suffix(".part")
        partial.write_text(f"{archive.port}\n", encoding="ascii")
        os.replace(partial, options.port_file)
    ended.wait()
    archive.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
