"""What happens to a dataset when its runs are killed, its disk fills up, its files rot: the table of faults.

python -m benchmarks.faults [--kills 200] [--only FAULT ...]
python -m benchmarks.faults --bundle default    # a few instants with the shipped bundle and the real commands

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
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

import busigen

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
MESSAGES = {
    "kill": "SIGKILL at a random instant",
    "terminate": "SIGTERM at a random instant",
    "mending": "SIGKILL at a random instant of `verify --repair`",
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
    "mending": 50,
    "full_disk": 5,
    "read_only": 5,
    "flipped": 20,
    "truncated": 10,
    "together": 10,
    "healthy": 8,
    "clock": 2,
}
BUNDLE_TIMES = {"kill": 6, "terminate": 2, "flipped": 1, "truncated": 1}
SEED = 5


def tally_of(fault: str, times: int, seed: int, folder: Path, bundle: str | None) -> dict[str, int]:
    """What a process of its own counts."""
    command = [
        sys.executable,
        "-m",
        "tests.harness.fault_injection",
        fault,
        str(folder / str(seed)),
        str(times),
        str(seed),
    ]
    command += [bundle] if bundle else []
    # A session of its own, so that signals and the scheduler tell the processes apart.
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True)
    tally: dict[str, int] = json.loads(done.stdout)
    return tally


def main() -> None:
    """Try every fault, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="200; with --bundle 6")
    parser.add_argument("--jobs", type=int, default=4, help="processes that share the kills; with --bundle 1")
    parser.add_argument(
        "--only", nargs="+", choices=MESSAGES, default=list(MESSAGES), help="the others keep their results"
    )
    parser.add_argument("--bundle", choices=["default"], help="the shipped one in the place of noise, fewer times")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    times = dict(BUNDLE_TIMES) if options.bundle else {"kill": 200, **TIMES}
    times["kill"] = options.kills or times["kill"]
    record = json.loads(options.results.read_text()) if options.results.exists() else {}
    faults = record.setdefault(f"faults_{options.bundle}_bundle" if options.bundle else "faults", {})
    record["machine"] = {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "busigen": busigen.__version__,
    }
    for name in filter(times.__contains__, options.only):
        started = time.monotonic()
        jobs = options.jobs if name == "kill" and not options.bundle else 1
        faults[name] = tried(name, times[name], jobs, options.bundle)
        faults[name]["seconds"] = round(time.monotonic() - started, 1)
        print(name, faults[name], file=sys.stderr)
        # After each, so that one that fails does not take the others with it.
        options.results.write_text(json.dumps({**record, "seed": SEED}, indent=2) + "\n")
    columns = [column for column in next(iter(faults.values())) if column != "seconds"]
    table = Table("fault", *columns)
    for name in filter(faults.__contains__, MESSAGES):
        table.add_row(MESSAGES[name], *(str(faults[name][column]) for column in columns))
    Console(width=130).print(table)


def tried(fault: str, times: int, jobs: int, bundle: str | None) -> dict[str, float]:
    """What several processes count together."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        shares = [times // jobs + (number < times % jobs) for number in range(jobs)]
        count = partial(tally_of, fault, folder=Path(folder), bundle=bundle)
        tallies = list(pool.map(count, shares, range(SEED, SEED + jobs)))
    return {column: sum(tally[column] for tally in tallies) for column in tallies[0]}


if __name__ == "__main__":
    main()
