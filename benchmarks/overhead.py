"""The gateway's own share: seconds from the last C-STORE response to verified, less model time and quiet time.

    python -m benchmarks.overhead [--json] [--study DIR] [--repeats N]

Starts a PACS (Orthanc where there is one), an EMR and a gateway on loopback, sends copies of one study under new UIDs
one after the other, and reads the times from the ledger. The first study after the start is reported apart (`first`);
`overhead_s` is the median of the others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
from pydicom.uid import UID

from gateway.demo.stage import Stage
from gateway.demo.story import Outcome, follow, send, set_the_stage
from gateway.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--study", type=Path, default=default_study())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seggate-overhead-") as scratch:
        report = measure(options.study, options.repeats, Path(scratch), quiet=options.json)
    print(json.dumps(report))
    return 0


def default_study() -> Path:
    shared = Path(os.environ.get("SEGGATE_SHARED", ROOT.parent / "shared"))
    return shared / "data" / "dicom" / "mr-hippocampus" / "study3"


def measure(study: Path, repeats: int, scratch: Path, *, quiet: bool) -> dict[str, Any]:
    """Run everything once; `rows` has every study with its parts."""

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    copies = [copy_study(study, scratch / f"copy{n}", n) for n in range(repeats + 1)]
    stage = Stage(scratch / "stage")
    try:
        set_the_stage(stage, scratch / "copy0", ROOT / "config" / "routes.toml", tell)
        quiet_s = load_settings(stage.config).gateway.completeness.quiet_s
        rows = []
        for folder, uid in copies:
            answered: list[datetime] = []

            def note(done: int, total: int, into: list[datetime] = answered) -> None:
                into.append(datetime.now(UTC))

            send(stage, folder, note)
            outcome = follow(stage, uid, timeout_s=300, tell=lambda _line: None)
            rows.append(_row(outcome, answered[-1], quiet_s))
            tell(json.dumps(rows[-1]))
    finally:
        stage.stop()
    later = rows[1:] or rows
    return {
        "overhead_s": round(statistics.median(r["overhead_s"] for r in later), 3),
        "overhead_max_s": max(r["overhead_s"] for r in later),
        "first_overhead_s": rows[0]["overhead_s"],
        "model_s": round(statistics.median(r["model_s"] for r in later), 3),
        "quiet_s": quiet_s,
        "all_verified": all(r["verified"] for r in rows),
        "repeats": len(later),
        "pacs": stage.pacs,
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()},
        "rows": rows,
    }


def _row(outcome: Outcome, answered: datetime, quiet_s: float) -> dict[str, Any]:
    result = next((r for r in outcome.document["results"] if r["runtime"]), None)
    if result is None:
        raise SystemExit(f"no result was made: {outcome.state}: {outcome.document['reason']}")
    seconds = result["runtime"]["seconds"]
    model_s = sum(v for k, v in seconds.items() if k != "read")
    end = max(d["updated_at"] for d in result["deliveries"])
    whole_s = (end - answered).total_seconds()
    times = {e["kind"]: round((e["at"] - answered).total_seconds(), 3) for e in outcome.document["events"]}
    return {
        "verified": outcome.verified,
        "whole_s": round(whole_s, 3),
        "model_s": round(model_s, 3),
        "overhead_s": round(whole_s - model_s - quiet_s, 3),
        "events_s": times,
    }


def copy_study(study: Path, folder: Path, number: int) -> tuple[Path, str]:
    """The study under new UIDs, everything else as it is; returns the folder and the new Study Instance UID."""
    folder.mkdir()
    uids: dict[str, UID] = {}

    def renamed(uid: str) -> UID:
        return uids.setdefault(uid, UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{number} {uid}').int}"))

    study_uid = UID("")
    for index, path in enumerate(sorted(p for p in study.rglob("*") if p.is_file())):
        ds = pydicom.dcmread(path)
        study_uid = renamed(ds.StudyInstanceUID)
        ds.StudyInstanceUID = study_uid
        ds.SeriesInstanceUID = renamed(ds.SeriesInstanceUID)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = renamed(ds.SOPInstanceUID)
        ds.save_as(folder / f"{index:05d}.dcm")
    return folder, study_uid


if __name__ == "__main__":
    sys.exit(main())
