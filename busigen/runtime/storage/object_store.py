"""Files below a URL, by way of fsspec: failed calls are repeated, and what was sent is compared with what was meant."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from busigen.errors import BusigenError, MissingDependencyError, OutputError, UsageError
from busigen.files import temporary_name
from busigen.registry import OBJECT_STORES, STORE_EXTRAS, STORE_OPTIONS
from busigen.runtime.storage.files import FIXES
from busigen.runtime.storage.url import Address
from busigen.text import duration, install_command

Result = TypeVar("Result")

_AGAIN = "then run the same command again: what is complete is kept."
_NEVER_TAKEN = (errno.EINVAL, errno.ENOSYS)  # beside those of `FIXES`: a request that the store will never take
_TRANSIENT = {307, 408, 409, 423, 425, 429, *range(500, 600)} - {501, 505}  # after which an answer may differ

_TRANSIENT_CODES = re.compile(
    "Throttl|SlowDown|TooManyRequests|LimitExceeded|RequestTimeout|RequestTimeTooSkewed|IncompleteBody|InternalError"
    "|ServiceUnavailable|OperationAborted|PriorRequestNotComplete"
)  # what S3 calls the like; some of it comes with status 400 or 403

_CHECKSUMS = re.compile(
    "checksum|sha-?256|md5|digest|trailer|aws-chunked|contentlength|content-length|header you", re.I
)  # in the refusal of a server that does not know the checksums that S3's clients send since 2025

_AT_ONCE = 32  # small files that are asked for together
_STATUS_OF_TEXT = {"Forbidden": 403, "Bad Request": 400}  # how gcsfs begins the errors that it gives no status

_NETWORK = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"),
    *("MetadataRetrievalError", "CredentialRetrievalError", "TokenRetrievalError", "CapacityNotAvailableError"),
}  # botocore's errors that time may mend; others, such as of a missing profile, are of settings


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try, in seconds; pauses double from ``first`` to ``longest``."""

    total: float = 300.0  # from the first failure to giving up
    first: float = 1.0
    longest: float = 30.0
    attempt: float | None = None  # of a single one; None for whatever the store's library allows


@dataclass
class RetryingCaller:
    """Calls a store, each time in a thread of its own: a call that hangs must not keep anybody from stopping.

    ``notify`` gets a line once the store is out of reach; ``kind`` is the error that an unusable store ends with.
    While ``aborted`` is set, all calls end at once, with ``KeyboardInterrupt``.
    """

    address: Address
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    notify: Callable[[str], None] = lambda line: None
    kind: type[BusigenError] = OutputError
    aborted: threading.Event = field(default_factory=threading.Event)

    def call(self, what: Callable[[], Result], retry: RetryPolicy | None = None) -> Result:
        """Do, several times if need be, what repetition does not harm; FileNotFoundError and FileExistsError pass."""
        retry = retry or self.retry
        began, pause = time.monotonic(), retry.first
        while True:
            try:
                return self.in_thread(what, retry.attempt)
            except (FileNotFoundError, FileExistsError, BusigenError):
                raise
            except Exception as error:
                if (refusal := self.refusal(error)) is not None:
                    raise refusal from error
                # The network's or the store's, and not a slip of this program.
                if not isinstance(error, OSError) and type(error).__module__.startswith(("builtins", "busigen")):
                    raise
                lasted = time.monotonic() - began
                if lasted + pause > retry.total:
                    clock = "RequestTimeTooSkewed" in _answer(error)[1]
                    raise self.kind(
                        f"{self.address} cannot be reached or used ({self._described(error)}); tried for "
                        f"{duration(lasted)}.",
                        fix=f"{'Set the clock of this machine' if clock else 'Check the network and the endpoint'}, "
                        f"{_AGAIN}",
                    ) from error
                if pause == retry.first:
                    self.notify(f"{self.address} is out of reach ({self._described(error)}); trying again")
                if self.aborted.wait(pause):
                    raise KeyboardInterrupt from None
                pause = min(2 * pause, retry.longest)

    def refusal(self, error: Exception) -> BusigenError | None:
        """What to end with where trying again is of no use; None where it may be."""
        kind, (status, code) = type(error).__name__, _answer(error)
        described, known = self._described(error), FIXES.get(getattr(error, "errno", None) or 0)
        refused = f" refuses: {described}"
        if status is not None and (status in _TRANSIENT or _TRANSIENT_CODES.search(code)):
            return None
        if "Credentials" in kind:
            problem = f": no credentials are found ({described})"
            fix = "Log in with the store's own tool, or set its environment variables, such as AWS_ACCESS_KEY_ID and "
            fix += "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS."
        elif kind == "ParamValidationError":
            problem, fix = f" is no valid name ({described})", "Check the URL's spelling."
        elif isinstance(error, PermissionError) or status in (401, 403):
            problem = f": access is denied ({described})"
            fix = f"Check that the credentials are valid and may list, read, write and delete there, {_AGAIN}"
        elif status is not None and self.address.protocol == "s3" and _CHECKSUMS.search(f"{code} {error}"):
            problem = refused
            fix = "Set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED, since this server does not know the checksums "
            fix += f"that are sent with requests otherwise; {_AGAIN}"
        elif isinstance(error, OSError) and (known or error.errno in _NEVER_TAKEN):
            problem, fix = refused, known or f"Check the URL and the store's settings, {_AGAIN}"
        elif status is not None:
            problem, fix = refused, f"Check the URL, the endpoint and the store's settings, {_AGAIN}"
        elif _is_configuration(error):
            problem = f" cannot be asked: {described}"
            fix = "Check what the store's own tool is set to by files and variables, such as AWS_PROFILE and "
            fix += f"AWS_ENDPOINT_URL (http://host:port), {_AGAIN}"
        else:
            return None
        return self.kind(f"{self.address}{problem}.", fix=fix)

    def missing(self) -> BusigenError:
        """The error where the bucket, or whatever holds the place, is not there."""
        holder = str(self.address).partition("://")[2].split("/")[0]
        problem = f"{self.address}: there is no {holder!r}."
        return self.kind(problem, fix="Create it first, or check the URL's spelling and the endpoint.")

    def _described(self, error: BaseException) -> str:
        described = self.address.redact(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        text = " ".join(described.split()).rstrip(".")
        return text if len(text) <= 160 else f"{text[:157]}..."

    def in_thread(self, what: Callable[[], Result], limit: float | None = None) -> Result:
        """Do it once in a thread of its own; a ``TimeoutError`` after ``limit`` seconds, Ctrl-C if aborted."""
        outcome: Future[Result] = Future()

        def work() -> None:
            try:
                outcome.set_result(what())
            except BaseException as error:
                outcome.set_exception(error)

        began = time.monotonic()
        threading.Thread(target=work, name="store", daemon=True).start()
        while not wait([outcome], 0.2).done:
            if self.aborted.is_set():
                raise KeyboardInterrupt
            if limit is not None and time.monotonic() - began > limit:
                raise TimeoutError("no answer")
        return outcome.result()


class Store:
    """Files below the caller's URL, by names with forward slashes; ``sizes`` has their bytes as of the last look."""

    def __init__(self, caller: RetryingCaller) -> None:
        self.caller, self.address = caller, caller.address
        self._fs, self._root = _opened(caller.address)
        self._renames = caller.address.protocol not in OBJECT_STORES
        self.sizes: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        """Set ``sizes`` to the bytes of every file that is there, by name."""

        def find() -> Any:
            self._fs.invalidate_cache()
            return self._fs.find(self._root, detail=True)

        try:
            # Who mistyped an endpoint should not wait for minutes.
            found = self.caller.call(find, RetryPolicy(total=15.0))
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

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Files with their content, in order, few of which are held at a time; those that are gone are left out."""
        for start in range(0, len(names), _AT_ONCE):
            paths = {self._path(name): name for name in names[start : start + _AT_ONCE]}

            def cat(paths: dict[str, str] = paths) -> list[tuple[str, bytes]]:
                # A single path would come back as bare bytes, and an error of one file would hide all others.
                if len(paths) == 1:
                    return [(name, self._fs.cat_file(path)) for path, name in paths.items()]
                found = self._fs.cat(list(paths), on_error="raise")
                # Some stores hand paths back with a slash before them, or without.
                return [
                    (name, found[path] if path in found else found[path.lstrip("/")]) for path, name in paths.items()
                ]

            try:
                contents = self.caller.call(cat)
            except FileNotFoundError:
                contents = [(name, content) for name in paths.values() if (content := self.read(name)) is not None]
            yield from contents

    def write(self, name: str, content: bytes) -> None:
        """Make a file, or replace it."""
        self._place(name, lambda path: self._fs.pipe_file(path, content), io.BytesIO(content))

    def put(self, local: Path, name: str) -> None:
        """Copy a local file there."""
        with local.open("rb") as file:
            self._place(name, lambda path: self._fs.put_file(str(local), path), file)

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
        """Copy a file to the local disk; a ``FileNotFoundError`` says that it is not there."""
        local.parent.mkdir(parents=True, exist_ok=True)
        self.caller.call(lambda: self._fs.get_file(self._path(name), str(local)))

    def _place(self, name: str, send: Callable[[str], object], file: io.BytesIO | io.BufferedReader) -> None:
        """Send a file until what is there has its bytes."""
        path = self._path(name)
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

        def check(path: str) -> None:
            self._fs.invalidate_cache()
            info = self._fs.info(path)
            if info.get("size") == size:
                if _stated_md5(info) == md5:
                    return
                # No MD5 of the whole file: it came in several parts, is encrypted, or the store tells none.
                digest = hashlib.sha256()
                with self._fs.open(path, "rb", cache_type="none") as arrived:
                    while block := arrived.read(1 << 22):
                        digest.update(block)
                if digest.hexdigest() == sha256:
                    return
            raise OSError(errno.EIO, f"{path.rpartition('/')[2]} arrived damaged")

        def work() -> None:
            if not self._renames:
                send(path)
                check(path)
                return
            self._make_folder(name)
            folder, _, last = path.rpartition("/")
            temporary = f"{folder}/{temporary_name(last)}"
            try:
                send(temporary)
                check(temporary)
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

    def _make_folder(self, name: str) -> None:
        self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _opened(address: Address) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path in it."""
    protocol = address.protocol

    def lacking(what: str) -> MissingDependencyError:
        brought = protocol in STORE_EXTRAS or what == "fsspec"
        fix = f"Run {install_command(STORE_EXTRAS.get(protocol, 'remote'))}." if brought else f"{what.rstrip('.')}."
        return MissingDependencyError(f"{address} needs a package that is not installed.", fix=fix)

    try:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
    except ModuleNotFoundError as error:
        raise lacking("fsspec") from error
    # What its user configured for fsspec comes first.
    options = {
        name: value for name, value in STORE_OPTIONS.get(protocol, {}).items() if name not in conf.get(protocol, {})
    }
    try:
        fs, root = url_to_fs(address.url, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError as error:
        raise lacking(address.redact(str(error))) from error
    except ValueError as error:
        raise UsageError(
            f"{address}: {address.redact(str(error))}.",
            fix="Give a folder, or a URL such as s3://bucket/name or gs://bucket/name.",
        ) from error
    return fs, str(root)


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


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and error code that a store answered with; None where it did not."""
    # Botocore's errors hold a mapping, which s3fs hides; the others' keep the status as an attribute, or in words.
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
        if isinstance(found, (OSError, ValueError)) and words in _STATUS_OF_TEXT:
            return _STATUS_OF_TEXT[words], ""
        found = found.__cause__
    return None, ""


def _status(found: object) -> int | None:
    """An HTTP status that is no success, which some libraries keep as text."""
    return int(str(found)) if re.fullmatch("[3-5][0-9]{2}", str(found)) else None


def _is_configuration(error: BaseException) -> bool:
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
