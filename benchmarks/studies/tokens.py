"""What the context encoder's tokens bring to each stage: the held-out velocity error with them, without, and shuffled.

python benchmarks/studies/tokens.py runs/mine --data prepared/

Reads a finished run of ``busigen train`` with its cache. *Off* puts zeros in place of the tokens; *shuffled* gives each
sample the tokens of another image. A stage that ignores its context has the same error in all three. Errors are paired
by batch (same images, times and noise), so the interval is that of the mean difference to *on* over batches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished_run import FinishedRun
from torch import Generator, Tensor

from busigen.registry import STAGES
from busigen.training.tasks.denoiser import DenoiserTask

RESULTS = Path(__file__).parent / "results" / "tokens.json"
Batch = dict[str, Tensor]


def on(batch: Batch) -> Batch:
    """The image's own tokens."""
    return batch


def off(batch: Batch) -> Batch:
    """Empty tokens, as the healthy prior has one."""
    return {**batch, "tokens": torch.zeros_like(batch["tokens"]), "keep": torch.ones_like(batch["keep"])}


def shuffled(batch: Batch) -> Batch:
    """The tokens of the next image in the batch, and its dropped patches."""
    return {**batch, "tokens": batch["tokens"].roll(1, 0), "keep": batch["keep"].roll(1, 0)}


WAYS = {"on": on, "off": off, "shuffled": shuffled}


def main() -> None:
    """Measure every stage's base, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, with its cache")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    run = FinishedRun(options.run, options.data)
    report: dict[str, Any] = {}
    for stage in STAGES:
        report[stage] = compare(run.task(run.specs[stage], run.base(stage)), options.batches)
        for way, row in report[stage].items():
            print(f"{stage:8} {way:9} error {row['error']:.4f}   to on {row['difference']:+.4f} {row['interval']}")
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def compare(task: DenoiserTask, batches: int) -> dict[str, dict[str, Any]]:
    """Mean error per way, and its mean difference to *on* with a 95 % interval over batches."""
    errors = {
        way: np.array([float(task.error(Generator().manual_seed(k), change)) for k in range(batches)])
        for way, change in WAYS.items()
    }
    rows = {}
    for way, values in errors.items():
        difference = values - errors["on"]
        half = 1.96 * float(difference.std(ddof=1)) / batches**0.5
        mean = float(difference.mean())
        rows[way] = {
            "error": round(float(values.mean()), 5),
            "difference": round(mean, 5),
            "interval": [round(mean - half, 5), round(mean + half, 5)],
            "batches": batches,
        }
    return rows


if __name__ == "__main__":
    main()
