"""What tells textures apart must be felt by whoever draws them, and where no one looked must not count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from busigen.training.losses import ENOUGH, Discriminant, Texture, large_enough

SIDE = 64


def grains(count: int, generator: torch.Generator, amplitude: torch.Tensor | float = 0.3) -> torch.Tensor:
    """Speckle wider than it is high."""
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return amplitude * F.avg_pool2d(F.pad(noise, (1, 1, 0, 0), mode="circular"), (1, 3), stride=1)


def test_one_number_per_zone_and_statistic_and_what_lies_elsewhere_has_no_say() -> None:
    texture, generator = Texture(), torch.Generator().manual_seed(0)
    image = grains(2, generator)
    left = torch.zeros(2, 1, SIDE, SIDE)
    left[..., : SIDE // 4] = 1.0
    found = texture(image, torch.cat((left, torch.ones_like(left)), dim=1))
    assert found.shape == (2, 2, texture.features)
    # The widest filters of two layers reach 9 / 2 * (8 + 4) = 54 pixels at most, those of one octave not half as far.
    changed = image.clone()
    changed[..., -4:] = 0.9
    again = texture(changed, left)
    fine = slice(0, 12)
    # Means over the zone are summed in another order where there are two zones.
    torch.testing.assert_close(again[:, 0, fine], found[:, 0, fine])
    assert not torch.allclose(texture(changed, torch.ones_like(left))[:, 0, fine], found[:, 1, fine])


def test_textures_of_one_spectrum_are_told_apart() -> None:
    texture, generator = Texture(), torch.Generator().manual_seed(0)
    plain = grains(16, generator)
    # The same spectrum with its power in clumps: a slow random sign and strength has the same mean square everywhere.
    slow = F.interpolate(torch.randn(16, 1, 8, 8, generator=generator), size=SIDE, mode="bilinear")
    clumped = plain * slow / slow.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    zone = torch.ones(16, 1, SIDE, SIDE)
    first, second = (texture(image, zone)[:, 0] for image in (plain, clumped))
    pooled = 0.5 * (first.var(0) + second.var(0))
    separation = ((first.mean(0) - second.mean(0)).square() / pooled).sqrt()
    assert separation.max() > 3.0


def test_the_discriminant_leads_a_drawer_to_the_real_texture(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten batches of memory instead of a hundred: a drawer of one number needs no more, and is there sooner.
    monkeypatch.setattr("busigen.training.losses.MEMORY", 0.9)
    torch.manual_seed(0)
    texture, generator = Texture(), torch.Generator().manual_seed(0)
    opponent = Discriminant(texture.features)
    amplitude = torch.nn.Parameter(torch.tensor(0.15))
    optimizer = torch.optim.Adam([amplitude], 1e-2)
    zone = torch.ones(6, 1, SIDE, SIDE)
    for _ in range(70):
        generated, real = grains(6, generator, amplitude), grains(6, generator, 0.3)
        loss = opponent(texture(generated, zone)[:, 0], texture(real, zone)[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Steps of a hundredth, and a running mean that lags ten of them behind: it circles the real 0.3.
    assert 0.22 < float(amplitude.detach()) < 0.38


def test_it_says_nothing_until_it_has_seen_enough_and_remembers_nothing_in_evaluation() -> None:
    opponent, generator = Discriminant(3), torch.Generator().manual_seed(0)

    def batches() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(4, 3, generator=generator) + 2.0, torch.randn(4, 3, generator=generator)

    assert float(opponent(*batches())) == 0.0
    while float(opponent.seen) < ENOUGH:
        opponent(*batches())
    assert float(opponent(*batches())) > 0.0
    # Means two deviations apart on three axes: half of 12, less what the ridge and the memory's noise take.
    assert 3.0 < opponent.distance < 9.0
    before = opponent.shift.clone()
    opponent.eval()
    opponent(*batches())
    assert torch.equal(opponent.shift, before)
    assert float(opponent(torch.zeros(0, 3), torch.zeros(0, 3))) == 0.0


def test_a_zone_of_a_few_pixels_is_not_believed() -> None:
    zones = torch.zeros(1, 2, SIDE, SIDE)
    zones[:, 0, :4, :4] = 1.0
    zones[:, 1, :32] = 1.0
    assert large_enough(zones).tolist() == [[False, True]]
