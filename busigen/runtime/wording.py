"""Words that several places share: numbers with a noun, lengths of time, disk space, what a shell reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``2 shards``; for nouns whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A length of time in the two units that matter: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def disk_size(size: float) -> str:
    """Bytes in the decimal unit that fits: ``812 bytes``, ``1.05 MB``, ``80.0 TB``."""
    if size < 1000:
        return counted(round(size), "byte")
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.2f} {unit}" if size < 10 else f"{size:.1f} {unit}" if size < 100 else f"{size:.0f} {unit}"


def unproven_line(missing: Sequence[str]) -> str:
    """What it means that a bundle lacks links of the chain of fingerprints."""
    named = " and no valid ".join(missing)
    return f"the bundle records no valid {named}, so nothing proves what its weights were trained on."


def shell_word(place: object) -> str:
    """A path or URL as one types it after a command: quoted where a shell needs that, and never taken for an option."""
    text = str(place)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def told(value: Any) -> str:
    """A JSON value in a message, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
