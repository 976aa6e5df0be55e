"""`seggate models compare`: what differs between two versions of a model, and their figures side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.bundle import Bundle, load_bundle
from engine.errors import BundleInvalid
from engine.manifest import BundleConfiguration, LabelSpec
from gateway.commands.output import print_json, say, table
from gateway.learning.versions import kind_of_change
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry
from storage.learning_records import GateReport, ShadowRun
from storage.models import RegisteredModel

_CHANGES = {
    "major": "MAJOR: other labels or channels",
    "minor": "MINOR: other weights",
    "patch": "PATCH: the same labels, channels and weights",
}
Row = dict[str, Any]
"""source, name, a, b: a figure of both versions; None where a version has none."""


def compare_models(config: Path, name: str, a: str, b: str, *, as_json: bool) -> int:
    """0; 1 when a bundle cannot be read. Raises ModelMissing for a version that is not registered."""
    settings = load_settings(config)
    registry, database = open_registry(settings), existing_database(settings)
    models = (registry.get(name, a), registry.get(name, b))
    try:
        bundles = (load_bundle(models[0].folder, verify=False), load_bundle(models[1].folder, verify=False))
    except BundleInvalid as error:
        say(f"seggate: {error}")
        return 1
    with database.reading() as session:
        document = _document(session, models, bundles)
    database.close()
    if as_json:
        print_json(document)
    else:
        _present(document)
    return 0


def _document(
    session: Session, models: tuple[RegisteredModel, RegisteredModel], bundles: tuple[Bundle, Bundle]
) -> dict[str, Any]:
    a, b = bundles
    reports = [_report(session, model) for model in models]
    return {
        "model": a.name,
        "a": {"semver": a.semver, "state": models[0].state},
        "b": {"semver": b.semver, "state": models[1].state},
        "change": kind_of_change(a, b),
        "labels": _labels(a.labels, b.labels),
        "channels": _pair([c.name for c in a.channels], [c.name for c in b.channels]),
        "contract": _differences(asdict(a.contract), asdict(b.contract)),
        "configuration": _differences(_configuration(a), _configuration(b)),
        "weights": {"same": a.weights_digest == b.weights_digest, "a": a.weights_digest, "b": b.weights_digest},
        "provenance": _differences(dict(models[0].provenance), dict(models[1].provenance)),
        "gate": {side: _verdict(report) for side, report in zip("ab", reports, strict=True)},
        "shadow": {side: _shadow(session, model) for side, model in zip("ab", models, strict=True)},
        "figures": [*_validation(a, b), *_measured(session, models, reports)],
    }


def _pair(a: Any, b: Any) -> dict[str, Any] | None:
    return None if a == b else {"a": a, "b": b}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    pairs = {key: _pair(a.get(key), b.get(key)) for key in sorted({*a, *b})}
    return {key: pair for key, pair in pairs.items() if pair is not None}


def _labels(a: Sequence[LabelSpec], b: Sequence[LabelSpec]) -> dict[str, Any]:
    ours, theirs = ({label.name: asdict(label) for label in labels} for labels in (a, b))
    return {
        "removed": [name for name in ours if name not in theirs],
        "added": [name for name in theirs if name not in ours],
        "changed": {
            name: changed for name in ours if name in theirs and (changed := _differences(ours[name], theirs[name]))
        },
    }


def _configuration(bundle: Bundle) -> dict[str, Any]:
    def network(configuration: BundleConfiguration) -> str:
        folds = ", ".join(fold.fold for fold in configuration.folds)
        mirrored = ", ".join(map(str, configuration.mirror_axes)) or "none"
        return f"folds {folds}; mirrored axes {mirrored}"

    return {
        **{f"network {c.name}": network(c) for c in bundle.configurations},
        "ensemble": bundle.ensemble,
        "step_size": bundle.step_size,
        "weights": bundle.weights,
        "postprocessing": None if bundle.postprocessing is None else dict(bundle.postprocessing),
        "estimates quality": bundle.calibration is not None,
        **{f"quality {key}": value for key, value in vars(bundle.quality).items() if key != "max_components"},
        "quality max_components": dict(bundle.quality.max_components),
    }


def _report(session: Session, model: RegisteredModel, against: str | None = None) -> GateReport | None:
    """The last examination of these weights, or the last one `against` that version."""
    query = select(GateReport).where(
        GateReport.model_name == model.name,
        GateReport.model_version == model.semver,
        GateReport.weights_digest == model.weights_digest,
    )
    if against is not None:
        query = query.where(GateReport.champion_version == against)
    return session.scalars(query.order_by(GateReport.report_id.desc()).limit(1)).first()


def _verdict(report: GateReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "report_id": report.report_id,
        "verdict": report.verdict,
        "compared_with": report.champion_version,
        "examined_at": report.examined_at,
        "requested_by": report.requested_by,
    }


def _shadow(session: Session, model: RegisteredModel) -> dict[str, Any]:
    runs = session.scalars(
        select(ShadowRun).where(ShadowRun.model_name == model.name, ShadowRun.model_version == model.semver)
    ).all()
    dice: dict[str, list[float]] = {}
    for run in runs:
        for label, value in (run.dice or {}).items():
            if isinstance(value, int | float):
                dice.setdefault(label, []).append(float(value))
    return {
        "studies": dict(sorted(Counter(run.state for run in runs).items())),
        "verdicts": dict(sorted(Counter(run.verdict for run in runs if run.verdict).items())),
        "dice_to_champion": {label: fmean(values) for label, values in sorted(dice.items())},
    }


def _validation(a: Bundle, b: Bundle) -> Iterator[Row]:
    """Of the cross-validations: each on the cases of its own training, so they are no race."""

    def figures(bundle: Bundle) -> dict[str, float | None]:
        validation = bundle.evidence.provenance.validation if bundle.evidence.provenance is not None else None
        if validation is None:
            return {}
        return {
            "cases": validation.cases,
            "mean Dice": validation.dice,
            **{f"Dice, {name}": label.dice for name, label in validation.labels.items()},
            **{f"HD95 (mm), {name}": label.hd95_mm for name, label in validation.labels.items()},
        }

    yield from _rows("cross-validation", figures(a), figures(b))


def _measured(
    session: Session, models: tuple[RegisteredModel, RegisteredModel], reports: Sequence[GateReport | None]
) -> Iterator[Row]:
    """Of an examination that compared just these two, on the same locked cases; else of the last one of each."""
    a, b = models
    if (both := _report(session, b, a.semver)) is not None:
        yield from _rows(f"gate report {both.report_id}", _figures(both, "champion"), _figures(both, "candidate"))
    elif (both := _report(session, a, b.semver)) is not None:
        yield from _rows(f"gate report {both.report_id}", _figures(both, "candidate"), _figures(both, "champion"))
    else:
        ids = " and ".join(str(r.report_id) for r in reports if r is not None)
        ours, theirs = ({} if report is None else _figures(report, "candidate") for report in reports)
        yield from _rows(f"gate reports {ids}", ours, theirs)


def _figures(report: GateReport, side: str) -> dict[str, float]:
    """The figures of one side of a report, by their path in it."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
        if not isinstance(node, Mapping):
            return
        value = node.get(side)
        if isinstance(value, int | float):
            yield " ".join(path), float(value)
        for key, child in node.items():
            yield from walk(child, (*path, str(key)))

    return dict(walk(report.report.get("figures"), ()))


def _rows(source: str, a: Mapping[str, float | None], b: Mapping[str, float | None]) -> Iterator[Row]:
    for name in dict.fromkeys([*a, *b]):
        yield {"source": source, "name": name, "a": a.get(name), "b": b.get(name)}


def _present(document: dict[str, Any]) -> None:
    a, b = (f"{document[side]['semver']} ({document[side]['state']})" for side in "ab")
    say(f"{document['model']}: from {a} to {b}: {_CHANGES[document['change']]}")
    labels = document["labels"]
    rows: list[tuple[object, ...]] = [("label", name, "there", "") for name in labels["removed"]]
    rows += [("label", name, "", "there") for name in labels["added"]]
    rows += [
        ("label", f"{name}: {key}", pair["a"], pair["b"])
        for name, changed in labels["changed"].items()
        for key, pair in changed.items()
    ]
    if document["channels"] is not None:
        rows.append(("channels", "", *(", ".join(document["channels"][side]) for side in "ab")))
    rows += [
        (what, key, pair["a"], pair["b"])
        for what in ("contract", "configuration", "provenance")
        for key, pair in document[what].items()
    ]
    if not document["weights"]["same"]:
        rows.append(("weights", "digest", document["weights"]["a"][:12], document["weights"]["b"][:12]))
    table("", ("what", "", document["a"]["semver"], document["b"]["semver"]), rows)
    tested: list[tuple[object, ...]] = []
    for side in "ab":
        gate, shadow = document["gate"][side], document["shadow"][side]
        verdict = "not examined" if gate is None else f"{gate['verdict']} (report {gate['report_id']})"
        ran = ", ".join(f"{count} {state}" for state, count in shadow["studies"].items()) or "none"
        dice = ", ".join(f"{label} {value:.4f}" for label, value in shadow["dice_to_champion"].items())
        tested.append((document[side]["semver"], verdict, ran, dice))
    table("\nTested", ("version", "gate", "studies in shadow", "Dice to the champion there"), tested)
    if document["figures"]:
        table(
            "\nFigures",
            ("from", "figure", document["a"]["semver"], document["b"]["semver"]),
            [(f["source"], f["name"], _number(f["a"]), _number(f["b"])) for f in document["figures"]],
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
