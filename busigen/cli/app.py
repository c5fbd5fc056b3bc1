"""The typer application, and helpers that its commands share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from busigen import __version__
from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError
from busigen.terminal import Terminal, log_to_stderr

app = typer.Typer(
    name="busigen",
    help="Turn healthy breast-ultrasound images into benign or malignant ones, with the exact lesion mask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done, 2 usage, 3 input, 4 output, 5 integrity, 6 parity, 7 missing extra, 8 acceptance, "
    "9 flagged or cannot run, 10 workers lost, 11 memory, 130 interrupted, 143 terminated. See docs/exit-codes.md.",
)
stdout, stderr = Terminal(), Terminal(stderr=True)

DEBUG = "--debug"
# Libraries that log how they load files, which is of no use to a user.
_NOISY = (
    "absl",
    "aiobotocore",
    "botocore",
    "httpx",
    "httpx2",
    "onnx_ir",
    "onnxscript",
    "PIL",
    "tensorboard",
    "torch",
    "urllib3",
)


class Interrupted(BusigenError):
    """A command that was ended by Ctrl-C."""

    exit_code = INTERRUPTED_EXIT_CODE


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"busigen {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show a traceback with an error; works after a command, too.")
    ] = False,
) -> None:
    log_to_stderr(logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context without warnings, which libraries raise about their own deprecations."""
    import warnings

    logging.getLogger("diffusers").setLevel(logging.ERROR)  # It sets a level of its own when it is imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
