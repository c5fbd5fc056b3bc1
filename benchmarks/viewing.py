"""`busigen view` at 100,000 pairs in a real browser: time to the first grid, to filter, to the last pair; memory.

python -m benchmarks.viewing
python -m benchmarks.viewing --dataset /some/disk/data

Without ``--dataset``, one of the null engine (``ready_made.py``) is made and removed again; 100,000 pairs take 4.7 GB
and two minutes. A step ends when every picture in view is there. It needs Linux and Chromium.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measuring import RESULTS, about, show, write
from ready_made import ReadyMade

from busigen.runtime.execution.factory import generate
from tests.harness.browser import browser, missing

_IN_VIEW = """() => {
  const pictures = [...document.querySelectorAll('SELECTOR')].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.top < innerHeight && box.bottom > 0;
  });
  const status = document.getElementById('status').textContent;
  return TEXT.test(status) && pictures.length > 0 && pictures.every((one) => one.complete && one.naturalWidth);
}"""


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="one of the null engine that is there already")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "viewing.json")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    machine = about("playwright")
    with tempfile.TemporaryDirectory() as folder:
        dataset = options.dataset or Path(folder) / "data"
        if options.dataset is None:
            generate(ReadyMade(), dataset, count=options.count, seed=7, shard_size=100)
        runs = [measured(dataset, options.count, Path(folder) / f"profile{turn}") for turn in range(options.repeat)]
    medians = {
        name: [sorted(run[name][n] for run in runs)[len(runs) // 2] for n in (0, 1)]
        for name in runs[0]
        if name != _MEMORY
    }
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in medians.items()]
    show(
        f"{options.count:,} pairs, medians of {len(runs)} runs", ["", "seconds", "the server's, of the processor"], rows
    )
    peak = max(run[_MEMORY][0] for run in runs)
    print(f"memory of the server, most: {peak / 1e6:.0f} MB")
    write(options.results, {"machine": machine, "count": options.count, "runs": runs})


_MEMORY = "memory"


def measured(dataset: Path, count: int, profile: Path) -> dict[str, tuple[float, float]]:
    """Seconds of each step, and of the server's processor time in it, of one run with a browser of its own."""
    last = -(-count // 60)
    steps = [
        ("the first grid", "", f"^{count:,} pairs, 1 to ", "#grid img"),
        ("filter by class and size", "where=class%3Dmalignant&where=area_share%3E0.05", " pairs of ", "#grid img"),
        (
            "sort half of them by size",
            "where=class%3Dmalignant&sort=area_share&down=1",
            f"^{count // 2:,} ",
            "#grid img",
        ),
        ("sort all by a hash", "sort=image_sha256", f"^{count:,} pairs, 1 to ", "#grid img"),
        ("the last page", f"page={last}", f"to {count:,} shown", "#grid img"),
        ("the last pair", f"page={last}&pair={count - 1:09d}", ".", "#pictures img"),
    ]
    found: dict[str, tuple[float, float]] = {}
    command = [sys.executable, "-m", "busigen.cli", "view", str(dataset)]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.findall(r"http\S+", process.stdout.readline())[0]
            found["from the command to its address"] = (time.perf_counter() - begun, used(process.pid))
            with browser(profile) as context:
                page = context.pages[0]
                for name, query, status, pictures in steps:
                    ready = _IN_VIEW.replace("TEXT", f"/{status}/").replace("SELECTOR", pictures)
                    before = used(process.pid)
                    seconds = timed(page, f"{url}#{query}", ready)
                    found[name] = (seconds, used(process.pid) - before)
            status = Path(f"/proc/{process.pid}/status").read_text()
            found[_MEMORY] = (int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024, 0.0)
        finally:
            process.kill()
    return found


def used(process: int) -> float:
    """Seconds of the processor that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(page: Any, url: str, ready: str) -> float:
    """Seconds until an address shows what it should; asked all the time, since the page runs no timer of ours."""
    begun = time.perf_counter()
    page.goto(url)
    until(lambda: page.evaluate(ready))
    return time.perf_counter() - begun


def until(ready: Callable[[], Any]) -> None:
    """Wait, a minute at most."""
    end = time.monotonic() + 60
    while not ready():
        if time.monotonic() > end:
            sys.exit("nothing came for a minute")
        time.sleep(0.005)


if __name__ == "__main__":
    main()
