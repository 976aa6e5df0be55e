"""How a model is trained and put together, as data: nnU-Net's way, and the article's (ART-09 to ART-12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from engine.augmentation_profile import ARTICLE, NNUNET, AugmentationProfile
from engine.planners import ProfileName


@dataclass(frozen=True, kw_only=True)
class TrainingProfile:
    """What the profiles differ in.

    `trainer` is the first part of a result folder's name. `hold_out_share`: that part of a fold's training cases is
    kept for whole-case validation every `hold_out_every` epochs; training ends after `patience` epochs without a better
    composite score, and the best weights are used. None: nothing is held out and the last weights are used.

    `ensembles_everything`: all configurations are joined by the mean of their probabilities, instead of the best single
    one or pair. `most_components`: post-processing tries to keep the 1 to k largest components of a label.
    """

    name: ProfileName | Literal["fine-tune"]
    trainer: str
    augmentation: AugmentationProfile
    hold_out_share: float | None
    hold_out_every: int
    patience: int | None
    ensembles_everything: bool
    most_components: int


TRAINING_PROFILES: Mapping[ProfileName, TrainingProfile] = MappingProxyType(
    {
        "nnunet": TrainingProfile(
            name="nnunet",
            trainer="nnUNetTrainer",
            augmentation=NNUNET,
            hold_out_share=None,
            hold_out_every=1,
            patience=None,
            ensembles_everything=False,
            most_components=1,
        ),
        "article": TrainingProfile(
            name="article",
            trainer="nnUNetTrainerArticle",
            augmentation=ARTICLE,
            hold_out_share=0.1,
            hold_out_every=1,
            patience=30,
            ensembles_everything=True,
            most_components=3,
        ),
    }
)
