"""What synthetic pairs are worth to a segmentation network: by number of real images, and across hospitals.

python benchmarks/utility.py choose --data prepared/ --pairs out/mine --in-real out/in-real
python benchmarks/utility.py curve --data prepared/ --pairs out/mine --ratio 2
python benchmarks/utility.py hospitals --data prepared/ --pairs out/mine

Every arm has classic augmentation and the same number of steps of the audit's small U-Net; they differ in what trains
it. ``choose`` compares ratios and backgrounds on validation images, at ``--images`` real ones. ``curve`` trains on
50 to 400 real training images, alone and beside ``--ratio`` times as many pairs. ``hospitals`` trains on one hospital's
real lesions alone, beside pairs told the other's scanner (those of ``--pairs``, drawn with ``--scanner mix``, that were
told it), and beside as many of the other's real ones. Both test on held-out images. Without ``--pairs``, arms that need
none are trained. Every training is kept under --out, so a killed run goes on; results are written after every seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Job:
    """One arm: what it is compared with, the real images that train it, and how many pairs beside them."""

    name: str
    reference: str
    real: ImageSet
    pairs: ImageSet | None = None
    count: int = 0


class Study:
    """The data, what trains on it, and where results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        prepared = Prepared.open(options.data)
        self.images = from_prepared(prepared, tuple(SPLITS)).without_overlays()
        self.table = prepared.table.filter(pl.col("split").is_in(SPLITS)).with_columns(lesion=pl.col("lesions") > 0)
        # The network and its rate are the audit's quick ones, with steps of its own.
        training.RECIPES["full"] = replace(training.RECIPES["quick"], steps=options.steps, side=options.side)
        training.EXTENTS["full"] = replace(training.EXTENTS["quick"], seeds=1, real_seeds=1)

    def rows(self, **wanted: object) -> Rows:
        """Positions of the images with these values of the prepared table's columns."""
        return self.table.with_row_index("k").filter(**wanted)["k"].to_numpy().astype(np.int64)

    def some(self, rows: Rows, count: int, seed: int) -> Rows:
        """About ``count`` of these rows, in whole groups but for the last; fewer are among more of the same seed."""
        parts = rows_by_group(self.images.groups[rows])
        return rows[take(parts, count, np.random.default_rng(seed))]

    def run(
        self, jobs: Callable[[int], list[Job]], test: Rows, figures: Callable[[dict[str, list[Counts]]], Figures]
    ) -> None:
        """Train every job with one seed, then with the next; print and write ``figures`` of the counts after each."""
        tested, counts = self.images.take(test), dict[str, list[Counts]]()
        for seed in range(self.options.seeds):
            todo = jobs(seed)
            for job in track(todo, f"seed {seed + 1} of {self.options.seeds}"):
                arm = Arm(job.name, job.name, classic=True, synthetic=job.count / len(job.real))
                context = AuditContext(
                    synthetic=job.pairs or job.real.take(np.arange(0)),
                    real=tested,
                    train=None,
                    out=self.options.out,
                    effort="full",
                    seed=seed,
                )
                split = Split(self.options.part, job.real, np.arange(len(test)))
                (one,) = training.outcomes(context, [split], [arm])
                counts.setdefault(job.name, []).append(one.test)
            report = {"seeds": seed + 1, "steps": self.options.steps, "side": self.options.side, **figures(counts)}
            text = json.dumps(report, indent=1)
            print(text, flush=True)
            self.options.results.mkdir(parents=True, exist_ok=True)
            (self.options.results / f"utility_{self.options.part}.json").write_text(text + "\n")


def main() -> None:
    """Train the arms of one part, print its figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "curve", "hospitals"))
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--pairs", type=Path, help="what `busigen generate` wrote, on synthetic backgrounds")
    parser.add_argument("--in-real", type=Path, help="the same, painted into healthy images of the training split")
    parser.add_argument("--images", type=int, default=100, help="real training images of choose")
    parser.add_argument("--ratio", type=float, default=1.0, help="pairs for each real image in curve")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=training.RECIPES["quick"].steps, help="of every training")
    parser.add_argument("--side", type=int, default=training.RECIPES["quick"].side, help="pixels of its input")
    parser.add_argument("--out", type=Path, default=Path("out/utility"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    options = parser.parse_args()
    {"choose": choose, "curve": curve, "hospitals": hospitals}[options.part](Study(options))


def choose(study: Study) -> None:
    """Ratios and backgrounds, on validation images."""
    options, train, test = study.options, study.rows(split="train"), study.rows(split="val")
    sets = {"synthetic": read_pairs(options.pairs)} if options.pairs else {}
    if options.in_real:
        sets["real"] = read_pairs(options.in_real)
        sets["both"] = halves_of(sets["synthetic"], sets["real"])

    def jobs(seed: int) -> list[Job]:
        real = study.images.take(study.some(train, options.images, seed))
        return [
            Job("real alone", "", real),
            *(
                Job(f"{ratio:g} x, {name} backgrounds", "real alone", real, pairs, round(ratio * len(real)))
                for name, pairs in sets.items()
                for ratio in RATIOS
            ),
        ]

    study.run(jobs, test, lambda counts: table(study, counts, test, dict.fromkeys(counts, "real alone")))


def curve(study: Study) -> None:
    """Real images alone and beside pairs, by number of real images."""
    options, train, test = study.options, study.rows(split="train"), study.rows(split="test")
    pairs = read_pairs(options.pairs) if options.pairs else None
    references = {f"{size} real + pairs": f"{size} real" for size in SIZES}

    def jobs(seed: int) -> list[Job]:
        found = []
        for name, reference in references.items():
            real = study.images.take(study.some(train, int(reference.split()[0]), seed))
            found.append(Job(reference, "", real))
            if pairs is not None:
                found.append(Job(name, reference, real, pairs, round(options.ratio * len(real))))
        return found

    study.run(jobs, test, lambda counts: {"ratio": options.ratio, **table(study, counts, test, references)})


def hospitals(study: Study) -> None:
    """One hospital's real lesions, alone, beside pairs told the other's scanner, and beside the other's real ones."""
    options, test = study.options, study.rows(split="test", lesion=True)
    told = {
        name: read_pairs(options.pairs, Within("scanner", scanner)) if options.pairs else None
        for name, scanner in SCANNERS.items()
    }
    train = {name: study.rows(split="train", lesion=True, source=name) for name in SCANNERS}
    count = min(min(map(len, train.values())), *(len(pairs) for pairs in told.values() if pairs is not None), 10**9)

    def jobs(seed: int) -> list[Job]:
        found = []
        for home, away in (("busbra", "busi"), ("busi", "busbra")):
            real = study.images.take(train[home])
            further = np.concatenate([train[home], study.some(train[away], count, seed)])
            found.append(Job(f"{home} alone", "", real))
            found.append(Job(f"{home} + real {away}", "", study.images.take(further)))
            if told[away] is not None:
                found.append(Job(f"{home} + pairs as {away}", "", real, told[away], count))
        return found

    def figures(counts: dict[str, list[Counts]]) -> Figures:
        report: Figures = {"further images": count}
        for home, away in (("busbra", "busi"), ("busi", "busbra")):
            mine = {name: found for name, found in counts.items() if name.startswith(f"{home} ")}
            for place in (away, home):
                among = np.flatnonzero(np.isin(test, study.rows(source=place)))
                here = {name: [one[among] for one in found] for name, found in mine.items()}
                part = table(study, here, test[among], dict.fromkeys(mine, f"{home} alone"))
                three = [here.get(f"{home} {what}") for what in ("alone", f"+ pairs as {away}", f"+ real {away}")]
                if place == away and None not in three:
                    part["share of the gap closed"] = closed(study, *three, test[among])
                report[f"{home}, tested on {place}"] = part
        return report

    study.run(jobs, test, figures)


def read_pairs(folder: Path, within: Within | None = None) -> ImageSet:
    """Generated pairs, overlays painted over as in the real images."""
    return read_set(folder, within=within).without_overlays()


def halves_of(first: ImageSet, second: ImageSet) -> ImageSet:
    """A set that takes as many from either, whole where they are of one size."""
    count = min(len(first), len(second))
    parts = [part.take(np.arange(count)) for part in (first, second)]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "masks", "valid")}
    overlays = np.concatenate([part.overlays for part in parts])
    return replace(
        parts[0], name="both", clean=None, overlays=overlays, table=pl.concat(part.table for part in parts), **arrays
    )


def table(study: Study, counts: dict[str, list[Counts]], test: Rows, references: dict[str, str]) -> Figures:
    """Every arm's figures on these test images, with what it gains over its reference."""
    images = study.images.take(test)
    lesion = np.asarray(images.masks.any(axis=(1, 2)))
    lesions, normals = np.flatnonzero(lesion), np.flatnonzero(~lesion)
    least = FALSE_POSITIVE_AREA * study.options.side**2
    report: Figures = {"lesion images": len(lesions), "normals": len(normals)}
    for name, mine in counts.items():
        other = counts.get(references.get(name, ""), mine)
        found: Figures = {}
        for stratum, members in {"all lesions": lesions, **strata(images, lesions)}.items():
            scored = [scores(part, members) for part in (mine, other)]
            found[stratum] = {"images": len(members)}
            for measure, (value, base) in {k: (scored[0][k], scored[1][k]) for k in scored[0]}.items():
                found[stratum][measure] = interval(value, images.groups[members])
                if other is not mine:
                    gain = interval(lambda rows, a=value, b=base: a(rows) - b(rows), images.groups[members])
                    found[stratum][f"{measure} gained"] = gain
        if len(normals):
            shares = np.mean([one[normals, 1] >= least for one in mine], axis=0)
            found["normals with a false lesion"] = interval(mean_of(shares), images.groups[normals])
        report[name] = found
    return report


def scores(seeds: list[Counts], rows: Rows) -> dict[str, Callable[[Rows], float]]:
    """Mean Dice and pooled F1 of some of these rows, averaged over seeds."""
    return {
        "dice": mean_of(np.mean([dice(counts[rows]) for counts in seeds], axis=0)),
        "f1": f1_of([counts[rows] for counts in seeds]),
    }


def closed(study: Study, alone: list[Counts], pairs: list[Counts], real: list[Counts], test: Rows) -> Figures:
    """What pairs gain on another hospital's images, as a share of what its real images gain."""
    parts = [scores(counts, np.arange(len(test))) for counts in (alone, pairs, real)]
    return {
        measure: interval(
            lambda rows, m=measure: (parts[1][m](rows) - parts[0][m](rows)) / (parts[2][m](rows) - parts[0][m](rows)),
            study.images.groups[test],
        )
        for measure in parts[0]
    }


def interval(statistic: Callable[[Rows], float], groups: Rows) -> list[float]:
    """Value and 95 % interval over groups; the same groups are drawn for every statistic, so that arms are paired."""
    found = bootstrap(statistic, np.random.default_rng(0), groups)
    return [round(float(number), 4) for number in (found.value, found.low, found.high)]


if __name__ == "__main__":
    main()
