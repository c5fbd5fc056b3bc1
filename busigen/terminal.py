"""The consoles and the log format through which all text goes to the terminal."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from busigen.text import printable, without_credentials


class Terminal(Console):
    """A console that shows each string as it is, in one line: no markup, emoji codes, control codes or credentials."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as rich draws it, in a line or in a table's cell."""
        return super().render_str(shown(text), **options)

    def print_as_json(self, value: Any) -> None:
        """Print a value as JSON in which all but ASCII is escaped."""
        for line in json.dumps(value, indent=2).splitlines():
            self.print(line)


class LineFormatter(logging.Formatter):
    """Formats each record as one line that is safe to print; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name.
        """The line."""
        return shown(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # logging's name.
        """The lines of a traceback."""
        return shown_lines(super().formatException(ei))


def log_to_stderr(level: int) -> None:
    """Log records of this level and above to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler])


def shown(text: str) -> str:
    """Any text as one line."""
    return printable(without_credentials(text))


def shown_lines(text: str) -> str:
    """Any text of several lines, such as a traceback."""
    return "\n".join(shown(line) for line in text.split("\n"))
