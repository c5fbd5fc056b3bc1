"""Numbers as a person reads them: with a noun in the right form, or as a length of time."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``2 shards``; for nouns whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A length of time in the two units that matter: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
