"""Places that are no folders of this machine: URLs, as ``--out`` and ``verify`` take them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from busigen.errors import UsageError
from busigen.registry import COPY_COMMANDS, UNFIT_STORES

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://(.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A URL without a slash at its end. It can be joined and shown as a ``Path`` can."""

    url: str

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.url.partition("://")[0]

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")


def place_of(text: str) -> Path | Address:
    """The folder or URL that was typed.

    Raises:
        UsageError: it is a URL that no dataset can be written to.
    """
    found = _URL.fullmatch(text)
    if found is None:
        return Path(text)
    protocol, rest = found[1].lower(), found[2].rstrip("/")
    reason = "chains two protocols" if "::" in protocol else UNFIT_STORES.get(protocol)
    if reason or not rest:
        raise UsageError(
            f"{text} {reason or 'names no place'}.",
            fix="Give a folder, or a URL such as s3://bucket/name or gs://bucket/name.",
        )
    return Address(f"{protocol}://{rest}")


def refuse_urls(*places: Path, what: str) -> None:
    """Refuse a URL where only a folder will do; a ``Path`` has made one slash of its two.

    Args:
        places: what was typed.
        what: the command.

    Raises:
        UsageError: one of the places is a URL.
    """
    for place in places:
        found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.+)", place.as_posix())
        if found and not place.exists():
            url = f"{found[1]}://{found[2]}"
            tool = COPY_COMMANDS.get(found[1])
            how = f", such as `{tool.format(shlex.quote(url))}`" if tool else ""
            raise UsageError(
                f"`busigen {what}` reads folders, and {url} is a URL.",
                fix=f"Copy it to a folder first, with the store's own tool{how}.",
            )
