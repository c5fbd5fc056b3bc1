"""Resumable training state in safetensors and JSON: no pickle, and either the old or the new one after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from busigen.errors import InputError, IntegrityError
from busigen.foreign import open_file
from busigen.records import parse_json

META_KEY = "busigen"

MAX_WEIGHTS_BYTES = 4 << 30
"""Largest file of weights that is read; those of the largest preset take a fiftieth."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    temporary = _fresh(path)
    with temporary.open("x", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and their JSON metadata as one file, by rename."""
    temporary = _fresh(path)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {META_KEY: json.dumps(meta)})
    os.replace(temporary, path)


def load_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        IntegrityError: it is missing, no regular file, larger than ``MAX_WEIGHTS_BYTES``, or damaged.
    """
    try:
        # The library opens files by their names, and would wait for a pipe.
        open_file(path, limit=MAX_WEIGHTS_BYTES).close()
        with safe_open(path, framework="pt") as stream:
            meta = parse_json(stream.metadata()[META_KEY].encode(), "its record", nan=True)
        return load_file(path), meta
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} cannot be read: {error}.", fix="Delete it; the same command makes it again."
        ) from error


def _fresh(path: Path) -> Path:
    """The temporary name of a file, at which nothing stands: a killed run's rest, or a link that leads elsewhere."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    return temporary


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name and rename it into place, replacing what was there."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def check_finite(name: str, module: nn.Module) -> None:
    """Refuse weights that are no numbers: every image would be NaN, or refused by a gate that says nothing of why.

    Raises:
        InputError: names the component and the weight.
    """
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise InputError(
                f"{count} of {value.numel()} values of {key} in {name} are NaN or infinite.",
                fix="The training diverged: train again, with another --seed or more data.",
            )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a task trains, by name, in a fixed order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{key}.{names[index]}": value
        for index, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` took."""
    content = optimizer.state_dict()
    content["state"] = {
        index: {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(names)
        if f"optimizer.step.{name}" in tensors
    }
    optimizer.load_state_dict(content)
