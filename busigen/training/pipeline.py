"""A recipe, run in a folder of its own, task by task, so that a killed run can be resumed."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from diffusers import ModelMixin
from rich.console import Console

from busigen.data.prepared import Prepared
from busigen.errors import InputError, UsageError
from busigen.files import TEMPORARY_PREFIX, is_temporary, make_folder, remove, replaced_folder
from busigen.phantoms.distribution import Phantoms
from busigen.records import Many, Number, read_checked
from busigen.registry import LESION_CLASSES, RESOLUTION, SPLITS, STABLE_DIFFUSION, STAGES
from busigen.runtime.backends.bundle_record import start_of
from busigen.training import checkpoint
from busigen.training.checkpoint import Base, Painting
from busigen.training.claim import claim
from busigen.training.examples import Frames, Progress, frames_of, scanners_of, select, to_tensor
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks
from busigen.training.recipe import LEARN_FROM_HEALED, Recipe, TaskSpec
from busigen.training.rollouts import Drawer, healed_reader, remove_lesion, save_healed
from busigen.training.stable_diffusion import painter
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.room import require_memory
from busigen.training.tasks import Task, TaskContext
from busigen.training.tasks.autoencoder import AutoencoderTask, ContextTask, DecoderTask, FinishTask
from busigen.training.tasks.decoder import SpeckleTask
from busigen.training.tasks.denoiser import BackgroundTask, MaskTask, PaintingTask, WindowTask
from busigen.training.trainer import Trainer, check_finite, write_json

# Deterministic kernels where there are any: a resumed run should end where an undisturbed one does.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

log = logging.getLogger("busigen.training")

# Task classes by the kind that a recipe names; an adapter has the class of its stage's base task.
KINDS: dict[str, Callable[[TaskSpec, TaskContext, Any], Task]] = {
    "autoencoder": AutoencoderTask,
    "decoder": DecoderTask,
    "context": ContextTask,
    "window": WindowTask,
    "painting": PaintingTask,
    "mask": MaskTask,
    "background": BackgroundTask,
    "finish": FinishTask,
    "speckle": SpeckleTask,
}
# Kinds of tasks, and their component, that train on backgrounds of the prior and on what these stages paint.
GENERATED_FOR: dict[tuple[str, str], Collection[str]] = {("finish", "autoencoder"): STAGES, ("adapter", "mask"): ()}
TOLD = ("window", "background", "finish")  # Kinds of tasks whose networks learn scanners by name.
HEALED, CACHE = "healed.npz", "cache"
_WRITTEN = re.compile(r"[a-z0-9.-]+")  # Names of the files and folders that a run writes.
_AGAIN = "Delete it, and give the same command again: that task is trained anew."


class _AutoencoderFigures(checkpoint.TaskFigures):
    latents: checkpoint.Latents


class _PriorFigures(checkpoint.TaskFigures):
    styles: Many[Many[Number]]


_FIGURES = {"autoencoder": _AutoencoderFigures, "prior": _PriorFigures}  # Models of the figures that later tasks read.


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device; a UsageError for other names, and without a CUDA device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}.", fix="Choose one of: auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: PyTorch sees no CUDA device.", fix="Use --device cpu, or install a CUDA build of torch."
        )
    return torch.device(name)


def train(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    base: Base | None = None,
    device: str = "auto",
    console: Console | None = None,
    base_model: BaseModel | None = None,
    painting: Painting | None = None,
) -> dict[str, Any]:
    """Run a recipe on a prepared folder, or resume the run in ``out``, which becomes the checkpoint.

    With a ``base``, the recipe is that of :meth:`Base.recipe`; ``base_model`` and ``painting`` are for Stable Diffusion
    and what it is asked, which that preset's recipe needs. Progress goes to ``console``, by default to stderr. What
    is returned is the content of ``busigen.json``. Errors are those of :func:`claim` and :meth:`Base.copy`, an
    InputError where the training split lacks a lesion class, a CapacityError where Stable Diffusion does not fit, and a
    UsageError without what the recipe needs.
    """
    if recipe.preset == STABLE_DIFFUSION and (base_model is None or painting is None):
        raise UsageError(f"--preset {recipe.preset} needs a Stable Diffusion.", fix="Name it by --base-model.")
    prepared = Prepared.open(data)
    present = set(select(prepared, "train")["class"])
    if missing := [label for label in LESION_CLASSES if label not in present]:
        raise InputError(
            f"{data} has no {missing[0]} image in its training split.", fix="Prepare more images of that class."
        )
    picked = pick_device(device)
    if base_model is not None and painting is not None:
        require_memory(base_model, painting.shown_at, picked)
    claim(out, recipe, prepared, base, painting)
    what = recipe.preset if base is None else f"{', '.join(_trained(recipe))} on the base of {base.folder}"
    splits = ", ".join(f"{name} {select(prepared, name).height}" for name in SPLITS)
    used = "" if recipe.max_images is None else f" (at most {recipe.max_images} of a split are used)"
    steps = sum(task.steps for task in recipe.tasks)
    log.info(
        "%s",
        f"training {what} on {picked}: images {splits}{used}; {len(recipe.tasks)} tasks, {steps} steps; "
        f"pictures in {out / 'samples'}, curves in {out / 'tensorboard'}",
    )
    run = _Run(prepared, out, recipe, base, picked, console or Console(stderr=True))
    run.base_model, run.painting = base_model, painting
    return run.execute()


def _trained(recipe: Recipe) -> list[str]:
    return [task.name for task in recipe.tasks if task.kind != "heal"]


class _Run:
    """A recipe in its folder: runs its tasks, and builds what each is given."""

    def __init__(
        self, prepared: Prepared, out: Path, recipe: Recipe, start: Base | None, device: torch.device, console: Console
    ) -> None:
        self.prepared, self.out, self.recipe, self.device, self.console = prepared, out, recipe, device, console
        self.start, self.base = start, out / checkpoint.BASE
        self.base_model: BaseModel | None = None
        self.painting: Painting | None = None
        self.figures: dict[str, Any] = {}

    def execute(self) -> dict[str, Any]:
        """Do every task that is not done yet, in order, then write the record."""
        if (self.out / checkpoint.RECORD).exists():
            log.info("%s is a finished checkpoint already", self.out)
            return checkpoint.read_record(self.out)
        # What killed runs left: of this version, and half components of older ones.
        for left in list(self.out.rglob(f"{TEMPORARY_PREFIX}*")):
            if is_temporary(left.name, _WRITTEN):
                remove(left)
        for place in (checkpoint.BASE, checkpoint.ADAPTERS, checkpoint.MERGED):
            for left in (self.out / place).glob("*.tmp"):
                if {path.suffix for path in left.glob("*")} in ({".json"}, {".json", ".safetensors"}, {".safetensors"}):
                    remove(left)
        if self.start is not None:
            self.start.copy(self.out, self.recipe)
        for number, spec in enumerate(self.recipe.tasks, start=1):
            marker = self.out / "done" / f"{spec.name}.json"
            make_folder(marker.parent)
            if not marker.exists():
                log.info("task %d of %d: %s", number, len(self.recipe.tasks), spec.name)
                started = time.monotonic()
                figures = self._do(spec)
                write_json(marker, {**figures, "seconds": round(time.monotonic() - started, 1)})
            self.figures[spec.name] = read_checked(
                _FIGURES.get(spec.name, checkpoint.TaskFigures), marker, fix=_AGAIN, root=self.out, nan=True
            )
        return checkpoint.write_record(self.out, self._record())

    def _of_base(self, component: str) -> Mapping[str, Any] | None:
        """The base's record, if a component comes from there."""
        return None if self.start is None or component in _trained(self.recipe) else self.start.record

    @property
    def latents(self) -> dict[str, list[float]]:
        """Mean and deviation of each latent channel."""
        return (self._of_base("autoencoder") or self.figures["autoencoder"])["latents"]

    @cached_property
    def _frames(self) -> list[list[int]]:
        """Heights and widths of the images that the prior learnt from."""
        record = self._of_base("prior")
        return frames_of(select(self.prepared, "train")) if record is None else record.get("frames", [[RESOLUTION] * 2])

    @property
    def _scanner_frames(self) -> dict[str, list[list[int]]]:
        """The same of the images of each scanner."""
        record = self._of_base("prior")
        if record is not None:
            return dict(record.get("scanner_frames", {}))
        rows = select(self.prepared, "train")
        return {name: frames_of(rows.filter(pl.col("scanner") == name)) for name, _ in self._scanners}

    @cached_property
    def _scanners(self) -> list[tuple[str, float]]:
        """The scanners that networks are told, those that a base knows first, and their shares of the images."""
        before: list[tuple[str, float]] = [] if self.start is None else self.start.record.get("scanners", [])
        # Adapters, outlines and a Stable Diffusion are not told: no network would know what is new in these images.
        if self.start is not None and not any(task.kind in TOLD for task in self.recipe.tasks):
            return [(name, share) for name, share in before]
        known = [name for name, _ in before]
        rows = select(self.prepared, "train")
        names = [*rows["scanner"]]
        return [(name, round(names.count(name) / len(names), 4)) for name in scanners_of(rows, known)]

    @property
    def _styles(self) -> list[list[float]]:
        record = self._of_base("prior")
        return self.figures["prior"]["styles"] if record is None else record.get("styles", [])

    @property
    def _phantoms(self) -> dict[str, Any] | None:
        """What backgrounds of the base's prior begin with; a prior that is trained anew begins with noise.

        So does one beside a Stable Diffusion, whose bundle has no encoder for the prior's latents.
        """
        record = None if self.recipe.preset == STABLE_DIFFUSION else self._of_base("prior")
        return None if record is None else record.get("phantoms")

    def _record(self) -> dict[str, Any]:
        known = ("split_hash", "images", "seed", "splits", "classes_and_splits")
        decoder = self._of_base("finish")
        return {
            **({} if self.start is None else {"base": self.start.identity}),
            **({} if self.painting is None else {"painting": self.painting.model_dump()}),
            "preset": self.recipe.preset,
            "recipe": self.recipe.to_dict(),
            "data": {key: self.prepared.info.get(key) for key in known},
            "latents": self.latents,
            "frames": self._frames,
            **({"scanner_frames": self._scanner_frames} if self._scanner_frames else {}),
            "styles": self._styles,
            "scanners": self._scanners,
            **({} if self._phantoms is None else {"phantoms": self._phantoms}),
            "transfer": (self.figures.get("finish", {}) if decoder is None else decoder).get("transfer"),
            "tasks": self.figures,
            "device": str(self.device),
            "versions": checkpoint.versions(),
        }

    def _do(self, spec: TaskSpec) -> dict[str, Any]:
        if spec.kind == "heal":
            return self._heal(spec)
        target = self.out / checkpoint.place_of(spec)
        if spec.kind == "painting":
            return self._paint(spec, target)
        if spec.kind == "adapter":
            base = self._loaded(spec.component)
            model = checkpoint.with_adapter(base, self.recipe.lora, self.recipe.seed)
            figures = self._train(spec, model, self.recipe.kind_of(spec.component))
            with replaced_folder(self.out / checkpoint.ADAPTERS / spec.name) as folder:
                checkpoint.save_adapter(model, folder)
            checkpoint.save_component(checkpoint.merge(model), target)
            return figures
        torch.manual_seed(self.recipe.seed)
        module = build(spec.component, self.recipe.sizes).to(self.device)
        if spec.start is not None:
            module.load_state_dict(self._loaded(spec.start).state_dict())
        figures = self._train(spec, module, spec.kind)
        checkpoint.save_component(module, target)
        if spec.component == "autoencoder":
            figures["latents"] = self._latent_statistics(module)
        return figures

    def _paint(self, spec: TaskSpec, target: Path) -> dict[str, Any]:
        """Train a LoRA of Stable Diffusion, whose own weights are not saved."""
        assert self.base_model is not None and self.painting is not None and spec.label is not None
        torch.manual_seed(self.recipe.seed)
        model = painter.for_training(self.base_model, self.painting, spec.label, self.recipe.sizes.context_dim)
        adapted = checkpoint.with_adapter(model.unet, self.recipe.lora, self.recipe.seed)
        model.unet = adapted
        figures = self._train(spec, model.to(self.device), spec.kind)
        with replaced_folder(target) as folder:
            checkpoint.save_adapter(adapted, folder)
            painter.save_conditions(model, folder)
        return figures

    def _loaded(self, component: str, folder: Path | None = None) -> ModelMixin:
        """A component of this run, or else of its base, or in ``folder``."""
        if folder is None:
            own = self.base / component
            folder = own if own.exists() or self.start is None else self.start.folder / checkpoint.BASE / component
        return checkpoint.load_component(component, folder, self.recipe.sizes).to(self.device)

    def _train(self, spec: TaskSpec, module: torch.nn.Module, kind: str) -> dict[str, Any]:
        task = KINDS[kind](spec, self._context(spec), module)
        trainer = Trainer(task, seed=self.recipe.seed, folder=self.out, device=self.device, console=self.console)
        figures = trainer.run()
        module.eval()
        # Before hours of other tasks build on what export would refuse; findings set buffers, too.
        check_finite(spec.name, module)
        with torch.no_grad():
            figures |= task.findings()
        check_finite(spec.name, module)
        return figures

    def _heal(self, spec: TaskSpec) -> dict[str, Any]:
        variants, limit = self.recipe.heal_variants, self.recipe.max_images
        rows = pl.concat([select(self.prepared, split, limit=limit) for split in ("train", "val")])
        frames = Frames(self.prepared, rows, [name for name, _ in self._scanners])
        networks = self._networks("lesion")
        progress = self._report(f"healing {len(frames)} images, {variants} times each")
        images = remove_lesion(frames, networks, variants=variants, seed=self.recipe.seed, progress=progress)
        save_healed(self.out / HEALED, rows["row"], images)
        return {"images": len(frames), "variants": variants}

    def _networks(self, *denoisers: str) -> Networks:
        loaded = {name: self._loaded(name) for name in ("autoencoder", "context", *denoisers)}
        autoencoder, context = loaded.pop("autoencoder"), loaded.pop("context")
        mean, std = (torch.tensor(self.latents[name], device=self.device) for name in ("mean", "std"))
        networks = Networks(self.recipe.sizes, autoencoder, mean, std, context, loaded)
        if self.base_model is None or self.painting is None:
            return networks
        return painter.with_base(networks, self.base_model, self.painting.shown_at)

    def _context(self, spec: TaskSpec) -> TaskContext:
        ready = self.start is not None or ("autoencoder" in self.figures and "context" in self.figures)
        networks = self._networks() if ready else None
        healed = self.out / HEALED
        drawer = None
        if (stages := GENERATED_FOR.get((spec.kind, spec.component))) is not None:
            names = {f"{stage}-{label}": stage for stage, label in product(stages, LESION_CLASSES)}
            merged = {name: self._loaded(stage, self.out / checkpoint.MERGED / name) for name, stage in names.items()}
            found = None if self._phantoms is None else Phantoms.from_json(self._phantoms)
            known = self._scanners, self._scanner_frames
            drawer = Drawer(self._networks("prior"), self._frames, self._styles, found, *known)
            drawer.networks.denoisers |= merged
            if found is not None:
                drawer.networks.start_prior(start_of(self._phantoms))
        return TaskContext(
            prepared=self.prepared,
            networks=networks,  # type: ignore[arg-type]
            device=self.device,
            seed=self.recipe.seed,
            report=self._report,
            cache=self.out / CACHE,
            max_images=self.recipe.max_images,
            healed=healed_reader(healed) if healed.exists() and spec.component in LEARN_FROM_HEALED else None,
            drawer=drawer,
            scanners=[name for name, _ in self._scanners],
        )

    @torch.no_grad()
    def _latent_statistics(self, autoencoder: ModelMixin) -> dict[str, list[float]]:
        """Mean and deviation of every latent channel over the training images' valid cells."""
        frames = Frames(self.prepared, select(self.prepared, "train"))
        rng = np.random.default_rng(self.recipe.seed)
        cells = []
        for position in rng.permutation(len(frames))[:256]:
            frame = frames[int(position)]
            latents = autoencoder.encoder(to_tensor(frame.image)[None].to(self.device))[0]
            cells.append(latents[:, torch.from_numpy(frame.valid[4::8, 4::8]).to(self.device)])
        joined = torch.cat(cells, dim=1)
        return {"mean": joined.mean(dim=1).tolist(), "std": joined.std(dim=1).clamp(min=1e-3).tolist()}

    def _report(self, what: str) -> Progress:
        """A progress callback that logs at most every ten seconds, with rate and ETA."""
        started = time.monotonic()
        spoken = [started]

        def report(done: int, total: int) -> None:
            now = time.monotonic()
            if now - spoken[0] > 10 or (done == total and now - started > 2):
                rate = done / max(now - started, 1e-9)
                log.info("%s: %d/%d, %.1f/s, ETA %.0f s", what, done, total, rate, (total - done) / max(rate, 1e-9))
                spoken[0] = now

        return report
