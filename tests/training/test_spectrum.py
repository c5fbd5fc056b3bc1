"""Solver steps by spatial frequency: what images differ by in each must survive a few steps."""

from __future__ import annotations

import pytest
import torch

from busigen.solver import solver_steps
from busigen.training.networks.variance import Spectrum, Spread, cosines

CELLS = 8
STEPS = 3


@pytest.fixture
def spread() -> torch.Tensor:
    """Like images: the mean varies most, the finest detail least; another scale in the second channel."""
    frequency = torch.arange(CELLS)[:, None] + torch.arange(CELLS)[None]
    return torch.stack((6.0 / (1.0 + frequency), 2.0 / (1.0 + frequency)))


def normal_latents(count: int, spread: torch.Tensor) -> torch.Tensor:
    basis = cosines(CELLS)
    generated = torch.randn(count, *spread.shape, generator=torch.Generator().manual_seed(1))
    return 0.7 + basis.T @ (spread * generated) @ basis


def sampled(spectrum: Spectrum, spread: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a perfectly trained network leads to: the exact velocity of normal data with mean 0.7."""
    basis = cosines(CELLS)
    x = noise
    for step in solver_steps("mask", STEPS):
        t = step.t
        slope = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)
        centred = basis @ (x - (1 - t) * 0.7) @ basis.T
        velocity = basis.T @ (slope * centred) @ basis - 0.7
        x = spectrum(x, velocity, torch.tensor([t]), torch.tensor([step.s]))
    return x


def test_latents_of_any_spectrum_come_out_exactly_in_three_steps(spread: torch.Tensor) -> None:
    spectrum = Spectrum(2, CELLS)
    spectrum.spread.copy_(spread)
    noise = torch.randn(4, 2, CELLS, CELLS, generator=torch.Generator().manual_seed(2))
    basis = cosines(CELLS)
    expected = 0.7 + basis.T @ (spread * (basis @ noise @ basis.T)) @ basis
    # Sums of 8 fp32 products of magnitude 10, four transforms a step.
    torch.testing.assert_close(sampled(spectrum, spread, noise), expected, rtol=0, atol=1e-4)


def test_one_spread_for_all_frequencies_loses_what_images_differ_by_most(spread: torch.Tensor) -> None:
    noise = torch.ones(1, 2, CELLS, CELLS)
    # Noise of 1 everywhere is noise in the mean alone, which should come to deviate by the whole of its spread.
    found = sampled(Spectrum(2, CELLS), spread, noise)[0, 0].mean() - 0.7
    assert 0 < found < 0.75 * spread[0, 0, 0]


def test_the_spread_is_measured_on_training_latents(spread: torch.Tensor) -> None:
    spectrum = Spectrum(2, CELLS)
    spectrum.fit(normal_latents(2000, spread))
    # A deviation of 2,000 numbers is known to 1.6 % (one sigma); the largest of 128 errs by less than four sigma.
    torch.testing.assert_close(spectrum.marginal, spread, rtol=0.065, atol=0)


def test_what_shows_in_two_channels_at_once_is_drawn_in_both(spread: torch.Tensor) -> None:
    """Brightness: where one channel is strong the other is, too. Solver steps that took them apart would mix images."""
    spectrum = Spectrum(2, CELLS)
    clean = normal_latents(2000, spread)
    clean[:, 1] = 0.9 * clean[:, 0] + 0.1 * clean[:, 1]
    spectrum.fit(clean)
    noise = torch.randn(500, 2, CELLS, CELLS, generator=torch.Generator().manual_seed(5))
    # The first of one step, where a network knows nothing of the image: its best answer is noise - mean.
    mean = clean.mean(0)
    generated = spectrum(noise, noise - mean, torch.ones(1), torch.zeros(1)) - mean
    brightness = generated.mean(dim=(2, 3))
    # Of 500 pairs with a true correlation above 0.99, one sigma is below 0.001.
    assert torch.corrcoef(brightness.T)[0, 1] > 0.98
    torch.testing.assert_close(brightness.std(0), (clean - mean).mean(dim=(2, 3)).std(0), rtol=0.15, atol=0)
    back = spectrum.sample(spectrum.coefficients(clean))
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-4)


def test_what_never_differs_keeps_a_least_spread_and_one_image_says_nothing() -> None:
    spectrum = Spectrum(2, CELLS)
    spectrum.fit(torch.ones(1, 2, CELLS, CELLS))
    assert spectrum.spread.eq(1.0).all()
    spectrum.fit(torch.ones(3, 2, CELLS, CELLS))
    assert 0 < spectrum.spread.max() < 0.1


def test_numbers_of_a_code_come_out_with_a_spread_of_their_own() -> None:
    spread = torch.tensor([0.5, 1.0, 1.5])
    steps = Spread(3)
    codes = torch.randn(2000, 3, generator=torch.Generator().manual_seed(3)) * spread + 0.4
    steps.fit(codes)
    # As above: 1.6 % is one sigma.
    torch.testing.assert_close(steps.spread, spread, rtol=0.065, atol=0)
    steps.spread.copy_(spread)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    x = noise
    for step in solver_steps("mask", 2):
        t = step.t
        slope = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)
        velocity = slope * (x - (1 - t) * 0.4) - 0.4
        x = steps(x, velocity, torch.tensor([t]), torch.tensor([step.s]))
    torch.testing.assert_close(x, 0.4 + spread * noise, rtol=0, atol=1e-5)
