"""Whether this machine has the memory and the disk that a Stable Diffusion takes, asked before any of it is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from busigen.errors import CapacityError, OutputError
from busigen.registry import SHOWN_AT
from busigen.runtime.backends.memory import available_memory
from busigen.runtime.execution.estimate import free_space
from busigen.runtime.storage.files import existing
from busigen.text import disk_size
from busigen.training.stable_diffusion.base_model import BaseModel

_COMPUTED, _STORED = 4, 2  # Bytes of a number as networks compute with it, and as bundles store it.
_BESIDE = 1 << 30  # Bytes of memory beside the weights, where windows are shown at the smaller side.


def require_memory(base: BaseModel, shown_at: int, device: torch.device | None = None) -> None:
    """Raise a CapacityError where the networks' weights, and what they work with, do not fit into memory.

    ``shown_at`` is the side in pixels of `registry.SHOWN_AT`, ``device`` where it is computed, by default the CPU.
    """
    weights, beside = _COMPUTED * sum(base.sizes.values()), _BESIDE * (shown_at // SHOWN_AT[0]) ** 2
    places = [("memory", available_memory(), weights + beside)]
    if device is not None and device.type == "cuda":
        places = [
            ("memory", available_memory(), weights),
            ("memory on the card", torch.cuda.mem_get_info(device)[0], weights + beside),
        ]
    for what, free, needed in places:
        if free is not None and free < needed:
            smaller = f", or --window {SHOWN_AT[0]} in training" if shown_at > SHOWN_AT[0] else ""
            raise CapacityError(
                f"{base.place} needs at least {disk_size(needed)} of {what}, and {disk_size(free)} are free.",
                fix=f"End other programs, or use a machine with more{smaller}.",
            )


def require_disk(base: BaseModel, out: Path) -> None:
    """Raise an OutputError where an export to ``out`` would fill the disk.

    Merged weights and a first version of the graphs lie in the folder for temporary files.
    """
    numbers = base.sizes["unet"] + base.sizes["vae"]
    scratch = Path(tempfile.gettempdir())
    needed = {scratch: (_COMPUTED + _STORED) * numbers, out: _STORED * numbers}
    if existing(scratch).stat().st_dev == existing(out).stat().st_dev:
        needed = {out: sum(needed.values())}
    for place, size in needed.items():
        if (free := free_space(place)) < size:
            raise OutputError(
                f"exporting writes some {disk_size(size)} to the disk of {place}, which has {disk_size(free)} free.",
                fix="Free some space, use another --out, or name another folder for temporary files by TMPDIR.",
            )
