"""What busigen does on an NVIDIA card, within a limit of time: GPU tests, parity, matmul peak, throughput, whole runs.

benchmarks/gpu_check.sh              on a machine with a card
benchmarks/gpu_check.sh --dry-run    the same code on the processor with tiny sizes, to see that it runs to its end

Every part runs in a process of its own and has a slice of the time; what it measured before its slice ended is kept,
and what is missing is named under ``left_out``. Rates are of the three stages' denoisers of pixels (lesion and blend,
windows of 128 pixels); a share of peak compares their matrix products and convolutions, counted by PyTorch, with a
large matrix product that is measured on the same card in the same precision.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts import PARTS
from measuring import RESULTS, about, show, write

from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.probe import driver_cuda, gpus

SLICES = {
    "doctor": 0.04,
    "tests": 0.12,
    "peak": 0.04,
    "parity": 0.12,
    "eager": 0.08,
    "compile": 0.24,
    "engines": 0.20,
    "whole": 0.16,
}
"""Each part's share of the time; what one leaves goes to those after it."""

GOALS = {"pairs": 100_000, "seconds": 60.0, "share_of_peak": 0.40, "over_compile": 1.5}
"""What is aimed at on one H200, end to end and during the denoisers."""


def main() -> None:
    """Run all parts, show the tables, write the record; or be one part."""
    options = parse()
    if options.part:
        for found in PARTS[options.part](options):
            print(json.dumps(found), flush=True)
        return
    if not options.dry_run and driver_cuda() is None:
        sys.exit("No NVIDIA driver is loaded here: nothing was measured. --dry-run runs all parts on the processor.")
    began = time.monotonic()
    found: dict[str, list[dict[str, Any]]] = {}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(options.parts):
            share = SLICES[name] / sum(SLICES[part] for part in options.parts[number:])
            left = 60 * options.minutes - (time.monotonic() - began)
            found[name], why = run_part(name, share * left, Path(folder), options)
            left_out += [f"{name}: {why}"] if why else []
            left_out += [f"{name}: {line['left_out']}" for line in found[name] if "left_out" in line]
            print(f"{name}: {len(found[name])} results{f'; {why}' if why else ''}", file=sys.stderr)
    record = {
        "dry_run": options.dry_run,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "machine": about("torch", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx-cu13", "nvidia-cudnn-cu13"),
        "cards": [vars(card) for card in gpus()],
        "bundle": Bundle.recorded(options.bundle).sha256,
        "goals": GOALS,
        # On the processor the figures say nothing of the goals.
        "reached": None if options.dry_run else reached(found),
        "left_out": left_out,
        "parts": found,
    }
    table(found)
    print("left out: " + ("; ".join(left_out) or "nothing"))
    name = "gpu_check_dry_run.json" if options.dry_run else "gpu_check.json"
    write(options.results or RESULTS / name, record)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the processor, tiny")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit for everything")
    parser.add_argument("--parts", nargs="+", choices=SLICES, default=list(SLICES), help="all if left out")
    parser.add_argument("--bundle", type=Path, default=default_bundle(), help="the shipped one if left out")
    parser.add_argument(
        "--other-bundles", nargs="*", default=[], metavar="PRECISION=DIR", help="exports in other precisions: fp16=DIR"
    )
    parser.add_argument("--checkpoint", type=Path, help="the bundle's; restored from the bundle if left out")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    parser.add_argument("--part", choices=SLICES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_part(
    name: str, seconds: float, work: Path, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], str | None]:
    """One part in a process of its own: what it found, and why it is not complete, if it is not."""
    command = [sys.executable, __file__, "--part", name, "--work", str(work), "--bundle", str(options.bundle)]
    # A part ends by itself a little earlier than it would be ended.
    command += ["--deadline", str(time.time() + 0.9 * seconds - 1.0)]
    command += ["--dry-run"] * options.dry_run
    command += ["--other-bundles", *options.other_bundles] if options.other_bundles else []
    command += ["--checkpoint", str(options.checkpoint)] if options.checkpoint else []
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        why = None
        try:
            if process.wait(timeout=max(1.0, seconds)) != 0:
                errors.seek(0)
                why = f"ended with {process.returncode}: {last_line(errors.read())}"
        except subprocess.TimeoutExpired:
            why = f"its slice of {seconds:.0f} s ended"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")], why


def last_line(text: str) -> str:
    """What a process that failed said last."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"


def reached(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The goals' figures, ``None`` where they were not measured: the best of any provider and precision."""
    rates = rated(found)
    shares = [row["share_of_peak"] for row in rates if row["library"] != "torch" and row.get("share_of_peak")]
    ratios = [row["over_compile"] for row in rates if row.get("over_compile")]
    whole = [row["seconds_for_goal"] for row in found.get("whole", []) if row.get("seconds_for_goal")]
    return {
        "seconds": min(whole, default=None),
        "share_of_peak": max(shares, default=None),
        "over_compile": max(ratios, default=None),
    }


def rated(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every rate with its share of peak, and how much faster it is than torch.compile at that batch and precision."""
    rows = [
        row for part in ("eager", "compile", "engines") for row in found.get(part, []) if "images_per_second" in row
    ]
    peaks = {row["precision"]: row["tflops"] for row in found.get("peak", []) if "tflops" in row}
    flops = next((row["flops_per_image"] for row in found.get("eager", []) if "flops_per_image" in row), None)
    compiled = {(row["batch"], row["precision"]): row for row in rows if row["engine"] == "torch.compile"}
    for row in rows:
        if flops and row["precision"] in peaks:
            row["share_of_peak"] = flops * row["images_per_second"] / (1e12 * peaks[row["precision"]])
        if row["library"] != "torch" and (same := compiled.get((row["batch"], row["precision"]))):
            row["over_compile"] = row["images_per_second"] / same["images_per_second"]
    return rows


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print what was measured of the denoisers and of whole runs."""
    columns: Sequence[str] = ("engine", "precision", "batch", "images/s", "of peak", "over compile")
    rows = sorted(rated(found), key=lambda row: (row["precision"], row["engine"], row["batch"]))
    show(
        "Denoisers of lesion and blend, windows of 128 pixels",
        columns,
        [
            [
                row["engine"],
                row["precision"],
                str(row["batch"]),
                f"{row['images_per_second']:.1f}",
                f"{row['share_of_peak']:.1%}" if row.get("share_of_peak") else "-",
                f"{row['over_compile']:.2f}" if row.get("over_compile") else "-",
            ]
            for row in rows
        ],
    )
    for row in found.get("whole", []):
        if "pairs_per_second" in row:
            described = f"{row['pairs_per_second']:.1f} pairs/s, {GOALS['pairs']:,} in {row['seconds_for_goal']:.0f} s"
            print(f"generate --provider {row['provider']}: {described}")


if __name__ == "__main__":
    main()
