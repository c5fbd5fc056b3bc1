"""Calls to a store that may be out of reach for a while: tried again, ever later, and given up in words."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from busigen.errors import BusigenError, MissingDependencyError, OutputError, UsageError
from busigen.files import sha256_of, temporary_name
from busigen.registry import OBJECT_STORES, STORE_EXTRAS, STORE_OPTIONS
from busigen.runtime.storage.files import fix_of
from busigen.runtime.storage.url import Address
from busigen.text import duration, install_command

Result = TypeVar("Result")

_AGAIN = "then run the same command again: what is complete is kept."
_HOPELESS = (errno.EINVAL, errno.ENOSYS)
"""Beside what :func:`busigen.runtime.storage.files.fix_of` knows: a request that the store will never take."""

_PASSING = (307, 408, 409, 423, 425, 429)
"""HTTP status codes below 500 after which the same request may be answered otherwise."""

_LASTING = (501, 505)
"""Those from 500 on after which it is not."""

_PASSING_CODES = re.compile(
    "Throttl|SlowDown|TooManyRequests|LimitExceeded|RequestTimeout|RequestTimeTooSkewed|IncompleteBody|InternalError"
    "|ServiceUnavailable|OperationAborted|PriorRequestNotComplete"
)
"""What S3 calls the like; some of it comes with status 400 or 403."""

_CHECKSUMS = re.compile(
    "checksum|sha-?256|md5|digest|trailer|aws-chunked|contentlength|content-length|header you", re.I
)
"""In the refusal of a server that speaks S3 but does not know the checksums that clients send with it since 2025."""

_WORDS = {"Forbidden": 403, "Bad Request": 400}
"""How gcsfs begins the errors that it gives no status."""

_NETWORK = frozenset(
    {
        *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"),
        *("MetadataRetrievalError", "CredentialRetrievalError", "TokenRetrievalError", "CapacityNotAvailableError"),
    }
)
"""Botocore's errors that time may mend; others, such as of a profile that is not there, are of settings."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try, in seconds.

    Attributes:
        total: from the first failure to giving up.
        first: pause before the second attempt; each further one is twice as long.
        longest: pause.
        attempt: that a single attempt may take; None for whatever the store's library allows.
    """

    total: float = 300.0
    first: float = 1.0
    longest: float = 30.0
    attempt: float | None = None


@dataclass
class Caller:
    """Calls a store, each time in a thread of its own: a call that hangs must not keep anybody from stopping.

    Attributes:
        address: what messages name.
        retry: how long to try.
        tell: told once in a while that the store is out of reach.
        kind: of the error that a store which cannot be used ends with.
    """

    address: Address
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    tell: Callable[[str], None] = lambda line: None
    kind: type[BusigenError] = OutputError
    _hurry: threading.Event = field(default_factory=threading.Event)

    def hurry(self) -> None:
        """Have all calls end now, with ``KeyboardInterrupt``."""
        self._hurry.set()

    def calm(self) -> None:
        """Have calls take their time again, such as those that tidy up; nobody must be calling."""
        self._hurry.clear()

    def call(self, what: Callable[[], Result], retry: RetryPolicy | None = None) -> Result:
        """Do it, if need be several times.

        Args:
            what: to be done; a repetition must do no harm.
            retry: other than usual.

        Raises:
            FileNotFoundError, FileExistsError: as ``what`` raises them.
            BusigenError: the store refuses, or stays out of reach.
            KeyboardInterrupt: on a signal.
        """
        retry = retry or self.retry
        began, pause = time.monotonic(), retry.first
        while True:
            try:
                return self.aside(what, retry.attempt)
            except (FileNotFoundError, FileExistsError, BusigenError):
                raise
            except Exception as error:
                refusal = self.refusal(error)
                if refusal is not None:
                    raise refusal from error
                if not _may_pass(error):
                    raise
                lasted = time.monotonic() - began
                if lasted + pause > retry.total:
                    raise self._given_up(error, lasted) from error
                if pause == retry.first:
                    self.tell(f"{self.address} is out of reach ({self._said(error)}); trying again")
                if self._hurry.wait(pause):
                    raise KeyboardInterrupt from None
                pause = min(2 * pause, retry.longest)

    def refusal(self, error: Exception) -> BusigenError | None:
        """What to end with where trying again is of no use; None where it may be."""
        kind, (status, code) = type(error).__name__, _answer(error)
        if _may_change(status, code):
            return None
        if "Credentials" in kind:
            return self.kind(
                f"{self.address}: no credentials are found ({self._said(error)}).",
                fix="Log in with the store's own tool, or set its environment variables, such as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS.",
            )
        if kind == "ParamValidationError":
            return self.kind(f"{self.address} is no valid name ({self._said(error)}).", fix="Check the URL's spelling.")
        if isinstance(error, PermissionError) or status in (401, 403):
            return self.kind(
                f"{self.address}: access is denied ({self._said(error)}).",
                fix="Check that the credentials are valid and may list, read, write and delete there, " + _AGAIN,
            )
        if status is not None and self.address.protocol == "s3" and _CHECKSUMS.search(f"{code} {error}"):
            return self.kind(
                f"{self.address} refuses: {self._said(error)}.",
                fix="Set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED, since this server does not know the checksums "
                f"that are sent with requests otherwise; {_AGAIN}",
            )
        fix = fix_of(getattr(error, "errno", None))
        if isinstance(error, OSError) and (fix or error.errno in _HOPELESS):
            return self.kind(
                f"{self.address} refuses: {self._said(error)}.",
                fix=fix or f"Check the URL and the store's settings, {_AGAIN}",
            )
        if status is not None:
            return self.kind(
                f"{self.address} refuses: {self._said(error)}.",
                fix=f"Check the URL, the endpoint and the store's settings, {_AGAIN}",
            )
        if _is_of_settings(error):
            return self.kind(
                f"{self.address} cannot be asked: {self._said(error)}.",
                fix="Check what the store's own tool is set to by files and variables, such as AWS_PROFILE and "
                f"AWS_ENDPOINT_URL (http://host:port), {_AGAIN}",
            )
        return None

    def missing(self) -> BusigenError:
        """The error where the bucket, or whatever holds the place, is not there."""
        holder = str(self.address).partition("://")[2].split("/")[0]
        return self.kind(
            f"{self.address}: there is no {holder!r}.",
            fix="Create it first, or check the URL's spelling and the endpoint.",
        )

    def _given_up(self, error: Exception, lasted: float) -> BusigenError:
        clock = "RequestTimeTooSkewed" in _answer(error)[1]
        return self.kind(
            f"{self.address} cannot be reached or used ({self._said(error)}); tried for {duration(lasted)}.",
            fix=f"{'Set the clock of this machine' if clock else 'Check the network and the endpoint'}, {_AGAIN}",
        )

    def _said(self, error: BaseException) -> str:
        """What an error says, in one line that is not too long."""
        described = self.address.redact(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        text = " ".join(described.split()).rstrip(".")
        return text if len(text) <= 160 else f"{text[:157]}..."

    def aside(self, what: Callable[[], Result], limit: float | None = None) -> Result:
        """Do it once in a thread of its own, and wait for it unless there is a hurry.

        Args:
            what: to be done.
            limit: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: it took longer.
            KeyboardInterrupt: there is a hurry.
        """
        outcome: list[Any] = []
        done = threading.Event()

        def work() -> None:
            try:
                outcome.append((what(), None))
            except BaseException as error:
                outcome.append((None, error))
            done.set()

        began = time.monotonic()
        threading.Thread(target=work, name="store", daemon=True).start()
        while not done.wait(0.2):
            if self._hurry.is_set():
                raise KeyboardInterrupt
            if limit is not None and time.monotonic() - began > limit:
                raise TimeoutError("no answer")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and error code that a store answered with, as the libraries keep them; None where it did not.

    Botocore's errors hold a mapping, and s3fs hides them behind those of the operating system; gcsfs, aiohttp, requests
    and Azure's keep the status as an attribute, or say it in words.
    """
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            break
        response = getattr(found, "response", None)
        if isinstance(response, Mapping):
            described = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return _status(described) or _status(code), code
        for holder, name in ((found, "status"), (found, "status_code"), (found, "code"), (response, "status_code")):
            if status := _status(getattr(holder, name, None)):
                return status, ""
        words = str(found).partition(":")[0]
        if isinstance(found, (OSError, ValueError)) and words in _WORDS:
            return _WORDS[words], ""
        found = found.__cause__
    return None, ""


def _status(found: object) -> int | None:
    """An HTTP status that is no success, which some libraries keep as text."""
    text = str(found)
    return int(text) if re.fullmatch("[3-5][0-9]{2}", text) else None


def _may_change(status: int | None, code: str) -> bool:
    """Whether the same request may be answered otherwise later."""
    if status is None:
        return False
    return status in _PASSING or (status >= 500 and status not in _LASTING) or bool(_PASSING_CODES.search(code))


def _is_of_settings(error: BaseException) -> bool:
    """Whether a library could not even ask, because of how it was set up."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "BotoCoreError" in names:
        return not names & _NETWORK
    # Of what no library has a name for, such as an endpoint without "http://", nothing is known but where it arose.
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    package = "" if place is None else str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return isinstance(error, ValueError) and package not in ("", "busigen", *sys.stdlib_module_names)


def _may_pass(error: Exception) -> bool:
    """Whether it is the network's or the store's, and not a slip of this program."""
    return isinstance(error, OSError) or not type(error).__module__.startswith(("builtins", "busigen"))


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

    def __init__(self, caller: Caller) -> None:
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
