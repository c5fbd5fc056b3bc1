"""Collections: several datasets merged into one folder, each kept whole as a part.

A merged dataset of several seeds, or of ranges with a gap, cannot be renumbered without changing bytes. So it keeps its
parts as they were made, in ``parts/000`` and so on, beside a table of all rows and a ``dataset.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import IntegrityError, UsageError
from busigen.files import atomic_file, atomic_path, sha256_of, write_json
from busigen.foreign import names_in
from busigen.records import Many, Record, read_checked
from busigen.runtime.dataset.card import LICENCE, front_matter, privacy
from busigen.runtime.dataset.format import CARD_FILE, DATASET_FILE, MANIFEST_FILE, SCHEMA_VERSION, SHARD_FOLDER, key_of
from busigen.runtime.dataset.reader import Dataset, SourceRecord, link_refused, read_object
from busigen.runtime.dataset.shards import FileRecord
from busigen.runtime.dataset.untrusted import write_joined
from busigen.text import counted

PARTS_FOLDER = "parts"
COLLECTION_FILES = (MANIFEST_FILE, CARD_FILE, DATASET_FILE)
"""What a collection holds beside its parts."""

Sources = list[dict[str, Any]]
"""What a dataset was merged from, in order: folders, plans, versions and the sha256 of their ``dataset.json``."""

_COMMON = ("busigen", "columns", "fingerprint")


class PartRecord(Record):
    """What is used of a part in it."""

    sources: Many[SourceRecord]


class CollectionRecord(Record):
    """What is used of a collection's ``dataset.json``."""

    parts: Many[PartRecord]


def part_name(number: int) -> str:
    """A part's folder in its collection, with forward slashes."""
    return f"{PARTS_FOLDER}/{number:03d}"


def parts_of(folder: Path) -> list[Path]:
    """The folders of a collection's parts, in order; empty for others; an InputError for a link or a newer schema."""
    parts = folder / PARTS_FOLDER
    places = [parts / name for name in names_in(parts) if name.isdecimal() and (parts / name).is_dir()]
    if places:
        for path in (parts, *places):
            if path.is_symlink():
                raise link_refused(path)
        read_object(folder / DATASET_FILE)  # For its schema alone.
    return sorted(places, key=lambda path: int(path.name))


def open_parts(folder: Path) -> list[Dataset]:
    """The datasets of a folder: a collection's parts, or the one that it is; raises what :meth:`Dataset.open` does."""
    return [Dataset.open(place) for place in parts_of(folder) or [folder]]


def open_with_sources(folder: Path) -> list[tuple[Dataset, Sources]]:
    """The datasets of a folder, each with the datasets that it was merged from, or itself."""
    parts = open_parts(folder)
    return list(zip(parts, recorded_sources(folder) or [_source_of(part) for part in parts], strict=True))


def write_collection(folder: Path, sources: Sequence[Sources] | None = None) -> None:
    """Write a collection's own files, ``dataset.json`` last; without ``sources``, they are taken from the parts."""
    parts = open_parts(folder)
    with atomic_path(folder / MANIFEST_FILE) as path:
        write_joined(path, collection_rows(parts))
    info = collection_info(folder, parts, sources or [_source_of(part) for part in parts])
    with atomic_file(folder / CARD_FILE) as file:
        file.write(_readme(info).encode())
    write_json(folder / DATASET_FILE, info)


def collection_rows(parts: Sequence[Dataset]) -> Iterator[pl.DataFrame]:
    """Each part's rows, as the collection's manifest holds them."""
    for number, part in enumerate(parts):
        yield part.manifest().select(pl.lit(part_name(number)).alias("part"), pl.all())


def collection_info(folder: Path, parts: Sequence[Dataset], sources: Sequence[Sources]) -> dict[str, Any]:
    """Content of a collection's ``dataset.json``, of its opened parts and where each of them came from."""
    classes, rejected = Counter[str](), Counter[str]()
    for part in parts:
        classes.update(part.info["classes"])
        rejected.update(part.info["rejected"])
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: parts[0].info.get(name) for name in _COMMON},
        "samples": sum(part.plan.count for part in parts),
        "classes": dict(sorted(classes.items())),
        "rejected": dict(sorted(rejected.items())),
        "files": {MANIFEST_FILE: asdict(FileRecord.of(folder, MANIFEST_FILE))},
        "parts": [
            {
                "folder": part_name(number),
                "config": part.info["config"],
                "samples": part.plan.count,
                "dataset_sha256": sha256_of(part.folder / DATASET_FILE),
                "sources": list(origin),
            }
            for number, (part, origin) in enumerate(zip(parts, sources, strict=True))
        ],
    }


def recorded_sources(folder: Path) -> list[Sources] | None:
    """The sources of each part, as the collection's ``dataset.json`` lists them; None if it cannot be read."""
    try:
        info = read_checked(CollectionRecord, folder / DATASET_FILE, fix="", root=folder)
    except (OSError, IntegrityError):
        return None
    found = [part["sources"] for part in info["parts"]]
    return found if len(found) == len(parts_of(folder)) else None


def find_sample(folder: Path, key: str) -> tuple[Path, str]:
    """The part that holds a sample, and its key there.

    Args:
        folder: a dataset, merged or not.
        key: ``000/000000012``, with or without ``parts/`` before it; or the key alone where one part has it.

    Raises:
        UsageError: no part has the sample, or several have.
        IntegrityError: a part's records are damaged.
    """
    places = parts_of(folder)
    if not places:
        return folder, key
    name, _, rest = key.removeprefix(f"{PARTS_FOLDER}/").rpartition("/")
    if name:
        chosen = [place for place in places if place.name == name]
    else:
        index = int(rest) if rest.isascii() and rest.isdecimal() and len(rest) <= 18 else -1
        chosen = [part.folder for part in open_parts(folder) if index in part.plan.span]
    if len(chosen) != 1:
        names = [place.name for place in chosen or places]
        problem = "is in several parts" if chosen else "is in no part"
        raise UsageError(
            f"sample {key!r} {problem} of {folder}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}.",
            fix=f"Name part and key, such as {names[0]}/{key_of(int(rest)) if chosen else key_of(0)}.",
        )
    return chosen[0], rest


def _source_of(dataset: Dataset) -> Sources:
    sources = dataset.info.get("sources")
    if isinstance(sources, list):
        return sources
    return [
        {
            "folder": dataset.folder.resolve().name,
            "config": dataset.info["config"],
            "dataset_sha256": sha256_of(dataset.folder / DATASET_FILE),
            "options": dataset.info.get("options", {}),
            "versions": dataset.info.get("versions", {}),
        }
    ]


def _readme(info: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| `{part['folder']}` | {part['samples']} | {part['config']['seed']} | "
        f"{', '.join(source['folder'] for source in part['sources'])} |"
        for part in info["parts"]
    )
    title = f"{counted(info['samples'], 'sample')} in {counted(len(info['parts']), 'part')}"
    return f"""{front_matter(f"{PARTS_FOLDER}/*/{SHARD_FOLDER}/*.tar")}
# Synthetic breast ultrasound, {title}

Merged by busigen. Each part is a dataset of its own, with the bytes it was made with; its README.md says how to read it
and how it was made. For research; not for diagnosis.

| part | samples | seed | merged from |
|---|---:|---:|---|
{rows}

- `manifest.parquet`: the rows of all parts. `part` names the folder that `shard` is in. A key is unique within a part.
- `dataset.json`: where each part came from, and the sha256 of its own `dataset.json`.

`busigen verify` checks all parts; `busigen explain` takes a part and a key, such as `000/{key_of(0)}`.

## Licence

{LICENCE}

## Privacy

{privacy(info)}
"""
