"""Whether a study is a canary, and which model is to be run on it (OPS-59).

It is one where its Study Instance UID was written down before it was sent, and every object of it came from the
canary's AE title on this host. No rule of routes.toml is asked for it. What only looks like one, because its objects
came under the canary's AE title, is given to no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from gateway.intake.admission import is_own_address
from storage.canary_records import CanaryRun
from storage.records import Instance


@dataclass(frozen=True, kw_only=True)
class CanaryMark:
    """`model` None: to be run by nobody."""

    model: str | None
    reason: str


def canary_mark(
    session: Session, study_instance_uid: str, instances: Sequence[Instance], *, canary_ae: str | None
) -> CanaryMark | None:
    """What is to become of a study's objects; None for any study that has nothing to do with a canary."""
    run = session.get(CanaryRun, study_instance_uid)
    if run is None:
        if canary_ae is None or all(instance.calling_ae != canary_ae for instance in instances):
            return None
        return CanaryMark(model=None, reason="it came under the canary's AE title, and no canary was sent with its UID")
    foreign = next((instance for instance in instances if not _came_from(instance, run)), None)
    if foreign is not None:
        return CanaryMark(model=None, reason=f"a canary, but object {foreign.object_id} of it came from elsewhere")
    return CanaryMark(model=run.model_name, reason=f"a canary of {run.model_name} {run.model_version}")


def _came_from(instance: Instance, run: CanaryRun) -> bool:
    return instance.calling_ae == run.calling_ae and is_own_address(instance.peer_address, run.address)
