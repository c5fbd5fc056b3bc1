"""The decoder's opponent: it must see real from drawn, and neither side may train the other's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from busigen.training.networks.autoencoder import Critic

CHANNELS = (4, 8, 8, 8)


def textures(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Grainy pixels, the same as a blur would draw them, and latents of the same place."""
    real = torch.randn(8, 1, 48, 48, generator=generator)
    generated = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1) * 2.5
    return generated, real, torch.randn(8, 4, 6, 6, generator=generator)


def test_it_learns_to_tell_a_blur_from_grains_of_the_same_contrast() -> None:
    torch.manual_seed(0)
    critic, generator = Critic(4, CHANNELS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(60):
        _, loss = critic.contest(*textures(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generated, real, latents = textures(generator)
    critic.eval()
    assert (critic(real, latents) > critic(generated, latents)).float().mean() > 0.9


def test_each_side_is_trained_by_its_own_loss_alone() -> None:
    torch.manual_seed(0)
    critic = Critic(4, CHANNELS)
    generated, real, latents = textures(torch.Generator().manual_seed(0))
    gain = torch.ones((), requires_grad=True)
    ours, critics = critic.contest(gain * generated, real, latents)
    assert gain.grad is None
    ours.backward()
    assert gain.grad is not None and gain.grad.abs() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())
    before = gain.grad.clone()
    critics.backward()
    assert torch.equal(gain.grad, before)
    assert all(parameter.grad is not None for parameter in critic.parameters())
