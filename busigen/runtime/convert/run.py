"""`busigen convert`: a dataset written as what other tools read, chunk by chunk, so that a killed run continues."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

import busigen
from busigen.data.prepared import Prepared
from busigen.errors import OutputError, UsageError
from busigen.files import atomic_file, is_temporary, leftovers, make_folder, remove, sync, write_json
from busigen.foreign import names_in
from busigen.records import read_json
from busigen.registry import SAMPLE_CLASSES
from busigen.runtime.convert.base import WORK_FOLDER, Entries, Format, Job, Target, converter_of
from busigen.runtime.convert.selection import parse_class_names, parse_split
from busigen.runtime.convert.source import Source, opened, pairs_of
from busigen.runtime.dataset.card import licence, privacy
from busigen.runtime.dataset.format import differences
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive, is_lock
from busigen.runtime.storage.url import Address
from busigen.text import counted, describe, duration

RECORD = "convert.json"  # In the target: what it was converted from, and whether it is finished.
_RECORD = re.compile(re.escape(RECORD))
_ELSEWHERE = "Choose an --out that is empty or does not exist."


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` made."""

    out: Path
    to: str
    pairs: int
    left_out: int  # pairs that the format left out; its lines say why
    splits: Mapping[str, int]  # pairs by split, before any were left out; by "" without splits
    seconds: float | None  # None where it was finished before
    notes: tuple[str, ...]  # the format's lines

    def lines(self) -> Iterator[str]:
        """The lines of ``busigen convert``."""
        done = "converted before" if self.seconds is None else f"in {duration(self.seconds)}"
        parts = ", ".join(f"{name} {count}" for name, count in self.splits.items() if name)
        yield f"{counted(self.pairs, 'pair')} as {self.to} in {self.out}{f' ({parts})' if parts else ''}, {done}"
        yield from (f"  {note}" for note in self.notes)


def convert(
    place: Path | Address,
    out: Path,
    *,
    to: str,
    split: str | None = None,
    limit: int | None = None,
    classes: str | None = None,
    where: str | None = None,
    real: Path | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write a finished dataset, plain, merged or at a URL, in a format of `registry.FORMATS`.

    ``split`` parts the pairs (``train=0.8,val=0.2``), those that share a given background into one; ``limit`` is the
    most pairs, taken from the start; ``classes`` and ``where`` choose among them; ``real`` is a prepared folder to
    merge with. The same call continues a run that was ended. Every shard is checked against its recorded hash.

    Raises:
        UsageError: an option is unfit, or means nothing to the format.
        MissingDependencyError: the format needs an extra.
        InputError: it is no finished dataset, or no pair is chosen.
        IntegrityError: the dataset, or the prepared folder, is damaged.
        OutputError: ``out`` holds something else, or cannot be written.
    """
    start = time.perf_counter()
    progress = progress or Progress()
    kind = converter_of(to)
    _refuse_unfit(kind, to, split, limit, real)
    shares = dict(kind.default_splits) if split is None else parse_split(split, kind.allowed_splits)
    wanted = None if classes is None else parse_class_names(classes)
    prepared = None if real is None else Prepared.open(real, check=True)
    if isinstance(place, Path) and out.resolve().is_relative_to(place.resolve()):
        raise UsageError(f"--out {out} lies in the dataset {place}.", fix="Choose a folder outside of it.")
    with opened(place, progress) as source:
        chosen = source.choose(where, wanted, limit, shares)
        job = _job(out, source, chosen, list(shares), prepared)
        record = {
            "schema_version": 1,
            "busigen": busigen.__version__,
            "format": to,
            "dataset": {"name": source.name, "sha256": source.sha256},
            "options": {"split": split, "limit": limit, "classes": classes, "where": where},
            "real": None if prepared is None else prepared.split_hash,
            "pairs": chosen.height,
            "splits": dict(job.counts),
            "licence": licence(source.info),
            "privacy": privacy(source.info),
        }
        converter = kind(job, Target(out), progress)
        converter.begin()
        with output_errors(out):
            make_folder(out)
            with exclusive(out):
                earlier = _refuse_others(out, record)
                finished = earlier is not None and earlier["finished"]
                left_out = earlier["left_out"] if earlier and finished else _write(converter, source, chosen, record)
                remove(out / WORK_FOLDER)
                sync(out)
    seconds = None if finished else time.perf_counter() - start
    notes = tuple(converter.lines(left_out))
    return ConvertReport(out, to, chosen.height - left_out, left_out, job.counts, seconds, notes)


def _refuse_unfit(kind: type[Format], to: str, split: str | None, limit: int | None, real: Path | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}.", fix="Give a whole number above 0.")
    if real is not None and not kind.takes_real:
        raise UsageError(f"--real means nothing to {to}.", fix="Leave it out, or convert to nnunet.")
    if real is not None and split is not None:
        raise UsageError("--split and --real are both given.", fix="Leave --split out: the real set has splits.")


def _job(out: Path, source: Source, chosen: pl.DataFrame, splits: Sequence[str], prepared: Prepared | None) -> Job:
    counts = dict(chosen.group_by("split", maintain_order=True).len().iter_rows())
    present = set(chosen["class"].unique())
    return Job(
        out=out,
        classes=tuple(name for name in SAMPLE_CLASSES if name in present),
        splits=tuple(splits),
        counts={name: counts[name] for name in splits or ("",)},
        folds=1 + int(str(chosen["fold"].max())),
        types=source.columns,
        info=source.info,
        real=prepared,
    )


def _refuse_others(out: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier run of the same conversion; an OutputError where ``out`` holds anything else."""
    names = [name for name in names_in(out) if not is_lock(name) and not is_temporary(name, _RECORD)]
    if not names or names == [WORK_FOLDER]:
        return None
    try:
        found = read_json(out / RECORD, root=out)
    except FileNotFoundError:
        more = ", ..." if len(names) > 3 else ""
        problem = f"{out} holds other files ({', '.join(names[:3])}{more}) and no {RECORD}."
        raise OutputError(problem, fix=_ELSEWHERE) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{out / RECORD} is no record of a conversion: {error}.", fix=_ELSEWHERE) from error
    rest = {"finished", "left_out"}
    if not isinstance(found, dict) or type(found.get("finished")) is not bool or type(found.get("left_out")) is not int:
        raise OutputError(f"{out / RECORD} is no record of a conversion.", fix=_ELSEWHERE)
    before = {name: value for name, value in found.items() if name not in rest}
    if changed := differences(before, record):
        shown = "; ".join(f"{name}: {describe(old)} -> {describe(new)}" for name, old, new in changed[:3])
        fix = "Repeat the options that it was begun with, or choose another --out."
        raise OutputError(f"{out} holds another conversion ({shown}).", fix=fix)
    return found


def _write(converter: Format, source: Source, chosen: pl.DataFrame, record: dict[str, Any]) -> int:
    """Write all that is not written yet; returns how many pairs the format left out."""
    out, target, progress = converter.job.out, converter.target, converter.progress
    work = target.begin()
    for left in leftovers(out, _RECORD):
        left.unlink()
    write_json(out / RECORD, {**record, "finished": False, "left_out": 0})
    files: list[Path] = []
    left_out = 0
    progress.start("converting", chosen.height, unit="pair")
    for part, shard, pieces in source.chunks(chosen):
        numbered = [(len(files) + k, work / f"{len(files) + k:06d}.json", piece) for k, piece in enumerate(pieces)]
        files += [file for _, file, _ in numbered]
        waiting = []
        for number, file, piece in numbered:
            if (entries := _finished(file, piece.height)) is None:
                waiting.append((number, file, piece))
            else:
                left_out += entries.count(None)
                progress.advance(piece.height)
        if not waiting:
            continue
        with part.shard(shard):
            pairs = pairs_of(part, shard, [piece for _, _, piece in waiting])
            for (number, file, piece), chunk in zip(waiting, pairs, strict=True):
                entries = list(converter.write_chunk(number, chunk))
                if len(entries) != piece.height:
                    raise ValueError(f"{record['format']} returned {len(entries)} entries for {piece.height} pairs")
                target.settle()
                with atomic_file(file) as stream:
                    stream.write(json.dumps(entries).encode())
                left_out += entries.count(None)
                progress.advance(piece.height)
    converter.finish(Entries(files, chosen.height, progress))
    target.settle()
    write_json(out / RECORD, {**record, "finished": True, "left_out": left_out})
    return left_out


def _finished(file: Path, count: int) -> list[Any] | None:
    """The entries of a chunk that an earlier run finished; None where it did not."""
    try:
        entries = read_json(file)
    except (OSError, ValueError):
        return None
    return entries if isinstance(entries, list) and len(entries) == count else None
