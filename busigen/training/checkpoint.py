"""The checkpoint: a run's folder as training leaves it and export reads it.

::

    base/<component>/            diffusers layout: config.json + safetensors
    adapters/<stage>-<class>/    peft layout, beside the merged weights, if these are not of a base with GBs of its own
    merged/<stage>-<class>/      what is exported
    busigen.json                 recipe, split hash, latent statistics, figures, sha256 of all weights, and the base
"""

from __future__ import annotations

import hashlib
import json
import platform
import reprlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import ModelMixin
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ConfigDict, Field, Strict, model_validator

from busigen import __version__
from busigen.errors import BusigenError, InputError, IntegrityError, OutputError, UsageError
from busigen.files import replaced_folder, sha256_of
from busigen.foreign import open_file, walk
from busigen.noise_styles import are_styles
from busigen.records import Many, Number, Record, Text, Whole, checked, read_checked, read_given
from busigen.registry import (
    DEFAULT_PRESET,
    LESION_CLASSES,
    PAINTING,
    PRESETS,
    SHOWN_AT,
    SOLVER_SPREAD,
    STABLE_DIFFUSION,
    STAGES,
    Preset,
)
from busigen.runtime.backends.bundle_record import ImagesRecord, start_of
from busigen.text import printable
from busigen.training.networks.build import build, lacks_scanners, model_class, tell_scanners
from busigen.training.networks.inference import Networks
from busigen.training.recipe import LEARN_FROM_HEALED, LoraSpec, Recipe, TaskSpec, recipe_for
from busigen.training.trainer import MAX_WEIGHTS_BYTES, write_json

RECORD, SCHEMA = "busigen.json", 1
WRITABLE = "Use a folder that you may write to."
BASE, ADAPTERS, MERGED = "base", "adapters", "merged"
LATER = (
    "spectrum.",
    "decoder.outlines.",
    "decoder.scanners.",
    "scanners.",
)  # Weights that components of older versions may lack.
MAX_RECORD_BYTES = 64 << 20  # Largest file of a component's folder that is read, apart from weights.

_TRAIN = "Run 'busigen train' to its end first."
_REFIT = (
    "Delete busigen.json and done/finish.json there (for 'styles' done/prior.json as well), and give the same "
    "'busigen train' command again: what is finished is kept, and only the fit is repeated."
)


class Latents(Record):
    """Mean and deviation of every latent channel."""

    mean: Many[Number]
    std: Many[Number]


class TaskFigures(Record):
    """The figures of a finished task; held-out losses are NaN where it diverged."""

    seconds: Number
    validation: Many[tuple[Whole, Annotated[float, Strict()]]] = Field(default_factory=list)


class Lora(Record):
    """A recorded :class:`busigen.training.recipe.LoraSpec`."""

    model_config = ConfigDict(extra="forbid")

    rank: Annotated[int, Strict(), Field(ge=1, le=1 << 12)]
    alpha: Annotated[int, Strict(), Field(ge=1, le=1 << 12)]
    targets: Many[Text]


class RecipeRecord(Record):
    """What is used of a recorded recipe."""

    preset: Text
    seed: Annotated[int, Strict()]
    lora: Lora


class DataRecord(Record):
    """What is used of the record of the training data."""

    split_hash: Text | None


class Origin(Record):
    """The base that a checkpoint was trained on (:attr:`Base.identity`)."""

    split_hash: Text
    weights: Text


class Painting(Record):
    """A Stable Diffusion and how it is asked: prompts by class, sha256 of weights by file, `registry.SHOWN_AT`.

    ``source`` is that of `busigen.training.stable_diffusion.base_model.BaseModel`.
    """

    sha256: dict[Text, Text]
    licence: Text
    source: Text | None = None
    prompts: dict[Text, Text]
    context: bool
    shown_at: Annotated[int, Strict()]

    @model_validator(mode="after")
    def _complete(self) -> Painting:
        if set(self.prompts) != set(LESION_CLASSES) or not self.sha256 or self.shown_at not in SHOWN_AT:
            raise ValueError("should have a prompt of each class, the weights' sha256, and a known shown_at")
        return self


class CheckpointRecord(ImagesRecord):
    """Content of ``busigen.json``, as far as it is used."""

    weights: dict[Annotated[str, Strict(), Field(max_length=1 << 12, pattern=r"^[^/]+/[^/]+/.+$")], Text]
    preset: Text
    recipe: RecipeRecord
    data: DataRecord
    latents: Latents
    tasks: dict[Text, TaskFigures]
    device: Text
    versions: dict[Text, Text]
    base: Origin | None = None
    painting: Painting | None = None

    @model_validator(mode="after")
    def _named(self) -> CheckpointRecord:
        if (self.painting is not None) != (self.preset == STABLE_DIFFUSION):
            raise ValueError(f"'painting' does not fit the preset {self.preset}")
        return self


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise an OutputError where the block cannot write to ``out``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.", fix=WRITABLE) from error


def place_of(task: TaskSpec) -> str:
    """The folder that a task's network ends up in, relative to the checkpoint."""
    return {"adapter": f"{MERGED}/{task.name}", "painting": f"{ADAPTERS}/{task.name}"}.get(
        task.kind, f"{BASE}/{task.component}"
    )


def save_component(model: ModelMixin, folder: Path) -> None:
    """Save a component in diffusers' layout, by rename."""
    with replaced_folder(folder) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True)


def _refuse_other_sizes(component: str, path: Path, preset: Preset) -> None:
    """Refuse a ``config.json`` with other sizes than the preset's: such a network might take all memory."""
    config = read_checked(Record, path, fix=_TRAIN)
    earlier = lacks_scanners(component, config)
    with torch.random.fork_rng(devices=[]):  # Building a network must not advance the training's generator.
        sizes = json.loads(json.dumps(dict(build(component, preset).config)))
    for key, value in sizes.items():
        if key == "in_channels" and earlier:
            continue
        if not key.startswith("_") and config.get(key, value) != value:
            found = printable(reprlib.repr(config[key]))
            raise IntegrityError(f"{path} has no valid {key!r}: {found}; its preset has {value!r}.", fix=_TRAIN)


def load_component(component: str, folder: Path, preset: Preset | None = None) -> ModelMixin:
    """Load a component in evaluation mode; one of an earlier version knows no scanners, one spread or no masks.

    An InputError says that there is none, or that its weights do not fit its configuration, an IntegrityError that this
    is not the preset's.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no {component}.", fix=_TRAIN)
    if preset is not None:
        _refuse_other_sizes(component, folder / "config.json", preset)
    try:
        # diffusers opens files of the folder by name, and would wait for a pipe.
        for path in folder.iterdir():
            if not path.is_dir():
                limit = MAX_WEIGHTS_BYTES if path.suffix == ".safetensors" else MAX_RECORD_BYTES
                open_file(path, limit=limit).close()
        # Without low_cpu_mem_usage, missing weights have the values of the constructor.
        options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
        model, found = model_class(component).from_pretrained(str(folder), **options, output_loading_info=True)
    except Exception as error:  # diffusers raises anything on a bad configuration.
        raise InputError(f"{folder} cannot be loaded: {error}.", fix=_TRAIN) from error
    missing = found["missing_keys"]
    if lost := [name for name in missing if not name.startswith(LATER)]:
        raise InputError(f"{folder} cannot be loaded: it lacks the weight {lost[0]}.", fix=_TRAIN)
    if any(name.startswith("spectrum.spread") for name in missing):
        model.spectrum.assume(SOLVER_SPREAD[component])
    if lacks_scanners(component, model.config):
        tell_scanners(model)
    return model.eval()


def weight_hashes(folder: Path, below: tuple[str, ...] = (BASE, ADAPTERS, MERGED)) -> dict[str, str]:
    """The sha256 of all safetensors files in some folders of a checkpoint, by path; an InputError if unreadable."""
    places = [folder / place for place in below if (folder / place).is_dir()]
    found = {}
    for path in sorted(path for place in places for path in walk(place) if path.suffix == ".safetensors"):
        try:
            found[path.relative_to(folder).as_posix()] = sha256_of(path, limit=MAX_WEIGHTS_BYTES)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.", fix=_TRAIN) from error
    return found


def versions() -> dict[str, str]:
    """Versions of busigen, Python and the libraries that train."""
    libraries = {name: metadata.version(name) for name in ("torch", "diffusers", "peft")}
    return {"busigen": __version__, "python": platform.python_version(), **libraries}


def write_record(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write ``busigen.json``, which makes a checkpoint ready for export; removed if :func:`read_record` refuses it."""
    write_json(folder / RECORD, {"schema": SCHEMA, "weights": weight_hashes(folder), **content})
    try:
        return read_record(folder)
    except BusigenError:
        (folder / RECORD).unlink()
        raise


def read_record(folder: Path) -> dict[str, Any]:
    """Read and check ``busigen.json``.

    An InputError says that there is no finished checkpoint, or one with an unknown schema or preset, an IntegrityError
    that the record is invalid, or a weight file is missing, not recorded or changed.
    """
    path = folder / RECORD
    record, _ = read_given(path, "finished checkpoint", schemas=(SCHEMA,), fix=_TRAIN)
    known = checked(CheckpointRecord, record, path, fix=_REFIT)
    if known.preset not in PRESETS:
        raise InputError(f"{path} names preset {known.preset!r}.", fix=f"Known: {', '.join(PRESETS)}.")
    channels = PRESETS[known.preset].latent_channels
    if {len(known.latents.mean), len(known.latents.std)} != {channels}:
        raise IntegrityError(f"{path} has no valid 'latents': not one mean of each of {channels} channels.", fix=_TRAIN)
    if known.styles and not are_styles(known.styles, channels):
        wrong = f"{reprlib.repr(known.styles)} are not those of {channels} channels"
        raise IntegrityError(f"{path} has no valid 'styles': {wrong}.", fix=_REFIT)
    found, recorded = weight_hashes(folder), known.weights
    for name in sorted(set(found) | set(recorded)):
        if found.get(name) != recorded.get(name):
            state = "missing" if name not in found else "not recorded" if name not in recorded else "changed"
            raise IntegrityError(f"{folder / name} is {state} since training.", fix="Train again, or restore the file.")
    return record


def load_networks(folder: Path) -> tuple[Networks, dict[str, Any]]:
    """The networks of a finished checkpoint (autoencoder, context, prior, merged stages), and its record.

    Stages that Stable Diffusion draws are added by :func:`busigen.training.stable_diffusion.painter.with_painter`.
    """
    record = read_record(folder)
    preset = PRESETS[record["preset"]]
    denoisers = {"prior": load_component("prior", folder / BASE / "prior", preset)}
    for stage, label in product(own_stages(record["preset"]), LESION_CLASSES):
        name = f"{stage}-{label}"
        denoisers[name] = load_component(stage, folder / MERGED / name, preset)
    autoencoder, context = (load_component(name, folder / BASE / name, preset) for name in ("autoencoder", "context"))
    mean, std = (torch.tensor(record["latents"][name]) for name in ("mean", "std"))
    networks = Networks(preset, autoencoder, mean, std, context, denoisers)
    networks.scanners = [name for name, _ in record.get("scanners", [])]
    if record.get("phantoms") is not None:
        networks.start_prior(start_of(record["phantoms"]))
    return networks, record


def own_stages(preset: str) -> tuple[str, ...]:
    """The stages whose networks are the preset's own, and not a Stable Diffusion."""
    return tuple(stage for stage in STAGES if preset != STABLE_DIFFUSION or stage not in PAINTING)


ADAPTER_KINDS = ("heal", "adapter")  # What a run on a base does: heal the new images, and train adapters on them.
RETRAINABLE = (*STAGES, "prior", "decoder", "finish")  # All but the encoders, whose output the others read.
RETRAIN_RATE = 0.5  # Factor on the learning rate from a base's weights, which the full rate would undo first.


@dataclass(frozen=True)
class Base:
    """A finished checkpoint that another run builds on; ``record`` is its ``busigen.json``."""

    folder: Path
    record: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Base:
        """Read and check a checkpoint; raises what :func:`read_record` does."""
        return cls(folder, read_record(folder))

    @property
    def identity(self) -> dict[str, str]:
        """``split_hash`` of the images that the base components were trained on, and ``weights``, their hash.

        It is the sha256 of their files' hashes as sorted JSON, the same in all checkpoints that hold these components.
        """
        weights = {name: digest for name, digest in self.record["weights"].items() if name.startswith(f"{BASE}/")}
        digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        origin = self.record.get("base", self.record["data"])
        return {"split_hash": str(origin["split_hash"]), "weights": digest}

    def recipe(
        self, preset: str | None = None, *, seed: int = 0, scale: float = 1.0, retrain: Collection[str] = ()
    ) -> Recipe:
        """The part of the preset's recipe that a run on this base does, with the base's LoRA.

        Without ``retrain``, these are all adapters, which learn from all sources of the data. With it, the named
        components, of ``RETRAINABLE``, start from the base's weights at ``RETRAIN_RATE`` of the rate, and their
        adapters are trained as without a base. A UsageError refuses another preset, scale or component.
        """
        own = self.record["preset"]
        if own == STABLE_DIFFUSION:
            raise UsageError(
                f"--base {self.folder} has preset {own}, whose LoRAs are trained from a compact checkpoint.",
                fix=f"Name that, or leave --base out; --preset {own} takes the shipped bundle then.",
            )
        if preset == STABLE_DIFFUSION and own == DEFAULT_PRESET:
            if retrain:
                fix = f"Retrain it in a checkpoint of preset {own} first, and name that by --base."
                raise UsageError(f"--retrain {retrain} does not fit --preset {preset}.", fix=fix)
            return recipe_for(preset, seed=seed, scale=scale)
        if preset not in (None, own):
            raise UsageError(
                f"--preset {preset} does not fit --base {self.folder}, which has preset {own}.",
                fix="Leave --preset out, or name a base of that preset.",
            )
        for name in retrain:
            if name not in RETRAINABLE:
                raise UsageError(f"--retrain {name!r} is not possible.", fix=f"Choose from: {', '.join(RETRAINABLE)}.")
        recipe = recipe_for(own, seed=seed, scale=scale)
        lora = self.record["recipe"]["lora"]
        if retrain:
            healing = not set(LEARN_FROM_HEALED).isdisjoint(retrain)
            tasks = tuple(
                _further(task, retrain)
                for task in recipe.tasks
                if (healing if task.kind == "heal" else not {task.name, task.component}.isdisjoint(retrain))
            )
        else:
            tasks = tuple(replace(task, sources=()) for task in recipe.tasks if task.kind in ADAPTER_KINDS)
        return replace(recipe, tasks=tasks, lora=LoraSpec(**{**lora, "targets": tuple(lora["targets"])}))

    def copy(self, out: Path, recipe: Recipe) -> None:
        """Copy all components that ``recipe`` does not train to ``out``, except those that are there already.

        An OutputError says that ``out`` cannot be written, an IntegrityError that a copy is not what was recorded.
        """
        trained = {place_of(task) for task in recipe.tasks if task.kind != "heal"}
        kept = own_stages(recipe.preset)
        weights: dict[str, dict[str, str]] = {}
        for path, digest in self.record["weights"].items():
            top, name, _ = path.split("/", 2)
            if name.partition("-")[0] in STAGES and name.partition("-")[0] not in kept:
                continue
            if f"{MERGED if top == ADAPTERS else top}/{name}" not in trained:
                weights.setdefault(f"{top}/{name}", {})[path] = digest
        for place, wanted in sorted(weights.items()):
            if weight_hashes(out, (place,)) == wanted:
                continue
            try:
                with replaced_folder(out / place) as folder:
                    shutil.copytree(self.folder / place, folder, dirs_exist_ok=True)
            except OSError as error:
                raise OutputError(f"{out / place} cannot be written: {error}.", fix=WRITABLE) from error
            if weight_hashes(out, (place,)) != wanted:
                raise IntegrityError(
                    f"{out / place} is not what {self.folder / RECORD} records.", fix="Run the same command again."
                )


def _further(task: TaskSpec, retrain: Collection[str]) -> TaskSpec:
    """A task that starts from the base's weights; adapters, healing and tasks that follow a retrained one stay."""
    if task.kind in ADAPTER_KINDS or task.start == task.component or task.start in retrain:
        return task
    return replace(task, start=task.component, lr=RETRAIN_RATE * task.lr)


def with_adapter(base: ModelMixin, lora: LoraSpec, seed: int) -> PeftModel:
    """Freeze ``base`` and attach fresh adapters; a spectrum (:mod:`busigen.training.networks.variance`) is copied."""
    torch.manual_seed(seed)
    copied = ["spectrum"] if hasattr(base, "spectrum") else None
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), modules_to_save=copied)
    return get_peft_model(base.requires_grad_(False), config)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapter alone, as safetensors, without its base's path."""
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(str(folder), safe_serialization=True)


def merge(model: PeftModel) -> ModelMixin:
    """The plain network, with the adapter folded into its weights; a ValueError if adapter weights are left."""
    merged = model.merge_and_unload(safe_merge=True)
    if left := [name for name in merged.state_dict() if "lora" in name]:
        raise ValueError(f"adapter weights are left after the merge: {', '.join(left[:3])}")
    return merged
