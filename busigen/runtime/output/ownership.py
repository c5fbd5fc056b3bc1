"""Whose a dataset's place is: the run record that it holds, and refusing whatever belongs to another run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import polars as pl

import busigen
from busigen.errors import IntegrityError, OutputError
from busigen.files import is_temporary
from busigen.records import checked
from busigen.runtime.backends.bundle import unproven
from busigen.runtime.dataset.format import FIELDS, RUN_FILE, WRITTEN, Plan, changed_options, decided, differences
from busigen.runtime.dataset.reader import RunRecord, refuse_newer
from busigen.runtime.dataset.sample import Source
from busigen.runtime.storage.lock import is_lock
from busigen.runtime.storage.url import Address
from busigen.text import counted

_SHOWN = 3
_NOT_COMPARED = {"engine_batches": None, "options": None, "versions": None, "sources": None, "unproven": None}


def run_record(source: Source, plan: Plan) -> dict[str, Any]:
    """What ``run.json`` holds: all that decides which samples exist, and the versions that decide their bytes."""
    fingerprint = dict(source.fingerprint())
    batches = fingerprint.pop("engine_batches", None)
    missing = unproven(fingerprint) if "checkpoint" in fingerprint else []
    record = {
        "schema_version": plan.schema_version,
        "busigen": busigen.__version__,
        "config": plan.config(),
        "columns": {name: kind.__name__ for name, kind in source.row_types().items()},
        "fingerprint": fingerprint,
        # Stored, not compared: older records do not say it.
        **({"engine_batches": batches} if batches else {}),
        **({"unproven": missing} if missing else {}),
        # Stored, not compared: a folder may be renamed, and another Pillow may pack the same pixels into other bytes,
        # but they stay the same samples.
        "options": source.options(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "polars": pl.__version__,
        },
    }
    # Through JSON, so that a tuple equals the list that comes back from the file.
    normal: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return normal


def refuse_other_run(
    out: Path | Address, existing: Mapping[str, Any], source: Source, plan: Plan, healthy: Path
) -> None:
    """Refuse early what would be refused once ``healthy`` is read, whose images ``source`` lacks."""
    run = run_record(source, plan)
    run["options"]["--healthy"] = Path(os.path.realpath(healthy)).name
    before = decided(existing, "--healthy")
    run["fingerprint"]["healthy"] = before if before != run["fingerprint"]["healthy"] else None
    refuse_other(out, existing, run)


def refuse_foreign(out: Path | Address, names: Iterable[str]) -> None:
    """Refuse a place that holds files, of these names, and no run record.

    A run that was killed before it could write ``run.json`` may leave locks and temporary files.
    """
    foreign = sorted(
        (name for name in names if not is_lock(name) and not is_temporary(name, WRITTEN)),
        key=lambda name: ("/" in name, name),
    )
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{out} holds other files ({', '.join(foreign[:3])}{more}) and no {RUN_FILE}.",
            fix="Choose an --out that is empty or does not exist.",
        )


def checked_run(run: Any, path: Path | Address) -> dict[str, Any]:
    """A run record that was read from ``path``; raises if it is newer than this busigen, or none."""
    if isinstance(run, dict):
        refuse_newer(run, path)
    try:
        checked(RunRecord, run, path, fix="")
    except IntegrityError as error:
        raise unreadable_run(path, error.problem) from error
    found: dict[str, Any] = run
    return found


def refuse_other(out: Path | Address, existing: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise an ``OutputError`` if the records of two runs differ in what decides which samples exist."""
    options = changed_options(existing, run)
    shown = shown_changes({**existing, **_NOT_COMPARED}, {**run, **_NOT_COMPARED}, options)
    if not shown:
        return
    fix = "Choose another --out, or repeat the options that the folder was started with."
    if list(options) == ["--count"]:
        fix += " For more samples, generate them with another --seed into another --out, and join both with "
        fix += "`busigen merge`."
    raise OutputError(f"{out} belongs to another run ({'; '.join(shown)}).", fix=fix)


def shown_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], options: Mapping[str, str] | None = None
) -> list[str]:
    """In what two run records, or what counts of them, differ, in words: by the options that decide it, else by fields.

    ``options`` are those of the whole records, which know the names of folders.
    """
    changed = differences(old, new)
    if not changed:
        return []
    options = changed_options(old, new) if options is None else options
    known = tuple(".".join(FIELDS[option]) for option in options)
    rest = [(name, old, new) for name, old, new in changed if not name.startswith(known)]
    shown = [f"{option}: {change}" for option, change in options.items()]
    # What follows from a changed option, such as another bundle's preset, is counted; alone it has to be shown.
    if not options:
        shown += [f"{name}: {_short(old)} -> {_short(new)}" for name, old, new in rest[:_SHOWN]]
        rest = rest[_SHOWN:]
    if rest:
        shown.append(f"and {counted(len(rest), 'more field')} of {RUN_FILE}")
    return shown


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unreadable_run(path: Path | Address, why: str) -> OutputError:
    """The error where a ``run.json`` is none."""
    return OutputError(f"{path} is not a run record of busigen: {why.rstrip('.')}.", fix="Choose another --out.")
