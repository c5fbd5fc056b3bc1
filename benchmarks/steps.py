"""How few network evaluations stages 2 and 3 need: audit figures and milliseconds against the number of steps.

python benchmarks/steps.py runs/mine bundle/ --data prepared/ --steps 1,2,4,8,25

The checkpoint's networks draw the same samples (same seed, backgrounds and outlines) with each number of steps in the
lesion and the blend stage, through the runtime's own sampler and gates, in PyTorch. Each set is judged by the audit's
physics and fidelity sections against the held-out lesion images. A figure inside the interval of the largest number of
steps is as good as it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.prepared import Prepared
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.reading.sets import from_prepared
from busigen.evaluation.sections import SECTIONS
from busigen.export.reference import TorchBackend
from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime.bundle import Bundle
from busigen.runtime.sample import Sample
from busigen.runtime.sampler import Sampler
from busigen.training.checkpoint import load_networks

RESULTS = Path(__file__).parent / "results" / "steps.json"


def main() -> None:
    """Draw with each number of steps, judge, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path, help="its bundle, which says what the graphs are")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--steps", default="1,2,4,8,25")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/steps"), help="folder for the sections' pictures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    networks, _ = load_networks(options.checkpoint)
    sampler = Sampler(
        Bundle.open(options.bundle), TorchBackend(networks), classes=dict.fromkeys(LESION_CLASSES, 0.5), batch_size=16
    )
    real = from_prepared(Prepared.open(options.data), ("val", "test"), lesions_only=True)
    report: dict[str, Any] = {}
    for steps in map(int, options.steps.split(",")):
        networks.steps |= {"lesion": steps, "blend": steps}
        started = time.perf_counter()
        drawn = sampler.draw(0, range(options.count), lambda accepted: None)
        seconds = (time.perf_counter() - started) / options.count
        report[str(steps)] = {"seconds_per_pair": round(seconds, 3), **judged(labelled(drawn.samples), real, options)}
        print(steps, json.dumps(report[str(steps)]), flush=True)
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text(json.dumps({"count": options.count, "steps": report}, indent=1) + "\n")


def labelled(samples: list[Sample]) -> ImageSet:
    """Samples as a set that the audit's sections read."""
    images, masks = np.stack([s.image for s in samples]), np.stack([s.mask for s in samples])
    rows = [{"id": str(s.index), "class": s.label, "group": s.index} for s in samples]
    valid = np.stack([_valid(s.row["letterbox_top"], s.row["letterbox_left"]) for s in samples])
    return ImageSet("samples", images, masks, valid, np.zeros_like(masks), pl.DataFrame(rows))


def _valid(top: int, left: int) -> NDArray[np.bool_]:
    """The pixels that are no letterbox bar; bars lie on both sides, so that the second is as wide, or a pixel wider."""
    valid = np.zeros((RESOLUTION, RESOLUTION), dtype=bool)
    valid[top : RESOLUTION - top - (top > 0), left : RESOLUTION - left - (left > 0)] = True
    return valid


def judged(synthetic: ImageSet, real: ImageSet, options: argparse.Namespace) -> dict[str, Any]:
    """The headline figures of physics and fidelity, value with interval."""
    context = AuditContext(synthetic, real, None, options.out, backgrounds="synthetic")
    figures = [f for name in ("physics", "fidelity") for f in SECTIONS[name].load()(context).figures if f.headline]
    return {
        figure.label: [round(v, 4) for v in (figure.value.value, figure.value.low, figure.value.high) if v is not None]
        for figure in figures
    }


if __name__ == "__main__":
    main()
