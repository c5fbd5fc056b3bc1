"""Mending a damaged dataset: only what is damaged or missing is made again, and to no other bytes than recorded."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError, IntegrityError, OutputError
from busigen.runtime.atomic import atomic_file, leftovers, output_errors, sha256_of, write_json
from busigen.runtime.collection import COLLECTION_FILES, parts_of, recorded_sources, write_collection
from busigen.runtime.dataset import link_refused, plan_of, read_members, read_object
from busigen.runtime.finish import finish, run_of
from busigen.runtime.foresight import require_room
from busigen.runtime.history import listed_shards
from busigen.runtime.layout import (
    DATASET_FILE,
    FINISHED_FILES,
    MANIFEST_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    differences,
    shard_files,
    shard_path,
)
from busigen.runtime.lock import exclusive, forget_tasks
from busigen.runtime.redraw import Repair, draw_again, expected_files, hash_or_none, listed_files, standing_record
from busigen.runtime.replay import Inputs
from busigen.runtime.shards import ShardRecord, schema_of, write_table
from busigen.runtime.standing import complete_shards
from busigen.runtime.tables import read_table
from busigen.runtime.verify import VerifyReport, combined, has_run, read_run, types_of, verify
from busigen.runtime.verify_parts import check_collection
from busigen.runtime.verify_shard import LEAST_SAMPLE
from busigen.runtime.wording import told


class RepairInterrupted(BusigenError):
    """The person pressed Ctrl-C; every file that was put back is kept."""

    exit_code = INTERRUPTED_EXIT_CODE


@dataclass(frozen=True)
class RepairReport:
    """What ``repair`` did.

    Attributes:
        repaired: each file that was put back, with how, in the order of the work.
        refused: what could not be repaired, and why.
        after: what ``verify`` says now.
        error: what the command ends with; None if the dataset is sound now.
    """

    repaired: tuple[str, ...]
    refused: tuple[str, ...]
    after: VerifyReport
    error: BusigenError | None


def repair(folder: Path, *, inputs: Inputs | None = None) -> RepairReport:
    """Make again what ``verify`` finds damaged or missing, and leave everything else as it is.

    A shard is drawn again beside the dataset and compared with the hashes that its record or ``dataset.json`` holds;
    only files that differ are replaced, by rename. A table whose tar is whole is written from that, without drawing.
    The files that describe the whole dataset follow from the shards. Killed half way, it can be given again.

    Args:
        folder: the dataset.
        inputs: where the run's bundle and healthy images lie; None for the shipped bundle. They are opened only if a
            shard has to be drawn.

    Raises:
        InputError: ``folder`` is no busigen dataset.
        IntegrityError: ``run.json`` and ``dataset.json`` contradict each other.
        OutputError: another process holds the folder, its shards lie elsewhere, it cannot be written, or the disk has
            no room for the samples that are missing.
        RepairInterrupted: on Ctrl-C.
    """
    inputs = inputs or Inputs()
    places = parts_of(folder)
    if not places:
        return _repair_alone(folder, inputs)
    reports = [_repair_alone(place, inputs) for place in places]
    names = [place.relative_to(folder).as_posix() for place in places]
    repaired = [f"{name}/{line}" for name, report in zip(names, reports, strict=True) for line in report.repaired]
    refused = [f"{name}/{line}" for name, report in zip(names, reports, strict=True) for line in report.refused]
    error = next((report.error for report in reports if report.error is not None), None)
    if error is None and check_collection(folder):
        with output_errors(folder), exclusive(folder):
            write_collection(folder, recorded_sources(folder))
        repaired.append(f"{', '.join(COLLECTION_FILES)}: written again from the parts")
    after = combined(folder, [report.after for report in reports])
    if error is None and not after.ok:
        error = _not_in_full(folder)
    return RepairReport(tuple(repaired), tuple(refused), after, error)


def _repair_alone(folder: Path, inputs: Inputs) -> RepairReport:
    # Before the lock's file is written: a folder that is no dataset is left as it is.
    plan = plan_of(read_run(folder), folder / RUN_FILE)
    if (folder / SHARD_FOLDER).is_symlink():  # A linked file is replaced; what lies in a linked folder is not ours.
        raise link_refused(folder / SHARD_FOLDER, OutputError)
    missing = plan.count - _samples_there(folder, plan)
    if missing:
        require_room(folder, replace(plan, count=missing), {})
    with output_errors(folder):
        lock = exclusive(folder)
        lock.__enter__()
    try:
        return _repair(folder, inputs)
    except KeyboardInterrupt:
        raise RepairInterrupted(
            f"Interrupted; what was repaired in {folder} is kept.", fix="Run the same command again to continue."
        ) from None
    finally:
        lock.__exit__(None, None, None)


def _repair(folder: Path, inputs: Inputs) -> RepairReport:
    work = _opened(folder)
    with output_errors(folder):
        (folder / SHARD_FOLDER).mkdir(exist_ok=True)
        forget_tasks(folder)
        for path in leftovers(folder, WRITTEN) + leftovers(folder / SHARD_FOLDER, WRITTEN):
            path.unlink()
            work.repaired.append(f"{path.relative_to(folder).as_posix()}: a killed run's temporary file removed")
        if not has_run(folder):
            write_json(folder / RUN_FILE, work.run)
            work.repaired.append(f"{RUN_FILE}: written again from {DATASET_FILE}")
    before = verify(folder, healthy=inputs.healthy, progress=inputs.progress)
    blamed = {problem.file for problem in before.problems}
    numbers = [number for number in _damaged(work, blamed) if not _table_from_tar(work, number, blamed)]
    error = draw_again(work, numbers, inputs) if numbers else None
    if error is None and not work.refused:
        _finish(work, blamed)
    after = verify(folder, healthy=inputs.healthy, progress=inputs.progress) if work.repaired else before
    if error is None and (work.refused or not after.ok):
        error = _not_in_full(folder)
    return RepairReport(tuple(work.repaired), tuple(work.refused), after, error)


def _samples_there(folder: Path, plan: Plan) -> int:
    """Samples of the shards that are there, as far as sizes tell."""
    records = complete_shards(folder, plan).values()
    return sum(record.count for record in records if record.tar.size >= LEAST_SAMPLE * record.count)


def _not_in_full(folder: Path) -> IntegrityError:
    return IntegrityError(f"{folder} could not be repaired in full.", fix="See what is still wrong above.")


def _opened(folder: Path) -> Repair:
    run, info = read_run(folder), read_object(folder / DATASET_FILE)
    changed = differences(run, run_of(info)) if info else []
    if changed:
        named = "; ".join(f"{name}: {told(a)} and {told(b)}" for name, a, b in changed[:3])
        raise IntegrityError(
            f"{RUN_FILE} and {DATASET_FILE} contradict each other ({named}), and nothing tells which is right.",
            fix="Delete the one that is wrong and give the same command again: it is written anew from the other.",
        )
    plan = plan_of(run, folder / RUN_FILE)
    try:
        manifest = read_table(folder / MANIFEST_FILE, plan.count)
    except (OSError, pl.exceptions.PolarsError):
        manifest = None
    return Repair(folder, run, plan, types_of(run), listed_shards(info or {}), manifest)


def _damaged(work: Repair, blamed: set[str]) -> list[int]:
    """Shards of which verify blames a file, and those whose record is not the one that ``dataset.json`` lists.

    Behind such a record, a shard and its hashes may have been changed together.
    """
    found = []
    for number in work.plan.numbers:
        record = standing_record(work.folder, number)
        expected = listed_files(work, number)
        if record is None or shard_files(number) & blamed or expected not in (None, (record.tar, record.parquet)):
            found.append(number)
    return found


def _table_from_tar(work: Repair, number: int, blamed: set[str]) -> bool:
    """Write a shard's table from its tar if that table alone is damaged, and what is recorded of the two agrees."""
    record, expected = standing_record(work.folder, number), expected_files(work, number)
    alone = shard_files(number) & blamed == {shard_path(number, "parquet")}
    if record is None or not alone or expected != [(record.tar, record.parquet)]:
        return False
    try:
        if sha256_of(work.folder / record.tar.file) != record.tar.sha256:
            return False
        rows = [member.row for member in read_members(work.folder / record.tar.file, work.plan.indices(number))]
        table = io.BytesIO()
        write_table(pl.DataFrame(rows, schema=schema_of(work.types)), table)
    except (OSError, IntegrityError, pl.exceptions.PolarsError, TypeError):
        return False
    if hashlib.sha256(table.getbuffer()).hexdigest() != record.parquet.sha256:
        return False
    with output_errors(work.folder), atomic_file(work.folder / record.parquet.file) as file:
        file.write(table.getbuffer())
    work.repaired.append(f"{record.parquet.file}: written again from {record.tar.file}, to the recorded bytes")
    return True


def _finish(work: Repair, blamed: set[str]) -> None:
    """Write the files that describe the whole dataset if one of them is to blame."""
    if not blamed & set(FINISHED_FILES):
        return
    hashes = {name: hash_or_none(work.folder / name) for name in FINISHED_FILES}
    records = [ShardRecord.read(work.folder, number) for number in work.plan.numbers]
    with output_errors(work.folder):
        finish(work.folder, work.run, records)
    for name in FINISHED_FILES:
        if hash_or_none(work.folder / name) != hashes[name]:
            work.repaired.append(f"{name}: written again from the shards")
