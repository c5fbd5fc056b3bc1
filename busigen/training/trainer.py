"""The trainer: precision and attention for a device, state files, and the loop that every task is driven by."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import Strict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from busigen.errors import InputError, IntegrityError
from busigen.files import atomic_file, atomic_path, make_folder
from busigen.foreign import open_file
from busigen.records import Many, Record, Whole, checked, parse_json

if TYPE_CHECKING:
    from busigen.training.tasks import Task

log = logging.getLogger("busigen.training")

META_KEY = "busigen"
REMAKE = "Delete it; the same command makes it again."
MAX_WEIGHTS_BYTES = 4 << 30  # Largest file of weights that is read; those of the largest preset take a fiftieth.
SAVE_SECONDS = 20.0  # Interval between saved states: a kill loses at most this much training.
VALIDATIONS = 8  # Per task, with a sample sheet each; the last one at its end.
VALIDATION_SPACING = 20  # Fewest steps between two, which on short tasks would cost more than training.


def half_is_faster(device: torch.device) -> bool:
    """Whether bf16 is faster: on GPUs, and on processors that multiply in it by tiles (AMX) or vectors."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda"


def mixed_precision(device: torch.device) -> torch.autocast:
    """The context for losses: bf16 where that is faster; weights stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half_is_faster(device))


def write_json(path: Path, content: Any) -> None:
    """Write sorted JSON, in which NaN may stand, by rename."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode())


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors with JSON metadata as one file, by rename."""
    make_folder(path.parent)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, {META_KEY: json.dumps(meta)})


def load_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_state` wrote; an IntegrityError if it is missing, damaged or too large."""
    try:
        # safetensors opens files by name, and would wait for a pipe.
        open_file(path, limit=MAX_WEIGHTS_BYTES).close()
        with safe_open(path, framework="pt") as stream:
            meta = parse_json(stream.metadata()[META_KEY].encode(), "its record", nan=True)
        return load_file(path), meta
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.", fix=REMAKE) from error


def check_finite(name: str, module: nn.Module) -> None:
    """Refuse weights that are NaN or infinite with an InputError that names component and weight."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise InputError(
                f"{count} of {value.numel()} values of {key} in {name} are NaN or infinite.",
                fix="The training diverged: train again, with another --seed or more data.",
            )


class _State(Record):
    """Metadata of a state file; held-out losses are NaN where training diverged."""

    step: Whole
    ema_step: Whole
    validation: Many[tuple[Whole, Annotated[float, Strict()]]]


class Trainer:
    """Trains one task to its last step, from its state file if there is one below ``folder``, the run's."""

    def __init__(self, task: Task, *, seed: int, folder: Path, device: torch.device, console: Console) -> None:
        self.task, self.spec, self.seed, self.device, self.console = task, task.spec, seed, device, console
        self.state_path = folder / "state" / f"{self.spec.name}.safetensors"
        self.sheets = folder / "samples" / self.spec.name
        self.events = folder / "tensorboard"
        for path in (self.state_path.parent, self.sheets, self.events):
            make_folder(path)
        if device.type == "cpu" and half_is_faster(device) and not task.fused_attention:
            # The backward pass of PyTorch's fused attention uses no tiles: a step of stage 2 took 0.41 s in place of
            # 0.31 s (one core, 32 windows). The result is the same.
            for part in task.module.modules():
                if isinstance(part, Attention):
                    part.set_processor(AttnProcessor())
        self.parameters = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
        spec = self.spec
        options: dict[str, Any] = {"lr": spec.lr, "betas": (0.9, 0.99), "weight_decay": spec.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **options)
        steps = {"num_warmup_steps": spec.warmup, "num_training_steps": spec.steps}
        self.schedule = get_scheduler(spec.schedule, self.optimizer, **steps)
        self.ema = EMAModel(self.parameters.values(), decay=self.spec.ema, use_ema_warmup=True, power=0.75)
        self.step = 0
        self.validation: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    def run(self) -> dict[str, Any]:
        """Train to the end, leave the module with the EMA weights of ``keep``, and return the task's figures."""
        self._restore()
        writer = SummaryWriter(str(self.events), purge_step=self.step or None)
        started = saved = noted = time.monotonic()
        interval = max(VALIDATION_SPACING, self.spec.steps // VALIDATIONS)
        first, running = self.step, 0.0
        title, figures = TextColumn("[bold]{task.description:18}"), TextColumn("{task.fields[note]}")
        columns = (title, BarColumn(), MofNCompleteColumn(), figures, TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task(self.spec.name, total=self.spec.steps, completed=self.step, note="")
            try:
                while self.step < self.spec.steps:
                    loss = self._train_step()
                    running = loss if not running else 0.98 * running + 0.02 * loss
                    rate = (self.step - first) / (time.monotonic() - started)
                    note = f"loss {running:.4f}  {rate:.2f} step/s"
                    progress.update(bar, completed=self.step, note=note)
                    writer.add_scalar(f"{self.spec.name}/loss", loss, self.step)
                    writer.add_scalar(f"{self.spec.name}/lr", self.schedule.get_last_lr()[0], self.step)
                    if self.step % interval == 0 or self.step == self.spec.steps:
                        self._validate(writer)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
                    if not self.console.is_terminal and time.monotonic() - noted > 20:
                        left = (self.spec.steps - self.step) / max(rate, 1e-9)
                        log.info("%s %d/%d  %s  ETA %.0f s", self.spec.name, self.step, self.spec.steps, note, left)
                        noted = time.monotonic()
            except KeyboardInterrupt:
                self._save()
                raise
        self._save()
        writer.close()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        kept = self._kept_step()
        if kept < self.step:
            log.info("%s: the weights of step %d are kept; held-out loss rose afterwards", self.spec.name, kept)
        return {"steps": self.step, "kept": kept, "validation": self.validation}

    def _kept_step(self) -> int:
        """The last step with the lowest held-out loss, after which images are learnt by heart, or the last of all."""
        if self.spec.keep == "last":
            return self.validation[-1][0]
        return min(reversed(self.validation), key=lambda entry: entry[1])[0]

    def _train_step(self) -> float:
        self.task.module.train()
        # A resumed run draws what an undisturbed one would.
        digest = hashlib.sha256(f"{self.seed}/{self.spec.name}/{self.step}".encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        with mixed_precision(self.device):
            loss = self.task.loss(generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.spec.clip)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.parameters.values())
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def _validate(self, writer: SummaryWriter) -> None:
        """Validate and draw with the EMA weights, then restore the trained ones."""
        self.task.module.eval()
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        figure = self.task.validate()
        self.task.sheet().save(self.sheets / f"{self.step:06d}.png")
        self.validation.append((self.step, figure))
        if self._kept_step() == self.step:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.ema.restore(self.parameters.values())
        writer.add_scalar(f"{self.spec.name}/validation", figure, self.step)
        log.info("%s step %d: validation %.4f", self.spec.name, self.step, figure)

    def _stored(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of the state, by kind and name, but for the optimiser's."""
        shadows = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        return {"model": dict(self.parameters), "ema": shadows, "buffer": dict(self.task.module.named_buffers())}

    def _save(self) -> None:
        names = list(self.parameters)
        parts = {**self._stored(), "best": self.best}
        tensors = {f"{kind}.{name}": tensor for kind, part in parts.items() for name, tensor in part.items()}
        # Adam's moments and step counts, by name.
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{key}.{names[index]}": value for key, value in entry.items() if isinstance(value, Tensor)
            }
        meta = {"step": self.step, "ema_step": self.ema.optimization_step, "validation": self.validation}
        save_state(self.state_path, tensors, meta)

    def _restore(self) -> None:
        if not self.state_path.exists():
            return
        tensors, found = load_state(self.state_path)
        meta = checked(_State, found, self.state_path, fix="Delete it, and give the same command again.")
        self.step, self.validation = meta.step, list(meta.validation)
        kept = {name: tensors.get(f"best.{name}") for name in self.parameters}
        self.best = {name: tensor.to(self.device) for name, tensor in kept.items() if tensor is not None}
        with torch.no_grad():
            for kind, part in self._stored().items():
                for name, tensor in part.items():
                    tensor.copy_(tensors[f"{kind}.{name}"])
        content = self.optimizer.state_dict()
        content["state"] = {
            index: {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, name in enumerate(self.parameters)
            if f"optimizer.step.{name}" in tensors
        }
        self.optimizer.load_state_dict(content)
        self.ema.optimization_step = meta.ema_step
        # The rate is a closed form of the step.
        self.schedule.last_epoch = self.step
        rates = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, base, factor in rates:
            group["lr"] = base * factor(self.step)
        log.info("%s resumes at step %d of %d", self.spec.name, self.step, self.spec.steps)
