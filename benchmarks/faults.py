"""What happens to a dataset when its runs are killed, its disk fills up, its files rot: the table of faults.

python -m benchmarks.faults [--kills 200] [--only FAULT ...]

Real processes and real files, with a source of noise in the place of a bundle, so that a run of twelve samples in six
shards takes a moment. Every dataset is continued to its end, verified, and compared byte for byte with one that nothing
happened to. A small disk is mounted for two of the faults, which needs root; the clock is faked by a library that
needs a C compiler. What cannot be tried here is told as tried 0 times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from rich.console import Console
from rich.table import Table

import busigen

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
TOLD = {
    "kill": "SIGKILL at a random instant",
    "terminate": "SIGTERM at a random instant",
    "full_disk": "disk full",
    "read_only": "folder read-only",
    "flipped": "one bit of a shard or the manifest flipped",
    "truncated": "manifest cut short",
    "together": "three processes on one folder",
    "healthy": "healthy folder changed, an image cut short or gone",
    "clock": "clock set back by a year",
}
TIMES = {
    "terminate": 10,
    "full_disk": 5,
    "read_only": 5,
    "flipped": 20,
    "truncated": 10,
    "together": 10,
    "healthy": 8,
    "clock": 2,
}
SEED = 5


def tally_of(fault: str, times: int, seed: int, folder: Path) -> dict[str, int]:
    """What a process of its own counts."""
    command = [sys.executable, "-m", "tests.runtime.faulting", fault, str(folder / str(seed)), str(times), str(seed)]
    # A session of its own, so that signals and the scheduler tell the processes apart.
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True)
    tally: dict[str, int] = json.loads(done.stdout)
    return tally


def main() -> None:
    """Try every fault, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=4, help="processes that share the kills")
    parser.add_argument("--only", nargs="+", choices=TOLD, default=list(TOLD), help="the others keep their results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    times = {"kill": options.kills, **TIMES}
    before = json.loads(options.results.read_text())["faults"] if options.results.exists() else {}
    faults = {name: before[name] for name in TOLD if name in before}
    for name in options.only:
        started = time.monotonic()
        jobs = options.jobs if name == "kill" else 1
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
            shares = [times[name] // jobs + (number < times[name] % jobs) for number in range(jobs)]
            tallies = list(pool.map(tally_of, repeat(name), shares, range(SEED, SEED + jobs), repeat(Path(folder))))
        summed = {column: sum(tally[column] for tally in tallies) for column in tallies[0]}
        faults[name] = {**summed, "seconds": round(time.monotonic() - started, 1)}
        print(name, faults[name], file=sys.stderr)
    columns = [column for column in next(iter(faults.values())) if column != "seconds"]
    table = Table("fault", *columns)
    for name, tally in faults.items():
        table.add_row(TOLD[name], *(str(tally[column]) for column in columns))
    Console(width=130).print(table)
    machine = {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "busigen": busigen.__version__,
    }
    options.results.write_text(json.dumps({"machine": machine, "seed": SEED, "faults": faults}, indent=2) + "\n")


if __name__ == "__main__":
    main()
