"""How brightness goes across an outline: a dark disc has its step where its mask says, and nowhere else."""

from __future__ import annotations

import torch

from busigen.training.losses import BAND_WIDTH, BANDS, FEATURES, patches, profile

SIDE = 64


def disc(radius: float) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return ((rows - 32.0).square() + (columns - 32.0).square() <= radius**2)[None, None].float()


def measured(image: torch.Tensor, mask: torch.Tensor, usable: torch.Tensor | None = None) -> tuple[list[float], bool]:
    found, seen = profile(image, patches(mask, torch.ones_like(mask) if usable is None else usable))
    assert found.shape == (1, FEATURES)
    return found[0].tolist(), bool(seen[0])


def test_the_greatest_step_lies_at_the_outline_or_as_far_from_it_as_the_image_has_it() -> None:
    mask = disc(20)
    for shift in (-2, -1, 0, 1, 2):
        image = 0.5 - disc(20 + BAND_WIDTH * shift)
        found, seen = measured(image, mask)
        assert seen
        bands, steps = found[:BANDS], found[BANDS:]
        # From the inmost band on: BANDS // 2 of them are inside.
        assert steps.index(max(steps)) == BANDS // 2 - 1 + shift
        assert bands[0] < 0 < bands[-1]


def test_a_soft_margin_has_smaller_steps_and_more_of_them() -> None:
    mask = disc(20)
    hard = 0.5 - mask
    soft = torch.nn.functional.avg_pool2d(hard, 9, stride=1, padding=4, count_include_pad=False)
    (sharp, _), (blurred, _) = measured(hard, mask), measured(soft, mask)
    middle = BANDS + BANDS // 2 - 1
    assert blurred[middle] < sharp[middle]
    assert blurred[middle + 1] > sharp[middle + 1]


def test_brightness_as_a_whole_does_not_count_and_what_is_not_usable_has_no_say() -> None:
    mask = disc(20)
    image = 0.3 - 0.5 * mask
    usable = torch.ones_like(mask)
    usable[..., :24, :] = 0.0
    spoilt = torch.where(usable > 0, image + 0.2, torch.full_like(image, 1.0))
    (plain, _), (other, _) = measured(image, mask, usable), measured(spoilt, mask, usable)
    # Sums of other numbers round otherwise.
    torch.testing.assert_close(torch.tensor(other), torch.tensor(plain), atol=1e-5, rtol=0)


def test_a_lesion_that_is_hardly_seen_or_not_there_is_left_out() -> None:
    usable = torch.zeros(1, 1, SIDE, SIDE)
    usable[..., :14, :14] = 1.0
    assert not measured(torch.zeros(1, 1, SIDE, SIDE), disc(20), usable)[1]
    assert not measured(torch.zeros(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE))[1]


def test_gradients_reach_the_margin_and_not_the_deep_inside() -> None:
    mask = disc(20)
    image = (0.3 - 0.5 * mask).requires_grad_()
    found, _ = profile(image, patches(mask, torch.ones_like(mask)))
    found[0, BANDS:].sum().backward()
    assert image.grad is not None
    assert image.grad[0, 0, 32, 10:16].abs().sum() > 0
    assert not image.grad[0, 0, 28:36, 28:36].any()
