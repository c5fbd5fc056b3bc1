"""What this machine's NVIDIA driver and cards are, without any CUDA library being installed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import dataclass

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_QUERY = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")
_PATIENCE = 20.0
"""Seconds for nvidia-smi, which may have to wake a sleeping card."""


@dataclass(frozen=True)
class Card:
    """One NVIDIA card: memory in bytes, compute capability such as ``9.0``."""

    name: str
    driver: str
    memory: int
    free: int
    capability: str


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version, major and minor, that the installed driver runs; ``None`` where there is no driver."""
    try:
        library = ctypes.CDLL(_DRIVER)
        found = ctypes.c_int(0)
        # Needs no initialisation, and therefore no card that answers.
        if library.cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return found.value // 1000, found.value % 1000 // 10


def cards() -> list[Card]:
    """The cards that nvidia-smi lists; none where there is no such program or it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [card for line in done.stdout.splitlines() if (card := _card(line)) is not None]


def _card(line: str) -> Card | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_QUERY):
        return None
    name, driver, memory, free, capability = parts
    # A card whose memory is the machine's own says "[N/A]".
    sizes = [int(text) << 20 if text.isdecimal() else 0 for text in (memory, free)]
    return Card(name, driver, sizes[0], sizes[1], capability)
