"""A Stable Diffusion inpainting model that a user has: found, checked, hashed and loaded.

It may be a folder as diffusers writes it, in fp32 or as an fp16 variant, or one ``.safetensors`` file with the names of
the CompVis repository. Nothing is ever fetched for it: a model of a hub is fetched by `fetch`, which only a user calls.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from busigen.errors import AccessError, InputError, IntegrityError, UsageError
from busigen.files import sha256_of
from busigen.foreign import ForeignFileError, open_file, read_file, walk
from busigen.records import Record, Text, Whole, checked, read_json
from busigen.registry import LATENT_FACTOR
from busigen.text import describe

LATENT_CHANNELS = 4
INPUT_CHANNELS = 2 * LATENT_CHANNELS + 1
"""Noisy latents, the region to paint, and the latents of the image without it."""

MAX_WEIGHTS_BYTES = 8 << 30
"""Largest file of weights that is read; a whole Stable Diffusion 1.5 in fp32 has 4.3 GB, with two copies of it 7.7."""

MAX_OTHER_BYTES = 16 << 20  # Of any other file; CLIP's vocabulary has 1 MB.

LICENCE = (
    "not stated beside the files; Stable Diffusion 1.5 and its inpainting model are published under CreativeML "
    "OpenRAIL-M, whose use restrictions apply to what is derived from them"
)

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_CONVERT = (
    "Load it once with diffusers where you trust it, and save it with `pipeline.save_pretrained(folder, "
    "safe_serialization=True)`."
)
_NEEDED = (
    "busigen needs a Stable Diffusion 1.x inpainting model: 9 input channels, noise predicted, latents of 4 channels "
    "and an eighth of the pixels."
)
_CONFIG = (
    "Name a diffusers folder with this model's configuration and tokenizer (the weights may be missing there) by "
    "--base-config."
)
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


class UNetConfig(Record):
    """What is looked at of a UNet's ``config.json``."""

    in_channels: Whole
    out_channels: Whole
    cross_attention_dim: Whole
    layers_per_block: Whole = 2
    block_out_channels: tuple[Whole, ...]
    addition_embed_type: Text | None = None


class AutoencoderConfig(Record):
    """What is looked at of an autoencoder's ``config.json``."""

    latent_channels: Whole
    block_out_channels: tuple[Whole, ...]


class SchedulerConfig(Record):
    """What is looked at of ``scheduler_config.json``."""

    prediction_type: Text = "epsilon"


class TextConfig(Record):
    """What is looked at of a text encoder's ``config.json``."""

    hidden_size: Whole
    max_position_embeddings: Whole = 77


@dataclass(frozen=True)
class BaseModel:
    """A Stable Diffusion inpainting model.

    Attributes:
        place: its folder or file.
        config: folder in diffusers' layout with the configurations and the tokenizer.
        weights: the file of each of ``unet``, ``vae`` and ``text_encoder``; one and the same of a single file.
        sha256: of each file of weights, by its path relative to ``place`` (its name, of a single file).
        licence: as the model's card states it.
    """

    place: Path
    config: Path
    weights: Mapping[str, Path]
    sha256: Mapping[str, str]
    licence: str
    settings: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, place: Path, config: Path | None = None) -> BaseModel:
        """Look at a model without loading it: parts, sizes, headers of its files, and their hashes.

        Args:
            place: a diffusers folder or one ``.safetensors`` file.
            config: of a single file, a diffusers folder with its configuration and tokenizer.

        Raises:
            InputError: it is missing, a pickle, no such model, or one that busigen cannot use; says which and why.
        """
        single = place.is_file()
        if not single and not place.is_dir():
            raise InputError(f"there is no base model at {place}.", fix=_NEEDED)
        if single and place.suffix != ".safetensors":
            raise InputError(
                f"{place} is no .safetensors file; a pickle may run any program when it is read.", fix=_CONVERT
            )
        if single and config is None:
            raise InputError(f"{place} is a single file, which has neither configuration nor tokenizer.", fix=_CONFIG)
        folder = config if single and config is not None else place
        settings = _settings(folder)
        weights = dict.fromkeys(_WEIGHTS, place) if single else {part: _weights_of(place, part) for part in _WEIGHTS}
        for part, file in weights.items():
            _check_sizes(part, file, settings[part], single)
        hashes = {path.name if single else path.relative_to(place).as_posix(): path for path in weights.values()}
        return cls(
            place=place,
            config=folder,
            weights=weights,
            sha256={name: sha256_of(path, limit=MAX_WEIGHTS_BYTES) for name, path in sorted(hashes.items())},
            licence=_licence(place if not single else place.parent),
            settings=settings,
        )

    @property
    def single(self) -> bool:
        """Whether all weights are in one file with the names of the CompVis repository."""
        return self.place.is_file()

    @property
    def token_width(self) -> int:
        """Length of a prompt's token vectors."""
        return int(self.settings["unet"]["cross_attention_dim"])

    def refuse_other(self, recorded: Mapping[str, str], what: str) -> None:
        """Refuse this model where something was made with another.

        Args:
            recorded: ``sha256`` of that one.
            what: was made with it, for the message.

        Raises:
            IntegrityError: with both hashes.
        """
        # The same weights may lie in a folder of other names: hashes count.
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
            if self.single:
                found = network.from_single_file(
                    str(self.place), config=str(self.config), subfolder=part, local_files_only=True
                )
            else:
                variant = "fp16" if self.weights[part].name.endswith(".fp16.safetensors") else None
                found = network.from_pretrained(
                    str(self.place / part), variant=variant, use_safetensors=True, local_files_only=True
                )
        return found.float().eval()

    def text_encoder(self) -> CLIPTextModel:
        """CLIP's text encoder in fp32, in evaluation mode."""
        path = self.weights["text_encoder"]
        with _loading(path):
            config = CLIPTextConfig.from_json_file(str(self.config / "text_encoder" / "config.json"))
            model = CLIPTextModel(config)
            model.load_state_dict(_text_weights(path, set(model.state_dict())))
        return model.float().eval()

    def prompt(self, text: str, encoder: CLIPTextModel | None = None) -> Tensor:
        """What the UNet attends to for a prompt: ``float32 (1, 77, token_width)``.

        Args:
            text: the prompt; empty for none, which guidance compares with.
            encoder: in place of the model's own text encoder.

        Raises:
            UsageError: it has more tokens than the text encoder reads.
        """
        length = int(self.settings["text_encoder"].get("max_position_embeddings", 77))
        with _loading(self.config / "tokenizer"):
            tokenizer = CLIPTokenizer.from_pretrained(str(self.config / "tokenizer"), local_files_only=True)
        found = tokenizer(text).input_ids
        if len(found) > length:
            raise UsageError(
                f"the prompt {describe(text)} has {len(found)} tokens; at most {length} are read.", fix="Shorten it."
            )
        numbers = torch.tensor([found + [tokenizer.pad_token_id] * (length - len(found))])
        with torch.no_grad():
            tokens: Tensor = (encoder or self.text_encoder())(numbers).last_hidden_state
        return tokens

    def alphas(self) -> Tensor:
        """Cumulative products of the noise schedule, ``float64 (1000,)``, as ``scheduler_config.json`` says it."""
        with _loading(self.config / "scheduler"):
            scheduler = DDIMScheduler.from_pretrained(str(self.config / "scheduler"), local_files_only=True)
        return scheduler.alphas_cumprod.double()


def fetch(name: str, revision: str | None, folder: Path) -> Path:
    """Fetch a model from the Hugging Face hub; nothing else in busigen asks a server.

    Args:
        name: ``owner/name``.
        revision: a commit, branch or tag.
        folder: where the files are kept, so that they are fetched once.

    Raises:
        UsageError: it is no such name, or no revision is given.
        InputError: it cannot be fetched.
    """
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"{name} is neither a folder nor a file, nor a model of a hub (owner/name).", fix=_NEEDED)
    if not revision:
        raise UsageError(
            f"{name} is a model of a hub, of which no revision is given.",
            fix="Name its commit by --base-revision, so that what is fetched is the same tomorrow.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    parts = [
        *(f"{part}/*.safetensors" for part in _WEIGHTS),
        "*/*.json",
        "tokenizer/*",
        "model_index.json",
        "README.md",
    ]
    try:
        return Path(snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=parts))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise InputError(
            f"{name} cannot be fetched at revision {revision}: {str(error).splitlines()[0]}.",
            fix="Check the name and the connection, or name a folder with the model's files.",
        ) from error


def _settings(folder: Path) -> dict[str, Any]:
    """The configurations of a model's parts, after they have been found to be of a kind that can be used."""
    files = {part: f"{part}/config.json" for part in _WEIGHTS} | {"scheduler": "scheduler/scheduler_config.json"}
    models: dict[str, type[Record]] = {
        "unet": UNetConfig,
        "vae": AutoencoderConfig,
        "text_encoder": TextConfig,
        "scheduler": SchedulerConfig,
    }
    found: dict[str, Any] = {}
    for part, name in files.items():
        try:
            found[part] = read_json(folder / name)
        except AccessError:
            raise
        except (OSError, ValueError) as error:
            xl = " It is a Stable Diffusion XL." if (folder / "text_encoder_2").is_dir() else ""
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{folder} is no base model: {name}: {reason}.{xl}", fix=_NEEDED) from error
    if (folder / "text_encoder_2").exists() or found["unet"].get("addition_embed_type"):
        raise InputError(f"{folder} is a Stable Diffusion XL, with two text encoders.", fix=_NEEDED)
    for part, model in models.items():
        try:
            checked(model, found[part], folder / files[part], fix=_NEEDED)
        except IntegrityError as error:
            raise InputError(error.problem, fix=_NEEDED) from error
    for part in (*files, "tokenizer"):
        # The libraries open what they like of these folders, and would wait for a pipe.
        for path in walk(folder / part) if (folder / part).is_dir() else ():
            if not path.is_dir() and path.suffix != ".safetensors":
                try:
                    open_file(path, limit=MAX_OTHER_BYTES).close()
                except ForeignFileError as error:
                    raise InputError(f"{folder} is no base model: {error}.", fix=_NEEDED) from error
    unet, vae, text = found["unet"], found["vae"], found["text_encoder"]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    prediction = found["scheduler"].get("prediction_type", "epsilon")
    kept = (vae["latent_channels"], factor, unet["out_channels"])
    for problem, right in (
        (f"its UNet reads {unet['in_channels']} channels", unet["in_channels"] == INPUT_CHANNELS),
        (f"its UNet predicts '{prediction}', not 'epsilon'", prediction == "epsilon"),
        (f"its autoencoder has {kept[0]} channels and a factor of {kept[1]}", kept == (4, LATENT_FACTOR, 4)),
        (
            f"its UNet attends to {unet['cross_attention_dim']} numbers a token, its text gives {text['hidden_size']}",
            unet["cross_attention_dim"] == text["hidden_size"],
        ),
    ):
        if not right:
            raise InputError(f"{folder} cannot be a base: {problem}.", fix=_NEEDED)
    return found


def _weights_of(folder: Path, part: str) -> Path:
    """The file of a part's weights, in fp32 where both are there."""
    stem = _WEIGHTS[part]
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / part / name).exists():
            return folder / part / name
    pickles = sorted(path.name for path in (folder / part).glob("*") if path.suffix in (".bin", ".ckpt", ".pt"))
    if pickles:
        raise InputError(
            f"{folder / part / pickles[0]} is a pickle, which may run any program when it is read.", fix=_CONVERT
        )
    raise InputError(f"{folder} is no base model: {part}/{stem}.safetensors is missing.", fix=_NEEDED)


def _check_sizes(part: str, path: Path, config: Mapping[str, Any], single: bool) -> None:
    """Refuse weights that are cut short, or of another network than their configuration says.

    Shapes come from the file's header alone: nothing of its size is read.
    """
    try:
        open_file(path, limit=MAX_WEIGHTS_BYTES).close()
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}.", fix="Get the file again.") from error
    ends = {
        "unet": ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"),
        "vae": ("decoder.conv_out.weight", "first_stage_model.decoder.conv_out.weight"),
        "text_encoder": (
            "text_model.embeddings.token_embedding.weight",
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        ),
    }[part]
    wanted = {
        "unet": lambda: (config["block_out_channels"][0], INPUT_CHANNELS, 3, 3),
        "vae": lambda: (3, config["block_out_channels"][0], 3, 3),
        "text_encoder": lambda: (config.get("vocab_size", 49408), config["hidden_size"]),
    }[part]()
    name = ends[single]
    found = shapes.get(name) or shapes.get(name.removeprefix("text_model."))
    if found is None:
        first = next(iter(sorted(shapes)), "nothing")
        raise InputError(f"{path} holds no {part}: it has no {name}, but {first}.", fix=_NEEDED)
    if found != wanted:
        raise InputError(
            f"{path} is another model: {name} is {found}, not {wanted} as its configuration says.", fix=_NEEDED
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
        raise InputError(f"{path} cannot be loaded: {describe(reason)}.", fix="Get the model's files again.") from error
