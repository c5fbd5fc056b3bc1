"""The command line: each command parses, calls one function and prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import io
import shlex
import sys
import traceback
from typing import Any, NoReturn

import typer

# Importing the modules adds their commands, in the order of --help.
# isort: off
from busigen.cli import datasets, judging, models, engines, machines  # noqa: F401

# isort: on
from busigen.cli.app import DEBUG, Interrupted, app, stderr
from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError, UsageError


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
        code = app(args=arguments or ["--help"], prog_name="busigen", standalone_mode=False)
    except BusigenError as error:
        _fail(error, debug)
    except misuse as error:
        _fail(_usage_error(error, arguments), debug)
    except Exception as error:
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
    stderr.print(f"error: {error}", style=None if debug else "red")
    sys.exit(error.exit_code)


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
