"""`busigen view` at 100,000 pairs in a real browser: time to the first grid, to filter, to the last pair; memory.

python -m benchmarks.viewing
python -m benchmarks.viewing --dataset /some/disk/data

Without ``--dataset``, one of the null engine (``ready_made.py``) is made and removed again; 100,000 pairs take 4.7 GB
and two minutes. A step ends when every picture in view is there. It needs Chromium, as the tests in a browser do.
"""

from __future__ import annotations

import argparse
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
    medians = {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]}
    show(f"{options.count:,} pairs, medians of {len(runs)} runs", ["", "s or MB"], [
        [name, f"{value / 1e6:.0f}" if name.startswith("memory") else f"{value:.2f}"] for name, value in medians.items()
    ])  # fmt: skip
    write(options.results, {"machine": machine, "count": options.count, "runs": runs})


def measured(dataset: Path, count: int, profile: Path) -> dict[str, float]:
    """Seconds of each step, and bytes of memory, of one run with a browser of its own."""
    found: dict[str, float] = {}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "busigen.cli", "view", str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.findall(r"http\S+", process.stdout.readline())[0]
            found["from the command to its address"] = time.perf_counter() - begun
            with browser(profile) as context:
                page = context.pages[0]
                steps: list[tuple[str, str, str, str]] = [
                    ("the first grid", "", rf"/^{count:,} pairs, 1 to /", "#grid img"),
                    ("filter by class and size", "where=class%3Dmalignant&where=area_share%3E0.05", "/pairs of/",
                     "#grid img"),
                    ("sort half of them by size", "where=class%3Dmalignant&sort=area_share&down=1",
                     rf"/^{count // 2:,} pairs of/", "#grid img"),
                    ("the last page", f"page={-(-count // 60)}", rf"/to {count:,} shown/", "#grid img"),
                    ("the last pair", f"page={-(-count // 60)}&pair={count - 1:09d}", "/./", "#pictures img"),
                ]  # fmt: skip
                for name, query, status, pictures in steps:
                    ready = _IN_VIEW.replace("TEXT", status).replace("SELECTOR", pictures)
                    found[name] = timed(page, f"{url}#{query}", ready)
                another = context.new_page()
                ready = _IN_VIEW.replace("TEXT", "/./").replace("SELECTOR", "#pictures img")
                found["the last pair by its address, in a new tab"] = timed(
                    another, f"{url}#pair={count - 1:09d}", ready
                )
            status = Path(f"/proc/{process.pid}/status").read_text()
            found["memory of the server, most"] = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024
        finally:
            process.kill()
    return found


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
