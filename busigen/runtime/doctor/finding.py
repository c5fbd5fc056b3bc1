"""What `busigen doctor` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How it stands with it."""

    OK = "ok"
    OFF = "off"
    """Not for this machine, which lacks the card that it is for."""
    WARNING = "warning"
    """`generate` runs, but slower than it could, or not with everything that is installed."""
    PROBLEM = "problem"
    """`generate` cannot run."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: how it stands with it.
        told: what was found.
        fix: what helps; empty where nothing has to be done.
    """

    name: str
    state: State
    told: str
    fix: str = ""
