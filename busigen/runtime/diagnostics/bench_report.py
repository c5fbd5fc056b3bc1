"""What ``busigen bench`` writes and prints: tables, ``bench.json``, ``bench.svg``, a line of the ledger."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from html import escape as xml
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from busigen.files import atomic_file, write_json
from busigen.runtime.storage.files import output_errors
from busigen.text import duration

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JSON_FILE, PLOT_FILE, LEDGER_FILE = "bench.json", "bench.svg", "ledger.jsonl"

# Okabe and Ito's colours, which the colour-blind can tell apart; grey is no engine.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
_IDLE, _IDLE_COLOUR = "no engine", "#bbbbbb"
_LEFT, _WIDTH, _BAR, _GAP, _TOP = 130, 560, 26, 14, 74

Record = Mapping[str, Any]


def write(record: Record, out: Path, ledger: Path) -> None:
    """Write ``bench.json`` and the plot into ``out`` and append a line without the single runs to the ledger."""
    with output_errors(out):
        write_json(out / JSON_FILE, record)
        with atomic_file(out / PLOT_FILE) as file:
            file.write(plot(record).encode())
    results = [{key: value for key, value in result.items() if key != "runs"} for result in record["results"]]
    with output_errors(ledger):
        append_line(ledger, {**record, "results": results})


def append_line(ledger: Path, value: Mapping[str, Any]) -> None:
    """Append one line of JSON, whole or not at all, whatever other processes append to the same file meanwhile."""
    line = f"{json.dumps(value, ensure_ascii=False, allow_nan=False)}\n".encode()
    # One write to a file opened for appending lands in one piece; the lock is for taking back a part of a line.
    with ledger.open("ab", buffering=0) as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            if fcntl:
                file.truncate(before)
            raise


def show(record: Record, console: Console) -> None:
    """Print the tables: with lines on a terminal, as plain columns elsewhere."""
    for title, header, rows in (_overview(record), _stages(record)):
        if console.is_terminal:
            table = Table(*header, title=title, title_justify="left")
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*row)
            console.print(table)
            continue
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        console.print(title)
        for row in (header, *rows):
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            console.print("  ".join(["", row[0].ljust(widths[0]), *cells]))
    for note in record["notes"]:
        console.print(f"Note: {note}")


def _overview(record: Record) -> tuple[str, list[str], list[list[str]]]:
    options = record["options"]
    predicted = f"{options['count_for']:,} images"
    header = ["provider, batch", "images/s", "engines alone", "of engines", "idle", "accepted", "peak MB", predicted]
    rows = []
    for result in record["results"]:
        rate, alone = result["images_per_second"], result["engines_alone_images_per_second"]
        peak, predicted_for = result["peak_memory"], result["predicted"]
        rows.append(
            [
                _name(result),
                f"{rate:.2f}",
                f"{alone:.2f}",
                f"{rate / alone:.0%}",
                f"{result['idle_share']:.1%}",
                f"{result['acceptance']:.1%}",
                "-" if peak is None else f"{peak / 1e6:.0f}",
                f"{duration(predicted_for['seconds'])}, {predicted_for['bytes'] / 1e9:.2f} GB",
            ]
        )
    return f"Whole pipeline: median of {options['repeat']} x {options['count']} images", header, rows


def _stages(record: Record) -> tuple[str, list[str], list[list[str]]]:
    results: Sequence[Record] = record["results"]
    shares = [
        {
            **{name: (stage["ms_per_image"], stage["share"]) for name, stage in result["stages"].items()},
            _IDLE: (_idle_ms(result), result["idle_share"]),
            "all": (result["ms_per_image"], 1.0),
        }
        for result in results
    ]
    names = [*dict.fromkeys(name for result in results for name in result["stages"]), _IDLE, "all"]
    rows = [[name, *("{:.1f} ({:.1%})".format(*one[name]) if name in one else "-" for one in shares)] for name in names]
    return "Milliseconds per image, and share of the wall time", ["stage", *map(_name, results)], rows


def _idle_ms(result: Record) -> float:
    return float(result["idle_share"] * result["ms_per_image"])


def _name(result: Record) -> str:
    return f"{result['provider']}, {result['batch_size']}"


def plot(record: Record) -> str:
    """An SVG with a bar per provider and batch size: milliseconds per image by stage, and those without an engine."""
    # Drawn here and not with matplotlib, which only the extra ``eval`` brings.
    bars = [_bar_parts(result) for result in record["results"]]
    names = [name for name in dict.fromkeys(name for parts in bars for name in parts) if name != _IDLE]
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)} | {_IDLE: _IDLE_COLOUR}
    scale = _WIDTH / max(sum(parts.values()) for parts in bars)
    width, height = _LEFT + _WIDTH + 190, _TOP + len(bars) * (_BAR + _GAP) + 10
    cpu = f"{record['machine']['cpu']}, {record['machine']['cores']} cores"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(16, 24, f"busigen bench: milliseconds per image ({cpu})", size=15),
    ]
    for number, (result, parts) in enumerate(zip(record["results"], bars, strict=True)):
        top, left = _TOP + number * (_BAR + _GAP), float(_LEFT)
        lines.append(_text(_LEFT - 8, top + 18, _name(result), anchor="end"))
        for name, value in parts.items():
            about = xml(f"{name}: {value:.1f} ms per image")
            lines.append(
                f'<rect x="{left:.1f}" y="{top}" width="{value * scale:.1f}" height="{_BAR}" fill="{colours[name]}">'
                f"<title>{about}</title></rect>"
            )
            left += value * scale
        rate = f"{result['ms_per_image']:.0f} ms, {result['images_per_second']:.2f} images/s"
        lines.append(_text(left + 6, top + 18, rate))
    for number, (name, colour) in enumerate(colours.items()):
        left = 16 + number * (width - 32) // len(colours)
        lines.append(f'<rect x="{left}" y="42" width="12" height="12" fill="{colour}"/>{_text(left + 17, 53, name)}')
    return "\n".join([*lines, "</svg>", ""])


def _bar_parts(result: Record) -> dict[str, float]:
    """Milliseconds per image by stage, all window sizes of a stage together, and the time without an engine last."""
    parts: dict[str, float] = {}
    for name, stage in result["stages"].items():
        component = name.partition("@")[0]
        parts[component] = parts.get(component, 0.0) + stage["ms_per_image"]
    return {**parts, _IDLE: _idle_ms(result)}


def _text(left: float, top: float, text: str, *, size: int = 13, anchor: str = "start") -> str:
    return f'<text x="{left:.1f}" y="{top}" font-size="{size}" text-anchor="{anchor}">{xml(text)}</text>'
