"""A Stable Diffusion inpainting model that a user has: found, checked, hashed and loaded.

It may be a folder as diffusers writes it, in fp32 or as an fp16 variant, or one ``.safetensors`` file with the names of
the CompVis repository. Nothing is fetched for it here (see `busigen.training.stable_diffusion.hub`).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from busigen.errors import AccessError, InputError, IntegrityError, UsageError
from busigen.files import sha256_of
from busigen.foreign import open_file, read_file, walk
from busigen.records import Record, Text, Whole, checked, read_json
from busigen.registry import LATENT_FACTOR, PAINTED_CHANNELS
from busigen.text import describe

INPUT_CHANNELS = 2 * PAINTED_CHANNELS + 1  # Noisy latents, the region to paint, latents of the image without it.
MAX_WEIGHTS_BYTES = 8 << 30  # Of a file of weights; Stable Diffusion 1.5 in fp32 has 4.3 GB, with two copies 7.7.
MAX_OTHER_BYTES = 16 << 20  # Of any other file; CLIP's vocabulary has 1 MB.

LICENCE = (
    "not stated beside the files; Stable Diffusion 1.5 and its inpainting model are published under CreativeML "
    "OpenRAIL-M, whose use restrictions apply to what is derived from them"
)

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The stem of each part's file of weights, in the folder of that name."""

CONFIGURATIONS = {**{part: f"{part}/config.json" for part in WEIGHTS}, "scheduler": "scheduler/scheduler_config.json"}
CONVERT = (
    "Load it once with diffusers where you trust it, and save it with `pipeline.save_pretrained(folder, "
    "safe_serialization=True)`."
)
_NEEDED = (
    "busigen needs the inpainting variant of a Stable Diffusion 1.x: 9 input channels, noise predicted, latents of 4 "
    "channels and an eighth of the pixels."
)
_CONFIG = "Name a diffusers folder with this model's configuration and tokenizer by --base-config."
_AGAIN = "Get the model's files again."


class _UNet(Record):
    in_channels: Whole
    out_channels: Whole
    cross_attention_dim: Whole
    block_out_channels: tuple[Whole, ...]
    addition_embed_type: Text | None = None


class _Autoencoder(Record):
    latent_channels: Whole
    block_out_channels: tuple[Whole, ...]


class _TextEncoder(Record):
    hidden_size: Whole
    vocab_size: Whole = 49_408
    max_position_embeddings: Whole = 77


class _Scheduler(Record):
    prediction_type: Text = "epsilon"


class Settings(Record):
    """What is used of the configurations of a model's parts."""

    unet: _UNet
    vae: _Autoencoder
    text_encoder: _TextEncoder
    scheduler: _Scheduler


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion inpainting model."""

    place: Path  # Its folder or file.
    config: Path  # Folder in diffusers' layout with the configurations and the tokenizer.
    weights: Mapping[str, Path]  # The file of each of ``WEIGHTS``; one and the same of a single file.
    sha256: Mapping[str, str]  # Of each file of weights, by its path relative to ``place``, or its name.
    licence: str  # As the model's card states it.
    settings: Settings
    sizes: Mapping[str, int]  # Numbers that each part has.
    source: str | None = None  # Of one that was downloaded, ``NAME/MODEL@COMMIT``.

    @classmethod
    def open(cls, place: Path, config: Path | None = None) -> BaseModel:
        """Look at a diffusers folder or a ``.safetensors`` file without loading it, and hash its weights.

        A single file needs a diffusers folder ``config`` with its configuration and tokenizer. An InputError says what
        is missing, a pickle, no such model, or one that busigen cannot use.
        """
        single = place.is_file()
        if not single and not place.is_dir():
            raise InputError(f"there is no base model at {place}.", fix=_NEEDED)
        if single and place.suffix != ".safetensors":
            raise InputError(f"{place} is no .safetensors file; a pickle may run any program.", fix=CONVERT)
        if single and config is None:
            raise InputError(f"{place} is a single file, which has neither configuration nor tokenizer.", fix=_CONFIG)
        folder = config if single and config is not None else place
        settings = settings_of(folder)
        weights = dict.fromkeys(WEIGHTS, place) if single else {part: _weights_of(place, part) for part in WEIGHTS}
        sizes = {part: _size(part, file, settings, single) for part, file in weights.items()}
        _refuse_misfits(folder, weights, sizes)
        hashes = {path.name if single else path.relative_to(place).as_posix(): path for path in weights.values()}
        return cls(
            place=place,
            config=folder,
            weights=weights,
            sha256={name: sha256_of(path, limit=MAX_WEIGHTS_BYTES) for name, path in sorted(hashes.items())},
            licence=_licence(place if not single else place.parent),
            settings=settings,
            sizes=sizes,
        )

    def refuse_other(self, recorded: Mapping[str, str], what: str) -> None:
        """Raise an IntegrityError with both hashes if ``what`` was made with other weights, of ``recorded`` sha256."""
        # Hashes alone: the same weights may lie under other names.
        if sorted(recorded.values()) != sorted(self.sha256.values()):
            ours, theirs = (" and ".join(sorted(found.values())) for found in (self.sha256, recorded))
            raise IntegrityError(
                f"{self.place} has sha256 {ours}, and {what} was made with {theirs}.",
                fix="Name the model that it was made with by --base-model.",
            )

    def unet(self) -> UNet2DConditionModel:
        """The denoiser in fp32, in evaluation mode: 9 input channels, 4 output channels, which predict the noise."""
        return self._diffusers(UNet2DConditionModel, "unet")

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder in fp32, in evaluation mode: 3 channels in [-1, 1], 4 latent channels."""
        return self._diffusers(AutoencoderKL, "vae")

    def _diffusers(self, network: Any, part: str) -> Any:
        with _loading(self.weights[part]):
            if self.place.is_file():
                options = {"config": str(self.config), "subfolder": part, "local_files_only": True}
                return network.from_single_file(str(self.place), torch_dtype=torch.float32, **options).eval()
            variant = "fp16" if self.weights[part].name.endswith(".fp16.safetensors") else None
            options = {"variant": variant, "use_safetensors": True, "local_files_only": True}
            # Each weight is widened as it is read: two copies of a UNet would be 5 GB.
            return network.from_pretrained(str(self.place / part), torch_dtype=torch.float32, **options).eval()

    def text_encoder(self) -> CLIPTextModel:
        """CLIP's text encoder in fp32, in evaluation mode."""
        path = self.weights["text_encoder"]
        with _loading(path):
            config = CLIPTextConfig.from_json_file(str(self.config / "text_encoder" / "config.json"))
            model = CLIPTextModel(config)
            model.load_state_dict(_text_weights(path, set(model.state_dict())))
        return model.float().eval()

    def prompt(self, text: str, encoder: CLIPTextModel | None = None) -> Tensor:
        """What the UNet attends to for a prompt, ``float32 (1, 77, D)``; errors are those of `tokens`.

        ``encoder`` takes the place of the model's own text encoder. Guidance compares with the empty prompt.
        """
        numbers = self.tokens(text)
        with torch.no_grad():
            found: Tensor = (encoder or self.text_encoder())(numbers).last_hidden_state
        return found

    def tokens(self, text: str) -> Tensor:
        """A prompt's tokens, ``int64 (1, 77)``; a UsageError for one with more than 77."""
        length = self.settings.text_encoder.max_position_embeddings
        with _loading(self.config / "tokenizer"):
            tokenizer = CLIPTokenizer.from_pretrained(str(self.config / "tokenizer"), local_files_only=True)
        found = tokenizer(text, verbose=False).input_ids  # It warns of what is refused here.
        if len(found) > length:
            problem = f"the prompt {describe(text)} has {len(found)} tokens; at most {length} are read."
            raise UsageError(problem, fix="Shorten it.")
        return torch.tensor([found + [tokenizer.pad_token_id] * (length - len(found))])

    def alphas(self) -> Tensor:
        """Cumulative products of the noise schedule, ``float64 (1000,)``, as ``scheduler_config.json`` says it."""
        with _loading(self.config / "scheduler"):
            scheduler = DDIMScheduler.from_pretrained(str(self.config / "scheduler"), local_files_only=True)
        return scheduler.alphas_cumprod.double()


def settings_of(folder: Path) -> Settings:
    """The configurations of a model's parts; an InputError for a kind of model that cannot be used."""
    if (folder / "text_encoder_2").exists():
        raise InputError(f"{folder} is a Stable Diffusion XL, with two text encoders.", fix=_NEEDED)
    found: dict[str, Any] = {}
    try:
        for part, name in CONFIGURATIONS.items():
            found[part] = read_json(folder / name)
        for part in (*CONFIGURATIONS, "tokenizer"):
            # The libraries open what they like of these folders, and would wait for a pipe.
            for path in walk(folder / part):
                if not path.is_dir() and path.suffix != ".safetensors":
                    open_file(path, limit=MAX_OTHER_BYTES).close()
        settings = checked(Settings, found, folder, fix=_NEEDED)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no base model: {error}.", fix=_NEEDED) from error
    except IntegrityError as error:
        raise InputError(error.problem, fix=_NEEDED) from error
    unet, vae, text = settings.unet, settings.vae, settings.text_encoder
    kept = (vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1), unet.out_channels)
    wanted = (PAINTED_CHANNELS, LATENT_FACTOR, PAINTED_CHANNELS)
    prediction, width = settings.scheduler.prediction_type, unet.cross_attention_dim
    for problem, wrong in (
        ("it is a Stable Diffusion XL", unet.addition_embed_type is not None),
        (f"its UNet reads {unet.in_channels} channels", unet.in_channels != INPUT_CHANNELS),
        (f"its UNet predicts '{prediction}', not 'epsilon'", prediction != "epsilon"),
        (f"its autoencoder has {kept[0]} channels and a factor of {kept[1]}", kept != wanted),
        (f"its UNet attends to {width} numbers a token, its text gives {text.hidden_size}", width != text.hidden_size),
        (f"it is a Stable Diffusion 2, with {width} numbers a token", width == _SECOND),
    ):
        if wrong:
            raise InputError(f"{folder} cannot be a base: {problem}.", fix=_NEEDED)
    return settings


def _weights_of(folder: Path, part: str) -> Path:
    """The file of a part's weights, in fp32 where both are there."""
    stem = WEIGHTS[part]
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / part / name).exists():
            return folder / part / name
    for path in sorted((folder / part).glob("*")):
        if path.suffix in (".bin", ".ckpt", ".pt"):
            raise InputError(f"{path} is a pickle, which may run any program when it is read.", fix=CONVERT)
    raise InputError(f"{folder} is no base model: {part}/{stem}.safetensors is missing.", fix=_NEEDED)


_SECOND = 1024  # Numbers a token has in Stable Diffusion 2; in 1.x it has 768.
_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
"""What a single file puts before the names of each part."""

_NAMES = {
    "unet": ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
    "vae": ("decoder.conv_out.weight", "first_stage_model.decoder.conv_out.weight"),
    "text_encoder": (
        "text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ),
}
"""A weight of each part that tells its size, in a folder and in a single file."""


def _size(part: str, path: Path, settings: Settings, single: bool) -> int:
    """How many numbers a part has; weights that are cut short or do not fit their configuration are refused.

    All is read off the file's header.
    """
    try:
        open_file(path, limit=MAX_WEIGHTS_BYTES).close()
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}.", fix=_AGAIN) from error
    wanted = {
        "unet": (settings.unet.block_out_channels[0], INPUT_CHANNELS, 3, 3),
        "vae": (3, settings.vae.block_out_channels[0], 3, 3),
        "text_encoder": (settings.text_encoder.vocab_size, settings.text_encoder.hidden_size),
    }[part]
    name = _NAMES[part][single]
    found = shapes.get(name) or shapes.get(name.removeprefix("text_model."))
    if found is None:
        raise InputError(
            f"{path} holds no {part}: it has no {name}, but {min(shapes, default='nothing')}.", fix=_NEEDED
        )
    if found != wanted:
        problem = f"{path} is another model: {name} is {found}, not {wanted} as its configuration says."
        raise InputError(problem, fix=_NEEDED)
    return sum(math.prod(shape) for key, shape in shapes.items() if not single or key.startswith(_PREFIXES[part]))


def _refuse_misfits(config: Path, weights: Mapping[str, Path], sizes: Mapping[str, int]) -> None:
    """Raise an InputError where a part has more or fewer numbers than a network of its configuration."""
    for part, network in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        with _loading(config / part / "config.json"), torch.device("meta"):
            if part == "text_encoder":
                made = network(CLIPTextConfig.from_json_file(str(config / part / "config.json")))
            else:
                made = network.from_config(network.load_config(str(config), subfolder=part, local_files_only=True))
        wanted = sum(value.numel() for value in made.parameters())
        # Files of text encoders may also hold the numbers of positions, or what no prompt needs.
        if sizes[part] < wanted or (sizes[part] > wanted and part != "text_encoder"):
            raise InputError(
                f"{weights[part]} is another model: its {part} has {sizes[part]:,} numbers, not {wanted:,} as its "
                "configuration says.",
                fix=_NEEDED,
            )


def _text_weights(path: Path, names: set[str]) -> dict[str, Tensor]:
    """The text encoder's weights by the names that this version of transformers has."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            plain = name.removeprefix("cond_stage_model.transformer.")
            for known in (plain, plain.removeprefix("text_model."), f"text_model.{plain}"):
                if known in names:
                    found[known] = file.get_tensor(name)
    return found


def _licence(folder: Path) -> str:
    """What the front matter of a model's card says, or that it says nothing."""
    with contextlib.suppress(OSError):
        text = read_file(folder / "README.md", MAX_OTHER_BYTES).decode(errors="replace")
        if text.startswith("---") and (found := re.search(r"^license:\s*(\S[^\n]{0,100})$", text, flags=re.MULTILINE)):
            return found[1].strip()
    return LICENCE


@contextlib.contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Turn whatever the libraries stumble over in a damaged file into one line."""
    try:
        yield
    except (AccessError, InputError):
        raise
    except Exception as error:  # The libraries raise what they like.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be loaded: {describe(reason)}.", fix=_AGAIN) from error
