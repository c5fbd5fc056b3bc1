"""Solver steps for windows: what is painted must vary as real windows do, in every size of detail, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from busigen.solver import solver_steps
from busigen.training.networks.variance import FEWEST, Wavelets, amplitudes, haar, mean_square

CELLS, CHANNELS = 16, 2
NO_LESION = torch.zeros(1, 4, CELLS, CELLS)


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def region() -> Tensor:
    """Most of a window, as a large lesion's edit region."""
    region = torch.zeros(1, 1, CELLS, CELLS)
    region[:, :, 2:14, 1:15] = 1.0
    return region


def fields(count: int, seed: int) -> Tensor:
    """Smooth in the first channel, white in the second, and what is bright in the one is dark in the other."""
    noise = torch.randn(count, CHANNELS, CELLS, CELLS, generator=generator(seed))
    smooth = 3.0 * F.avg_pool2d(F.pad(noise[:, :1], (2, 2, 2, 2), mode="circular"), 5, stride=1)
    return torch.cat((smooth, 0.5 * noise[:, 1:] - 0.5 * smooth), dim=1)


def fitted(region: Tensor, count: int = 400) -> Wavelets:
    steps = Wavelets(CHANNELS, (CELLS,))
    missed = fields(count, 0)
    steps.fit(CELLS, [(missed, missed, region.expand(count, -1, -1, -1))])
    return steps


def generated(steps: Wavelets, mean: Tensor, noise: Tensor, region: Tensor) -> Tensor:
    """One step from pure noise, where the best that a network can answer is ``noise - mean``."""
    return steps(noise, noise - mean, torch.ones(1), torch.zeros(1), NO_LESION, region)


def inside(latents: Tensor, region: Tensor) -> Tensor:
    """Each channel's cells in the region, ``(C, ...)``."""
    return latents.transpose(0, 1)[:, region.expand(len(latents), -1, -1, -1)[:, 0] > 0]


def by_block(latents: Tensor, region: Tensor, side: int) -> Tensor:
    """Deviation of each channel's means over blocks of cells that lie in the region."""
    within = (F.avg_pool2d(region, side) > 0.999)[0, 0]
    return F.avg_pool2d(latents, side)[:, :, within].square().mean(dim=(0, 2)).sqrt()


def test_what_is_painted_varies_as_real_windows_do_in_every_size_of_detail(region: Tensor) -> None:
    noise = torch.randn(400, CHANNELS, CELLS, CELLS, generator=generator(1))
    mean = torch.randn(400, CHANNELS, CELLS, CELLS, generator=generator(2))
    found = generated(fitted(region), mean, noise, region) - mean
    real, plain = fields(400, 3), generated(Wavelets(CHANNELS, (CELLS,)), mean, noise, region) - mean
    for side in (1, 2, 4):
        wanted = by_block(real, region, side)
        # Wavelets stand for neighbours' correlation only roughly; one spread for all is off by nearly two.
        torch.testing.assert_close(by_block(found, region, side), wanted, rtol=0.25, atol=0)
    assert by_block(plain, region, 4)[0] < 0.65 * by_block(real, region, 4)[0]
    together, apart = (torch.corrcoef(inside(latents, region))[0, 1] for latents in (found, real))
    # Their correlation is -0.51 by construction.
    assert together == pytest.approx(float(apart), abs=0.08)


def test_what_is_not_painted_becomes_what_the_network_knows_of_it(region: Tensor) -> None:
    mean = torch.randn(3, CHANNELS, CELLS, CELLS, generator=generator(2))
    noise = torch.randn(3, CHANNELS, CELLS, CELLS, generator=generator(1))
    found = generated(fitted(region), mean, noise, region)
    outside = (region == 0).expand_as(found)
    # One subtraction and one addition in fp32.
    torch.testing.assert_close(found[outside], mean[outside], rtol=0, atol=1e-5)


def test_several_steps_lead_where_one_does() -> None:
    """For normal data the steps are exact, however many there are."""
    steps, everywhere = Wavelets(1, (CELLS,)), torch.ones(1, 1, CELLS, CELLS)
    steps.assume(0.6)
    noise = torch.randn(4, 1, CELLS, CELLS, generator=generator(1))
    x = noise
    for step in solver_steps("mask", 3):
        t = step.t
        slope = (t - (1 - t) * 0.36) / ((1 - t) ** 2 * 0.36 + t**2)
        velocity = slope * (x - (1 - t) * 0.2) - 0.2
        x = steps(x, velocity, torch.tensor([t]), torch.tensor([step.s]), NO_LESION, everywhere)
    # Sums of 16 fp32 products, four transforms a step.
    torch.testing.assert_close(x, 0.2 + 0.6 * noise, rtol=0, atol=1e-4)


def test_what_the_noise_sways_answers_by_is_no_spread(region: Tensor) -> None:
    missed = fields(400, 0)
    swayed = [missed + 0.7 * torch.randn(missed.shape, generator=generator(seed)) for seed in (5, 6)]
    region = region.expand(400, -1, -1, -1)
    steps, plain = Wavelets(CHANNELS, (CELLS,)), Wavelets(CHANNELS, (CELLS,))
    steps.fit(CELLS, [(swayed[0], swayed[1], region)])
    plain.fit(CELLS, [(missed, missed, region)])
    # Each answer misses 0.49 more by itself, which is as much as the windows differ by.
    assert mean_square([(swayed[0], swayed[1], region)]) == pytest.approx(
        mean_square([(missed, missed, region)]), rel=0.05
    )
    found, wanted = (part.get_buffer(f"spread_{CELLS}").square().sum(dim=-1).mean() for part in (steps, plain))
    assert found == pytest.approx(float(wanted), rel=0.05)


def test_what_few_steps_lose_is_made_up_for(region: Tensor) -> None:
    steps = fitted(region)
    noise = torch.randn(400, CHANNELS, CELLS, CELLS, generator=generator(1))
    region = region.expand(400, -1, -1, -1)

    def lossy() -> Tensor:
        """What is drawn about a mean of 0 by a network that holds back a fifth of what varies."""
        return 0.8 * generated(steps, torch.zeros_like(noise), noise, region)

    wanted = by_block(fields(400, 3), region[:1], 2)
    before = by_block(lossy(), region[:1], 2)
    steps.compensate(CELLS, [(lossy(), lossy(), region)])
    assert (before < 0.9 * wanted).all()
    # As above: wavelets stand for neighbours' correlation only roughly.
    torch.testing.assert_close(by_block(lossy(), region[:1], 2), wanted, rtol=0.2, atol=0)


def test_a_handful_of_windows_says_nothing(region: Tensor) -> None:
    steps = Wavelets(CHANNELS, (CELLS,))
    steps.assume(0.85)
    missed = fields(FEWEST - 1, 0)
    steps.fit(CELLS, [(missed, missed, region.expand(len(missed), -1, -1, -1))])
    assert steps.get_buffer(f"spread_{CELLS}").eq(0.85).all()


def test_the_transform_keeps_lengths_and_angles() -> None:
    basis = haar(CELLS)
    # Products of sixteen numbers in fp32.
    torch.testing.assert_close(basis @ basis.T, torch.eye(CELLS), rtol=0, atol=1e-6)


def test_a_style_makes_lesions_differ_in_their_detail_and_touches_nothing_else(region: Tensor) -> None:
    steps, plain = Wavelets(CHANNELS, (CELLS,)), Wavelets(CHANNELS, (CELLS,))
    steps.styles.copy_(torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    count = 600
    noise = torch.randn(count, CHANNELS, CELLS, CELLS, generator=generator(1))
    lesion = torch.zeros(count, 4, CELLS, CELLS)
    lesion[:, :, 5:11, 4:12] = 1.0
    region = region.expand(count, -1, -1, -1)

    def generated_at(time: float, by: Wavelets) -> Tensor:
        """One step to data of mean 0, in which the sample is all noise."""
        return by(noise, noise, torch.full((1,), time), torch.zeros(1), lesion, region)

    found, expected = generated_at(1.0, steps), generated_at(1.0, plain)
    # Of 48 cells, the logarithm of the deviation is known to 0.1; the style adds one of 0.5.
    assert (amplitudes(found, lesion).std(0) > 0.4).all()
    assert (amplitudes(expected, lesion).std(0) < 0.15).all()
    beside = (region == 0).expand_as(found)
    assert torch.equal(found[beside], expected[beside])
    assert torch.equal(generated_at(0.8, steps), generated_at(0.8, plain)), "a style is drawn once, at pure noise"
