"""Does stage 1 find the healed spot? It must not: in use there is none, so looking for it would be cheating.

python benchmarks/stage1_leak.py --data prepared/ --checkpoint runs/mine

Held-out lesion images, healed as for training (lesion repainted, a decoy repaint elsewhere), are given to stage 1. The
distance from the sampled centres to the image's own healed lesion is compared with that from centres sampled for
other images of the same class to the same spot: centres that follow anatomy alone are as near either way, centres
that follow the healing are nearer to their own. Since anatomy differs between images as well, the same is asked of the
spot's mirror image: which side a lesion is on, anatomy hardly tells. Paired sign-flip tests over images say whether a
difference can be chance.
Prints the figures and writes ``results/stage1_leak.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from busigen.data.geometry import attributes, largest_component
from busigen.data.prepared import Prepared
from busigen.registry import ASKED_LENGTH, LESION_CLASSES, RESOLUTION
from busigen.training.checkpoint import load_networks
from busigen.training.examples import to_tensor
from busigen.training.networks.inference import Networks
from busigen.training.pipeline import HEALED
from busigen.training.rollouts import healed_reader

RESULTS = Path(__file__).parent / "results" / "stage1_leak.json"
FLIPS = 10_000


@torch.no_grad()
def centres(networks: Networks, image: NDArray[np.uint8], label: str, draws: int, seed: int) -> NDArray[np.float64]:
    """Centroids of outlines sampled for one image, ``(draws, 2)`` in pixels, down and across; NaN for empty ones."""
    keep = torch.ones(1, networks.preset.tokens)
    tokens = networks.tokens(to_tensor(image)[None], keep).expand(draws, -1, -1)
    length = networks.denoiser("mask", label).length
    noise = torch.randn(draws, length, generator=torch.Generator().manual_seed(seed))
    fields = networks.outline(noise, label, tokens, keep.expand(draws, -1), torch.zeros(draws, ASKED_LENGTH))
    masks = [largest_component(field[0].numpy() > 0) for field in fields]
    return np.array([attributes(m)[1::-1] * RESOLUTION if m.any() else (np.nan, np.nan) for m in masks])


def leak(spots: NDArray[np.float64], sampled: NDArray[np.float64], rng: np.random.Generator) -> dict[str, float]:
    """Own distances against others' and against those to the mirrored spot, means in pixels, with p values.

    Args:
        spots: healed lesions' centres, ``(N, 2)``.
        sampled: centres drawn for each image, ``(N, draws, 2)``.
        rng: of the test.
    """
    distance = np.nanmean(np.linalg.norm(sampled[:, :, None] - spots[None, None], axis=-1), axis=1)
    own = np.diag(distance)
    others = (distance.sum(axis=0) - own) / (len(spots) - 1)
    mirrored = spots * [1.0, -1.0] + [0.0, RESOLUTION]
    mirror = np.nanmean(np.linalg.norm(sampled - mirrored[:, None], axis=-1), axis=1)
    return {
        "images": len(spots),
        "own": float(own.mean()),
        "others": float(others.mean()),
        "p_others": _chance(others - own, rng),
        "mirror": float(mirror.mean()),
        "p_mirror": _chance(mirror - own, rng),
    }


def _chance(gain: NDArray[np.float64], rng: np.random.Generator) -> float:
    """One-sided p value of a mean gain above zero, by flipping signs."""
    flipped = (rng.choice([-1.0, 1.0], (FLIPS, len(gain))) * gain).mean(axis=1)
    return float((1 + (flipped >= gain.mean()).sum()) / (1 + FLIPS))


def main() -> None:
    """Sample, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="what `busigen train` finished")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="train shows what is memorised")
    parser.add_argument("--limit", type=int, default=60, help="images per class")
    parser.add_argument("--draws", type=int, default=16, help="outlines per image")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    prepared = Prepared.open(options.data)
    networks, record = load_networks(options.checkpoint)
    healed = healed_reader(options.checkpoint / HEALED)
    report: dict[str, Any] = {"split": options.split, "preset": record["preset"], "draws": options.draws}
    table = prepared.table
    for label in LESION_CLASSES:
        rows = table.filter((table["split"] == options.split) & (table["class"] == label))["row"].to_list()
        rows = rows[: options.limit]
        spots = [attributes(largest_component(prepared.masks[row] > 0))[1::-1] * RESOLUTION for row in rows]
        sampled = [centres(networks, healed(row, 0), label, options.draws, row) for row in rows]
        report[label] = leak(np.array(spots), np.array(sampled), np.random.default_rng(0))
        found = report[label]
        print(
            f"{label}: {found['images']} images; from the healed lesion to centres sampled for the image "
            f"{found['own']:.1f} px, for others {found['others']:.1f} px (p = {found['p_others']:.3f}); to its mirror "
            f"image {found['mirror']:.1f} px (p = {found['p_mirror']:.3f})"
        )
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
