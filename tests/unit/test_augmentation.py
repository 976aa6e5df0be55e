"""engine.augmentation with its intensity transforms and the cascade's channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from tests.support.peers import require_peer

require_peer("torch")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from engine.augmentation import UNCHANGED, augment_batch, draw_batch  # noqa: E402
from engine.augmentation_profile import (  # noqa: E402
    ARTICLE,
    NNUNET,
    AugmentationPlan,
    AugmentationProfile,
    PreviousStageDraw,
    SampleDraw,
)
from engine.cascade_augmentation import dilate, label_channels, spoil_labels  # noqa: E402
from engine.intensity_augmentation import (  # noqa: E402
    blur,
    change_contrast,
    change_gamma,
    change_intensities,
    gaussian_kernel,
    lower_resolution,
)

PATCH = (12, 14, 10)


def _values(array: Tensor) -> set[float]:
    return set(array.flatten().tolist())


def _plan(profile: AugmentationProfile = NNUNET, **more: object) -> AugmentationPlan:
    fields = {"patch_size": PATCH, "spacing_mm": (1.0, 1.0, 1.0), "mirror_axes": (0, 1, 2)} | more
    return AugmentationPlan(profile=profile, **fields)  # type: ignore[arg-type]


def _read(plan: AugmentationPlan, samples: int, channels: int = 1, maps: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = plan.initial_patch_size
    images = [torch.randn(channels, *size, generator=generator) for _ in range(samples)]
    labels = [torch.randint(-1, 3, (maps, *size), generator=generator, dtype=torch.int16) for _ in range(samples)]
    return images, labels


def _channel(seed: int = 0) -> Tensor:
    return torch.randn(PATCH, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.requirement("ART-09")
@pytest.mark.parametrize("profile", [NNUNET, ARTICLE], ids=["nnunet", "article"])
def test_a_sample_is_the_same_whatever_else_is_in_the_batch(profile: AugmentationProfile) -> None:
    plan = _plan(profile)
    images, labels = _read(plan, 8, channels=2)
    draws = draw_batch(plan, 2, range(8), seed=4, epoch=3, iteration=9)
    assert any(draw.is_spatial for draw in draws)
    together = augment_batch(images, labels, draws, plan)
    for part in (range(0, 3), range(3, 8)):
        redrawn = draw_batch(plan, 2, part, seed=4, epoch=3, iteration=9)
        apart = augment_batch([images[i] for i in part], [labels[i] for i in part], redrawn, plan)
        assert torch.equal(apart[0], together[0][part.start : part.stop])
        assert torch.equal(apart[1], together[1][part.start : part.stop])
    another = augment_batch(images, labels, draw_batch(plan, 2, range(8), seed=4, epoch=3, iteration=10), plan)
    assert not torch.equal(another[0], together[0])


def test_what_was_read_is_not_changed() -> None:
    plan = _plan()
    images, labels = _read(plan, 6)
    before = [image.clone() for image in images], [label.clone() for label in labels]
    for iteration in range(10):
        augment_batch(images, labels, draw_batch(plan, 1, range(6), seed=0, epoch=0, iteration=iteration), plan)
    assert all(torch.equal(a, b) for a, b in zip(images, before[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(labels, before[1], strict=True))


def test_a_batch_has_the_size_of_the_patch_and_no_negative_label() -> None:
    plan = _plan()
    draws = [UNCHANGED, SampleDraw(scales=(1.4,) * 3), SampleDraw(angles_rad=(0.1, 0.2, 0.3), mirrored_axes=(1,))]
    batch, targets = augment_batch(*_read(plan, 3, channels=2), draws, plan)
    assert (batch.shape, batch.dtype) == ((3, 2, *PATCH), torch.float32)
    assert (targets.shape, targets.dtype) == ((3, *PATCH), torch.int16)
    assert _values(targets) == {0, 1, 2}


def test_masked_channels_are_0_outside_the_nonzero_mask_after_all_transforms() -> None:
    plan = _plan(masked_channels=(1,))
    images, labels = _read(plan, 1, channels=2)
    labels[0][:, :, :16] = -1
    draw = SampleDraw(noise_sigma=0.1, mirrored_axes=(1,))
    batch, _ = augment_batch(images, labels, [draw], plan)
    start = plan.initial_patch_size[1] // 2 - PATCH[1] // 2
    outside = slice(PATCH[1] - (16 - start), None)
    assert not batch[0, 1, :, outside].any()
    assert batch[0, 0, :, outside].all()


def test_samples_that_do_not_fit_are_refused() -> None:
    plan = _plan()
    images, labels = _read(plan, 2)
    with pytest.raises(ValueError, match="must fit"):
        augment_batch(images, labels, [UNCHANGED], plan)
    with pytest.raises(ValueError, match="of 2 maps"):
        augment_batch(images, labels, [UNCHANGED] * 2, _plan(previous_labels=(1,)))


def test_noise_has_the_drawn_deviation_and_belongs_to_its_seed() -> None:
    plan = _plan()
    flat = torch.zeros(2, 40, 40, 40)
    change_intensities(flat, SampleDraw(noise_sigma=0.07, noise_seed=1), plan)
    assert float(flat.std()) == pytest.approx(0.07, rel=0.02)
    assert abs(float(flat.mean())) < 0.002
    again, other = torch.zeros(2, 2, 40, 40, 40)
    change_intensities(again, SampleDraw(noise_sigma=0.07, noise_seed=1), plan)
    change_intensities(other, SampleDraw(noise_sigma=0.07, noise_seed=2), plan)
    assert torch.equal(again, flat)
    assert not torch.equal(other, flat)


@pytest.mark.requirement("ART-09")
def test_noise_of_the_article_is_a_part_of_each_channels_range() -> None:
    image = torch.zeros(2, 40, 40, 40)
    image[0, 0, 0, 0], image[1, 0, 0, 0] = 5.0, 200.0
    clean = image.clone()
    change_intensities(image, SampleDraw(noise_sigma=0.01, noise_seed=3), _plan(ARTICLE))
    assert [float(x) for x in (image - clean).flatten(1).std(1)] == pytest.approx([0.05, 2.0], rel=0.02)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0])
def test_a_blurred_point_has_the_kernel_along_each_axis_and_the_border_reflects(sigma: float) -> None:
    point = torch.zeros(PATCH)
    point[6, 7, 5] = 1.0
    blur(point, (sigma, sigma, sigma))
    kernel = gaussian_kernel(sigma)
    reach = len(kernel) // 2
    assert float(point.sum()) == pytest.approx(1.0, abs=1e-6)
    line = point[6 - reach : 7 + reach, 7, 5] / point[6, 7, 5]
    assert line.tolist() == pytest.approx([weight / kernel[reach] for weight in kernel], abs=1e-6)

    channel = _channel()
    expected = channel.numpy().astype(np.float64)
    for axis in range(3):
        expected = ndimage.correlate1d(expected, kernel, axis, mode="mirror")
    blur(channel, (sigma,) * 3)
    assert np.abs(channel.numpy() - expected).max() < 1e-5


def test_a_kernel_is_six_sigma_wide_odd_and_sums_to_one() -> None:
    assert [len(gaussian_kernel(sigma)) for sigma in (0.5, 0.6, 0.75, 0.95, 1.0)] == [3, 5, 5, 7, 7]
    assert sum(gaussian_kernel(0.8)) == pytest.approx(1.0)


def test_blur_reaches_across_an_axis_shorter_than_its_kernel() -> None:
    channel = _channel()[:2]
    expected = channel.mean()
    blur(channel, (1.0, 1.0, 1.0))
    assert torch.isfinite(channel).all()
    assert float(channel.mean()) == pytest.approx(float(expected), abs=0.05)
    single = _channel()[:1].clone()
    blur(single, (1.0, 0.01, 0.01))
    torch.testing.assert_close(single, _channel()[:1])


def test_brightness_is_a_factor_per_channel() -> None:
    image = torch.stack((_channel(0), _channel(1)))
    expected = image * torch.tensor((1.1, 0.8))[:, None, None, None]
    change_intensities(image, SampleDraw(brightness=(1.1, 0.8)), _plan())
    assert torch.equal(image, expected)


def test_contrast_stretches_about_the_mean_and_keeps_the_range() -> None:
    channel, before = _channel(), _channel()
    change_contrast(channel, 1.2)
    mean = before.mean()
    expected = ((before - mean) * 1.2 + mean).clamp(before.min(), before.max())
    torch.testing.assert_close(channel, expected)


def test_gamma_keeps_mean_and_deviation_and_inverted_gamma_works_from_the_other_end() -> None:
    before, channel, image = _channel(), _channel(), _channel()[None]
    change_gamma(channel, 1.4)
    assert float(channel.mean()) == pytest.approx(float(before.mean()), abs=1e-4)
    assert float(channel.std()) == pytest.approx(float(before.std()), rel=1e-4)
    assert torch.equal(channel.flatten().argsort(), before.flatten().argsort())
    change_intensities(image, SampleDraw(inverted_gamma=(1.4,)), _plan())
    inverted = -before
    change_gamma(inverted, 1.4)
    assert torch.equal(image[0], -inverted)
    # A flat channel has no range to scale to.
    flat = torch.full(PATCH, 3.0)
    change_gamma(flat, 1.4)
    assert torch.equal(flat, torch.full(PATCH, 3.0))


def test_low_resolution_takes_the_nearest_voxels_and_keeps_the_first_axis_of_a_flat_patch() -> None:
    channel, kept = _channel(), _channel()
    lower_resolution(channel, 0.5, keep_first_axis=False)
    lower_resolution(kept, 0.5, keep_first_axis=True)
    before = _channel()
    # Half the size: of two voxels the second is taken, and the first and last of the result are it.
    assert float(channel[0, 0, 0]) == pytest.approx(float(before[1, 1, 1]))
    assert float(kept[0, 0, 0]) == pytest.approx(float(before[0, 1, 1]))
    assert float(kept[5, 0, 0]) == pytest.approx(float(before[5, 1, 1]))


def test_the_previous_stage_becomes_channels_that_turn_with_the_image() -> None:
    plan = _plan(previous_labels=(1, 2))
    images, labels = _read(plan, 2, maps=2)
    draws = [UNCHANGED, SampleDraw(scales=(1.1,) * 3, mirrored_axes=(0, 2))]
    batch, targets = augment_batch(images, [sample.flip(0) for sample in labels], draws, plan)
    swapped = augment_batch(images, labels, draws, plan)
    assert batch.shape == (2, 3, *PATCH)
    # With the two maps exchanged, what was the target is in the channels.
    assert torch.equal(batch[:, 1:], torch.stack([swapped[1] == 1, swapped[1] == 2], dim=1).float())
    assert torch.equal(swapped[0][:, 1:], torch.stack([targets == 1, targets == 2], dim=1).float())


def _ball_mask(size: int, radius: float) -> Tensor:
    axes = np.ogrid[:size, :size, :size]
    return torch.from_numpy(sum((axis - size // 2) ** 2 for axis in axes) <= radius**2)


@pytest.mark.parametrize("radius", [1.0, 2.5, 4.0])
def test_dilation_reaches_the_radius_and_stops_at_the_border(radius: float) -> None:
    mask = torch.zeros(15, 12, 13, dtype=torch.bool)
    mask[0, 5, 5] = mask[9, 11, 6] = True
    expected = ndimage.distance_transform_edt(~mask.numpy()) <= radius
    assert np.array_equal(dilate(mask, radius).numpy(), expected)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("dilate", lambda mask: dilate(mask, 2.0)),
        ("erode", lambda mask: ~dilate(~mask, 2.0)),
        ("open", lambda mask: dilate(~dilate(~mask, 2.0), 2.0)),
        ("close", lambda mask: ~dilate(~dilate(mask, 2.0), 2.0)),
    ],
)
def test_what_a_label_gains_the_others_lose(operator: str, expected: Callable[[Tensor], Tensor]) -> None:
    labels = torch.zeros(21, 21, 21, dtype=torch.int16)
    labels[14:] = 2
    labels[_ball_mask(21, 5.0)] = 1
    labels[10, 10, 10] = 0
    channels = label_channels(labels, (1, 2))
    spoil_labels(channels, PreviousStageDraw(morphology=((0, operator, 2.0),)))  # type: ignore[arg-type]
    wanted = expected(labels == 1)
    assert not torch.equal(wanted, labels == 1)
    assert torch.equal(channels[0] > 0, wanted)
    assert torch.equal(channels[1] > 0, (labels == 2) & ~(wanted & (labels != 1)))


def test_one_component_is_dropped_unless_it_covers_too_much() -> None:
    labels = torch.zeros(20, 20, 20, dtype=torch.int16)
    labels[:4], labels[6:8, :2, :2], labels[10:12, 5:9, 5:9] = 1, 1, 1  # the first is a fifth of the patch
    for pick, gone in (
        (0.0, (slice(6, 8), slice(0, 2), slice(0, 2))),
        (0.99, (slice(10, 12), slice(5, 9), slice(5, 9))),
    ):
        channels = label_channels(labels, (1,))
        spoil_labels(channels, PreviousStageDraw(removals=((0, pick),)))
        expected = (labels == 1).float()
        expected[gone] = 0
        assert torch.equal(channels[0], expected)


def test_a_whole_epoch_keeps_images_finite_and_labels_known() -> None:
    plan = _plan(previous_labels=(1, 2), masked_channels=(0,), lateral_axis=2, paired_labels=((1, 2),))
    images, labels = _read(plan, 4, channels=2, maps=2)
    for iteration in range(25):
        draws = draw_batch(plan, 2, range(4), seed=7, epoch=1, iteration=iteration)
        batch, targets = augment_batch(images, labels, draws, plan)
        assert torch.isfinite(batch).all()
        assert _values(targets) <= {0, 1, 2}
        assert _values(batch[:, 2:]) <= {0.0, 1.0}


def test_2d_samples_are_augmented_in_their_plane() -> None:
    plan = _plan(patch_size=(24, 20), spacing_mm=(1.0, 1.0), mirror_axes=(0, 1))
    images, labels = _read(plan, 6)
    for iteration in range(10):
        draws = draw_batch(plan, 1, range(6), seed=2, epoch=0, iteration=iteration)
        batch, targets = augment_batch(images, labels, draws, plan)
        assert batch.shape == (6, 1, 24, 20)
        assert targets.shape == (6, 24, 20)
        assert torch.isfinite(batch).all()
    assert math.prod(plan.initial_patch_size) > 24 * 20
