"""What `seggate check` says of learning.toml: each model's folders are there, readable, and of that model.

No image is opened; nothing is created or changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.bundle import Bundle, load_bundle
from engine.dataset import RawDataset, open_dataset
from engine.errors import EngineError
from engine.experiment import FINAL, PLANS_JSON
from engine.locked_cases import misfit, missing_files, open_locked
from gateway.checks import Finding, failed, ok, warning
from gateway.learning_settings import ModelLearning
from gateway.settings import Settings
from gateway.state import open_registry, registry_exists
from storage.errors import DatabaseAway
from storage.models import CHAMPION, RegisteredModel

_CHECK = "learning"
_MOST_NAMED = 3


def check_learning(settings: Settings) -> list[Finding]:
    """A line for each model of learning.toml that is well, and one for each fault; none where it names no model."""
    if not settings.learning.models:
        return []
    champions: dict[str, RegisteredModel] = {}
    try:
        known = open_registry(settings).all() if registry_exists(settings) else ()
    except DatabaseAway as error:
        return [failed(_CHECK, str(error))]
    names = {model.name for model in known}
    champions = {model.name: model for model in known if CHAMPION in model.aliases}
    findings: list[Finding] = []
    for learning in settings.learning.models:
        if learning.name not in names:
            findings.append(
                failed(
                    _CHECK,
                    f"learning.toml names {learning.name!r}, which is not registered: "
                    f"`seggate models import PATH --name {learning.name}`",
                )
            )
            continue
        findings += _model(settings, learning, champions.get(learning.name))
    return findings


def _model(settings: Settings, learning: ModelLearning, champion: RegisteredModel | None) -> list[Finding]:
    name = learning.name
    findings: list[Finding] = []
    bundle: Bundle | None = None
    if champion is None:
        findings.append(warning(_CHECK, f"{name}: no version serves, so labels and channels were not compared"))
    else:
        with suppress(EngineError):  # the check of models says it
            bundle = load_bundle(champion.folder, verify=False)
    said: list[str] = []
    for check in (_trained, _dataset, _locked):
        found, text = check(settings, learning, bundle)
        findings += found
        said += [text] if text else []
    if learning.on_drift == "fine-tune" and not learning.can_learn:
        findings.append(
            warning(_CHECK, f"{name}: on_drift = 'fine-tune' needs `trained` and `dataset`: nothing is trained")
        )
    if learning.locked is None:
        findings.append(
            warning(_CHECK, f"{name}: no `locked` cases: every new version will be OUTSIDE_PLAN (docs/learning.md)")
        )
    return findings or [ok(_CHECK, f"{name}: {', '.join(said)}")]


def _trained(settings: Settings, learning: ModelLearning, _bundle: Bundle | None) -> tuple[list[Finding], str]:
    if learning.trained is None:
        return [], ""
    folder, where = settings.located(learning.trained), f"{learning.name}: trained = {str(learning.trained)!r}"
    if not (folder / PLANS_JSON).is_file():
        return [failed(_CHECK, f"{where} is no model folder of nnU-Net: it has no {PLANS_JSON}")], ""
    folds = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{FINAL}"))
    if not folds:
        return [failed(_CHECK, f"{where} has no finished fold (fold_N/{FINAL})")], ""
    if missing := [fold for fold in learning.fine_tuning.folds if fold not in folds]:
        wanted = f"{learning.name}: fine_tuning.folds: {', '.join(missing)}"
        return [failed(_CHECK, f"{wanted}: not among the finished folds, which are {', '.join(folds)}")], ""
    return [], f"trained folds {', '.join(folds)}"


def _dataset(settings: Settings, learning: ModelLearning, bundle: Bundle | None) -> tuple[list[Finding], str]:
    if learning.dataset is None:
        return [], ""
    folder = settings.located(learning.dataset)
    where = f"{learning.name}: dataset = {str(learning.dataset)!r}"
    findings, dataset = _opened(where, lambda: open_dataset(folder), bundle)
    return findings, "" if dataset is None else f"{len(dataset.cases)} cases to train on"


def _locked(settings: Settings, learning: ModelLearning, bundle: Bundle | None) -> tuple[list[Finding], str]:
    if learning.locked is None:
        return [], ""
    folder, where = settings.located(learning.locked), f"{learning.name}: locked = {str(learning.locked)!r}"
    strata: set[str] = set()

    def opened() -> RawDataset:
        found = open_locked(folder)
        strata.update(found.strata.values())
        return found.dataset

    findings, dataset = _opened(where, opened, bundle)
    if learning.dataset is not None and _is_same(folder, settings.located(learning.dataset)):
        findings.append(failed(_CHECK, f"{where} is what is trained on: locked cases are kept from training"))
    if dataset is None:
        return findings, ""
    least = learning.change_plan.least_locked_cases
    if len(dataset.cases) < least:
        text = f"{where} has {len(dataset.cases)} cases; change_plan.least_locked_cases is {least}"
        findings.append(failed(_CHECK, f"{text}: every new version will be OUTSIDE_PLAN"))
    return findings, f"{len(dataset.cases)} locked cases" + (f" in {len(strata)} strata" if strata else "")


def _opened(
    where: str, opener: Callable[[], RawDataset], bundle: Bundle | None
) -> tuple[list[Finding], RawDataset | None]:
    try:
        dataset = opener()
    except EngineError as error:
        return [failed(_CHECK, f"{where}: {error}")], None
    findings = []
    if lacking := missing_files(dataset.cases, len(dataset.json.channel_names)):
        more = f" ({len(lacking)} such)" if len(lacking) > _MOST_NAMED else ""
        findings.append(failed(_CHECK, f"{where}: {'; '.join(lacking[:_MOST_NAMED])}{more}"))
    if bundle is not None and (difference := misfit(dataset.json, bundle)):
        findings.append(failed(_CHECK, f"{where}: {difference}"))
    return findings, dataset


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
