"""What ``run.json`` and ``dataset.json`` may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict

from busigen.records import Many, Number, Record, Text, Whole
from busigen.runtime.dataset.shards import FileRecord, recorded_schema


class _Fingerprint(Record):
    """The fields of a run's fingerprint that are used; None where its source has no such field. Ranges are texts."""

    bundle: Text | None = None
    checkpoint: Text | None = None
    split_hash: Text | None = None
    provider: Text | None = None
    engine_version: Text | None = None
    classes: dict[Text, Number] | None = None
    healthy: Text | None = None
    masks: Text | None = None
    jitter: Number | None = None
    normals: Number | None = None
    lesions: Text | None = None
    vary: Text | None = None
    cells: Annotated[int, Strict(), Field(ge=1)] | None = None
    size: Text | None = None
    depth: Text | None = None
    across: Text | None = None
    height_width: Text | None = None
    birads: Text | None = None
    scanner: Text | None = None
    density: Text | None = None
    chest_wall: Text | None = None
    tissue_maps: Annotated[bool, Strict()] | None = None


class SourceRecord(Record):
    """A dataset that another one was merged from."""

    folder: Text


def _schematic(columns: dict[str, str]) -> dict[str, str]:
    recorded_schema(columns)
    return columns


class _BatchesRecord(Record):
    sizes: Annotated[Many[Annotated[int, Strict(), Field(ge=1, le=4096)]], Field(min_length=1)]
    dynamic: Annotated[bool, Strict()]


class RunRecord(Record):
    """Content of ``run.json``; `busigen.runtime.dataset.format.Plan.of` says what its ``config`` is."""

    schema_version: Whole
    config: dict[Text, Any]
    busigen: Text
    columns: Annotated[dict[Text, Literal["str", "int", "float", "bool"]], AfterValidator(_schematic)]
    fingerprint: _Fingerprint
    engine_batches: _BatchesRecord | None = None
    options: dict[Text, Text | None] | None = None
    versions: dict[Text, Text] = Field(default_factory=dict)
    sources: Many[SourceRecord] = Field(default_factory=list)


class ListedShard(Record):
    """A shard as ``dataset.json`` lists it."""

    number: Whole
    first: Whole
    count: Whole
    tar: FileRecord
    parquet: FileRecord


class _FilesRecord(Record):
    manifest: FileRecord = Field(alias="manifest.parquet")


class DatasetRecord(RunRecord):
    """Content of ``dataset.json``: the run record, and what follows from the shards."""

    samples: Whole
    classes: dict[Text, Whole]
    rejected: dict[Text, Whole]
    files: _FilesRecord
    shards: Many[ListedShard]
