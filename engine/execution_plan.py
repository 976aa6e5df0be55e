"""An execution plan: on what, in which arithmetic and how many windows at a time one model runs on one machine, and the
figures that say why.

A plan is made by engine/tuning.py. It holds for one version of a model, one machine, and the runtimes that were
installed when it was measured; `stale_reasons` says why it no longer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from types import MappingProxyType
from typing import Any, Literal, get_args

from engine.backends import PRECISIONS, PROVIDERS, RUNTIMES, BackendChoice, Device, Precision, Provider, Runtime
from engine.bundle import Bundle
from engine.errors import PlanInvalid
from engine.json_reader import Reader
from engine.machine import MachineIdentity
from engine.sanity_check import STRICT_TOLERANCE, Limits

FORMAT = 1
MAX_TOLERANCE = 0.05
_MAX_FIGURES = 1000
_MAX_LABELS = 4096
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch")

Mirroring = Literal["full", "none"]
"""Whether the mirrored passes that the model allows are run."""
Origin = Literal["tuned", "first-use"]
"""`tuned`: every candidate that time allowed, on whole cases. `first-use`: the float32 runtimes, on single windows."""
_RUNTIMES: Mapping[str, Runtime] = {name: name for name in RUNTIMES}
_PROVIDERS: Mapping[str, Provider] = {name: name for name in PROVIDERS}
_PRECISIONS: Mapping[str, Precision] = {name: name for name in PRECISIONS}
_MIRRORING = MappingProxyType({name: name for name in get_args(Mirroring)})
_ORIGINS = MappingProxyType({name: name for name in get_args(Origin)})


@dataclass(frozen=True, kw_only=True)
class CandidateFigure:
    """One candidate as it was measured. What was not is None, and `reason` says why it was not.

    `seconds_per_window`: median wall time of one window through one network (the mean over the configurations).
    `seconds_per_position`: the same for all that one position of the window costs: configurations, folds, mirrored
    passes. `cases`: on how many whole cases the labels were compared; 0 means on single windows. `case_seconds`: wall
    time of these cases together, once. `changed_voxels` of `voxels` differ from the reference; `dice_change` is the
    largest change of each label's Dice. `faults`: what is beyond the limits, with figures.
    """

    choice: BackendChoice
    mirroring: Mirroring
    version: str
    seconds_per_window: float | None
    seconds_per_position: float | None
    case_seconds: float | None
    cases: int
    voxels: int
    changed_voxels: int | None
    dice_change: Mapping[str, float]
    faults: tuple[str, ...]
    reason: str | None

    @property
    def agrees(self) -> bool:
        """Whether its labels were compared and are within the limits."""
        return self.changed_voxels is not None and not self.faults

    @property
    def verdict(self) -> str:
        """In a few words, for a table."""
        if self.changed_voxels is None:
            return self.reason or "not measured"
        if self.faults:
            return "; ".join(self.faults)
        return "agrees" if self.cases else "agrees on single windows"

    @property
    def was_run(self) -> bool:
        """Whether it ran at all here."""
        return self.seconds_per_window is not None


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """What runs, and how it was found. `libraries` are the runtimes' packages that were installed, with their versions.
    `reference` names what the labels were compared with, `cases` on what."""

    model: str
    semver: str
    weights_digest: str
    configuration_digest: str
    machine: MachineIdentity
    libraries: Mapping[str, str]
    choice: BackendChoice
    mirroring: Mirroring
    tolerance: float
    origin: Origin
    reference: str
    cases: tuple[str, ...]
    measured_at: str
    seconds: float
    figures: tuple[CandidateFigure, ...]

    @property
    def limits(self) -> Limits:
        return Limits.of(self.tolerance)

    @property
    def is_exact(self) -> bool:
        """Whether it keeps to the strict limits and runs every pass."""
        return self.tolerance <= STRICT_TOLERANCE and self.mirroring == "full"

    @property
    def left_out(self) -> tuple[str, ...]:
        """What a prediction by this plan lacks of the model's own, in words."""
        return ("mirrored passes",) if self.mirroring == "none" else ()

    @property
    def figure(self) -> CandidateFigure:
        """The figures of what was chosen."""
        return next(f for f in self.figures if (f.choice, f.mirroring) == (self.choice, self.mirroring))

    @property
    def summary(self) -> str:
        """In a few words: what runs, and what it may change."""
        exact = "" if self.tolerance <= STRICT_TOLERANCE else f", at most {self.tolerance:g} of the voxels may change"
        return f"{self.choice}{exact}" + "".join(f", without {text}" for text in self.left_out)

    @property
    def cost(self) -> tuple[str, ...]:
        """What a tolerance costs, as it was measured, in sentences; none for a plan that keeps to the strict limits."""
        if self.is_exact:
            return ()
        figure = self.figure
        exact = [f for f in self.figures if f.choice.precision == "float32" and f.mirroring == "full" and f.agrees]
        fastest = min((f.seconds_per_position or 0.0 for f in exact), default=None)
        gain = (
            f"{fastest / figure.seconds_per_position:.1f} times as fast as the fastest in float32 with every pass"
            if fastest and figure.seconds_per_position
            else "with no exact candidate to compare its speed with"
        )
        worst = max(figure.dice_change.items(), key=lambda item: item[1], default=None)
        dice = f"; largest change of a Dice: {worst[1]:.4f} ({worst[0]})" if worst is not None else ""
        changed = f"{figure.changed_voxels} of {figure.voxels}"
        share = (figure.changed_voxels or 0) / max(1, figure.voxels)
        texts = [f"the tolerance costs {changed} voxels ({share:.2g}){dice}; it is {gain}"]
        if self.left_out:
            texts.append("without mirrored passes the check mirror-agreement has nothing to judge (docs/quality.md)")
        return tuple(texts)

    def stale_reasons(
        self, bundle: Bundle, machine: MachineIdentity, *, device: Device = "auto", threads: int | None = None
    ) -> list[str]:
        """Why the plan must not be used for `bundle` on `machine` where the settings say `device` and `threads`; empty
        where it holds."""
        reasons = []
        if (self.model, self.semver) != (bundle.name, bundle.semver):
            reasons.append(f"it is of {self.model} {self.semver}")
        digests = (self.weights_digest, self.configuration_digest)
        if digests != (bundle.weights_digest, bundle.configuration_digest):
            reasons.append("it is of other weights or another configuration")
        if self.machine != machine:
            before, now = asdict(self.machine), asdict(machine)
            changed = (f"{key} was {before[key]}, is {now[key]}" for key in before if before[key] != now[key])
            reasons.append(f"it is of another machine ({'; '.join(changed)})")
        installed = installed_libraries()
        for name in sorted({*self.libraries, *installed}):
            before_version, version = self.libraries.get(name, "not there"), installed.get(name, "not there")
            if before_version != version:
                reasons.append(f"{name} was {before_version}, is {version}")
        if device != "auto" and (self.choice.provider == "cpu") != (device == "cpu"):
            reasons.append(f"it computes on {self.choice.provider}, and the settings say {device}")
        if threads and self.choice.threads not in (0, threads) and self.choice.provider == "cpu":
            reasons.append(f"it takes {self.choice.threads} threads, and the settings say {threads}")
        return reasons


def planned_bundle(bundle: Bundle, plan: ExecutionPlan | None) -> Bundle:
    """The bundle as the plan runs it."""
    return bundle if plan is None else with_mirroring(bundle, plan.mirroring)


def with_mirroring(bundle: Bundle, mirroring: Mirroring) -> Bundle:
    """The bundle as it is, or without mirror axes."""
    if mirroring == "full":
        return bundle
    configurations = tuple(replace(configuration, mirror_axes=()) for configuration in bundle.configurations)
    return replace(bundle, configurations=configurations)


def installed_libraries() -> dict[str, str]:
    """Package → version of the runtimes that are installed; nothing is imported."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def plan_document(plan: ExecutionPlan) -> dict[str, Any]:
    """The JSON form of a plan."""
    plain = replace(
        plan,
        libraries=dict(plan.libraries),
        figures=tuple(replace(figure, dice_change=dict(figure.dice_change)) for figure in plan.figures),
    )
    return {"format": FORMAT, **asdict(plain)}


def read_plan(document: Mapping[str, Any], *, where: str) -> ExecutionPlan:
    """The plan in a document. Raises PlanInvalid with `where` and the key: another format, something missing, of wrong
    type or range; figures that lack what was chosen."""
    reader = Reader(document, where=where, error=PlanInvalid)
    if reader.integer("format", 0, 2**16) != FORMAT:
        raise reader.fail("format", f"is not {FORMAT}")
    machine, libraries = reader.child("machine"), reader.child("libraries")
    plan = ExecutionPlan(
        **{
            key: reader.text(key)
            for key in ("model", "semver", "weights_digest", "configuration_digest", "reference", "measured_at")
        },
        machine=MachineIdentity(
            processor=machine.text("processor", empty=True),
            flags=machine.texts("flags", lengths=(0, 100)),
            cores=machine.integer("cores", 1, 2**20),
            memory_gib=machine.number("memory_gib", 0.0, 2.0**30),
            gpu=machine.text("gpu", empty=True),
            system=machine.text("system", empty=True),
        ),
        libraries=MappingProxyType({key: libraries.text(key) for key in libraries.keys()}),  # noqa: SIM118
        choice=_read_choice(reader.child("choice")),
        mirroring=reader.look_up("mirroring", reader.text("mirroring"), _MIRRORING),
        tolerance=reader.number("tolerance", STRICT_TOLERANCE, MAX_TOLERANCE),
        origin=reader.look_up("origin", reader.text("origin"), _ORIGINS),
        cases=reader.texts("cases", lengths=(0, _MAX_FIGURES)),
        seconds=reader.number("seconds", 0.0, 1e9),
        figures=tuple(_read_figure(entry) for entry in reader.children("figures", lengths=(1, _MAX_FIGURES))),
    )
    if not any((f.choice, f.mirroring) == (plan.choice, plan.mirroring) for f in plan.figures):
        raise reader.fail("figures", "lack what was chosen")
    return plan


def _read_choice(entry: Reader) -> BackendChoice:
    return BackendChoice(
        runtime=entry.look_up("runtime", entry.text("runtime"), _RUNTIMES),
        provider=entry.look_up("provider", entry.text("provider"), _PROVIDERS),
        precision=entry.look_up("precision", entry.text("precision"), _PRECISIONS),
        threads=entry.integer("threads", 0, 2**12),
        batch=entry.integer("batch", 1, 2**10),
    )


def _read_figure(entry: Reader) -> CandidateFigure:
    changes = entry.child("dice_change")
    names = list(changes.keys())[:_MAX_LABELS]
    return CandidateFigure(
        choice=_read_choice(entry.child("choice")),
        mirroring=entry.look_up("mirroring", entry.text("mirroring"), _MIRRORING),
        version=entry.text("version", empty=True),
        seconds_per_window=_number(entry, "seconds_per_window"),
        seconds_per_position=_number(entry, "seconds_per_position"),
        case_seconds=_number(entry, "case_seconds"),
        cases=entry.integer("cases", 0, _MAX_FIGURES),
        voxels=entry.integer("voxels", 0, 2**48),
        changed_voxels=None if entry.raw("changed_voxels") is None else entry.integer("changed_voxels", 0, 2**48),
        dice_change=MappingProxyType({name: changes.number(name, 0.0, 1.0) for name in names}),
        faults=entry.texts("faults", lengths=(0, _MAX_LABELS)),
        reason=entry.text_or_none("reason"),
    )


def _number(entry: Reader, key: str) -> float | None:
    return None if entry.raw(key) is None else entry.number(key, 0.0, 1e9)
