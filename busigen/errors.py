"""Errors meant for the person at the keyboard, and the exit code each of them ends the process with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BusigenError(Exception):
    """What went wrong, the offending value, and what to do about it, in one line.

    Subclasses set ``exit_code``; the table in ``docs/exit-codes.md`` lists them.
    """

    exit_code = 1

    def __init__(self, problem: str, *, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem} {fix}".strip())


class UsageError(BusigenError):
    """An option has a value that busigen cannot work with."""

    exit_code = 2


class ProviderError(UsageError):
    """What runs the graphs (``--provider``) cannot be used on this machine, or not as it was asked for."""


class InputError(BusigenError):
    """A file or folder given as input is missing, unreadable or not what it claims to be."""

    exit_code = 3


class AccessError(InputError):
    """A file or folder cannot be looked at, and may be sound: no permission, too many open files, a failing disk."""


class OutputError(BusigenError):
    """The output cannot be written: permissions, space, or a folder that belongs to another run."""

    exit_code = 4


class IntegrityError(BusigenError):
    """A file's content is not what its record says: a wrong hash, a missing shard, a tampered bundle."""

    exit_code = 5


class ParityError(BusigenError):
    """An exported graph does not reproduce the checkpoint it came from."""

    exit_code = 6


class MissingDependencyError(BusigenError):
    """A command needs an extra that is not installed."""

    exit_code = 7


class AcceptanceError(BusigenError):
    """The quality gates refuse so many draws that the requested count cannot be reached."""

    exit_code = 8


class FlaggedError(BusigenError):
    """An audit that was told to fail on defects found some."""

    exit_code = 9


class WorkerError(BusigenError):
    """Workers of a run end again and again before their work is done."""

    exit_code = 10


class CapacityError(BusigenError):
    """A batch needs more memory than there is.

    ``rows`` is the number of rows of the engine call that did not fit, ``fits`` how many do; 0 where none, or unknown.
    """

    exit_code = 11

    def __init__(self, problem: str, *, fix: str = "", rows: int = 0, fits: int = 0) -> None:
        super().__init__(problem, fix=fix)
        self.rows, self.fits = rows, fits


INTERRUPTED_EXIT_CODE = 130  # Ctrl-C (SIGINT).
TERMINATED_EXIT_CODE = 143  # SIGTERM, as the shell numbers it: 128 + 15.


@contextmanager
def needs(extra: str, what: str = "this command") -> Iterator[None]:
    """A context that turns a missing module into an error which names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        from busigen.text import install_command

        raise MissingDependencyError(
            f"{what} needs {error.name}, which is not installed.", fix=f"Run {install_command(extra)}."
        ) from error
