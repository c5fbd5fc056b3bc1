"""What the autoencoder keeps of held-out images: grey levels, and the speckle's power at every frequency.

python benchmarks/studies/autoencoder.py runs/mine/base/autoencoder --data prepared/

Reconstructions of one half of the held-out lesion images (val and test) are compared with the *other* half's real
images, which share no patient with them, and the floor is the same comparison with the first half left as it is: both
over random halvings by group. A decoder that draws speckle cannot be judged by PSNR alone, which prefers a blur.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.prepared import Prepared
from busigen.evaluation.context import ImageSet
from busigen.evaluation.physics import speckle
from busigen.evaluation.reading.sets import from_prepared
from busigen.evaluation.statistics.grouped import halves
from busigen.training.checkpoint import load_component

RESULTS = Path(__file__).parent / "results" / "autoencoder.json"
BATCH = 8


def main() -> None:
    """Reconstruct, compare, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("autoencoder", type=Path, help="the component's folder in a run or a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--halvings", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    images = from_prepared(Prepared.open(options.data), ("val", "test"), lesions_only=True)
    network = load_component("autoencoder", options.autoencoder)
    started = time.perf_counter()
    decoded = reconstructed(images, network)
    seconds = time.perf_counter() - started
    report = {
        "images": len(images),
        "groups": len(np.unique(images.groups)),
        "parameters": {
            part: sum(p.numel() for p in getattr(network, part).parameters()) for part in ("encoder", "decoder")
        },
        "seconds_per_image": round(seconds / len(images), 4),
        "psnr": psnr(images, decoded),
        "spectrum": spectrum(images, decoded, options.halvings),
    }
    show(report)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def reconstructed(images: ImageSet, network: Any) -> NDArray[np.uint8]:
    """Encode and decode whole images, ``uint8 (N, 256, 256)``, with fixed noise."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(images.images[start : start + BATCH].astype(np.float32) / 127.5 - 1.0)[:, None]
        output = network(pixels, torch.randn(pixels.shape, generator=generator)).clamp(-1.0, 1.0)
        parts.append(((output[:, 0] + 1.0) * 127.5).round().byte().numpy())
    return np.concatenate(parts)


def psnr(images: ImageSet, decoded: NDArray[np.uint8]) -> dict[str, float]:
    """Mean over images in dB, of all tissue and of what is left after a Gaussian of 2 pixels."""
    figures: dict[str, list[float]] = {"pixels": [], "smoothed": []}
    for before, after, valid in zip(images.images, decoded, images.valid, strict=True):
        error = after.astype(np.float64) - before
        for name, part in (("pixels", error), ("smoothed", ndimage.gaussian_filter(error, 2.0))):
            figures[name].append(10.0 * np.log10(255.0**2 / float((part[valid] ** 2).mean())))
    return {name: round(float(np.mean(values)), 2) for name, values in figures.items()}


def spectrum(images: ImageSet, decoded: NDArray[np.uint8], halvings: int) -> list[dict[str, float]]:
    """Per frequency: how the mean log-power differs from the other half's, in dB, beside the floor's 95 % interval."""
    real, ours = spectra(images, images.images), spectra(images, decoded)
    usable = np.isfinite(real).all(axis=1) & np.isfinite(ours).all(axis=1)
    floor, found = [], []
    for seed in range(halvings):
        first, second = (part[usable[part]] for part in halves(images.groups, np.random.default_rng(seed)))
        floor.append(real[first].mean(axis=0) - real[second].mean(axis=0))
        found.append(ours[first].mean(axis=0) - real[second].mean(axis=0))
    low, high = np.percentile(floor, [2.5, 97.5], axis=0)
    inner, outer = np.percentile(found, [2.5, 97.5], axis=0)
    return [
        {
            "cycles_per_pixel": round(float(frequency), 4),
            "difference_db": round(float(np.mean(found, axis=0)[k]), 3),
            "low": round(float(inner[k]), 3),
            "high": round(float(outer[k]), 3),
            "floor_low": round(float(low[k]), 3),
            "floor_high": round(float(high[k]), 3),
            "within": bool(low[k] <= np.mean(found, axis=0)[k] <= high[k]),
        }
        for k, frequency in enumerate(speckle.FREQUENCIES)
        if k
    ]


def spectra(images: ImageSet, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Log-power in dB per image and frequency."""
    rows = [
        speckle.radial_spectrum(grey.astype(np.float32), valid & ~overlay)
        for grey, valid, overlay in zip(pixels, images.valid, images.overlays, strict=True)
    ]
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(np.stack(rows))


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{report['images']} held-out images, {report['groups']} groups; parameters {report['parameters']}")
    print(f"PSNR {report['psnr']['pixels']} dB, smoothed {report['psnr']['smoothed']} dB")
    print("cycles/pixel   difference, dB   95 %              floor             within")
    for row in report["spectrum"]:
        print(
            f"{row['cycles_per_pixel']:<14} {row['difference_db']:+.2f}            "
            f"[{row['low']:+.2f}, {row['high']:+.2f}]   [{row['floor_low']:+.2f}, {row['floor_high']:+.2f}]   "
            f"{'yes' if row['within'] else 'NO'}"
        )


if __name__ == "__main__":
    main()
