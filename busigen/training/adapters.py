"""One LoRA per stage and class through peft, and its merge into the base (Hu et al. 2021)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig, PeftModel, get_peft_model

from busigen.training.recipe import LoraSpec


def with_adapter(base: ModelMixin, lora: LoraSpec, seed: int) -> PeftModel:
    """Freeze ``base`` and attach fresh adapters, which alone are trainable.

    Where the base knows its data's spread (:mod:`busigen.training.spectrum`), the adapter has one of its own.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        modules_to_save=["spectrum"] if hasattr(base, "spectrum") else None,
    )
    return get_peft_model(base.requires_grad_(False), config)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter alone, as safetensors, with no trace of where its base lay."""
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(str(folder), safe_serialization=True)


def merge(model: PeftModel) -> ModelMixin:
    """Fold the adapter into the base weights and return the plain network.

    Raises:
        ValueError: an adapter's name is left in the merged network.
    """
    merged = model.merge_and_unload(safe_merge=True)
    left = [name for name in merged.state_dict() if "lora" in name]
    if left:
        raise ValueError(f"adapter weights are left after the merge: {', '.join(left[:3])}")
    return merged
