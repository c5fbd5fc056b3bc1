"""Hugging Face's Parquet: images and masks embedded, the label and the manifest's columns beside them, and a card."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import polars as pl

from busigen.errors import InputError, UsageError
from busigen.registry import NORMAL
from busigen.runtime.convert.base import Entries, Format, Pair
from busigen.runtime.dataset.card import closing, front_matter, label_type, labels, row_features
from busigen.runtime.dataset.shards import FIXED_COLUMNS, recorded_schema, write_table
from busigen.text import counted

_IMAGE = pl.Struct({"bytes": pl.Binary, "path": pl.String})  # what `datasets` decodes as an Image
_OWN: dict[str, Any] = {"image": _IMAGE, "mask": _IMAGE, "label": pl.Int64, "name": pl.String}
"""Columns before those of the manifest; ``name`` is unique in merged datasets, too, where ``key`` is not."""
_SPLIT = re.compile(r"(?!all$)\w+")  # what `datasets` takes for a split's name; "all" stands for all of them


class Converter(Format):
    """``data/<split>-<chunk>.parquet``, one split ``train`` without any, and a README.md whose header names columns."""

    def begin(self) -> None:
        """Refuse names of splits that `datasets` does not take, and columns that are named as this format's own."""
        for split in self.job.splits:
            if not _SPLIT.fullmatch(split):
                fix = "Name splits with letters, digits and _, such as train, validation and test."
                raise UsageError(f"--split has {split!r}, which is no name of a split to Hugging Face.", fix=fix)
        if taken := sorted(_OWN.keys() & self._columns().keys()):
            fix = "Convert to another format; hf keeps that name for itself."
            raise InputError(f"The dataset has a column {taken[0]!r} of its own.", fix=fix)

    def write_chunk(self, number: int, pairs: Iterable[Pair]) -> Iterator[Any]:
        """Write a table for each split that the chunk has pairs of."""
        rows: dict[str, list[dict[str, Any]]] = {}
        names, columns = [], self._columns()
        for pair in pairs:
            names.append(pair.name)
            rows.setdefault(pair.split or "train", []).append(
                {
                    **{name: pair.row[name] for name in columns},
                    "image": {"bytes": pair.image_png, "path": f"{pair.name}.png"},
                    "mask": {"bytes": pair.mask_png, "path": f"{pair.name}.png"},
                    "label": pair.class_index,
                    "name": pair.name,
                }
            )
        for split, found in rows.items():
            file = io.BytesIO()
            write_table(pl.DataFrame(found, schema=self._schema()), file)
            self.target.write(f"data/{split}-{number:06d}.parquet", file.getbuffer())
        yield from names

    def finish(self, entries: Entries) -> None:
        """Write the card."""
        features: list[dict[str, Any]] = [
            *({"name": name, "dtype": "image"} for name in ("image", "mask")),
            {"name": "label", "dtype": label_type(self.job.classes)},
            {"name": "name", "dtype": "string"},
            *row_features(self._columns(), self.job.classes),
        ]
        splits = [split for split in self.job.splits or ("train",) if self.job.counts[split if self.job.splits else ""]]
        samples = sum(self.job.counts.values())
        header = front_matter(samples, {split: f"data/{split}-*.parquet" for split in splits}, features)
        named = ", ".join(f"{number} is {name}" for number, name in enumerate(labels(self.job.classes)))
        empty = " Normal images have no lesion, and an empty mask." if NORMAL in self.job.classes else ""
        self.target.write(
            "README.md",
            f"""{header}
# Synthetic breast ultrasound, {counted(samples, "sample")}

Images with a synthetic lesion and that lesion's exact mask, converted by busigen from a dataset of its own, whose
manifest has the other columns. `label`: {named}; `name` is unique. For research; not for diagnosis.{empty}

{closing(self.job.info)}""".encode(),
        )

    def lines(self, left_out: int) -> Iterator[str]:
        """How to read it."""
        yield f"read it with: datasets.load_dataset({str(self.job.out)!r})"

    def _columns(self) -> dict[str, str]:
        """Types of the manifest's columns, but for the class, which is the label."""
        return {name: kind for name, kind in self.job.types.items() if name != "class"}

    def _schema(self) -> dict[str, Any]:
        all_of = recorded_schema({name: kind for name, kind in self.job.types.items() if name not in FIXED_COLUMNS})
        return _OWN | {name: all_of[name] for name in self._columns()}
