"""Shards of a damaged dataset drawn again, and put in place where their bytes are those that were recorded."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError, IntegrityError, OutputError
from busigen.files import atomic_file, leftovers, make_folder, sha256_of, write_json
from busigen.foreign import refuse_links
from busigen.records import checked
from busigen.runtime.dataset.collection import COLLECTION_FILES, parts_of, recorded_sources, write_collection
from busigen.runtime.dataset.finalize import finish, run_of
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    FINISHED_FILES,
    FIRST_SCHEMA_VERSION,
    MANIFEST_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    differences,
    shard_files,
    shard_path,
)
from busigen.runtime.dataset.reader import link_refused, plan_of, read_members, read_object
from busigen.runtime.dataset.sample import Source
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, schema_of, write_shard, write_table
from busigen.runtime.dataset.untrusted import read_table
from busigen.runtime.execution.estimate import require_room
from busigen.runtime.maintenance.explain import listed_shards
from busigen.runtime.maintenance.replay import BYTES_ONLY, Inputs, other_conditions, refuse_other_samples
from busigen.runtime.maintenance.verify import (
    VerifyReport,
    combined,
    has_run,
    read_run,
    types_of,
    verify,
)
from busigen.runtime.maintenance.verify_collection import check_collection
from busigen.runtime.maintenance.verify_shard import LEAST_SAMPLE
from busigen.runtime.output.base import LocalOutput
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive, forget_tasks
from busigen.text import counted, describe


@dataclass
class Repair:
    """A repair at work: what is known of the dataset, and what has been done."""

    folder: Path
    run: dict[str, Any]
    plan: Plan
    types: dict[str, type]
    listed: dict[int, dict[str, Any]]
    manifest: pl.DataFrame | None
    repaired: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def existing_record(folder: Path, number: int) -> ShardRecord | None:
    """A shard's own record; None if it is missing, damaged or a link."""
    try:
        refuse_links(folder / shard_path(number, "json"), folder)
        return ShardRecord.read(folder, number)
    except (OSError, IntegrityError):
        return None


def listed_files(work: Repair, number: int) -> tuple[FileRecord, FileRecord] | None:
    """Tar and table of a shard as ``dataset.json`` lists them."""
    entry = work.listed.get(number, {})
    try:
        tar, parquet = (checked(FileRecord, entry.get(kind), DATASET_FILE, fix="") for kind in ("tar", "parquet"))
    except IntegrityError:
        return None
    return tar, parquet


def expected_files(work: Repair, number: int) -> list[tuple[FileRecord, FileRecord]]:
    """What is recorded of a shard's tar and table: by ``dataset.json``, by the shard's own record, or by neither."""
    record = existing_record(work.folder, number)
    recorded = [listed_files(work, number), (record.tar, record.parquet) if record else None]
    return list(dict.fromkeys(pair for pair in recorded if pair is not None))


def draw_again(work: Repair, numbers: list[int], inputs: Inputs) -> BusigenError | None:
    """Draw shards again and put back what differs; the error is what kept it from drawing any."""
    try:
        source = inputs.open(work.run)
        refuse_other_samples(work.run, source)
    except BusigenError as error:
        named = ", ".join(shard_path(number, "tar") for number in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
        work.refused.append(f"{counted(len(numbers), 'shard')} ({named}): {error.problem}")
        return error
    progress = inputs.progress
    progress.start("drawing again", sum(len(work.plan.indices(number)) for number in numbers))
    try:
        for number in numbers:
            generated = source.draw(work.plan.seed, work.plan.indices(number), progress.advance)
            with tempfile.TemporaryDirectory(prefix="busigen-") as name:
                fresh = Path(name)
                with output_errors(fresh):
                    (fresh / SHARD_FOLDER).mkdir()
                    record = write_shard(fresh, number, generated, source.row_types())
                with output_errors(work.folder):
                    _replace(work, number, fresh, record, source)
    except BusigenError as error:
        return error
    finally:
        progress.stop()
    return None


def _replace(work: Repair, number: int, fresh: Path, record: ShardRecord, source: Source) -> None:
    """Put those files of a shard in place that differ from the ones drawn again, if these are what was recorded."""
    expected = expected_files(work, number)
    matching = [pair for pair in expected if _fits(work.folder, fresh, record, pair)]
    if expected and not matching:
        work.refused.append(f"{record.tar.file}: drawn again, it differs from what is recorded{_why(work, source)}.")
        return
    if not expected:
        reason = _unproven(work, fresh, record, source)
        if reason is not None:
            work.refused.append(f"{record.tar.file}: {reason}")
            return
    how = "drawn again, to the recorded bytes" if expected else "drawn again; no record of its bytes is left"
    kept = replace(record, parquet=matching[0][1]) if matching else record
    for file in (kept.tar, kept.parquet):
        if hash_or_none(work.folder / file.file) != file.sha256:
            _put(work.folder, file.file, fresh / file.file)
            work.repaired.append(f"{file.file}: {how}")
    if existing_record(work.folder, number) != kept:
        # Last, because its presence means that the shard is complete.
        write_json(work.folder / shard_path(number, "json"), {"schema_version": FIRST_SCHEMA_VERSION, **asdict(kept)})
        work.repaired.append(f"{shard_path(number, 'json')}: written again")


def _fits(folder: Path, fresh: Path, record: ShardRecord, expected: tuple[FileRecord, FileRecord]) -> bool:
    """Whether the drawn tar is the recorded one, and the drawn table that one too or at least of the same rows.

    Another version of polars packs the same rows into other bytes: then the table that stands there is kept.
    """
    tar, parquet = expected
    if record.tar != tar:
        return False
    if record.parquet == parquet:
        return True
    if hash_or_none(folder / parquet.file) != parquet.sha256:
        return False
    try:
        return read_table(folder / parquet.file, record.count).equals(_rows_drawn_anew(fresh, record))
    except (OSError, pl.exceptions.PolarsError):
        return False


def _unproven(work: Repair, fresh: Path, record: ShardRecord, source: Source) -> str | None:
    """Why a shard of which no hash is left must not be taken from a replay; None if it may."""
    rows = _rows_drawn_anew(fresh, record)
    try:
        listed = work.manifest.filter(pl.col("shard") == record.tar.file) if work.manifest is not None else None
        if listed is not None and listed.height and not listed.equals(rows):
            return f"drawn again, it differs from the rows in {MANIFEST_FILE}{_why(work, source)}."
    except pl.exceptions.PolarsError:
        listed = None
    changed = _other_bytes(work.run, source)
    if (listed is None or not listed.height) and changed:
        return f"no record of its bytes is left, and they could be others here{_why(work, source)}."
    return None


def _rows_drawn_anew(fresh: Path, record: ShardRecord) -> pl.DataFrame:
    return read_table(fresh / record.parquet.file, record.count)


def _other_bytes(run: Mapping[str, Any], source: Source) -> list[tuple[str, Any, Any]]:
    return [change for change in other_conditions(run, source) if change[0].startswith(BYTES_ONLY)]


def _why(work: Repair, source: Source) -> str:
    changed = [
        f"{name}: {describe(then)} then, {describe(now)} now" for name, then, now in _other_bytes(work.run, source)
    ]
    return (
        f" ({', '.join(changed)})" if changed else ", though all versions are the run's: the processor may be another"
    )


def _put(folder: Path, name: str, source: Path) -> None:
    with output_errors(folder), source.open("rb") as read, atomic_file(folder / name) as file:
        shutil.copyfileobj(read, file)


def hash_or_none(path: Path) -> str | None:
    """A file's hash; None if it cannot be read, or is a link."""
    try:
        refuse_links(path, path.parent)
        return sha256_of(path)
    except OSError:
        return None


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
        require_room(LocalOutput(folder), replace(plan, count=missing), {})
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
        make_folder(folder / SHARD_FOLDER)
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
    records = LocalOutput(folder).complete(plan).values()
    return sum(record.count for record in records if record.tar.size >= LEAST_SAMPLE * record.count)


def _not_in_full(folder: Path) -> IntegrityError:
    return IntegrityError(f"{folder} could not be repaired in full.", fix="See what is still wrong above.")


def _opened(folder: Path) -> Repair:
    run, info = read_run(folder), read_object(folder / DATASET_FILE)
    changed = differences(run, run_of(info)) if info else []
    if changed:
        named = "; ".join(f"{name}: {describe(a)} and {describe(b)}" for name, a, b in changed[:3])
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
        record = existing_record(work.folder, number)
        expected = listed_files(work, number)
        if record is None or shard_files(number) & blamed or expected not in (None, (record.tar, record.parquet)):
            found.append(number)
    return found


def _table_from_tar(work: Repair, number: int, blamed: set[str]) -> bool:
    """Write a shard's table from its tar if that table alone is damaged, and what is recorded of the two agrees."""
    record, expected = existing_record(work.folder, number), expected_files(work, number)
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
