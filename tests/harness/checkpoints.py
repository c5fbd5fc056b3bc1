"""Checkpoints to export: tiny, finished, never trained, in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from busigen.registry import LESION_CLASSES, PRESETS, STAGES
from busigen.training import checkpoint
from busigen.training.checkpoint import BASE, MERGED, RECORD, weight_hashes
from busigen.training.networks.build import build
from busigen.training.recipe import recipe_for
from tests.training.test_outline import blob

TINY = PRESETS["tiny"]


def untrained(folder: Path) -> Path:
    """Write a tiny checkpoint with random weights; each class has its own."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    masks = [blob(rng) for _ in range(30)]
    for name in ("autoencoder", "context", "prior"):
        model = build(name, TINY)
        if name == "autoencoder":
            for outline in model.decoder.outlines:
                torch.nn.init.normal_(outline.weight, std=0.2)
        checkpoint.save_component(model, folder / BASE / name)
    for stage in STAGES:
        for label in LESION_CLASSES:
            model = build(stage, TINY)
            if stage == "mask":
                model.space.fit(masks)
                for write in model.write:
                    torch.nn.init.normal_(write.weight, std=0.02)
            checkpoint.save_component(model, folder / MERGED / f"{stage}-{label}")
    record = {
        "preset": "tiny",
        "recipe": recipe_for("tiny").to_dict(),
        "data": {"images": 0, "split_hash": "none"},
        "tasks": {},
        "device": "cpu",
        "versions": checkpoint.versions(),
        "latents": {"mean": [0.0] * TINY.latent_channels, "std": [1.0] * TINY.latent_channels},
    }
    checkpoint.write_record(folder, record)
    return folder


def changed(source: Path, folder: Path, place: str, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint, sound as to its hashes, in which ``change`` was done to one component's weights.

    Args:
        source: the checkpoint.
        folder: the copy.
        place: the component's folder in it.
        change: what is done to its state dict, in place.
    """
    shutil.copytree(source, folder)
    name = place.partition("/")[2].partition("-")[0]
    model = checkpoint.load_component(name, folder / place)
    with torch.no_grad():
        change(model.state_dict())
    shutil.rmtree(folder / place)
    checkpoint.save_component(model, folder / place)
    return rehashed(folder)


def rehashed(folder: Path) -> Path:
    """The same checkpoint with the hashes that its files have now, as if training had written them."""
    record = json.loads((folder / RECORD).read_text())
    record["weights"] = weight_hashes(folder)
    (folder / RECORD).write_text(json.dumps(record))
    return folder
