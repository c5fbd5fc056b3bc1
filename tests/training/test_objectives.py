from __future__ import annotations

import torch
from torch import Generator, Tensor

from busigen.registry import PRESETS
from busigen.training.losses import energy, lattice, noisy
from busigen.training.networks.build import build


def texture(seed: int, deviation: float = 0.2) -> Tensor:
    return torch.randn(4, 1, 96, 96, generator=Generator().manual_seed(seed)) * deviation


def score(first: Tensor, second: Tensor) -> float:
    return float(energy(first, second, texture(0), Generator().manual_seed(9)))


def test_other_grains_of_the_same_texture_score_better_than_a_blur() -> None:
    # A pixel-wise loss prefers the blur: its error is the texture's deviation, another draw's 1.4 times that.
    blur = torch.zeros_like(texture(0))
    assert score(texture(1), texture(2)) < score(blur, blur)


def test_too_little_and_too_much_speckle_both_score_worse() -> None:
    right = score(texture(1), texture(2))
    assert right < score(texture(1, 0.1), texture(2, 0.1))
    assert right < score(texture(1, 0.4), texture(2, 0.4))


def test_the_same_grains_twice_score_worse_than_two_draws() -> None:
    assert score(texture(1), texture(2)) < score(texture(1), texture(1))


def test_noise_decides_the_grains_and_latents_the_rest() -> None:
    torch.manual_seed(0)
    autoencoder = build("autoencoder", PRESETS["tiny"]).eval()
    pixels = texture(3)
    noise = [torch.randn(pixels.shape, generator=Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    with torch.no_grad():
        first, again, other = (autoencoder(pixels, each) for each in noise)
    assert first.shape == pixels.shape
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_seams_between_cells_are_seen_and_seams_anywhere_else_are_not() -> None:
    def seams(every: int) -> Tensor:
        steps = torch.zeros(96)
        steps[every::every] = 0.3
        return steps.cumsum(0)

    plain = texture(3)
    # Every seventh pixel is in another place of the eight-pixel cells each time.
    generated = texture(4)
    clean, cells, elsewhere = (float(lattice(generated + offset, plain)) for offset in (0.0, seams(8), seams(7)))
    assert cells > 5 * clean
    assert cells > 5 * elsewhere
    # Edges that the target has in the same places are none of the decoder's doing.
    assert float(lattice(generated + seams(8), plain + seams(8))) < 0.2 * cells


def test_half_of_the_training_times_are_those_at_which_the_solver_asks() -> None:
    clean = torch.full((4000, 2, 4, 4), 0.5)
    asked = [1.0, 0.6]
    x, t, target = noisy(clean, Generator().manual_seed(0), asked)
    shares = [float((t == torch.tensor(time)).float().mean()) for time in asked]
    # A quarter of 4,000 times each: 0.007 is one sigma.
    assert all(abs(share - 0.25) < 0.03 for share in shares)
    pure = t == 1.0
    torch.testing.assert_close(x[pure], target[pure] + clean[pure], rtol=0, atol=1e-6)
    others = noisy(clean, Generator().manual_seed(0))[1]
    assert others.unique().numel() > 3900, "without a table, no time is asked for twice"
