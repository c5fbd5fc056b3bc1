"""The command line: each command parses, calls one function and prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import sys
import traceback
from typing import Any, NoReturn

import typer

# Importing the modules adds their commands, in the order of --help.
from busigen.cli import generate  # noqa: F401

# isort: split
from busigen.cli import convert, grid, reader_study, train_export, view  # noqa: F401

# isort: split
from busigen.cli.app import DEBUG, Interrupted, app, stderr
from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError, OutputError, UsageError
from busigen.foreign import access_error


def main() -> None:
    """Run the command line; a user's mistake is printed as one line and ends with its exit code."""
    # click's base class of usage errors: typer does not export it, and newer versions have a click of their own.
    misuse: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Letters that the terminal's encoding lacks are printed as escapes.
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
        # rich and click exit with 1 where standard output is a pipe that nobody reads from.
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
    # A command that does not handle Ctrl-C itself returns this code without printing anything.
    if code == INTERRUPTED_EXIT_CODE:
        _fail(Interrupted("Interrupted."), debug)
    sys.exit(code)


def _fail(error: BusigenError, debug: bool) -> NoReturn:
    if debug:
        _print_traceback()
    # If standard error is full or closed, only the exit code can say what happened.
    with contextlib.suppress(OSError):
        stderr.print(f"error: {error}", style=None if debug else "red")
    sys.exit(error.exit_code)


def _refuse_unusable(arguments: list[str]) -> None:
    """Refuse arguments that no command can work with, before any begins.

    These are empty ones, as an unset variable of the shell makes them (as a path, the current folder), and those that
    are no UTF-8, which neither JSON nor a table could name.
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
    """The error to report where the system refused output or access, which is no bug; None for any other."""
    # An error that names a file belongs to whoever wrote it, and was turned into a message there.
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE):
        return _unheard(os.strerror(error.errno))
    return access_error(error)


def _unheard(reason: str) -> OutputError:
    # Python would write what it still buffers, and fail, when the process ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(
        f"standard output cannot be written to: {reason}.",
        fix="All that was made before is kept; what would have been printed is lost.",
    )


def _print_traceback() -> None:
    """Print the traceback of the error that is being handled, with control characters made visible."""
    for line in traceback.format_exc().splitlines():
        stderr.print(line)


def _usage_error(error: Any, arguments: list[str]) -> UsageError:
    """Turn a usage error of click, which prints a box of several lines, into one line with the value."""
    problem = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    # The message alone names the type in every version of typer.
    kind = re.search(r"valid (integer|float|number)", problem)
    wanted = "whole number, such as 100" if kind and kind[1] == "integer" else "number, such as 0.2"
    example = f"Give a {wanted}. " if kind else ""
    return UsageError(
        f"{problem} (in: {shlex.join(['busigen', *arguments])}).",
        fix=f"{example}See: {context.command_path if context else 'busigen'} --help",
    )
