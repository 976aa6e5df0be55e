"""From an image to labels with a model bundle: the whole of nnU-Net's inference on a runtime without torch."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import scipy
from numpy.typing import NDArray

from engine.backends import Backend, BackendChoice, Device
from engine.bundle import Bundle
from engine.bundle_networks import open_networks
from engine.errors import BundleInvalid, InputRejected, MemoryExceeded
from engine.labels import LabelManager
from engine.logit_source import LogitSource, StoredLogits
from engine.logit_stream import LogitStream, stored_logits
from engine.logits_to_labels import check_rule, label_image
from engine.manifest import BundleConfiguration
from engine.memory import MemoryEstimate, check_budget, estimate_peak, run_order
from engine.postprocessing import apply_postprocessing, read_postprocessing
from engine.preprocessing import CroppedImage, crop_to_nonzero, network_shape, network_spacing_mm, preprocess
from engine.row_threads import RowThreads
from engine.segment_statistics import SegmentStatistics, mean_probabilities, measure_segments
from engine.sliding_window import WindowGrid, mirror_combinations
from engine.uncertainty import Agreement, MirrorAgreement, border_entropies, dilated_entropies, fold_agreements
from engine.volume import Geometry, LabelMap, Volume

FloatArray = NDArray[np.float32]
Progress = Callable[[float], None]

_log = logging.getLogger(__name__)

# Share of the progress that the networks take; the rest is making labels and measuring them.
_NETWORK_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class RuntimeInfo:
    """On what a prediction was computed. `seconds` is wall time by stage: preprocess, network, export, statistics.
    `left_out`: what an execution plan with a tolerance spared of the model's own passes, in words."""

    backend: str
    provider: str
    precision: str
    threads: int
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    peak_estimate_bytes: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """`labels` lie on the grid of the image that was given, `segments` are in the order of the bundle's labels.

    `mean_confidence` is the mean over the voxels of all segments, None when all are empty. `ties`: voxels that went to
    the lower of two labels because half precision, which nnU-Net rounds to, does not tell them apart.
    """

    labels: LabelMap
    segments: tuple[SegmentStatistics, ...]
    mean_confidence: float | None
    ties: int
    runtime: RuntimeInfo


class Predictor:
    """Runs one model bundle. Networks are loaded once, here, and stay loaded until `close`.

    `choice` is the runtime that an execution plan names; without one it is ONNX Runtime in float32 on `device` with so
    many `threads`. `backends`, by (configuration, fold), run the networks instead of the bundle's own files. `scratch`
    is a folder on a disk: where memory is short, the sums of windows are kept in a file there, which is slower and
    changes no label.

    Several threads may predict at a time. Raises BundleInvalid when a network or rule of the bundle cannot be run,
    BackendFailed when the device asked for cannot.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device = "auto",
        threads: int | None = None,
        choice: BackendChoice | None = None,
        backends: Mapping[tuple[str, str], Backend] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._bundle = bundle
        self._threads = threads
        self._scratch = scratch
        self._postprocessing = read_postprocessing(bundle.postprocessing)
        for configuration in bundle.configurations:
            check_rule(bundle.plans.configurations[configuration.name].resampling_probabilities)
        self._backends: dict[tuple[str, str], Backend] = (
            dict(backends)
            if backends is not None
            else open_networks(bundle, device=device, threads=threads, choice=choice)
        )

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def runtime(self) -> str:
        """What runs the networks, such as "onnxruntime 1.32.0 on cpu, float32"."""
        first = next(iter(self._backends.values()))
        return f"{first.name} {first.version} on {first.provider}, {first.precision}"

    def close(self) -> None:
        """Frees the networks."""
        for backend in self._backends.values():
            backend.close()
        self._backends.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_memory(self, geometry: Geometry, *, budget_bytes: int | None = None) -> None:
        """Raises MemoryExceeded where an image on `geometry` that is not in memory yet could not be predicted; meant to
        be asked before the image is decoded. `budget_bytes`: as for `predict`, the image included."""
        self._admit(geometry, budget_bytes, decoded=False)

    def needed_bytes(self, geometry: Geometry) -> int:
        """The estimated peak for an image on `geometry`, the image included, the loaded networks not."""
        return self._estimate(geometry, decoded=False).working_bytes

    def _estimate(self, geometry: Geometry, **options: Any) -> MemoryEstimate:
        batch = max(backend.batch for backend in self._backends.values())
        return estimate_peak(self._bundle, geometry, batch=batch, **options)

    def _admit(self, geometry: Geometry, budget_bytes: int | None, **options: Any) -> tuple[MemoryEstimate, bool]:
        """The estimate that fits, and whether it needs the sums in a file: the one step before a refusal."""
        estimate = self._estimate(geometry, **options)
        try:
            check_budget(estimate, budget_bytes)
        except MemoryExceeded:
            if self._scratch is None:
                raise
            smaller = self._estimate(geometry, sums_in_file=True, **options)
            check_budget(smaller, budget_bytes)
            _log.warning(
                "%s: %d MiB are not free; the sums of windows are kept in a file, which leaves %d MiB and is slower",
                self._bundle.name,
                estimate.working_bytes >> 20,
                smaller.working_bytes >> 20,
            )
            return smaller, True
        return estimate, False

    def predict(
        self,
        volume: Volume,
        *,
        progress: Progress | None = None,
        folds: Collection[str] | None = None,
        configurations: Sequence[str] | None = None,
        mirroring: bool | None = None,
        budget_bytes: int | None = None,
    ) -> Prediction:
        """Segments an image on its own grid, whatever its orientation.

        `progress` gets fractions from 0 to 1. `folds` and `configurations` restrict what runs (default: all; the
        earlier stages of a cascade always run with it). `mirroring` False switches the mirrored passes off that the
        model allows. `budget_bytes` is the memory that may be used, the loaded networks included; by default what is
        free now.

        Raises InputRejected (channels, values, nothing but 0), MemoryExceeded before anything is computed,
        BundleInvalid for an unknown fold or configuration, BackendFailed.
        """
        bundle = self._bundle
        check_image(bundle, volume)
        runs = run_order(bundle, configurations)
        members = (
            {configuration.name for configuration in bundle.final_configurations}
            if configurations is None
            else set(configurations)
        )
        if not members:
            raise BundleInvalid(f"{bundle.name}: no configuration was asked for")
        estimate, in_file = self._admit(volume.geometry, budget_bytes, configurations=configurations, folds=folds)
        clock = _Clock()

        with clock.stage("preprocess"):
            turned, change = volume.reoriented(bundle.contract.orientation)
            cropped = crop_to_nonzero(turned, bundle.plans)
            geometry = turned.geometry
            del turned
            tasks = [self._task(run, cropped, folds, mirroring) for run in runs]
        report = _Report(progress, sum(task.work for task in tasks))
        sources: list[LogitSource] = []
        previous: dict[str, NDArray[Any]] = {}
        finals: list[_Streams] = []
        needed = {run.previous_stage for run in runs}
        with RowThreads(self._threads) as threads:
            for task in tasks:
                with clock.stage("preprocess"):
                    image = preprocess(
                        cropped,
                        bundle.plans,
                        bundle.plans.configurations[task.run.name],
                        previous_labels=previous.get(task.run.previous_stage or ""),
                        previous_foreground=bundle.label_manager.foreground_labels,
                        threads=threads,
                    )
                if task is tasks[-1]:
                    cropped = cropped.without_image()
                try:
                    streams = self._streams(task, image, cropped, report, threads, in_file=in_file)
                except OSError as error:
                    raise MemoryExceeded(
                        "the sums of windows fit neither into memory nor into a file below "
                        f"{self._scratch}: {error.strerror}; free memory or space there"
                    ) from error
                del image
                own: Sequence[LogitSource] = streams.streams
                if task.run.name in needed:
                    with clock.network(streams):
                        # Logits that are needed twice are the only ones that are kept: those of a coarse first stage.
                        kept = [stored_logits(stream) for stream in streams.streams] if task.run.name in members else []
                        own = [StoredLogits(logits) for logits in kept]
                        stage = label_image(
                            own or streams.streams, cropped.shape, cropped.spacing_mm, bundle.label_manager, threads
                        )
                        own = [StoredLogits(logits) for logits in kept]
                    previous[task.run.name] = _uncropped(stage.labels, cropped)
                if task.run.name in members:
                    sources.extend(own)
                    finals.append(streams)
            with clock.network(*finals):
                result = label_image(sources, cropped.shape, cropped.spacing_mm, bundle.label_manager, threads)
        sources.clear()
        with clock.stage("export"):
            whole = _uncropped(result.labels, cropped)
            apply_postprocessing(whole, self._postprocessing)
            stored = np.ascontiguousarray(whole.transpose(bundle.plans.transpose_backward))
            labels = change.restore_labels(LabelMap(array=stored, geometry=geometry))
        with clock.stage("statistics"):
            certainty = _Certainty()
            for streams in finals:
                certainty.extend(streams, bundle.label_manager)
            finals.clear()
            confidences = mean_probabilities(whole[cropped.box], result.probabilities, bundle.labels)
            segments = measure_segments(
                volume,
                labels,
                bundle.labels,
                confidences=confidences,
                fold_tables=certainty.folds,
                mirror_tables=certainty.mirrors,
                border_entropies=certainty.borders,
                dilated_entropies=certainty.dilations,
            )
        report.finish()
        first = self._backends[tasks[0].run.name, tasks[0].folds[0]]
        return Prediction(
            labels=labels,
            segments=segments,
            mean_confidence=_mean_confidence(segments),
            ties=result.ties,
            runtime=RuntimeInfo(
                backend=first.name,
                provider=first.provider,
                precision=first.precision,
                threads=first.threads,
                versions=MappingProxyType(
                    {first.name: first.version, "numpy": np.__version__, "scipy": str(scipy.__version__)}
                ),
                seconds=MappingProxyType(dict(clock.seconds)),
                peak_estimate_bytes=estimate.bytes,
            ),
        )

    def _task(
        self, run: BundleConfiguration, cropped: CroppedImage, folds: Collection[str] | None, mirroring: bool | None
    ) -> _Task:
        names = tuple(fold.fold for fold in run.folds if folds is None or fold.fold in folds)
        if not names:
            present = ", ".join(fold.fold for fold in run.folds)
            raise BundleInvalid(f"{self._bundle.name}: {run.name} has none of the folds asked for; it has {present}")
        planned = self._bundle.plans.configurations[run.name]
        return _Task(
            run=run,
            folds=names,
            mirror_axes=() if mirroring is False else run.mirror_axes,
            grid=WindowGrid(
                shape=network_shape(cropped.shape, cropped.spacing_mm, planned),
                patch_size=planned.patch_size,
                step_size=self._bundle.step_size,
            ),
        )

    def _streams(
        self,
        task: _Task,
        image: FloatArray,
        cropped: CroppedImage,
        report: _Report,
        threads: RowThreads,
        *,
        in_file: bool,
    ) -> _Streams:
        """What computes the mean of the folds' logits, or each fold's own, where their probabilities are to be
        joined."""
        labels = self._bundle.label_manager
        planned = self._bundle.plans.configurations[task.run.name]
        mirrors = MirrorAgreement(labels) if task.mirror_axes else None
        networks = [self._backends[task.run.name, fold] for fold in task.folds]
        apart = self._bundle.ensemble == "probabilities-of-folds"
        streams = [
            LogitStream(
                image,
                task.grid,
                together,
                labels=labels,
                spacing_mm=network_spacing_mm(cropped.spacing_mm, planned),
                rule=planned.resampling_probabilities,
                threads=threads,
                mirror_axes=task.mirror_axes,
                advance=lambda: report.advance(task.window_work),
                observe_mirroring=mirrors,
                folder=self._scratch if in_file else None,
            )
            for together in ([[network] for network in networks] if apart else [networks])
        ]
        return _Streams(streams, mirrors)


def check_image(bundle: Bundle, volume: Volume) -> None:
    """Raises InputRejected where the image has other channels than the model, or values that are no numbers."""
    if volume.array.shape[0] != len(bundle.channels):
        raise InputRejected(
            f"the image has {volume.array.shape[0]} channel(s); {bundle.name} takes {len(bundle.channels)}: "
            + ", ".join(channel.name for channel in bundle.channels)
        )
    if not np.isfinite(volume.array).all():
        raise InputRejected("the image holds NaN or infinity, correct it at the source")


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One configuration to run: which folds, which mirrored passes, which windows."""

    run: BundleConfiguration
    folds: tuple[str, ...]
    mirror_axes: tuple[int, ...]
    grid: WindowGrid

    @property
    def window_work(self) -> int:
        """Voxels that go through the network for one window."""
        return (1 + len(mirror_combinations(self.mirror_axes))) * int(np.prod(self.grid.patch_size))

    @property
    def work(self) -> int:
        return self.window_work * len(self.grid) * len(self.folds)


@dataclass(frozen=True)
class _Certainty:
    """Tables of agreement between folds and with the mirrored passes, and each network's entropies at the borders
    (`borders`) and in and around the segments (`dilations`)."""

    folds: list[Agreement] = field(default_factory=list)
    mirrors: list[Agreement] = field(default_factory=list)
    borders: list[Mapping[int, float]] = field(default_factory=list)
    dilations: list[Mapping[int, float]] = field(default_factory=list)

    def extend(self, streams: _Streams, labels: LabelManager) -> None:
        """Adds what the streams of one configuration have seen."""
        networks = [maps for stream in streams.streams for maps in stream.certainties]
        self.borders.extend(border_entropies(maps, labels) for maps in networks)
        self.dilations.extend(dilated_entropies(maps, labels) for maps in networks)
        self.folds.extend(fold_agreements([maps.winners for maps in networks], labels))
        if streams.mirrors is not None:
            self.mirrors.append(streams.mirrors.agreement)


@dataclass(frozen=True)
class _Streams:
    """The streams of one configuration, and what its mirrored passes say."""

    streams: Sequence[LogitStream]
    mirrors: MirrorAgreement | None


class _Report:
    """Turns work done into fractions."""

    def __init__(self, progress: Progress | None, work: int) -> None:
        self._progress = progress
        self._work = work
        self._done = 0

    def advance(self, work: int) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(_NETWORK_SHARE * self._done / self._work)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(1.0)


class _Clock:
    """Wall time by stage; a stage that is entered again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def network(self, *streams: _Streams) -> Iterator[None]:
        """What the streams take for windows is `network`, all else `export`."""
        each = [stream for group in streams for stream in group.streams]
        before, start = sum(stream.seconds for stream in each), time.perf_counter()
        try:
            yield
        finally:
            windows = sum(stream.seconds for stream in each) - before
            self._add("network", windows)
            self._add("export", time.perf_counter() - start - windows)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _uncropped(labels: NDArray[Any], cropped: CroppedImage) -> NDArray[Any]:
    """The labels (network axes) in an array of the whole image, 0 outside the crop."""
    if labels.shape == cropped.full_shape:
        return labels
    whole = np.zeros(cropped.full_shape, dtype=labels.dtype)
    whole[cropped.box] = labels
    return whole


def _mean_confidence(segments: Sequence[SegmentStatistics]) -> float | None:
    known = [(item.confidence, item.voxels) for item in segments if item.confidence is not None and item.voxels]
    if not known:
        return None
    return sum(confidence * voxels for confidence, voxels in known) / sum(voxels for _, voxels in known)
