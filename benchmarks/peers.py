"""busigen's bundle against what a user would do instead, with the same weights, on this machine's CPU.

python benchmarks/peers.py
python benchmarks/peers.py --backgrounds synthetic --repeat 5

- ``busigen``: ``generate`` with the bundle, whole: gates, PNG, hashes, shards, manifest, preview.
- ``diffusers 50``: a diffusers pipeline as after the paper: whole images, 50 steps, guidance 7.5, PyTorch eager.
- ``diffusers 50, windows``: the same on windows of 128 pixels, the smaller of busigen's sizes.
- ``torch``: the few-step networks in PyTorch eager, step by step, with busigen's batches, windows and gates.
- ``onnx steps``: the few-step networks in ONNX Runtime's default session, each step called from Python, likewise.

python benchmarks/peers.py --preset sd15 --bundle BUNDLE --base-model FOLDER --count 4 --paper-count 2

- ``inpaint``: diffusers' StableDiffusionInpaintPipeline, PyTorch eager, called twice a pair with the bundle's steps.
- ``inpaint, paper``: the same with the paper's 30 and 50 steps and guidance 7.5.

There, draws are counted and not pairs, because the gates refuse much of what an untrained Stable Diffusion draws.

Each runs in a process of its own, in turns; imports, loading and one warm-up are outside of what is timed. The others
save PNG files with Pillow and write no more. The two diffusers pipelines have no gates and so refuse nothing, and are
timed on fewer pairs. With ``--backgrounds real`` (the default, as in the paper) lesions are painted into given images,
which the bundle's prior drew before; with ``synthetic``, into backgrounds that each draws as it goes (not diffusers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, about, in_turns, median, ratios, run, show, write
from numpy.typing import NDArray
from PIL import Image

from busigen.registry import LESION_CLASSES, RESOLUTION, SYNTHETIC
from busigen.runtime.backends.base import Backend, EngineOptions, open_backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.probe import peak_memory
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.noise import normal
from busigen.runtime.sampling.sampler import Sampler

SEED, WARM_SEED = 7, 8
PICTURES = 32
"""Healthy images that lesions are painted into with ``--backgrounds real``."""

FEW = 2
"""Pairs of ``inpaint`` at most: each costs the same. busigen's draws have to fill its batches, which are padded."""

CLASSES = dict.fromkeys(LESION_CLASSES, 1 / len(LESION_CLASSES))

Pairs = Iterable[tuple[int, NDArray[Any], NDArray[Any]]]


def main() -> None:
    """Measure all in turns, print the table, write the results; or be one of the measured processes."""
    options = parse()
    if options.worker:
        # Its own word: what the system says of a child includes what its parent held when it was started.
        print(json.dumps({**PEERS[options.worker](options), "peak_memory": peak_memory()}))
        return
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        options.work = Path(folder)
        prepare(options)
        runs = in_turns(options.peers, options.repeat, lambda name, turn: measure(name, turn, options))
    rows = [summary(name, runs) for name in options.peers]
    backgrounds = options.backgrounds
    show(
        f"Pairs on {backgrounds} backgrounds, {options.repeat} runs each: medians",
        ["", "pairs/s", "ms/pair", "busigen is faster by", "CPU s/pair", "peak MB", "grey levels off busigen's"],
        [
            [
                row["name"],
                f"{1 / row['seconds_per_pair']:.3f}",
                f"{1000 * row['seconds_per_pair']:.0f}",
                f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})",
                f"{row['cpu_seconds_per_pair']:.2f}",
                f"{row['peak_memory'] / 1e6:.0f}",
                "-" if row["grey_difference"] is None else f"{row['grey_difference']:.2g}",
            ]
            for row in rows
        ],
    )
    record = {
        "command": {
            "backgrounds": backgrounds,
            **{name: getattr(options, name) for name in ("count", "paper_count", "batch_size", "threads", "repeat")},
        },
        "bundle": Bundle.recorded(options.bundle).sha256,
        "machine": about("torch", "diffusers"),
        "medians": rows,
        "runs": runs,
    }
    name = f"peers_{backgrounds}.json" if options.preset is None else f"peers_{options.preset}.json"
    write(options.results or RESULTS / name, record)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="busigen must be one; all if left out")
    parser.add_argument("--count", type=int, default=32, help="accepted pairs per run")
    parser.add_argument("--paper-count", type=int, default=4, help="pairs per run of the diffusers pipelines")
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 128 pixels per call; a quarter of whole")
    parser.add_argument("--threads", type=int, help="compute threads; one per core if left out")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each")
    parser.add_argument("--backgrounds", choices=("real", SYNTHETIC), default="real")
    parser.add_argument("--bundle", type=Path, default=default_bundle(), help="the shipped one if left out")
    parser.add_argument("--preset", choices=("sd15",), help="of the bundle, if it is no compact one")
    parser.add_argument("--base-model", type=Path, help="with --preset sd15: folder of its Stable Diffusion")
    parser.add_argument("--checkpoint", type=Path, help="the bundle's; restored from the bundle if left out")
    parser.add_argument("--out", type=Path, help="folder for what is written and removed; a temporary one if left out")
    parser.add_argument("--results", type=Path, help="JSON file to write; results/peers_<backgrounds>.json if left out")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = [name for name in PEERS if options.backgrounds == "real" or not name.startswith("diffusers")]
    given = [name for name in given if name == "busigen" or name.startswith("inpaint") == (options.preset == "sd15")]
    options.peers = options.peers or given
    if "busigen" not in options.peers or not set(options.peers) <= set(given):
        parser.error("--peers has to name busigen, which the others are compared with, and diffusers only for real")
    return options


def prepare(options: argparse.Namespace) -> None:
    """Restore the checkpoint and draw the healthy images, before anything is measured."""
    bundle = Bundle.open(options.bundle)
    if options.checkpoint is None and options.preset is None:
        from busigen.export.import_bundle import restore

        options.checkpoint = options.work / "checkpoint"
        restore(bundle, options.checkpoint)
    if options.backgrounds == SYNTHETIC:
        return
    sampler = Sampler(bundle, open_backend(bundle), classes=CLASSES)
    (options.work / "healthy").mkdir()
    for first in range(0, PICTURES, 4):
        numbers = range(first, first + 4)
        noise = np.stack([normal(SEED, number, 0, "prior", bundle.background_shape) for number in numbers])
        speckle = np.stack([normal(SEED, number, 0, "prior speckle", (1, 256, 256)) for number in numbers])
        whole = np.array([[0, 0, RESOLUTION, RESOLUTION]] * len(noise), np.float32)
        latents = sampler.backend.run("prior", {"noise": noise, "frame": whole})
        pixels = sampler.backend.run(
            bundle.background_decoder, {"latents": latents, "noise": speckle, "mask": np.zeros_like(speckle)}
        )
        for number, image in zip(numbers, pixels[:, 0], strict=True):
            grey = np.rint((image + 1.0) * 127.5).clip(0, 255).astype(np.uint8)
            Image.fromarray(grey).save(options.work / "healthy" / f"{number}.png")


def measure(name: str, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    """One process's figures, and how far its images are from those that busigen made last."""
    command = [sys.executable, __file__, "--worker", name, "--turn", str(turn), "--work", str(options.work)]
    passed = ("count", "paper_count", "batch_size", "threads", "backgrounds", "bundle", "checkpoint")
    for option in (*passed, "preset", "base_model"):
        value = getattr(options, option)
        command += [] if value is None else [f"--{option.replace('_', '-')}", str(value)]
    done = run(command)
    return {
        **done.described,
        "seconds_per_pair": done.described["seconds"] / done.described["pairs"],
        "cpu_seconds_per_pair": done.described["cpu_seconds"] / done.described["pairs"],
        "outside_seconds": done.seconds - done.described["seconds"],
        "grey_difference": difference(options.work, name, turn, options.count),
    }


def difference(work: Path, name: str, turn: int, count: int) -> float | None:
    """Mean absolute difference of grey levels from busigen's images of the same indices; None without a counterpart."""
    theirs = work / f"{name}-{turn}"
    ours = next(iter(sorted(work.glob("busigen-*"))), None)
    if name in ("busigen", "diffusers 50", "diffusers 50, windows") or name.startswith("inpaint") or ours is None:
        return None
    samples = Dataset.open(ours).samples(range(count))
    found = [np.asarray(Image.open(theirs / f"{sample.index}.image.png"), dtype=np.int16) for sample in samples]
    return float(np.mean([np.abs(image - sample.image).mean() for image, sample in zip(found, samples, strict=True)]))


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one; ``ratios`` compare it with busigen round by round, ``ratio`` is their median."""
    by_round = ratios(runs, name, "busigen", "seconds_per_pair")
    off = [run["grey_difference"] for run in runs if run["name"] == name and run["grey_difference"] is not None]
    keys = ("seconds_per_pair", "cpu_seconds_per_pair", "outside_seconds", "peak_memory")
    return {
        "name": name,
        "ratio": statistics.median(by_round),
        "ratios": by_round,
        **{key: median(runs, name, key) for key in keys},
        "grey_difference": max(off, default=None),
    }


class Clock:
    """Wall-clock and processor seconds of a block, of all its threads."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def described(self, pairs: int, draws: int) -> dict[str, Any]:
        """What a worker prints."""
        return {"pairs": pairs, "draws": draws, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


def sampler_on(backend: Backend, options: argparse.Namespace) -> Sampler:
    """The runtime's sampler on any backend, after one call of every graph that the run will make."""
    bundle = Bundle.recorded(options.bundle)
    healthy = None if options.backgrounds == SYNTHETIC else HealthyFolder(options.work / "healthy")
    sampler = Sampler(bundle, backend, classes=CLASSES, healthy=healthy, batch_size=options.batch_size)
    # All draws of the run, and no others: whatever class and window size they need is warm.
    if options.preset is None:
        sampler.draw(SEED, range(options.count), lambda samples: None)
    else:
        sampler.attempt(SEED, [(0, 0)])
    return sampler


def busigen(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of ``generate``."""
    bundle = Bundle.open(options.bundle)
    sampler = sampler_on(open_backend(bundle, options=EngineOptions(options.threads)), options)
    if options.preset is not None:
        with Clock() as clock:
            accepted, refused = sampler.attempt(SEED, [(index, 0) for index in range(options.count)])
        reasons = Counter(rejection.reason for rejection in refused)
        return {**clock.described(options.count, options.count), "accepted": len(accepted), "refused": reasons}
    with Clock() as clock:
        report = generate(sampler, folder(options), count=options.count, seed=SEED)
    return clock.described(options.count, options.count + sum(report.rejected.values()))


def stepwise(options: argparse.Namespace) -> dict[str, Any]:
    """ONNX Runtime, the loop in Python."""
    from stepwise import StepwiseBackend

    backend = StepwiseBackend(Bundle.open(options.bundle), options.work / "steps", options.threads)
    return few_steps(backend, options)


def eager(options: argparse.Namespace) -> dict[str, Any]:
    """PyTorch, the loop in Python."""
    from busigen.export.parity import TorchBackend

    return few_steps(TorchBackend(networks(options)), options)


def few_steps(backend: Backend, options: argparse.Namespace) -> dict[str, Any]:
    """The same draws on another backend, saved one by one."""
    sampler = sampler_on(backend, options)
    with Clock() as clock:
        generated = sampler.draw(SEED, range(options.count), lambda samples: None)
        save(((sample.index, sample.image, sample.mask) for sample in generated.samples), folder(options))
    return clock.described(options.count, options.count + len(generated.rejections))


def paper(options: argparse.Namespace, side: int = 256) -> dict[str, Any]:
    """The diffusers pipeline, half of the pairs of each class."""
    import torch
    from paper_pipeline import pipelines

    made, generator = pipelines(networks(options)), torch.Generator().manual_seed(SEED)
    files = sorted((options.work / "healthy").glob("*.png"))
    pictures = [np.asarray(Image.open(path)) for path in files]
    share = max(1, options.paper_count // len(made))
    batch = max(1, min(share, options.batch_size * 128**2 // side**2))
    for pipeline in made.values():
        pipeline(pictures[:batch], LESION_CLASSES[0], generator, num_inference_steps=1, side=side)
    pairs = []
    with Clock() as clock:
        for label, pipeline in made.items():
            for first in range(0, share, batch):
                healthy = [pictures[(first + k) % PICTURES] for k in range(min(batch, share - first))]
                pairs += pipeline(healthy, label, generator, side=side)
        save(((number, *pair) for number, pair in enumerate(pairs)), folder(options))
    return clock.described(len(pairs), len(pairs))


def inpaint(options: argparse.Namespace, *, paper: bool = False) -> dict[str, Any]:
    """Stable Diffusion's own pipeline: an ellipse's region painted, then its ring, in windows of 256 pixels."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    from busigen.data.geometry import edit_region, ring_region

    if options.threads:
        torch.set_num_threads(options.threads)
    info = Bundle.recorded(options.bundle).info
    counts = (30, 50) if paper else (info["solver_steps"]["lesion"], info["solver_steps"]["blend"])
    variant = "fp16" if (options.base_model / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists() else None
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        str(options.base_model),
        variant=variant,
        torch_dtype=torch.float32,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = np.ogrid[:RESOLUTION, :RESOLUTION]
    mask = ((rows - 120) / 40) ** 2 + ((columns - 128) / 50) ** 2 <= 1
    edit = edit_region(mask, np.ones_like(mask))
    generator = torch.Generator().manual_seed(SEED)

    def painted(image: Image.Image, count: int, region: NDArray[Any], prompt: str) -> Image.Image:
        size = {"height": RESOLUTION, "width": RESOLUTION, "strength": 1.0, "generator": generator}
        guidance = 7.5 if paper else 1.0
        steps = {"num_inference_steps": count, "guidance_scale": guidance}
        found = pipeline(prompt=prompt, image=image, mask_image=Image.fromarray(region), **steps, **size).images[0]
        return found

    number = max(1, options.paper_count if paper else min(options.count, FEW))
    pictures = [Image.open(path).convert("RGB") for path in sorted((options.work / "healthy").glob("*.png"))]
    painted(pictures[0], 1, edit, "")
    pairs = []
    with Clock() as clock:
        for index in range(number):
            prompt = info["painting"]["prompts"][LESION_CLASSES[index % 2]]
            image = painted(pictures[index % PICTURES], counts[0], edit, prompt)
            image = painted(image, counts[1], ring_region(edit), prompt)
            pairs.append((index, np.asarray(image.convert("L")), mask))
        save(pairs, folder(options))
    return clock.described(number, number)


def networks(options: argparse.Namespace) -> Any:
    """The checkpoint's networks, with as many threads as busigen takes."""
    import torch

    from busigen.training.checkpoint import load_networks

    if options.threads:
        torch.set_num_threads(options.threads)
    return load_networks(options.checkpoint)[0]


def save(pairs: Pairs, out: Path) -> None:
    """Image and mask as PNG files, as Pillow writes them."""
    out.mkdir()
    for number, image, mask in pairs:
        Image.fromarray(image).save(out / f"{number}.image.png")
        Image.fromarray(mask).save(out / f"{number}.mask.png")


def folder(options: argparse.Namespace) -> Path:
    """Where this process's pairs go."""
    return options.work / f"{options.worker}-{options.turn}"


PEERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "busigen": busigen,
    "diffusers 50": paper,
    "diffusers 50, windows": lambda options: paper(options, side=128),
    "torch": eager,
    "onnx steps": stepwise,
    "inpaint": inpaint,
    "inpaint, paper": lambda options: inpaint(options, paper=True),
}


if __name__ == "__main__":
    main()
