"""Planned configurations on the device that is there: what a training step of each takes, or plans that fill it.

With the profile `article` patch and batch are those that fill 90 % of the device (ART-06). nnU-Net's plans stay as they
are; what was measured is written beside them, under the key `seggate` of plans.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.augmentation_profile import NNUNET, AugmentationPlan
from engine.dataset import DatasetJson
from engine.experiment import OWN
from engine.memory_fit import DEVICE_SHARE, SizeChoice, fit_to_memory
from engine.memory_probe import StepMemory, measure_step
from engine.planners import PLANNERS, PlannerName
from engine.planning import Content
from engine.plans import Configuration, read_plans
from engine.schedule import Schedule
from engine.step_gradients import Precision
from engine.topology import Topology
from engine.training_setup import TrainingSetup, default_loader_threads


class PlanProbe:
    """Measures configurations of one dataset's plans, each patch and batch once. `report` gets a line per probe."""

    def __init__(
        self,
        dataset_json: DatasetJson,
        planner: PlannerName,
        *,
        device: torch.device,
        precision: Precision,
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._dataset_json = dataset_json
        self._planner = PLANNERS[planner].name
        self._device, self._precision = device, precision
        self._report = report
        self._known: dict[tuple[Any, ...], StepMemory] = {}

    def memory_of(self, configuration: Configuration) -> StepMemory:
        key = (configuration.name, configuration.patch_size, configuration.batch_size)
        if key not in self._known:
            setup = planned_setup(configuration, self._dataset_json, self._device, self._precision)
            self._known[key] = measure_step(
                setup, label_entries=self._dataset_json.num_label_entries, planner=self._planner
            )
            self._report(f"{configuration.name}: {self._known[key]}")
        return self._known[key]

    def fit(self, choice: SizeChoice, content: Callable[[Topology, int], Content]) -> tuple[Topology, int]:
        """For `PlanRequest.fit`: patch and batch that fill the device to `DEVICE_SHARE`. Raises MemoryExceeded."""

        def fits(patch: Topology, batch_size: int) -> bool:
            configuration = _read(choice.configuration, content(patch, batch_size))
            return self.memory_of(configuration).fills_at_most(DEVICE_SHARE)

        return fit_to_memory(choice, fits)

    def add_to(self, plans: dict[str, Any]) -> dict[str, StepMemory]:
        """Measures every configuration of the plans, but a cascade (that of its full resolution), and writes the
        figures into them."""
        found = {
            name: self.memory_of(configuration)
            for name, configuration in read_plans(plans).configurations.items()
            if configuration.previous_stage is None
        }
        plans[OWN] = {"memory": {name: memory.as_plain() for name, memory in found.items()}}
        return found


def planned_setup(
    configuration: Configuration, dataset_json: DatasetJson, device: torch.device, precision: Precision
) -> TrainingSetup:
    """A training of the configuration, as far as its memory depends on the setup; it has no cases."""
    return TrainingSetup(
        configuration=configuration,
        batch_dice=configuration.batch_dice,
        labels=dataset_json.labels,
        channels=len(dataset_json.channel_names),
        folder=Path(),
        training_cases=(),
        validation_cases=(),
        augmentation=AugmentationPlan(
            profile=NNUNET, patch_size=configuration.patch_size, spacing_mm=configuration.spacing_mm, mirror_axes=()
        ),
        schedule=Schedule(),
        seed=0,
        device=device,
        precision=precision,
        deterministic=False,
        loader_threads=default_loader_threads(device),
    )


def _read(name: str, content: Mapping[str, Any]) -> Configuration:
    """A configuration on its own; what the rest of plans.json says does not matter for it."""
    plans = {
        "dataset_name": name,
        "plans_name": name,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {name: content},
    }
    return read_plans(plans).configurations[name]
