"""Text from elsewhere, made safe to print: file names, records, URLs and messages may hold anything."""

from __future__ import annotations

import re

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
