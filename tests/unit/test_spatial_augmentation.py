"""engine.spatial_augmentation: phantoms land where the matrix says, labels follow the image."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.peers import require_peer

require_peer("torch")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from engine.augmentation_profile import ARTICLE, NNUNET, AugmentationPlan, SampleDraw  # noqa: E402
from engine.spatial_augmentation import (  # noqa: E402
    OUTSIDE,
    affine_matrix,
    centre_crop,
    sample_image,
    sample_labels,
    source_places,
    swap_labels,
    transform_sample,
)


def _values(array: Tensor) -> set[float]:
    return set(array.flatten().tolist())


def _plan(patch: tuple[int, ...], **more: object) -> AugmentationPlan:
    fields = {"profile": NNUNET, "spacing_mm": (1.0,) * len(patch), "mirror_axes": tuple(range(len(patch)))} | more
    return AugmentationPlan(patch_size=patch, **fields)  # type: ignore[arg-type]


def _ball(shape: tuple[int, ...], centre: np.ndarray, radius: float = 4.0) -> tuple[Tensor, Tensor]:
    """A smooth spot and its label map, at an offset (voxels) from the middle of the array."""
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
    image = torch.from_numpy(np.exp(-0.5 * (distance / radius) ** 2).astype(np.float32))
    return image[None], torch.from_numpy((distance < radius).astype(np.int16))[None]


def _centre_of_mass(array: Tensor) -> np.ndarray:
    weights = array.numpy().astype(np.float64)
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in array.shape), indexing="ij")
    return np.array([(axis * weights).sum() / weights.sum() for axis in axes])


@pytest.mark.requirement("ART-09")
@pytest.mark.parametrize(
    ("patch", "angles", "scales"),
    [
        ((48, 48, 48), (0.4, 0.0, 0.0), None),
        ((48, 48, 48), (0.0, 0.5, 0.0), None),
        ((48, 48, 48), (0.0, 0.0, -0.3), None),
        ((48, 48, 48), (0.3, -0.2, 0.5), (0.8, 0.8, 0.8)),
        ((30, 56, 40), (0.2, 0.3, -0.4), (1.2, 0.9, 1.1)),
        ((56, 40), (1.1,), (1.3, 0.9)),
    ],
    ids=["about 0", "about 1", "about 2", "three angles and a scale", "anisotropic patch", "in the plane"],
)
def test_a_spot_lands_where_the_matrix_says(
    patch: tuple[int, ...], angles: tuple[float, ...], scales: tuple[float, ...] | None
) -> None:
    plan = _plan(patch)
    draw = SampleDraw(angles_rad=angles, scales=scales)
    matrix = affine_matrix(angles, scales, len(patch))
    wanted = np.array((4.0, -6.0, 5.0))[: len(patch)]
    initial = tuple(2 * size for size in patch)
    image, labels = transform_sample(*_ball(initial, matrix @ wanted), draw, plan)
    assert image.shape == (1, *patch)
    assert _centre_of_mass(image[0]) == pytest.approx(wanted, abs=0.05)
    assert _centre_of_mass((labels[0] == 1).float()) == pytest.approx(wanted, abs=0.2)


def test_a_quarter_turn_is_the_turn_of_the_array() -> None:
    cube = torch.randn(1, 9, 9, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(-1, 5, (1, 9, 9, 9), generator=torch.Generator().manual_seed(1), dtype=torch.int16)
    for about, axes in ((0, (2, 3)), (1, (3, 1)), (2, (1, 2))):
        angles = tuple(math.pi / 2 if axis == about else 0.0 for axis in range(3))
        turned = transform_sample(cube, labels, SampleDraw(angles_rad=angles), _plan((9, 9, 9)))
        expected = torch.rot90(cube, -1, axes), torch.rot90(labels, -1, axes)
        torch.testing.assert_close(turned[0], expected[0], rtol=0, atol=1e-4)
        assert torch.equal(turned[1], expected[1])


def test_a_scale_above_one_makes_things_smaller() -> None:
    image, labels = _ball((60, 60, 60), np.zeros(3), radius=10.0)
    volumes = [
        transform_sample(image, labels, SampleDraw(scales=(scale,) * 3), _plan((40, 40, 40)))[1].clamp_min(0).sum()
        for scale in (1.0, 1.25)
    ]
    assert float(volumes[1] / volumes[0]) == pytest.approx(1.25**-3, rel=0.05)


def test_beyond_the_border_images_are_0_and_labels_outside() -> None:
    image, labels = torch.ones(1, 20, 20, 20), torch.ones(1, 20, 20, 20, dtype=torch.int16)
    seen, found = transform_sample(image, labels, SampleDraw(scales=(1.5,) * 3), _plan((20, 20, 20)))
    assert float(seen[0, 10, 10, 10]) == pytest.approx(1.0)
    assert int(found[0, 10, 10, 10]) == 1
    assert float(seen[0, 0, 0, 0]) == 0.0
    assert int(found[0, 0, 0, 0]) == OUTSIDE
    # The image ends half a voxel beyond its last centre: (20 / 1.5) voxels along each axis.
    assert (found[0] == 1).sum() ** (1 / 3) == pytest.approx(20 / 1.5, abs=1.0)


@pytest.mark.parametrize("initial", [(21, 23, 22), (21, 24)])
def test_labels_are_the_argmax_of_interpolated_masks(initial: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(1, 1, *(4,) * len(initial), generator=generator)
    mode = "trilinear" if len(initial) == 3 else "bilinear"
    labels = (functional.interpolate(coarse, initial, mode=mode)[0] * 7).floor().to(torch.int16) - 1
    plan = _plan(tuple(size - 3 for size in initial))
    draw = SampleDraw(angles_rad=(0.3, 0.4, -0.2)[: 3 if len(initial) == 3 else 1], scales=(1.2,) * len(initial))
    places = source_places(draw, plan, initial, labels.device)
    values = range(-1, 7)
    # The border is a label too: its mask is 1 beyond the image.
    masks = []
    for value in values:
        beyond = float(value == OUTSIDE)
        masks.append(sample_image((labels == value).float() - beyond, places) + beyond)
    shares = torch.cat(masks)
    best = shares.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > 1e-3
    expected = best.indices[0] - 1
    found = sample_labels(labels, places)[0]
    assert clear.float().mean() > 0.95
    assert torch.equal(found[clear].long(), expected[clear])
    assert _values(found) <= set(values)


def test_slices_of_a_flat_patch_are_transformed_alike_and_stay_apart() -> None:
    plan = _plan((4, 24, 20))
    assert plan.is_dummy_2d
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 4, 30, 30, generator=generator)
    labels = torch.randint(0, 3, (1, 4, 30, 30), generator=generator, dtype=torch.int16)
    draw = SampleDraw(angles_rad=(0.7,), scales=(1.1, 1.1))
    seen, found = transform_sample(image, labels, draw, plan)
    flat = _plan((24, 20))
    for z in range(4):
        one, label = transform_sample(image[:, z], labels[:, z], draw, flat)
        assert torch.equal(seen[:, z], one)
        assert torch.equal(found[:, z], label)


@pytest.mark.parametrize("size", [(40, 56, 40), (73, 80, 64)])
def test_without_a_spatial_draw_the_middle_is_cut_out_unchanged(size: tuple[int, int, int]) -> None:
    image = torch.randn(1, 73, 80, 64)
    labels = torch.randint(-1, 3, (1, 73, 80, 64), dtype=torch.int16)
    plan = _plan((40, 56, 40))
    seen, found = transform_sample(centre_crop(image, size), centre_crop(labels, size), SampleDraw(), plan)
    # As nnU-Net cuts: half of 73, rounded down, less half of 40.
    assert torch.equal(seen, image[:, 16:56, 12:68, 12:52])
    assert torch.equal(found, labels[:, 16:56, 12:68, 12:52])
    seen.zero_()
    assert image.any()


@pytest.mark.requirement("ART-09")
def test_mirroring_along_the_lateral_axis_swaps_paired_labels() -> None:
    labels = torch.zeros(1, 6, 6, 6, dtype=torch.int16)
    labels[0, :, :, 0], labels[0, :, :, 5], labels[0, 0, :, 2], labels[0, 5, 5, 3] = 1, 2, 3, OUTSIDE
    plan = _plan((6, 6, 6), lateral_axis=2, paired_labels=((1, 2),))
    image = torch.randn(1, 6, 6, 6)
    seen, found = transform_sample(image, labels, SampleDraw(mirrored_axes=(2,)), plan)
    assert torch.equal(seen, image.flip(3))
    # Left is on the left again, what has no side moved along.
    assert (found[0, :, :, 0] == 1).all()
    assert (found[0, :, :, 5] == 2).all()
    assert (found[0, 0, :, 3] == 3).all()
    assert int(found[0, 5, 5, 2]) == OUTSIDE
    other = transform_sample(image, labels, SampleDraw(mirrored_axes=(0, 1)), plan)[1]
    assert torch.equal(other, labels.flip((1, 2)))


def test_swapping_twice_changes_nothing() -> None:
    labels = torch.randint(-1, 6, (1, 5, 5), dtype=torch.int16)
    pairs = ((1, 2), (4, 5))
    assert torch.equal(swap_labels(swap_labels(labels, pairs), pairs), labels)


@pytest.mark.requirement("ART-09")
def test_control_points_that_move_alike_shift_the_image() -> None:
    plan = _plan((32, 40, 36), profile=ARTICLE, spacing_mm=(2.0, 1.0, 1.5))
    points = np.zeros((3, 6, 5, 5), dtype=np.float32)
    points[0], points[2] = 3.0, -2.0
    image, labels = _ball((50, 60, 60), np.array((3.0, 0.0, -2.0)))
    seen, _ = transform_sample(image, labels, SampleDraw(control_points=points), plan)
    assert _centre_of_mass(seen[0]) == pytest.approx((0.0, 0.0, 0.0), abs=0.02)


@pytest.mark.requirement("ART-09")
def test_one_control_point_moves_its_surroundings_as_a_cubic_b_spline() -> None:
    plan = _plan((32, 40, 36), profile=replace(ARTICLE, elastic_grid_mm=10.0))
    points = np.zeros((3, 7, 7, 7), dtype=np.float32)
    points[1, 2, 3, 3] = 1.0  # stands at voxel 10, 20, 20
    still = source_places(SampleDraw(scales=(1.0,) * 3), plan, (32, 40, 36), torch.device("cpu"))
    moved = source_places(SampleDraw(control_points=points), plan, (32, 40, 36), torch.device("cpu")) - still
    assert not moved[0].any()
    assert not moved[2].any()
    assert float(moved[1].max()) == pytest.approx((2 / 3) ** 3, abs=1e-4)
    assert float(moved[1, 10, 20, 20]) == pytest.approx((2 / 3) ** 3, abs=1e-4)
    assert float(moved[1, 10, 20, 30]) == pytest.approx((2 / 3) ** 2 / 6, abs=1e-4)
    assert float(moved[1, 31, 20, 20]) == pytest.approx(0.0, abs=1e-4)
