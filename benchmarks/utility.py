"""What synthetic pairs are worth to a segmentation network: by number of real images, and across hospitals.

python benchmarks/utility.py choose --data prepared/ --pairs out/mine --in-real out/in-real --seeds 1
python benchmarks/utility.py curve --data prepared/ --pairs out/mine --ratio 2
python benchmarks/utility.py hospitals --data prepared/ --pairs out/mine

Every arm has classic augmentation and the same number of steps of the audit's small U-Net; they differ in what trains
it. ``choose`` compares ratios and backgrounds on validation images, at ``--images`` real ones. ``curve`` trains on 50
to 400 real training images, alone and beside ``--ratio`` times as many pairs. ``hospitals`` trains on one hospital's
real lesions alone, beside ``--further`` pairs told the other's scanner (among ``--pairs``, drawn with ``--scanner
mix``), and beside as many of the other's real ones. Both test on held-out images. Without ``--pairs``, arms that need
none are trained. Every training is kept under --out, so a killed run goes on; results are written after every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.progress import track

from busigen.data.prepared import Prepared
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.reading.sets import from_prepared, read_set
from busigen.evaluation.reading.within import Within
from busigen.evaluation.statistics.grouped import Rows, bootstrap, rows_by_group, take
from busigen.evaluation.utility import training
from busigen.evaluation.utility.section import FALSE_POSITIVE_AREA, f1_of, mean_of, strata
from busigen.evaluation.utility.training import Arm, Counts, Split, dice
from busigen.registry import SPLITS

RESULTS = Path(__file__).parent / "results"
SIZES = (50, 100, 200, 400)
RATIOS = (1.0, 2.0)
SCANNERS = {"busi": "GE Logiq E9", "busbra": "GE Logiq 7"}
Figures = dict[str, Any]
Statistic = Callable[[Rows], float]


@dataclass(frozen=True)
class Job:
    """One arm: the real images that train it, how many pairs beside them, and which arm it is compared with."""

    name: str
    real: ImageSet
    reference: str = ""
    pairs: ImageSet | None = None
    count: int = 0


def main() -> None:
    """Train the arms of one part, print its figures and write them."""
    quick = training.RECIPES["quick"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "curve", "hospitals"))
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--pairs", type=Path, help="what `busigen generate` wrote, on synthetic backgrounds")
    parser.add_argument("--in-real", type=Path, help="the same, painted into healthy images of the training split")
    parser.add_argument("--images", type=int, default=100, help="real training images of choose")
    parser.add_argument("--ratio", type=float, default=1.0, help="pairs for each real image in curve, if there are")
    parser.add_argument("--further", type=int, default=300, help="pairs or real images of the other hospital")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=quick.steps, help="of every training")
    parser.add_argument("--side", type=int, default=quick.side, help="pixels of the network's input")
    parser.add_argument("--out", type=Path, default=Path("out/utility"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    options = parser.parse_args()
    training.RECIPES["full"] = replace(quick, steps=options.steps, side=options.side)
    training.EXTENTS["full"] = replace(training.EXTENTS["quick"], seeds=1, real_seeds=1)
    study = Study(options)
    {"choose": study.choose, "curve": study.curve, "hospitals": study.hospitals}[options.part]()


class Study:
    """The real images, and what is trained on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        prepared = Prepared.open(options.data)
        self.images = from_prepared(prepared, tuple(SPLITS)).without_overlays()
        self.table = prepared.table.filter(pl.col("split").is_in(SPLITS)).with_row_index("k")

    def rows(self, split: str, source: str | None = None) -> Rows:
        """Positions of a split's images; of a source, those with a lesion."""
        found = self.table.filter(split=split)
        if source is not None:
            found = found.filter(pl.col("lesions") > 0, source=source)
        return found["k"].to_numpy().astype(np.int64)

    def some(self, rows: Rows, count: int, seed: int) -> Rows:
        """That many of the rows, in whole groups but for the last; fewer are among more of the same seed."""
        return rows[take(rows_by_group(self.images.groups[rows]), count, np.random.default_rng(seed))]

    def pairs(self, folder: Path | None, within: Within | None = None) -> ImageSet | None:
        """Generated pairs, painted over like the real images where these have overlays."""
        return None if folder is None else read_set(folder, within=within).without_overlays()

    def choose(self) -> None:
        """Ratios and backgrounds, on validation images."""
        train, test = self.rows("train"), self.rows("val")
        sets = {"synthetic": self.pairs(self.options.pairs), "real": self.pairs(self.options.in_real)}
        sets["both"] = joined(*sets.values())

        def jobs(seed: int) -> list[Job]:
            real = self.images.take(self.some(train, self.options.images, seed))
            with_pairs = (
                Job(f"{ratio:g} x on {name} backgrounds", real, "real alone", pairs, round(ratio * len(real)))
                for ratio, (name, pairs) in product(RATIOS, sets.items())
                if pairs is not None
            )
            return [Job("real alone", real), *with_pairs]

        self.run(jobs, {"validation": test})

    def curve(self) -> None:
        """Real images alone and beside pairs, by number of real images."""
        train, pairs = self.rows("train"), self.pairs(self.options.pairs)

        def jobs(seed: int) -> list[Job]:
            found = []
            for size in SIZES:
                real = self.images.take(self.some(train, size, seed))
                found.append(Job(f"{size} real", real))
                if pairs is not None:
                    count = min(round(self.options.ratio * size), len(pairs))
                    found.append(Job(f"{size} real + {count} pairs", real, f"{size} real", pairs, count))
            return found

        self.run(jobs, {"test": self.rows("test")})

    def hospitals(self) -> None:
        """One hospital's real lesions, alone, beside pairs told the other's scanner, and beside its real ones."""
        told = {name: self.pairs(self.options.pairs, Within("scanner", scanner)) for name, scanner in SCANNERS.items()}
        train = {name: self.rows("train", name) for name in SCANNERS}
        count = self.options.further

        def jobs(seed: int) -> list[Job]:
            found = []
            for home, away in (("busbra", "busi"), ("busi", "busbra")):
                real = self.images.take(train[home])
                both = self.images.take(np.concatenate([train[home], self.some(train[away], count, seed)]))
                found += [Job(home, real), Job(f"{home} + {count} real of {away}", both, home)]
                if told[away] is not None:
                    found.append(Job(f"{home} + {count} pairs as {away}", real, home, told[away], count))
            return found

        self.run(jobs, {name: self.rows("test", name) for name in SCANNERS})

    def run(self, jobs: Callable[[int], list[Job]], tests: dict[str, Rows]) -> None:
        """Train every job with one seed, then with the next; after each, write all figures on these test images."""
        tested = np.concatenate(list(tests.values()))
        counts: dict[str, list[Counts]] = {}
        for seed in range(self.options.seeds):
            references = {}
            for job in track(jobs(seed), f"seed {seed + 1} of {self.options.seeds}"):
                if job.pairs is not None and job.count > len(job.pairs):
                    sys.exit(f"{job.name}: there are {len(job.pairs)} such pairs only. Generate more.")
                context = AuditContext(
                    synthetic=job.real.take(np.arange(0)) if job.pairs is None else job.pairs,
                    real=self.images.take(tested),
                    train=None,
                    out=self.options.out,
                    effort="full",
                    seed=seed,
                )
                arm = Arm(job.name, job.name, classic=True, synthetic=job.count / len(job.real))
                split = Split(self.options.part, job.real, np.arange(len(tested)))
                counts.setdefault(job.name, []).append(training.outcomes(context, [split], [arm])[0].test)
                references[job.name] = job.reference
            report: Figures = {"seeds": seed + 1, "steps": self.options.steps, "side": self.options.side}
            for name, rows in tests.items():
                among = np.isin(tested, rows)
                here = {arm: [one[among] for one in found] for arm, found in counts.items()}
                report[name] = self.figures(self.images.take(rows), here, references)
            for name, arm in product(tests, counts):
                print(name, arm, json.dumps(report[name][arm]["all lesions"]), flush=True)
            self.options.results.mkdir(parents=True, exist_ok=True)
            (self.options.results / f"utility_{self.options.part}.json").write_text(json.dumps(report, indent=1) + "\n")

    def figures(self, images: ImageSet, counts: dict[str, list[Counts]], references: dict[str, str]) -> Figures:
        """Every arm's figures, what it gains over its reference, and that as a share of what real images gain."""
        lesion = np.asarray(images.masks.any(axis=(1, 2)))
        lesions, normals = np.flatnonzero(lesion), np.flatnonzero(~lesion)
        least = FALSE_POSITIVE_AREA * self.options.side**2
        report: Figures = {}
        for name, mine in counts.items():
            report[name] = found = {}
            reference = references[name]
            rival = next((other for other in counts if " real of " in other and references[other] == reference), name)
            for stratum, members in {"all lesions": lesions, **strata(images, lesions)}.items():
                groups, value = images.groups[members], scores(mine, members)
                found[stratum] = {"images": len(members), **{key: interval(value[key], groups) for key in value}}
                for key in value if reference else ():
                    base = scores(counts[reference], members)[key]
                    gained = difference(value[key], base)
                    found[stratum][f"{key} gained"] = interval(gained, groups)
                    if rival != name:
                        gap = difference(scores(counts[rival], members)[key], base)
                        found[stratum][f"{key}, share of the gap"] = interval(quotient(gained, gap), groups)
            if len(normals):
                shares = np.mean([one[normals, 1] >= least for one in mine], axis=0)
                found["normals with a false lesion"] = interval(mean_of(shares), images.groups[normals])
        return report


def joined(first: ImageSet | None, second: ImageSet | None) -> ImageSet | None:
    """As many of either set, or None where one is missing."""
    if first is None or second is None:
        return None
    parts = [part.take(np.arange(min(len(first), len(second)))) for part in (first, second)]
    arrays = ("images", "masks", "valid", "overlays")
    return replace(
        parts[0],
        clean=None,
        table=pl.concat(part.table for part in parts),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
    )


def scores(seeds: list[Counts], rows: Rows) -> dict[str, Statistic]:
    """Mean Dice and pooled F1 of some of these rows, averaged over seeds."""
    averages = np.mean([dice(counts[rows]) for counts in seeds], axis=0)
    return {"dice": mean_of(averages), "f1": f1_of([counts[rows] for counts in seeds])}


def difference(mine: Statistic, other: Statistic) -> Statistic:
    """What one arm has more than another on the same rows."""
    return lambda rows: mine(rows) - other(rows)


def quotient(part: Statistic, whole: Statistic) -> Statistic:
    """One difference as a share of another."""
    return lambda rows: part(rows) / whole(rows)


def interval(statistic: Statistic, groups: Rows) -> list[float]:
    """Value and 95 % interval over groups; the same groups are drawn for every statistic, so that arms are paired."""
    found = bootstrap(statistic, np.random.default_rng(0), groups)
    return [round(float(number), 4) for number in (found.value, found.low, found.high)]


if __name__ == "__main__":
    main()
