"""How a missing extra is installed here, for error messages."""

from __future__ import annotations

from pathlib import Path

import busigen


def install_command(extra: str) -> str:
    """The command that installs an extra: from the source checkout that this package runs from, else by its name."""
    checkout = Path(busigen.__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"`pip install -e '.[{extra}]'` in {checkout}"
    return f"`pip install 'busigen[{extra}]'`"
