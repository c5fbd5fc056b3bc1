"""Checking one shard of a dataset: its record, its table, its tar, and what each says about the others."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.geometry import Mask, edit_region
from busigen.errors import IntegrityError
from busigen.foreign import ForeignFileError, open_file
from busigen.phantoms.tissue import TISSUES
from busigen.registry import NORMAL
from busigen.runtime.dataset.format import TISSUE, Plan, differences, extra_pictures, key_of, shard_path
from busigen.runtime.dataset.reader import Member, read_members
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, lesion_box, read_table
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.inputs.given_masks import MaskProof
from busigen.runtime.sampling.inputs.healthy_images import Backgrounds
from busigen.runtime.sampling.several import shape_row
from busigen.text import printable

DELETE = "Delete it, or move it out of the dataset."  # fix for a file that is none of the dataset's
REPAIR = "Run `busigen verify --repair`."  # fix where `generate` cannot know that the folder is its own
FINISH = "Run `busigen verify --repair`, or `busigen generate` with the same options again, to finish the dataset."

MEND = (
    "Run `busigen verify --repair`, or `busigen generate` with the same options again: it makes anew what differs from "
    "its record, and no more."
)  # where a hash gives the damage away, because ``generate`` checks hashes as well

_SHARED = ("attempt", "background", "healthy_sha256")  # what the samples of a group have in common, beside pixels
_REMAKE = "Delete {file} and run `busigen generate` with the same options again: only that shard is made anew."
LEAST_SAMPLE = 3 * 1024  # bytes in a tar that a sample takes at least: a header and a block for each of its members


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, the file (relative to the dataset) it is wrong with, and what to do about it."""

    file: str
    problem: str
    fix: str

    @property
    def finding(self) -> str:
        """File and problem, without what to do about it."""
        return printable(f"{self.file}: {self.problem}")

    def __str__(self) -> str:
        return f"{self.finding} {printable(self.fix)}"


@dataclass(kw_only=True)
class Counts:
    """How many samples there are of each kind."""

    samples: int = 0  # that were read
    backgrounds_synthetic: int = 0  # of these, those with a synthetic background, so that there is nothing to show
    backgrounds_proven: int = 0  # those that equal their healthy image outside the edit region, bit for bit
    backgrounds_unproven: int = 0  # those with a healthy image for which that was not shown
    masks_equal: int = 0  # samples whose mask is the user's, letterboxed and no more
    masks_moved: int = 0  # those whose mask is the user's, moved, scaled or mirrored as their row says
    masks_unproven: int = 0  # those with a user's mask for which that was not shown
    groups: int = 0  # of a grid
    groups_equal: int = 0  # those whose samples differ in their edit regions alone
    normals: int = 0  # samples without a lesion
    normals_equal: int = 0  # those that equal their healthy image in every pixel, bit for bit
    several: int = 0  # samples with more than one lesion


@dataclass
class ShardFindings(Counts):
    """What the check of one shard found."""

    number: int
    record: ShardRecord | None = None  # None if it is missing or damaged
    rows: pl.DataFrame | None = None  # the table; None if it is missing or damaged
    started: bool = True  # whether the shard is there at all: a run that was interrupted lacks whole shards
    needed: set[str] = field(default_factory=set)  # sha256 of the healthy images that samples were painted into
    absent: dict[str, dict[str, Any]] = field(default_factory=dict)  # those not at hand, with a first sample's row
    absent_masks: dict[str, dict[str, Any]] = field(default_factory=dict)  # as ``absent``
    hashes: list[tuple[str, str]] = field(default_factory=list)  # each image's sha256 with its sample's key
    problems: list[Problem] = field(default_factory=list)

    def report(self, file: str, problem: str, remake: str | None = None) -> None:
        """Add a problem that a rerun solves, after deleting the record ``remake`` where one is named."""
        self.problems.append(Problem(file, problem, _REMAKE.format(file=remake) if remake else MEND))


def check_shard(
    folder: Path,
    plan: Plan,
    number: int,
    schema: pl.Schema,
    backgrounds: Backgrounds | None,
    progress: Progress,
    masks: MaskProof | None = None,
) -> ShardFindings:
    """Check one shard and everything in it: its table against ``schema``, samples against what is given of the rest."""
    found, indices = ShardFindings(number), plan.indices(number)
    json, tar, table = (shard_path(number, suffix) for suffix in ("json", "tar", "parquet"))
    try:
        record = found.record = ShardRecord.read(folder, number)
    except FileNotFoundError:
        found.started = False
        return found
    except (OSError, IntegrityError):
        found.report(json, "is not the record of its shard.")
        return found
    if (record.first, record.count) != (indices.start, len(indices)):
        held = f"{record.first} to {record.first + record.count - 1}"
        found.report(json, f"records the samples {held}, not {indices.start} to {indices[-1]}.")
    if Counter(rejection.reason for rejection in record.rejections) != Counter(record.rejected):
        found.report(json, "lists other rejections than it counts.", json)
    if record.tar.size < LEAST_SAMPLE * len(indices):
        # How many rows a table may have follows from the plan, which may be made up; so large a tar may not.
        found.report(json, f"records a tar too small for {len(indices)} samples.")
        return found
    if _check_file(folder, record.parquet, found):
        try:
            rows = read_table(folder / table, len(indices))
            if (
                rows.schema == schema
                and rows["index"].to_list() == list(indices)
                and rows["key"].to_list() == [key_of(n) for n in indices]
            ):
                found.rows = rows
            else:
                found.report(
                    table, f"does not hold the rows {indices.start} to {indices[-1]} once each, in order.", json
                )
        except (OSError, pl.exceptions.PolarsError) as error:
            found.report(table, f"cannot be read as a table: {error}.", json)
    whole = _check_file(folder, record.tar, found)
    if found.rows is None or not (folder / tar).is_file():
        return found
    # Where a hash gives the damage away, a rerun mends it; where none does, the record has to go first.
    remake = json if whole else None
    groups = _Groups(tar, found)
    try:
        for member, row in zip(read_members(folder / tar, indices), found.rows.iter_rows(named=True), strict=True):
            found.samples += 1
            progress.advance(1)
            # A user's healthy image as it is may be there again, where there are too few.
            if row["class"] != NORMAL or row.get("healthy_sha256") is None:
                found.hashes.append((row["image_sha256"], member.key))
            wrong = list(_member_problems(member, row))
            for problem in wrong:
                found.report(tar, f"sample {member.key}: {problem}", remake)
            _check_background(tar, member, row, bool(wrong), found, backgrounds)
            _check_mask(tar, member, row, bool(wrong), found, masks)
            groups.add(member, row, bool(wrong))
    except IntegrityError as error:
        # A damaged tar has been named already; what matters of a whole one is why its content is wrong.
        if whole:
            found.report(tar, error.problem, json)
    groups.end()
    if Counter(found.rows["class"].to_list()) != Counter(record.classes):
        found.report(json, "counts other classes than the shard's rows hold.", json)
    if not _refusals_fit(record, found.rows):
        found.report(json, "lists other refused draws than the shard's rows count.", json)
    return found


def _refusals_fit(record: ShardRecord, rows: pl.DataFrame) -> bool:
    """Whether the refused draws are those before each row's attempt. No hash covers them, so this is what does."""
    attempts, refused = rows["attempt"].to_list(), len(record.rejections)
    # A row may claim any number of attempts, and the list below would be as long.
    if any(attempt is None or not 0 <= attempt <= refused for attempt in attempts) or sum(attempts) != refused:
        return False
    before = [
        (index, attempt, label)
        for index, attempts, label in rows.select("index", "attempt", "class").iter_rows()
        for attempt in range(attempts)
    ]
    return [(draw.index, draw.attempt, draw.label) for draw in record.rejections] == before


def _check_file(folder: Path, record: FileRecord, found: ShardFindings) -> bool:
    try:
        with open_file(folder / record.file) as file:
            if (size := os.fstat(file.fileno()).st_size) != record.size:
                found.report(record.file, f"has {size} bytes instead of {record.size}.")
            elif hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                found.report(record.file, "has another sha256 than recorded: its content was changed or damaged.")
            else:
                return True
    except FileNotFoundError:
        found.report(record.file, "is missing.")
    except (ForeignFileError, IsADirectoryError) as error:
        found.report(record.file, f"{error.strerror}.")
    except OSError as error:
        found.report(record.file, f"cannot be read: {error.strerror}.")
    return False


def _check_background(
    tar: str, member: Member, row: dict[str, Any], damaged: bool, found: ShardFindings, backgrounds: Backgrounds | None
) -> None:
    """Compare a sample with its healthy image, if it has one that is at hand, and count it."""
    found.normals += row["class"] == NORMAL
    found.several += (row.get("lesions") or 0) > 1
    if (healthy := row.get("healthy_sha256")) is None:
        found.backgrounds_synthetic += 1
        return
    found.needed.add(healthy)
    if backgrounds is not None and healthy in backgrounds.paths and not damaged:
        masks = member.lesion_masks() or (member.decoded("mask"),)
        if (reason := backgrounds.difference(healthy, member.decoded("image"), masks)) is None:
            found.backgrounds_proven += 1
            found.normals_equal += row["class"] == NORMAL
            return
        found.problems.append(Problem(tar, f"sample {member.key}: {reason.problem}", reason.fix))
    elif backgrounds is not None and healthy not in backgrounds.paths:
        found.absent.setdefault(healthy, row)
    found.backgrounds_unproven += 1


def _check_mask(
    tar: str, member: Member, row: dict[str, Any], damaged: bool, found: ShardFindings, masks: MaskProof | None
) -> None:
    """Compare a sample's mask with the user's, if it has one that is at hand, and count it."""
    if (sha256 := row.get("given_mask_sha256")) is None:
        return
    if masks is not None and sha256 not in masks.known:
        found.absent_masks.setdefault(sha256, row)
    elif masks is not None and not damaged:
        if (reason := masks.difference(row, member.decoded("mask"))) is None:
            moved = masks.is_moved(row)
            found.masks_moved, found.masks_equal = found.masks_moved + moved, found.masks_equal + (not moved)
            return
        found.problems.append(Problem(tar, f"sample {member.key}: {reason.problem}", reason.fix))
    found.masks_unproven += 1


class _Groups:
    """Compares the samples of each of a grid's groups, which follow one another, with the group's first."""

    def __init__(self, tar: str, found: ShardFindings) -> None:
        self._tar, self._found = tar, found
        self._number: int | None = None
        self._first: tuple[dict[str, Any], NDArray[np.uint8], NDArray[np.bool_]] | None = None
        self._equal = True

    def add(self, member: Member, row: dict[str, Any], damaged: bool) -> None:
        """Look at the next sample, unless it is no grid's; a damaged one is named already."""
        if (number := row.get("grid_group")) is None:
            return
        if number != self._number:
            self.end()
            self._number = number
        if damaged:
            self._equal = False
            return
        image, mask = member.decoded("image"), member.decoded("mask")
        if self._first is None:
            self._first = row, image, mask
            return
        first, before, marked = self._first
        # As if there were no bars: these are black in any case.
        whole = np.ones_like(mask)
        changed = int(((image != before) & ~edit_region(mask, whole) & ~edit_region(marked, whole)).sum())
        if changed or any(row.get(name) != first.get(name) for name in _SHARED):
            what = f"{changed} pixels outside of both edit regions" if changed else f"its {' or '.join(_SHARED)}"
            problem = f"sample {member.key}: {what} differ from those of {first['key']}, of the same group."
            fix = "Use the busigen version that made the dataset; if they still differ, the dataset was altered."
            self._found.problems.append(Problem(self._tar, problem, fix))
            self._equal = False

    def end(self) -> None:
        """Count the group that was looked at."""
        self._found.groups += self._number is not None
        self._found.groups_equal += self._number is not None and self._equal
        self._number, self._first, self._equal = None, None, True


def _member_problems(member: Member, row: dict[str, Any]) -> Iterator[str]:
    if member.row != row:
        changed = ", ".join(name for name, _, _ in differences(member.row, row))
        yield f"its json differs from its row in the table ({changed})."
    hashed = extra_pictures(name for name, value in row.items() if value is not None)
    if hashed != tuple(member.extra):
        yield f"it has {_named(member.extra)} beside image and mask, and its row hashes of {_named(hashed)}."
        return
    for kind, content in member.pictures.items():
        if hashlib.sha256(content).hexdigest() != row[f"{kind}_sha256"]:
            yield f"its {kind} has another sha256 than its row says."
    try:
        member.decoded("image")
        mask = member.decoded("mask")
        extra = {kind: member.decoded(kind) for kind in member.extra}
    except ValueError as error:
        yield f"its image or mask{f', or {_named(member.extra)},' if member.extra else ''} is {error}."
        return
    tissue = extra.pop(TISSUE, None)
    if tissue is not None and int(tissue.max()) >= len(TISSUES):
        yield f"its tissue holds {int(tissue.max())}, which stands for none."
    if extra:
        yield from _lesion_problems(mask, list(extra.values()), row)
    box = lesion_box(mask) or (None, None, None, None)
    recorded = tuple(row[f"box_{side}"] for side in ("left", "top", "right", "bottom"))
    if int(mask.sum()) != row["lesion_pixels"] or box != recorded:
        yield "its mask has another area or bounding box than its row says."
    if row["class"] == NORMAL and mask.any():
        yield "it is normal, and its mask marks a lesion."


def _lesion_problems(mask: Mask, masks: Sequence[Mask], row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the masks of single lesions, of which those that a sample does not need are empty."""
    for number, one in enumerate(masks, start=1):
        if any(row.get(f"lesion_{number}_{name}") != value for name, value in shape_row(one).items()):
            yield f"its mask_{number} has another area or bounding box than its row says."
    if sum(int(one.sum()) for one in masks) != int(mask.sum()) or (np.logical_or.reduce(masks) != mask).any():
        yield "the masks of its lesions overlap, or are not its mask taken together."
    if [bool(one.any()) for one in masks] != [number < (row.get("lesions") or 0) for number in range(len(masks))]:
        yield "it has masks of another number of lesions than its row says."


def _named(kinds: Iterable[str]) -> str:
    return " and ".join(kinds) or "nothing"
