"""An execution plan as if it had been measured on this machine, and a bundle to measure one for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.backends import BackendChoice
from engine.bundle import Bundle, write_bundle
from engine.bundle_networks import open_networks
from engine.evidence import Evidence, write_evidence
from engine.execution_plan import CandidateFigure, ExecutionPlan, Mirroring, installed_libraries
from engine.machine import this_identity
from engine.sanity_check import STRICT_TOLERANCE
from engine.sanity_making import make_sanity
from tests.support.tiny_models import configuration_json, write_pointwise_network, write_tiny_bundle

CHOICE = BackendChoice(runtime="openvino", provider="cpu", precision="float32", threads=2)


def plan_of(
    bundle: Bundle,
    *,
    choice: BackendChoice = CHOICE,
    tolerance: float = STRICT_TOLERANCE,
    mirroring: Mirroring = "full",
) -> ExecutionPlan:
    figure = CandidateFigure(
        choice=choice,
        mirroring=mirroring,
        version="2026.4.1",
        seconds_per_window=0.5,
        seconds_per_position=2.0,
        case_seconds=3.0,
        cases=1,
        voxels=1000,
        changed_voxels=0,
        dice_change={label.name: 0.0 for label in bundle.labels},
        faults=(),
        reason=None,
    )
    return ExecutionPlan(
        model=bundle.name,
        semver=bundle.semver,
        weights_digest=bundle.weights_digest,
        configuration_digest=bundle.configuration_digest,
        machine=this_identity(),
        libraries=installed_libraries(),
        choice=choice,
        mirroring=mirroring,
        tolerance=tolerance,
        origin="tuned",
        reference="torch 2.13.0, float32 on the CPU",
        cases=("plans-grid",),
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=4.5,
        figures=(figure,),
    )


PATCH = (4, 8, 8)


def brightness_bundle(root: Path, *, mirror_axes: Sequence[int] = (), sanity: bool = False) -> Bundle:
    """Labels by brightness: 1 above the mean, 2 far above it. The network takes one window at a time. `sanity`: with
    sanity cases as ONNX Runtime computes them."""
    weights, bias = np.array([[0.0], [4.0], [8.0]]), np.array([0.0, -1.0, -6.0])
    write_pointwise_network(root / "3d_fullres" / "fold_0.onnx", weights, bias, PATCH)
    bundle = write_tiny_bundle(
        root,
        labels={"background": 0, "a": 1, "b": 2},
        configurations={"3d_fullres": configuration_json(PATCH, (3.0, 1.0, 1.0), schemes=["ZScoreNormalization"])},
        mirror_axes=mirror_axes,
        orientation="RAS",
    )
    if not sanity:
        return bundle
    suite = make_sanity(
        bundle, open_networks(bundle, device="cpu"), phantoms=True, site_cases=(), progress=lambda _share, _text: None
    )
    write_evidence(bundle.root, Evidence(sanity=suite))
    return write_bundle(
        bundle.root,
        bundle,
        plans_json=json.loads((bundle.root / "plans.json").read_text()),
        dataset_json=json.loads((bundle.root / "dataset.json").read_text()),
    )
