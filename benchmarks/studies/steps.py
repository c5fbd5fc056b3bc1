"""How few network evaluations stages 2 and 3 need: audit figures and milliseconds against the number of steps.

python benchmarks/studies/steps.py runs/mine bundle/ --data prepared/ --steps 1,2,4,8,25
python benchmarks/studies/steps.py runs/sd bundle/ --base-model stable-diffusion-inpainting --data prepared/

The checkpoint's networks draw the same samples (same seed, backgrounds and outlines) with each number of steps in the
lesion and the blend stage, through the runtime's own sampler and gates, in PyTorch. Each set is judged by the audit's
physics and fidelity sections against the held-out lesion images. A figure inside the interval of the largest number of
steps is as good as it: of each number is told how many lie outside, and which; and which number is the fewest of which
none lies outside for the worse. A Stable Diffusion draws with the guidance, fresh noise and decoder of the bundle,
which has to be exported with the largest number where noise is drawn anew.
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
from busigen.export.parity import TorchBackend
from busigen.export.request import Options, opened
from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.dataset.format import Sample
from busigen.runtime.sampling.sampler import Sampler
from busigen.training.networks.inference import Networks
from busigen.training.stable_diffusion.hub import open_base
from busigen.training.stable_diffusion.painter import BASES, OWN, PaintingOptions

RESULTS = Path(__file__).parent / "results" / "steps.json"
SHARES = ("precision", "recall", "density", "coverage")  # Figures of which less is worse; of all others, more is.


def main() -> None:
    """Draw with each number of steps, judge, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path, help="its bundle, which says what the graphs are")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--base-model", help="the Stable Diffusion that a checkpoint of preset sd15 was trained on")
    parser.add_argument("--base-config", type=Path, help="of a single file, as for `busigen export`")
    parser.add_argument("--steps", default="1,2,4,8,25")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/steps"), help="folder for the sections' pictures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle)
    networks = networks_of(options, bundle)
    sampler = Sampler(bundle, TorchBackend(networks), classes=dict.fromkeys(LESION_CLASSES, 0.5), batch_size=16)
    real = from_prepared(Prepared.open(options.data), ("val", "test"), lesions_only=True)
    report: dict[str, Any] = {}
    for steps in map(int, options.steps.split(",")):
        networks.steps |= {"lesion": steps, "blend": steps}
        started = time.perf_counter()
        generated = sampler.draw(0, range(options.count), lambda accepted: None)
        seconds = (time.perf_counter() - started) / options.count
        figures = judged(labelled(generated.samples), real, options, headline=False)
        report[str(steps)] = {"seconds_per_pair": round(seconds, 3), **figures}
        print(steps, seconds, {name: value for name, value in figures.items() if "distance" in name}, flush=True)
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text(json.dumps({"count": options.count, "steps": report}) + "\n")
    show_outside(report)


def networks_of(options: argparse.Namespace, bundle: Bundle) -> Networks:
    """The checkpoint's networks, which draw as the bundle says."""
    if options.base_model is None:
        return opened(options.checkpoint, Options())[0]
    base, painted = open_base(options.base_model, options.base_config), bundle.info["painting"]
    decoder = {"busigen's": OWN, "Stable Diffusion's": BASES}.get(painted["decoder"])
    if painted["loras"] or decoder is None:
        raise SystemExit("The bundle has further LoRAs or a TAESD, which the checkpoint does not hold.")
    painting = PaintingOptions(guidance=painted["guidance"], fresh_noise=painted["fresh_noise"], decoder=decoder)
    return opened(options.checkpoint, Options(base_model=base, painting=painting))[0]


def show_outside(report: dict[str, Any]) -> None:
    """Print which figures of fewer steps lie outside the interval that they have with the most."""
    *fewer, most = sorted(report, key=int)
    intervals = {name: value for name, value in report[most].items() if isinstance(value, list) and len(value) == 3}
    fewest, holding = most, True
    for steps in reversed(fewer):
        found = {name: report[steps][name][0] for name in intervals.keys() & report[steps].keys()}
        outside = {
            name: value for name, value in found.items() if not intervals[name][1] <= value <= intervals[name][2]
        }
        worse = [name for name, value in outside.items() if (value < intervals[name][1]) == name.startswith(SHARES)]
        count = f"{len(outside)} of {len(found)} figures"
        print(f"{steps} steps: {count} outside the interval of {most}, {len(worse)} of them worse")
        for name, value in sorted(outside.items()):
            print(f"  {name}: {value} against {intervals[name]}{', worse' if name in worse else ''}")
        holding = holding and not worse
        fewest = steps if holding else fewest
    print(f"The fewest steps that hold: {fewest}")


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


def judged(
    synthetic: ImageSet, real: ImageSet, options: argparse.Namespace, *, headline: bool = True
) -> dict[str, Any]:
    """The figures of physics and fidelity, or only their headline ones: value with interval."""
    context = AuditContext(synthetic, real, None, options.out, backgrounds="synthetic")
    found = [figure for name in ("physics", "fidelity") for figure in SECTIONS[name].run(context).figures]
    figures = [figure for figure in found if figure.headline or not headline]
    return {
        figure.label: [round(v, 4) for v in (figure.value.value, figure.value.low, figure.value.high) if v is not None]
        for figure in figures
    }


if __name__ == "__main__":
    main()
