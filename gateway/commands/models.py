"""`seggate models import|list|show|verify`."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.commands.model_evidence import evidence_document, present_evidence
from gateway.commands.model_tuning import plans_shown, present_plans
from gateway.commands.model_verification import SanityRun, present_sanity, run_sanity
from gateway.commands.output import console, print_json, printable, say, table
from gateway.learning.registration import register
from gateway.learning.serving import registered_bundle, registrations
from gateway.learning.versions import VersionRefused
from gateway.model_plans import ModelPlans
from gateway.settings import load_settings
from gateway.state import existing_database, open_registry, registry_exists
from storage.errors import ModelChanged
from storage.models import CHAMPION, RegisteredModel


def import_(
    config: Path,
    path: Path,
    *,
    name: str | None,
    semver: str | None,
    card: Path | None,
    configurations: Sequence[str] | None,
    folds: Sequence[str] | None,
    orientation: str | None,
    weights: str,
    phantoms: bool,
    sanity: Path | None,
    candidate: bool,
    as_json: bool,
) -> int:
    """A finished bundle is verified and registered as it is; anything else is converted to one first.

    The first version of a model serves; a later one waits until it is promoted. A model whose voxel order nobody stated
    never serves: a guess could turn left into right.
    """
    from engine.bundle import Bundle, load_bundle
    from engine.errors import EngineError
    from engine.manifest import MANIFEST

    settings = load_settings(config)
    if not path.exists():
        say(f"seggate: {path} does not exist")
        return 1
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="seggate-import-") as scratch:
        try:
            bundle: Bundle
            stated = True
            if (path / MANIFEST).is_file():
                changed = weights != "float32" or not phantoms or sanity is not None
                if changed or any((name, semver, card, configurations, folds, orientation)):
                    say(
                        "seggate: a finished bundle is imported as it is; only --candidate applies to it. For another "
                        "name or version export it again: `seggate export DATASET --name N --semver V`"
                    )
                    return 2
                bundle = load_bundle(path, verify=True)
            else:
                bundle, stated = _convert(
                    path,
                    Path(scratch) / "bundle",
                    name=name,
                    semver=semver,
                    card=card,
                    configurations=configurations,
                    folds=folds,
                    orientation=orientation,
                    weights=weights,
                    phantoms=phantoms,
                    sanity=sanity,
                    notes=notes,
                )
            model = register(
                settings,
                bundle,
                candidate=candidate or not stated,
                actor=f"user:{getpass.getuser()}",
                orientation_stated=stated,
            )
        except (EngineError, ModelChanged, VersionRefused, ValueError) as error:
            say(f"seggate: not imported: {error}")
            return 1
        if as_json:
            print_json({**_document(model, bundle), "notes": notes})
            return 0
        for note in notes:
            say(f"note: {note}")
        serves = model.state == CHAMPION
        state = "serves from now on" if serves else f"is registered as {model.state}"
        say(f"{model.name} {model.semver} {state} (weights {model.weights_digest[:12]})")
        if not stated:
            say("to serve it, import it again with --orientation and the next --semver")
        elif not serves:
            say(
                f"to serve it: `seggate models test {model.name} {model.semver}`, then "
                f"`seggate models promote {model.name} {model.semver}`"
            )
    return 0


def list_(config: Path, *, as_json: bool) -> int:
    settings = load_settings(config)
    found = open_registry(settings).all() if registry_exists(settings) else ()
    if as_json:
        print_json([_row(m) for m in found])
    elif not found:
        say("no models; import one with `seggate models import PATH`")
    else:
        rows = [(m.name, m.semver, m.state, m.weights_digest[:12], _date(m), m.licence) for m in found]
        table("", ("model", "version", "state", "weights", "registered", "licence"), rows)
    return 0


def show(config: Path, name: str, *, semver: str | None, as_json: bool) -> int:
    from engine.bundle import load_bundle
    from engine.errors import BundleInvalid

    settings = load_settings(config)
    registry = open_registry(settings)
    model = registry.get(name, semver) if semver else registry.champion(name)
    try:
        bundle = load_bundle(model.folder, verify=False)
    except BundleInvalid as error:
        say(f"seggate: {error}")
        return 1
    plans = ModelPlans(settings.models_dir)
    document = {**_document(model, bundle), **plans_shown(plans, bundle)}
    if as_json:
        print_json(document)
        return 0
    out = console()
    for key in ("name", "semver", "state", "description", "licence", "origin", "weights_digest", "registered_at"):
        out.print(f"{key:15} {printable(str(document[key]))}", markup=False, soft_wrap=True)
    table(
        "\nLabels",
        ("value", "name", "code", "side", "volume range (ml)"),
        [
            (
                s.value,
                s.name,
                f"{s.type.scheme} {s.type.value} {s.type.meaning}",
                s.laterality,
                _range(s.volume_range_ml),
            )
            for s in bundle.labels
        ],
    )
    out.print("\nContract", markup=False)
    for key, value in document["contract"].items():
        out.print(f"  {key:22} {printable(_words(value))}", markup=False)
    table(
        "\nNetworks",
        ("configuration", "fold", "max difference to torch", "same labels"),
        [(p.configuration, p.fold, f"{p.max_abs_difference:.2g}", f"{p.argmax_agreement:.6f}") for p in bundle.parity],
    )
    present_evidence(bundle)
    present_plans(plans, bundle)
    return 0


def _words(value: Any) -> str:
    """A value of the contract as a person reads it; None sets no limit."""
    if value is None:
        return "any"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"{value['meaning']} ({value['scheme']} {value['value']})"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "any"
    return str(value)


def verify(config: Path, name: str | None, *, files_only: bool, as_json: bool) -> int:
    """0 when every file of every bundle is what was registered, and the sanity cases come out as at the export; else 1
    with what differs. `files_only` leaves the sanity cases out."""
    settings = load_settings(config)
    registry = open_registry(settings)
    found = [m for m in registry.all() if name in (None, m.name)]
    if name is not None and not found:
        say(f"seggate: no model {name!r} is registered")
        return 1
    database = existing_database(settings)
    with database.reading() as session:
        recorded = {model: registrations(session, model) for model in {m.name for m in found}}
    database.close()
    plans = ModelPlans(settings.models_dir)
    rows: list[dict[str, Any]] = []
    runs: list[tuple[str, str, SanityRun]] = []
    for model in found:
        event = recorded[model.name].get(model.semver)
        verdict, run = _verdict(model, event, plans=None if files_only else plans, hide_bar=as_json)
        rows.append({**_row(model), "verdict": verdict, "sanity": None if run is None else run.document()})
        if run is not None:
            runs.append((model.name, model.semver, run))
    if as_json:
        print_json(rows)
    else:
        table("", ("model", "version", "verdict"), [(r["name"], r["semver"], r["verdict"]) for r in rows])
        present_sanity(runs)
    return 0 if all(r["verdict"] == "ok" for r in rows) else 1


def importer(what: str) -> Callable[..., Any]:
    """`engine.export.import_model`; ImportRefused, with what to do, where a package that it needs is missing."""
    from engine.errors import ImportRefused

    try:
        from engine.export import import_model
    except ModuleNotFoundError as error:
        if error.name in {"torch", "onnx"}:
            raise ImportRefused(
                f"{what} needs the Python package {error.name}: install seggate with the extra `train` "
                "(make install EXTRAS=train)"
            ) from error
        raise
    return import_model


def _convert(
    path: Path,
    target: Path,
    *,
    name: str | None,
    semver: str | None,
    card: Path | None,
    configurations: Sequence[str] | None,
    folds: Sequence[str] | None,
    orientation: str | None,
    weights: str,
    phantoms: bool,
    sanity: Path | None,
    notes: list[str],
) -> tuple[Any, bool]:
    """nnU-Net → (bundle, whether its voxel order was stated); needs torch, and says how to get it where missing."""
    from rich.progress import Progress

    from engine.model_card import ModelCard, orientation_is_stated, read_card

    import_model = importer("importing an nnU-Net model")
    described = read_card(card) if card is not None else ModelCard()
    if orientation is not None:
        described = replace(described, contract={**described.contract, "orientation": orientation})
    with Progress(transient=True) as bar:
        task = bar.add_task("importing", total=1.0)

        def progress(fraction: float, what: str = "importing") -> None:
            bar.update(task, completed=fraction, description=what)

        bundle = import_model(
            path,
            target,
            name=name,
            semver=semver,
            card=described,
            configurations=configurations,
            folds=folds,
            weights=weights,
            phantoms=phantoms,
            site_folder=sanity,
            progress=progress,
            notice=notes.append,
        )
    return bundle, orientation_is_stated(bundle.plans, described)


def _verdict(
    model: RegisteredModel, recorded: Mapping[str, Any] | None, *, plans: ModelPlans | None, hide_bar: bool
) -> tuple[str, SanityRun | None]:
    """ "ok" or what is wrong, and the sanity cases where they were computed: not of files that are not the registered
    ones, nor without `plans`."""
    from engine.errors import BundleInvalid

    try:
        bundle = registered_bundle(model, recorded)
    except (BundleInvalid, ModelChanged) as error:
        return str(error), None
    sanity = run_sanity(bundle, plan=plans.find(bundle).plan, hide_bar=hide_bar) if plans is not None else None
    return (sanity.fault if sanity is not None and sanity.fault else "ok"), sanity


def _row(model: RegisteredModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "semver": model.semver,
        "state": model.state,
        "aliases": list(model.aliases),
        "registry_version": model.registry_version,
        "weights_digest": model.weights_digest,
        "configuration_digest": model.configuration_digest,
        "licence": model.licence,
        "folder": str(model.folder),
        "registered_at": _date(model),
    }


def _document(model: RegisteredModel, bundle: Any) -> dict[str, Any]:
    return {
        **_row(model),
        "registry_provenance": dict(model.provenance),
        "description": bundle.description,
        "origin": bundle.origin,
        "labels": [asdict(s) for s in bundle.labels],
        "contract": asdict(bundle.contract),
        "parity": [asdict(p) for p in bundle.parity],
        **evidence_document(bundle),
        "configurations": [
            {"name": c.name, "folds": [f.fold for f in c.folds], "mirror_axes": c.mirror_axes}
            for c in bundle.configurations
        ],
    }


def _date(model: RegisteredModel) -> str:
    return datetime.fromtimestamp(model.registered_at_ms / 1000, UTC).isoformat(timespec="seconds")


def _range(bounds: tuple[float, float] | None) -> str:
    return f"{bounds[0]:g} to {bounds[1]:g}" if bounds else ""
