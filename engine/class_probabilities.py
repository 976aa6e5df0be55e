"""The probability of every class at every voxel, as `nnUNetv2_predict --save_probabilities` gives it (nnU-Net v2).

An array of all classes on the image's grid, and so of many gigabytes for many classes: asked for by ensembles and
calibration alone. Labels without it come from engine.predictor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import Backend, BackendChoice, Device
from engine.bundle import Bundle
from engine.bundle_networks import open_networks
from engine.errors import BundleInvalid, MemoryExceeded
from engine.logit_source import NetworkLogits, StoredLogits
from engine.logit_stream import LogitStream, stored_logits
from engine.logits_to_labels import image_logits
from engine.manifest import BundleConfiguration
from engine.memory import available_bytes
from engine.postprocessing import apply_postprocessing, read_postprocessing
from engine.predictor import Predictor, check_image
from engine.preprocessing import CroppedImage, crop_to_nonzero, network_shape, network_spacing_mm, preprocess
from engine.row_threads import RowThreads
from engine.segment_statistics import SegmentStatistics, measure_segments
from engine.sliding_window import WindowGrid
from engine.volume import Geometry, LabelMap, Volume, reorientation

FloatArray = NDArray[np.float32]
Progress = Callable[[float], None]

# Float32 arrays of all classes that are alive at once: on the network's grid (sums, logits, their mean), on the image's
# (one being interpolated, the probabilities).
_NETWORK_COPIES = 3
_IMAGE_COPIES = 3
_NETWORK_SHARE = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassProbabilities:
    """`probabilities`: float32 (heads, Z, Y, X) on the image's grid, softmax, or a sigmoid per region; outside what is
    nonzero the background has 1 (regions: all 0). `properties`: where the crop lay, by nnU-Net's names, in the order of
    the network's axes. `seconds`: by stage.
    """

    probabilities: FloatArray
    labels: LabelMap
    segments: tuple[SegmentStatistics, ...]
    properties: Mapping[str, Any]
    seconds: Mapping[str, float]


class ProbabilityPredictor:
    """Runs one bundle and keeps all classes. Networks are loaded here, and freed by `close`. `configurations`: whose
    probabilities are joined (default: the final ones). `choice`: the runtime, as for Predictor.

    Raises as engine.predictor.Predictor does.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        configurations: Sequence[str] | None = None,
        device: Device = "auto",
        threads: int | None = None,
        choice: BackendChoice | None = None,
    ) -> None:
        self._bundle = bundle
        self._threads = threads
        self._runs = (
            bundle.final_configurations
            if configurations is None
            else tuple(bundle.configuration(name) for name in dict.fromkeys(configurations))
        )
        self._postprocessing = read_postprocessing(bundle.postprocessing)
        self._backends: dict[tuple[str, str], Backend] = {}
        # Earlier stages of a cascade give labels only.
        self._stages: Predictor | None = None
        try:
            if any(configuration.previous_stage for configuration in self._runs):
                self._stages = Predictor(bundle, device=device, threads=threads, choice=choice)
            self._backends = open_networks(
                bundle, device=device, threads=threads, choice=choice, names=[run.name for run in self._runs]
            )
        except BaseException:
            self.close()
            raise

    @property
    def runtime(self) -> str:
        """What runs the networks, such as "onnxruntime 1.32.0 on cpu, float32"."""
        first = next(iter(self._backends.values()))
        return f"{first.name} {first.version} on {first.provider}, {first.precision}"

    def check_memory(self, geometry: Geometry, *, budget_bytes: int | None = None) -> None:
        """Raises MemoryExceeded where all classes of an image on `geometry`, taken as if nothing could be cropped away
        and with the image itself, would not fit into the budget (None: what is free)."""
        turned = reorientation(geometry, self._bundle.contract.orientation).target
        forward = self._bundle.plans.transpose_forward
        z, y, x = (turned.shape[axis] for axis in forward)
        spacing = tuple(turned.spacing_mm[axis] for axis in forward)
        network = max(
            math.prod(network_shape((z, y, x), spacing, self._bundle.plans.configurations[configuration.name]))
            for configuration in self._runs
        )
        values = _NETWORK_COPIES * network + _IMAGE_COPIES * z * y * x
        heads, channels = self._bundle.label_manager.num_heads, len(self._bundle.channels)
        needed = 4 * (heads * values + 2 * channels * (network + z * y * x))
        budget = available_bytes() if budget_bytes is None else budget_bytes
        if needed > budget:
            raise MemoryExceeded(
                f"the probabilities of all {heads} classes need about {needed / 2**20:.0f} MiB and "
                f"{budget / 2**20:.0f} MiB may be used; labels alone need far less"
            )

    def close(self) -> None:
        """Frees the networks."""
        for backend in self._backends.values():
            backend.close()
        self._backends.clear()
        if self._stages is not None:
            self._stages.close()

    def predict(
        self,
        volume: Volume,
        *,
        progress: Progress | None = None,
        folds: Collection[str] | None = None,
        mirroring: bool | None = None,
    ) -> ClassProbabilities:
        """Arguments and errors as for Predictor.predict; several configurations give the mean of their probabilities,
        as nnU-Net's ensemble does."""
        bundle = self._bundle
        check_image(bundle, volume)
        report = progress or (lambda _share: None)
        clock = {"preprocess": 0.0, "network": 0.0, "export": 0.0, "statistics": 0.0}
        self.check_memory(volume.geometry)
        began = time.monotonic()
        turned, change = volume.reoriented(bundle.contract.orientation)
        cropped = crop_to_nonzero(turned, bundle.plans)
        clock["preprocess"] += time.monotonic() - began
        total: FloatArray | None = None
        outputs = 0
        for index, run in enumerate(self._runs):
            share = (index / len(self._runs), 1 / len(self._runs))
            for logits in self._logits(run, volume, cropped, folds, mirroring, report, share, clock):
                began = time.monotonic()
                found = self._probabilities(logits, cropped)
                total = found if total is None else np.add(total, found, out=total)
                outputs += 1
                clock["export"] += time.monotonic() - began
        began = time.monotonic()
        if total is None:
            raise BundleInvalid(f"{bundle.name}: no network was run")
        if outputs > 1:
            total /= np.float32(outputs)
        whole = self._whole(total, cropped)
        del total
        labels = bundle.label_manager.probabilities_to_labels(whole)
        apply_postprocessing(labels, self._postprocessing)
        back = bundle.plans.transpose_backward
        stored = LabelMap(array=np.ascontiguousarray(labels.transpose(back)), geometry=turned.geometry)
        result = change.restore_labels(stored)
        probabilities: FloatArray = change.restore(whole.transpose(0, *(1 + axis for axis in back)))
        del whole
        clock["export"] += time.monotonic() - began
        began = time.monotonic()
        segments = measure_segments(volume, result, bundle.labels, confidences={})
        clock["statistics"] += time.monotonic() - began
        report(1.0)
        return ClassProbabilities(
            probabilities=probabilities,
            labels=result,
            segments=segments,
            properties={
                "spacing": list(turned.geometry.spacing_mm),
                "shape_before_cropping": list(cropped.full_shape),
                "bbox_used_for_cropping": [[side.start, side.stop] for side in cropped.box],
                "shape_after_cropping_and_before_resampling": list(cropped.shape),
            },
            seconds=clock,
        )

    def _logits(
        self,
        run: BundleConfiguration,
        volume: Volume,
        cropped: CroppedImage,
        folds: Collection[str] | None,
        mirroring: bool | None,
        report: Progress,
        share: tuple[float, float],
        clock: dict[str, float],
    ) -> list[NetworkLogits]:
        """The mean of the folds' logits, or each fold's where their probabilities are to be joined; half precision has
        rounded them as nnU-Net's does."""
        bundle, labels = self._bundle, self._bundle.label_manager
        planned = bundle.plans.configurations[run.name]
        names = [fold.fold for fold in run.folds if folds is None or fold.fold in folds]
        if not names:
            raise BundleInvalid(f"{bundle.name}: {run.name} has none of the folds asked for")
        began = time.monotonic()
        image = preprocess(
            cropped,
            bundle.plans,
            planned,
            previous_labels=self._previous(run, volume, folds, mirroring),
            previous_foreground=labels.foreground_labels,
        )
        clock["preprocess"] += time.monotonic() - began
        began = time.monotonic()
        grid = WindowGrid(
            shape=network_shape(cropped.shape, cropped.spacing_mm, planned),
            patch_size=planned.patch_size,
            step_size=bundle.step_size,
        )
        windows = len(grid) * len(names)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            report(_NETWORK_SHARE * (share[0] + share[1] * done / windows))

        networks = [self._backends[run.name, name] for name in names]
        apart = bundle.ensemble == "probabilities-of-folds"
        kept: list[NetworkLogits] = []
        with RowThreads(self._threads) as threads:
            for together in [[network] for network in networks] if apart else [networks]:
                stream = LogitStream(
                    image,
                    grid,
                    together,
                    labels=labels,
                    spacing_mm=network_spacing_mm(cropped.spacing_mm, planned),
                    rule=planned.resampling_probabilities,
                    threads=threads,
                    mirror_axes=() if mirroring is False else run.mirror_axes,
                    advance=advance,
                )
                kept.append(stored_logits(stream))
        clock["network"] += time.monotonic() - began
        return kept

    def _previous(
        self, run: BundleConfiguration, volume: Volume, folds: Collection[str] | None, mirroring: bool | None
    ) -> NDArray[Any] | None:
        """The earlier stage's label map in the network's axes, over the whole image."""
        if run.previous_stage is None or self._stages is None:
            return None
        found = self._stages.predict(volume, folds=folds, configurations=[run.previous_stage], mirroring=mirroring)
        turned, _ = found.labels.reoriented(self._bundle.contract.orientation)
        return turned.array.transpose(self._bundle.plans.transpose_forward)

    def _probabilities(self, logits: NetworkLogits, cropped: CroppedImage) -> FloatArray:
        """On the grid of the crop, float32 (heads, Z, Y, X)."""
        with RowThreads(self._threads) as threads:
            found = image_logits(StoredLogits(logits), cropped.shape, cropped.spacing_mm, threads)
        return self._bundle.label_manager.probabilities(found)

    def _whole(self, probabilities: FloatArray, cropped: CroppedImage) -> FloatArray:
        if cropped.shape == cropped.full_shape:
            return probabilities
        whole = np.zeros((len(probabilities), *cropped.full_shape), dtype=np.float32)
        if not self._bundle.label_manager.has_regions:
            whole[0] = 1.0
        whole[:, *cropped.box] = probabilities
        return whole
