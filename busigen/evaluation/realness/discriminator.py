"""The trained classifier of the real-or-synthetic test's full mode: a ResNet of MONAI."""

from __future__ import annotations

import numpy as np
import torch
from monai.networks import nets
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.evaluation.realness.separation import Floats, Ints, Task

NETWORKS = {"cuda": "resnet101", "cpu": "resnet18"}
"""The paper's network (Wen et al. 2026, ResNet101) where there is a GPU; one that finishes in hours where not.

Both start from random weights: MONAI has none for two dimensions.
"""

EPOCHS = 20
BATCH = 32
RATE = 3e-4


def network_name(device: str) -> str:
    """Name of the MONAI network that this device trains."""
    return NETWORKS["cuda" if device.startswith("cuda") else "cpu"]


def resnet_scores(
    pixels: NDArray[np.uint8], task: Task, fold: Ints, *, seed: int, device: str = "cpu", epochs: int = EPOCHS
) -> Floats:
    """Out-of-fold logits of "side 1", from one network per fold.

    Every class and side has the same weight in the loss, so prevalence teaches nothing. Training mirrors left and right
    at random, and scales brightness by up to 10 %, because gain is a knob.

    Args:
        pixels: ``uint8 (N, H, W)``; pictures lower than 64 rows are doubled in size.
        task: Sides, classes, groups.
        fold: N fold numbers.
        seed: Seeds weights, order and augmentation.
        device: Where to train.
        epochs: Passes over the training folds.
    """
    result = np.zeros(len(pixels))
    for value in np.unique(fold):
        train, test = np.flatnonzero(fold != value), np.flatnonzero(fold == value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000 + int(value))
            network = _trained(pixels[train], task.take(train), device, epochs)
        network.eval()
        with torch.inference_mode():
            for rows in np.array_split(test, max(1, len(test) // BATCH)):
                result[rows] = network(_inputs(pixels[rows], device)).squeeze(1).cpu().numpy()
    return result


def _trained(pixels: NDArray[np.uint8], task: Task, device: str, epochs: int) -> nn.Module:
    build = getattr(nets, network_name(device))
    network: nn.Module = build(spatial_dims=2, n_input_channels=1, num_classes=1)
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    # A batch of one has no variance for batch normalisation: what is left over joins the batch before.
    batches = max(1, len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=epochs * batches)
    stratum = 2 * task.label + task.side
    weight = torch.from_numpy((1.0 / np.bincount(stratum)[stratum]).astype(np.float32)).to(device)
    weight = weight / weight.mean()
    side = torch.from_numpy(task.side.astype(np.float32)).to(device)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).tensor_split(batches):
            images = _augmented(_inputs(pixels[rows.numpy()], device))
            loss = F.binary_cross_entropy_with_logits(network(images).squeeze(1), side[rows], weight=weight[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return network


def _inputs(pixels: NDArray[np.uint8], device: str) -> Tensor:
    images = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).unsqueeze(1).to(device)
    if images.shape[2] < 64:
        images = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
    return images


def _augmented(images: Tensor) -> Tensor:
    mirrored = torch.where((torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device), images.flip(-1), images)
    return mirrored * (0.9 + 0.2 * torch.rand(len(images), 1, 1, 1)).to(images.device)
