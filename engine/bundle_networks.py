"""The networks of a bundle, opened on the runtime that was chosen for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from engine.backends import Backend, BackendChoice, Device, Network, open_backend, open_default
from engine.bundle import Bundle
from engine.manifest import BundleConfiguration, Fold


def open_networks(
    bundle: Bundle,
    *,
    device: Device = "auto",
    threads: int | None = None,
    choice: BackendChoice | None = None,
    names: Collection[str] | None = None,
) -> dict[tuple[str, str], Backend]:
    """Every network by (configuration, fold), loaded and warmed up; all of them or none. `names`: of these
    configurations only.

    Without a `choice` ONNX Runtime in float32 on `device` with so many `threads`. Raises BundleInvalid, BackendFailed.
    """
    opened: dict[tuple[str, str], Backend] = {}
    try:
        for configuration, fold in networks_of(bundle):
            if names is not None and configuration.name not in names:
                continue
            network = network_of(bundle, configuration, fold)
            opened[configuration.name, fold.fold] = (
                open_default(network, device=device, threads=threads)
                if choice is None
                else open_backend(network, choice)
            )
    except BaseException:
        for backend in opened.values():
            backend.close()
        raise
    return opened


def networks_of(bundle: Bundle) -> Iterator[tuple[BundleConfiguration, Fold]]:
    for configuration in bundle.configurations:
        for fold in configuration.folds:
            yield configuration, fold


def network_of(bundle: Bundle, configuration: BundleConfiguration, fold: Fold) -> Network:
    """One network as a backend is told of it. A cascade's later stage also sees a channel for each foreground label."""
    planned = bundle.plans.configurations[configuration.name]
    stacked = len(bundle.label_manager.foreground_labels) if configuration.previous_stage else 0
    return Network(
        file=fold.file,
        channels=len(bundle.channels) + stacked,
        heads=bundle.label_manager.num_heads,
        patch_size=planned.patch_size,
        architecture=planned.architecture,
    )
