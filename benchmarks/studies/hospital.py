"""What stage 2 learns from 50, 150 or all images of a hospital that its base has never seen.

python benchmarks/studies/hospital.py runs/mine --data prepared/ --minutes 20

The hospital is BUSI, the base a stage 2 trained from scratch on BUS-BRA's training images for ``--minutes``. Then, for
each number of BUSI's training images, whole groups of them: adapters of both classes on that base, and for comparison a
stage 2 from scratch on these images alone, for a third of the minutes. Each keeps its best weights on BUSI's validation
images and is measured on its test images: the velocity error in the edit region, averaged per image over the same
times; differences to the base are paired by image. Autoencoder and context encoder are the run's, which saw BUSI.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from finished_run import FinishedRun
from rich.console import Console
from windows import CPU, held_out

from busigen.registry import LESION_CLASSES
from busigen.training.checkpoint import with_adapter
from busigen.training.examples import Frames, save_examples, select, window_examples
from busigen.training.networks.build import build
from busigen.training.recipe import LoraSpec, TaskSpec
from busigen.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "hospital.json"
BASE, HOSPITAL = "busbra", "busi"
VARIANTS = 2
Errors = dict[int, float]


def main() -> None:
    """Train the base and every arm, print a line for each and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the base's training")
    parser.add_argument("--images", default="50,150,600", help="training images of the hospital, as far as it has them")
    parser.add_argument("--steps", type=int, default=240, help="of each adapter")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    run = FinishedRun(options.run, options.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in LESION_CLASSES:
            encode(run, folder / "test" / label, "val", rows(run, "test", HOSPITAL, label))
        prepare(run, folder / "base", rows(run, "train", BASE), rows(run, "val", BASE))
        base, spec = from_scratch(run, folder / "base", options.minutes * 60)
        without = measured(run, spec, dict.fromkeys(LESION_CLASSES, base), folder)
        report: dict[str, Any] = {"minutes": options.minutes, "test_images": len(without)}
        report["base"] = {"images": rows(run, "train", BASE).height, "steps": spec.steps, **summary(without)}
        print("base", json.dumps(report["base"]), flush=True)
        for wanted in map(int, options.images.split(",")):
            chosen = some(rows(run, "train", HOSPITAL), wanted, run.seed)
            arm = folder / str(wanted)
            prepare(run, arm, chosen, rows(run, "val", HOSPITAL))
            found: dict[str, Any] = {"images": chosen.height}
            adapters, seconds = adapted(run, arm, base.state_dict(), options.steps)
            found["adapters"] = {"seconds": seconds, **summary(measured(run, spec, adapters, folder), without)}
            alone, own = from_scratch(run, arm, options.minutes * 20)
            errors = measured(run, spec, dict.fromkeys(LESION_CLASSES, alone), folder)
            found["from scratch"] = {"steps": own.steps, **summary(errors, without)}
            report[str(wanted)] = found
            print(wanted, json.dumps(found), flush=True)
            options.results.parent.mkdir(exist_ok=True)
            options.results.write_text(json.dumps(report, indent=1) + "\n")


def rows(run: FinishedRun, split: str, source: str, label: str | None = None) -> pl.DataFrame:
    """A source's lesion images of a split."""
    table = select(run.setting.prepared, split).filter((pl.col("source") == source) & (pl.col("class") != "normal"))
    return table if label is None else table.filter(pl.col("class") == label)


def some(table: pl.DataFrame, count: int, seed: int) -> pl.DataFrame:
    """About ``count`` rows, in whole groups; fewer are among more of the same seed."""
    groups = np.random.default_rng(seed).permutation(table["group"].unique().sort().to_numpy())
    sizes = np.array([(table["group"] == group).sum() for group in groups])
    kept = groups[: max(1, int(np.searchsorted(np.cumsum(sizes), count, side="right")))]
    return table.filter(pl.col("group").is_in(kept.tolist()))


def prepare(run: FinishedRun, folder: Path, train: pl.DataFrame, val: pl.DataFrame) -> None:
    """Encode what an arm learns from, and what it is validated on."""
    encode(run, folder, "train", train, VARIANTS)
    encode(run, folder, "val", val)


def encode(run: FinishedRun, folder: Path, split: str, table: pl.DataFrame, variants: int = 1) -> None:
    """Keep these images' windows where a task looks for those of ``split``."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = window_examples(
        Frames(run.setting.prepared, table),
        run.setting.networks,
        variants=variants,
        seed=run.seed,
        progress=lambda done, total: None,
    )
    save_examples(folder / f"windows-{split}-{variants}.safetensors", examples)


def from_scratch(run: FinishedRun, folder: Path, seconds: float) -> tuple[Any, TaskSpec]:
    """Stage 2 from scratch, for about ``seconds``."""
    run.setting.cache = folder
    trial = replace(run.specs["lesion"], variants=VARIANTS, steps=12, warmup=2)
    started = time.perf_counter()
    _train(run, trial, folder / "trial", _fresh(run))
    steps = max(20, round(seconds * trial.steps / (time.perf_counter() - started)))
    spec = replace(trial, steps=steps, warmup=min(100, steps // 10))
    return _train(run, spec, folder / "run", _fresh(run)), spec


def adapted(run: FinishedRun, folder: Path, weights: dict[str, torch.Tensor], steps: int) -> tuple[dict[str, Any], int]:
    """An adapter for each class on the base, and the seconds that both took."""
    run.setting.cache = folder
    started = time.perf_counter()
    adapters = {}
    for label in LESION_CLASSES:
        base = _fresh(run)
        base.load_state_dict(weights)
        spec = replace(run.specs[f"lesion-{label}"], variants=VARIANTS, steps=steps, warmup=min(20, steps // 10))
        adapters[label] = _train(run, spec, folder / label, with_adapter(base, LoraSpec(), run.seed))
    return adapters, round(time.perf_counter() - started)


def _fresh(run: FinishedRun) -> Any:
    torch.manual_seed(run.seed)
    return build("lesion", run.setting.networks.preset)


def _train(run: FinishedRun, spec: TaskSpec, folder: Path, module: Any) -> Any:
    task = run.task(spec, module)
    Trainer(task, seed=run.seed, folder=folder, device=CPU, console=Console(quiet=True)).run()
    return module.eval()


def measured(run: FinishedRun, spec: TaskSpec, modules: dict[str, Any], folder: Path) -> Errors:
    """Errors of the hospital's test images, each class's by its own network."""
    found: Errors = {}
    for label, module in modules.items():
        found |= held_out(run.task(spec, module), folder / "test" / label)
    return found


def summary(errors: Errors, without: Errors | None = None) -> dict[str, Any]:
    """Mean error, and the mean difference to the base with a 95 % interval."""
    mean = {"error": round(float(np.mean(list(errors.values()))), 4)}
    if without is None:
        return mean
    difference = np.array([errors[row] - without[row] for row in sorted(errors)])
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    middle = float(difference.mean())
    interval: Sequence[float] = (middle - half, middle + half)
    return {**mean, "difference": round(middle, 4), "interval": [round(value, 4) for value in interval]}


if __name__ == "__main__":
    main()
