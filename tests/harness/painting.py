"""Checkpoints of the preset ``sd15``: the shipped bundle's components, and random LoRAs for a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from busigen.export.import_bundle import opened_base
from busigen.files import make_folder
from busigen.registry import STABLE_DIFFUSION
from busigen.training import checkpoint
from busigen.training.networks.inference import ADAPTERS
from busigen.training.recipe import recipe_for
from busigen.training.stable_diffusion import painter


def untrained(folder: Path, base_model: Path, *, context: bool = True, shown_at: int = 256) -> Path:
    """A finished checkpoint on ``base_model``, each of whose adapters changes what is drawn in its own way."""
    asked = painter.asked_of(str(base_model), None, prompts=(), context=context, shown_at=shown_at)
    recipe = recipe_for(STABLE_DIFFUSION)
    with opened_base(Path("default")) as base:
        assert base is not None
        base.copy(folder, recipe)
        record = json.loads((base.folder / checkpoint.RECORD).read_text())
    torch.manual_seed(0)
    for name in ADAPTERS:
        label = name.partition("-")[2]
        model = painter.for_training(asked["base_model"], asked["painting"], label, recipe.sizes.context_dim)
        adapted = checkpoint.with_adapter(model.unet, recipe.lora, seed=0)
        with torch.no_grad():
            for key, value in adapted.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.2)
            model.outline.weight.normal_(std=0.05)
        place = folder / checkpoint.ADAPTERS / name
        make_folder(place)
        checkpoint.save_adapter(adapted, place)
        painter.save_conditions(model, place)
    kept = {key: record[key] for key in ("latents", "frames", "styles", "device", "versions")}
    checkpoint.write_record(
        folder,
        {
            **kept,
            "preset": STABLE_DIFFUSION,
            "recipe": recipe.to_dict(),
            "data": {"images": 0, "split_hash": "none"},
            "tasks": {},
            "painting": asked["painting"].model_dump(),
        },
    )
    return folder


def kohya_lora(path: Path, seed: int = 3) -> Path:
    """A LoRA of one layer of the tiny base in the names of kohya's scripts."""
    generator = torch.Generator().manual_seed(seed)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {"lora_down": (4, 64), "lora_up": (64, 4)}
    weights = {f"{name}.{part}.weight": torch.randn(shape, generator=generator) for part, shape in pair.items()}
    save_file({**weights, f"{name}.alpha": torch.tensor(4.0)}, path)
    return path
