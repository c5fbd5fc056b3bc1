"""What this machine has: processor, NVIDIA driver and cards, libraries, memory; and which providers work on it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import busigen
from busigen.errors import BusigenError
from busigen.registry import PROVIDERS, Provider
from busigen.runtime.backends.base import FALLBACK, engine_of, provider_named, usable_cores
from busigen.text import install_command

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "polars", "scipy")  # decide how fast samples are made
PROBE_SECONDS = 120.0  # for a network of one node: loading CUDA's libraries from a cold disk is slow
_QUERY_SECONDS = 20.0  # seconds for nvidia-smi, which may have to wake a sleeping card
_SHOWN = 300  # characters of what a library says that are shown
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_QUERY = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA card: memory in bytes, compute capability such as ``9.0``."""

    name: str
    driver: str
    memory: int
    free: int
    capability: str


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version, major and minor, that the installed driver runs; None where there is no driver."""
    try:
        library = ctypes.CDLL(_DRIVER)
        found = ctypes.c_int(0)
        # Needs no initialisation, and therefore no card that answers.
        if library.cuDriverGetVersion(ctypes.byref(found)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return found.value // 1000, found.value % 1000 // 10


def gpus() -> list[Gpu]:
    """The cards that nvidia-smi lists; none where there is no such program or it fails."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    cards = []
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == len(_QUERY):
            name, driver, memory, free, capability = parts
            # A card whose memory is the machine's own says "[N/A]".
            sizes = [int(text) << 20 if text.isdecimal() else 0 for text in (memory, free)]
            cards.append(Gpu(name, driver, sizes[0], sizes[1], capability))
    return cards


def machine() -> dict[str, Any]:
    """Processor, cores, cards, system, versions and, where the system tells, the load average over the last minute."""
    cpu = platform.processor() or "unknown"
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            cpu = found[1].strip()
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "gpus": [f"{card.name}, {card.driver}" for card in gpus()],
        "system": platform.system(),
        "architecture": platform.machine(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def reset_peak_memory() -> None:
    """Begin to measure anew, where the system can (Linux); elsewhere the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int | None:
    """Most memory in bytes that the process held since the last reset; None where the system does not tell."""
    with contextlib.suppress(OSError):
        text = (_PROCESS / "status").read_text(encoding="ascii")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE):
            return int(found[1]) * 1024
    if not resource:
        return None
    # Linux counts kilobytes, macOS bytes.
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Probe:
    """What came of trying a provider: whether it works, on what it ran or why not, and what would help."""

    works: bool
    described: str
    fix: str = ""


def probe(provider: Provider) -> Probe:
    """Have a provider run a network of one node."""
    if provider.gpu and driver_cuda() is None:
        where = "in a container, one that was started with the card (--gpus all)"
        return Probe(False, "no NVIDIA driver is loaded", f"It needs an NVIDIA card with its driver; {where}.")
    return tried_apart(provider, __name__)


def tried_apart(provider: Provider, module: str) -> Probe:
    """What ``python -m module PROVIDER`` answers: a library that does not fit this machine may end its process."""
    # As in this process, wherever busigen was imported from.
    package = str(Path(busigen.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, provider.name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Probe(False, f"it did not answer within {PROBE_SECONDS:.0f} s", _reinstall(provider))
    except OSError as error:
        return Probe(False, f"no process could be started: {error}", "Free memory, then try again.")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        return Probe(bool(found["works"]), str(found["told"])[:_SHOWN], str(found["fix"]))
    except (ValueError, IndexError, KeyError, TypeError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        ending = said[-1][:_SHOWN] if said else f"code {done.returncode}"
        if done.returncode < 0:
            ending = signal.Signals(-done.returncode).name
        return Probe(False, f"its libraries ended the process ({ending})", _reinstall(provider))


def answer(name: str, attempt: Callable[[Provider], str]) -> None:
    """Try the provider of that name in this process, and print what came of it as JSON for :func:`tried_apart`."""
    provider = provider_named(name)
    try:
        found = Probe(True, attempt(provider))
    except BusigenError as error:
        found = Probe(False, error.problem.rstrip("."), error.fix)
    except Exception as error:  # Whatever a broken installation raises.
        reason = (str(error).splitlines() or [""])[0]
        found = Probe(False, f"{type(error).__name__}: {reason}", _reinstall(provider))
    print(json.dumps({"works": found.works, "told": found.described, "fix": found.fix}))


def _reinstall(provider: Provider) -> str:
    again = f"Install its libraries again: {install_command(provider.extra)}."
    return again if provider.extra else "Reinstall busigen."


@dataclass(frozen=True)
class Choice:
    """The provider of a run, and why it is that one."""

    provider: str
    why: str


def choose(begun_with: str | None = None) -> Choice:
    """What ``--provider auto`` is on this machine: the last of ``registry.PROVIDERS`` that works here."""
    # A dataset goes on with the provider that it was begun with, if that is known: another would change bytes.
    if begun_with in PROVIDERS:
        return Choice(str(begun_with), "this dataset was begun with it")
    failed: dict[str, list[str]] = {}
    for provider in reversed(PROVIDERS.values()):
        # Nothing stands behind the processor's: trying it first would only take time.
        if provider.name == FALLBACK:
            break
        found = probe(provider)
        if found.works:
            return Choice(provider.name, f"it works here, on {found.described}{_but(failed)}")
        failed.setdefault(found.described, []).append(provider.name)
    return Choice(FALLBACK, f"the best that works here{_but(failed)}")


def _but(failed: Mapping[str, list[str]]) -> str:
    return "".join(f"; {', '.join(names)}: {reason}" for reason, names in failed.items())


if __name__ == "__main__":
    answer(sys.argv[1], lambda provider: engine_of(provider).probe(provider))
