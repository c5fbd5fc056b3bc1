"""Memory that opening a bundle's graphs on the processor takes, and memory that there is."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from busigen.errors import CapacityError
from busigen.runtime.backends.bundle import Bundle
from busigen.text import disk_size

LARGE = 10**9  # bytes from which on it is said what opening takes, and looked whether it is there
_FP32_OF_FP16 = 2.2  # bytes in memory per byte of weights: stored in fp16 and computed in fp32, and a tenth beside that

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/proc/self/cgroup")
_HIERARCHY = Path("/sys/fs/cgroup")
_log = logging.getLogger(__name__)


def memory_of(bundle: Bundle) -> int:
    """Bytes that a process takes for a bundle's graphs on the processor: those recorded, else reckoned from the files.

    Every graph file is opened by itself, with numbers of its own for the weights that others read, too.
    """
    if (recorded := bundle.info.get("memory")) is not None:
        return int(recorded)
    graphs = [bundle.info["graphs"][name] for name in bundle.distinct_graphs]
    weights = [file for graph in graphs for file in graph["files"] if file != graph["file"]]
    with contextlib.suppress(OSError):  # A file that is missing is named by who opens it.
        sizes = [int((bundle.folder / file).stat().st_size) for file in weights]
        return round(_FP32_OF_FP16 * sum(sizes))
    return 0


def require_memory(bundle: Bundle, processes: int = 1) -> None:
    """Log what so many processes that open a bundle take, if it is much; a CapacityError if there is less."""
    if (needed := processes * memory_of(bundle)) <= LARGE:
        return
    each = f" in {processes} processes" if processes > 1 else ""
    available = available_memory()
    if available is not None and needed > available:
        raise CapacityError(
            f"opening the graphs of {bundle.folder}{each} takes about {disk_size(needed)} of memory, and "
            f"{disk_size(available)} are available.",
            fix="End what else uses memory, give fewer --workers, or use a machine with more memory.",
        )
    there = "" if available is None else f"; {disk_size(available)} are available"
    _log.info("opening the graphs%s takes about %s of memory%s", each, disk_size(needed), there)


def available_memory() -> int | None:
    """Bytes that this process can still get, within the limits of its control groups; None where nothing tells."""
    with contextlib.suppress(OSError, ValueError):
        if found := re.search(r"^MemAvailable:\s*(\d+) kB$", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE):
            return max(0, min([int(found[1]) * 1024, *_left_in_groups()]))
    return None


def _left_in_groups() -> Iterator[int]:
    """What each control group that this process is in leaves it: version 2, and the memory groups of version 1."""
    with contextlib.suppress(OSError):
        for line in _CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root, names = _HIERARCHY, ("memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                root, names = _HIERARCHY / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                continue
            # Any group above may have the tighter limit. In a container, the path may be one that only the host sees.
            inner = root / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(root) and (left := _left_in(folder, *names)) is not None:
                    yield left


def _left_in(group: Path, limit: str, used: str, prefix: str) -> int | None:
    """A group's limit less what it uses; None without a limit."""
    try:
        most, taken = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
        stat = (group / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):  # "max", or no group of memory.
        return None
    # Files that were read are counted, too, and give way.
    files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
    return most - taken + sum(map(int, files))
