"""A network's architecture as nnU-Net's plans describe it.

Reads the format of nnU-Net 2.4 and later (key `architecture`) and the older one (key `UNet_class_name`). Names of
Python classes in the file are looked up in the tables below, never imported; what is not in a table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from engine.json_reader import Reader

NetworkKind = Literal["plain", "residual"]

_NETWORKS: Mapping[str, NetworkKind] = MappingProxyType(
    {
        "dynamic_network_architectures.architectures.unet.PlainConvUNet": "plain",
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet": "residual",
        "PlainConvUNet": "plain",
        "ResidualEncoderUNet": "residual",
    }
)
_CONVOLUTIONS: Mapping[str, int] = MappingProxyType(
    {
        "torch.nn.modules.conv.Conv2d": 2,
        "torch.nn.modules.conv.Conv3d": 3,
        "torch.nn.Conv2d": 2,
        "torch.nn.Conv3d": 3,
    }
)
_NORMS: Mapping[str, int] = MappingProxyType(
    {
        "torch.nn.modules.instancenorm.InstanceNorm2d": 2,
        "torch.nn.modules.instancenorm.InstanceNorm3d": 3,
        "torch.nn.InstanceNorm2d": 2,
        "torch.nn.InstanceNorm3d": 3,
    }
)
# Slope of the negative half when nonlin_kwargs does not say.
_NONLINEARITIES: Mapping[str, float] = MappingProxyType(
    {
        "torch.nn.LeakyReLU": 0.01,
        "torch.nn.modules.activation.LeakyReLU": 0.01,
        "torch.nn.ReLU": 0.0,
        "torch.nn.modules.activation.ReLU": 0.0,
    }
)
_PLAIN_KWARGS = frozenset(
    {
        "n_stages",
        "features_per_stage",
        "conv_op",
        "kernel_sizes",
        "strides",
        "n_conv_per_stage",
        "n_blocks_per_stage",
        "n_conv_per_stage_decoder",
        "conv_bias",
        "norm_op",
        "norm_op_kwargs",
        "dropout_op",
        "dropout_op_kwargs",
        "nonlin",
        "nonlin_kwargs",
        "deep_supervision",
    }
)

_MAX_STAGES = 16
_MAX_FEATURES = 4096
_MAX_CONVS = 64


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A U-Net. Per-stage tuples run from the full resolution to the bottleneck, the decoder's from the bottleneck's
    neighbour up as in nnU-Net. `n_conv_per_stage` counts residual blocks when `network` is `residual`."""

    network: NetworkKind
    dimensions: Literal[2, 3]
    features_per_stage: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    n_conv_per_stage: tuple[int, ...]
    n_conv_per_stage_decoder: tuple[int, ...]
    conv_bias: bool
    norm_eps: float
    negative_slope: float

    @property
    def n_stages(self) -> int:
        return len(self.features_per_stage)

    @property
    def total_stride(self) -> tuple[int, ...]:
        """Product of the strides per axis; patch edges must be multiples of it."""
        total = [1] * self.dimensions
        for stride in self.strides:
            total = [t * s for t, s in zip(total, stride, strict=True)]
        return tuple(total)


def read_architecture(entry: Reader, dimensions: int) -> Architecture:
    """The network of a configuration with 2 or 3 axes. Raises the reader's error with the key."""
    if "architecture" in entry:
        outer = entry.child("architecture")
        network = outer.look_up("network_class_name", outer.text("network_class_name"), _NETWORKS)
        return _new_architecture(outer.child("arch_kwargs"), network, dimensions)
    return _old_architecture(entry, dimensions)


def _new_architecture(kwargs: Reader, network: NetworkKind, dimensions: int) -> Architecture:
    for key in kwargs.keys():  # noqa: SIM118
        # Squeeze-excitation, stochastic depth, bottleneck blocks and the like: allowed only when switched off.
        if key not in _PLAIN_KWARGS and kwargs.raw(key) not in (None, False, 0):
            raise kwargs.fail(key[:80], "is not supported")
    for key, table in (("conv_op", _CONVOLUTIONS), ("norm_op", _NORMS)):
        if kwargs.look_up(key, kwargs.text(key), table) != dimensions:
            raise kwargs.fail(key, f"does not fit a patch with {dimensions} axes")
    if kwargs.raw("dropout_op", None) is not None:
        raise kwargs.fail("dropout_op", "dropout is not supported")
    norm_kwargs = kwargs.child("norm_op_kwargs", {"affine": True})
    if not norm_kwargs.boolean("affine", False):
        raise norm_kwargs.fail("affine", "normalisation without scale and shift is not supported")
    nonlin = kwargs.text("nonlin")
    slope = kwargs.look_up("nonlin", nonlin, _NONLINEARITIES)
    if nonlin.endswith("LeakyReLU") and kwargs.raw("nonlin_kwargs", None) is not None:
        slope = kwargs.child("nonlin_kwargs").number("negative_slope", 0.0, 1.0, slope)
    n_stages = kwargs.integer("n_stages", 2, _MAX_STAGES)
    counts = "n_conv_per_stage" if network == "plain" else "n_blocks_per_stage"
    return Architecture(
        network=network,
        dimensions=2 if dimensions == 2 else 3,
        features_per_stage=_per_stage(kwargs, "features_per_stage", n_stages, _MAX_FEATURES),
        kernel_sizes=_kernels(kwargs, "kernel_sizes", n_stages, dimensions),
        strides=_axes_per_stage(kwargs, "strides", n_stages, dimensions, 16),
        n_conv_per_stage=_per_stage(kwargs, counts, n_stages, _MAX_CONVS),
        n_conv_per_stage_decoder=_per_stage(kwargs, "n_conv_per_stage_decoder", n_stages - 1, _MAX_CONVS),
        conv_bias=kwargs.boolean("conv_bias"),
        norm_eps=norm_kwargs.number("eps", 1e-12, 1.0, 1e-5),
        negative_slope=slope,
    )


def _old_architecture(entry: Reader, dimensions: int) -> Architecture:
    """nnU-Net up to 2.3: the numbers stand in the configuration itself, the operators are fixed."""
    network = entry.look_up("UNet_class_name", entry.text("UNet_class_name"), _NETWORKS)
    n_stages = len(entry.array("n_conv_per_stage_encoder", lengths=(2, _MAX_STAGES)))
    base = entry.integer("UNet_base_num_features", 1, _MAX_FEATURES)
    largest = entry.integer("unet_max_num_features", 1, _MAX_FEATURES)
    return Architecture(
        network=network,
        dimensions=2 if dimensions == 2 else 3,
        features_per_stage=tuple(min(base * 2**stage, largest) for stage in range(n_stages)),
        kernel_sizes=_kernels(entry, "conv_kernel_sizes", n_stages, dimensions),
        strides=_axes_per_stage(entry, "pool_op_kernel_sizes", n_stages, dimensions, 16),
        n_conv_per_stage=_per_stage(entry, "n_conv_per_stage_encoder", n_stages, _MAX_CONVS),
        n_conv_per_stage_decoder=_per_stage(entry, "n_conv_per_stage_decoder", n_stages - 1, _MAX_CONVS),
        conv_bias=True,
        norm_eps=1e-5,
        negative_slope=0.01,
    )


def _per_stage(entry: Reader, key: str, n_stages: int, high: int) -> tuple[int, ...]:
    """One whole number per stage; a single number stands for all stages, as in nnU-Net."""
    value = entry.raw(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return (entry.check_integer(key, value, 1, high),) * n_stages
    return entry.integers(key, 1, high, lengths=(n_stages, n_stages))


def _axes_per_stage(entry: Reader, key: str, n_stages: int, dimensions: int, high: int) -> tuple[tuple[int, ...], ...]:
    """One tuple over the axes per stage; a single number stands for all axes, as in nnU-Net."""
    value = entry.raw(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value] * n_stages
    stages = Reader({key: value}, where=entry.where, error=entry.error).array(key, lengths=(n_stages, n_stages))
    result = []
    for index, stage in enumerate(stages):
        place = f"{key}[{index}]"
        if isinstance(stage, int) and not isinstance(stage, bool):
            stage = [stage] * dimensions
        axes = Reader({place: stage}, where=entry.where, error=entry.error)
        result.append(axes.integers(place, 1, high, lengths=(dimensions, dimensions)))
    return tuple(result)


def _kernels(entry: Reader, key: str, n_stages: int, dimensions: int) -> tuple[tuple[int, ...], ...]:
    kernels = _axes_per_stage(entry, key, n_stages, dimensions, 31)
    if any(edge % 2 == 0 for kernel in kernels for edge in kernel):
        raise entry.fail(key, "an even kernel does not keep the image's size")
    return kernels
