"""`busigen convert` at 1,000 and 100,000 pairs, by format: pairs per second and peak memory.

python benchmarks/conversion.py
python benchmarks/conversion.py --counts 1000 --formats coco yolo --out /some/disk

The pairs are a null engine's (``ready_made.py``), in default shards. Each conversion is the command, in a process of
its own, whose start-up counts. 100,000 pairs take about 5 GB, and their conversion as much again; both are removed
afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, about, run, show, size_of, write
from ready_made import ReadyMade

from busigen.registry import FORMATS
from busigen.runtime.execution.factory import generate


def main() -> None:
    """Measure all formats at all counts, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--formats", nargs="+", default=[name for name, one in FORMATS.items() if not one.extra])
    parser.add_argument("--out", type=Path, help="folder for the data [default: the system's for temporary files]")
    parser.add_argument("--results", type=Path, default=RESULTS / "conversion.json")
    options = parser.parse_args()
    runs = []
    for count in options.counts:
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            generate(ReadyMade(), Path(folder) / "dataset", count=count, seed=7)
            for name in options.formats:
                runs.append(measure(Path(folder), name, count))
                print(runs[-1], file=sys.stderr)
    show(
        "busigen convert, null engine",
        ["format", "pairs", "pairs/s", "CPU ms/pair", "peak MB", "MB written"],
        [
            [
                one["format"],
                f"{one['pairs']:,}",
                f"{one['pairs'] / one['seconds']:.0f}",
                f"{one['cpu_seconds'] / one['pairs'] * 1e3:.2f}",
                f"{one['peak_memory'] / 1e6:.0f}",
                f"{one['size'] / 1e6:.0f}",
            ]
            for one in runs
        ],
    )
    write(options.results, {"machine": about(), "runs": runs})


def measure(folder: Path, name: str, count: int) -> dict[str, Any]:
    """One conversion in a process of its own, whose start-up counts; what it wrote is removed."""
    out = folder / "Dataset501_Busigen"
    started = time.perf_counter()
    command = [sys.executable, "-m", "busigen.cli", "convert", folder / "dataset", "--to", name, "--out", out]
    done = run([str(word) for word in command])
    found = {
        "format": name,
        "pairs": count,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": done.cpu_seconds,
        "peak_memory": done.peak_memory,
        "size": size_of(out)[1],
    }
    shutil.rmtree(out)
    return found


if __name__ == "__main__":
    main()
