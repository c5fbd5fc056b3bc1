"""A Stable Diffusion inpainting model of 15 MB with random weights, in the layouts that people have the real one in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

CHANNELS = (32, 64, 64, 64)
"""Of the UNet's levels: four of them, as single files number their blocks by the real one's."""

VAE_CHANNELS = (16, 16, 32, 32)
WIDTH, TOKENS = 32, 77
"""Length of a prompt's token vectors, and their number."""

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": CHANNELS,
    "center_input_sample": False,
    "cross_attention_dim": WIDTH,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 9,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": VAE_CHANNELS,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 16,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_ENDS = ("<|startoftext|>", "<|endoftext|>")


TRUE_UNET = {**UNET, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
TRUE_VAE = {**VAE, "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}


def networks(seed: int = 0, *, true_size: bool = False) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet, autoencoder and text encoder, with random weights that let every part of the input through."""
    torch.manual_seed(seed)
    configs = (TRUE_UNET, TRUE_VAE) if true_size else (UNET, VAE)
    unet, vae = (
        cls(**{key: value for key, value in config.items() if not key.startswith("_")})
        for cls, config in zip((UNet2DConditionModel, AutoencoderKL), configs, strict=True)
    )
    text = CLIPTextModel(CLIPTextConfig(**_text_config(true_size)))
    return unet.eval(), vae.eval(), text.eval()


def write_folder(folder: Path, *, variant: str = "", seed: int = 0, true_size: bool = False) -> Path:
    """A diffusers folder as it was first published: older configurations and older names of some weights.

    Args:
        folder: to make.
        variant: "fp16" for files of that name and precision.
        seed: of the weights.
        true_size: Stable Diffusion 1.5's own sizes (2 GB in fp16), with the tiny vocabulary.
    """
    unet, vae, text = networks(seed, true_size=true_size)
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _json(folder / "model_index.json", index)
    _json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_tokenizer(folder / "tokenizer")
    end = f".{variant}.safetensors" if variant else ".safetensors"
    for name, config, weights in (
        ("unet/diffusion_pytorch_model", TRUE_UNET if true_size else UNET, unet.state_dict()),
        ("vae/diffusion_pytorch_model", TRUE_VAE if true_size else VAE, _old_attention(vae.state_dict())),
        ("text_encoder/model", _text_config(true_size), _text_weights(text)),
    ):
        _json(folder / Path(name).parent / "config.json", config)
        save_file(_stored(weights, variant), folder / f"{name}{end}", metadata={"format": "pt"})
    return folder


def write_single_file(path: Path, *, seed: int = 0) -> Path:
    """The same weights as one file, with the names of the CompVis repository."""
    unet, vae, text = networks(seed)
    weights = {f"model.diffusion_model.{_unet_name(name)}": value for name, value in unet.state_dict().items()}
    weights |= {f"first_stage_model.{_vae_name(name)}": _conv(name, value) for name, value in vae.state_dict().items()}
    weights |= {f"cond_stage_model.transformer.{name}": value for name, value in _text_weights(text).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_stored(weights, ""), path)
    return path


def _stored(weights: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    return {
        name: (value.half() if variant == "fp16" and value.is_floating_point() else value).contiguous().clone()
        for name, value in weights.items()
    }


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _text_config(true_size: bool = False) -> dict[str, Any]:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 1,
        "hidden_act": "quick_gelu",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": TOKENS,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 514,
        **(sizes if true_size else {}),
    }


def _text_weights(text: CLIPTextModel) -> dict[str, Tensor]:
    plain = {name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    plain["embeddings.position_ids"] = torch.arange(TOKENS)[None]
    return {f"text_model.{name}": value for name, value in plain.items()}


def _write_tokenizer(folder: Path) -> None:
    """Bytes alone, without merges: CLIP's tokenizer of a vocabulary of 514."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + number) for number in range(256 - len(printable))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *_ENDS]
    _json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = {"bos_token": _ENDS[0], "eos_token": _ENDS[1], "pad_token": _ENDS[1], "unk_token": _ENDS[1]}
    _json(folder / "special_tokens_map.json", tokens)
    _json(
        folder / "tokenizer_config.json",
        {**tokens, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True},
    )


_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _old_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights with the names that its attention had in 2022."""
    renamed = {}
    for name, value in weights.items():
        for new, old in _OLD_ATTENTION.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = value
    return renamed


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_name(name: str) -> str:
    """The CompVis name of a UNet's weight."""
    plain = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for new, old in plain.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, number, *inner = rest
        at = {"resnets": 2 * int(number), "attentions": 1}[kind]
        return f"middle_block.{at}.{_inner(kind, inner)}"
    level, kind, number, *inner = rest
    if part == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * int(level) + 3}.0.op.{inner[-1]}"
        return f"input_blocks.{3 * int(level) + int(number) + 1}.{int(kind == 'attentions')}.{_inner(kind, inner)}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.{1 if level == '0' else 2}.conv.{inner[-1]}"
    return f"output_blocks.{3 * int(level) + int(number)}.{int(kind == 'attentions')}.{_inner(kind, inner)}"


def _inner(kind: str, parts: list[str]) -> str:
    return ".".join([_RESNET[parts[0]], *parts[1:]] if kind == "resnets" else parts)


def _vae_name(name: str) -> str:
    """The CompVis name of an autoencoder's weight."""
    half, *rest = name.split(".")
    if half in ("quant_conv", "post_quant_conv"):
        return name
    if rest[0] == "mid_block":
        kind, number, *inner = rest[1:]
        if kind == "resnets":
            return f"{half}.mid.block_{int(number) + 1}.{_vae_inner(inner)}"
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        return f"{half}.mid.attn_1.{attention[inner[0]]}.{inner[-1]}"
    if rest[0] in ("down_blocks", "up_blocks"):
        side = rest[0].removesuffix("_blocks")
        level = int(rest[1]) if side == "down" else len(VAE_CHANNELS) - 1 - int(rest[1])
        if rest[2] == "resnets":
            return f"{half}.{side}.{level}.block.{rest[3]}.{_vae_inner(rest[4:])}"
        return f"{half}.{side}.{level}.{side}sample.conv.{rest[-1]}"
    return f"{half}." + ".".join(rest).replace("conv_norm_out", "norm_out")


def _vae_inner(parts: list[str]) -> str:
    return ".".join(parts).replace("conv_shortcut", "nin_shortcut")


def _conv(name: str, value: Tensor) -> Tensor:
    """CompVis writes the matrices of the autoencoder's attention as convolutions of one pixel."""
    return value[:, :, None, None] if ".attentions." in name and value.ndim == 2 else value
