"""`seggate drift`: each model's latest studies against its first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.commands.output import print_json, say, table
from gateway.monitoring.drift_window import ModelDrift, check_model, check_served_models, served_versions
from gateway.settings import load_settings
from gateway.state import existing_database
from storage.records import utc_now


def drift(config: Path, model: str | None, *, raise_alarms: bool, as_json: bool) -> int:
    """0 when nothing has drifted or there are too few studies to say; 1 when something has, or the model is unknown."""
    settings = load_settings(config)
    database = existing_database(settings)
    with database.reading() as session:
        served = dict(served_versions(session))
    if model is not None and model not in served:
        say(f"seggate: no study was recorded for a model {model[:80]!r}; there are {', '.join(served) or 'none'}")
        return 1
    if raise_alarms:
        found = check_served_models(database, settings.gateway.drift, now=utc_now())
        found = [one for one in found if model in (None, one.model_name)]
    else:
        with database.reading() as session:
            found = [
                one
                for name, version in served.items()
                if model in (None, name)
                for one in check_model(session, name, version, settings.gateway.drift, now=utc_now())
            ]
    if as_json:
        print_json([_document(one) for one in found])
    elif not found:
        say("no study was recorded yet")
    else:
        for one in found:
            _present(one)
    return int(any(one.report.severity != "none" for one in found))


def _present(one: ModelDrift) -> None:
    report = one.report
    where = "all scanners" if one.scanner is None else one.scanner
    title = f"{one.model_name} {one.model_version}, {where}"
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


def _document(one: ModelDrift) -> dict[str, Any]:
    report = asdict(one.report)
    for finding in report["findings"]:
        finding["examples"] = list(one.examples.get(finding["name"], ()))
    return {"model": one.model_name, "version": one.model_version, "scanner": one.scanner, **report}
