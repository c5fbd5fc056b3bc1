"""How are the phantoms' parameters distributed, and how far are phantoms from real images in their coarse structure?

python benchmarks/studies/phantom.py fit --data prepared/ --out results/phantom.json
python benchmarks/studies/phantom.py judge --data prepared/ --fit results/phantom.json

``fit`` takes the training split alone, without lesions and with mirrored copies. In each round it draws phantoms from
the distribution so far, takes the three nearest ones of each image (block means, deviations and gradients at 64 x 48
pixels) and makes the mean and covariance of their parameters the next distribution (population Monte Carlo, Beaumont et
al. 2009). Only mean and covariance are kept, so that no row is one patient's.

``judge`` compares phantoms with BUSI's normal images in the same frames: squared maximum mean discrepancy (Gaussian
kernel of the median distance) on the first 24 axes of the audit's scattering features at 64 x 48 pixels, where speckle
is averaged away; beside it the floor of two real halves, and the same with each image's mean and contrast removed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image
from tissue import PARAMETERS, Phantoms, phantom, values_of

from busigen.data.prepared import Prepared
from busigen.evaluation.realness.classifiers import scattering_features

SIZE = (64, 48)
"""Columns and rows at which structure is compared."""

BLOCK, AXES, NEAREST = 8, 24, 3
WEIGHTS = (1.0, 0.7, 0.7, 0.5)
"""Of block means, deviations, and mean gradients down and across."""

Floats = NDArray[Any]


def coarse(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image at ``SIZE``, pixels averaged."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(SIZE, Image.Resampling.BOX))


def blocks(values: Floats) -> Floats:
    """Means of blocks, ``(6, 8)``."""
    rows, columns = values.shape
    return values.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).mean(axis=(1, 3))


def features(image: NDArray[np.uint8]) -> Floats:
    """``(4, 6, 8)``: what ``WEIGHTS`` lists, of an image at ``SIZE``."""
    values = image.astype(np.float32)
    mean = blocks(values)
    deviation = np.sqrt(np.maximum(blocks(values**2) - mean**2, 0.0))
    gradients = (np.abs(np.diff(values, axis=axis, append=np.take(values, [-1], axis))) for axis in (0, 1))
    return np.stack([mean, deviation, *map(blocks, gradients)])


def tissue(prepared: Prepared) -> Iterable[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """Training images within their bars, and where they have lesions."""
    for row in prepared.table.filter((pl.col("split") == "train") & ~pl.col("class_conflict")).iter_rows(named=True):
        frame = np.s_[row["top"] : row["top"] + row["inner_height"], row["left"] : row["left"] + row["inner_width"]]
        yield np.asarray(prepared.clean[row["row"]])[frame], np.asarray(prepared.masks[row["row"]])[frame] > 0


def fit(options: argparse.Namespace) -> None:
    """Fit the distribution and write it."""
    rng = np.random.default_rng(options.seed)
    real, seen, frames = [], [], []
    for image, lesions in tissue(Prepared.open(options.data)):
        frames.append(image.shape)
        for flipped in (slice(None), slice(None, None, -1)):
            real.append(features(coarse(image[:, flipped])))
            seen.append(blocks(coarse(np.uint8(255) * lesions[:, flipped].astype(np.uint8)).astype(np.float32)) < BLOCK)
    shown = np.repeat(np.array(seen)[:, None], len(WEIGHTS), axis=1)
    values = np.array(real)
    middle, spread = (
        np.array([function(values[:, k][shown[:, k]]) for k in range(len(WEIGHTS))])[:, None, None]
        for function in (np.mean, np.std)
    )

    def scaled(found: Floats) -> Floats:
        return (found - middle) / spread * np.array(WEIGHTS)[:, None, None]

    targets = (scaled(values) * shown).reshape(len(values), -1)
    counted = shown.reshape(len(values), -1).astype(np.float64)
    mean, factor = np.zeros(len(PARAMETERS)), 1.2 * np.eye(len(PARAMETERS))
    rounds = []
    for number in range(options.rounds):
        started = time.perf_counter()
        logits = np.clip(mean + rng.standard_normal((options.count, len(mean))) @ factor.T, -4.0, 4.0)
        drawn = []
        for index, row in enumerate(logits):
            height, width = frames[rng.integers(len(frames))]
            drawn.append(features(coarse(phantom(values_of(row), options.seed + number, index, height, width)[0])))
        found = scaled(np.array(drawn)).reshape(options.count, -1)
        distances = (targets**2).sum(1)[:, None] - 2.0 * targets @ found.T + counted @ (found**2).T
        distances /= counted.sum(1)[:, None]
        nearest = np.argsort(distances, axis=1)[:, :NEAREST]
        chosen = logits[nearest.ravel()]
        mean = chosen.mean(axis=0)
        variance, axes = np.linalg.eigh(np.cov(chosen.T) + 0.1**2 * np.eye(len(mean)))
        factor = axes * np.sqrt(np.maximum(variance, 0.0))
        distance = float(np.median(np.sqrt(distances.min(axis=1))))
        rounds.append({"median_distance": round(distance, 4), "phantoms_used": len(np.unique(nearest))})
        print(f"round {number + 1}: {rounds[-1]}, {time.perf_counter() - started:.0f} s", flush=True)
    record = {
        "parameters": list(PARAMETERS),
        "mean": np.round(mean, 4).tolist(),
        "factor": np.round(factor, 4).tolist(),
        "images": len(frames),
        "phantoms_per_round": options.count,
        "rounds": rounds,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


class Space:
    """The axes on which real images are compared with others."""

    def __init__(self, real: NDArray[np.uint8]) -> None:
        raw = scattering_features(real, (4, 4)).astype(np.float64)
        self.mean, self.deviation = raw.mean(axis=0), raw.std(axis=0) + 1e-6
        *_, axes = np.linalg.svd((raw - self.mean) / self.deviation, full_matrices=False)
        self.axes = axes[:AXES].T
        self.scale = ((raw - self.mean) / self.deviation @ self.axes).std(axis=0)
        self.real = self.of(real)
        apart = self._squares(self.real, self.real)
        self.width = float(np.median(apart[apart > 0]))

    def of(self, images: NDArray[np.uint8]) -> Floats:
        """``(N, AXES)``."""
        raw = scattering_features(images, (4, 4)).astype(np.float64)
        return np.asarray((raw - self.mean) / self.deviation @ self.axes / self.scale)

    @staticmethod
    def _squares(first: Floats, second: Floats) -> Floats:
        return np.asarray(((first[:, None] - second[None]) ** 2).sum(axis=-1))

    def mmd(self, first: Floats, second: Floats) -> float:
        """The unbiased estimate of the squared discrepancy (Gretton et al. 2012, eq. 3)."""
        own = 0.0
        for part in (first, second):
            kernel, count = np.exp(-self._squares(part, part) / self.width), len(part)
            own += float(kernel.sum() - count) / (count * (count - 1))
        return own - 2.0 * float(np.exp(-self._squares(first, second) / self.width).mean())


def without_contrast(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images with one mean and one deviation."""
    values = images.astype(np.float32)
    mean, deviation = (function(values, axis=(1, 2), keepdims=True) for function in (np.mean, np.std))
    return np.clip((values - mean) / (deviation + 1e-3) * 40.0 + 110.0, 0, 255).astype(np.uint8)


def judge(options: argparse.Namespace) -> None:
    """Print the table."""
    prepared = Prepared.open(options.data)
    rows = list(
        prepared.table.filter((pl.col("class") == "normal") & (pl.col("source") == "busi")).iter_rows(named=True)
    )
    frames = [(row["top"], row["left"], row["inner_height"], row["inner_width"]) for row in rows]
    real = np.stack(
        [
            coarse(np.asarray(prepared.clean[row["row"]])[top : top + height, left : left + width])
            for row, (top, left, height, width) in zip(rows, frames, strict=True)
        ]
    )
    spaces = (Space(real), Space(without_contrast(real)))
    rng, floor = np.random.default_rng(options.seed), []
    for _ in range(200):
        order = rng.permutation(len(real))
        floor.append(spaces[0].mmd(*(spaces[0].real[part] for part in np.array_split(order, 2))))
    low, high = np.percentile(floor, (2.5, 97.5))
    print(f"{len(real)} images; floor of two real halves {np.mean(floor):.3f} [{low:.3f}, {high:.3f}]")
    record = json.loads(options.fit.read_text())
    fitted = Phantoms(np.array(record["mean"]), np.array(record["factor"]))
    for name, source in (("unfitted", Phantoms.unfitted()), ("fitted", fitted)):
        for seed in range(options.seed, options.seed + 3):
            images = np.stack(
                [coarse(phantom(source.values(seed, k), seed, k, *frame[2:])[0]) for k, frame in enumerate(frames)]
            )
            plain = spaces[0].mmd(spaces[0].real, spaces[0].of(images))
            equal = spaces[1].mmd(spaces[1].real, spaces[1].of(without_contrast(images)))
            print(f"{name}, seed {seed}: {plain:.3f}, contrast removed {equal:.3f}", flush=True)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (fit, judge):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
        command.add_argument("--seed", type=int, default=3)
        if function is fit:
            command.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "phantom.json")
            command.add_argument("--count", type=int, default=4000, help="phantoms a round")
            command.add_argument("--rounds", type=int, default=4)
        else:
            command.add_argument("--fit", type=Path, default=Path(__file__).parent / "results" / "phantom.json")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
