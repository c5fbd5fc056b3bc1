"""LoRAs from elsewhere: every weight of a file has to find its layer in the base, and a merge has to change it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from busigen.errors import InputError, UsageError
from busigen.foreign import open_file
from busigen.records import Number, Record, Text, Whole, checked, parse_json, read_json
from busigen.text import counted

MAX_BYTES = 4 << 30  # A LoRA of rank 128 on all layers of Stable Diffusion 1.5 has 0.3 GB.
UNET, TEXT = "unet", "text_encoder"  # The networks that a LoRA may change.

_ADAPTER = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_KNOWN = "Known are LoRAs as peft, diffusers, kohya's scripts and the paper's code write them."
_AGAIN = "Get the file again."
_NOT_PLAIN = re.compile(r"dora_scale|lora_magnitude_vector|hada_|lokr_|\.oft_|\.ia3_")
_OTHER = "Use a LoRA for Stable Diffusion 1.x."


class AdapterConfig(Record):
    """What is used of peft's ``adapter_config.json``."""

    peft_type: Text = "LORA"
    r: Whole
    lora_alpha: Number
    alpha_pattern: dict[Text, Number] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class Layer:
    """``scale * up @ down``, of ``(outputs, rank)`` and ``(rank, inputs)``, with rows and columns for convolutions."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The product in fp32, shaped like the layer's weight."""
        down, up = self.down.float(), self.up.float()
        found = up.flatten(1) @ down.flatten(1)
        return self.scale * found.reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class Lora:
    """A LoRA of a file: ``layers`` by network and name; ``layout`` is peft, diffusers, kohya or paper."""

    path: Path
    layout: str
    layers: Mapping[tuple[str, str], Layer]

    def merge(self, network: nn.Module, part: str = UNET, weight: float = 1.0) -> int:
        """Add this LoRA times ``weight`` to the weights of a UNet or text encoder, and return the number of its layers.

        An InputError says that a layer is missing or of another shape, or nothing would change; then nothing has.
        """
        found = self.targets(network, part)
        with torch.no_grad():
            for target, layer in found:
                target.add_((weight * layer.delta().reshape(target.shape)).to(target))
        return len(found)

    def targets(self, network: nn.Module, part: str = UNET) -> list[tuple[Tensor, Layer]]:
        """The weights of a network that this LoRA changes, each with its layer; an InputError as `merge` raises it."""
        modules = dict(network.named_modules())
        found: list[tuple[Tensor, Layer]] = []
        largest = 0.0
        for (where, name), layer in self.layers.items():
            if where != part:
                continue
            target = getattr(modules.get(name), "weight", None)
            if target is None:
                raise InputError(f"{self.path} is for another base: this one has no layer {name}.", fix=_KNOWN)
            delta = layer.delta()
            if delta.numel() != target.numel():
                wanted, given = tuple(target.shape), tuple(delta.shape)
                problem = f"{self.path} is for another base: {name} has weights of {wanted} here and of {given} there."
                raise InputError(problem, fix=_OTHER)
            if not bool(torch.isfinite(delta).all()):
                raise InputError(f"{self.path} holds numbers that are not finite, in {name}.", fix=_AGAIN)
            # What all layers add together would be as large as the network.
            found.append((target, layer))
            largest = max(largest, float(delta.abs().max()))
        if found and not largest:
            raise InputError(f"{self.path} changes nothing: all that it adds is zero.", fix="Was it ever trained?")
        return found


def parse_option(text: str) -> tuple[Path, float]:
    """A value of ``--lora``, ``FILE[:WEIGHT]``, as path and weight; a UsageError for a weight that is none."""
    place, colon, number = text.rpartition(":")
    if colon and re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|nan|[-+]?inf", number, flags=re.IGNORECASE):
        weight = float(number)
        if not 0.0 < abs(weight) < 100.0:
            raise UsageError(f"--lora {text} has weight {number}.", fix="Give one between 0 and 100, such as :0.8.")
        return Path(place), weight
    return Path(text), 1.0


def read_lora(
    path: Path, network: nn.Module, *, text_encoder: nn.Module | None = None, alpha: float | None = None
) -> Lora:
    """Read a LoRA from a ``.safetensors`` file, or a folder that holds one.

    Its names are matched with the layers of the UNet ``network`` and of ``text_encoder``; without that, its part is
    left out. ``alpha`` takes the place of what the file says; a UsageError if neither says it. An InputError says that
    it is a pickle, damaged, no LoRA, of a kind that cannot be merged, or matches no layer.
    """
    file, config = files_of(path)
    try:
        open_file(file, limit=MAX_BYTES).close()
        with safe_open(file, framework="pt") as opened:
            weights, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}.", fix=_AGAIN) from error
    if odd := [name for name in weights if _NOT_PLAIN.search(name)]:
        raise InputError(f"{file} is no plain LoRA: it has {odd[0]}.", fix="Train or convert it as a LoRA.")
    layout = _layout(weights, config is not None)
    if layout is None:
        raise InputError(f"{file} is no LoRA: its first weight is {min(weights, default='missing')}.", fix=_KNOWN)
    names = {UNET: _layer_names(network)} | ({TEXT: _layer_names(text_encoder)} if text_encoder is not None else {})
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    lost: list[str] = []
    for name, value in weights.items():
        where, layer, kind = _parsed(name, layout)
        if where == TEXT and text_encoder is None:
            continue
        known = names[where].get(layer.replace(".", "_").removeprefix("text_model_"))
        if known is None or kind is None:
            lost.append(name)
            continue
        pairs.setdefault((where, known), {})[kind] = value
    if lost:
        problem = (
            f"{counted(len(lost), 'weight')} of {len(weights)} match no layer ({layout}'s names), such as {lost[0]}"
        )
        raise InputError(f"{file} is for another base: {problem}.", fix=_OTHER)
    recorded = _recorded_alphas(config, metadata or {}, file)
    layers = {}
    for (where, layer), pair in sorted(pairs.items()):
        if not {"down", "up"} <= pair.keys():
            raise InputError(f"{file} is damaged: {layer} has {' and '.join(sorted(pair))} alone.", fix=_AGAIN)
        rank = pair["down"].shape[0]
        if not rank or pair["up"].ndim < 2 or pair["up"].shape[1] != rank or pair.get("alpha", _ONE).numel() != 1:
            raise InputError(f"{file} is damaged: {layer} has ranks {rank} and {tuple(pair['up'].shape)}.", fix=_AGAIN)
        if alpha is not None:
            scale = alpha / rank
        elif "alpha" in pair:
            scale = float(pair["alpha"]) / rank
        elif recorded is not None:
            scale = _scale(recorded, layer, rank)
        else:
            raise UsageError(
                f"{file} ({layout}'s names) does not say its alpha, without which its effect is unknown.",
                fix=f"Give it by --lora-alpha; many have been trained with alpha equal to the rank, here {rank}.",
            )
        layers[where, layer] = Layer(pair["down"], pair["up"], scale)
    if not any(where == UNET for where, _ in layers):
        raise InputError(f"{file} changes no layer of the UNet.", fix=_KNOWN)
    return Lora(file, layout, layers)


def _scale(config: AdapterConfig, layer: str, rank: int) -> float:
    """Alpha over rank of a layer, by peft's configuration."""
    # Patterns are compared as names, not as the regular expressions that peft takes them for: those may take for ever.
    plain = {re.sub(r"[\\^$]", "", pattern): value for pattern, value in config.alpha_pattern.items()}
    fitting = (value for name, value in plain.items() if layer == name or layer.endswith(f".{name}"))
    return float(next(fitting, config.lora_alpha)) / (rank**0.5 if config.use_rslora else rank)


def files_of(path: Path) -> tuple[Path, Any]:
    """A path's file of weights, and peft's configuration where it lies beside it; an InputError if there is none."""
    file = path
    if not path.exists():
        raise InputError(f"there is no LoRA at {path}.", fix="Name a file or folder that is here: none is downloaded.")
    if path.is_dir():
        found = [path / name for name in (_ADAPTER, "pytorch_lora_weights.safetensors") if (path / name).is_file()]
        found += sorted(entry for entry in path.glob("*") if entry.suffix in (".bin", ".pt", ".ckpt"))
        if not found:
            raise InputError(f"{path} holds no {_ADAPTER}.", fix=_KNOWN)
        file = found[0]
    if file.suffix != ".safetensors":
        raise InputError(
            f"{file} is no .safetensors file; a pickle may run any program when it is read.",
            fix="Load it where you trust it, and save it with safetensors.torch.save_file.",
        )
    beside = file.parent / _CONFIG
    if file.name != _ADAPTER or not beside.exists():
        return file, None
    try:
        return file, read_json(beside)
    except (OSError, ValueError) as error:
        raise InputError(f"{beside} cannot be read: {error}.", fix=_AGAIN) from error


def _layout(weights: Mapping[str, Tensor], configured: bool) -> str | None:
    """Who writes such names; None where nobody does."""
    for layout, pattern in (
        ("kohya", r"lora_(unet|te)_.*\.(lora_(down|up)\.weight|alpha)"),
        ("paper", r".*\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight"),
        ("peft", r"base_model\.model\..*\.lora_[AB]\.weight"),
        ("diffusers", r"(unet|text_encoder)\..*\.lora(_[AB]|\.(down|up)|_linear_layer\.(down|up))\.weight"),
    ):
        if any(re.fullmatch(pattern, name) for name in weights):
            return layout
    return "peft" if configured and any(".lora_A." in name for name in weights) else None


_ONE = torch.ones(1)
_PAIR = re.compile(r"(.+?)\.(?:lora\.|lora_linear_layer\.)?(lora_A|lora_B|lora_down|lora_up|down|up)\.weight")
_KINDS = {"lora_A": "down", "lora_B": "up", "down": "down", "up": "up", "lora_down": "down", "lora_up": "up"}


def _parsed(name: str, layout: str) -> tuple[str, str, str | None]:
    """A weight's network, the name of its layer, and ``down``, ``up`` or ``alpha``; None for anything else."""
    where = TEXT if re.match(r"(lora_te|text_encoder|base_model\.model\.text_model)[._]", name) else UNET
    plain = re.sub(r"^(lora_unet_|lora_te_|unet\.|text_encoder\.|base_model\.model\.)", "", name)
    if layout == "paper":
        plain = re.sub(r"\.processor\.to_(q|k|v)_lora\.", r".to_\1.", plain)
        plain = re.sub(r"\.processor\.to_out_lora\.", ".to_out.0.", plain)
    if plain.endswith(".alpha"):
        return where, plain.removesuffix(".alpha"), "alpha"
    found = _PAIR.fullmatch(plain)
    return (where, found[1], _KINDS[found[2]]) if found else (where, plain, None)


def _layer_names(network: nn.Module) -> dict[str, str]:
    """The names of a network's layers, by what kohya's scripts make of them: all dots as underscores."""
    found = {
        name.replace(".", "_").removeprefix("text_model_"): name
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    # diffusers' older files name an attention's output without the position in its list.
    return {**{name.removesuffix("_0"): full for name, full in found.items() if name.endswith("to_out_0")}, **found}


def _recorded_alphas(config: Any, metadata: Mapping[str, str], file: Path) -> AdapterConfig | None:
    """What peft's configuration says, beside the file or within it as diffusers writes it."""
    if config is None and "lora_adapter_metadata" in metadata:
        try:
            flat = parse_json(metadata["lora_adapter_metadata"].encode(), file)
        except ValueError as error:
            raise InputError(f"{error}.", fix=_AGAIN) from error
        prefix = f"{UNET}."
        config = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
    if config is None:
        return None
    found: AdapterConfig = checked(AdapterConfig, config, file, fix=_AGAIN)
    if found.peft_type != "LORA" or found.use_dora:
        raise InputError(f"{file} is no plain LoRA, but {found.peft_type}{' (DoRA)' * found.use_dora}.", fix=_KNOWN)
    return found
