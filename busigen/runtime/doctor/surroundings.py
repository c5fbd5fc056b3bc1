"""The machine: driver, cards and their memory, cores, memory, disk."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from busigen.errors import OutputError
from busigen.runtime.backend import usable_cores
from busigen.runtime.doctor.finding import Finding, State
from busigen.runtime.foresight import BYTES_PER_SAMPLE, free_space
from busigen.runtime.memory import SMALLEST
from busigen.runtime.nvidia import cards, driver_cuda
from busigen.runtime.wording import disk_size

ROW_MEMORY = 16 << 20
"""Bytes to reckon with per image of a batch. The shipped bundle's graphs take 4.3 MB on the processor (peak memory at
batches of 32 and of 8 images, ONNX Runtime 1.31); a card's libraries want room to work in beside that."""

FIXED_MEMORY = 1 << 30
"""Bytes for the graphs' weights, CUDA's context and its libraries."""

_CGROUP = Path("/sys/fs/cgroup")


def driver(cuda: str) -> Iterator[Finding]:
    """The NVIDIA driver against the CUDA version that ONNX Runtime was built for, and each card's memory.

    Args:
        cuda: that version, such as ``13.0``; empty for a build without CUDA.
    """
    runs, found = driver_cuda(), cards()
    if runs is None:
        if found:
            told = f"nvidia-smi lists {found[0].name}, but the driver's library (libcuda) cannot be loaded"
            fix = "Install the driver's libraries, or start the container with the card (--gpus all)."
            yield Finding("NVIDIA driver", State.WARNING, told, fix)
        else:
            yield Finding("NVIDIA driver", State.OFF, "none is loaded; the processor does the work")
        return
    versions = ", ".join(sorted({card.driver for card in found})) or "of unknown version"
    if cuda and runs[0] < int(cuda.partition(".")[0]):
        yield Finding(
            "NVIDIA driver",
            State.WARNING,
            f"{versions} runs CUDA {runs[0]}.{runs[1]} at most, and ONNX Runtime is built for CUDA {cuda}",
            "Update the driver: CUDA 13 needs 580 or newer.",
        )
    else:
        yield Finding("NVIDIA driver", State.OK, f"{versions}, runs CUDA up to {runs[0]}.{runs[1]}")
    if not found:
        told = "the driver is loaded, but nvidia-smi lists no card"
        yield Finding(
            "GPU", State.WARNING, told, "Look at what nvidia-smi says; in a container, start it with the card."
        )
    for number, card in enumerate(found):
        yield _card_memory(f"GPU {number}", card.name, card.memory, card.free)


def _card_memory(name: str, model: str, memory: int, free: int) -> Finding:
    if not memory:
        return Finding(name, State.OK, f"{model}; it does not tell its memory")
    batch = largest_batch(free)
    told = f"{model}, {disk_size(free)} of {disk_size(memory)} free: room for --batch-size {batch} or so"
    if batch < 16:
        fix = f"Give --batch-size {max(SMALLEST, batch)} or less, or end what holds its memory (nvidia-smi shows it)."
        return Finding(name, State.WARNING, told, fix)
    return Finding(name, State.OK, told)


def largest_batch(free: int) -> int:
    """The largest power of two, up to 1024, of images at a time that so many bytes probably hold; 0 if not even 2."""
    rows = (free - FIXED_MEMORY) // ROW_MEMORY
    return 0 if rows < SMALLEST else 1 << min(10, int(rows).bit_length() - 1)


def disk(out: Path) -> Finding:
    """Whether a dataset could be written into ``out``, and how many samples have room there."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        free = free_space(out)
        # Something in it: an empty file fits on a full disk.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(BYTES_PER_SAMPLE))
    except OutputError as error:
        return Finding("disk", State.PROBLEM, error.problem.rstrip("."), error.fix)
    except OSError as error:
        fix = "Free some space, or choose another --out."
        return Finding("disk", State.PROBLEM, f"{folder} cannot be written to: {error.strerror}", fix)
    samples = free // BYTES_PER_SAMPLE
    told = f"{disk_size(free)} free in {folder}: room for some {samples:,} samples"
    if samples < 1000:
        return Finding("disk", State.WARNING, told, "Free some space, or choose another --out.")
    return Finding("disk", State.OK, told)


def processor() -> Finding:
    """Cores that this process may use, and whether a limit on its time makes that many threads wait."""
    cores, all_cores, quota = usable_cores(), os.cpu_count() or 1, _quota()
    told = f"{cores} of {all_cores} cores, as many compute threads"
    if quota is not None and quota < cores - 0.01:
        threads = max(1, int(quota))
        return Finding(
            "processor",
            State.WARNING,
            f"{told}, but this container may use the time of {quota:g}: the threads would wait for each other",
            f"Give --threads {threads}.",
        )
    return Finding("processor", State.OK, told)


def _quota() -> float | None:
    """Cores' worth of time that the process's control group (version 2) has; ``None`` without a limit."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def memory() -> Finding | None:
    """Memory that is free, where the system tells (Linux)."""
    if sys.platform != "linux":
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit, used = (
            (_CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
        )
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    told = f"{disk_size(free)} free"
    if largest_batch(free) < 16:
        return Finding("memory", State.WARNING, told, "Give a smaller --batch-size, and one worker.")
    return Finding("memory", State.OK, told)
