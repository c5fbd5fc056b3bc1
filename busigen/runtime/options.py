"""A run's options as a person typed them: for messages and the dataset's card, never to decide anything."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

FIELDS = {
    "--count": ("config", "count"),
    "--index-range": ("config", "index_range"),
    "--bundle": ("fingerprint", "bundle"),
    "--healthy": ("fingerprint", "healthy"),
    "--classes": ("fingerprint", "classes"),
    "--seed": ("config", "seed"),
    "--shard-size": ("config", "shard_size"),
    "--size": ("fingerprint", "size"),
    "--depth": ("fingerprint", "depth"),
    "--across": ("fingerprint", "across"),
    "--height-width": ("fingerprint", "height_width"),
    "--birads": ("fingerprint", "birads"),
    "--provider": ("fingerprint", "provider"),
}
"""Where a run record keeps what each option decides. For a folder that is a hash; ``options`` holds its name."""


def decided(record: Mapping[str, Any], option: str) -> Any:
    """What the option decides in a run record; None if the record's source has no such thing."""
    section, name = FIELDS[option]
    return record.get(section, {}).get(name)


def as_typed(record: Mapping[str, Any], option: str) -> str | None:
    """The option's value as one would type it, folders by name alone; None where it is left out or unknown."""
    names = record.get("options") or {}
    value = names[option] if option in names else decided(record, option)
    if isinstance(value, Mapping):
        return ",".join(f"{name}={weight:g}" for name, weight in value.items())
    return None if value is None else str(value)


def command_line(record: Mapping[str, Any]) -> str:
    """The command that makes a dataset again, without ``--out`` and with folders by name alone.

    All options that decide which samples exist are named: a default may be another one in another version.
    """
    typed = ((option, as_typed(record, option)) for option in FIELDS)
    return " ".join(["busigen generate", *(f"{option} {shlex.quote(value)}" for option, value in typed if value)])


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """How two run records differ, as ``old -> new`` per option; the options that agree are absent."""
    changed = {}
    for option in FIELDS:
        if decided(old, option) != decided(new, option):
            before, now = (as_typed(record, option) or "the default" for record in (old, new))
            changed[option] = f"{before} -> {now}" if before != now else f"{now}, but its content is another"
    return changed
