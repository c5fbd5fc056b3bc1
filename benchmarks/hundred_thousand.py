"""The factory at 1,000, 10,000 and 100,000 samples: time, memory over time, disk, forecast against outcome, verify.

python benchmarks/hundred_thousand.py
python benchmarks/hundred_thousand.py --counts 1000 10000 --out /some/disk

``generate`` is the real one, with its default shards; its source is a null engine (``ready_made.py``), because the real
one would take about half a day on two cores for 100,000. So all that grows with the count and is not an engine's shows.
Each count runs in a process of its own, then ``busigen verify`` in another. 100,000 samples take about 4.5 GB, which
are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import RESULTS, about, run, show, size_of, write
from ready_made import ReadyMade

from busigen.registry import SHARD_SIZE
from busigen.runtime.backends.probe import peak_memory, reset_peak_memory
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.execution.estimate import Forecast
from busigen.runtime.execution.factory import generate
from busigen.runtime.progress import Progress

SEED = 7

CURVE_POINTS = 60
"""Points that are kept of a memory curve, each the largest of its stretch of time."""

SAMPLING_SECONDS = 0.05


def main() -> None:
    """Measure all counts, print the table, write the results; or be one of the measured processes."""
    options = parse()
    if options.worker:
        print(json.dumps(generated(options.counts[0], options.out)))
        return
    machine = about()
    runs = []
    for count in options.counts:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            runs.append(measure(count, Path(folder) / "dataset"))
    first, last = runs[0], runs[-1]
    show(
        "One run per count, null engine",
        ["samples", "seconds", "samples/s", "predicted s", "GB", "predicted GB", "peak MB", "verify s", "its peak MB"],
        [
            [
                f"{found['count']:,}",
                f"{found['seconds']:.1f}",
                f"{found['count'] / found['seconds']:.0f}",
                f"{found['predicted_seconds']:.1f}",
                f"{found['bytes'] / 1e9:.3f}",
                f"{found['predicted_bytes'] / 1e9:.3f}",
                f"{found['peak_memory'] / 1e6:.1f}",
                f"{found['verify']['seconds']:.1f}",
                f"{found['verify']['peak_memory'] / 1e6:.0f}",
            ]
            for found in runs
        ],
    )
    growth = {
        "peak_memory": last["peak_memory"] / first["peak_memory"] - 1,
        "seconds_per_sample": last["seconds"] / last["count"] / (first["seconds"] / first["count"]) - 1,
        "verify_seconds_per_sample": last["verify"]["seconds"] * first["count"] / last["count"]
        / first["verify"]["seconds"] - 1,
    }  # fmt: skip
    print(f"From {first['count']:,} to {last['count']:,}:")
    for name, value in growth.items():
        print(f"  {name.replace('_', ' ')} {value:+.1%}")
    record = {"command": {"counts": options.counts, "shard_size": SHARD_SIZE, "seed": SEED}}
    write(options.results, {**record, "machine": machine, "growth": growth, "runs": runs})


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000], help="samples per run")
    parser.add_argument("--out", type=Path, help="folder for what is written and removed; a temporary one if left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "hundred_thousand.json", help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(count: int, out: Path) -> dict[str, Any]:
    """Generate and verify one dataset, each in a process of its own."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    made = run([sys.executable, __file__, "--worker", "--counts", str(count), "--out", str(out)])
    print(f"  {count} generated: {made.described['seconds']:.1f} s", file=sys.stderr)
    files, size = size_of(out)
    verified = run([sys.executable, "-m", "busigen.cli", "verify", str(out)])
    print(f"  {count} verified: {verified.seconds:.1f} s", file=sys.stderr)
    return {
        "count": count,
        "load_before": load and round(load, 2),
        **made.described,
        "cpu_seconds": made.cpu_seconds,
        "files": files,
        "bytes": size,
        "verify": {
            "seconds": verified.seconds,
            "cpu_seconds": verified.cpu_seconds,
            "peak_memory": verified.peak_memory,
        },
    }


class Watched(Progress):
    """Notes the forecast and when it was made, when each shard was written, and when drawing ended."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.forecast: tuple[float, Forecast] | None = None
        self.shard_times: list[float] = []
        self.shard_bytes = 0

    def predicted(self, forecast: Forecast) -> None:
        """See :class:`busigen.runtime.progress.Progress`."""
        self.forecast = time.perf_counter() - self.began, forecast

    def shard_written(self, record: ShardRecord) -> None:
        """See :class:`busigen.runtime.progress.Progress`."""
        super().shard_written(record)
        self.shard_times.append(time.perf_counter() - self.began)
        if not self.forecast:
            self.shard_bytes += record.tar.size + record.parquet.size


def generated(count: int, out: Path) -> dict[str, Any]:
    """Generate one dataset and say what it took."""
    source, progress = ReadyMade(), Watched()
    # A first, small dataset loads what is loaded on first use; what is measured is what the count adds.
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        generate(source, Path(folder) / "first", count=SHARD_SIZE, seed=SEED)
    reset_peak_memory()
    progress.began = time.perf_counter()
    with MemoryCurve() as curve:
        generate(source, out, count=count, seed=SEED, progress=progress)
        seconds = time.perf_counter() - progress.began
    assert progress.forecast is not None
    at, forecast = progress.forecast
    tenth = max(1, len(progress.shard_times) // 10)
    return {
        "seconds": seconds,
        "finishing_seconds": seconds - progress.shard_times[-1],
        "first_tenth_seconds": progress.shard_times[tenth - 1],
        "last_tenth_seconds": progress.shard_times[-1] - progress.shard_times[-1 - tenth] if tenth > 1 else None,
        "predicted_seconds": at + forecast.seconds,
        "predicted_at": at,
        "predicted_bytes": progress.shard_bytes + forecast.space.needed,
        "forecast": asdict(forecast),
        "peak_memory": peak_memory(),
        "memory_curve": curve.points(),
    }


class MemoryCurve:
    """Resident memory over time, read by a thread of its own; empty where there is no ``/proc``."""

    def __init__(self) -> None:
        self._read: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryCurve:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def points(self) -> list[tuple[float, float]]:
        """Seconds since the start and MB, the most in each of ``CURVE_POINTS`` stretches."""
        if not self._read:
            return []
        stretch = self._read[-1][0] / CURVE_POINTS
        most: dict[int, int] = {}
        for at, held in self._read:
            number = min(int(at / stretch), CURVE_POINTS - 1)
            most[number] = max(most.get(number, 0), held)
        return [(round((number + 1) * stretch, 2), round(held / 1e6, 1)) for number, held in sorted(most.items())]

    def _watch(self) -> None:
        statm, page, began = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE"), time.perf_counter()
        while statm.exists() and not self._stop.wait(SAMPLING_SECONDS):
            held = int(statm.read_text(encoding="ascii").split()[1]) * page
            self._read.append((time.perf_counter() - began, held))


if __name__ == "__main__":
    main()
