"""Sanity cases of a site for a test's bundle: an image and the labels that are to come out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle, write_bundle
from engine.evidence import Evidence, write_evidence
from engine.sanity_cases import SanityCase, SanitySuite, write_case
from engine.volume import Geometry, Volume
from tests.support.phantoms import asymmetric_content, asymmetric_labels, phantom_affine

SPACING_MM = (2.0, 2.0, 2.0)
SHAPE = (24, 26, 30)


def with_sanity_cases(bundle: Bundle, cases: Mapping[str, tuple[Volume, NDArray[np.uint8]]]) -> Bundle:
    """The bundle, written again with these cases: image, and label map on its grid."""
    written = []
    for name, (volume, labels) in cases.items():
        case = SanityCase(
            name=name,
            phantom=None,
            image_sha256=None,
            geometry=volume.geometry,
            voxels={spec.name: int(np.isin(labels, spec.region).sum()) for spec in bundle.labels},
            dice=None,
        )
        write_case(bundle.root, case, labels, image=volume, reference=None)
        written.append(case)
    write_evidence(bundle.root, Evidence(sanity=SanitySuite(computed_by="a test", cases=tuple(written))))
    return write_bundle(
        bundle.root,
        bundle,
        plans_json=json.loads((bundle.root / "plans.json").read_text()),
        dataset_json=json.loads((bundle.root / "dataset.json").read_text()),
    )


def asymmetric_case() -> tuple[Volume, NDArray[np.uint8]]:
    """The phantom of tests.support.phantoms, axial, not scaled; its labels are those of PHANTOM_BANDS."""
    affine = phantom_affine("axial", spacing_mm=SPACING_MM, shape=SHAPE)
    image = np.rint(asymmetric_content(affine, SHAPE)).astype(np.float32)
    volume = Volume(array=image[None], geometry=Geometry(shape=SHAPE, affine_lps=affine))
    return volume, asymmetric_labels(affine, SHAPE)
