"""Shards of a damaged dataset drawn again, and put in place where their bytes are those that were recorded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import BusigenError, IntegrityError
from busigen.foreign import refuse_links
from busigen.records import checked
from busigen.runtime.atomic import atomic_file, output_errors, sha256_of, write_json
from busigen.runtime.layout import DATASET_FILE, FIRST_SCHEMA_VERSION, MANIFEST_FILE, SHARD_FOLDER, Plan, shard_path
from busigen.runtime.replay import BYTES_ONLY, Inputs, other_conditions, refuse_other_samples
from busigen.runtime.sample import Source
from busigen.runtime.shards import FileRecord, ShardRecord, write_shard
from busigen.runtime.tables import read_table
from busigen.runtime.wording import counted, told


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


def standing_record(folder: Path, number: int) -> ShardRecord | None:
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
    record = standing_record(work.folder, number)
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
            drawn = source.draw(work.plan.seed, work.plan.indices(number), progress.advance)
            with tempfile.TemporaryDirectory(prefix="busigen-") as name:
                fresh = Path(name)
                with output_errors(fresh):
                    (fresh / SHARD_FOLDER).mkdir()
                    record = write_shard(fresh, number, drawn, source.row_types())
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
    if standing_record(work.folder, number) != kept:
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
        return read_table(folder / parquet.file, record.count).equals(_drawn_rows(fresh, record))
    except (OSError, pl.exceptions.PolarsError):
        return False


def _unproven(work: Repair, fresh: Path, record: ShardRecord, source: Source) -> str | None:
    """Why a shard of which no hash is left must not be taken from a replay; None if it may."""
    rows = _drawn_rows(fresh, record)
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


def _drawn_rows(fresh: Path, record: ShardRecord) -> pl.DataFrame:
    return read_table(fresh / record.parquet.file, record.count)


def _other_bytes(run: Mapping[str, Any], source: Source) -> list[tuple[str, Any, Any]]:
    return [change for change in other_conditions(run, source) if change[0].startswith(BYTES_ONLY)]


def _why(work: Repair, source: Source) -> str:
    changed = [f"{name}: {told(then)} then, {told(now)} now" for name, then, now in _other_bytes(work.run, source)]
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
