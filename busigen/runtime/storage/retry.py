"""Calls to a store that may be out of reach for a while: repeated with growing pauses, then given up with a message."""

from __future__ import annotations

import errno
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from busigen.errors import BusigenError, OutputError
from busigen.runtime.storage.files import fix_of
from busigen.runtime.storage.url import Address
from busigen.text import duration

Result = TypeVar("Result")

_AGAIN = "then run the same command again: what is complete is kept."
_NEVER_TAKEN = (errno.EINVAL, errno.ENOSYS)
"""Beside what :func:`busigen.runtime.storage.files.fix_of` knows: a request that the store will never take."""

_TRANSIENT = (307, 408, 409, 423, 425, 429)
"""HTTP status codes below 500 after which the same request may be answered otherwise."""

_PERMANENT = (501, 505)
"""Those from 500 on after which it is not."""

_TRANSIENT_CODES = re.compile(
    "Throttl|SlowDown|TooManyRequests|LimitExceeded|RequestTimeout|RequestTimeTooSkewed|IncompleteBody|InternalError"
    "|ServiceUnavailable|OperationAborted|PriorRequestNotComplete"
)
"""What S3 calls the like; some of it comes with status 400 or 403."""

_CHECKSUMS = re.compile(
    "checksum|sha-?256|md5|digest|trailer|aws-chunked|contentlength|content-length|header you", re.I
)
"""In the refusal of a server that speaks S3 but does not know the checksums that clients send with it since 2025."""

_STATUS_OF_TEXT = {"Forbidden": 403, "Bad Request": 400}
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
class RetryingCaller:
    """Calls a store, each time in a thread of its own: a call that hangs must not keep anybody from stopping.

    Attributes:
        address: what messages name.
        retry: how long to try.
        notify: called once in a while with a line that says that the store is out of reach.
        kind: of the error that a store which cannot be used ends with.
    """

    address: Address
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    notify: Callable[[str], None] = lambda line: None
    kind: type[BusigenError] = OutputError
    _aborted: threading.Event = field(default_factory=threading.Event)

    def abort(self) -> None:
        """Have all calls end now, with ``KeyboardInterrupt``."""
        self._aborted.set()

    def resume(self) -> None:
        """Have calls take their time again, such as those that tidy up; nobody must be calling."""
        self._aborted.clear()

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
                return self.in_thread(what, retry.attempt)
            except (FileNotFoundError, FileExistsError, BusigenError):
                raise
            except Exception as error:
                refusal = self.refusal(error)
                if refusal is not None:
                    raise refusal from error
                if not _is_transient(error):
                    raise
                lasted = time.monotonic() - began
                if lasted + pause > retry.total:
                    raise self._given_up(error, lasted) from error
                if pause == retry.first:
                    self.notify(f"{self.address} is out of reach ({self._described(error)}); trying again")
                if self._aborted.wait(pause):
                    raise KeyboardInterrupt from None
                pause = min(2 * pause, retry.longest)

    def refusal(self, error: Exception) -> BusigenError | None:
        """What to end with where trying again is of no use; None where it may be."""
        kind, (status, code) = type(error).__name__, _answer(error)
        if _may_change(status, code):
            return None
        if "Credentials" in kind:
            return self.kind(
                f"{self.address}: no credentials are found ({self._described(error)}).",
                fix="Log in with the store's own tool, or set its environment variables, such as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS.",
            )
        if kind == "ParamValidationError":
            return self.kind(
                f"{self.address} is no valid name ({self._described(error)}).", fix="Check the URL's spelling."
            )
        if isinstance(error, PermissionError) or status in (401, 403):
            return self.kind(
                f"{self.address}: access is denied ({self._described(error)}).",
                fix="Check that the credentials are valid and may list, read, write and delete there, " + _AGAIN,
            )
        if status is not None and self.address.protocol == "s3" and _CHECKSUMS.search(f"{code} {error}"):
            return self.kind(
                f"{self.address} refuses: {self._described(error)}.",
                fix="Set AWS_REQUEST_CHECKSUM_CALCULATION=WHEN_REQUIRED, since this server does not know the checksums "
                f"that are sent with requests otherwise; {_AGAIN}",
            )
        fix = fix_of(getattr(error, "errno", None))
        if isinstance(error, OSError) and (fix or error.errno in _NEVER_TAKEN):
            return self.kind(
                f"{self.address} refuses: {self._described(error)}.",
                fix=fix or f"Check the URL and the store's settings, {_AGAIN}",
            )
        if status is not None:
            return self.kind(
                f"{self.address} refuses: {self._described(error)}.",
                fix=f"Check the URL, the endpoint and the store's settings, {_AGAIN}",
            )
        if _is_configuration(error):
            return self.kind(
                f"{self.address} cannot be asked: {self._described(error)}.",
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
            f"{self.address} cannot be reached or used ({self._described(error)}); tried for {duration(lasted)}.",
            fix=f"{'Set the clock of this machine' if clock else 'Check the network and the endpoint'}, {_AGAIN}",
        )

    def _described(self, error: BaseException) -> str:
        """What an error says, in one line that is not too long."""
        described = self.address.redact(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        text = " ".join(described.split()).rstrip(".")
        return text if len(text) <= 160 else f"{text[:157]}..."

    def in_thread(self, what: Callable[[], Result], limit: float | None = None) -> Result:
        """Do it once in a thread of its own, and wait for it unless aborted.

        Args:
            what: to be done.
            limit: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: it took longer.
            KeyboardInterrupt: calls were aborted.
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
            if self._aborted.is_set():
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
        if isinstance(found, (OSError, ValueError)) and words in _STATUS_OF_TEXT:
            return _STATUS_OF_TEXT[words], ""
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
    return status in _TRANSIENT or (status >= 500 and status not in _PERMANENT) or bool(_TRANSIENT_CODES.search(code))


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


def _is_transient(error: Exception) -> bool:
    """Whether it is the network's or the store's, and not a slip of this program."""
    return isinstance(error, OSError) or not type(error).__module__.startswith(("builtins", "busigen"))
