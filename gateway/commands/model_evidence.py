"""What `seggate models show` says of a model's origin, its expected results, and how it was measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gateway.commands.output import console, printable, table

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.provenance import FoldTraining


def evidence_document(bundle: Bundle) -> dict[str, Any]:
    """For --json; null is what the bundle lacks."""
    evidence = bundle.evidence
    baseline, sanity = evidence.baseline, evidence.sanity
    return {
        "weights": bundle.weights,
        "evidence_digest": bundle.evidence_digest,
        "provenance": None if evidence.provenance is None else asdict(evidence.provenance),
        "baseline": None
        if baseline is None
        else {
            "cases": baseline.cases,
            "studies": len(baseline.studies),
            "channels": [{"name": channel.name, "scale": channel.scale} for channel in baseline.channels],
        },
        "sanity": None
        if sanity is None
        else {
            "computed_by": sanity.computed_by,
            "cases": [
                {
                    "name": case.name,
                    "generated": case.phantom is not None,
                    "voxels": dict(case.voxels),
                    "dice": None if case.dice is None else dict(case.dice),
                }
                for case in sanity.cases
            ],
        },
        "backends": None if evidence.backends is None else asdict(evidence.backends),
    }


def present_evidence(bundle: Bundle) -> None:
    """The same for a person, after the rest of the model."""
    out, evidence = console(), bundle.evidence
    if evidence.provenance is not None:
        data = evidence.provenance.data
        out.print("\nTraining data", markup=False)
        for key in ("name", "licence", "reference", "release"):
            out.print(f"  {key:22} {printable(getattr(data, key)) or 'not stated'}", markup=False, soft_wrap=True)
        out.print(f"  {'cases':22} {'unknown' if data.cases is None else data.cases}", markup=False)
        out.print(f"  {'digest of the cases':22} {data.cases_digest or 'unknown'}", markup=False, soft_wrap=True)
        out.print(f"  {'excluded cases':22} {'unknown' if data.excluded is None else data.excluded}", markup=False)
        table(
            f"\nTraining (exported by {printable(evidence.provenance.exported_by)})",
            ("configuration", "fold", "trainer", "by", "epochs", "iterations", "precision", "seed", "cases"),
            [_fold(fold) for fold in evidence.provenance.training],
        )
        if evidence.provenance.validation is not None:
            validation = evidence.provenance.validation
            table(
                f"\nCross-validation on {validation.cases} cases",
                ("label", "Dice", "HD95 (mm)", "surface Dice at 2 mm"),
                [
                    (name, *(None if v is None else f"{v:.4g}" for v in (f.dice, f.hd95_mm, f.surface_dice)))
                    for name, f in validation.labels.items()
                ],
            )
    if evidence.baseline is not None:
        scales = {"image": "in the units of the image", "percentile": "between the image's own percentiles"}
        channels = "; ".join(f"{c.name} {scales[c.scale]}" for c in evidence.baseline.channels)
        out.print(
            f"\nIntensity baseline: {evidence.baseline.cases} cases; {printable(channels)}",
            markup=False,
            soft_wrap=True,
        )
    if evidence.sanity is not None:
        table(
            f"\nSanity cases, expected by {printable(evidence.sanity.computed_by)}",
            ("case", "label", "voxels", "Dice to the reference"),
            [
                (case.name, label, voxels, None if case.dice is None else _dice(case.dice[label]))
                for case in evidence.sanity.cases
                for label, voxels in case.voxels.items()
            ],
        )
    if evidence.backends is not None:
        machine = evidence.backends.machine
        table(
            f"\nBackends, weights in {bundle.weights}, measured at export on {printable(machine.processor)}, "
            f"{machine.cores} cores, {machine.memory_gib:g} GiB",
            ("configuration", "fold", "backend", "precision", "seconds a window", "max difference", "same labels"),
            [
                (
                    figure.configuration,
                    figure.fold,
                    f"{figure.backend} {figure.version} on {figure.provider}",
                    figure.precision,
                    f"{figure.seconds_per_window:.3g}",
                    f"{figure.max_abs_difference:.2g}",
                    f"{figure.argmax_agreement:.6f}",
                )
                for figure in evidence.backends.figures
            ],
        )


def _fold(fold: FoldTraining) -> tuple[object, ...]:
    planned = f" of {fold.planned_epochs}" if fold.planned_epochs not in (None, fold.epochs) else ""
    return (
        fold.configuration,
        fold.fold,
        fold.trainer,
        fold.software or "nnU-Net v2",
        "" if fold.epochs is None else f"{fold.epochs}{planned}",
        fold.iterations,
        fold.precision,
        fold.seed,
        fold.training_cases,
    )


def _dice(value: float | None) -> str:
    return "neither has it" if value is None else f"{value:.4f}"
