"""Are stage 1's outlines distributed as the real ones, and is what is asked for what comes out?

python benchmarks/studies/outlines.py --data prepared/ --bundle bundle/
python benchmarks/studies/outlines.py --data prepared/ --healthy path/to/normal --count 200 --seeds 1

Draws outlines (stage 1 and its gates, no painting) per class and compares them by the two-sample Kolmogorov-Smirnov
test with all real lesions of that class, and with those of BUSI alone, which the adapters learnt: the two sets differ.
One set of 200 may be unlucky (with seed 1, drawn depths had p < 0.001, with seed 2 p = 0.67), so several
are drawn, each with a test of its own.
Then it asks for ranges of every attribute and measures what is missed. The tables are printed and everything goes to
``results/outlines.json``.

Sizes and places are shares of the frame within its letterbox bars: synthetic backgrounds get the bars of a training
image.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from busigen.data.geometry import largest_component
from busigen.data.prepared import Prepared
from busigen.evaluation.physics.features import outline
from busigen.registry import LESION_CLASSES
from busigen.runtime.backends.base import EngineOptions, open_backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.dataset.format import Rejection
from busigen.runtime.sampling.batching import Draft, DrawRequest, Outcome
from busigen.runtime.sampling.conditions import SampleConditions, measured, parse_conditions
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from busigen.training.examples import Frames, random_lesion

RESULTS = Path(__file__).parent / "results" / "outlines.json"
FEATURES = ("area_fraction", "height_width", "circularity", "solidity", "roughness", "ripple", "depth", "lateral")
ASKED = {"size": "0.01:0.1", "depth": "0.2:0.5", "across": "0.35:0.65", "height_width": "0.4:1.2"}


UNPAINTED = "not painted"


class Outliner(Sampler):
    """The runtime's sampler, stopped before it paints."""

    outlined: list[Draft]

    def _paint(self, seed: int, batch: Sequence[DrawRequest]) -> Sequence[Outcome]:
        self.outlined += [draft for draft in batch if isinstance(draft, Draft)]
        return [Rejection(item.index, item.attempt, "", UNPAINTED) for item in batch]


def draw(sampler: Outliner, seed: int, count: int) -> tuple[list[Draft], Counter[str]]:
    """``count`` accepted outlines of consecutive indices, and what the gates refused on the way."""
    sampler.outlined, refused, index = [], Counter(), 0
    while len(sampler.outlined) < count and index < 20 * count:
        size = 64
        _, rejections = sampler.attempt(seed, [(index + k, 0) for k in range(size)])
        refused.update(rejection.reason for rejection in rejections if rejection.reason != UNPAINTED)
        index += size
    return sampler.outlined[:count], refused


def real_outlines(prepared: Prepared, label: str, sources: Sequence[str]) -> list[dict[str, float]]:
    """Shape features of a lesion of every prepared image of some sources, in its own frame."""
    table = prepared.table
    frames = Frames(prepared, table.filter((table["class"] == label) & table["source"].is_in(list(sources))))
    found = []
    for number in range(len(frames)):
        frame, rng = frames[number], np.random.default_rng(number)
        lesion = random_lesion(frame, rng)
        found.append(outline(largest_component(lesion), frame.valid))
    return found


def compared(real: list[dict[str, float]], sets: list[list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Per feature, the medians and the test's statistic for all sets as one, and the p value of each set."""
    table = {}
    for name in FEATURES:
        one, *others = (np.array([features[name] for features in part]) for part in (real, *sets))
        every = np.concatenate(others)
        table[name] = {
            "real": float(np.median(one)),
            "drawn": float(np.median(every)),
            "ks": float(stats.ks_2samp(one, every).statistic),
            "p": [float(stats.ks_2samp(one, other).pvalue) for other in others],
        }
    return table


def missed(drafts: list[Draft]) -> dict[str, dict[str, float]]:
    """How far accepted outlines are from what was asked: places in shares of the side, the rest relative."""
    table = {}
    for name in ASKED:
        pairs = [(measured(d.mask, d.healthy.valid)[name], d.wanted[name]) for d in drafts if d.mask is not None]
        found, wanted = np.array(pairs).T
        error = np.abs(found - wanted) / (1.0 if name in ("depth", "across") else wanted)
        table[name] = {"median": float(np.median(error)), "p95": float(np.quantile(error, 0.95))}
    return table


def main() -> None:
    """Draw, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--bundle", type=Path, default=None, help="a bundle's folder; the shipped one by default")
    parser.add_argument("--healthy", type=Path, default=None, help="healthy images; synthetic ones by default")
    parser.add_argument("--count", type=int, default=200, help="accepted outlines per class and seed")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, one after the other")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    prepared = Prepared.open(options.data)
    bundle = Bundle.open(options.bundle or default_bundle())
    backend = open_backend(bundle, options=EngineOptions(options.threads))
    every = prepared.table["source"].unique().to_list()
    healthy = HealthyFolder(options.healthy) if options.healthy else None
    report: dict[str, Any] = {"bundle": bundle.sha256, "split_hash": prepared.split_hash, "seed": options.seed}
    for label in LESION_CLASSES:

        def sampler(asked: SampleConditions, label: str = label) -> Outliner:
            return Outliner(bundle, backend, classes={label: 1.0}, healthy=healthy, asked=asked)

        refused: Counter[str] = Counter()
        sets = []
        for seed in range(options.seed, options.seed + options.seeds):
            free, reasons = draw(sampler(SampleConditions()), seed, options.count)
            refused.update(reasons)
            sets.append([outline(draft.mask, draft.healthy.valid) for draft in free if draft.mask is not None])
        generated = sum(len(part) for part in sets)
        tables = {
            name: compared(real_outlines(prepared, label, sources), sets)
            for name, sources in {"all": every, "busi": ("busi",)}.items()
            if set(sources) <= set(every)
        }
        asked, refused_asked = draw(sampler(parse_conditions(**ASKED)), options.seed, options.count)
        report[label] = {
            "drawn": generated,
            "refused": dict(refused),
            "compared": tables,
            "asked": len(asked),
            "refused_asked": dict(refused_asked),
            "missed": missed(asked),
        }
        print(f"\n{label}: {generated} outlines, refused {dict(refused) or 'none'}")
        for against, table in tables.items():
            print(f"{'against ' + against:16}{'real':>9}{'drawn':>9}{'KS':>9}    p of each seed's {options.count}")
            for name, row in table.items():
                values = "".join(f"{p:8.3f}" for p in row["p"])
                print(f"{name:16}{row['real']:9.3f}{row['drawn']:9.3f}{row['ks']:9.3f}{values}")
        print(f"asked for {ASKED}: {len(asked)} outlines, refused {dict(refused_asked) or 'none'}")
        for name, row in report[label]["missed"].items():
            print(f"{name:16} missed by {row['median']:.4f} (median), {row['p95']:.4f} (95 %)")
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
