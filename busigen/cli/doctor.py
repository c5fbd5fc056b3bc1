"""The command that examines the machine: doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from busigen.cli.app import app, stdout
from busigen.errors import FlaggedError


@app.command(
    epilog="Examples: `busigen doctor`; `busigen doctor --json --out /data/run`. Exit codes: 0 generate can run, "
    "9 it cannot."
)
def doctor(
    out: Annotated[Path, typer.Option(help="Folder that datasets would be written into.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can run, what it cannot and why, and what helps."""
    from busigen.runtime.diagnostics.doctor import State, can_generate, examine, to_json

    findings = []
    for finding in examine(out):
        findings.append(finding)
        if not as_json:
            stdout.print(f"{finding.state:8} {finding.name}: {finding.described}")
            if finding.fix:
                stdout.print(f"{'':8} -> {finding.fix}")
    if as_json:
        stdout.print_as_json(to_json(findings))
    if not can_generate(findings):
        broken = next(finding for finding in findings if finding.state is State.PROBLEM)
        raise FlaggedError(f"generate cannot run here: {broken.name}: {broken.described}.", fix=broken.fix)
