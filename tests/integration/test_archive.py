"""The demonstration's archive, asked by our own sender and by DCMTK."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom.ae import ApplicationEntity
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as StudyRootFind

from gateway.delivery.dimse import DimsePacs
from gateway.demo.archive import Archive
from gateway.destination_settings import DimseDestination
from tests.support.outgoing import InventedResult
from tests.support.peers import ROOT, program


@pytest.fixture
def result(tmp_path: Path) -> InventedResult:
    return InventedResult(tmp_path / "result")


def _destination(port: int) -> DimsePacs:
    settings = DimseDestination(name="demo", ae_title="PACS", host="127.0.0.1", port=port, timeout_s=10)
    return DimsePacs(settings, calling_ae_title="SEGGATE")


def _find(port: int, **keys: str) -> list[Dataset]:
    identifier = Dataset()
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    entity = ApplicationEntity("ASKER")
    entity.add_requested_context(StudyRootFind)
    association = entity.associate("127.0.0.1", port, ae_title="PACS")
    assert association.is_established
    answers = [match for _, match in association.send_c_find(identifier, StudyRootFind) if match is not None]
    association.release()
    return answers


def test_as_a_program_it_writes_its_port_keeps_objects_over_a_restart_and_ends_on_sigterm(
    tmp_path: Path, result: InventedResult
) -> None:
    objects = result.objects("BINARY")
    for start in range(2):
        port_file = tmp_path / f"port-{start}"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gateway.demo.archive", "--port", "0", "--ae-title", "PACS"),
                *("--port-file", str(port_file), "--folder", str(tmp_path / "archive")),
            ],
            cwd=ROOT,
        )
        try:
            deadline = time.monotonic() + 30
            while not port_file.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            destination = _destination(int(port_file.read_text()))
            if start == 0:
                assert [s.outcome for s in destination.send(objects)] == ["stored", "stored"]
            assert [v.outcome for v in destination.verify(objects)] == ["verified", "verified"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0


def test_every_level_answers_and_counts(tmp_path: Path, result: InventedResult) -> None:
    archive = Archive(tmp_path / "archive", ae_title="PACS")
    archive.start()
    try:
        objects = result.objects("BINARY")
        _destination(archive.port).send(objects)
        (study,) = _find(
            archive.port,
            QueryRetrieveLevel="STUDY",
            StudyInstanceUID="",
            PatientName="Invented*",
            NumberOfStudyRelatedInstances="",
        )
        assert study.StudyInstanceUID == result.study_instance_uid
        assert study.NumberOfStudyRelatedInstances == 2
        series = _find(
            archive.port,
            QueryRetrieveLevel="SERIES",
            StudyInstanceUID=result.study_instance_uid,
            SeriesInstanceUID="",
            Modality="",
        )
        assert sorted(s.Modality for s in series) == ["SEG", "SR"]
        both = "\\".join(o.sop_instance_uid for o in objects)
        assert len(_find(archive.port, QueryRetrieveLevel="IMAGE", SOPInstanceUID=both)) == 2
        assert _find(archive.port, QueryRetrieveLevel="IMAGE", SOPInstanceUID="1.2.3") == []
        assert _find(archive.port, QueryRetrieveLevel="PATIENT", PatientID="") == []
    finally:
        archive.stop()


def test_the_first_object_of_a_uid_is_kept_and_names_tell_nothing(tmp_path: Path, result: InventedResult) -> None:
    archive = Archive(tmp_path / "archive", ae_title="PACS")
    archive.start()
    try:
        item = result.report("BINARY")
        _destination(archive.port).send([item])
        changed = dcmread(item.path)
        changed.SeriesDescription = "changed"
        changed.save_as(item.path)
        digest = hashlib.sha256(item.path.read_bytes()).hexdigest()
        _destination(archive.port).send([replace(item, digest=digest)])
        (path,) = archive.folder.iterdir()
        assert "SeriesDescription" not in dcmread(path)
        assert item.sop_instance_uid not in path.name
    finally:
        archive.stop()


@pytest.mark.peer("dcmtk")
def test_dcmtk_can_echo(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", ae_title="PACS")
    archive.start()
    try:
        arguments = [program("echoscu"), "-aec", "PACS", "127.0.0.1", str(archive.port)]
        assert subprocess.run(arguments, timeout=30, check=False).returncode == 0
    finally:
        archive.stop()
