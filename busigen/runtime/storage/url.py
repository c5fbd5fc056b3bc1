"""Places that are no folders of this machine: URLs, as ``--out`` and ``verify`` take them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from busigen.errors import UsageError
from busigen.registry import COPY_COMMANDS, UNFIT_STORES
from busigen.text import HIDDEN, user_info, without_credentials

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://(.*)", re.DOTALL)


@dataclass(frozen=True, repr=False)
class Address:
    """A URL without a slash at its end, which can be joined and shown, without its credentials, as a ``Path`` can."""

    url: str

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.url.partition("://")[0]

    def __str__(self) -> str:
        return without_credentials(self.url)

    __repr__ = __str__

    def redact(self, text: str) -> str:
        """A text about this place, such as a message of its store's library, without credentials of any URL."""
        rest = self.url.partition("://")[2]
        user = user_info(rest)
        found = (user, user.partition(":")[2], *re.split(r"[?#]", rest)[1:])
        # A library may take the URL apart, and quote what it took for a bucket's or a file's name.
        secrets = {form for part in found for form in (part, unquote(part)) if len(part) > 3}
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return without_credentials(text)

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")


def place_of(text: str) -> Path | Address:
    """The folder or URL that was typed; a ``UsageError`` where it is a URL that no dataset can be written to."""
    if (found := _URL.fullmatch(text)) is None:
        return Path(text)
    protocol, rest = found[1].lower(), found[2].rstrip("/")
    reason = "chains two protocols" if "::" in protocol else UNFIT_STORES.get(protocol)
    if reason or not rest:
        problem = f"{without_credentials(text)} {reason or 'names no place'}."
        raise UsageError(problem, fix="Give a folder, or a URL such as s3://bucket/name or gs://bucket/name.")
    return Address(f"{protocol}://{rest}")


def refuse_urls(*places: Path, what: str) -> None:
    """Raise a ``UsageError`` for a URL where the command ``what`` needs a folder; ``Path`` has cut its two slashes."""
    for place in places:
        if (found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.+)", place.as_posix())) and not place.exists():
            url = without_credentials(f"{found[1]}://{found[2]}")
            tool = COPY_COMMANDS.get(found[1])
            how = f", such as `{tool.format(shlex.quote(url))}`" if tool else ""
            problem = f"`busigen {what}` reads folders, and {url} is a URL."
            raise UsageError(problem, fix=f"Copy it to a folder first, with the store's own tool{how}.")
