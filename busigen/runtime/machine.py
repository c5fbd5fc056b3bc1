"""What a measurement was made on, and how much memory it took: nothing in here says whose machine it is."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from busigen.runtime.backend import usable_cores

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
    beside other work can be told from others by it.
    """
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "gpus": _gpus(),
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


def _gpus() -> list[str]:
    """Name and driver of every NVIDIA card; empty where there is none or no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
