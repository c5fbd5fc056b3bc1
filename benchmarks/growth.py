"""What of the factory's memory grows with the number of samples: the peak of each phase, one process per count.

python benchmarks/growth.py
python benchmarks/growth.py --counts 1000 50000 --refused 2

A null engine (``ready_made.py``) draws, and one pair of PNG files serves all samples, so that a run takes a tenth of
the time: of memory, encoding needs the same at every count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ready_made
from measuring import about, run, show, write

from busigen.runtime.backends.probe import peak_memory, reset_peak_memory
from busigen.runtime.dataset import finalize as finish
from busigen.runtime.dataset import shards
from busigen.runtime.execution import factory

PHASES = ((factory, "draw_missing"), (finish, "write_manifest"), (finish, "contact_sheet"), (finish, "write_json"))


def main() -> None:
    """Measure all counts and print the table; or be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 50_000], help="samples per run")
    parser.add_argument("--refused", type=int, default=20, help="one draw is refused for one sample in so many")
    parser.add_argument("--results", type=Path, help="JSON file to write; none if left out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    ready_made.REFUSED = options.refused
    if options.worker:
        print(json.dumps(phases(options.counts[0])))
        return
    found = {}
    for count in options.counts:
        worker = [sys.executable, __file__, "--worker", "--counts", str(count), "--refused", str(options.refused)]
        found[count] = run(worker).described
    names = [name for _, name in PHASES]
    rows = [[f"{count:,}", *(f"{peaks[name] / 1e6:.1f}" for name in names)] for count, peaks in found.items()]
    show("Peak MB by phase, null engine without PNG", ["samples", *names], rows)
    if options.results:
        write(options.results, {"machine": about(), "refused": options.refused, "peaks": found})


def phases(count: int) -> dict[str, int]:
    """Peak bytes of resident memory in each phase of one run, after a small one that loads what is loaded late."""
    encode, kept, peaks = shards._encode, [], {}

    def encoded(sample: Any) -> tuple[bytes, bytes]:
        if not kept:
            kept.append(encode(sample))
        return kept[0]

    def watched(name: str, work: Any, *arguments: Any, **options: Any) -> Any:
        reset_peak_memory()
        result = work(*arguments, **options)
        peaks[name] = max(peaks.get(name, 0), peak_memory())
        return result

    shards._encode = encoded
    source = ready_made.ReadyMade()
    with tempfile.TemporaryDirectory() as folder:
        factory.generate(source, Path(folder) / "first", count=100, seed=7)
        for module, name in PHASES:
            setattr(module, name, partial(watched, name, getattr(module, name)))
        factory.generate(source, Path(folder) / "set", count=count, seed=7)
    return peaks


if __name__ == "__main__":
    main()
