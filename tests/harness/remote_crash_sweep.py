"""Runs to a URL that are killed at every change they make there, and what the same command makes of it.

``python -m tests.harness.remote_crash_sweep URL FOLDER STEP`` kills a run before and after every STEP-th change,
gives the same
command again, and prints a tally as JSON. As in faulting.py, runs are forked from a process that has done its imports
and uses neither polars nor fsspec itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from busigen.files import TEMPORARY_PREFIX
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.remote import verify_place
from busigen.runtime.output.remote import RemoteOutput
from busigen.runtime.storage.lock import LOCK_FILE
from busigen.runtime.storage.url import Address
from tests.harness.fault_injection import ended, forked
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource

COUNT, SHARD_SIZE = 5, 2
RUN = {"count": COUNT, "seed": 7, "shard_size": SHARD_SIZE}
SHARDS = 3

CHANGES = ("pipe_file", "put_file", "rm_file", "mv")
"""What busigen asks of a file system that changes something there."""


@dataclass
class Tally:
    """What became of the runs.

    Attributes:
        killed: runs that were killed.
        torn: files with a final name and other bytes than an undisturbed run's.
        repeated: shards that were complete at the URL and were made again.
        differing: datasets that the same command did not finish to the same files, or that ``verify`` finds fault with.
        left: spools that a finished run left behind.
    """

    killed: int = 0
    torn: int = 0
    repeated: int = 0
    differing: int = 0
    left: int = 0


def contents(url: str) -> dict[str, str]:
    """Every file's hash by its name below a URL."""
    fs, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return {path[len(root) + 1 :]: hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(root)}


def dying(fs: Any, at: int, after: bool) -> None:
    """Have this process killed around the ``at``-th change of a file system, counted from 0."""
    count = -1

    def dies(change: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            now = count == at
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return change(*arguments, **options)
            finally:
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in CHANGES:
        setattr(fs, name, dies(getattr(fs, name)))


def aside(folder: Path, work: Callable[[], Any]) -> Any:
    """What ``work`` comes to in a process of its own."""
    answer = folder / "answer.json"

    def tell() -> int:
        answer.write_text(json.dumps(work()))
        return 0

    assert ended(forked(tell)) == 0
    return json.loads(answer.read_text())


def sweep(url: str, folder: Path, step: int) -> Tally:
    """See the module's docstring."""
    tally, spools = Tally(), folder / "spools"
    aside(folder, lambda: generate(NoiseSource(), folder / "whole", **RUN).samples)
    whole = hashes(folder / "whole")
    at, more = 0, True
    while more:
        for after in (False, True):
            place = Address(f"{url}/{at}-{after}")

            def killed(at: int = at, after: bool = after, place: Address = place) -> int:
                destination = RemoteOutput(place, spools)
                dying(destination._store._fs, at, after)
                return 0 if generate(NoiseSource(), destination, **RUN).samples else 1

            def again(place: Address = place) -> tuple[int, bool]:
                report = generate(NoiseSource(), RemoteOutput(place, spools), **RUN)
                return report.written, verify_place(place).ok

            code = ended(forked(killed))
            assert code in (0, -signal.SIGKILL), code
            more = code != 0
            tally.killed += more
            before = aside(folder, lambda place=place: contents(place.url))
            tally.torn += sum(whole.get(name) != sha256 for name, sha256 in before.items() if not _passing(name))
            complete = sum(name.startswith("shards/") and name.endswith(".json") for name in before)
            written, sound = aside(folder, again)
            tally.repeated += max(0, written - (SHARDS - complete))
            tally.differing += not sound or aside(folder, lambda place=place: contents(place.url)) != whole
            tally.left += len(list(spools.iterdir()))
        at += step
    return tally


def _passing(name: str) -> bool:
    return name.startswith(LOCK_FILE) or name.rpartition("/")[2].startswith(TEMPORARY_PREFIX)


if __name__ == "__main__":
    url, place, step = sys.argv[1:]
    Path(place).mkdir(parents=True, exist_ok=True)
    print(json.dumps(asdict(sweep(url, Path(place), int(step)))))
