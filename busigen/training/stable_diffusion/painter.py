"""Stages 2 and 3 by Stable Diffusion: the adapters of a checkpoint, and the networks of a base with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from busigen.errors import InputError, UsageError
from busigen.foreign import open_file, walk
from busigen.registry import LATENT_FACTOR, PAINTED_CHANNELS, PAINTING, PAINTING_STEPS, PROMPTS, SHOWN_AT
from busigen.training.checkpoint import BASE, Painting, load_component
from busigen.training.networks.inference import ADAPTERS, Networks
from busigen.training.stable_diffusion.autoencoder import GreyDecoder, GreyEncoder, TinyDecoder
from busigen.training.stable_diffusion.base_model import MAX_WEIGHTS_BYTES, BaseModel
from busigen.training.stable_diffusion.denoiser import StableDiffusionDenoiser
from busigen.training.stable_diffusion.hub import open_base
from busigen.training.stable_diffusion.lora import TEXT, UNET, Layer, Lora, parse_option, read_lora

CONDITIONS = "conditions.safetensors"  # Beside an adapter's LoRA: how it reads outline and context.
OWN, BASES = "own", "base"  # Decoders: of this checkpoint, which draws speckle from noise, and Stable Diffusion's.
_OUTLINE, _CONTEXT = "outline.weight", "context.weight"
_TRAIN = "Run 'busigen train' to its end, or take the checkpoint that it wrote as it is."


@dataclass(frozen=True)
class PaintingOptions:
    """How a checkpoint's Stable Diffusion is to draw."""

    loras: Sequence[tuple[str, Path, float]] = ()  # Further ones: a name in ``ADAPTERS``, empty for all; file, weight.
    alpha: float | None = None  # Of those that do not say theirs.
    guidance: float | None = None  # See `StableDiffusionDenoiser`.
    fresh_noise: float = 0.0  # See `busigen.training.stable_diffusion.denoiser.DdimStep`.
    decoder: str | None = None  # `OWN`, `BASES`, or the folder of a TAESD; None for the first that there is.

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        if self.guidance is not None and not 1.0 <= self.guidance <= 30.0:
            raise UsageError(f"--guidance is {self.guidance}.", fix="Give a number from 1 to 30; the paper has 7.5.")
        if not 0.0 <= self.fresh_noise <= 1.0:
            raise UsageError(f"--fresh-noise is {self.fresh_noise}.", fix="Give a share from 0 to 1.")
        if self.alpha is not None and not 0.0 < self.alpha < math.inf:
            raise UsageError(f"--lora-alpha is {self.alpha}.", fix="Give a number above 0; many LoRAs have their rank.")


def parse_prompts(given: Sequence[str]) -> dict[str, str]:
    """Prompts by class, ``CLASS=TEXT`` in place of the registry's; a UsageError for anything else."""
    prompts = dict(PROMPTS)
    for text in given:
        label, equals, prompt = text.partition("=")
        if label not in PROMPTS or not equals or not prompt.strip():
            raise UsageError(f"--prompt {text!r} names no class.", fix=f"Write {' or '.join(PROMPTS)}=TEXT.")
        prompts[label] = prompt.strip()
    return prompts


def parse_loras(given: Sequence[str]) -> list[tuple[str, Path, float]]:
    """Values of ``--lora``, ``[STAGE-CLASS=]FILE[:WEIGHT]``; a UsageError for a weight that is none."""
    found = []
    for text in given:
        where, equals, rest = text.partition("=")
        named = bool(equals) and where in ADAPTERS
        found.append((where if named else "", *parse_option(rest if named else text)))
    return found


def asked_of(
    place: str | None, config: Path | None, *, prompts: Sequence[str], context: bool, shown_at: int
) -> dict[str, Any]:
    """What :func:`busigen.training.pipeline.train` takes for Stable Diffusion, of options as a user gives them."""
    if place is None:
        fix = "Name a folder, a file or a model of the hub by --base-model (docs/sd15.md)."
        raise UsageError("--preset sd15 needs a Stable Diffusion.", fix=fix)
    if shown_at not in SHOWN_AT:
        raise UsageError(f"--window is {shown_at}.", fix=f"Choose one of: {', '.join(map(str, SHOWN_AT))}.")
    known = parse_prompts(prompts)
    base = open_base(place, config)
    for prompt in known.values():
        base.tokens(prompt)  # Refuses a prompt that is too long.
    painting = Painting(
        sha256=dict(base.sha256),
        licence=base.licence,
        source=base.source,
        prompts=known,
        context=context,
        shown_at=shown_at,
    )
    return {"base_model": base, "painting": painting}


def for_training(base: BaseModel, painted: Painting, label: str, context_dim: int) -> StableDiffusionDenoiser:
    """The base with the prompt of a class, of which outline and context can be trained; without a LoRA."""
    unet = base.unet().requires_grad_(False)
    unet.enable_gradient_checkpointing()
    prompt = base.prompt(painted.prompts[label])
    return StableDiffusionDenoiser(unet, prompt, base.alphas(), context_dim=context_dim if painted.context else None)


def save_conditions(model: StableDiffusionDenoiser, folder: Path) -> None:
    """Write how an adapter reads outline and context into its folder."""
    weights = {_OUTLINE: model.outline.weight}
    if model.context is not None:
        weights[_CONTEXT] = model.context.weight
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, folder / CONDITIONS)


def with_base(networks: Networks, base: BaseModel, shown_at: int) -> Networks:
    """The networks of a compact checkpoint, with Stable Diffusion's latents for windows."""
    return with_autoencoder(networks, base.autoencoder(), shown_at)


def with_autoencoder(networks: Networks, vae: AutoencoderKL, shown_at: int) -> Networks:
    """`with_base`, of which the autoencoder is all that is needed."""
    mean, std = torch.zeros(4), torch.full((4,), 1.0 / vae.config.scaling_factor)
    halves = {"encoder": GreyEncoder(vae), "decoder": GreyDecoder(vae)}
    return replace(
        networks,
        autoencoder=nn.ModuleDict(halves).eval().to(networks.device),
        latents_mean=mean.to(networks.device),
        latents_std=std.to(networks.device),
        steps={**networks.steps, **dict.fromkeys(PAINTING, PAINTING_STEPS)},
        shown_at=shown_at,
        prior_decoder=networks.decoder,
    )


def with_painter(
    networks: Networks, base: BaseModel, painted: Painting, checkpoint: Path, options: PaintingOptions
) -> Networks:
    """The networks of a checkpoint: `with_base`, and one Stable Diffusion with the LoRAs of all stages and classes.

    ``checkpoint`` is the folder with an adapter of each name in ``ADAPTERS``. An InputError says what is missing,
    damaged or of no use, an IntegrityError that ``base`` is not what the checkpoint was trained on.
    """
    base.refuse_other(painted.sha256, "the checkpoint")
    result = with_base(networks, base, painted.shown_at)
    result = with_decoder(result, options.decoder, checkpoint.parent)
    unet, text = base.unet(), base.text_encoder()
    further: dict[str, list[dict[str, Layer]]] = {name: [] for name in ADAPTERS}
    for where, path, weight in options.loras:
        lora = read_lora(path, unet, text_encoder=text, alpha=options.alpha)
        if where:
            lora.targets(unet)  # Refuses what does not fit, or changes nothing.
            further[where].append(_times(lora, weight))
        else:
            lora.merge(unet, weight=weight)
            lora.merge(text, TEXT, weight)
    prompts = torch.cat([base.prompt(painted.prompts[name.partition("-")[2]], text) for name in ADAPTERS])
    model = StableDiffusionDenoiser(
        unet,
        prompts,
        base.alphas(),
        context_dim=networks.preset.context_dim if painted.context else None,
        guidance=options.guidance,
        unconditional=base.prompt("", text),
        fresh_noise=options.fresh_noise,
    )
    read = {name: _adapter(checkpoint / name, unet, painted.context) for name in ADAPTERS}
    model.add_loras([_sum([lora, *further[name]]) for name, (lora, _) in read.items()])
    with torch.no_grad():
        model.outline.weight.copy_(torch.cat([conditions[_OUTLINE] for _, conditions in read.values()], dim=1))
        if model.context is not None:
            model.context.weight.copy_(torch.cat([conditions[_CONTEXT] for _, conditions in read.values()], dim=1))
    model = model.eval().requires_grad_(False)
    return replace(result, denoisers=networks.denoisers | dict.fromkeys(ADAPTERS, model))


def chosen_decoder(asked: str | None, checkpoint: Path) -> str:
    """`OWN`, `BASES` or a folder; a UsageError where the checkpoint has no decoder of its own and is asked for it."""
    there = (checkpoint / BASE / "decoder" / "config.json").is_file()
    if asked == OWN and not there:
        raise UsageError(f"{checkpoint} has no decoder of its own.", fix="Train it again, or give --decoder base.")
    return asked or (OWN if there else BASES)


def with_decoder(networks: Networks, asked: str | None, checkpoint: Path) -> Networks:
    """The networks of `with_base`, and the decoder of windows that is asked for, as in :class:`PaintingOptions`.

    An InputError says that a folder holds no TAESD; a UsageError is that of :func:`chosen_decoder`.
    """
    chosen = chosen_decoder(asked, checkpoint)
    if chosen == BASES:
        return networks
    if chosen == OWN:
        decoder: Any = load_component("decoder", checkpoint / BASE / "decoder", networks.preset)
    else:
        decoder = _tiny_decoder(Path(chosen), 1.0 / float(networks.latents_std[0]))
    halves = {"encoder": networks.autoencoder.encoder, "decoder": decoder.to(networks.device)}
    return replace(networks, autoencoder=nn.ModuleDict(halves))


def _times(lora: Lora, weight: float) -> dict[str, Layer]:
    """A LoRA's layers of the UNet, with its weight in their scale."""
    return {
        name: replace(layer, scale=weight * layer.scale) for (part, name), layer in lora.layers.items() if part == UNET
    }


def _sum(loras: Sequence[dict[str, Layer]]) -> dict[str, Layer]:
    """Several LoRAs of one adapter as one: their ranks side by side."""
    result: dict[str, Layer] = {}
    for name, layer in (item for lora in loras for item in lora.items()):
        before = result.get(name)
        if before is not None:
            up = torch.cat((before.scale * before.up, layer.scale * layer.up), dim=1)
            layer = Layer(torch.cat((before.down, layer.down)), up, 1.0)
        result[name] = layer
    return result


def _adapter(folder: Path, unet: nn.Module, context: bool) -> tuple[dict[str, Layer], Mapping[str, Tensor]]:
    """An adapter's layers, and its weights for outline and context."""
    lora, path = read_lora(folder, unet), folder / CONDITIONS
    try:
        open_file(path, limit=MAX_WEIGHTS_BYTES).close()
        conditions = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}.", fix=_TRAIN) from error
    if set(conditions) != {_OUTLINE, *([_CONTEXT] if context else [])}:
        raise InputError(f"{path} holds {', '.join(sorted(conditions))}.", fix=_TRAIN)
    return _times(lora, 1.0), conditions


def _tiny_decoder(folder: Path, scaling: float) -> TinyDecoder:
    """The decoder of a folder with a TAESD as diffusers writes it."""
    needed = ("config.json", "diffusion_pytorch_model.safetensors")
    fix = f"Name a folder with {' and '.join(needed)}, such as madebyollin/taesd has."
    for name in needed:
        if not (folder / name).is_file():
            raise InputError(f"--decoder {folder} holds no {name}.", fix=fix)
    try:
        for path in walk(folder):
            if not path.is_dir():
                open_file(path, limit=MAX_WEIGHTS_BYTES).close()
        taesd, found = AutoencoderTiny.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers raises anything on a bad configuration.
        raise InputError(f"--decoder {folder} cannot be loaded: {str(error).rstrip('.')}.", fix=fix) from error
    if found["missing_keys"]:
        problem = f"--decoder {folder} is no TAESD: it has no {min(found['missing_keys'])}."
        raise InputError(problem, fix=fix)
    read, factor = taesd.config.latent_channels, 2 ** (len(taesd.config.decoder_block_out_channels) - 1)
    if (read, factor, taesd.config.out_channels) != (PAINTED_CHANNELS, LATENT_FACTOR, 3):
        raise InputError(
            f"--decoder {folder} decodes {read} channels, enlarged {factor} times, to {taesd.config.out_channels}; "
            f"needed are {PAINTED_CHANNELS}, {LATENT_FACTOR} and 3.",
            fix=fix,
        )
    return TinyDecoder(taesd.eval(), scaling)
