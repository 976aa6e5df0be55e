"""What a bundle says about its model beyond what is needed to run it: how its training images look, what is to come out
of its sanity cases, where it comes from, how its backends did.

    baseline.json   sanity/…   provenance.json   backends.json

All are optional. The last three say nothing that a result depends on and differ between machines and releases; they are
listed with their SHA-256 like every file and stay outside the configuration digest. They have a digest of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backend_figures import BACKENDS_JSON, BackendFigures, figures_document, read_figures
from engine.errors import BundleInvalid
from engine.intensity_baseline import BASELINE_JSON, IntensityBaseline, baseline_text, read_baseline
from engine.json_reader import read_json
from engine.manifest import MANIFEST, Manifest
from engine.provenance import PROVENANCE_JSON, Provenance, provenance_document, read_provenance
from engine.sanity_cases import CASES_JSON, FOLDER, SanitySuite, read_suite, suite_document


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Each is None where the bundle lacks it."""

    baseline: IntensityBaseline | None = None
    sanity: SanitySuite | None = None
    provenance: Provenance | None = None
    backends: BackendFigures | None = None


def is_outside_configuration(path: str) -> bool:
    """Whether a file of the bundle is left out of the configuration digest."""
    return path in (PROVENANCE_JSON, BACKENDS_JSON) or path.startswith(f"{FOLDER}/")


def read_evidence(root: Path, files: Mapping[str, str], manifest: Manifest) -> Evidence:
    """What the listed `files` hold of it. Raises BundleInvalid: a value of wrong type or range, or one that does not
    fit the model's labels and channels; a sanity case without its arrays, arrays without a case."""
    labels = [label.name for label in manifest.labels]

    def document(name: str) -> Mapping[str, Any] | None:
        return read_json(root / name, error=BundleInvalid) if name in files else None

    baseline = sanity = provenance = backends = None
    if (content := document(BASELINE_JSON)) is not None:
        baseline = read_baseline(content, error=BundleInvalid)
        if list(baseline.labels) != labels or len(baseline.channels) != len(manifest.channels):
            raise BundleInvalid(f"{BASELINE_JSON}: labels and channels are not those of {MANIFEST}")
    if (content := document(CASES_JSON)) is not None:
        sanity = read_suite(content, labels=labels, channels=len(manifest.channels), error=BundleInvalid)
    expected = {CASES_JSON, *(case.file for case in sanity.cases)} if sanity is not None else set()
    there = {name for name in files if name.startswith(f"{FOLDER}/")}
    if there != expected:
        raise BundleInvalid(f"{sorted(there ^ expected)[0]}: the files in {FOLDER}/ are not those of {CASES_JSON}")
    if (content := document(PROVENANCE_JSON)) is not None:
        provenance = read_provenance(content, error=BundleInvalid)
    if (content := document(BACKENDS_JSON)) is not None:
        backends = read_figures(content, error=BundleInvalid)
    return Evidence(baseline=baseline, sanity=sanity, provenance=provenance, backends=backends)


def write_evidence(root: Path, evidence: Evidence) -> None:
    """The JSON files of what there is; the arrays of sanity cases are written beside them (engine/sanity_cases.py)."""
    if evidence.baseline is not None:
        (root / BASELINE_JSON).write_text(baseline_text(evidence.baseline), encoding="utf-8")
    documents: dict[str, Mapping[str, Any]] = {}
    if evidence.sanity is not None:
        documents[CASES_JSON] = suite_document(evidence.sanity)
    if evidence.provenance is not None:
        documents[PROVENANCE_JSON] = provenance_document(evidence.provenance)
    if evidence.backends is not None:
        documents[BACKENDS_JSON] = figures_document(evidence.backends)
    for name, document in documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
