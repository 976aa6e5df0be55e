"""nnU-Net's two U-Nets, 2D and 3D, built from an Architecture (torch; for import and training only).

Parameter names are those of nnU-Net's checkpoints once the copies are dropped (engine/checkpoint.py):
`encoder.stages.0.0.convs.0.conv.weight`, `decoder.transpconvs.0.bias`, `decoder.seg_layers.2.weight`, ...
Shape legend: B batch, C channels, K heads, then (Y, X) or (Z, Y, X).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from engine.architecture import Architecture

_NEGATIVE_SLOPE = 0.01  # nnU-Net's initialisation has it, whatever the plans' slope is

_CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_NORM: dict[int, type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class BlockPool3d(nn.AvgPool3d):
    """The mean of each block of voxels. torch has no deterministic gradient of its own pooling on a GPU."""

    def forward(self, features: Tensor) -> Tensor:
        if features.is_cuda and features.requires_grad and torch.are_deterministic_algorithms_enabled():
            return block_mean(features, self.kernel_size)  # type: ignore[arg-type]
        return super().forward(features)


def block_mean(features: Tensor, block: Sequence[int]) -> Tensor:
    """(B, C, *size) → (B, C, *size // block); each size is a multiple of the block's."""
    sizes = [n for size, edge in zip(features.shape[2:], block, strict=True) for n in (size // edge, edge)]
    return features.reshape(*features.shape[:2], *sizes).mean(tuple(range(3, 3 + 2 * len(block), 2)))


_POOL: dict[int, type[nn.AvgPool2d] | type[nn.AvgPool3d]] = {2: nn.AvgPool2d, 3: BlockPool3d}


class ConvNorm(nn.Module):
    """Convolution that keeps the size but for its stride, instance norm and, if `activate`, LeakyReLU."""

    def __init__(
        self,
        architecture: Architecture,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        *,
        bias: bool,
        activate: bool = True,
    ) -> None:
        super().__init__()
        dimensions = architecture.dimensions
        padding = tuple((edge - 1) // 2 for edge in kernel)
        self.conv = _CONV[dimensions](channels_in, channels_out, kernel, stride, padding, bias=bias)  # type: ignore[arg-type]
        self.norm = _NORM[dimensions](channels_out, eps=architecture.norm_eps, affine=True)
        self.nonlin = nn.LeakyReLU(architecture.negative_slope, inplace=True) if activate else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.nonlin(self.norm(self.conv(features)))
        return result


class StackedConvs(nn.Module):
    """`count` ConvNorms one after the other; the first one changes channels and resolution."""

    def __init__(
        self,
        architecture: Architecture,
        count: int,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        one = (1,) * architecture.dimensions
        bias = architecture.conv_bias
        self.convs = nn.Sequential(
            ConvNorm(architecture, channels_in, channels_out, kernel, stride, bias=bias),
            *(ConvNorm(architecture, channels_out, channels_out, kernel, one, bias=bias) for _ in range(count - 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.convs(features)
        return result


class ResidualBlock(nn.Module):
    """Two convolutions and a skip (ResNet-D: the skip pools where the block strides, and projects with a 1x1
    convolution without bias where the channels change)."""

    def __init__(
        self,
        architecture: Architecture,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        one = (1,) * architecture.dimensions
        bias = architecture.conv_bias
        self.conv1 = ConvNorm(architecture, channels_in, channels_out, kernel, stride, bias=bias)
        self.conv2 = ConvNorm(architecture, channels_out, channels_out, kernel, one, bias=bias, activate=False)
        self.nonlin = nn.LeakyReLU(architecture.negative_slope, inplace=True)
        skip: list[nn.Module] = []
        if any(step != 1 for step in stride):
            skip.append(_POOL[architecture.dimensions](stride, stride))  # type: ignore[arg-type]
        if channels_in != channels_out:
            skip.append(ConvNorm(architecture, channels_in, channels_out, one, one, bias=False, activate=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.nonlin(self.conv2(self.conv1(features)) + self.skip(features))
        return result


class ResidualStage(nn.Module):
    """`count` residual blocks; the first one changes channels and resolution."""

    def __init__(
        self,
        architecture: Architecture,
        count: int,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        one = (1,) * architecture.dimensions
        self.blocks = nn.Sequential(
            ResidualBlock(architecture, channels_in, channels_out, kernel, stride),
            *(ResidualBlock(architecture, channels_out, channels_out, kernel, one) for _ in range(count - 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.blocks(features)
        return result


class PlainEncoder(nn.Module):
    def __init__(self, architecture: Architecture, channels: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for count, features, kernel, stride in _stages(architecture):
            # nnU-Net wraps each stage in a Sequential of one; the name of every parameter depends on it.
            stages.append(nn.Sequential(StackedConvs(architecture, count, channels, features, kernel, stride)))
            channels = features
        self.stages = nn.Sequential(*stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        return _outputs(self.stages, image)


class ResidualEncoder(nn.Module):
    def __init__(self, architecture: Architecture, channels: int) -> None:
        super().__init__()
        width = architecture.features_per_stage[0]
        one = (1,) * architecture.dimensions
        self.stem = StackedConvs(architecture, 1, channels, width, architecture.kernel_sizes[0], one)
        stages: list[nn.Module] = []
        for count, features, kernel, stride in _stages(architecture):
            stages.append(ResidualStage(architecture, count, width, features, kernel, stride))
            width = features
        self.stages = nn.Sequential(*stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        return _outputs(self.stages, self.stem(image))


class Decoder(nn.Module):
    """From the bottleneck up; entry j of each list belongs to level j, 0 being the lowest resolution."""

    def __init__(self, architecture: Architecture, heads: int) -> None:
        super().__init__()
        features, strides = architecture.features_per_stage, architecture.strides
        dimensions = architecture.dimensions
        one = (1,) * dimensions
        self.stages = nn.ModuleList()
        self.transpconvs = nn.ModuleList()
        self.seg_layers = nn.ModuleList()
        for level, count in enumerate(architecture.n_conv_per_stage_decoder):
            stage = architecture.n_stages - 2 - level
            below, here, stride = features[stage + 1], features[stage], strides[stage + 1]
            self.transpconvs.append(
                _TRANSPOSED[dimensions](below, here, stride, stride, bias=architecture.conv_bias)  # type: ignore[arg-type]
            )
            kernel = architecture.kernel_sizes[stage]
            self.stages.append(StackedConvs(architecture, count, 2 * here, here, kernel, one))
            self.seg_layers.append(_CONV[dimensions](here, heads, 1))

    def forward(self, skips: Sequence[Tensor], *, all_heads: bool) -> list[Tensor]:
        """Logits, full resolution first; only that one unless `all_heads`."""
        features = skips[-1]
        logits: list[Tensor] = []
        last = len(self.stages) - 1
        for level, (up, stage, head) in enumerate(zip(self.transpconvs, self.stages, self.seg_layers, strict=True)):
            features = stage(torch.cat((up(features), skips[-2 - level]), dim=1))
            if all_heads or level == last:
                logits.insert(0, head(features))
        return logits


class UNet(nn.Module):
    """Image (B, C, ...) to logits (B, K, ...). With `deep_supervision` the list of logits of all levels, full
    resolution first, which training needs; otherwise the full resolution alone. The heads of the lower levels are
    parameters in both cases, as in nnU-Net's checkpoints."""

    def __init__(self, encoder: nn.Module, decoder: Decoder, *, deep_supervision: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.deep_supervision = deep_supervision

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        logits: list[Tensor] = self.decoder(self.encoder(image), all_heads=self.deep_supervision)
        return logits if self.deep_supervision else logits[0]


class PlainConvUNet(UNet):
    def __init__(self, architecture: Architecture, channels: int, heads: int, *, deep_supervision: bool) -> None:
        super().__init__(
            PlainEncoder(architecture, channels), Decoder(architecture, heads), deep_supervision=deep_supervision
        )


class ResidualEncoderUNet(UNet):
    def __init__(self, architecture: Architecture, channels: int, heads: int, *, deep_supervision: bool) -> None:
        super().__init__(
            ResidualEncoder(architecture, channels), Decoder(architecture, heads), deep_supervision=deep_supervision
        )


def build_network(
    architecture: Architecture, *, channels: int, heads: int, deep_supervision: bool = False
) -> PlainConvUNet | ResidualEncoderUNet:
    """A network with torch's default initialisation. `channels` counts image channels and, in a cascade, one per
    foreground label. Under `torch.device("meta")` nothing is allocated."""
    kind = PlainConvUNet if architecture.network == "plain" else ResidualEncoderUNet
    return kind(architecture, channels, heads, deep_supervision=deep_supervision)


def initialize(network: nn.Module, rng: np.random.Generator) -> None:
    """Draws the weights as nnU-Net does: Kaiming normal for the slope of LeakyReLU, biases 0; in a residual block the
    second norm starts at 0, so that the block starts as its skip (nnU-Net v2)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=_NEGATIVE_SLOPE, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.InstanceNorm2d | nn.InstanceNorm3d) and name.endswith(".conv2.norm"):
            nn.init.zeros_(module.weight)


def _stages(architecture: Architecture) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    return list(
        zip(
            architecture.n_conv_per_stage,
            architecture.features_per_stage,
            architecture.kernel_sizes,
            architecture.strides,
            strict=True,
        )
    )


def _outputs(stages: nn.Sequential, features: Tensor) -> list[Tensor]:
    outputs = []
    for stage in stages:
        features = stage(features)
        outputs.append(features)
    return outputs
