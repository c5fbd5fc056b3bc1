"""Which decoder suits Stable Diffusion's latents: an autoencoder's own, or busigen's, which reads noise.

python benchmarks/studies/sd_decoder.py --data prepared/ --out out/sd_decoder

Real weights are not needed: a small autoencoder of Stable Diffusion's kind (four channels, eight pixels a cell, squared
error and a small KL) is trained on the training images, then busigen's decoder on its frozen latents, as
`busigen train --preset sd15` does. Both decode the same held-out images, shown whole and in quarters at twice their
size, and their power at every frequency is compared with that of the other half's real images, as in `autoencoder.py`.
Seconds are those of ONNX Runtime, fp32, one thread, in rounds over all decoders, whole architectures included.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from autoencoder import psnr, spectrum
from diffusers import AutoencoderKL, AutoencoderTiny
from rich.console import Console
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from busigen.data.prepared import Prepared
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reading.sets import from_prepared
from busigen.export.import_bundle import DEFAULT, opened_base
from busigen.export.trace import Tracer
from busigen.export.weights import whole
from busigen.registry import BUCKETS, OPSETS, RESOLUTION, STABLE_DIFFUSION
from busigen.training.checkpoint import load_networks
from busigen.training.examples import Frames, select, to_tensor
from busigen.training.networks.build import build
from busigen.training.networks.inference import Decoder, Networks
from busigen.training.recipe import recipe_for
from busigen.training.stable_diffusion.autoencoder import GreyDecoder, TinyDecoder
from busigen.training.stable_diffusion.painter import with_autoencoder
from busigen.training.tasks import TaskContext, grid, random_frames, to_pictures
from busigen.training.tasks.decoder import SpeckleTask
from busigen.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "sd_decoder.json"
CROP, BATCH, KL_WEIGHT = 96, 4, 1e-6  # Side and number of crops; the weight of Stable Diffusion's own autoencoder.
HALVINGS, ROUNDS = 200, 5
CPU = torch.device("cpu")
KIND: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SMALL: dict[str, Any] = {**KIND, "block_out_channels": (16, 32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8}
WHOLE: dict[str, Any] = {**KIND, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


def autoencoder_of(prepared: Prepared, folder: Path, steps: int) -> AutoencoderKL:
    """A small autoencoder of Stable Diffusion's kind, trained or read from its folder; grey as three equal channels."""
    if folder.exists():
        return AutoencoderKL.from_pretrained(str(folder)).eval()
    torch.manual_seed(0)
    vae = AutoencoderKL(**SMALL)
    frames = Frames(prepared, select(prepared, "train"))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    started = time.perf_counter()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        pixels = crops(frames, CROP // (1 + step % 2), generator)
        posterior = vae.encode(pixels.expand(-1, 3, -1, -1)).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - pixels
        loss = error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            taken = time.perf_counter() - started
            print(f"autoencoder {step}/{steps}: {float(loss.detach()):.5f}, {taken:.0f} s", flush=True)
    vae.eval()
    with torch.no_grad():
        pixels = torch.cat([crops(frames, CROP, torch.Generator().manual_seed(k)) for k in range(8)])
        latents = vae.encode(pixels.expand(-1, 3, -1, -1)).latent_dist.mean
    vae.register_to_config(scaling_factor=1.0 / float(latents.std()))
    vae.save_pretrained(str(folder))
    return vae


def crops(frames: Frames, side: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops of a side in pixels, ``(BATCH, 1, CROP, CROP)``, enlarged if need be."""
    found = []
    for frame, rng in random_frames(frames, BATCH, generator):
        top, left = rng.integers(0, RESOLUTION - side + 1, 2)
        found.append(to_tensor(frame.image[top : top + side, left : left + side]))
    return F.interpolate(torch.stack(found), size=(CROP, CROP), mode="bilinear", align_corners=False)


def speckle_decoder(prepared: Prepared, networks: Networks, out: Path, steps: int, images: int) -> nn.Module:
    """The own decoder, trained on windows of some training images, or read from its run's folder."""
    full = recipe_for(STABLE_DIFFUSION).tasks[-1]
    spec = recipe_for(STABLE_DIFFUSION, scale=steps / full.steps).tasks[-1]
    context = TaskContext(
        prepared=prepared,
        networks=networks,
        device=CPU,
        seed=0,
        report=lambda what: lambda done, total: print(f"{what}: {done}/{total}", flush=True),
        cache=out / "cache",
        max_images=images,
    )
    torch.manual_seed(0)
    module = build("decoder", networks.preset)
    task = SpeckleTask(spec, context, module)
    Trainer(task, seed=0, folder=out, device=CPU, console=Console(stderr=True)).run()
    return module.eval()


@torch.no_grad()
def decoded(images: ImageSet, networks: Networks, decoders: dict[str, Decoder], side: int) -> dict[str, Tensor]:
    """Whole images ``(N, 1, 256, 256)`` by windows of a side, with fixed noise and the lesions' masks."""
    generator = Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in decoders}
    for image, mask in zip(images.images, images.masks, strict=True):
        windows, masks = (_windows(part, side) for part in (to_tensor(image), torch.from_numpy(mask)[None].float()))
        latents, noise = networks.encoder(windows), torch.randn(windows.shape, generator=generator)
        for name, decoder in decoders.items():
            pixels = decoder.drawn(latents, noise, masks).clamp(-1.0, 1.0)
            flat = pixels.reshape(1, len(windows), -1).transpose(1, 2)
            found[name].append(F.fold(flat, RESOLUTION, side, stride=side))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _windows(image: Tensor, side: int) -> Tensor:
    return image.unfold(1, side, side).unfold(2, side, side).reshape(-1, 1, side, side)


def seconds(decoders: dict[str, Decoder]) -> dict[str, dict[str, float]]:
    """Median and extremes of one window of 256 pixels each, in rounds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    shapes = {"latents": (1, 4, RESOLUTION // 8, RESOLUTION // 8)}
    shapes |= dict.fromkeys(("noise", "mask"), (1, 1, RESOLUTION, RESOLUTION))
    feed = {name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    sessions = {}
    for name, decoder in decoders.items():
        model = whole(Tracer(OPSETS[0]).decoder(decoder, RESOLUTION))
        sessions[name] = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        _run(sessions[name], feed)
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            taken[name].append(_run(session, feed))
    return {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in taken.items()
    }


def _run(session: onnxruntime.InferenceSession, feed: dict[str, Any]) -> float:
    named = {value.name: feed[value.name] for value in session.get_inputs()}
    started = time.perf_counter()
    session.run(None, named)
    return time.perf_counter() - started


def main() -> None:
    """Train what is not trained yet, decode, compare, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, help="for networks, which a rerun reads, and pictures")
    parser.add_argument("--base", type=Path, default=Path(DEFAULT), help="whose decoder the own one begins with")
    parser.add_argument("--autoencoder-steps", type=int, default=1300)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--images", type=int, default=600, help="training images of the own decoder")
    parser.add_argument("--held-out", type=int, default=160)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepared = Prepared.open(options.data)
    vae = autoencoder_of(prepared, options.out / "autoencoder", options.autoencoder_steps)
    with opened_base(options.base) as start:
        assert start is not None
        networks = with_autoencoder(load_networks(start.folder)[0], vae, RESOLUTION)
    scale = (networks.latents_mean, networks.latents_std)
    own = speckle_decoder(prepared, networks, options.out / "own", options.steps, options.images)
    decoders = {
        "autoencoder's own": Decoder(GreyDecoder(vae), *scale).eval(),
        "busigen's": Decoder(own, *scale).eval(),
    }
    images = _some(from_prepared(prepared, ("val", "test"), lesions_only=True), options.held_out)
    report: dict[str, Any] = {
        "images": len(images),
        "groups": len(np.unique(images.groups)),
        "steps": {"autoencoder": options.autoencoder_steps, "decoder": options.steps},
        "machine": f"{platform.machine()}, one thread",
        "decoders": {name: {} for name in decoders},
    }
    sheet = [[*images.images[:8]]]
    for side in reversed(BUCKETS):
        for name, drawn in decoded(images, networks, decoders, side).items():
            pictures = np.stack(to_pictures(drawn))
            sheet.append([*pictures[:8]])
            rows = spectrum(images, pictures, HALVINGS)
            report["decoders"][name][str(side)] = {"psnr": psnr(images, pictures), "spectrum": rows}
            within, worst = sum(row["within"] for row in rows), max(abs(row["difference_db"]) for row in rows)
            print(
                f"{name}, windows of {side}: {within} of {len(rows)} frequencies within the floor, most {worst:.2f} dB"
            )
    grid(sheet).save(options.out / "sheet.png")
    random = (torch.zeros(4), torch.ones(4))
    report["seconds"] = seconds(
        decoders
        | {
            "Stable Diffusion's, random": Decoder(GreyDecoder(AutoencoderKL(**WHOLE).eval()), *random).eval(),
            "TAESD's, random": Decoder(TinyDecoder(AutoencoderTiny().eval(), 1.0), *random).eval(),
        }
    )
    for name, found in report["seconds"].items():
        print(f"{name:28} {found['median']:.3f} s ({found['least']:.3f} to {found['most']:.3f})")
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


def _some(images: ImageSet, count: int) -> ImageSet:
    """At most so many images, evenly spaced."""
    return images.take(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))


if __name__ == "__main__":
    main()
