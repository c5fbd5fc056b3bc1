"""Files below a URL, read and written by way of fsspec; what was sent is compared with what was meant."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from busigen.errors import MissingDependencyError, UsageError
from busigen.files import sha256_of, temporary_name
from busigen.registry import OBJECT_STORES, STORE_EXTRAS, STORE_OPTIONS
from busigen.runtime.storage.retry import RetryingCaller, RetryPolicy
from busigen.runtime.storage.url import Address
from busigen.text import install_command

_FIRST = RetryPolicy(total=15.0)
"""For the first contact: who mistyped an endpoint should not wait for minutes."""


_AT_ONCE = 32
"""Small files that are asked for together."""


class Store:
    """Files below a URL, by names with forward slashes.

    Attributes:
        sizes: bytes of the files that are there, by name, as of the last look and of what was done since.

    Args:
        caller: names the URL, and calls it.

    Raises:
        UsageError: no such protocol is known.
        MissingDependencyError: a package for it is not installed.
        BusigenError: of the caller's kind: no credentials, no such bucket, no network.
    """

    def __init__(self, caller: RetryingCaller) -> None:
        self.caller, self.address = caller, caller.address
        self._fs, self._root = _opened(caller.address)
        self._renames = caller.address.protocol not in OBJECT_STORES
        self.sizes: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        """Set ``sizes`` to the bytes of every file that is there, by name."""

        def find() -> Mapping[str, Mapping[str, Any]]:
            self._fs.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._fs.find(self._root, detail=True)
            return found

        try:
            found = self.caller.call(find, _FIRST)
        except FileNotFoundError:
            if not self._renames:
                raise self.caller.missing() from None
            found = {}
        start = len(self._root.rstrip("/")) + 1
        names = {path[start:]: int(info.get("size") or 0) for path, info in found.items()}
        # The web consoles of some stores show folders by way of empty objects whose names end with a slash.
        self.sizes = {name: size for name, size in names.items() if name and not name.endswith("/")}

    def read(self, name: str, retry: RetryPolicy | None = None) -> bytes | None:
        """A file's content; None if there is none."""
        try:
            content: bytes = self.caller.call(lambda: self._fs.cat_file(self._path(name)), retry)
        except FileNotFoundError:
            return None
        return content

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Content of several files; those that are gone are left out."""
        paths = {self._path(name): name for name in names}

        def cat() -> dict[str, bytes]:
            # A single path would come back as bare bytes, and an error of one file would hide all others.
            found = {path: self._fs.cat_file(path) for path in paths} if len(paths) == 1 else self._cat(list(paths))
            return {paths[path]: content for path, content in found.items()}

        try:
            return self.caller.call(cat)
        except FileNotFoundError:
            return {name: content for name in paths.values() if (content := self.read(name)) is not None}

    def _cat(self, paths: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = self._fs.cat(paths, on_error="raise")
        # Some stores hand paths back with a slash before them, or without.
        return {path: found[path] if path in found else found[path.lstrip("/")] for path in paths}

    def write(self, name: str, content: bytes) -> None:
        """Make a file, or replace it."""
        digests = hashlib.md5(content, usedforsecurity=False), hashlib.sha256(content).hexdigest()
        self._place(name, lambda path: self._fs.pipe_file(path, content), len(content), *digests)

    def put(self, local: Path, name: str) -> None:
        """Copy a local file there."""
        with local.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        digests = md5, sha256_of(local)
        self._place(name, lambda path: self._fs.put_file(str(local), path), local.stat().st_size, *digests)

    def create(self, name: str, content: bytes) -> bool:
        """Make a file unless there is one; False where there is. Not every store can tell for sure."""

        def create() -> None:
            if self._renames:
                self._make_folder(name)
                with self._fs.open(self._path(name), "xb") as file:
                    file.write(content)
                return
            try:
                self._fs.pipe_file(self._path(name), content, mode="create")
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                # A store that speaks S3 without knowing this request; see the lease, which finds that out.
                if self._fs.exists(self._path(name)):
                    raise FileExistsError(name) from None
                self._fs.pipe_file(self._path(name), content)

        try:
            self.caller.call(create)
        except FileExistsError:
            # An attempt whose answer was lost has created it all the same.
            return self.read(name) == content
        except FileNotFoundError:
            raise self.caller.missing() from None
        self.sizes[name] = len(content)
        return True

    def remove(self, name: str, retry: RetryPolicy | None = None) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.caller.call(lambda: self._fs.rm_file(self._path(name)), retry)
        self.sizes.pop(name, None)

    def get(self, name: str, local: Path) -> None:
        """Copy a file to the local disk.

        Raises:
            FileNotFoundError: it is not there.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        self.caller.call(lambda: self._fs.get_file(self._path(name), str(local)))

    def _place(self, name: str, send: Callable[[str], object], size: int, md5: Any, sha256: str) -> None:
        """Send a file until what is there has its bytes."""
        path = self._path(name)

        def work() -> None:
            if not self._renames:
                send(path)
                self._check(path, size, md5, sha256)
                return
            self._make_folder(name)
            folder, _, last = path.rpartition("/")
            temporary = f"{folder}/{temporary_name(last)}"
            try:
                send(temporary)
                self._check(temporary, size, md5, sha256)
                self._fs.mv(temporary, path)
            except FileNotFoundError as error:
                # Another process took this one for dead and tidied up; the lease will tell.
                raise OSError(errno.EIO, f"{last} vanished while it was sent") from error
            except BaseException:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(temporary)
                raise

        try:
            self.caller.call(work)
        except FileNotFoundError:
            raise self.caller.missing() from None
        self.sizes[name] = size

    def _check(self, path: str, size: int, md5: Any, sha256: str) -> None:
        """Compare a file that was sent with what was meant; raises what has it sent again."""
        self._fs.invalidate_cache()
        info = self._fs.info(path)
        if info.get("size") == size and _stated_md5(info) == md5.hexdigest():
            return
        # No MD5 of the whole file: it came in several parts, is encrypted, or the store tells none.
        if info.get("size") == size and self._sha256(path) == sha256:
            return
        raise OSError(errno.EIO, f"{path.rpartition('/')[2]} arrived damaged")

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(path, "rb", cache_type="none") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def _make_folder(self, name: str) -> None:
        self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _opened(address: Address) -> tuple[Any, str]:
    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise _lacking(address, "fsspec") from error
    protocol = address.protocol
    # What its user configured for fsspec comes first.
    options = {
        name: value for name, value in STORE_OPTIONS.get(protocol, {}).items() if name not in conf.get(protocol, {})
    }
    try:
        fs, root = url_to_fs(address.url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise _lacking(address, address.redact(str(error))) from error
    except ValueError as error:
        raise UsageError(
            f"{address}: {address.redact(str(error))}.",
            fix="Give a folder, or a URL such as s3://bucket/name or gs://bucket/name.",
        ) from error
    return fs, str(root)


def _lacking(address: Address, what: str) -> MissingDependencyError:
    protocol = address.protocol
    brought = protocol in STORE_EXTRAS or what == "fsspec"
    fix = f"Run {install_command(STORE_EXTRAS.get(protocol, 'remote'))}." if brought else f"{what.rstrip('.')}."
    return MissingDependencyError(f"{address} needs a package that is not installed.", fix=fix)


def _stated_md5(info: Mapping[str, Any]) -> str | None:
    """The MD5 that a store tells of a file, in hexadecimal: S3 as ETag, Google as md5Hash, Azure as content_md5."""
    tag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    if len(tag) == 32:
        return tag
    coded = info.get("md5Hash") or (info.get("content_settings") or {}).get("content_md5")
    if isinstance(coded, str):
        with contextlib.suppress(ValueError):
            return base64.b64decode(coded).hex()
    return bytes(coded).hex() if isinstance(coded, (bytes, bytearray)) else None


def in_groups(store: Store, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Files with their content, in order, few of which are held at a time."""
    for start in range(0, len(names), _AT_ONCE):
        group = names[start : start + _AT_ONCE]
        contents = store.read_all(group)
        yield from ((name, contents[name]) for name in group if name in contents)
