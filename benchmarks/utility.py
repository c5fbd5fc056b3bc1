"""Does a U-Net trained on real + synthetic images beat real + classic augmentation, and which ratio serves best?

python benchmarks/utility.py out/mine --data prepared/ --seeds 3
python benchmarks/utility.py out/mine --data prepared/ --arms real,classic,synthetic_1

Arms of the audit's utility section (all, unless ``--arms`` names some) with ``--full``'s seeds but ``--quick``'s
network and, unless ``--steps`` says otherwise, steps: the generator's training images train, the held-out images test.
A training on 400 images takes about a minute on two cores. All are kept under --out, so a killed run goes on. Figures
are the section's own: per-image Dice and pooled F1, with intervals over groups, the floor between seeds, and a paired
Wilcoxon test.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from busigen.data.prepared import Prepared
from busigen.evaluation.context import AuditContext, Figure
from busigen.evaluation.reading.sets import from_prepared, read_set
from busigen.evaluation.utility import training as arms
from busigen.evaluation.utility import training as segmentation
from busigen.evaluation.utility.section import run

RESULTS = Path(__file__).parent / "results" / "utility.json"
REAL_SEEDS = 3


def main() -> None:
    """Train every arm, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic", type=Path, help="what `busigen generate` wrote; twice --images of it are used")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--images", type=int, default=400, help="real training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(arms.ARMS), help="names in arms.ARMS, separated by commas")
    parser.add_argument("--steps", type=int, default=segmentation.RECIPES["quick"].steps, help="of every training")
    parser.add_argument("--out", type=Path, default=Path("out/utility"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    named = options.arms.split(",")
    if unknown := [name for name in named if name not in arms.ARMS]:
        parser.error(f"--arms: {', '.join(unknown)} unknown; choose from {', '.join(arms.ARMS)}")
    for name in arms.ARMS.keys() - set(named):
        del arms.ARMS[name]

    # The section's own experiment, at a size between its two efforts.
    quick = arms.EXTENTS["quick"]
    # Real images alone are trained on for the floor and the probe, which more seeds hardly change.
    real_seeds = min(options.seeds, REAL_SEEDS)
    arms.EXTENTS["full"] = replace(quick, seeds=options.seeds, real_seeds=real_seeds, limit=options.images)
    segmentation.RECIPES["full"] = replace(segmentation.RECIPES["quick"], steps=options.steps)
    prepared = Prepared.open(options.data)
    context = AuditContext(
        synthetic=read_set(options.synthetic),
        real=from_prepared(prepared, ("val", "test")),
        train=from_prepared(prepared, ("train",)),
        out=options.out,
        effort="full",
    )
    result = run(context)
    rows = [row(figure) for figure in result.figures]
    for line in rows:
        print(json.dumps(line))
    notes = [finding.text for finding in result.findings]
    report = {
        "images": options.images,
        "seeds": options.seeds,
        "steps": options.steps,
        "figures": rows,
        "findings": notes,
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


def row(figure: Figure) -> dict[str, Any]:
    """A figure with its interval, floor, counts and p-value, as plain values."""
    floor = figure.floor
    return {
        "figure": figure.label,
        "value": [figure.value.value, figure.value.low, figure.value.high],
        "floor": None if floor is None else [floor.low, floor.high],
        "synthetic": figure.synthetic,
        "real": figure.real,
        "p": figure.p,
    }


if __name__ == "__main__":
    main()
