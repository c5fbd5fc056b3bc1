"""Which rank and which layers stage 2's adapters want: held-out error against the base, size, and cost.

python benchmarks/studies/lora.py runs/mine --data prepared/ --steps 60

Every combination trains a fresh adapter per class on the run's base, with the same steps, batches and draws, and is
measured on the same held-out batches with the same times and noise. The interval is that of the mean paired difference
to the base without an adapter, over batches. *merged* is how far the merged network is from base + adapter.
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
import torch
from finished_run import FinishedRun
from numpy.typing import NDArray
from rich.console import Console
from torch import Generator

from busigen.registry import LESION_CLASSES
from busigen.training.checkpoint import merge, save_adapter, with_adapter
from busigen.training.recipe import LoraSpec
from busigen.training.tasks.denoiser import DenoiserTask
from busigen.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "lora.json"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION, "+ feed-forward": (*ATTENTION, "net.0.proj", "net.2"), "all": LoraSpec().targets}
STAGE = "lesion"


def main() -> None:
    """Train and measure every combination, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, with its cache")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--ranks", default="2,8,32")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    run = FinishedRun(options.run, options.data)
    combinations = [("all", int(rank)) for rank in options.ranks.split(",")]
    combinations += [(name, LoraSpec().rank) for name in TARGETS if name != "all"]
    rows: list[dict[str, Any]] = []
    for label in LESION_CLASSES:
        spec = replace(run.specs[f"{STAGE}-{label}"], steps=options.steps)
        without = errors(run.task(spec, run.base(STAGE)), options.batches)
        for name, rank in combinations:
            lora = LoraSpec(rank=rank, alpha=2 * rank, targets=TARGETS[name])
            rows.append({"class": label, "targets": name, "rank": rank, **trained(run, spec, lora, without)})
            print(json.dumps(rows[-1]), flush=True)
            options.results.parent.mkdir(exist_ok=True)
            options.results.write_text(json.dumps({"steps": options.steps, "rows": rows}, indent=1) + "\n")


def trained(run: FinishedRun, spec: Any, lora: LoraSpec, without: NDArray[np.float64]) -> dict[str, Any]:
    """Train one adapter and measure it."""
    model = with_adapter(run.base(STAGE), lora, run.seed)
    task = run.task(spec, model)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(task, seed=run.seed, folder=Path(folder), device=torch.device("cpu"), console=Console(quiet=True)).run()
        seconds = time.perf_counter() - started
        save_adapter(model, Path(folder) / "adapter")
        size = sum(path.stat().st_size for path in (Path(folder) / "adapter").glob("*.safetensors"))
    model.eval()
    difference = errors(task, without.size) - without
    half = 1.96 * float(difference.std(ddof=1)) / without.size**0.5
    return {
        "error_without": round(float(without.mean()), 4),
        "difference": round(float(difference.mean()), 4),
        "interval": [round(float(difference.mean()) - half, 4), round(float(difference.mean()) + half, 4)],
        "kilobytes": round(size / 1000),
        "seconds_a_step": round(seconds / spec.steps, 2),
        "merged": _merged_apart(run, spec, model, task),
    }


def _merged_apart(run: FinishedRun, spec: Any, model: Any, task: DenoiserTask) -> float:
    """Largest relative difference in error between base + adapter and the merged network, over three batches."""
    before = errors(task, 3)
    after = errors(run.task(spec, merge(model)), 3)
    return float(np.abs(after / before - 1.0).max())


@torch.no_grad()
def errors(task: DenoiserTask, batches: int) -> NDArray[np.float64]:
    """Held-out velocity errors, the same batches and draws for every network."""
    task.module.eval()
    return np.array([float(task.error(Generator().manual_seed(k), lambda batch: batch)) for k in range(batches)])


if __name__ == "__main__":
    main()
