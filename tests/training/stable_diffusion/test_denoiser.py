"""Sampled as busigen samples, Stable Diffusion gives what diffusers gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import Tensor

from busigen.solver import TIME_SCALE
from busigen.training.networks.build import region_condition
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.denoiser import (
    StableDiffusionDenoiser,
    WidenedConv,
    ddim_steps,
    times_of,
)
from tests.harness import stable_diffusion as tiny

SIDE = 128
PROMPT = "breast ultrasound, benign lesion"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "folder")


@torch.no_grad()
def sampled(
    denoiser: StableDiffusionDenoiser, alphas: Tensor, noise: Tensor, known: Tensor, region: Tensor, count: int
) -> Tensor:
    """Euler steps on the straight path, as the exported graphs take them, from and to Stable Diffusion's scale."""
    steps = ddim_steps(alphas, count)
    outline = torch.zeros(1, 4, *noise.shape[2:])
    x = noise * math.hypot(1.0 - steps[0].t, steps[0].t)
    for step in steps:
        t = torch.full((1,), step.t * TIME_SCALE)
        read = torch.cat((x, known, outline, region), dim=1)
        velocity = denoiser(read, t, torch.zeros(1, 1, 8), torch.tensor([1]), torch.ones(1, 1)).sample
        x = denoiser.spectrum(x, velocity, torch.tensor([step.t]), torch.tensor([step.s]), known, outline, region)
    return x / math.hypot(1.0 - steps[-1].s, steps[-1].s)


@pytest.mark.parametrize("count", [4, 10, 50])
@pytest.mark.parametrize("guidance", [None, 7.5])
def test_it_draws_what_the_pipeline_draws(folder: Path, count: int, guidance: float | None) -> None:
    base = BaseModel.open(folder)
    tokens = base.prompt(PROMPT)
    prompts = torch.cat((torch.zeros_like(tokens), tokens, torch.zeros_like(tokens)))
    denoiser = StableDiffusionDenoiser(
        base.unet(), prompts, base.alphas(), guidance=guidance, unconditional=base.prompt("")
    ).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, SIDE, SIDE, generator=generator) * 2 - 1
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[:, :, 32:96, 40:88] = 1
    with torch.no_grad():
        known = base.autoencoder().encode(image * (1 - mask)).latent_dist.mean * 0.18215
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        str(folder), local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        prompt=PROMPT,
        image=image,
        mask_image=mask,
        masked_image_latents=known,
        latents=noise.clone(),
        num_inference_steps=count,
        guidance_scale=guidance or 1.0,
        output_type="latent",
        height=SIDE,
        width=SIDE,
        strength=1.0,
    ).images
    found = sampled(denoiser, base.alphas(), noise, known, region_condition(mask), count)
    assert wanted.abs().max() > 5
    # Values reach 50, and fp32 keeps seven digits over up to a hundred evaluations.
    assert (found - wanted).abs().max() < 1e-3


def test_the_outline_says_nothing_until_it_is_trained(folder: Path) -> None:
    torch.manual_seed(2)
    conv = BaseModel.open(folder).unet().conv_in
    wide, x = WidenedConv(conv, 4), torch.randn(2, 13, 8, 8)
    assert torch.equal(wide(x), conv(x[:, :9]))
    torch.nn.init.normal_(wide.more.weight)
    assert not torch.allclose(wide(x), conv(x[:, :9]))


def test_context_tokens_are_seen_behind_the_prompt_and_dropped_ones_are_not(folder: Path) -> None:
    base = BaseModel.open(folder)
    torch.manual_seed(4)
    prompts = base.prompt(PROMPT).repeat(3, 1, 1)
    denoiser = StableDiffusionDenoiser(base.unet(), prompts, base.alphas(), context_dim=8).eval()
    x, t, label = torch.randn(1, 13, 16, 16), torch.tensor([500.0]), torch.tensor([2])
    tokens, keep = torch.randn(1, 5, 8), torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    with torch.no_grad():
        first = denoiser(x, t, tokens, label, keep).sample
        changed = tokens.clone()
        changed[:, 3:] = 100.0
        assert torch.equal(first, denoiser(x, t, changed, label, keep).sample)
        changed = tokens.clone()
        changed[:, 0] += 1.0
        assert not torch.allclose(first, denoiser(x, t, changed, label, keep).sample)


def test_times_rise_from_nearly_clean_to_nearly_noise(folder: Path) -> None:
    times = times_of(BaseModel.open(folder).alphas())
    assert bool((times.diff() > 0).all())
    # Of scaled-linear betas from 0.00085 to 0.012.
    assert times[0] == pytest.approx(0.0284, abs=1e-3)
    assert times[-1] == pytest.approx(0.936, abs=1e-3)
