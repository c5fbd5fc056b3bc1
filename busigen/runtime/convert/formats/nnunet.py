"""nnU-Net v2's raw layout, also merged with a real prepared set, whose splits stay as they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import numpy as np

from busigen.errors import InputError, UsageError
from busigen.registry import LESION_CLASSES
from busigen.runtime.convert.base import Entries, Format, Pair, label_map, png, write_stream
from busigen.runtime.convert.selection import FOLDS
from busigen.text import counted

_FOLDER = re.compile(r"Dataset(\d{3})_\w+")
_PARTS = {"train": "Tr", "val": "Tr", "test": "Ts"}


class Converter(Format):
    """``imagesTr``, ``labelsTr`` (0, 1 benign, 2 malignant), ``dataset.json`` and ``splits_final.json``.

    Without a validation split there are five folds, or one for each group if these are fewer. With a real set, there is
    one fold: validation on its validation images, training on its training images and all pairs. Pairs that were
    painted into a real image that is not to be trained on are left out.
    """

    allowed_splits = tuple(_PARTS)
    takes_real = True

    def begin(self) -> None:
        """Refuse a folder that nnU-Net would not find, and splits without training images."""
        if not _FOLDER.fullmatch(self.job.out.resolve().name):
            fix = "Name it such as nnUNet_raw/Dataset501_Busigen."
            raise UsageError(f"--out {self.job.out} has no name that nnU-Net would find.", fix=fix)
        if self.job.splits and "train" not in self.job.splits:
            raise UsageError(
                "--split has no 'train', which nnU-Net needs.", fix="Give train=0.8,test=0.2, for example."
            )
        self._held_out: set[str] = set()
        if self.job.real is not None:
            table = self.job.real.table
            if missing := [name for name in ("train", "val") if name not in table["split"]]:
                problem = f"{self.job.real.folder} has no image in its split {missing[0]!r}."
                raise InputError(problem, fix="Prepare more images for --real.")
            self._held_out = set(table.filter(table["split"] != "train")["sha256"])

    def write(self, pair: Pair) -> Any:
        """Write the image as it is, and the label map."""
        if pair.row.get("healthy_sha256") in self._held_out:
            return None
        case = f"busigen_{pair.name}"
        self._write(case, _PARTS[pair.split or "train"], pair.image_png, label_map(pair))
        return [case, pair.split or "train", pair.fold]

    def finish(self, entries: Entries) -> None:
        """Write the real set's images, and the two files that describe all."""
        real = list(self._real_cases())
        training = sum(split != "test" for _, split, _ in entries) + sum(split != "test" for _, split in real)
        described = {
            "channel_names": {"0": "ultrasound"},
            "labels": {"background": 0, **{name: number for number, name in enumerate(LESION_CLASSES, start=1)}},
            "numTraining": training,
            "file_ending": ".png",
            "overwrite_image_reader_writer": "NaturalImage2DIO",
        }
        with self.target.file("dataset.json") as file:
            write_stream(file, described)
        folds = self._folds(entries, real)
        if len(folds) > 1 or real or "val" in self.job.splits:  # One group alone cannot be both trained and tested on.
            with self.target.file("splits_final.json") as file:
                write_stream(file, folds)

    def lines(self, left_out: int) -> Iterator[str]:
        """How nnU-Net reads it."""
        folder = self.job.out.resolve().name
        if left_out:
            yield f"left out: {counted(left_out, 'pair')} on a background of --real that is not to be trained on"
        yield f"check with: nnUNetv2_plan_and_preprocess -d {int(folder[7:10])} --verify_dataset_integrity"
        yield f"then copy splits_final.json to nnUNet_preprocessed/{folder}, so that nnU-Net takes these folds"

    def _write(self, case: str, part: str, image: bytes, labels: bytes) -> None:
        self.target.write(f"images{part}/{case}_0000.png", image)
        self.target.write(f"labels{part}/{case}.png", labels)

    def _real_cases(self) -> Iterator[tuple[str, str]]:
        """Write the real images, scanner's marks painted over as training has them; yields each case and its split."""
        if (real := self.job.real) is None:
            return
        used = real.table.filter(real.table["split"].is_in(list(_PARTS)))
        self.progress.start("merging", used.height, unit="image")
        for row, name, split in used.select("row", "class", "split").iter_rows():
            case = f"real_{row:06d}"
            index = LESION_CLASSES.index(name) + 1 if name in LESION_CLASSES else 0
            labels = (real.masks[row] > 0).astype(np.uint8) * np.uint8(index)
            self._write(case, _PARTS[split], png(real.clean[row]), png(labels))
            yield case, split
            self.progress.advance(1)

    def _folds(self, entries: Entries, real: list[tuple[str, str]]) -> tuple[dict[str, Iterator[str]], ...]:
        def made(split: str, among: Collection[int] = range(FOLDS)) -> Iterator[str]:
            return (case for case, its, fold in entries if its == split and fold in among)

        def given(split: str) -> list[str]:
            return [case for case, its in real if its == split]

        if real:
            return ({"train": chain(given("train"), made("train")), "val": iter(given("val"))},)
        if "val" in self.job.splits:
            return ({"train": made("train"), "val": made("val")},)
        folds = range(self.job.folds)
        return tuple({"train": made("train", set(folds) - {fold}), "val": made("train", {fold})} for fold in folds)
