"""Text for people: names and messages from untrusted sources made safe to print, counts, durations and sizes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import busigen

HIDDEN = "***"
SHOWN_PROBLEMS = 20  # that a command lists one by one
# With one slash, too: so a ``Path`` writes a URL.
_URL = re.compile(r"""\b([A-Za-z][A-Za-z0-9+.-]{1,30}:/{1,2})([^\s"'<>\\]+)""")


def printable(text: str) -> str:
    """Text in which all that Unicode does not count as printable is shown as ``repr`` writes it.

    These are controls, separators of lines, marks of direction, and bytes of a file name that are no UTF-8.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def without_credentials(text: str) -> str:
    """Text whose URLs show no user info, query or fragment, which may hold a password or a signature."""
    return _URL.sub(_hide, text) if ":/" in text else text


def user_info(rest: str) -> str:
    """The user and password of a URL, given what follows its scheme and slashes; empty without."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority and not re.fullmatch(r"[^:]*(:\d*)?|\[.*", authority):
        # No host and port: an unquoted key with a slash in it, as some stores give out.
        authority = rest
    return authority.rpartition("@")[0]


def _hide(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    if user := user_info(rest):
        rest = f"{HIDDEN}{rest[len(user) :]}"
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    query = rest[len(place) :]
    if query:
        # The end of a sentence or bracket around the URL is not part of it.
        rest = f"{place}{query[0]}{HIDDEN}{query[len(query.rstrip(').,;:')) :]}"
    return scheme + rest


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``2 shards``; for nouns whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def disk_size(size: float) -> str:
    """Bytes in a decimal unit: ``812 bytes``, ``1.05 MB``, ``80.0 TB``."""
    if size < 1000:
        return counted(round(size), "byte")
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.2f} {unit}" if size < 10 else f"{size:.1f} {unit}" if size < 100 else f"{size:.0f} {unit}"


def unproven_line(missing: Sequence[str]) -> str:
    """The sentence about a bundle whose record lacks some fingerprints."""
    named = " and no valid ".join(missing)
    return f"the bundle records no valid {named}, so nothing proves what its weights were trained on."


def shell_word(place: object) -> str:
    """A path or URL quoted for a shell, and never taken for an option."""
    text = str(place)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def describe(value: Any) -> str:
    """A JSON value in a message, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def install_command(extra: str) -> str:
    """The command that installs an extra, from the source checkout if this package runs from one."""
    checkout = Path(busigen.__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"`pip install -e '.[{extra}]'` in {checkout}"
    return f"`pip install 'busigen[{extra}]'`"
