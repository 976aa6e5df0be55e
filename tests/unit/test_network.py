"""engine.network: shapes, names and heads of both networks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from engine.architecture import Architecture  # noqa: E402
from engine.network import block_mean, build_network  # noqa: E402

PLAIN = Architecture(
    network="plain",
    dimensions=3,
    features_per_stage=(4, 6, 6),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    n_conv_per_stage=(2, 2, 2),
    n_conv_per_stage_decoder=(2, 1),
    conv_bias=True,
    norm_eps=1e-5,
    negative_slope=0.01,
)
RESIDUAL = replace(PLAIN, network="residual", n_conv_per_stage=(1, 3, 2))
PLAIN_2D = replace(PLAIN, dimensions=2, kernel_sizes=((3, 3),) * 3, strides=((1, 1), (2, 2), (2, 1)), network="plain")
RESIDUAL_2D = replace(PLAIN_2D, network="residual")


@pytest.mark.parametrize(
    ("architecture", "size"),
    [(PLAIN, (4, 8, 8)), (RESIDUAL, (4, 8, 8)), (PLAIN_2D, (8, 8)), (RESIDUAL_2D, (8, 8))],
    ids=["plain 3D", "residual 3D", "plain 2D", "residual 2D"],
)
def test_logits_have_the_size_of_the_image_and_training_gets_all_levels(
    architecture: Architecture, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network = build_network(architecture, channels=2, heads=3).eval()
    image = torch.randn(2, 2, *size)
    with torch.inference_mode():
        logits = network(image)
        network.deep_supervision = True
        levels = network(image)
    assert logits.shape == (2, 3, *size)
    assert len(levels) == 2
    assert torch.equal(levels[0], logits)
    assert levels[1].shape[2:] == tuple(s // k for s, k in zip(size, architecture.strides[1], strict=True))


def test_plain_names_are_those_of_nnunet() -> None:
    names = set(build_network(PLAIN, channels=1, heads=3).state_dict())
    assert {
        "encoder.stages.0.0.convs.0.conv.weight",
        "encoder.stages.2.0.convs.1.norm.bias",
        "decoder.stages.0.convs.1.conv.bias",
        "decoder.transpconvs.1.weight",
        "decoder.seg_layers.0.weight",
        "decoder.seg_layers.1.bias",
    } <= names
    assert not any("all_modules" in name or name.startswith("decoder.encoder") for name in names)


def test_residual_skip_has_a_projection_only_where_channels_change() -> None:
    names = set(build_network(RESIDUAL, channels=1, heads=3).state_dict())
    assert "encoder.stem.convs.0.conv.weight" in names
    # Stage 1 strides and widens: the pool is skip.0, the projection skip.1, and it has no bias.
    assert "encoder.stages.1.blocks.0.skip.1.conv.weight" in names
    assert "encoder.stages.1.blocks.0.skip.1.conv.bias" not in names
    # Stage 2 strides but keeps its 6 channels; stage 0 does neither.
    assert not any(
        name.startswith(("encoder.stages.2.blocks.0.skip", "encoder.stages.0.blocks.0.skip")) for name in names
    )


def test_first_stage_projects_without_pool_when_only_channels_change() -> None:
    # The stem has the width of stage 0, so only a stage without stride that widens has skip.0.
    flat = replace(RESIDUAL, strides=((1, 1, 1), (1, 1, 1), (1, 2, 2)))
    names = set(build_network(flat, channels=1, heads=3).state_dict())
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in names


def test_activation_uses_the_slope_of_the_plans() -> None:
    network = build_network(replace(PLAIN, negative_slope=0.2), channels=1, heads=2)
    slopes = {module.negative_slope for module in network.modules() if isinstance(module, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_nothing_is_allocated_under_meta() -> None:
    huge = replace(PLAIN, features_per_stage=(4096, 4096, 4096))
    with torch.device("meta"):
        network = build_network(huge, channels=1, heads=2)
    assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("block", [(2, 2, 2), (1, 2, 2), (4, 1, 2)])
def test_the_deterministic_pooling_is_torchs(block: tuple[int, int, int]) -> None:
    features = torch.randn(2, 3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    found, expected = block_mean(ours, block), nn.AvgPool3d(block, block)(theirs)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    expected.square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
