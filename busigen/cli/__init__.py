"""The command line: each command parses, calls one function and prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
import traceback
from typing import Any, NoReturn

import typer

# Importing the modules adds their commands, in the order of --help.
# isort: off
from busigen.cli import generate, audit, train_export, doctor  # noqa: F401

# isort: on
from busigen.cli.app import DEBUG, Interrupted, app, stderr
from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError, OutputError, UsageError
from busigen.foreign import access_error


def main() -> None:
    """Run the command line; an error of the user's becomes one line and its exit code."""
    # click's base class of usage errors: typer does not export it, and newer versions have a click of their own.
    misuse: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A letter that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        _refuse_unusable(arguments)
        code = app(args=arguments or ["--help"], prog_name="busigen", standalone_mode=False)
    except BusigenError as error:
        _fail(error, debug)
    except misuse as error:
        _fail(_usage_error(error, arguments), debug)
    except SystemExit as end:
        # Where nobody reads from the pipe that standard output is, rich and click end like this.
        _fail(_unheard(os.strerror(errno.EPIPE)), debug) if end.code == 1 else sys.exit(end.code)
    except Exception as error:
        if isinstance(error, OSError) and (described := _of_system(error)):
            _fail(described, debug)
        if debug:
            _print_traceback()
        else:
            stderr.print(
                f"error: {type(error).__name__}: {error}. This is a bug: run again with --debug and report it."
            )
        sys.exit(1)
    # A command that has nothing of its own to say of Ctrl-C ends with this code and without a word.
    if code == INTERRUPTED_EXIT_CODE:
        _fail(Interrupted("Interrupted."), debug)
    sys.exit(code)


def _fail(error: BusigenError, debug: bool) -> NoReturn:
    if debug:
        _print_traceback()
    # Where standard error is full or closed, the exit code has to do.
    with contextlib.suppress(OSError):
        stderr.print(f"error: {error}", style=None if debug else "red")
    sys.exit(error.exit_code)


def _refuse_unusable(arguments: list[str]) -> None:
    """Refuse arguments that no command can work with, before any begins.

    Raises:
        UsageError: one is empty, as an unset variable of the shell makes it: as a path, it would be the current folder.
            Or it is no UTF-8: neither JSON nor a table could name it.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        name = option or (before if before.startswith("--") else "an argument")
        if not value and (equals or not option):
            raise UsageError(
                f"{name} is empty.", fix="Give it a value, or leave it out; a shell variable may be unset."
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{name} is {value}, whose name is no UTF-8: no record could hold it.",
                fix="Rename the file or folder, or make a link of another name to it.",
            ) from None


def _of_system(error: OSError) -> BusigenError | None:
    """What is no bug of this program's: nobody hears what it prints, or the system does not let it look."""
    # A file that cannot be written is named, and told by those who write it.
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE):
        return _unheard(os.strerror(error.errno))
    return access_error(error)


def _unheard(reason: str) -> OutputError:
    # What Python still holds for it would be written, and fail, when the process ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(
        f"standard output cannot be written to: {reason}.",
        fix="All that was made before is kept; what would have been printed is lost.",
    )


def _print_traceback() -> None:
    """Python's own account of the error that is being handled, which quotes what it came from."""
    for line in traceback.format_exc().splitlines():
        stderr.print(line)


def _usage_error(error: Any, arguments: list[str]) -> UsageError:
    """Put what click would spread over a box of several lines into one, with the value, which click may leave out."""
    problem = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return UsageError(
        f"{problem} (in: {shlex.join(['busigen', *arguments])}).",
        fix=f"See: {context.command_path if context else 'busigen'} --help",
    )
