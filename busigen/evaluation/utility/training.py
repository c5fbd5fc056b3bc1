"""The trainings of the utility section: a small segmentation network, what each arm trains on, how it is scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from numpy.typing import NDArray
from pydantic import Field
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.errors import IntegrityError
from busigen.evaluation.context import AuditContext, Effort, ImageSet
from busigen.files import write_json
from busigen.records import Many, Number, Record, Text, Whole, read_checked
from busigen.registry import RESOLUTION

Pixels = NDArray[np.uint8]
Masks = NDArray[np.bool_]
Counts = NDArray[np.int64]  # ``(N, 3)``: pixels of each image that are true positive, false positive, false negative.


VERSION = 1  # Part of every kept training's key: raise it whenever training changes


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained: the same in every arm. ``side``: Pixels of the square input; divides 256.

    ``channels``: Features per level of MONAI's U-Net, whose strided convolutions halve the resolution at once.
    """

    side: int
    channels: tuple[int, ...]
    steps: int
    batch: int
    rate: float


RECIPES: dict[Effort, Recipe] = {
    "quick": Recipe(side=128, channels=(16, 32, 64, 128, 128), steps=500, batch=16, rate=4e-3),
    "full": Recipe(side=256, channels=(32, 64, 128, 256, 256), steps=4000, batch=16, rate=2e-3),
}


@dataclass(frozen=True)
class Extent:
    """How much one effort does. ``limit``: The most real training images; None for all.

    ``real_seeds`` are those of the arm ``real``: two at least, for the floor. ``folds`` are group folds of the real
    images, where nobody named those that trained the generator, and ``folds_run`` of them are tested.
    """

    seeds: int
    real_seeds: int
    folds: int
    folds_run: int
    limit: int | None


EXTENTS: dict[Effort, Extent] = {"quick": Extent(1, 2, 3, 1, 400), "full": Extent(3, 3, 5, 5, None)}


@dataclass(frozen=True)
class Arm:
    """What one arm trains on. ``synthetic`` is a multiple of the number of real training images.

    ``paste``: Lesions of training images pasted into others. ``first``: Synthetic images train alone for the first half
    of the steps, real ones for the second.
    """

    name: str
    label: str
    real: bool = True
    classic: bool = False
    paste: bool = False
    synthetic: float = 0.0
    first: bool = False
    quick: bool = False


REAL, CLASSIC, ADDED, ALONE = "real", "classic", "synthetic_1", "synthetic_only"

ARMS = {
    arm.name: arm
    for arm in (
        Arm(REAL, "real", quick=True),
        Arm(CLASSIC, "real + classic augmentation", classic=True, quick=True),
        Arm("paste", "real + lesion copy-paste", paste=True),
        Arm("synthetic_half", "real + 0.5 x synthetic", synthetic=0.5),
        Arm(ADDED, "real + 1 x synthetic", synthetic=1.0, quick=True),
        Arm("synthetic_2", "real + 2 x synthetic", synthetic=2.0),
        Arm("synthetic_4", "real + 4 x synthetic", synthetic=4.0),
        Arm("classic_synthetic_1", "real + 1 x synthetic + classic augmentation", classic=True, synthetic=1.0),
        Arm("classic_synthetic_2", "real + 2 x synthetic + classic augmentation", classic=True, synthetic=2.0),
        Arm("classic_after_2", "2 x synthetic, then real, + classic", classic=True, synthetic=2.0, first=True),
        Arm(ALONE, "synthetic only", real=False, synthetic=1.0, quick=True),
    )
}


@dataclass(frozen=True)
class Split:
    """One division of the real images: what trains, and which rows of ``context.real`` test."""

    name: str
    train: ImageSet
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """One training's scores on the split's test rows and on the other whole sets; offsets are of `centroid_offsets`."""

    arm: str
    seed: int
    split: str
    test: Counts
    offsets: NDArray[np.float64]
    synthetic: Counts
    synthetic_offsets: NDArray[np.float64]
    external: Counts


@dataclass(frozen=True)
class Examples:
    """``uint8`` images and ``bool`` masks, both ``(N, side, side)``."""

    images: Pixels
    masks: Masks

    def __len__(self) -> int:
        return len(self.images)


def examples(images: ImageSet, side: int) -> Examples:
    """A set at the network's resolution: blocks of pixels averaged, masks by majority."""
    block = RESOLUTION // side
    shape = (len(images), side, block, side, block)
    grey = images.images.reshape(shape).mean(axis=(2, 4), dtype=np.float32)
    return Examples(np.rint(grey).astype(np.uint8), images.masks.reshape(shape).mean(axis=(2, 4)) >= 0.5)


def splits(context: AuditContext, synthetic: int) -> tuple[list[Split], list[str]]:
    """How real images are divided, and what a reader should know about it.

    The generator's own training images train and ``context.real`` tests, where those are known: then the synthetic
    images add nothing that the arm ``real`` could not have seen. Else group folds.
    """
    extent, real = EXTENTS[context.effort], context.real
    everything = np.arange(len(real))
    notes = []
    if context.train is not None and len(context.train):
        parts = [("held_out", context.train, everything)]
    else:
        notes.append(
            "Nobody said which images trained the generator, so real images were divided into group folds. If the "
            "generator saw test images, figures with synthetic images are too good."
        )
        count = min(extent.folds, len(np.unique(real.groups)))
        if count < 2:
            return [], ["Too few groups of real images to train and test a network."]
        folder = StratifiedGroupKFold(count, shuffle=True, random_state=context.seed)
        pairs = list(folder.split(everything, real.classes, real.groups))[: extent.folds_run]
        parts = [(f"fold_{k}", real.take(rows), test) for k, (rows, test) in enumerate(pairs)]
    result = []
    for name, pool, test in parts:
        limit = len(pool) if extent.limit is None else min(extent.limit, max(synthetic, 1), len(pool))
        rows = np.sort(context.rng("utility", "real", name).permutation(len(pool))[:limit])
        result.append(Split(name, pool.take(rows), test))
    return result, notes


def arms_for(context: AuditContext, real: int, synthetic: int) -> tuple[list[Arm], list[str]]:
    """The arms of this effort that the set is large enough for, and a note for each that is left out."""
    chosen, notes = [], []
    for arm in ARMS.values():
        if context.effort == "quick" and not arm.quick:
            continue
        wanted = round(arm.synthetic * real)
        if arm.synthetic > 1 and synthetic < wanted:
            notes.append(f"'{arm.label}' is left out: it takes {wanted} synthetic images, and there are {synthetic}.")
            continue
        if arm.synthetic and synthetic < wanted:
            notes.append(f"'{arm.label}' has {synthetic} synthetic images, of {wanted} that its name promises.")
        chosen.append(arm)
    return chosen, notes


def outcomes(context: AuditContext, parts: list[Split], arms: list[Arm]) -> list[Outcome]:
    """Train every arm, seed and split that is not kept already in the section's folder."""
    recipe, extent = RECIPES[context.effort], EXTENTS[context.effort]
    synthetic = examples(context.synthetic.with_lesions(), recipe.side)
    external = examples(context.external, recipe.side) if context.external is not None else None
    order = context.rng("utility", "synthetic").permutation(len(synthetic))
    jobs = [
        (part, arm, seed)
        for part in parts
        for arm in arms
        for seed in range(extent.real_seeds if arm.name == REAL else extent.seeds)
    ]
    folder = context.folder("utility") / "trainings"
    folder.mkdir(exist_ok=True)
    device, done = context.device, context.progress.advance
    result = []
    context.progress.start(f"{len(jobs)} trainings", len(jobs) * recipe.steps, unit="step")
    for part, arm, seed in jobs:
        real = examples(part.train, recipe.side)
        # Larger arms hold the synthetic images of smaller ones, so that arms differ in number and not in luck.
        rows = order[: round(arm.synthetic * len(real))]
        added = Examples(synthetic.images[rows], synthetic.masks[rows])
        sources = [source for source, used in ((real, arm.real), (added, arm.synthetic > 0)) if used]
        test = examples(context.real.take(part.test), recipe.side)
        outside = {} if external is None else {"external": external}
        key = _key(recipe, arm, [context.seed, seed], (*sources, test, *outside.values(), synthetic))
        path = folder / f"{arm.name}-{part.name}-{seed}-{key[:12]}.json"
        kept = _kept(path, key)
        if kept is None:
            together = Examples(np.concatenate([s.images for s in sources]), np.concatenate([s.masks for s in sources]))
            phases, seeded = sources[::-1] if arm.first else [together], 1000 * context.seed + seed
            network = train(phases, recipe, seed=seeded, device=device, classic=arm.classic, paste=arm.paste, done=done)
            kept = {}
            probed = {"synthetic": synthetic} if arm.name == REAL else {}
            for name, tested in {"test": test, **probed, **outside}.items():
                predicted = predict(network, tested.images, device)
                offsets = centroid_offsets(predicted, tested.masks)
                kept[name] = overlap(predicted, tested.masks).tolist()
                kept[f"{name}_offsets"] = [None if np.isnan(row).any() else row.tolist() for row in offsets]
            write_json(path, {"key": key, **kept})
        else:
            done(recipe.steps)
        result.append(_outcome(arm.name, seed, part.name, kept))
    return result


def _key(recipe: Recipe, arm: Arm, seeds: list[int], parts: tuple[Examples, ...]) -> str:
    """Names everything that a training's scores depend on, pixels included."""
    about = {"version": VERSION, "recipe": asdict(recipe), "arm": asdict(arm), "seed": seeds}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in parts:
        digest.update(f"|{len(part)}|".encode())
        digest.update(np.ascontiguousarray(part.images).tobytes())
        digest.update(np.packbits(part.masks).tobytes())
    return digest.hexdigest()


_Overlaps = Many[tuple[Whole, Whole, Whole]]
_Offsets = Many[tuple[Number, Number] | None]


class _Kept(Record):
    """A kept training's scores, by the set that they were measured on."""

    key: Text
    test: _Overlaps
    test_offsets: _Offsets
    synthetic: _Overlaps = Field(default_factory=list)
    synthetic_offsets: _Offsets = Field(default_factory=list)
    external: _Overlaps = Field(default_factory=list)
    external_offsets: _Offsets = Field(default_factory=list)


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = read_checked(_Kept, path, fix="")
    except (OSError, IntegrityError):
        return None
    return content if content["key"] == key else None


def _outcome(arm: str, seed: int, split: str, content: dict[str, Any]) -> Outcome:
    found = {}
    for name in ("test", "synthetic", "external"):
        counts = np.array(content.get(name, []), np.int64).reshape(-1, 3)
        offsets = [[np.nan] * 2 if row is None else row for row in content.get(f"{name}_offsets", [])]
        found[name] = counts, np.array(offsets, np.float64).reshape(-1, 2)
    return Outcome(arm, seed, split, *found["test"], *found["synthetic"], found["external"][0])


def train(
    phases: Sequence[Examples],
    recipe: Recipe,
    *,
    seed: int,
    device: str,
    classic: bool,
    paste: bool,
    done: Callable[[int], None] = lambda steps: None,
) -> nn.Module:
    """Train a U-Net on Dice and cross-entropy for a fixed number of steps.

    ``phases``: What trains one after the other, each for as many of the steps; at least one example in each.
    ``classic``: Mirror, rotate, scale and shift images, and change their gain and gamma. ``paste``: Paste the lesion of
    another image into every second one (Ghiasi et al. 2021). ``done``: Called with 1 after every step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # No residual units: with them MONAI's network normalises its one output channel per image, and gets stuck.
        norm = ("instance", {"affine": True})
        network = UNet(2, 1, 1, recipe.channels, (2,) * (len(recipe.channels) - 1), num_res_units=0, norm=norm)
        network.to(device).train()
        loss_of = DiceCELoss(sigmoid=True, batch=True)
        optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=recipe.steps)
        order, last = torch.empty(0, dtype=torch.int64), phases[0]
        for step in range(recipe.steps):
            data = phases[step * len(phases) // recipe.steps]
            if data is not last:
                order, last = order[:0], data
            while len(order) < recipe.batch:
                order = torch.cat([order, torch.randperm(len(data))])
            rows, order = order[: recipe.batch].numpy(), order[recipe.batch :]
            images = _grey(data.images[rows], device)
            masks = torch.from_numpy(data.masks[rows].astype(np.float32)).unsqueeze(1).to(device)
            if paste:
                images, masks = _pasted(images, masks)
            if classic:
                images, masks = _augmented(images, masks)
            loss = loss_of(network(_standardised(images)), masks)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            done(1)
    return network.eval()


def predict(network: nn.Module, images: Pixels, device: str, batch: int = 32) -> Masks:
    """``bool (N, side, side)``: where the network sees a lesion with a probability above one half."""
    parts = [np.zeros((0, *images.shape[1:]), np.bool_)]
    for start in range(0, len(images), batch):
        block = _grey(images[start : start + batch], device)
        with torch.inference_mode():
            parts.append((network(_standardised(block)).squeeze(1) > 0).cpu().numpy())
    return np.concatenate(parts)


def overlap(predicted: Masks, masks: Masks) -> Counts:
    """True-positive, false-positive and false-negative pixels of each image."""
    pairs = (predicted & masks, predicted & ~masks, ~predicted & masks)
    return np.stack([pair.reshape(len(masks), -1).sum(axis=1) for pair in pairs], axis=1).astype(np.int64)


def dice(counts: Counts) -> NDArray[np.float64]:
    """N Dice coefficients in [0, 1]; 1 where prediction and mask are both empty."""
    true, total = 2.0 * counts[:, 0], 2.0 * counts[:, 0] + counts[:, 1] + counts[:, 2]
    return np.where(total > 0, true / np.maximum(total, 1), 1.0)


def pooled_f1(counts: Counts) -> float:
    """F1 over the pixels of all images taken together, as in Wen et al. 2026; NaN where there is nothing to find."""
    return float(dice(counts.sum(axis=0, keepdims=True))[0]) if counts.any() else float("nan")


def centroid_offsets(predicted: Masks, masks: Masks) -> NDArray[np.float64]:
    """``(N, 2)``: pixels of the working frame down and right from the mask's centroid to the prediction's, or NaN."""
    place = np.arange(masks.shape[1])

    def centroids(of: Masks) -> NDArray[np.float64]:
        area = of.sum(axis=(1, 2)).astype(np.float64)
        area[area == 0] = np.nan
        return np.stack([(of.sum(axis=2) @ place) / area, (of.sum(axis=1) @ place) / area], axis=1)

    return (centroids(predicted) - centroids(masks)) * (RESOLUTION / masks.shape[1])


def _grey(images: Pixels, device: str) -> Tensor:
    return torch.from_numpy(images.astype(np.float32) / 255.0).unsqueeze(1).to(device)


def _standardised(images: Tensor) -> Tensor:
    """Zero mean and unit variance per image: gain is a knob."""
    mean, std = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    return (images - mean) / (std + 1e-3)


def _pasted(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    partner = torch.randperm(len(images)).to(images.device)
    chosen = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    lesion = masks[partner] * chosen
    soft = torch.maximum(F.avg_pool2d(F.max_pool2d(lesion, 5, 1, 2), 5, 1, 2), lesion)
    return images * (1 - soft) + images[partner] * soft, torch.maximum(masks, lesion)


def _augmented(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.35
    scale = 1.0 + (torch.rand(count) - 0.5) * 0.4
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = (torch.rand(count, 2) - 0.5) * 0.2
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cosine * mirror, -sine, shift[:, 0]], 1), torch.stack([sine * mirror, cosine, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(images.device), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    masks = (F.grid_sample(masks, grid, align_corners=False) > 0.5).float()
    gamma = torch.exp((torch.rand(count, 1, 1, 1) - 0.5) * 0.8).to(images.device)
    noise = torch.randn(count, 1, 1, 1).to(images.device) * 0.05
    return images.clamp(0, 1) ** gamma + noise, masks
