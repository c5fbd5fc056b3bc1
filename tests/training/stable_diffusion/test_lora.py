"""LoRAs of every layout do to a UNet what peft does with them; those that cannot are refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from busigen.errors import InputError, UsageError
from busigen.training.stable_diffusion.lora import TEXT, UNET, parse_option, read_lora
from tests.harness import stable_diffusion as tiny

RANK, ALPHA = 4, 6.0
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return tiny.networks()[0]


@pytest.fixture(scope="module")
def adapted(unet: UNet2DConditionModel) -> PeftModel:
    """An adapter with weights as after a training, on attention and one convolution of each resnet."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model = get_peft_model(copy.deepcopy(unet), config)
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.1)
    return model


@pytest.fixture(scope="module")
def pairs(adapted: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each layer, by its name in the UNet."""
    weights = {name: value for name, value in adapted.state_dict().items() if ".lora_A." in name}
    return {
        _layer(name): (value, adapted.state_dict()[name.replace(".lora_A.", ".lora_B.")])
        for name, value in weights.items()
    }


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_A.")[0]


@torch.no_grad()
def answer(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 9, 16, 16, generator=generator)
    tokens = torch.randn(1, tiny.TOKENS, tiny.WIDTH, generator=generator)
    found: Tensor = unet(sample, torch.tensor([500.0]), tokens).sample
    return found


def as_peft(adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    adapted.save_pretrained(str(folder))
    return folder


def _save(weights: Weights, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    path = folder / "lora.safetensors"
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path, metadata=metadata)
    return path


def as_diffusers(adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    weights = {}
    for layer, (down, up) in pairs.items():
        weights |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    said = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.target_modules": ["to_q"]}
    return _save(weights, folder, {"format": "pt", "lora_adapter_metadata": json.dumps(said)})


def as_older_diffusers(adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    weights = {}
    for layer, (down, up) in pairs.items():
        weights |= {f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up}
    return _save(weights, folder)


def as_kohya(adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    weights = {}
    for layer, (down, up) in pairs.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        weights |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    return _save(weights, folder)


def as_paper(adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    weights = {}
    for layer, (down, up) in pairs.items():
        name = re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", layer)
        weights |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return _save(weights, folder)


LAYOUTS = [
    ("peft", as_peft, None),
    ("diffusers", as_diffusers, None),
    ("diffusers", as_older_diffusers, ALPHA),
    ("kohya", as_kohya, None),
    ("paper", as_paper, ALPHA),
]


@pytest.mark.parametrize(("layout", "write", "alpha"), LAYOUTS)
def test_every_layout_has_the_effect_that_peft_gives_it(
    layout: str,
    write: Callable[..., Path],
    alpha: float | None,
    unet: UNet2DConditionModel,
    adapted: PeftModel,
    pairs: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    found = read_lora(write(adapted, pairs, tmp_path / "lora"), unet, alpha=alpha)
    assert found.layout == layout
    merged = copy.deepcopy(unet)
    assert found.merge(merged) == len(pairs) == len(found.layers)
    wanted = answer(adapted)
    assert (answer(unet) - wanted).abs().max() > 0.01, "the adapter of this test does nothing"
    # fp32: a merged product is rounded once, peft's is summed in two steps.
    torch.testing.assert_close(answer(merged), wanted, rtol=0, atol=1e-4)


def test_half_a_weight_is_half_of_what_is_added(
    unet: UNet2DConditionModel, adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    lora = read_lora(as_kohya(adapted, pairs, tmp_path / "lora"), unet)
    half, whole = copy.deepcopy(unet), copy.deepcopy(unet)
    lora.merge(half, weight=0.5)
    lora.merge(whole)
    name = next(iter(pairs)) + ".weight"
    before, middle, after = (network.state_dict()[name] for network in (unet, half, whole))
    torch.testing.assert_close(middle, (before + after) / 2)


@pytest.mark.parametrize("write", [as_older_diffusers, as_paper])
def test_a_file_that_does_not_say_its_alpha_asks_for_it(
    write: Callable[..., Path],
    unet: UNet2DConditionModel,
    adapted: PeftModel,
    pairs: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="does not say its alpha") as caught:
        read_lora(write(adapted, pairs, tmp_path / "lora"), unet)
    assert "--lora-alpha" in caught.value.fix


def test_convolutions_and_the_text_encoder_are_merged_too(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    text = tiny.networks()[2]
    torch.manual_seed(5)
    conv, attention = "down_blocks.0.resnets.0.conv1", "encoder.layers.1.self_attn.q_proj"
    shape = unet.get_submodule(conv).weight.shape
    down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, 1, 1)
    wide = torch.randn(RANK, tiny.WIDTH)
    weights = {
        f"lora_unet_{conv.replace('.', '_')}.lora_down.weight": down,
        f"lora_unet_{conv.replace('.', '_')}.lora_up.weight": up,
        f"lora_unet_{conv.replace('.', '_')}.alpha": torch.tensor(2.0),
        f"lora_te_text_model_{attention.replace('.', '_')}.lora_down.weight": wide,
        f"lora_te_text_model_{attention.replace('.', '_')}.lora_up.weight": wide.T,
        f"lora_te_text_model_{attention.replace('.', '_')}.alpha": torch.tensor(4.0),
    }
    path = _save(weights, tmp_path / "lora")
    assert set(read_lora(path, unet).layers) == {(UNET, conv)}
    lora = read_lora(path, unet, text_encoder=text)
    merged, other = copy.deepcopy(unet), copy.deepcopy(text)
    assert (lora.merge(merged), lora.merge(other, TEXT)) == (1, 1)
    added = merged.get_submodule(conv).weight - unet.get_submodule(conv).weight
    torch.testing.assert_close(added, 0.5 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down), rtol=1e-4, atol=1e-5)
    changed = {name for name, module in other.named_modules() if hasattr(module, "weight")}
    assert any(name.endswith(attention) for name in changed)


# What the training of LCM-LoRA adapts (diffusers' examples/consistency_distillation), all by rank 64. Such layers of
# Stable Diffusion 1.5 have 67.25 million numbers: LCM-LoRA's and TCD's 135 MB in fp16, Hyper-SD's 269 MB in fp32.
ACCELERATED = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_accelerators_as_they_are_published_find_all_their_layers(
    dtype: torch.dtype, unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    adapted = get_peft_model(copy.deepcopy(unet), LoraConfig(r=2, lora_alpha=2, target_modules=list(ACCELERATED)))
    torch.manual_seed(4)
    weights = {}
    for name, value in adapted.state_dict().items():
        if ".lora_" in name:
            torch.nn.init.normal_(value, std=0.05)
            key = f"lora_unet_{_layer(name.replace('.lora_B.', '.lora_A.')).replace('.', '_')}"
            part = "down" if ".lora_A." in name else "up"
            weights |= {f"{key}.lora_{part}.weight": value.to(dtype), f"{key}.alpha": torch.tensor(2.0, dtype=dtype)}
    found = read_lora(_save(weights, tmp_path / "lora"), unet)
    merged = copy.deepcopy(unet)
    assert found.layout == "kohya" and 3 * found.merge(merged) == len(weights)
    # Of fp16 three digits are kept, which a tiny network of 300 changed layers answers with some thousandths.
    tolerance = 1e-2 if dtype == torch.float16 else 1e-4
    wanted = answer(adapted)
    assert (answer(unet) - wanted).abs().max() > 0.1, "the adapter of this test does nothing"
    torch.testing.assert_close(answer(merged), wanted, rtol=0, atol=tolerance)


def _rename(path: Path, change: Callable[[Weights], Weights]) -> None:
    file = next(path.parent.glob("*.safetensors")) if path.is_file() else path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda found: {name.replace("down_blocks_0", "down_blocks_7"): value for name, value in found.items()},
            "another base",
        ),
        (
            lambda found: {name: value.zero_() if "up" in name else value for name, value in found.items()},
            "changes nothing",
        ),
        (
            lambda found: {name: value * torch.nan if "up" in name else value for name, value in found.items()},
            "not finite",
        ),
        (lambda found: {**found, min(found).split(".")[0] + ".dora_scale": torch.ones(4)}, "no plain LoRA"),
        (lambda found: {name: value for name, value in found.items() if "up" not in name}, "damaged"),
        (lambda found: {"model.weight": torch.ones(4)}, "is no LoRA"),
        (
            lambda found: {
                name: value[:, :8].contiguous() if "lora_down" in name else value for name, value in found.items()
            },
            "another base",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(
    change: Callable[[Weights], Weights],
    said: str,
    unet: UNet2DConditionModel,
    adapted: PeftModel,
    pairs: dict[str, tuple[Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    path = as_kohya(adapted, pairs, tmp_path / "lora")
    _rename(path, change)
    network = copy.deepcopy(unet)
    with pytest.raises(InputError, match=said) as caught:
        read_lora(path, network).merge(network)
    assert caught.value.fix
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in unet.state_dict().items())


def test_pickles_and_files_cut_short_are_refused(
    unet: UNet2DConditionModel, adapted: PeftModel, pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = as_kohya(adapted, pairs, tmp_path / "lora")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be read"):
        read_lora(path, unet)
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save({}, folder / "pytorch_lora_weights.bin")
    with pytest.raises(InputError, match="pickle"):
        read_lora(folder, unet)
    with pytest.raises(InputError, match="holds no"):
        read_lora(tmp_path / "lora" / "..", unet)


def test_a_name_of_the_hub_is_not_taken_for_a_pickle(unet: UNet2DConditionModel) -> None:
    with pytest.raises(InputError, match="there is no LoRA at latent-consistency/lcm-lora-sdv1-5") as caught:
        read_lora(Path("latent-consistency/lcm-lora-sdv1-5"), unet)
    assert "none is downloaded" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [("a/b.safetensors", "a/b.safetensors", 1.0), ("a:0.5", "a", 0.5), ("C:/x", "C:/x", 1.0), ("a:-1", "a", -1.0)],
)
def test_the_option_names_a_file_and_its_weight(text: str, path: str, weight: float) -> None:
    assert parse_option(text) == (Path(path), weight)


@pytest.mark.parametrize("text", ["a:0", "a:nan", "a:inf", "a:1000"])
def test_a_weight_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--lora"):
        parse_option(text)
