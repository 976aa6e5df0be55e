"""engine.topology: nnU-Net's pooling rule and memory estimate."""

from __future__ import annotations

import pytest

from engine.architecture import NetworkKind
from engine.topology import feature_map_voxels, topology

PLAIN_BLOCKS = (2,) * 8
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6)


def _estimate(
    network: NetworkKind, spacing: tuple[float, ...], patch: tuple[int, ...], num_outputs: int, stages: int
) -> int:
    shape = topology(spacing, patch)
    assert shape.n_stages == stages
    most = 320 if len(patch) == 3 else 512
    return feature_map_voxels(
        network,
        shape,
        features_per_stage=[min(most, 32 * 2**stage) for stage in range(stages)],
        blocks_per_stage=(PLAIN_BLOCKS if network == "plain" else RESIDUAL_BLOCKS)[:stages],
        convs_per_decoder_stage=[2 if network == "plain" else 1] * (stages - 1),
        num_outputs=num_outputs,
    )


@pytest.mark.requirement("ART-06", open="a probe on a GPU")
@pytest.mark.parametrize(
    ("network", "spacing", "patch", "stages", "values"),
    [
        ("residual", (1.0, 1.0, 1.0), (128, 128, 128), 6, 557_420_544),
        ("plain", (1.0, 1.0, 1.0), (128, 128, 128), 6, 452_796_416),
        ("plain", (3.6, 0.625, 0.625), (20, 320, 256), 7, 483_315_200),
        ("residual", (3.6, 0.625, 0.625), (20, 320, 256), 7, 706_336_000),
    ],
)
def test_the_memory_estimate_is_nnunets(
    network: NetworkKind, spacing: tuple[float, ...], patch: tuple[int, ...], stages: int, values: int
) -> None:
    assert _estimate(network, spacing, patch, 3, stages) == values


def test_coarse_axes_are_pooled_later_and_get_flat_kernels_until_then() -> None:
    shape = topology((3.6, 0.625, 0.625), (20, 320, 256))
    assert shape.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert shape.kernel_sizes == ((1, 3, 3), (1, 3, 3), *((3, 3, 3),) * 5)
    assert shape.divisors == (4, 64, 64)


def test_the_patch_is_padded_up_to_what_the_strides_need() -> None:
    assert topology((1.0, 1.0, 1.0), (36, 50, 35)).patch_size == (40, 56, 40)
    assert topology((1.0, 1.0), (321.5, 316.5)).patch_size == (384, 320)


def test_an_axis_alone_is_pooled_only_from_twelve_on() -> None:
    assert topology((1.0, 1.0, 1.0), (8, 4, 4)).n_stages == 1
    assert topology((1.0, 1.0, 1.0), (12, 4, 4)).strides == ((1, 1, 1), (2, 1, 1))


def test_what_is_too_small_to_pool_keeps_its_size() -> None:
    shape = topology((1.0, 1.0, 1.0), (7, 7, 7))
    assert shape.n_stages == 1
    assert shape.patch_size == (7, 7, 7)
    assert shape.kernel_sizes == ((3, 3, 3),)
