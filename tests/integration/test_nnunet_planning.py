"""Plans of the largest residual encoder, for which there is no stored reference, beside nnU-Net's own planner."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from engine.dataset import read_dataset_json
from engine.fingerprint import read_fingerprint
from engine.planning import PlanRequest, plan_experiment
from tests.support.nnunet_peer import nnunet
from tests.support.peers import require_peer, shared_root

require_peer("nnunet")

REFERENCES = {
    "Dataset004_Hippocampus": "hippocampus_004",
    "Dataset902_CTLarge": "ct_large_902",
    "Dataset301_LiverLike": "synthetic_301_liver_like",
    "Dataset302_ProstateLike": "synthetic_302_prostate_like",
    "Dataset303_BrainRegions": "synthetic_303_brain_regions",
    "Dataset307_WholeBody": "synthetic_307_whole_body_104",
    "Dataset309_SmallMR": "synthetic_309_small_mr",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """nnU-Net's plans, by dataset."""
    root = tmp_path_factory.mktemp("nnunet")
    for dataset, name in REFERENCES.items():
        for kind, file in (("raw", "dataset.json"), ("preprocessed", "dataset_fingerprint.json")):
            (root / kind / dataset).mkdir(parents=True)
            shutil.copy(shared_root() / "reference" / "plans" / name / file, root / kind / dataset / file)
    plans: dict[str, Any] = nnunet("plan", root, datasets=list(REFERENCES), planner="nnUNetPlannerResEncXL")
    return plans


@pytest.mark.requirement("ART-05")
@pytest.mark.peer("nnunet", "shared-data")
@pytest.mark.parametrize("dataset", REFERENCES)
def test_resenc_xl_is_planned_as_by_nnunets_own_planner(theirs: dict[str, Any], dataset: str) -> None:
    reference = shared_root() / "reference" / "plans" / REFERENCES[dataset]
    planned = plan_experiment(
        PlanRequest(
            dataset_name=dataset,
            dataset_json=read_dataset_json(reference / "dataset.json"),
            fingerprint=read_fingerprint(reference / "dataset_fingerprint.json"),
            planner="ResEncXL",
        )
    )
    assert json.loads(json.dumps(planned.plans)) == theirs[dataset]
