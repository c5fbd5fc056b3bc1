"""Whose an output folder is: the run record that it holds, and refusing whatever belongs to another run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import polars as pl

import busigen
from busigen.errors import IntegrityError, OutputError
from busigen.files import is_temporary, leftovers, make_folder, write_json
from busigen.records import checked, read_json
from busigen.runtime.backends.bundle import unproven
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    FIELDS,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    changed_options,
    decided,
    differences,
)
from busigen.runtime.dataset.reader import RunRecord, link_refused, links, read_object, refuse_newer
from busigen.runtime.dataset.sample import Source
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive, forget_tasks, is_lock, joined, living, turn
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


@contextmanager
def acquire_run(out: Path, run: Mapping[str, Any], part: Plan | None = None) -> Iterator[dict[str, Any]]:
    """Hold ``out`` for this run until the block ends; create it, or continue the run whose record it then yields.

    Args:
        out: the dataset's folder.
        run: what this run would record.
        part: hold the shards of this plan alone, beside tasks that hold others; None holds the whole folder.

    Raises:
        InputError: the dataset there is newer than this busigen.
        OutputError: the folder holds something else, belongs to another run or process, or cannot be written.
    """
    with output_errors(out):
        # Before anything is made or removed: the folder may be somebody else's.
        existing_run(out)
        read_object(out / DATASET_FILE)  # For its schema alone: what is newer is not made again.
        make_folder(out / SHARD_FOLDER)
        lock = joined(out, part.numbers) if part else exclusive(out)
        lock.__enter__()
    try:
        with output_errors(out), turn(out) if part else nullcontext():
            # Again: another run may have begun here before the lock was held.
            existing = existing_run(out)
            if existing is not None:
                refuse_other(out, existing, run)
            # A temporary file may be that of another task, as long as there is one.
            if part is None or len(living(out)) == 1:
                for path in leftovers(out, WRITTEN) + leftovers(out / SHARD_FOLDER, WRITTEN):
                    path.unlink()
            if part is None:
                forget_tasks(out)
            if existing is None:
                existing = dict(run)
                write_json(out / RUN_FILE, existing)
        yield existing
    finally:
        lock.__exit__(None, None, None)


def existing_run(out: Path) -> dict[str, Any] | None:
    """The run record in a folder; None where a run could begin.

    Raises:
        InputError: the dataset is newer than this busigen.
        OutputError: the folder holds something else, a damaged record, or a link in a dataset's place.
    """
    path = out / RUN_FILE
    with output_errors(out):
        if out.is_dir():
            if linked := links(out):
                raise link_refused(linked[0], OutputError)
            if not path.exists():
                names = [p.name for p in out.iterdir() if p.name != SHARD_FOLDER]
                if (out / SHARD_FOLDER).is_dir():
                    names += [f"{SHARD_FOLDER}/{p.name}" for p in (out / SHARD_FOLDER).iterdir()]
                refuse_foreign(out, names)
        elif out.exists():
            raise OutputError(f"{out} is a file, not a folder.", fix="Choose another --out.")
        try:
            return checked_run(read_json(path, root=out), path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _unreadable(path, str(error)) from error


def refuse_other_run(
    out: Path | Address, existing: Mapping[str, Any], source: Source, plan: Plan, healthy: Path
) -> None:
    """Refuse early what :func:`acquire_run` would once ``healthy`` is read, whose images ``source`` lacks."""
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
        raise _unreadable(path, error.problem) from error
    found: dict[str, Any] = run
    return found


def refuse_other(out: Path | Address, existing: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise an ``OutputError`` if the records of two runs differ in what decides which samples exist."""
    shown = shown_changes({**existing, **_NOT_COMPARED}, {**run, **_NOT_COMPARED}, existing, run)
    if not shown:
        return
    fix = "Choose another --out, or repeat the options that the folder was started with."
    if list(changed_options(existing, run)) == ["--count"]:
        fix += " For more samples, generate them with another --seed into another --out, and join both with "
        fix += "`busigen merge`."
    raise OutputError(f"{out} belongs to another run ({'; '.join(shown)}).", fix=fix)


def shown_changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_options: Mapping[str, Any] | None = None,
    new_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """In what two run records differ, in words: by the options that decide it, else by some fields.

    ``old`` and ``new`` may be what counts of the records; the whole of them, for the names of folders, comes after.
    """
    changed = differences(old, new)
    if not changed:
        return []
    options = changed_options(old_options or old, new_options or new)
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


def _unreadable(path: Path | Address, why: str) -> OutputError:
    return OutputError(f"{path} is not a run record of busigen: {why.rstrip('.')}.", fix="Choose another --out.")
