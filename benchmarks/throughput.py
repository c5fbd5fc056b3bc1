"""Samples per second and peak memory of ``busigen generate``, each run in a process of its own.

python benchmarks/throughput.py
python benchmarks/throughput.py --counts 16 64 --batch-sizes 1 4 16 --repeat 5 --healthy normal/

Every combination of count and batch size runs ``--repeat`` times into a temporary folder; the table shows medians. A
run's wall time holds everything a user waits for: start-up, checking the bundle's hashes, loading graphs, drawing,
writing, the preview. What one further sample costs is the slope between the smallest and the largest count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "throughput.json"
PACKAGES = ("numpy", "onnxruntime-gpu", "onnxruntime", "pillow", "polars", "scipy")


@dataclass(frozen=True)
class Run:
    """One ``busigen generate``: what was asked for, wall-clock seconds, peak resident memory of the process."""

    count: int
    batch_size: int
    seconds: float
    peak_mb: float


def main() -> None:
    """Measure, print the table, write the JSON file."""
    options = parse()
    runs: list[Run] = []
    bundle = ""
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeat):
            for batch_size in options.batch_sizes:
                for count in options.counts:
                    out = Path(folder) / f"{repeat}-{batch_size}-{count}"
                    run, bundle = generate(options, count, batch_size, out)
                    runs.append(run)
                    print(f"  {run.count} samples, batch {run.batch_size}: {run.seconds:.2f} s", file=sys.stderr)
    rows = summarise(runs)
    print_table(rows)
    record = {
        "command": {
            "counts": options.counts,
            "batch_sizes": options.batch_sizes,
            "repeat": options.repeat,
            "threads": options.threads,
            "provider": options.provider,
            "backgrounds": "real" if options.healthy else "synthetic",
        },
        "bundle": bundle,
        "machine": machine(),
        "medians": rows,
        "runs": [asdict(run) for run in runs],
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.results}")


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64], help="samples per run")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], help="images per engine call")
    parser.add_argument("--repeat", type=int, default=3, help="runs per combination")
    parser.add_argument("--threads", type=int, help="compute threads; busigen's default if left out")
    parser.add_argument("--provider", default="cpu", help="cpu or cuda")
    parser.add_argument("--bundle", type=Path, help="the shipped one if left out")
    parser.add_argument("--healthy", type=Path, help="folder of healthy images; synthetic backgrounds if left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    return parser.parse_args()


def generate(options: argparse.Namespace, count: int, batch_size: int, out: Path) -> tuple[Run, str]:
    """Run one process to its end; returns its figures and the bundle's sha256."""
    command = [sys.executable, "-m", "busigen.cli", "generate", "--out", str(out)]
    command += ["--count", str(count), "--batch-size", str(batch_size), "--provider", options.provider]
    for name in ("threads", "bundle", "healthy"):
        value = getattr(options, name)
        command += [f"--{name}", str(value)] if value is not None else []
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        # wait4 gives the usage of this very child; RUSAGE_CHILDREN would give the largest of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{errors.read().decode()}")
    # Linux counts kilobytes, macOS bytes.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fingerprint = json.loads((out / "dataset.json").read_text(encoding="utf-8"))["fingerprint"]
    return Run(count, batch_size, seconds, peak / 1e6), fingerprint["bundle"]


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """Medians per combination, and per batch size what one further sample costs."""
    rows = []
    for batch_size in sorted({run.batch_size for run in runs}):
        seconds: dict[int, float] = {}
        mine: list[dict[str, Any]] = []
        for count in sorted({run.count for run in runs}):
            group = [run for run in runs if (run.count, run.batch_size) == (count, batch_size)]
            seconds[count] = statistics.median(run.seconds for run in group)
            mine.append(
                {
                    "batch_size": batch_size,
                    "count": count,
                    "seconds": round(seconds[count], 3),
                    "samples_per_second": round(count / seconds[count], 3),
                    "peak_mb": round(statistics.median(run.peak_mb for run in group), 1),
                }
            )
        low, high = min(seconds), max(seconds)
        slope = (seconds[high] - seconds[low]) / (high - low) if high > low else 0.0
        for row in mine:
            row["steady_samples_per_second"] = round(1 / slope, 3) if slope > 0 else None
        rows += mine
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the medians."""
    print(f"{'batch':>6} {'count':>6} {'seconds':>8} {'samples/s':>10} {'steady/s':>9} {'peak MB':>8}")
    for row in rows:
        steady = row["steady_samples_per_second"]
        print(
            f"{row['batch_size']:>6} {row['count']:>6} {row['seconds']:>8.2f} {row['samples_per_second']:>10.2f} "
            f"{'-' if steady is None else format(steady, '.2f'):>9} {row['peak_mb']:>8.0f}"
        )


def machine() -> dict[str, Any]:
    """What decides the figures, and nothing that says whose machine it is."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_model(),
        "cores": usable,
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def installed(name: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
