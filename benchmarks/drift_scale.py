"""Seconds of a drift check over thousands of studies, with the reading of the database.

Rows as the gateway keeps them, made of the facts of the hippocampus cases with volumes varied a little, of two
scanners, in a SQLite file. With the default reference of 200 studies a check compares all scanners together and each of
the two; with the largest reference that so many studies allow it is one comparison of two thirds with one third.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from gateway.monitoring.drift_window import check_model
from gateway.settings import DriftSettings
from storage.database import Database
from storage.records import Result, ResultState, Study, StudyFacts, StudyState, StudyVersion, utc_now

SIZES = (2500, 5000, 10_000)
_REPEATS = 3
_NAME, _VERSION, _UID = "hippocampus-mr", "1.0.0", "1.2.3"


def seconds_of_a_check(facts: Sequence[Mapping[str, Any]], *, quiet: bool) -> dict[str, Any]:
    """Of each size the seconds (the quickest of three) of wall clock and of CPU."""
    found = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="seggate-drift-") as folder:
            database = Database(f"sqlite:///{Path(folder) / 'drift.sqlite'}")
            database.create_all()
            _fill(database, facts, size)
            entry: dict[str, Any] = {"studies": size}
            for name, reference in (("default", 200), ("largest", size * 2 // 3)):
                wall, cpu, comparisons = _timed(database, reference, scanners=name == "default")
                entry[name] = {
                    "reference": reference,
                    "comparisons": comparisons,
                    "seconds": round(wall, 2),
                    "cpu_seconds": round(cpu, 2),
                }
            database.close()
        found.append(entry)
        if not quiet:
            print(entry, file=sys.stderr)
    return {"scale": found}


def _timed(database: Database, reference: int, *, scanners: bool) -> tuple[float, float, int]:
    settings = DriftSettings(reference_studies=reference, window_days=3650)
    if not scanners:
        with database.session() as session:
            session.query(StudyFacts).update({StudyFacts.scanner: "One"})
    walls, cpus, comparisons = [], [], 0
    for _ in range(_REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        with database.reading() as session:
            comparisons = len(check_model(session, _NAME, _VERSION, settings, now=utc_now()))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus), comparisons


def _fill(database: Database, facts: Sequence[Mapping[str, Any]], size: int) -> None:
    random, now = np.random.default_rng(0), utc_now()
    with database.session() as session:
        session.add(
            Study(
                study_instance_uid=_UID,
                study_key="k",
                state=StudyState.VERIFIED,
                first_received_at=now,
                last_received_at=now,
                calling_ae="MR",
                version=1,
            )
        )
        session.flush()
        session.add(
            StudyVersion(
                version_id="v",
                study_instance_uid=_UID,
                number=1,
                content_digest="d",
                declared_at=now,
                rule="r",
                evidence={},
                object_ids=[],
                workflow_id="w",
            )
        )
        session.flush()
        for index in range(size):
            entry = facts[index % len(facts)]
            measurements = [
                {**segment, "volume_ml": segment["volume_ml"] * float(random.lognormal(0, 0.02))}
                for segment in entry["measurements"]
            ]
            session.add(
                Result(
                    result_id=f"r{index}",
                    version_id="v",
                    study_instance_uid=_UID,
                    series_instance_uid="1",
                    part="",
                    rule="r",
                    model_name=_NAME,
                    model_version=_VERSION,
                    weights_digest="w",
                    configuration_digest="c",
                    state=ResultState.RELEASED,
                    workflow_id=f"w{index}",
                    created_at=now,
                    attempts=1,
                    verdict=entry["verdict"],
                    measurements=measurements,
                    runtime={"mean_confidence": entry["confidence"]},
                )
            )
        session.flush()
        session.add_all(
            StudyFacts(
                result_id=f"r{index}",
                model_name=_NAME,
                model_version=_VERSION,
                scanner=f"Scanner {index % 2}",
                recorded_at=now - timedelta(minutes=size - index),
                acquisition=facts[index % len(facts)]["acquisition"],
                image=facts[index % len(facts)]["image"],
            )
            for index in range(size)
        )
