"""`seggate drift`: each model's latest studies against its first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.commands.output import print_json, say, table
from gateway.logs import keep_off_standard_output
from gateway.monitoring.drift_alarms import KIND, KIND_TRAINING, DriftWatch, bundle_baselines, draw_kind
from gateway.monitoring.drift_window import ModelDrift, check_model, served_versions
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry, registry_exists
from storage.records import utc_now


def drift(config: Path, model: str | None, *, raise_alarms: bool, plot: Path | None, as_json: bool) -> int:
    """0 when nothing has drifted or there are too few studies to say; 1 when something has, or the model is unknown.

    `plot`: where the picture of a model's streams that are beyond their limits goes; nothing is written without any.
    """
    if plot is not None and model is None:
        say("seggate: --plot needs the name of one model")
        return 2
    keep_off_standard_output()
    settings = load_settings(config)
    database = existing_database(settings)
    baselines = bundle_baselines(open_registry(settings)) if registry_exists(settings) else _no_baseline
    with database.reading() as session:
        served = dict(served_versions(session))
    if model is not None and model not in served:
        say(f"seggate: no study was recorded for a model {model[:80]!r}; there are {', '.join(served) or 'none'}")
        return 1
    own, now = settings.gateway.drift, utc_now()
    if raise_alarms:
        watch = DriftWatch(
            database=database,
            settings=own,
            learning=settings.learning,
            state_dir=settings.state_dir,
            baselines=baselines,
        )
        found = [one for one in watch.check(now=now) if model in (None, one.model_name)]
    else:
        found = []
        for name, version in served.items():
            if model in (None, name):
                baseline = baselines(name, version)
                with database.reading() as session:
                    found += check_model(session, name, version, own, now=now, baseline=baseline)
    if as_json:
        print_json([_document(one) for one in found])
    elif not found:
        say("no study was recorded yet")
    else:
        for one in found:
            _present(one)
    if plot is not None:
        _plot(found, plot)
    return int(any(not one.is_quiet for one in found))


def _no_baseline(_name: str, _version: str) -> None:
    return None


def _plot(found: Sequence[ModelDrift], path: Path) -> None:
    """What has drifted of all scanners together, else of a scanner; else what is unlike the training data."""
    for kind in (KIND, KIND_TRAINING):
        for one in found:
            if draw_kind(one, kind, path):
                say(f"{path}: {one.scanner or 'all scanners'}, {kind}")
                return
    say("nothing is beyond its limit, so there is no picture")


def _present(one: ModelDrift) -> None:
    report = one.report
    where = "all scanners" if one.scanner is None else one.scanner
    title = f"{one.model_name} {one.model_version}, {where}"
    if one.training:
        _present_training(one, title)
    if report.too_few is not None:
        say(f"{title}: too few studies ({report.too_few})")
        return
    say(f"{title}: {report.severity}; the last {report.window} studies against the first {report.reference}")
    rows = [
        (finding.name, finding.severity, f"{finding.multiple:.2f}", "" if finding.kl is None else f"{finding.kl:.4f}")
        for finding in (report.drifted or report.findings[:5])
    ]
    table("", ("stream", "severity", "times what is usual", "KL"), rows)
    for finding in report.drifted:
        say(f"{finding.name}: e.g. {', '.join(one.examples[finding.name])}")


def _present_training(one: ModelDrift, title: str) -> None:
    words = "warn" if one.unlike_training else "none"
    say(f"{title}: {words}; the latest studies against the training data")
    rows = [(f.name, f.severity, f"{f.kl:.4f}", len(f.members)) for f in one.training]
    table("", ("stream", "severity", "KL", "studies"), rows)


def _document(one: ModelDrift) -> dict[str, Any]:
    report = asdict(one.report)
    for finding in report["findings"]:
        finding["examples"] = list(one.examples.get(finding["name"], ()))
    training = [
        {
            "name": finding.name,
            "kl": finding.kl,
            "severity": finding.severity,
            "studies": len(finding.members),
            "examples": list(one.examples.get(finding.name, ())),
        }
        for finding in one.training
    ]
    return {
        "model": one.model_name,
        "version": one.model_version,
        "scanner": one.scanner,
        **report,
        "training": training,
    }
