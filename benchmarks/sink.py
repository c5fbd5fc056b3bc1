"""The sink alone: busigen's factory against webdataset and Hugging Face datasets, fed by the same null engine.

python benchmarks/sink.py
python benchmarks/sink.py --count 5000 --repeat 5

Each writes the same ready-made pairs of image, mask and row in a process of its own, in turns. ``busigen`` is
``generate`` as it is: it also hashes every file, writes the manifest, card and preview, and flushes to disk, which the
others do not. ``webdataset`` is its ShardWriter with Pillow's PNG, ``datasets`` is ``Dataset.from_generator`` and
``save_to_disk`` with its Image feature. Seconds run from the first sample asked for to the finished dataset; imports
and drawing the pool of samples are outside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import RESULTS, about, in_turns, median, ratios, run, show, size_of, write
from PIL import Image
from ready_made import ReadyMade

from busigen.registry import SHARD_SIZE
from busigen.runtime.backends.probe import peak_memory
from busigen.runtime.dataset.format import key_of
from busigen.runtime.execution.factory import generate

SEED = 7


def main() -> None:
    """Measure all writers in turns, print the table, write the results; or be one of the measured processes."""
    options = parse()
    if options.worker:
        be_measured(options)
        return
    runs = in_turns(options.writers, options.repeat, lambda name, turn: measure(name, options))
    rows = [summary(name, runs, options.count) for name in options.writers]
    show(
        f"{options.count} pairs, {options.repeat} runs each: medians",
        ["writer", "pairs/s", "busigen is faster by", "CPU ms/pair", "peak MB", "files", "MB"],
        [
            [
                row["name"],
                f"{row['pairs_per_second']:.0f}",
                f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})",
                f"{row['cpu_ms_per_pair']:.2f}",
                f"{row['peak_memory'] / 1e6:.0f}",
                f"{row['files']:.0f}",
                f"{row['bytes'] / 1e6:.1f}",
            ]
            for row in rows
        ],
    )
    record = {
        "command": {"count": options.count, "repeat": options.repeat, "shard_size": SHARD_SIZE},
        "machine": about("webdataset", "datasets", "pyarrow"),
        "medians": rows,
        "runs": runs,
    }
    write(options.results, record)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="pairs per run")
    parser.add_argument("--repeat", type=int, default=5, help="runs per writer")
    parser.add_argument("--writers", nargs="+", default=list(WRITERS), choices=WRITERS, help="busigen must be one")
    parser.add_argument("--out", type=Path, help="folder for what is written and removed; a temporary one if left out")
    parser.add_argument("--results", type=Path, default=RESULTS / "sink.json", help="JSON file to write")
    parser.add_argument("--worker", choices=WRITERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "busigen" not in options.writers:
        parser.error("--writers has to name busigen: the others are compared with it")
    return options


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process's figures."""
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        out = Path(folder) / "out"
        command = [sys.executable, __file__, "--worker", name, "--count", str(options.count), "--out", str(out)]
        done = run(command)
        files, size = size_of(out)
    return {**done.described, "peak_memory": done.peak_memory, "files": files, "bytes": size}


def summary(name: str, runs: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Medians of one writer; ``ratios`` compare it with busigen round by round, ``ratio`` is their median."""
    by_round = ratios(runs, name, "busigen", "seconds")
    return {
        "name": name,
        "pairs_per_second": count / median(runs, name, "seconds"),
        "ratio": statistics.median(by_round),
        "ratios": by_round,
        "cpu_ms_per_pair": 1000 * median(runs, name, "cpu_seconds") / count,
        **{key: median(runs, name, key) for key in ("memory_before", "peak_memory", "files", "bytes")},
    }


def be_measured(options: argparse.Namespace) -> None:
    """Write the dataset with one writer and print what it took."""
    writer = WRITERS[options.worker]()
    source, before = ReadyMade(), peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    writer(source, options.out, options.count)
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**found, "memory_before": before}))


Writer = Callable[[ReadyMade, Path, int], None]


def busigen() -> Writer:
    """``generate``, as the command calls it."""

    def writes(source: ReadyMade, out: Path, count: int) -> None:
        generate(source, out, count=count, seed=SEED)

    return writes


def webdataset() -> Writer:
    """Shards of the same names, members and number of samples."""
    from webdataset import ShardWriter

    def writes(source: ReadyMade, out: Path, count: int) -> None:
        out.mkdir()
        with ShardWriter(str(out / "%06d.tar"), maxcount=SHARD_SIZE, verbose=0) as sink:
            for sample in source.samples(range(count)):
                sink.write(
                    {
                        "__key__": key_of(sample.index),
                        "image.png": Image.fromarray(sample.image),
                        "mask.png": Image.fromarray(sample.mask),
                        "json": {"index": sample.index, "class": sample.label, **sample.row},
                    }
                )

    return writes


def datasets() -> Writer:
    """An Arrow dataset on disk, by way of the cache that ``from_generator`` writes first."""
    import datasets as hf

    hf.disable_progress_bars()
    kinds = {str: "string", int: "int64", float: "float64", bool: "bool"}

    def rows(source: ReadyMade, count: int) -> Iterator[dict[str, Any]]:
        for sample in source.samples(range(count)):
            pictures = {"image": Image.fromarray(sample.image), "mask": Image.fromarray(sample.mask)}
            yield {"index": sample.index, "class": sample.label, **sample.row, **pictures}

    def writes(source: ReadyMade, out: Path, count: int) -> None:
        types = {"index": int, "class": str, **source.row_types()}
        features = {name: hf.Value(kinds[kind]) for name, kind in types.items()}
        made = hf.Dataset.from_generator(
            rows,
            features=hf.Features({**features, "image": hf.Image(), "mask": hf.Image()}),
            cache_dir=str(out.parent / "cache"),
            gen_kwargs={"source": source, "count": count},
        )
        made.save_to_disk(str(out))

    return writes


WRITERS: dict[str, Callable[[], Writer]] = {"busigen": busigen, "webdataset": webdataset, "datasets": datasets}


if __name__ == "__main__":
    main()
