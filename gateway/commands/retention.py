"""`seggate retention`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from gateway.commands.deletion import confirmed
from gateway.commands.output import local, print_json, say, table
from gateway.deletion.deletions import Deletions
from gateway.deletion.retention import Plan, Retention, policy_in_words, versions_in_shadow
from gateway.durable import Enqueuer
from gateway.settings import Settings, load_settings
from gateway.state import existing_database, open_registry, open_spool, registry_exists

_MIB = 1 << 20


def retention(config: Path, *, dry_run: bool, yes: bool, as_json: bool) -> int:
    """0 with what went, or would go; 2 where nobody could be asked."""
    settings = load_settings(config)
    database = existing_database(settings)
    enqueuer = Enqueuer(database)
    try:
        spool = open_spool(settings)
        own = Retention(
            database=database,
            spool=spool,
            settings=settings,
            deletions=Deletions(database=database, spool=spool, enqueuer=enqueuer, settings=settings),
            shadows=lambda: _shadows(settings),
        )
        if dry_run:
            _present(own.plan(), settings, as_json=as_json)
            return 0
        if not yes and (count := len(own.plan().going)) and not confirmed(f"Delete {count} studies for good?"):
            return 2
        said = own.run()
    finally:
        enqueuer.close()
    if as_json:
        print_json({"ok": True, "said": said})
    else:
        say(said)
    return 0


def _shadows(settings: Settings) -> frozenset[tuple[str, str]]:
    return versions_in_shadow(open_registry(settings)) if registry_exists(settings) else frozenset()


def _present(plan: Plan, settings: Settings, *, as_json: bool) -> None:
    policy = settings.gateway.retention
    document: dict[str, Any] = {
        "policy": policy_in_words(policy),
        "free_bytes": plan.free_bytes,
        "going_bytes": plan.going_bytes,
        "short_bytes": plan.short_bytes,
        "going": [
            {
                "study_uid": one.study.study_instance_uid,
                "because": one.because,
                "state": one.study.state,
                "done_at": one.study.done_at,
                "size_bytes": one.study.size_bytes,
            }
            for one in plan.going
        ],
        "staying": [
            {
                "study_uid": study.study_instance_uid,
                "state": study.state,
                "done_at": study.done_at,
                "size_bytes": study.size_bytes,
                "reasons": [vars(reason) for reason in study.reasons],
            }
            for study in plan.staying
        ],
    }
    if as_json:
        print_json(document)
        return
    say(document["policy"])
    going = [
        (one.study.study_instance_uid, local(one.study.done_at), one.study.size_bytes // _MIB, one.because)
        for one in plan.going
    ]
    staying = [
        (s.study_instance_uid, local(s.done_at), s.size_bytes // _MIB, "; ".join(r.words for r in s.reasons))
        for s in plan.staying
    ]
    for title, rows in ((f"Would go: {len(going)}", going), (f"\nStay: {len(staying)}", staying)):
        table(title, ("study", "done with", "MB", "why"), rows, whole=("study",))
    kinds = Counter(kind for study in plan.staying for kind in study.kinds)
    say(f"{plan.going_bytes // _MIB} MB would be freed; {plan.free_bytes // _MIB} MB are free")
    say("what keeps them: " + (", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) or "nothing"))
    if plan.short_bytes:
        say(f"{plan.short_bytes // _MIB} MB would still be missing to what [retention] wants free")
