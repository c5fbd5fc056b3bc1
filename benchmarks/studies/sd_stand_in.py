"""A stand-in for Stable Diffusion's weights: a small inpainting model of its kind, trained on the training images.

python benchmarks/studies/sd_stand_in.py --data prepared/ --out out/stand_in
busigen train --preset sd15 --base-model out/stand_in/base --data prepared --out runs/stand_in --scale 0.1

Real weights are not at hand where busigen is made, and random ones draw nothing whose look could be judged. This has
Stable Diffusion's architecture, noise schedule and files at a small width. Autoencoder (as in `sd_decoder.py`) and UNet
are trained from nothing on windows of all classes, whose edit region or ring is to be painted; the class is in the
prompt, by a text encoder with random weights. How well it draws says nothing about the real model. What it is for is
whether something that changes how a model of this kind is stepped helps at all.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import Generator, Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from sd_decoder import autoencoder_of

from busigen.data.prepared import Prepared
from busigen.export.import_bundle import DEFAULT, opened_base
from busigen.registry import CLASSES, PROMPTS, RESOLUTION
from busigen.solver import SolverStep
from busigen.training.checkpoint import load_networks
from busigen.training.networks.inference import blend_input
from busigen.training.recipe import TaskSpec
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.denoiser import StableDiffusionDenoiser
from busigen.training.stable_diffusion.painter import with_autoencoder
from busigen.training.tasks import TaskContext
from busigen.training.tasks.denoiser import Batch, PaintingTask
from busigen.training.trainer import Trainer
from tests.harness.stable_diffusion import UNET, write_folder

CPU = torch.device("cpu")
SMALL = {
    **UNET,
    "block_out_channels": (32, 64, 96, 96),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": (1, 2, 3, 3),  # Numbers of heads; eight of four channels each would take most of the time.
}
HEALTHY = "breast ultrasound image"
BLENDED = 0.3  # Share of batches in which the ring is painted.


class BaseTask(PaintingTask):
    """All of a UNet, on windows of every class, without outlines and context."""

    outside = dict.fromkeys(PaintingTask.outside, 0.25)

    def __init__(self, spec: TaskSpec, context: TaskContext, module: StableDiffusionDenoiser) -> None:
        super().__init__(spec, context, module)
        # Every time of the noise schedule equally often, as Stable Diffusion was trained.
        self.steps = [SolverStep(t, 0.0) for t in module.times.tolist()]

    def _condition(self, batch: Batch, generator: Generator) -> tuple[Tensor, ...]:
        batch["label"] = F.one_hot(batch["label"], len(CLASSES)).float()
        known, region = batch["known"], batch["edit"]
        if float(torch.rand(1, generator=generator)) < BLENDED:
            known, region = blend_input(known, batch["clean"], region, batch["ring"]), batch["ring"]
        batch["weight"] = batch["weight"] * torch.where(region > 0, 1.0, self.outside["lesion"])
        return known, batch["mask"], region


def trained(prepared: Prepared, folder: Path, out: Path, steps: int, images: int | None) -> UNet2DConditionModel:
    """The UNet, trained on the latents of the autoencoder in ``folder``; a run that was stopped is continued."""
    base = BaseModel.open(folder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{name: value for name, value in SMALL.items() if not name.startswith("_")})
    prompts = torch.cat([base.prompt(PROMPTS.get(label, HEALTHY)) for label in CLASSES])
    model = StableDiffusionDenoiser(unet, prompts, base.alphas())
    model.outline.requires_grad_(False)
    with opened_base(Path(DEFAULT)) as start:
        assert start is not None
        networks = with_autoencoder(load_networks(start.folder)[0], base.autoencoder(), RESOLUTION)
    context = TaskContext(
        prepared=prepared,
        networks=networks,
        device=CPU,
        seed=0,
        report=lambda what: lambda done, total: print(f"{what}: {done}/{total}", flush=True),
        cache=out / "cache",
        max_images=images,
    )
    spec = TaskSpec("base", "painting", "lesion", steps=steps, batch=8, lr=2e-3, warmup=steps // 20)
    Trainer(BaseTask(spec, context, model), seed=0, folder=out, device=CPU, console=Console(stderr=True)).run()
    return unet


def main() -> None:
    """Train what is not trained yet, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, help="for the folder `base` and what a rerun continues from")
    parser.add_argument("--autoencoder-steps", type=int, default=1300)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--images", type=int, help="training images of the UNet, if not all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    prepared, base = Prepared.open(options.data), options.out / "base"
    vae = autoencoder_of(prepared, options.out / "autoencoder", options.autoencoder_steps)
    for part in ("vae", "unet"):
        shutil.rmtree(base / part, ignore_errors=True)
    write_folder(base)  # Scheduler, tokenizer and text encoder stay as they are.
    vae.save_pretrained(str(base / "vae"))
    trained(prepared, base, options.out, options.steps, options.images).save_pretrained(str(base / "unet"))


if __name__ == "__main__":
    main()
