"""What every reader of JSON answers to mutated files: counts by exit code, and what came out that is no answer.

python -m benchmarks.json_fuzz [--times 400] [--only NAME ...] [--seed 5]

A reader is a command, or the part of one that reads: nothing is trained, traced or drawn by a bundle.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.harness.json_fuzz import BUG, answer, readers, training_readers

CODES = ("0", "3", "4", "5", BUG)


def main() -> int:
    """Mutate, read and count; the exit code says whether anything came out that is no answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=400, help="mutations for each reader")
    parser.add_argument("--only", nargs="+", default=[""], help="readers whose name has one of these in it")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    table = Table("reader", *(f"exit {code}" if code != BUG else code for code in CODES), "other")
    total: Counter[str] = Counter()
    console, errors = Console(), Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="busigen-") as name:
        place = Path(name)
        for reader in [*readers(place), *training_readers(place)]:
            if not any(part in reader.name for part in options.only):
                continue
            counts: Counter[str] = Counter()
            for number in range(options.times):
                code, said = answer(reader, place / "work", random.Random(f"{options.seed} {reader.name} {number}"))
                counts[code if code in CODES else "other"] += 1
                if code == BUG or code not in CODES:
                    errors.print(f"{reader.name}, mutation {number}: {code}: {said}", markup=False)
            table.add_row(reader.name, *(str(counts[code]) for code in (*CODES, "other")))
            errors.print(f"{reader.name}: {dict(counts)}", markup=False)
            total += counts
    table.add_row("all", *(str(total[code]) for code in (*CODES, "other")))
    console.print(table)
    return int(total[BUG] > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
