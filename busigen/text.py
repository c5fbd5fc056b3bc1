"""Text from elsewhere, made safe to print: file names, records, URLs and messages may hold anything."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import busigen

HIDDEN = "***"
"""Stands where something is not shown."""

_URL = re.compile(r"""\b([A-Za-z][A-Za-z0-9+.-]{1,30}:/{1,2})([^\s"'<>\\]+)""")
"""One slash, too: so a ``Path`` writes a URL that was given in a folder's place."""


def printable(text: str) -> str:
    """Text without characters that would break a line, command a terminal, or reorder what stands beside them.

    Letters of all scripts stay. All that Unicode does not count as printable is shown as ``repr`` writes it: C0
    and C1 controls, separators of lines, marks of direction, and bytes of a file name that are no UTF-8.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def without_credentials(text: str) -> str:
    """Text whose URLs show neither user info nor query nor fragment: each may hold a password or a signature."""
    return _URL.sub(_hide, text) if ":/" in text else text


def user_info(rest: str) -> str:
    """The name and password of a URL, of which ``rest`` is what follows the scheme and its slashes; empty without."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority and not re.fullmatch(r"[^:]*(:\d*)?|\[.*", authority):
        # No host and port: a key with a slash in it, as those of some stores have, that should have been quoted.
        authority = rest
    return authority.rpartition("@")[0]


def _hide(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    if user := user_info(rest):
        rest = f"{HIDDEN}{rest[len(user) :]}"
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    query = rest[len(place) :]
    if query:
        # What ends a sentence or a bracket around the URL is none of its own.
        rest = f"{place}{query[0]}{HIDDEN}{query[len(query.rstrip(').,;:')) :]}"
    return scheme + rest


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


def describe(value: Any) -> str:
    """A JSON value in a message, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def install_command(extra: str) -> str:
    """The command that installs an extra: from the source checkout that this package runs from, else by its name."""
    checkout = Path(busigen.__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"`pip install -e '.[{extra}]'` in {checkout}"
    return f"`pip install 'busigen[{extra}]'`"
