"""The dataset that is converted, plain, merged or at a URL: its records, which pairs are chosen, and those pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.errors import InputError, IntegrityError
from busigen.files import sha256_of
from busigen.foreign import looking
from busigen.registry import SAMPLE_CLASSES
from busigen.runtime.convert.base import CHUNK, Pair
from busigen.runtime.convert.selection import fold_groups, group_numbers, parse_where, split_groups
from busigen.runtime.dataset.format import DATASET_FILE, MANIFEST_FILE, key_of, shard_path
from busigen.runtime.dataset.reader import Dataset, Member, read_members, read_object
from busigen.runtime.dataset.shards import FIXED_COLUMNS, read_columns
from busigen.runtime.maintenance.merge import open_parts, parts_of
from busigen.runtime.maintenance.remote import viewed
from busigen.runtime.progress import Progress
from busigen.runtime.storage.url import Address
from busigen.text import counted

_VERIFY = "Run `busigen verify` on the dataset to see what is damaged."


@dataclass(frozen=True)
class Part:
    """A dataset, or one of a merged one.

    ``prefix`` begins its pairs' names, ``shard`` has a shard's files there meanwhile, ``tars`` are the shards' hashes.
    """

    dataset: Dataset
    prefix: str
    shard: Callable[[int], AbstractContextManager[None]]
    tars: Mapping[int, str]


@dataclass(frozen=True)
class Source:
    """A finished dataset; ``sha256`` is the hash of its ``dataset.json``."""

    name: str
    sha256: str
    parts: Sequence[Part]

    @property
    def info(self) -> Mapping[str, Any]:
        """Content of its ``dataset.json``, of a merged one of its first part's: they differ in seed and range alone."""
        return self.parts[0].dataset.info

    @property
    def columns(self) -> dict[str, str]:
        """The type of each column of its manifest."""
        return {**{name: kind.__name__ for name, kind in FIXED_COLUMNS.items()}, **self.info["columns"]}

    def choose(
        self, where: str | None, classes: Sequence[str] | None, limit: int | None, splits: Mapping[str, float]
    ) -> pl.DataFrame:
        """The chosen pairs in order, a row each: part, index, class, kin, split, fold and numbers.

        Pairs of one ``kin`` stay together: those on one given background, of one group of a grid, or of one given mask.

        Raises a UsageError for an unfit condition, an InputError if no pair fulfils all, an IntegrityError for damage.
        """
        condition = pl.lit(True) if where is None else parse_where(where, self.columns)
        if classes is not None:
            condition &= pl.col("class").is_in(list(classes))
        tables, groups = [], []
        for number, part in enumerate(self.parts):
            table = _chosen(part, condition, _kin(self.columns, number))
            tables.append(table.select(pl.lit(number, pl.Int64).alias("part"), pl.all()))
            groups += [kin or f"{number}/{index}" for index, kin in table["index", "kin"].iter_rows()]
        chosen = pl.concat(tables)[:limit]
        self._refuse_unfit(chosen)
        return _parted(chosen, group_numbers(groups[:limit]), splits)

    def chunks(self, chosen: pl.DataFrame) -> Iterator[tuple[Part, int, list[pl.DataFrame]]]:
        """The chosen pairs by part and shard, each in pieces of at most ``CHUNK``."""
        shards = chosen.with_columns(
            shard=pl.col("index")
            // pl.col("part").replace_strict({n: part.dataset.plan.shard_size for n, part in enumerate(self.parts)})
        )
        for (number, shard), rows in shards.group_by("part", "shard", maintain_order=True):
            pieces = [rows.slice(first, CHUNK) for first in range(0, rows.height, CHUNK)]
            yield self.parts[int(str(number))], int(str(shard)), pieces

    def _refuse_unfit(self, chosen: pl.DataFrame) -> None:
        if chosen.is_empty():
            counts = Counter[str]()
            for part in self.parts:
                counts.update(part.dataset.info["classes"])
            listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            raise InputError(f"no pair of {self.name} is as --where and --classes ask.", fix=f"It has: {listed}.")
        if other := sorted(set(chosen["class"].unique()) - set(SAMPLE_CLASSES)):
            fix = f"Leave them out: --classes {','.join(SAMPLE_CLASSES)}."
            raise InputError(f"{self.name} has pairs of the class {other[0]!r}, which no format knows.", fix=fix)


@contextmanager
def opened(place: Path | Address, progress: Progress) -> Iterator[Source]:
    """A finished dataset in a folder or at a URL, its records checked; raises what `Dataset.open` and `viewed` do."""
    if isinstance(place, Address):
        with viewed(place, progress) as view:
            yield _source(view.folder, str(place).rpartition("/")[2], view.shard)
    else:
        yield _source(place, place.resolve().name, lambda number: nullcontext())


def _source(folder: Path, name: str, shard: Callable[[int], AbstractContextManager[None]]) -> Source:
    places = parts_of(folder)
    parts = []
    for place, dataset in zip(places or [folder], open_parts(folder), strict=True):
        tars = {one["number"]: one["tar"]["sha256"] for one in dataset.info["shards"]}
        parts.append(Part(dataset, f"{place.name}-" if places else "", shard, tars))
    if places:
        listed = (read_object(folder / DATASET_FILE) or {}).get("parts")
        recorded = listed if isinstance(listed, list) else []
        found = [sha256_of(place / DATASET_FILE) for place in places]
        if found != [part.get("dataset_sha256") for part in recorded if isinstance(part, dict)]:
            raise IntegrityError(f"{folder / DATASET_FILE} is missing, or does not describe the parts.", fix=_VERIFY)
    if any(part.dataset.info["columns"] != parts[0].dataset.info["columns"] for part in parts):
        raise IntegrityError(f"The parts of {folder} have other columns than one another.", fix=_VERIFY)
    return Source(name, sha256_of(folder / DATASET_FILE), parts)


def _kin(columns: Mapping[str, str], number: int) -> pl.Expr:
    """What pairs of a manifest with these columns, that of part ``number``, have in common; null for nothing."""
    found = {
        "healthy_sha256": pl.col("healthy_sha256"),
        "grid_group": pl.format("{}/group {}", pl.lit(number), pl.col("grid_group")),
        "given_mask_sha256": pl.col("given_mask_sha256"),
    }
    return pl.coalesce(pl.lit(None, pl.String), *(one for name, one in found.items() if name in columns))


def _chosen(part: Part, condition: pl.Expr, kin: pl.Expr) -> pl.DataFrame:
    dataset = part.dataset
    path = dataset.folder / MANIFEST_FILE
    columns = [pl.col("index"), pl.col("class"), kin.alias("kin")]
    try:
        _refuse_changed(dataset.folder, MANIFEST_FILE, dataset.info["files"][MANIFEST_FILE]["sha256"])
        table = read_columns(path, dataset.plan.count, columns, condition)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.", fix=_VERIFY) from error
    schema = {"index": pl.Int64(), "class": pl.String(), "kin": pl.String()}
    inside = table["index"].is_between(dataset.plan.first, dataset.plan.span.stop - 1).all()
    if dict(table.schema) != schema or table.null_count().row(0)[:2] != (0, 0) or not inside:
        raise IntegrityError(f"{path} is not the manifest of its dataset.", fix=_VERIFY)
    if not table["index"].is_sorted() or table["index"].n_unique() != table.height:
        raise IntegrityError(f"{path} is not in the order of its samples.", fix=_VERIFY)
    return table


def _parted(chosen: pl.DataFrame, groups: NDArray[np.uint64], splits: Mapping[str, float]) -> pl.DataFrame:
    """The chosen pairs with split, fold and numbers, by the group of each."""
    names = list(splits) or [""]
    parted = split_groups(groups, list(splits.values()) or [1.0])
    if missing := [name for number, name in enumerate(names) if number not in parted]:
        problem = f"--split leaves nothing to {missing[0]!r} of {counted(chosen.height, 'pair')}."
        raise InputError(problem, fix="Give more pairs, or fewer splits; pairs of one background stay together.")
    return chosen.with_columns(
        split=pl.Series([names[number] for number in parted], dtype=pl.String),
        fold=pl.Series(fold_groups(groups, np.array([names[number] != "test" for number in parted]))),
    ).with_columns(
        number=pl.int_range(pl.len()).over("split"),
        class_number=pl.int_range(1, pl.len() + 1).over("class"),
    )


def pairs_of(part: Part, number: int, pieces: Sequence[pl.DataFrame]) -> Iterator[Iterator[Pair]]:
    """The pairs of some pieces of one shard, whose hash is checked first; each piece is to be read to its end."""
    dataset = part.dataset
    path = dataset.folder / shard_path(number, "tar")
    if number not in part.tars:
        raise IntegrityError(f"{dataset.folder / DATASET_FILE} does not list {path.name}.", fix=_VERIFY)
    try:
        _refuse_changed(dataset.folder, shard_path(number, "tar"), part.tars[number])
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror or error}.", fix=_VERIFY) from error
    wanted = [index for piece in pieces for index in piece["index"]]
    members = read_members(path, dataset.plan.indices(number), only=wanted)
    for piece in pieces:
        yield (_pair(part, next(members), row) for row in piece.iter_rows(named=True))
    for _ in members:  # Which checks how the file ends.
        pass


def _pair(part: Part, member: Member, chosen: Mapping[str, Any]) -> Pair:
    if member.key != key_of(chosen["index"]) or member.row.get("class") != chosen["class"]:
        raise IntegrityError(f"Sample {member.key} is not what the manifest says.", fix=_VERIFY)
    try:
        image, mask, masks = member.decoded("image"), member.decoded("mask"), member.lesion_masks()
    except ValueError as error:
        raise IntegrityError(f"Sample {member.key} is damaged: {error}.", fix=_VERIFY) from error
    return Pair(
        name=f"{part.prefix}{member.key}",
        label=chosen["class"],
        split=chosen["split"],
        fold=chosen["fold"],
        number=chosen["number"],
        class_number=chosen["class_number"],
        image=image,
        mask=mask,
        masks=masks or ((mask,) if mask.any() else ()),
        image_png=member.image,
        mask_png=member.mask,
        row=member.row,
    )


@looking()
def _refuse_changed(folder: Path, name: str, sha256: str) -> None:
    """Raise an IntegrityError if a file is not the one that was recorded; an OSError if it cannot be read."""
    if sha256_of(folder / name, root=folder) != sha256:
        raise IntegrityError(f"{folder / name} is not the file that {DATASET_FILE} records.", fix=_VERIFY)
