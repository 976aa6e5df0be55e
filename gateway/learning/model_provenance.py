"""Where a registered model comes from, as tags of the registry and in the ledger: digests, counts and figures.

No name of a case, a patient or a file is among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict

from engine.bundle import Bundle
from engine.provenance import Provenance

_MAX_TAG = 50_000  # characters; MLflow takes 100,000


def provenance_of(bundle: Bundle) -> dict[str, str]:
    """Where a bundle comes from, as far as it says: digests, counts and figures, no name of a case.

    plans_digest, dataset_digest    SHA-256 of plans.json and dataset.json in the bundle
    baseline_digest                 SHA-256 of baseline.json: with what live images are compared
    cases, cases_digest             how many cases were learnt from, and the digest of their names
    exclusions, exclusions_digest   the same of the cases that were left out
    training                        by "configuration/fold": trainer, software, digests of cases and of their content
    code_version                    which release exported it
    validation                      figures of the cross-validation, by label
    unknown                         what the bundle does not say of all this
    """
    files = {"plans_digest": "plans.json", "dataset_digest": "dataset.json", "baseline_digest": "baseline.json"}
    found = {key: _sha256(bundle, file) for key, file in files.items() if (bundle.root / file).is_file()}
    provenance = bundle.evidence.provenance
    if provenance is None:
        return found | {"unknown": "cases, exclusions, training and validation: it has no provenance.json"}
    data = provenance.data
    stated: dict[str, object] = {
        "unknown": "; ".join(_unknown(provenance)),
        "cases": data.cases,
        "cases_digest": data.cases_digest,
        "exclusions": data.excluded,
        "exclusions_digest": data.exclusions_digest,
        "code_version": provenance.exported_by,
        "training": {
            f"{fold.configuration}/{fold.fold}": {
                key: value
                for key, value in (
                    ("trainer", fold.trainer),
                    ("software", fold.software),
                    ("cases_digest", fold.training_cases_digest),
                    ("data_digest", fold.data_digest),
                )
                if value is not None
            }
            for fold in provenance.training
        }
        or None,
        "validation": None if provenance.validation is None else asdict(provenance.validation),
    }
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
        for key, value in stated.items()
        if value is not None
    }
    # Of a bundle of thousands of networks.
    return found | {
        key: text if len(text) <= _MAX_TAG else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        for key, text in texts.items()
    }


def _unknown(provenance: Provenance) -> Iterator[str]:
    if provenance.data.cases_digest is None:
        yield "names of the cases"
    else:
        yield "whether a single case is among them: the digest is of all their names together"
    if provenance.data.excluded is None:
        yield "exclusions"
    networks = len(provenance.training)
    for what, known in (
        ("cases", [fold.training_cases_digest for fold in provenance.training]),
        ("content of the cases", [fold.data_digest for fold in provenance.training]),
    ):
        if None in known:
            yield f"{what} of {known.count(None)} of {networks} networks"
    if provenance.validation is None:
        yield "validation"


def _sha256(bundle: Bundle, file: str) -> str:
    return hashlib.sha256((bundle.root / file).read_bytes()).hexdigest()
