"""Shards of a damaged dataset drawn again, and put in place where their bytes are those that were recorded."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import INTERRUPTED_EXIT_CODE, BusigenError, IntegrityError, OutputError
from busigen.files import atomic_file, leftovers, make_folder, sha256_of, write_json
from busigen.runtime.dataset.finalize import finish, run_of
from busigen.runtime.dataset.format import (
    CROISSANT_FILE,
    DATASET_FILE,
    FINISHED_FILES,
    FIRST_SCHEMA_VERSION,
    MANIFEST_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    Source,
    differences,
    shard_files,
    shard_path,
)
from busigen.runtime.dataset.reader import link_refused, plan_of, read_members, read_object
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, read_table, recorded_schema, write_table
from busigen.runtime.execution.estimate import require_room
from busigen.runtime.maintenance.explain import listed_files
from busigen.runtime.maintenance.merge import COLLECTION_FILES, parts_of, recorded_sources, write_collection
from busigen.runtime.maintenance.replay import (
    BYTES_ONLY,
    Inputs,
    other_conditions,
    redrawn_shard,
    refuse_other_samples,
    then_and_now,
)
from busigen.runtime.maintenance.verify import VerifyReport, check_collection, combined, has_run, read_run, verify
from busigen.runtime.maintenance.verify_shard import LEAST_SAMPLE
from busigen.runtime.output.base import LocalOutput
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive, forget_tasks
from busigen.text import counted, describe


class RepairInterrupted(BusigenError):
    """The person pressed Ctrl-C; every file that was put back is kept."""

    exit_code = INTERRUPTED_EXIT_CODE


@dataclass(frozen=True)
class RepairReport:
    """What ``repair`` did."""

    repaired: tuple[str, ...]  # each file that was put back, with how, in the order of the work
    refused: tuple[str, ...]  # what could not be repaired, and why
    after: VerifyReport
    error: BusigenError | None  # None if the dataset is sound now

    def lines(self) -> Iterator[str]:
        """The lines of ``busigen verify --repair`` that come before those of what verify says now."""
        yield from (f"repaired {line}" for line in self.repaired)
        yield from (f"not repaired {line}" for line in self.refused)
        if not self.repaired and not self.refused:
            yield "nothing was repaired"


def repair(folder: Path, *, inputs: Inputs | None = None) -> RepairReport:
    """Make again what ``verify`` finds damaged or missing, and leave everything else as it is.

    A shard is drawn again beside the dataset and compared with the hashes that its record or ``dataset.json`` holds;
    only files that differ are replaced, by rename. A table whose tar is whole is written from that, without drawing.
    The files that describe the whole dataset follow from the shards. Killed half way, it can be given again.

    Raises:
        InputError: ``folder`` is no busigen dataset.
        IntegrityError: ``run.json`` and ``dataset.json`` contradict each other.
        OutputError: the folder is in use, its shards lie elsewhere, it cannot be written, or the disk has no room.
        RepairInterrupted: on Ctrl-C.
    """
    inputs = inputs or Inputs()
    if not (places := parts_of(folder)):
        return _repair_alone(folder, inputs)
    reports = {place.relative_to(folder).as_posix(): _repair_alone(place, inputs) for place in places}
    repaired = [f"{name}/{line}" for name, report in reports.items() for line in report.repaired]
    refused = [f"{name}/{line}" for name, report in reports.items() for line in report.refused]
    error = next((report.error for report in reports.values() if report.error is not None), None)
    if error is None and check_collection(folder):
        with output_errors(folder), exclusive(folder):
            write_collection(folder, recorded_sources(folder))
        repaired.append(f"{', '.join((*COLLECTION_FILES, CROISSANT_FILE))}: written again from the parts")
    after = combined(folder, [report.after for report in reports.values()])
    if error is None and not after.ok:
        error = _not_in_full(folder)
    return RepairReport(tuple(repaired), tuple(refused), after, error)


def _repair_alone(folder: Path, inputs: Inputs) -> RepairReport:
    # Before the lock's file is written: a folder that is no dataset is left as it is.
    plan = plan_of(read_run(folder), folder / RUN_FILE)
    if (folder / SHARD_FOLDER).is_symlink():  # A linked file is replaced; what lies in a linked folder is not ours.
        raise link_refused(folder / SHARD_FOLDER, OutputError)
    # Shards are there as far as sizes tell.
    output = LocalOutput(folder)
    records = output.complete(plan).values()
    there = sum(record.count for record in records if record.tar.size >= LEAST_SAMPLE * record.count)
    if there < plan.count:
        require_room(output, replace(plan, count=plan.count - there), {})
    with ExitStack() as held:
        with output_errors(folder):
            held.enter_context(exclusive(folder))
        try:
            return _repair(folder, inputs)
        except KeyboardInterrupt:
            problem = f"Interrupted; what was repaired in {folder} is kept."
            raise RepairInterrupted(problem, fix="Run the same command again to continue.") from None


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
    check = partial(verify, folder, healthy=inputs.healthy, masks=inputs.masks, progress=inputs.progress)
    before = check()
    blamed = {problem.file for problem in before.problems}
    numbers = [number for number in work.damaged(blamed) if not work.write_table_from_tar(number, blamed)]
    error = work.draw_again(numbers, inputs) if numbers else None
    if error is None and not work.refused and blamed & set(FINISHED_FILES):
        work.finish()
    after = check() if work.repaired else before
    if error is None and (work.refused or not after.ok):
        error = _not_in_full(folder)
    return RepairReport(tuple(work.repaired), tuple(work.refused), after, error)


def _not_in_full(folder: Path) -> IntegrityError:
    return IntegrityError(f"{folder} could not be repaired in full.", fix="See what is still wrong above.")


def _opened(folder: Path) -> _Repair:
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
        manifest = pl.DataFrame(schema={"shard": pl.String})
    return _Repair(folder, run, plan, listed_files(info or {}), manifest)


@dataclass
class _Repair:
    folder: Path
    run: dict[str, Any]
    plan: Plan
    listed: dict[int, tuple[FileRecord, FileRecord]]  # tar and table of the shards, as dataset.json lists them
    manifest: pl.DataFrame  # empty if it is lost
    repaired: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def damaged(self, blamed: set[str]) -> list[int]:
        """Shards of which verify blames a file, and those whose record is not the one that ``dataset.json`` lists."""
        # Behind such a record, a shard and its hashes may have been changed together.

        def is_damaged(number: int) -> bool:
            record, expected = self._record(number), self.listed.get(number)
            unlisted = record is None or expected not in (None, (record.tar, record.parquet))
            return unlisted or not shard_files(number).isdisjoint(blamed)

        return [number for number in self.plan.numbers if is_damaged(number)]

    def write_table_from_tar(self, number: int, blamed: set[str]) -> bool:
        """Write a shard's table from its tar if that table alone is damaged, and what is recorded of the two agrees."""
        record = self._record(number)
        alone = shard_files(number) & blamed == {shard_path(number, "parquet")}
        if record is None or not alone or self._expected_files(number) != [(record.tar, record.parquet)]:
            return False
        tar = self.folder / record.tar.file
        try:
            if sha256_of(tar) != record.tar.sha256:
                return False
            rows = [member.row for member in read_members(tar, self.plan.indices(number))]
            table = io.BytesIO()
            write_table(pl.DataFrame(rows, schema=recorded_schema(self.run["columns"])), table)
        except (OSError, IntegrityError, pl.exceptions.PolarsError, TypeError):
            return False
        if hashlib.sha256(table.getbuffer()).hexdigest() != record.parquet.sha256:
            return False
        with output_errors(self.folder), atomic_file(self.folder / record.parquet.file) as file:
            file.write(table.getbuffer())
        self.repaired.append(f"{record.parquet.file}: written again from {record.tar.file}, to the recorded bytes")
        return True

    def draw_again(self, numbers: list[int], inputs: Inputs) -> BusigenError | None:
        """Draw shards again and put back what differs; the error is what kept it from drawing any."""
        try:
            source = inputs.open(self.run)
            refuse_other_samples(self.run, source)
        except BusigenError as error:
            named = ", ".join(shard_path(n, "tar") for n in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
            self.refused.append(f"{counted(len(numbers), 'shard')} ({named}): {error.problem}")
            return error
        progress = inputs.progress
        progress.start("drawing again", sum(len(self.plan.indices(number)) for number in numbers))
        try:
            for number in numbers:
                indices = self.plan.indices(number)
                fresh = redrawn_shard(source, self.plan, number, indices, progress.advance)
                with fresh as (place, record), output_errors(self.folder):
                    self._replace(place, record, source)
        except BusigenError as error:
            return error
        finally:
            progress.stop()
        return None

    def finish(self) -> None:
        hashes = {name: hash_or_none(self.folder / name) for name in FINISHED_FILES}
        records = [ShardRecord.read(self.folder, number) for number in self.plan.numbers]
        with output_errors(self.folder):
            finish(self.folder, self.run, records)
        for name in FINISHED_FILES:
            if hash_or_none(self.folder / name) != hashes[name]:
                self.repaired.append(f"{name}: written again from the shards")

    def _record(self, number: int) -> ShardRecord | None:
        """A shard's own record; None if it is missing, damaged or a link."""
        try:
            return ShardRecord.read(self.folder, number)
        except (OSError, IntegrityError):
            return None

    def _expected_files(self, number: int) -> list[tuple[FileRecord, FileRecord]]:
        """Tar and table of a shard as ``dataset.json`` and its own record have them, or only one, or neither does."""
        record = self._record(number)
        recorded = [self.listed.get(number), (record.tar, record.parquet) if record else None]
        return list(dict.fromkeys(pair for pair in recorded if pair is not None))

    def _replace(self, fresh: Path, record: ShardRecord, source: Source) -> None:
        """Put files of a shard drawn again in place of those that differ, if they are the recorded ones."""
        rows = read_table(fresh / record.parquet.file, record.count)
        expected = self._expected_files(record.number)
        matching = [pair for pair in expected if self._fits(record, rows, pair)]
        kept, how = record, "drawn again; no record of its bytes is left"
        if matching:
            kept, how = replace(record, parquet=matching[0][1]), "drawn again, to the recorded bytes"
        elif reason := self._refusal(record, rows, source, bool(expected)):
            self.refused.append(f"{record.tar.file}: {reason}")
            return
        for file in (kept.tar, kept.parquet):
            if hash_or_none(self.folder / file.file) != file.sha256:
                with (fresh / file.file).open("rb") as read, atomic_file(self.folder / file.file) as written:
                    shutil.copyfileobj(read, written)
                self.repaired.append(f"{file.file}: {how}")
        if self._record(record.number) != kept:
            # Last, because its presence means that the shard is complete.
            path = shard_path(record.number, "json")
            write_json(self.folder / path, {"schema_version": FIRST_SCHEMA_VERSION, **asdict(kept)})
            self.repaired.append(f"{path}: written again")

    def _fits(self, record: ShardRecord, rows: pl.DataFrame, expected: tuple[FileRecord, FileRecord]) -> bool:
        """Whether the new tar is the recorded one, and the new table that one too or at least of the same rows."""
        # Another version of polars packs the same rows into other bytes: then the table that stands there is kept.
        tar, parquet = expected
        if record.tar != tar:
            return False
        if record.parquet == parquet:
            return True
        if hash_or_none(self.folder / parquet.file) != parquet.sha256:
            return False
        try:
            return read_table(self.folder / parquet.file, record.count).equals(rows)
        except (OSError, pl.exceptions.PolarsError):
            return False

    def _refusal(self, record: ShardRecord, rows: pl.DataFrame, source: Source, recorded: bool) -> str | None:
        """Why a shard that is not the recorded one, or of which no hash is left, must not be put in place."""
        changed = [change for change in other_conditions(self.run, source) if change[0].startswith(BYTES_ONLY)]
        why = ", though all versions are the run's: the processor may be another"
        if changed:
            why = f" ({', '.join(then_and_now(changed))})"
        if recorded:
            return f"drawn again, it differs from what is recorded{why}."
        with suppress(pl.exceptions.PolarsError):
            listed = self.manifest.filter(pl.col("shard") == record.tar.file)
            if listed.height:
                same = listed.equals(rows)
                return None if same else f"drawn again, it differs from the rows in {MANIFEST_FILE}{why}."
        return f"no record of its bytes is left, and they could be others here{why}." if changed else None


def hash_or_none(path: Path) -> str | None:
    """A file's hash; None if it cannot be read, or is a link."""
    try:
        return sha256_of(path, root=path.parent)
    except OSError:
        return None
