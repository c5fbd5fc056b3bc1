"""Stage 2 on windows around the lesion against stage 2 on whole images, at equal training time.

python benchmarks/studies/windows.py runs/mine --data prepared/ --minutes 5

Both have the run's autoencoder and context, the same network from scratch, the same images, edit regions and seeds, and
as many steps as fit into the minutes. The error is that of the velocity in the edit region of held-out images, averaged
per image over the same times, so it compares cell for cell; the difference is paired by image. Then each paints the
held-out lesions anew into their images, with their own masks, and the audit's physics and fidelity sections judge the
result; the seconds are those of painting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from finished_run import FinishedRun
from numpy.typing import NDArray
from rich.console import Console
from steps import judged
from torch import Generator, Tensor

from busigen.data.geometry import edit_region
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reading.sets import from_prepared
from busigen.registry import BUCKETS, CLASSES, LESION_CLASSES, SOLVER_STEPS
from busigen.training.examples import Frames, load_examples, random_lesion, save_examples, select, window_examples
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import repaint
from busigen.training.tasks.denoiser import DenoiserTask
from busigen.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "windows.json"
ARRANGEMENTS = {"windows": BUCKETS, "whole images": BUCKETS[-1:]}
TIMES = torch.linspace(0.15, 0.9, 6)
CPU = torch.device("cpu")


def main() -> None:
    """Train both, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for each")
    parser.add_argument("--count", type=int, default=120, help="held-out images to paint")
    parser.add_argument("--out", type=Path, default=Path("out/windows"), help="folder for the sections' pictures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    run = FinishedRun(options.run, options.data)
    real = from_prepared(run.setting.prepared, ("val", "test"), lesions_only=True)
    report: dict[str, Any] = {"minutes": options.minutes}
    errors: dict[str, dict[int, float]] = {}
    for name, buckets in ARRANGEMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            run.setting.cache = Path(folder)
            module, spec = trained(run, buckets, options.minutes * 60, Path(folder))
            errors[name] = held_out(run.task(spec, module), Path(folder))
        networks = replace(run.setting.networks, denoisers={"lesion": module})
        painted, seconds = painting(run, networks, buckets, options.count)
        report[name] = {
            "steps": spec.steps,
            "error": round(float(np.mean(list(errors[name].values()))), 4),
            "seconds_per_image": round(seconds, 3),
            **judged(painted, real, options),
        }
        print(name, json.dumps(report[name]), flush=True)
    report["difference"] = paired(*errors.values())
    print("whole images - windows", report["difference"])
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


def trained(run: FinishedRun, buckets: tuple[int, ...], seconds: float, folder: Path) -> tuple[Any, TaskSpec]:
    """Stage 2 from scratch on windows of ``buckets``, for about ``seconds``."""
    for split in ("train", "val"):
        frames = Frames(run.setting.prepared, select(run.setting.prepared, split))
        examples = window_examples(
            frames,
            run.setting.networks,
            variants=1,
            seed=run.seed,
            progress=lambda done, total: None,
            buckets=buckets,
        )
        save_examples(folder / f"windows-{split}-1.safetensors", examples)
    spec = replace(run.specs["lesion"], variants=1, steps=12, warmup=2)
    started = time.perf_counter()
    _train(run, spec, folder / "trial")
    steps = max(20, round(seconds * spec.steps / (time.perf_counter() - started)))
    spec = replace(spec, steps=steps, warmup=min(100, steps // 10))
    return _train(run, spec, folder / "run"), spec


def _train(run: FinishedRun, spec: TaskSpec, folder: Path) -> Any:
    torch.manual_seed(run.seed)
    module = build("lesion", run.setting.networks.preset)
    task = run.task(spec, module)
    Trainer(task, seed=run.seed, folder=folder, device=CPU, console=Console(quiet=True)).run()
    return module.eval()


@torch.no_grad()
def held_out(task: DenoiserTask, folder: Path) -> dict[int, float]:
    """Velocity error in the edit region, by prepared row of the held-out lesion images."""
    found: dict[int, list[float]] = {}
    normal = CLASSES.index("normal")
    for examples in load_examples(folder / "windows-val-1.safetensors").values():
        lesions = torch.nonzero(examples.tensors["label"] != normal).ravel()
        for index in lesions.split(16):
            batch = examples.batch(index, CPU)
            for number, t in enumerate(TIMES):
                for row, value in zip(batch["row"].tolist(), _errors(task, batch, t, number), strict=True):
                    found.setdefault(row, []).append(value)
    return {row: float(np.mean(values)) for row, values in found.items()}


def _errors(task: DenoiserTask, batch: dict[str, Tensor], t: Tensor, seed: int) -> list[float]:
    clean = batch["clean"]
    noise = torch.randn(clean.shape, generator=Generator().manual_seed(seed))
    condition = (batch["known"], batch["mask"], batch["edit"])
    times = t.expand(len(clean))
    velocity = task.velocity(
        (1 - t) * clean + t * noise, times, batch["label"], batch["tokens"], batch["keep"], *condition
    )
    weight = (batch["edit"] * batch["weight"]).expand_as(clean)
    squared = (velocity - (noise - clean)).pow(2) * weight
    values: list[float] = (squared.sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1.0)).tolist()
    return values


def painting(run: FinishedRun, networks: Networks, buckets: tuple[int, ...], count: int) -> tuple[ImageSet, float]:
    """Held-out lesions painted anew in their own images, and the seconds that one takes."""
    prepared = run.setting.prepared
    rows = pl.concat([select(prepared, split) for split in ("val", "test")]).filter(pl.col("class") != "normal")
    rows = rows[np.linspace(0, rows.height - 1, min(count, rows.height)).round().astype(int).tolist()]
    frames = Frames(prepared, rows)
    images: list[NDArray[np.uint8]] = []
    masks: list[NDArray[np.bool_]] = []
    labels: list[str] = []
    started = time.perf_counter()
    for label in LESION_CLASSES:
        chosen = [frames[k] for k in range(len(frames)) if frames.table["class"][k] == label]
        shapes = [random_lesion(frame, np.random.default_rng((run.seed, k))) for k, frame in enumerate(chosen)]
        edits = [edit_region(mask, frame.valid) for mask, frame in zip(shapes, chosen, strict=True)]
        options = {"label": label, "masks": shapes, "steps": SOLVER_STEPS["lesion"], "buckets": buckets}
        images += repaint([frame.image for frame in chosen], edits, networks, run.seed, **options)
        masks += shapes
        labels += [label] * len(chosen)
    seconds = (time.perf_counter() - started) / len(images)
    table = pl.DataFrame([{"id": str(k), "class": label, "group": k} for k, label in enumerate(labels)])
    stacked = np.stack(masks)
    return ImageSet("painted", np.stack(images), stacked, np.ones_like(stacked), np.zeros_like(stacked), table), seconds


def paired(windows: dict[int, float], whole: dict[int, float]) -> dict[str, Any]:
    """Mean difference in error per image, with a 95 % interval."""
    both = sorted(windows.keys() & whole.keys())
    difference = np.array([whole[row] - windows[row] for row in both])
    half = 1.96 * float(difference.std(ddof=1)) / len(both) ** 0.5
    mean = float(difference.mean())
    return {"mean": round(mean, 4), "interval": [round(mean - half, 4), round(mean + half, 4)], "images": len(both)}


if __name__ == "__main__":
    main()
