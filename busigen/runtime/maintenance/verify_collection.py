"""Checking what a merged dataset in parts holds beside its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from busigen.errors import BusigenError
from busigen.files import is_temporary
from busigen.records import read_json
from busigen.runtime.dataset.collection import (
    COLLECTION_FILES,
    PARTS_FOLDER,
    collection_info,
    open_parts,
    part_name,
    recorded_sources,
)
from busigen.runtime.dataset.format import DATASET_FILE, MANIFEST_FILE, WRITTEN, differences
from busigen.runtime.dataset.reader import Dataset, links
from busigen.runtime.dataset.shards import FileRecord
from busigen.runtime.dataset.untrusted import read_table
from busigen.runtime.maintenance.verify_shard import DELETE, REPAIR, Problem
from busigen.runtime.storage.lock import is_lock


def check_collection(folder: Path) -> list[Problem]:
    """What is wrong with the files beside the parts, whose own content is checked elsewhere."""
    linked = [path.name for path in links(folder)]
    missing = [name for name in COLLECTION_FILES if name in linked or not (folder / name).is_file()]
    described = {
        name: "is a link, and links are not followed." if name in linked else "is missing." for name in missing
    }
    found = [Problem(name, problem, REPAIR) for name, problem in described.items()]
    try:
        parts = open_parts(folder)
    except BusigenError:
        return found  # What its own check tells comes first; without it, nothing follows from the parts.
    found += _strangers(folder)
    if not missing:
        found += _check_record(folder, parts)
        found += _check_manifest(folder, parts)
    return found


def _check_record(folder: Path, parts: Sequence[Dataset]) -> Iterator[Problem]:
    sources = recorded_sources(folder)
    if sources is None:
        yield Problem(DATASET_FILE, "does not list the parts that are there.", REPAIR)
        return
    info = read_json(folder / DATASET_FILE)
    wanted = collection_info(folder, parts, sources)
    file = asdict(FileRecord.of(folder, MANIFEST_FILE))
    if info.get("files") != {MANIFEST_FILE: file}:
        yield Problem(MANIFEST_FILE, f"has another sha256 or size than {DATASET_FILE} records.", REPAIR)
        wanted["files"] = info.get("files")
    changed = differences(info, wanted)
    if changed:
        named = ", ".join(name for name, _, _ in changed)
        yield Problem(DATASET_FILE, f"differs from the parts in: {named}.", REPAIR)


def _check_manifest(folder: Path, parts: Sequence[Dataset]) -> Iterator[Problem]:
    try:
        rows = read_table(folder / MANIFEST_FILE, sum(part.plan.count for part in parts))
        wanted = pl.concat(
            part.manifest().select(pl.lit(part_name(number)).alias("part"), pl.all())
            for number, part in enumerate(parts)
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        yield Problem(MANIFEST_FILE, f"cannot be read as a table: {error}.", REPAIR)
        return
    except BusigenError:
        return  # A part's own table, which its check has named.
    if not rows.equals(wanted):
        yield Problem(MANIFEST_FILE, "does not equal the parts' rows.", REPAIR)
        return
    repeated = rows.filter(pl.col("part").n_unique().over("image_sha256") > 1)
    for group in repeated.partition_by("image_sha256", maintain_order=True):
        one, *others = (f"{row['part']}/{row['key']}" for row in group.iter_rows(named=True))
        for other in others:
            yield Problem(
                MANIFEST_FILE,
                f"sample {other}: its image equals that of sample {one}.",
                "Report it: every seed has noise of its own.",
            )


def _strangers(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.iterdir()):
        known = path.name in (*COLLECTION_FILES, PARTS_FOLDER) or is_lock(path.name) or is_temporary(path.name, WRITTEN)
        if not known:
            yield Problem(path.name, "is no part of the dataset.", DELETE)
