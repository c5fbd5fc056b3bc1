"""Drawn images must come to vary in their detail as training images do, whatever the network makes of a style."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from busigen.noise_styles import EDGES, LARGEST_FACTOR, are_styles, bands, powers, styled
from busigen.training.networks.variance import Spectrum
from busigen.training.tasks.denoiser import LESIONS, STYLED_IMAGES, fit_lesion_styles, fit_styles

CHANNELS, CELLS = 2, 32


def spectrum() -> Spectrum:
    found = Spectrum(CHANNELS, CELLS)
    found.spread.copy_(torch.linspace(2.0, 0.5, CELLS).expand(CHANNELS, CELLS, CELLS))
    return found


def latents(noise: Tensor) -> Tensor:
    """What a perfect prior makes of noise."""
    known = spectrum()
    return 0.3 + known.sample(known.spread * noise)


def variation(generated: Tensor) -> float:
    known = spectrum()
    found = powers((known.coefficients(generated - 0.3) / known.spread).numpy())
    return float(found.reshape(len(found), -1).var(axis=0).sum())


def training_latents(count: int) -> Tensor:
    generator = np.random.default_rng(0)
    factor = generator.normal(0, 0.25, (CHANNELS * len(EDGES), 3))
    noise = generator.standard_normal((count, CHANNELS, CELLS, CELLS), np.float32)
    # Their styles lie in the coefficients, as those of styled noise do after a perfect prior.
    known = spectrum()
    coloured = torch.from_numpy(styled(noise, factor, generator.standard_normal((count, 3))))
    return latents(known.coefficients(coloured))


@pytest.mark.parametrize("response", [1.0, 1.5])
def test_styled_images_vary_as_training_images_do(response: float) -> None:
    """A network may take a style further than the noise it is given."""
    clean = training_latents(600)
    known = spectrum()

    def draw(noise: Tensor) -> Tensor:
        coefficients = known.coefficients(noise)
        found = torch.from_numpy(powers(coefficients.numpy())).float()
        more = ((response - 1.0) * found).exp()
        scale = torch.cat((more, torch.ones(*more.shape[:2], 1)), dim=2)[:, :, torch.from_numpy(bands(CELLS))]
        return latents(coefficients * scale)

    factor = np.array(fit_styles(known, clean, draw, seed=0))
    generator = np.random.default_rng(5)
    noise = generator.standard_normal((600, CHANNELS, CELLS, CELLS), np.float32)
    normals = generator.standard_normal((600, factor.shape[1]))
    plain, styles = (variation(draw(torch.from_numpy(x))) for x in (noise, styled(noise, factor, normals)))
    wanted = variation(clean)
    assert plain < 0.5 * wanted
    # The fit sees 128 draws of each kind, whose variances are known to an eighth.
    assert styles == pytest.approx(wanted, rel=0.35)


def test_images_that_differ_without_bounds_get_styles_that_a_bundle_may_hold(caplog: pytest.LogCaptureFixture) -> None:
    """Half of the training images have 100,000 times the contrast of the others, and the prior draws one image only."""
    some = training_latents(STYLED_IMAGES) - 0.3
    clean = 0.3 + torch.cat((1e3 * some, -1e3 * some, 1e-2 * some, -1e-2 * some))

    def draw(noise: Tensor) -> Tensor:
        return latents(torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(0)).expand(noise.shape))

    styles = fit_styles(spectrum(), clean, draw, seed=0)
    assert are_styles(styles, CHANNELS)
    assert np.abs(styles).max() == LARGEST_FACTOR
    assert f"clipped to {LARGEST_FACTOR:g}" in caplog.text


def test_too_few_images_say_nothing_of_styles() -> None:
    assert fit_styles(spectrum(), training_latents(STYLED_IMAGES - 1), latents, seed=0) == []


@pytest.mark.parametrize("response", [1.0, 1.5])
def test_drawn_lesions_come_to_differ_as_training_lesions_do(response: float) -> None:
    generator = torch.Generator().manual_seed(0)
    real = 0.15 * torch.randn(800, 3, generator=generator) + 0.4 * torch.randn(800, 1, generator=generator)

    def draw(styles: Tensor) -> Tensor:
        normals, own = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(1))
        return response * normals @ styles.T + 0.15 * own

    styles = fit_lesion_styles(real, draw, 3)
    # Of 400 drawn lesions, a variance is known to 7 % (one sigma).
    torch.testing.assert_close(draw(styles).var(0), real.var(0), rtol=0.25, atol=0)
    assert fit_lesion_styles(real[: LESIONS - 1], draw, 3).eq(0).all()
    assert fit_lesion_styles(0.1 * real, draw, 3).eq(0).all(), "lesions that differ enough need no style"
