"""What the benchmarks of speed share: one process per measurement, in turns, medians, and what it was measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import busigen
from busigen.runtime.backends.probe import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Process:
    """One process that ran to its end.

    Attributes:
        seconds: wall clock, from start to exit.
        cpu_seconds: of all its threads and children, in the user's and the system's name.
        peak_memory: most bytes of resident memory.
        described: the JSON object that it printed last; empty if it printed none.
    """

    seconds: float
    cpu_seconds: float
    peak_memory: int
    described: dict[str, Any]


def run(command: Sequence[str]) -> Process:
    """Run a command and measure it; a failure ends the benchmark with what the command said."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        try:
            # wait4 gives the usage of this very child; RUSAGE_CHILDREN would give the largest of all children so far.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors.read().decode()[-4000:]}")
        output.seek(0)
        lines = output.read().decode().splitlines()
    described: dict[str, Any] = {}
    with contextlib.suppress(ValueError, IndexError):
        last = json.loads(lines[-1])
        described = last if isinstance(last, dict) else {}
    # Linux counts kilobytes, macOS bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Process(seconds, usage.ru_utime + usage.ru_stime, peak, described)


def in_turns(names: Sequence[str], repeat: int, measure: Callable[[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure every name ``repeat`` times, one after the other, so that other work on the machine hits all alike.

    Every round begins with another name. Each measurement gets its name, its round and the machine's load before it.
    """
    runs = []
    for turn in range(repeat):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            found = {"name": name, "round": turn, "load_before": load and round(load, 2), **measure(name, turn)}
            print("  " + ", ".join(f"{key} {_short(value)}" for key, value in found.items()), file=sys.stderr)
            runs.append(found)
    return runs


def median(runs: Iterable[Mapping[str, Any]], name: str, key: str) -> float:
    """The median of one figure over one name's runs."""
    return statistics.median(run[key] for run in runs if run["name"] == name)


def ratios(runs: Sequence[Mapping[str, Any]], name: str, reference: str, key: str) -> list[float]:
    """How many times larger ``key`` is for ``name`` than for ``reference``, round by round, ascending."""
    by_round = {(run["name"], run["round"]): run[key] for run in runs}
    rounds = sorted({run["round"] for run in runs})
    return sorted(by_round[name, turn] / by_round[reference, turn] for turn in rounds)


def about(*packages: str) -> dict[str, Any]:
    """Machine, load and versions, with those of further packages."""
    found = machine()
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][package] = importlib.metadata.version(package)
    found["versions"]["busigen"] = busigen.__version__
    return found


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; numbers to the right."""
    table = Table(*header, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    # Where no terminal says how wide it is, nothing is cut off.
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def size_of(folder: Path) -> tuple[int, int]:
    """Number of files below a folder and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
