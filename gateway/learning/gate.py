"""The gate: a registered version against the one that serves, by its model's change plan (ART-23).

    files as registered ▸ its own sanity cases ▸ locked cases are locked ▸ both on the locked cases ▸ the plan's limits

The locked cases are looked at only where nothing was found before. Each examination is a GateReport and an event of the
model's ledger, written in one transaction and never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from engine.bundle import Bundle, load_bundle
from engine.case_figures import FigureStore
from engine.case_overlap import ImageDigests, copies, named_as_learnt
from engine.errors import BundleInvalid
from engine.locked_cases import LockedCases, misfit, open_locked, read_locked
from engine.predictor import Predictor
from engine.regression_suite import Version, run_suite
from engine.sanity_check import STRICT, CaseAgreement, Limits, check_sanity
from engine.version_comparison import compare_versions
from gateway.learning.gate_report import Examination, report_document
from gateway.learning.learnt_cases import learnt_cases
from gateway.learning.verdict import Reason, broken_limits, verdict_of
from gateway.learning_settings import Change
from gateway.model_plans import ModelPlans, open_planned
from gateway.settings import Settings
from storage import ledger
from storage.database import Database
from storage.learning_records import GateReport
from storage.models import CHAMPION, ModelRegistry, RegisteredModel
from storage.records import LedgerEvent, utc_now

EXAMINED = "model-examined"
FIGURES = "figures"
"""Folder beside a model's versions: figures and digests that need not be computed again."""

_MOST_NAMED = 10

Progress = Callable[[float, str], None]


def examine(
    database: Database,
    registry: ModelRegistry,
    settings: Settings,
    name: str,
    semver: str,
    *,
    change: Change,
    requested_by: str,
    progress: Progress | None = None,
) -> GateReport:
    """Examines a version and writes down the verdict. A first version is held to its files, its sanity cases and
    unlearnt locked cases alone, as is one that serves already: there is nothing to compare it with.

    `progress` gets the share that is done and what is being done. Raises ModelMissing; BundleInvalid or ModelChanged
    when the champion is damaged; DatasetInvalid or InputRejected for locked or training cases that cannot be read;
    MemoryExceeded, BackendFailed, DatabaseAway, OSError. Then there is no verdict, and nothing is written.
    """
    report = progress or (lambda _share, _what: None)
    model = registry.get(name, semver)
    serving = next((m for m in registry.versions(name) if CHAMPION in m.aliases), None)
    found = Examination(
        model=model,
        champion=None if serving is not None and serving.semver == semver else serving,
        plan=settings.learning.of(name).change_plan,
        change=change,
        requested_by=requested_by,
    )
    if serving is None:
        found.notes.append("no version serves yet: there is nothing to compare with")
    elif found.champion is None:
        found.notes.append("this version serves: there is nothing to compare with")
    if change not in found.plan.allowed:
        allowed = ", ".join(found.plan.allowed) or "nothing"
        found.reasons.append(
            Reason(check="change", text=f"the change plan does not allow {change}; it allows {allowed}", outside=True)
        )
    report(0.0, "files")
    bundle = _checked_bundle(database, found)
    if bundle is not None:
        _look(database, settings, found, bundle, report)
    report(1.0, "done")
    return _record(database, found)


def check_at_startup(
    registry: ModelRegistry,
    settings: Settings,
    name: str,
    semver: str,
    *,
    progress: Callable[[float], None] | None = None,
) -> tuple[str, ...]:
    """What is wrong with a version that is about to serve on this machine, as sentences; empty when it may. Its files
    and its own sanity cases alone: no locked case and no database.

    Raises ModelMissing, and MemoryExceeded, BackendFailed or DatabaseAway (the registry): those are of the machine.
    """
    model = registry.get(name, semver)
    try:
        bundle = load_bundle(model.folder, verify=True)
        if faults := _digest_faults(model, bundle):
            return tuple(faults)
        predictor, limits = _predictor(bundle, settings)
        with predictor:
            return tuple(_sanity_faults(check_sanity(predictor, limits=limits, progress=progress)))
    except BundleInvalid as error:
        return (str(error),)


def _checked_bundle(database: Database, found: Examination) -> Bundle | None:
    """The candidate's bundle, or None where its files are not what was registered, with the reasons."""
    model = found.model
    try:
        bundle = load_bundle(model.folder, verify=True)
    except BundleInvalid as error:
        found.reasons.append(Reason(check="integrity", text=str(error)))
        return None
    faults = _digest_faults(model, bundle)
    with database.reading() as session:
        registered = _registration(session, model)
    if registered is None:
        faults.append("the ledger has no registration of this version: register it with `seggate models import`")
    elif registered.detail["weights_digest"] != model.weights_digest:
        faults.append("the registration differs from the ledger: someone changed the registry by hand")
    elif registered.detail.get("evidence_digest", bundle.evidence_digest) != bundle.evidence_digest:
        faults.append("the sanity cases, provenance or figures of backends are not those that were registered")
    found.reasons += [Reason(check="integrity", text=fault) for fault in faults]
    return None if faults else bundle


def _registration(session: Session, model: RegisteredModel) -> LedgerEvent | None:
    events = session.scalars(
        select(LedgerEvent)
        .where(LedgerEvent.subject == ledger.model_subject(model.name), LedgerEvent.kind == "model-imported")
        .order_by(LedgerEvent.sequence.desc())
    )
    return next((event for event in events if event.detail.get("semver") == model.semver), None)


def _digest_faults(model: RegisteredModel, bundle: Bundle) -> list[str]:
    faults = []
    if (bundle.name, bundle.semver) != (model.name, model.semver):
        faults.append(f"the bundle is {bundle.name} {bundle.semver}, not {model.name} {model.semver}")
    if bundle.weights_digest != model.weights_digest:
        faults.append("the weights are not those that were registered")
    if bundle.configuration_digest != model.configuration_digest:
        faults.append("the configuration is not the one that was registered")
    return faults


def _sanity_faults(cases: Sequence[CaseAgreement]) -> list[str]:
    return [f"sanity case {case.name}: {fault}" for case in cases for fault in case.faults]


def _predictor(bundle: Bundle, settings: Settings) -> tuple[Predictor, Limits]:
    """As the version serves, or would: by its execution plan on this machine, and what that allows to change."""
    worker = settings.gateway.worker
    device, threads = worker.device, worker.threads or None
    plan = ModelPlans(settings.models_dir).in_force(bundle, device=device, threads=threads)
    predictor, plan = open_planned(bundle, plan, device=device, threads=threads)
    return predictor, plan.limits if plan is not None else STRICT


def _look(database: Database, settings: Settings, found: Examination, bundle: Bundle, report: Progress) -> None:
    """From the sanity cases to the limits, as far as nothing speaks against the next stage."""
    champion = None if found.champion is None else _champion_bundle(found.champion)
    if champion is not None and (others := _other_outputs(bundle, champion)):
        found.reasons += others
        found.notes.append("nothing that serves can be compared with it: promote it with --force --reason TEXT alone")
    try:
        predictor, limits = _predictor(bundle, settings)
    except BundleInvalid as error:
        found.reasons.append(Reason(check="integrity", text=str(error)))
        return
    with predictor:
        found.runtime, found.labels = predictor.runtime, bundle.label_manager.foreground
        try:
            found.sanity = check_sanity(
                predictor, limits=limits, progress=lambda share: report(0.15 * share, "sanity cases")
            )
        except BundleInvalid as error:
            found.reasons.append(Reason(check="sanity", text=str(error)))
            return
        if not found.sanity:
            found.notes.append("the bundle has no sanity cases")
        found.reasons += [Reason(check="sanity", text=fault) for fault in _sanity_faults(found.sanity)]
        locked = _locked(database, settings, found, bundle, report)
        if locked is None or found.reasons:
            return
        if champion is None:
            _measure(settings, found, locked, predictor, None, report)
        else:
            with _predictor(champion, settings)[0] as serving:
                _measure(settings, found, locked, predictor, serving, report)


def _champion_bundle(champion: RegisteredModel) -> Bundle:
    """Raises BundleInvalid: a damaged champion is a matter of its own, and says nothing of the candidate."""
    bundle = load_bundle(champion.folder, verify=True)
    if faults := _digest_faults(champion, bundle):
        raise BundleInvalid(f"{champion.name} {champion.semver}, which serves: {'; '.join(faults)}")
    return bundle


def _other_outputs(candidate: Bundle, champion: Bundle) -> list[Reason]:
    reasons = []
    for check, ours, theirs in (
        (
            "labels",
            [(label.value, label.name, label.region) for label in candidate.labels],
            [(label.value, label.name, label.region) for label in champion.labels],
        ),
        (
            "channels",
            [channel.name for channel in candidate.channels],
            [channel.name for channel in champion.channels],
        ),
    ):
        if ours != theirs:
            text = f"its {check} are not those of {champion.semver}, which serves: no change plan covers that"
            reasons.append(Reason(check=check, text=text, outside=True))
    return reasons


def _locked(
    database: Database, settings: Settings, found: Examination, bundle: Bundle, report: Progress
) -> LockedCases | None:
    """The locked cases, if they are fit to compare by and nothing was found before; else None, with the reasons."""
    folder = settings.learning.of(bundle.name).locked
    least = found.plan.least_locked_cases

    def outside(check: str, text: str, figure: float | None = None, limit: float | None = None) -> None:
        found.reasons.append(Reason(check=check, text=text, figure=figure, limit=limit, outside=True))

    if folder is None:
        if found.champion is None:
            found.notes.append("learning.toml names no locked cases: nothing was measured")
        else:
            outside("locked-cases", f"learning.toml names no `locked` cases for {bundle.name}", 0, least)
        return None
    opened = open_locked(settings.located(folder))
    found.locked_name = opened.dataset.name
    count = len(opened.dataset.cases)
    if found.champion is not None and count < least:
        outside("locked-cases", f"{count} locked cases; the change plan asks for {least}", count, least)
    if difference := misfit(opened.dataset.json, bundle):
        outside("locked-cases", f"the locked cases have {difference}")
    if found.reasons:
        return None
    locked = read_locked(opened, progress=lambda done, total: report(0.15 + 0.1 * done / total, "locked cases"))
    with database.reading() as session:
        learnt = learnt_cases(session, settings, bundle.name)
    digests = ImageDigests(settings.models_dir / bundle.name / FIGURES / "images.json")
    seen = copies(
        {case.name: case.image_digest for case in locked.cases},
        learnt.datasets,
        digests,
        progress=lambda done, total: report(0.25 + 0.1 * done / total, "training cases"),
    )
    provenance = bundle.evidence.provenance
    moved = named_as_learnt([case.name for case in locked.cases], learnt.names, learnt.datasets, provenance)
    if overlap := sorted({*seen, *moved}):
        more = f" and {len(overlap) - _MOST_NAMED} more" if len(overlap) > _MOST_NAMED else ""
        named = ", ".join(overlap[:_MOST_NAMED])
        outside("overlap", f"{len(overlap)} locked cases were learnt from: {named}{more}", len(overlap), 0)
        found.overlap = tuple(overlap)
        return None
    found.locked = locked
    return locked


def _measure(
    settings: Settings,
    found: Examination,
    locked: LockedCases,
    candidate: Predictor,
    champion: Predictor | None,
    report: Progress,
) -> None:
    folder = settings.models_dir / found.model.name / FIGURES

    def version(predictor: Predictor) -> Version:
        bundle = predictor.bundle
        # A plan may leave them out, and then these are other labels.
        is_mirrored = any(configuration.mirror_axes for configuration in bundle.configurations)
        store = FigureStore(
            folder,
            weights_digest=bundle.weights_digest,
            configuration_digest=bundle.configuration_digest,
            runtime=predictor.runtime if is_mirrored else f"{predictor.runtime}, not mirrored",
            labels=bundle.label_manager,
        )
        return Version(predictor=predictor, store=store)

    budget_mb = settings.gateway.worker.memory_budget_mb
    found.figures = run_suite(
        locked,
        version(candidate),
        None if champion is None else version(champion),
        budget_bytes=budget_mb << 20 if budget_mb else None,
        progress=lambda share: report(0.35 + 0.65 * share, "both versions" if champion is not None else "this version"),
    )
    found.comparison = compare_versions(found.figures, candidate.bundle.label_manager.foreground)
    if found.comparison.untested:
        found.notes.append(f"no locked case has {', '.join(found.comparison.untested)}: nothing is known of it")
    found.reasons += broken_limits(found.comparison, found.plan)


def _record(database: Database, found: Examination) -> GateReport:
    model, champion = found.model, found.champion
    verdict = verdict_of(found.reasons)
    with database.session() as session:
        if found.figures is not None and found.locked is not None:
            found.look = 1 + looks_at(session, found.locked.digest)
        row = GateReport(
            model_name=model.name,
            model_version=model.semver,
            champion_version=champion.semver if champion is not None else None,
            weights_digest=model.weights_digest,
            plan_digest=found.plan.digest,
            change=found.change,
            requested_by=found.requested_by,
            examined_at=utc_now(),
            verdict=verdict.value,
            report=report_document(found, verdict),
        )
        session.add(row)
        session.flush()
        ledger.append(
            session,
            subject=ledger.model_subject(model.name),
            kind=EXAMINED,
            actor=found.requested_by,
            detail={
                "report_id": row.report_id,
                "semver": model.semver,
                "weights_digest": model.weights_digest,
                "champion": row.champion_version,
                "change": found.change,
                "plan_digest": row.plan_digest,
                "verdict": row.verdict,
                "reasons": [reason.text for reason in found.reasons],
                "locked_digest": found.locked.digest if found.locked is not None else None,
                "look": found.look or None,
            },
        )
    return row


def looks_at(session: Session, locked_digest: str) -> int:
    """How many examinations have measured a version, of whatever model, on exactly these locked cases."""
    return (
        session.scalar(
            select(func.count())
            .select_from(GateReport)
            .where(
                GateReport.report["locked"]["digest"].as_string() == locked_digest,
                GateReport.report["locked"]["look"].as_integer() > 0,
            )
        )
        or 0
    )
