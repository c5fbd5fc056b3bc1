"""A small segmentation network, its training, and how its predictions are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.evaluation.context import Effort, ImageSet
from busigen.registry import RESOLUTION

Pixels = NDArray[np.uint8]
Masks = NDArray[np.bool_]
Counts = NDArray[np.int64]
"""``(N, 3)``: pixels of each image that are true positive, false positive, false negative."""


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained: the same in every arm.

    Attributes:
        side: Pixels of the square input; divides 256.
        channels: Features per level of the U-Net (Ronneberger et al. 2015; MONAI's with strided convolutions, which
            work at half resolution from the first layer on).
        steps: Optimiser steps.
        batch: Images per step.
        rate: Largest learning rate of AdamW's one-cycle schedule.
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
class Examples:
    """``uint8`` images and ``bool`` masks, both ``(N, side, side)``."""

    images: Pixels
    masks: Masks

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[Any]) -> Examples:
        """Those of these rows."""
        return Examples(self.images[rows], self.masks[rows])

    def plus(self, other: Examples) -> Examples:
        """These and the others."""
        return Examples(np.concatenate([self.images, other.images]), np.concatenate([self.masks, other.masks]))


def examples(images: ImageSet, side: int) -> Examples:
    """A set at the network's resolution: blocks of pixels averaged, masks by majority."""
    block = RESOLUTION // side
    shape = (len(images), side, block, side, block)
    grey = images.images.reshape(shape).mean(axis=(2, 4), dtype=np.float32)
    return Examples(np.rint(grey).astype(np.uint8), images.masks.reshape(shape).mean(axis=(2, 4)) >= 0.5)


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

    Args:
        phases: What trains one after the other, each for as many of the steps; at least one example in each.
        recipe: The network and its schedule.
        seed: Seeds weights, order and augmentation.
        device: Where to train.
        classic: Mirror, rotate, scale and shift images, and change their gain and gamma.
        paste: Paste the lesion of another image into every second one (Ghiasi et al., "Simple copy-paste is a strong
            data augmentation method", CVPR 2021), edges blurred.
        done: Called with 1 after every step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # No residual units: with them MONAI's network normalises its one output channel per image, and trainings stuck
        # at a Dice of 0.04 to 0.27 with seeds and rates with which this one reaches 0.58 (64 pixels, 150 steps).
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
            images, masks = _tensors(data.take(rows), device)
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
        block = torch.from_numpy(images[start : start + batch].astype(np.float32) / 255.0).unsqueeze(1).to(device)
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
    """``(N, 2)``: rows and columns from the mask's centroid to the prediction's, in pixels of the working frame.

    NaN where either is empty.
    """
    unit = RESOLUTION / masks.shape[1]
    return (_centroids(predicted) - _centroids(masks)) * unit


def _centroids(masks: Masks) -> NDArray[np.float64]:
    area = masks.sum(axis=(1, 2)).astype(np.float64)
    area[area == 0] = np.nan
    place = np.arange(masks.shape[1])
    return np.stack([(masks.sum(axis=2) @ place) / area, (masks.sum(axis=1) @ place) / area], axis=1)


def _tensors(data: Examples, device: str) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(data.images.astype(np.float32) / 255.0).unsqueeze(1).to(device)
    return images, torch.from_numpy(data.masks.astype(np.float32)).unsqueeze(1).to(device)


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
