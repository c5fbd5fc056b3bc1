from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel

from busigen.registry import PRESETS, SCANNERS
from busigen.training.checkpoint import merge, save_adapter, with_adapter
from busigen.training.networks.build import build
from busigen.training.networks.inference import Velocity
from busigen.training.recipe import LoraSpec

TINY = PRESETS["tiny"]
LORA = LoraSpec()


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    channels = TINY.latent_channels

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    condition = draw(2, SCANNERS, 16, 16), draw(2, channels, 16, 16), draw(2, 4, 16, 16), draw(2, 1, 16, 16)
    context = draw(2, TINY.tokens, TINY.context_dim), torch.ones(2, TINY.tokens)
    return draw(2, channels, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([1, 2]), *context, *condition


def test_merged_network_equals_base_plus_adapter_and_names_no_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build("lesion", TINY).eval()
    inputs = _inputs()
    with torch.no_grad():
        plain = Velocity(base)(*inputs)
    names = set(base.state_dict())

    adapted = with_adapter(base, LORA, seed=0)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora" in name for name in trainable)
    with torch.no_grad():
        # A fresh adapter is zero; give it weights as training would.
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        with_lora = Velocity(adapted)(*inputs)
    assert (with_lora - plain).abs().max() > 1e-2

    save_adapter(adapted, tmp_path / "adapter")
    merged = merge(adapted)
    with torch.no_grad():
        output = Velocity(merged)(*inputs)
    # The same sum in another order, through about 30 layers in fp32: a few hundred roundings of 6e-8 each.
    assert (output - with_lora).abs().max() < 2e-5 * with_lora.abs().max()
    assert set(merged.state_dict()) == names
    assert not any(word in name for name in merged.state_dict() for word in ("lora", "adapter", "base_layer"))


def test_an_adapter_is_saved_alone_without_pickle_and_without_the_place_of_its_base(tmp_path: Path) -> None:
    adapted = with_adapter(build("mask", TINY), LORA, seed=0)
    save_adapter(adapted, tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_an_adapter_brings_the_spread_of_its_class(tmp_path: Path) -> None:
    base = build("mask", TINY)
    adapted = with_adapter(copy.deepcopy(base), LORA, seed=0)
    adapted.spectrum.fit(0.5 * torch.randn(200, base.length, generator=torch.Generator().manual_seed(1)))
    save_adapter(adapted, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    for merged in (merge(adapted), loaded):
        # A deviation of 200 numbers is known to 5 % (one sigma).
        assert 0.4 < merged.spectrum.spread.mean() < 0.6
        assert set(merged.state_dict()) == set(build("mask", TINY).state_dict())
