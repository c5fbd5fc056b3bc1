"""What a power cut leaves of each command's folder: nothing vouched for missing or torn, and the command continues.

python -m benchmarks.power_cut [CASE ...] [--points 1000] [--continue-every N]

Each case is recorded once and cut at random points (`tests.harness.power_cut`). Of `train` and `export`, which take
seconds to minutes, each cut is looked at and few are continued; `save` is what training writes without the training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.harness.power_cut import cut_off
from tests.harness.power_cut_cases import CASES, inputs_of

CONTINUE_EVERY = {"prepare": 4, "prepare-again": 4, "save": 20, "train": 100, "export": 500}


def main() -> int:
    """Try the cases and print one row for each; 1 where something was lost, torn or not continued."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--continue-every", type=int, help="continue after every so many cuts")
    options = parser.parse_args()
    wrong = 0
    line = "{:13} {:>6} {:>5} {:>12} {:>9} {:>9} {:>7}"
    print(line.format("case", "states", "cuts", "lost or torn", "continued", "differing", "seconds"))
    for name in options.cases:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve()
            case = CASES[name](inputs_of(name, place))
            (place / "work").mkdir()
            every = options.continue_every or CONTINUE_EVERY.get(name, 1)
            tally = cut_off(case, place / "work", options.points, continue_every=every)
        row = (tally.states, tally.tried, len(tally.faults), tally.continued, len(tally.differing))
        print(line.format(name, *row, round(time.monotonic() - started)), flush=True)
        for what in (*tally.faults, *tally.differing)[:20]:
            print(f"  {what}")
        wrong += len(tally.faults) + len(tally.differing)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
