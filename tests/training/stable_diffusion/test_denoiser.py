"""Sampled as busigen samples, Stable Diffusion gives what diffusers gives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionInpaintPipeline, TCDScheduler
from peft import LoraConfig, get_peft_model
from torch import Tensor

from busigen.training.networks.build import region_condition
from busigen.training.networks.inference import Velocity, integrate
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.denoiser import FEW, DdimStep, StableDiffusionDenoiser, times_of
from busigen.training.stable_diffusion.lora import read_lora
from tests.harness import stable_diffusion as tiny

SIDE = 128
PROMPT = "breast ultrasound, benign lesion"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "folder")


@torch.no_grad()
def sampled(
    denoiser: StableDiffusionDenoiser, noise: Tensor, known: Tensor, region: Tensor, steps: int, fresh: Tensor | None
) -> Tensor:
    """What the sampler of the networks draws with the only adapter."""
    outline, share = torch.zeros(1, 4, *noise.shape[2:]), torch.ones(1, 1)
    context = (torch.zeros(1, 1, 8), torch.ones(1, 1))
    table = denoiser.solver_steps(steps)
    return integrate(Velocity(denoiser), noise, share, *context, table, known, outline, region, fresh=fresh)


@pytest.mark.parametrize("count", [4, 10, 50])
@pytest.mark.parametrize("guidance", [None, 7.5])
def test_it_draws_what_the_pipeline_draws(folder: Path, count: int, guidance: float | None) -> None:
    base = BaseModel.open(folder)
    tokens = base.prompt(PROMPT)
    denoiser = StableDiffusionDenoiser(
        base.unet(), tokens, base.alphas(), guidance=guidance, unconditional=base.prompt("")
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
    if count < FEW:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
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
    found = sampled(denoiser, noise, known, region_condition(mask), count, None)
    assert wanted.abs().max() > 5
    # Values reach 50, and fp32 keeps seven digits over up to a hundred evaluations.
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("count", [2, 4])
def test_with_all_noise_drawn_anew_it_takes_the_steps_of_latent_consistency_models(folder: Path, count: int) -> None:
    base = BaseModel.open(folder)
    denoiser = StableDiffusionDenoiser(base.unet(), base.prompt(PROMPT), base.alphas(), fresh_noise=1.0).eval()
    noise, known = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    fresh = torch.randn(1, count, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    region = torch.ones(1, 1, 16, 16)
    unet, scheduler = base.unet(), LCMScheduler.from_config({**tiny.SCHEDULER, "prediction_type": "epsilon"})
    steps = denoiser.solver_steps(count)
    numbers = [int(abs(denoiser.times - step.t).argmin()) for step in steps]
    scheduler.set_timesteps(timesteps=numbers)
    x = noise
    with torch.no_grad():
        for turn, number in enumerate(numbers):
            read = torch.cat((x, region, known), dim=1)
            predicted = unet(read, number, base.prompt(PROMPT)).sample
            signal, sigma = (float(v) ** 0.5 for v in (base.alphas()[number], 1.0 - base.alphas()[number]))
            clean = (x - sigma * predicted) / signal
            last = turn == count - 1
            alpha = base.alphas()[numbers[turn + 1]] if not last else torch.tensor(1.0)
            # LCMScheduler's own mixture of input and answer is the answer alone, but for the last tenth of noise.
            weights = scheduler.get_scalings_for_boundary_condition_discrete(number)
            assert abs(float(weights[0])) < 1e-3 and abs(float(weights[1]) - 1.0) < 1e-3
            x = clean if last else alpha.sqrt() * clean + (1.0 - alpha).sqrt() * fresh[:, turn]
            x = x.float()
    found = sampled(denoiser, noise, known, region, count, fresh)
    assert (found - x).abs().max() < 1e-3 * x.abs().max()


def test_tcds_gamma_is_another_share_of_fresh_noise_at_every_step() -> None:
    scheduler = TCDScheduler.from_config({**tiny.SCHEDULER, "prediction_type": "epsilon"})
    scheduler.set_timesteps(4)
    alphas, numbers, gamma = scheduler.alphas_cumprod.double(), scheduler.timesteps.tolist(), 0.3
    times = times_of(alphas)
    shares = []
    for number, after in pairwise(numbers):
        between = alphas[int((1.0 - gamma) * after)]
        shares.append(float(((1.0 - alphas[after] / between) / (1.0 - alphas[after])).sqrt()))
        x, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        fresh = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = scheduler.step(noise, number, x, eta=gamma, generator=torch.Generator().manual_seed(1)).prev_sample
        t, s = times[number], times[after]
        velocity = (noise - x * ((1.0 - t) ** 2 + t**2).sqrt()) / (1.0 - t)
        found = DdimStep(shares[-1])(x, velocity, t, s, fresh)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # The scheduler's table is fp32.
    # As docs/sd15.md says them.
    assert [round(share, 2) for share in shares] == [0.91, 0.79, 0.68]


def test_the_outline_says_nothing_until_it_is_trained(folder: Path) -> None:
    base = BaseModel.open(folder)
    denoiser = StableDiffusionDenoiser(base.unet(), base.prompt(PROMPT), base.alphas()).eval()
    x, t, share = torch.randn(1, 13, 16, 16), torch.tensor([500.0]), torch.ones(1, 1)
    other = x.clone()
    other[:, 8:12] = 1.0
    seen = (torch.zeros(1, 1, 8), share, torch.ones(1, 1))
    with torch.no_grad():
        assert torch.equal(denoiser(x, t, *seen).sample, denoiser(other, t, *seen).sample)
        torch.nn.init.normal_(denoiser.outline.weight)
        assert not torch.allclose(denoiser(x, t, *seen).sample, denoiser(other, t, *seen).sample)


def test_context_tokens_are_seen_behind_the_prompt_and_dropped_ones_are_not(folder: Path) -> None:
    base = BaseModel.open(folder)
    torch.manual_seed(4)
    denoiser = StableDiffusionDenoiser(base.unet(), base.prompt(PROMPT), base.alphas(), context_dim=8).eval()
    x, t, share = torch.randn(1, 13, 16, 16), torch.tensor([500.0]), torch.ones(1, 1)
    tokens, keep = torch.randn(1, 5, 8), torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    with torch.no_grad():
        first = denoiser(x, t, tokens, share, keep).sample
        changed = tokens.clone()
        changed[:, 3:] = 100.0
        assert torch.equal(first, denoiser(x, t, changed, share, keep).sample)
        changed = tokens.clone()
        changed[:, 0] += 10.0
        assert not torch.allclose(first, denoiser(x, t, changed, share, keep).sample)


def test_each_row_of_a_batch_has_the_adapter_that_it_is_told(folder: Path, tmp_path: Path) -> None:
    """Against peft: each adapter folded into a network of its own."""
    base = BaseModel.open(folder)
    torch.manual_seed(5)
    tokens = torch.cat((base.prompt("one"), base.prompt("two")))
    layers, merged = [], []
    for number in range(2):
        config = LoraConfig(r=2 + number, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0", "conv1"])
        adapted = get_peft_model(base.unet(), config)
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        adapted.save_pretrained(str(tmp_path / str(number)), safe_serialization=True)
        lora = read_lora(tmp_path / str(number), base.unet())
        layers.append({name: layer for (_, name), layer in lora.layers.items()})
        merged.append(adapted.merge_and_unload(safe_merge=True))
    denoiser = StableDiffusionDenoiser(base.unet(), tokens, base.alphas()).eval()
    denoiser.add_loras(layers)
    x, t, seen = torch.randn(1, 13, 16, 16), torch.tensor([500.0]), (torch.zeros(2, 1, 8), torch.eye(2))
    with torch.no_grad():
        both = denoiser(x.repeat(2, 1, 1, 1), t.repeat(2), *seen, torch.ones(2, 1)).sample
        for number, unet in enumerate(merged):
            alone = StableDiffusionDenoiser(unet, tokens[number : number + 1], base.alphas()).eval()
            wanted = alone(x, t, torch.zeros(1, 1, 8), torch.ones(1, 1), torch.ones(1, 1)).sample
            # Sums in another order: 16 attention blocks in fp32, at values of about 1.
            assert (both[number] - wanted[0]).abs().max() < 1e-4 * wanted.abs().max()
    assert not torch.allclose(both[0], both[1], rtol=0.05)


def test_times_rise_from_nearly_clean_to_nearly_noise(folder: Path) -> None:
    times = times_of(BaseModel.open(folder).alphas())
    assert bool((times.diff() > 0).all())
    # Of scaled-linear betas from 0.00085 to 0.012.
    assert times[0] == pytest.approx(0.0284, abs=1e-3)
    assert times[-1] == pytest.approx(0.936, abs=1e-3)
