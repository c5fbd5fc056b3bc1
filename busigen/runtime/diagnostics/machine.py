"""Facts of this machine and this process: processor, cards, versions, peak memory."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from busigen.runtime.backends.base import usable_cores
from busigen.runtime.backends.probe import gpus

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "polars", "scipy")
"""Distributions that decide how fast samples are made and written; named where they are installed."""

_PROCESS = Path("/proc/self")


def machine() -> dict[str, Any]:
    """Processor, cores, graphics cards, system and versions, JSON-able.

    ``load`` is the machine's load average over the last minute, ``None`` where the system does not tell: figures taken
    beside other work can be known by it.
    """
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "gpus": [f"{card.name}, {card.driver}" for card in gpus()],
        "system": platform.system(),
        "architecture": platform.machine(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def reset_peak_memory() -> None:
    """Begin to measure anew, where the system can (Linux); elsewhere the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """Most memory in bytes that the process held since the last reset; ``None`` where the system does not tell."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (_PROCESS / "status").read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if not resource:
        return None
    # Linux counts kilobytes, macOS bytes.
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
