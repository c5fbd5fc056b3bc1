"""How are the phantoms' parameters distributed, and how far are phantoms from real images in their coarse structure?

python benchmarks/studies/phantom.py fit --data prepared/ --out results/phantom.json
python benchmarks/studies/phantom.py judge --data prepared/ --fit results/phantom.json --checkpoint restored/

``fit`` takes the training images without a lesion or with a small one, which is covered: all of them, and then those of
each scanner, in their own frames. In each round it draws phantoms from the
distribution so far, and tells from all that were drawn how the features of the figure below go with the parameters
(linear regression). Then it moves the parameters' mean to where the mean of the features is the images', and gives
the parameters such variances that the features have the images' (a ridge holds what makes little difference).
Only means and covariances are kept, so that no row is one patient's. Beside the result it leaves what was
drawn (`.any.npz` and so on), by which the same command continues.

``judge`` compares phantoms with BUSI's normal images in the same frames, or with all such images of a scanner: squared
maximum mean discrepancy (Gaussian kernel of the median distance) on the first 24 axes of the audit's scattering
features at 64 x 48 pixels, where speckle is averaged away (`busigen.evaluation.fidelity.coarse`); beside it the floor
of two real halves, of images and of whole groups, the same with each image's mean and contrast removed, and the AUC of
the audit's ridge. `fitted_together` is the audit's figure, with axes fitted on both sets: axes of real images alone
find even real ones apart that they have not seen. With a checkpoint (`busigen restore`), phantoms are also encoded and
decoded, and finished by its prior from several times on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import lsq_linear

from busigen.data.prepared import Prepared
from busigen.evaluation.fidelity.coarse import Space, without_contrast
from busigen.evaluation.fidelity.measures import mmd2
from busigen.evaluation.realness.classifiers import Ridge, Task, auc, folds, scattering_features, shrunk
from busigen.evaluation.statistics.grouped import halves
from busigen.phantoms.distribution import LIMIT, Phantoms, numbers_for
from busigen.phantoms.tissue import PARAMETERS, values_of
from busigen.runtime.sampling.inputs.backgrounds import phantom_at
from busigen.runtime.sampling.noise import sums

SPREAD, VARIANCES = 1.2, (0.1, 2.5)
"""Deviation of parameters before the fit, and least and greatest variance after it."""

BRIGHTNESS = 0.7
"""How much an eighth's brightness weighs; an axis of coarse structure weighs 1."""

SMALL, FEWEST = 0.05, 100
"""Largest share of an image that a lesion may have, and least number of such images of a scanner."""

STIFFNESS = 0.05
"""How strongly parameters are held where they are, against what they explain of features in units of their variance."""

Floats = NDArray[Any]


def with_tissue(prepared: Prepared) -> pl.DataFrame:
    """Rows of the images that show no lesion or a small one."""
    return prepared.table.filter(pl.col("mask_area") < SMALL)


def tissue_images(prepared: Prepared, table: pl.DataFrame) -> list[NDArray[np.uint8]]:
    """Images within their bars; lesions are covered by what is around them."""
    found = []
    for row in table.iter_rows(named=True):
        frame = np.s_[row["top"] : row["top"] + row["inner_height"], row["left"] : row["left"] + row["inner_width"]]
        found.append(covered(np.asarray(prepared.clean[row["row"]])[frame], prepared.masks[row["row"]][frame] > 0))
    return found


def covered(image: NDArray[np.uint8], lesion: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """An image with a smooth surface over the lesion: coarse features see no texture."""
    hidden = ndimage.binary_dilation(lesion, iterations=4)
    known = (~hidden).astype(np.float32)
    smooth, weight = (ndimage.gaussian_filter(part, 10.0) for part in (image * known, known))
    return np.where(hidden, smooth / np.maximum(weight, 1e-3), image).astype(np.uint8)


def fit(options: argparse.Namespace) -> None:
    """Fit the distribution of all images, then that of each scanner, and write them; the same command continues."""
    prepared = Prepared.open(options.data)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"rounds": {}}
    count = len(PARAMETERS)
    unfitted = np.zeros(count), SPREAD * np.eye(count)
    table = with_tissue(prepared).filter(pl.col("split") == "train")
    known = sorted(table["scanner"].drop_nulls().unique())
    fitted: dict[str | None, Phantoms] = {}
    for scanner in (None, *known):
        own = table if scanner is None else table.filter(pl.col("scanner") == scanner)
        images = tissue_images(prepared, own)
        if len(images) < FEWEST:
            print(f"{scanner}: {len(images)} images, too few for a distribution of its own")
            continue
        name = scanner or "any"
        start = unfitted if scanner is None else (fitted[None].mean, unfitted[1])
        kept = options.out.with_suffix(f".{name.replace(' ', '-')}.npz")
        fitted[scanner], rounds = fit_one(images, start, name, kept, options)
        found["rounds"][name] = {"images": len(images), "rounds": rounds}
        single = {key: value for key, value in fitted.items() if key is not None}
        written = {**replace(fitted[None], scanners=single).to_json(), "phantoms_per_round": options.count}
        options.out.write_text(json.dumps({**written, "rounds": found["rounds"]}) + "\n")


def fit_one(
    images: list[NDArray[np.uint8]], start: tuple[Floats, Floats], name: str, kept: Path, options: argparse.Namespace
) -> tuple[Phantoms, list[dict[str, float]]]:
    """The distribution that suits these images, and what each round found; ``kept`` holds what was drawn."""
    real, frames = np.stack([shrunk(image) for image in images]), [image.shape for image in images]
    space, mean, factor = Space(real), *start
    wanted = features_of(real, real, space)
    logits, features = np.zeros((0, len(mean))), np.zeros((0, wanted.shape[1]))
    rounds: list[dict[str, float]] = []
    if kept.exists():
        with np.load(kept) as arrays:
            logits, features, mean, factor = (arrays[key] for key in ("logits", "features", "mean", "factor"))
            rounds = [{"mmd": float(one), "step": float(other)} for one, other in arrays["rounds"]]
    for number in range(len(rounds), options.rounds):
        began, rng = time.perf_counter(), np.random.default_rng((options.seed, number))
        rows = np.clip(mean + rng.standard_normal((options.count, len(mean))) @ factor.T, -LIMIT, LIMIT)
        drawn = []
        for index, row in enumerate(rows):
            height, width = frames[rng.integers(len(frames))]
            noise = sums(options.seed + number, index, 0, "phantom noise", (numbers_for(height, width),))
            drawn.append(shrunk(Phantoms.unfitted().drawn(values_of(row), noise, height, width).image))
        found = features_of(np.stack(drawn), real, space)
        logits, features = np.concatenate([logits, rows]), np.concatenate([features, found])
        before = mmd(space, space.fitted, found[:, : space.fitted.shape[1]])
        step, deviations = towards(wanted, logits, features, options.count)
        mean, factor = np.clip(mean + step, -LIMIT, LIMIT), np.diag(deviations)
        rounds.append({"mmd": round(before, 4), "step": round(float(np.linalg.norm(step)), 3)})
        print(f"{name}, round {number + 1}: {rounds[-1]}, {time.perf_counter() - began:.0f} s", flush=True)
        told = [(one["mmd"], one["step"]) for one in rounds]
        np.savez(kept, logits=logits, features=features, mean=mean, factor=factor, rounds=told)
    return Phantoms(mean, factor), rounds


def features_of(images: NDArray[np.uint8], real: NDArray[np.uint8], space: Space) -> Floats:
    """What is fitted of coarse images ``(N, 48, 64)``: their place in ``space``, and how bright each eighth is.

    Brightness is in deviations of the ``real`` images' and weighs ``BRIGHTNESS`` times as much as an axis.
    """
    own, all_real = (part.reshape(len(part), 8, -1).mean(axis=2) for part in (images, real))
    return np.concatenate([space.of(images), BRIGHTNESS * (own - all_real.mean(axis=0)) / all_real.std(axis=0)], axis=1)


def towards(real: Floats, logits: Floats, drawn: Floats, recent: int) -> tuple[Floats, Floats]:
    """How far the mean of parameters ``(N, P)`` is to move, and what deviations they are to have.

    The features of ``drawn`` phantoms ``(N, F)`` are to be as those of the ``real`` images are. They are taken as
    linear in the parameters, and the mean of the last ``recent`` as that of today's.
    """
    ones = np.ones((len(logits), 1))
    found, *_ = np.linalg.lstsq(np.concatenate([ones, logits], axis=1), drawn, rcond=None)
    slopes, rest = found[1:].T, (drawn - found[0] - logits @ found[1:]).var(axis=0)
    count = logits.shape[1]
    missed = real.mean(axis=0) - drawn[-recent:].mean(axis=0)
    step = np.linalg.solve(slopes.T @ slopes + STIFFNESS * np.eye(count), slopes.T @ missed)
    wanted = np.maximum(real.var(axis=0) - rest, 0.0)
    rows = np.concatenate([slopes**2, STIFFNESS * np.eye(count)])
    variances = lsq_linear(rows, np.concatenate([wanted, np.full(count, STIFFNESS * SPREAD**2)]), VARIANCES).x
    return step, np.sqrt(variances)


STARTS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Times from which the prior finishes phantoms."""

Frame = tuple[int, int, int, int]  # Top, left, height, width.


class Finisher:
    """The networks of a checkpoint, by which phantoms become backgrounds."""

    def __init__(self, checkpoint: Path, evaluations: int, scanner: str | None) -> None:
        import torch

        from busigen.training.checkpoint import load_networks

        torch.set_num_threads(1)
        self.torch, self.evaluations = torch, evaluations
        self.networks, record = load_networks(checkpoint)
        self.styles = np.array(record.get("styles") or [])
        self.scanner = 0 if scanner is None else self.networks.scanners.index(scanner) + 1

    def variants(
        self, images: list[NDArray[np.uint8]], frames: list[Frame], starts: Iterable[float], seed: int
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Names, and coarse images ``(N, 48, 64)`` of what becomes of phantoms in their frames."""
        from busigen.phantoms.distribution import filled
        from busigen.runtime.sampling.inputs.healthy_images import place_of

        torch, rng = self.torch, np.random.default_rng((seed, 7))
        places = [place_of(frame[2:]) for frame in frames]
        pixels = np.stack([filled(image, place) for image, place in zip(images, places, strict=True)])
        inputs = torch.from_numpy(pixels[:, None].astype(np.float32) / 127.5 - 1.0)
        with torch.no_grad():
            latents = torch.cat([self.networks.encoder(part) for part in inputs.split(16)])
        yield "decoded", self._coarse(latents, places, seed)
        noise = torch.from_numpy(self._noise(latents.shape, rng))
        for start in starts:
            yield f"from {start}", self._coarse(self.finished(latents, noise, places, start), places, seed)
        yield "prior alone", self._coarse(self.finished(latents, noise, places, 1.0), places, seed)

    def _noise(self, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
        from busigen.noise_styles import styled

        noise = rng.standard_normal(shape, np.float32)
        if self.styles.size:
            noise = styled(noise, self.styles, rng.standard_normal((shape[0], self.styles.shape[1])))
        return noise

    def finished(self, latents: Any, noise: Any, places: list[Frame], start: float) -> Any:
        """Latents that the prior makes of others from a time on."""
        from busigen.registry import CLASSES
        from busigen.solver import solver_steps
        from busigen.training.examples import told
        from busigen.training.networks.build import place_condition, scanner_condition
        from busigen.training.networks.inference import Velocity, integrate

        torch = self.torch
        count = self.evaluations if start < 1.0 else self.networks.steps["prior"]
        table = solver_steps("prior", count, start)
        velocity = Velocity(self.networks.denoisers["prior"]).eval()
        parts, frame = [], torch.tensor(places, dtype=torch.float32)
        for k in range(0, len(latents), 16):
            x = (1.0 - start) * latents[k : k + 16] + start * noise[k : k + 16]
            label = torch.full((len(x),), CLASSES.index("normal"))
            context = self.networks.no_context(len(x))
            scanner = told(torch.full((len(x),), self.scanner))
            condition = scanner_condition(x, scanner), place_condition(x, frame[k : k + 16])
            parts.append(integrate(velocity, x, label, *context, table, *condition))
        return torch.cat(parts)

    def _coarse(self, latents: Any, places: list[Frame], seed: int) -> NDArray[np.uint8]:
        return np.stack([shrunk(image) for image in self.decoded(latents, places, seed)])

    def decoded(self, latents: Any, places: list[Frame], seed: int) -> list[NDArray[np.uint8]]:
        """Images within their frames."""
        from busigen.registry import BACKGROUND_SPECKLE, RESOLUTION
        from busigen.runtime.sampling.graphs import to_grey

        torch, found = self.torch, []
        generator = torch.Generator().manual_seed(seed)
        for k in range(0, len(latents), 16):
            part = latents[k : k + 16]
            speckle = BACKGROUND_SPECKLE * torch.randn(len(part), 1, RESOLUTION, RESOLUTION, generator=generator)
            with torch.no_grad():
                found += list(to_grey(self.networks.decoder(part, speckle)[:, 0].numpy()))
        return [
            image[top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(found, places, strict=True)
        ]


def told_apart(real: NDArray[np.uint8], others: NDArray[np.uint8], groups: NDArray[np.int64]) -> float:
    """AUC of the audit's ridge between two sets of coarse images."""
    features = np.concatenate([scattering_features(part, (4, 4)) for part in (real, others)])
    side = np.repeat([0, 1], [len(real), len(others)])
    joint = Task(side, np.zeros_like(side), np.concatenate([groups, groups.max() + 1 + np.arange(len(others))]))
    fold = folds(joint, 5, 0)
    return auc(Ridge(features, joint, fold).scores(side), joint, fold)


def mmd(space: Space, first: Floats, second: Floats) -> float:
    """The audit's discrepancy between two sets of places in a space."""
    rows = np.arange(len(first) + len(second))
    kernel = space.kernel(np.concatenate([first, second]))
    return mmd2(kernel, rows[: len(first)], rows[len(first) :])


def together(real: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
    """The discrepancy as the audit measures it: axes fitted on both sets, so that neither lies nearer to itself."""
    space = Space(np.concatenate([real, others]))
    return mmd(space, space.fitted[: len(real)], space.fitted[len(real) :])


def agreement(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean correlation of coarse images, pair by pair."""
    flat = (part.reshape(len(part), -1).astype(np.float64) for part in (first, second))
    one, other = ((part - part.mean(1, keepdims=True)) / (part.std(1, keepdims=True) + 1e-6) for part in flat)
    return float((one * other).mean())


def judge(options: argparse.Namespace) -> None:
    """Print the table, and write it."""
    prepared = Prepared.open(options.data)
    if options.scanner is None:
        table = prepared.table.filter((pl.col("class") == "normal") & (pl.col("source") == "busi"))
    else:
        table = with_tissue(prepared).filter(pl.col("scanner") == options.scanner)
    rows = list(table.iter_rows(named=True))
    held = np.array([row["split"] != "train" for row in rows])
    frames = [(row["top"], row["left"], row["inner_height"], row["inner_width"]) for row in rows]
    real = np.stack([shrunk(image) for image in tissue_images(prepared, table)])
    spaces = (Space(real), Space(without_contrast(real)))
    rng = np.random.default_rng(options.seed)
    report: dict[str, Any] = {"images": len(real), "held_out": int(held.sum())}
    for name, size in (("floor", len(real) // 2), ("floor_held_out", int(held.sum()))):
        floor = []
        for _ in range(200):
            order = rng.permutation(len(real))
            floor.append(mmd(spaces[0], *(spaces[0].fitted[part] for part in (order[:size], order[size:]))))
        report[name] = [round(float(v), 4) for v in (np.mean(floor), *np.percentile(floor, (2.5, 97.5)))]
    groups = np.array([row["group"] for row in rows])
    floor = [mmd(spaces[0], *(spaces[0].fitted[part] for part in halves(groups, rng))) for _ in range(200)]
    report["floor_by_groups"] = [round(float(v), 4) for v in (np.mean(floor), *np.percentile(floor, (2.5, 97.5)))]
    print(report, flush=True)
    fitted = Phantoms.from_json(json.loads(options.fit.read_text())).of(options.scanner)
    sources = {"fitted": fitted}
    if options.more:
        sources = {"unfitted": Phantoms.unfitted()} | sources
    finisher = Finisher(options.checkpoint, options.evaluations, options.scanner) if options.checkpoint else None
    found: dict[str, list[list[float]]] = {}
    for name, source in sources.items():
        for seed in range(options.seed, options.seed + options.seeds):
            phantoms = [phantom_at(source, seed, k, 0, frame[2:]).image for k, frame in enumerate(frames)]
            raw = np.stack([shrunk(image) for image in phantoms])
            variants: list[tuple[str, NDArray[np.uint8]]] = [("raw", raw)]
            if finisher is not None:
                starts = options.starts if name == "fitted" else ()
                variants = [*variants, *finisher.variants(phantoms, frames, starts, seed)]
            for variant, images in variants:
                own = spaces[0].of(images)
                low, high = _interval(spaces[0], spaces[0].fitted, own, rng)
                figures = [
                    mmd(spaces[0], spaces[0].fitted, own),
                    low,
                    high,
                    mmd(spaces[0], spaces[0].fitted[held], own),
                    mmd(spaces[1], spaces[1].fitted, spaces[1].of(without_contrast(images))),
                    together(real, images),
                    told_apart(real, images, groups),
                    agreement(raw, images),
                ]
                found.setdefault(f"{name}, {variant}", []).append([round(float(value), 4) for value in figures])
                print(f"{name}, {variant}, seed {seed}: {found[f'{name}, {variant}'][-1]}", flush=True)
    columns = ["mmd", "low", "high", "mmd_held_out", "contrast_removed", "fitted_together", "auc", "agreement"]
    report |= {"columns": columns, "seeds": found}
    for name, values in found.items():
        print(f"{name}: {dict(zip(columns, np.round(np.mean(values, axis=0), 3).tolist(), strict=True))}")
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _interval(space: Space, first: Floats, second: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """A 95 % interval of the discrepancy, from halves without replacement, whose spread is that of the whole's."""
    values = []
    for _ in range(60):
        parts = (part[rng.permutation(len(part))[: len(part) // 2]] for part in (first, second))
        values.append(mmd(space, *parts))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


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
            command.add_argument("--count", type=int, default=400, help="phantoms a round")
            command.add_argument("--rounds", type=int, default=6)
        else:
            command.add_argument("--fit", type=Path, default=Path(__file__).parent / "results" / "phantom.json")
            command.add_argument("--checkpoint", type=Path, help="what `busigen restore` wrote; else phantoms alone")
            command.add_argument("--starts", type=float, nargs="*", default=STARTS)
            command.add_argument("--scanner", help="whose images and phantoms are compared, told to the prior")
            command.add_argument("--evaluations", type=int, default=4, help="of the prior after a start")
            command.add_argument("--seeds", type=int, default=3)
            command.add_argument("--more", action="store_true", help="also unfitted")
            command.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
