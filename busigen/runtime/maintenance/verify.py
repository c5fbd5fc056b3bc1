"""``busigen verify``: every file of a dataset checked against its records, and the records against one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import BusigenError, InputError, IntegrityError
from busigen.files import is_temporary
from busigen.foreign import walk
from busigen.records import checked, read_json
from busigen.registry import NORMAL
from busigen.runtime.dataset.finalize import dataset_info, run_of
from busigen.runtime.dataset.format import (
    CROISSANT_FILE,
    DATASET_FILE,
    FINISHED_FILES,
    MANIFEST_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    differences,
    shard_files,
    shard_number,
    shard_path,
)
from busigen.runtime.dataset.reader import (
    Dataset,
    links,
    plan_of,
    read_object,
    recorded_shards,
    refuse_newer,
)
from busigen.runtime.dataset.run_record import RunRecord
from busigen.runtime.dataset.shards import FileRecord, read_table, recorded_schema
from busigen.runtime.maintenance.merge import (
    COLLECTION_FILES,
    PARTS_FOLDER,
    collection_info,
    collection_rows,
    open_parts,
    parts_of,
    recorded_sources,
)
from busigen.runtime.maintenance.verify_shard import (
    DELETE,
    FINISH,
    MEND,
    REPAIR,
    Counts,
    Problem,
    ShardFindings,
    check_shard,
)
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.inputs.given_masks import MaskFolder, MaskProof
from busigen.runtime.sampling.inputs.healthy_images import Backgrounds
from busigen.runtime.storage.lock import is_lock
from busigen.runtime.storage.url import Address
from busigen.text import SHOWN_PROBLEMS, counted, printable

_LISTED, _LISTED_SHARDS = 8, 1000  # fields and missing shards that are named one by one

Shards = Callable[[int], AbstractContextManager[object]]  # in its context, a shard's tar and table are there

_WORKERS = min(8, os.cpu_count() or 1)
_LINK = "is a link, and links are not followed."


@dataclass
class VerifyReport(Counts):
    """Outcome of ``verify``."""

    folder: Path | Address
    shards: int  # that there should be
    problems: tuple[Problem, ...]
    duplicates: int  # samples whose image equals an earlier one's

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def lines(self, *, proving: bool, masks: bool = False) -> Iterator[str]:
        """The lines of ``busigen verify``; ``proving`` says whether the healthy images were given, ``masks`` those."""
        shown = self.problems[:SHOWN_PROBLEMS]
        for fix in dict.fromkeys(problem.fix for problem in shown):
            yield from (problem.finding for problem in shown if problem.fix == fix)
            yield f"  -> {printable(fix)}"
        if len(self.problems) > SHOWN_PROBLEMS:
            yield f"and {counted(len(self.problems) - SHOWN_PROBLEMS, 'more problem')}"
        state = "is sound" if self.ok else f"has {counted(len(self.problems), 'problem')}"
        # The report counts the shards that there should be, which are those that were read only where none is missing.
        shards = f" in {counted(self.shards, 'shard')}" if self.ok else ""
        yield f"{self.folder} {state}: {counted(self.samples, 'sample')}{shards} read"
        if self.normals:
            equal = f"; equal to their healthy image, bit for bit: {self.normals_equal}" if proving else ""
            yield f"  normal, without a lesion: {self.normals}{equal}"
        if self.several:
            yield f"  with more than one lesion: {self.several}; each has a mask, and the sample's is all of these"
        if self.groups:
            yield (
                f"  groups of a grid whose samples are equal outside of their edit regions, bit for bit: "
                f"{self.groups_equal} of {self.groups}"
            )
        if masks:
            yield (
                f"  masks equal to those given, once letterboxed: {self.masks_equal}; moved, scaled or mirrored as "
                f"recorded: {self.masks_moved}; not proven: {self.masks_unproven}"
            )
        if not proving:
            return
        if self.backgrounds_synthetic:
            synthetic = counted(self.backgrounds_synthetic, "synthetic background")
            yield f"  {synthetic}: made from no healthy image, so there is nothing to prove"
        if self.backgrounds_synthetic < self.samples:
            yield (
                f"  backgrounds equal to their healthy image outside the edit region, bit for bit: "
                f"{self.backgrounds_proven}; not proven: {self.backgrounds_unproven}"
            )


def verify(
    folder: Path,
    *,
    healthy: Path | None = None,
    masks: Path | None = None,
    progress: Progress | None = None,
    names: Iterable[str] | None = None,
    shard: Shards = nullcontext,
) -> VerifyReport:
    """Check a whole dataset; nothing is changed. An InputError says that ``folder`` is no busigen dataset at all.

    Where ``healthy`` is given, the run's folder of healthy images, backgrounds are proven against it, and masks against
    ``masks``, the run's folder of these. ``names`` are all files of the dataset, relative to it, with forward slashes;
    ``shard`` brings a shard's files. By default, both are those in ``folder``.
    """
    progress = progress or Progress()
    if places := parts_of(folder):
        return combined(folder, [_verify_one(place, healthy, masks, progress) for place in places])
    return _verify_one(folder, healthy, masks, progress, names, shard)


def _verify_one(
    folder: Path,
    healthy: Path | None,
    masks: Path | None,
    progress: Progress,
    names: Iterable[str] | None = None,
    shard: Shards = nullcontext,
) -> VerifyReport:
    run = read_run(folder)
    plan, schema = plan_of(run, folder / RUN_FILE), recorded_schema(run["columns"])
    backgrounds = Backgrounds.below(healthy) if healthy else None
    given = MaskProof(MaskFolder(masks, progress), run["fingerprint"].get("jitter") or 0.0) if masks else None
    linked = {path.relative_to(folder).as_posix() for path in links(folder)}
    problems = [Problem(name, _LINK, REPAIR) for name in sorted(linked)]
    progress.start("verifying", plan.count)

    def check(number: int) -> ShardFindings:
        if not linked.isdisjoint(shard_files(number)):
            return ShardFindings(number)
        with shard(number):
            return check_shard(folder, plan, number, schema, backgrounds, progress, given)

    try:
        with ThreadPoolExecutor(_WORKERS) as pool:
            # Those that are there: how many there should be is a claim, which may be a billion.
            there = [] if SHARD_FOLDER in linked else recorded_shards(folder)
            shards = list(pool.map(check, [number for number in there if number in plan.numbers]))
    finally:
        progress.stop()
    problems += [problem for one in shards for problem in one.problems]
    if healthy:
        problems += _absent(healthy, shards)
    if masks:
        problems += _absent_masks(masks, shards)
    # Without it the run has not been finished, and what it would have written last is not missing but still to come.
    finished = (folder / DATASET_FILE).exists()
    if finished:
        problems += _check_dataset(folder, run, plan, shards)
    else:
        complete = sum(one.started for one in shards)
        problem = f"is missing, the run is unfinished: {complete} of {counted(plan.shards, 'shard')}."
        problems.append(Problem(DATASET_FILE, problem, "The same `busigen generate` command continues it."))
    duplicates = list(_duplicates(shards))
    problems += duplicates
    if names is None:
        names = (path.relative_to(folder).as_posix() for path in walk(folder) if not path.is_dir())
    problems += _strangers(names, plan, finished)
    return VerifyReport(
        folder=folder,
        shards=plan.shards,
        problems=tuple(problems),
        duplicates=len(duplicates),
        **_summed(shards),
    )


def _summed(parts: Sequence[Counts]) -> dict[str, int]:
    return {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(Counts)}


def combined(folder: Path, reports: Sequence[VerifyReport]) -> VerifyReport:
    """The report on a merged dataset, from those on its parts, in order."""
    own = check_collection(folder)
    inside = [
        replace(problem, file=f"{place.relative_to(folder).as_posix()}/{problem.file}")
        for place, report in zip(parts_of(folder), reports, strict=True)
        for problem in report.problems
    ]
    return VerifyReport(
        folder=folder,
        shards=sum(report.shards for report in reports),
        problems=(*inside, *own),
        duplicates=sum(report.duplicates for report in reports)
        + sum("equals that of" in problem.problem for problem in own),
        **_summed(reports),
    )


def read_run(folder: Path) -> dict[str, Any]:
    """A dataset's run record: ``run.json``, or what ``dataset.json`` says of it where that cannot be read.

    An InputError says that ``folder`` is no dataset, an IntegrityError that neither file is more than nearly a record.
    """
    wrong: list[IntegrityError] = []
    for name in (RUN_FILE, DATASET_FILE):
        try:
            run = _read_run_record(folder / name)
        except IntegrityError as error:
            wrong.append(error)
            continue
        if run is not None:
            return run
    if wrong:
        raise wrong[0]
    problem = f"{folder} is no busigen dataset: neither {RUN_FILE} nor {DATASET_FILE} can be read."
    raise InputError(problem, fix="Give the folder that was the `--out` of `busigen generate`.")


def has_run(folder: Path) -> bool:
    """Whether ``run.json`` is there and a run record."""
    try:
        return _read_run_record(folder / RUN_FILE) is not None
    except IntegrityError:
        return False


def _read_run_record(path: Path) -> dict[str, Any] | None:
    """The run record in a ``run.json`` or ``dataset.json``; None if the file is missing or no JSON object."""
    if (found := read_object(path)) is None:
        return None
    run = run_of(found) if path.name == DATASET_FILE else found
    checked(RunRecord, run, path, fix="Get the original file again.")
    plan_of(run, path)
    return run


def _check_dataset(folder: Path, run: dict[str, Any], plan: Plan, shards: list[ShardFindings]) -> Iterator[Problem]:
    linked = [name for name in FINISHED_FILES if (folder / name).is_symlink()]
    missing = [name for name in FINISHED_FILES if name in linked or not (folder / name).is_file()]
    yield from (Problem(name, "is missing.", FINISH) for name in missing if name not in linked)
    if RUN_FILE not in missing and not has_run(folder):
        yield Problem(RUN_FILE, "cannot be read as a run record.", REPAIR)
    started = {shard.number for shard in shards if shard.started}
    absent = plan.shards - len(started)
    for number in islice((number for number in plan.numbers if number not in started), min(absent, _LISTED_SHARDS)):
        yield Problem(shard_path(number, "json"), "is missing: the shard is not complete.", FINISH)
    if absent > _LISTED_SHARDS:
        yield Problem(SHARD_FOLDER, f"lacks {counted(absent - _LISTED_SHARDS, 'more shard')}.", FINISH)
    if DATASET_FILE in linked:
        return
    try:
        info = read_json(folder / DATASET_FILE, shards=len(shards), root=folder)
        if isinstance(info, dict):
            refuse_newer(info, folder / DATASET_FILE)
    except (OSError, ValueError):
        yield Problem(DATASET_FILE, "cannot be read as JSON.", MEND)
        return
    records = [shard.record for shard in shards if shard.record is not None]
    files = {} if MANIFEST_FILE in missing else {MANIFEST_FILE: FileRecord.of(folder, MANIFEST_FILE)}
    recorded = info.get("files") if isinstance(info, dict) else None
    # A changed manifest is the manifest's problem; dataset.json is judged by all the rest of what it says.
    blamed = [name for name, file in files.items() if isinstance(recorded, dict) and recorded.get(name) != asdict(file)]
    for name in blamed:
        problem = f"has another sha256 or size than {DATASET_FILE} records: its content was changed or damaged."
        yield Problem(name, problem, MEND)
    if len(records) == plan.shards:
        wanted = dataset_info(run, records, files)
        if isinstance(info, dict) and (blamed or missing):
            wanted["files"] = recorded
        if changed := differences(info, wanted):
            names = [name[:80] for name, _, _ in changed if name]
            named = ", ".join(names[:_LISTED] + ["..."] * (len(names) > _LISTED)) or "everything"
            problem = f"differs from {RUN_FILE}, the shards' records or the manifest in: {named}."
            yield Problem(DATASET_FILE, problem, MEND)
    tables = [shard.rows for shard in shards if shard.rows is not None]
    # What its hash gives away is named already, and damaged bytes are nothing to hand to a parser.
    if not files or blamed or len(tables) != plan.shards:
        return
    try:
        manifest = read_table(folder / MANIFEST_FILE, plan.count)
    except (OSError, pl.exceptions.PolarsError) as error:
        yield Problem(MANIFEST_FILE, f"cannot be read as a table: {error}.", MEND)
        return
    try:
        equal = manifest.equals(pl.concat(tables))
    except pl.exceptions.PolarsError:
        equal = False
    if not equal:
        yield Problem(MANIFEST_FILE, "does not equal the shards' rows.", f"Delete it. {FINISH}")


def _absent(healthy: Path, shards: list[ShardFindings]) -> Iterator[Problem]:
    """One problem for all healthy images that are not where they were looked for: the folder is wrong, not each one."""
    needed = set().union(*(shard.needed for shard in shards))
    if not (absent := {sha256: row for shard in reversed(shards) for sha256, row in shard.absent.items()}):
        return
    row = min(absent.values(), key=lambda row: row["index"])
    yield Problem(
        row["shard"],
        f"{len(absent)} of {len(needed)} healthy images are not below {healthy}; for example sample "
        f"{row['key']} needs {row.get('healthy_file') or 'the image'} (sha256 {row['healthy_sha256'][:12]}...).",
        "Give the folder that `busigen generate --healthy` was given.",
    )


def _absent_masks(masks: Path, shards: list[ShardFindings]) -> Iterator[Problem]:
    """One problem for all masks that are not where they were looked for."""
    absent = {sha256: row for shard in reversed(shards) for sha256, row in shard.absent_masks.items()}
    if row := min(absent.values(), key=lambda row: row["index"], default=None):
        yield Problem(
            row["shard"],
            f"{counted(len(absent), 'mask')} of the run's cannot be used, or not be found, below {masks}; for example "
            f"sample {row['key']} needs {row['given_mask_file']} (sha256 {row['given_mask_sha256'][:12]}...).",
            "Give the folder that `busigen generate --masks` was given.",
        )


def _duplicates(shards: list[ShardFindings]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for shard in shards:
        for digest, key in shard.hashes:
            if digest in first:
                problem = f"sample {key}: its image equals that of sample {first[digest]}."
                yield Problem(shard_path(shard.number, "tar"), problem, "Report it: every sample has noise of its own.")
            first.setdefault(digest, key)


def _strangers(names: Iterable[str], plan: Plan, finished: bool) -> Iterator[Problem]:
    for name in sorted(names):
        if is_temporary(name, WRITTEN):
            if finished:  # Else it goes when the same command continues.
                yield Problem(name, "is a temporary file of a killed run.", FINISH)
        elif name not in FINISHED_FILES and not is_lock(name) and shard_number(name) not in plan.numbers:
            yield Problem(name, "is no part of the dataset.", DELETE)


def check_collection(folder: Path) -> list[Problem]:
    """What is wrong with the files of a merged dataset beside its parts, whose own content is checked elsewhere."""
    linked = [path.name for path in links(folder)]
    # Merged datasets of before have no Croissant.
    own = [*COLLECTION_FILES, *([CROISSANT_FILE] if os.path.lexists(folder / CROISSANT_FILE) else [])]
    missing = [name for name in own if name in linked or not (folder / name).is_file()]
    found = [Problem(name, _LINK if name in linked else "is missing.", REPAIR) for name in missing]
    try:
        parts = open_parts(folder)
    except BusigenError:
        return found  # What its own check tells comes first; without it, nothing follows from the parts.
    for path in sorted(folder.iterdir()):
        known = path.name in (*own, PARTS_FOLDER) or is_lock(path.name) or is_temporary(path.name, WRITTEN)
        if not known:
            found.append(Problem(path.name, "is no part of the dataset.", DELETE))
    return found if missing else [*found, *_check_collection_files(folder, parts)]


def _check_collection_files(folder: Path, parts: Sequence[Dataset]) -> Iterator[Problem]:
    if (sources := recorded_sources(folder)) is None:
        yield Problem(DATASET_FILE, "does not list the parts that are there.", REPAIR)
    else:
        info = read_json(folder / DATASET_FILE)
        wanted = collection_info(folder, parts, sources)
        if info.get("files") != wanted["files"]:
            yield Problem(MANIFEST_FILE, f"has another sha256 or size than {DATASET_FILE} records.", REPAIR)
            wanted["files"] = info.get("files")
        if changed := differences(info, wanted):
            yield Problem(
                DATASET_FILE, f"differs from the parts in: {', '.join(name for name, _, _ in changed)}.", REPAIR
            )
    try:
        rows = read_table(folder / MANIFEST_FILE, sum(part.plan.count for part in parts))
        same = rows.equals(pl.concat(collection_rows(parts)))
    except (OSError, pl.exceptions.PolarsError) as error:
        yield Problem(MANIFEST_FILE, f"cannot be read as a table: {error}.", REPAIR)
        return
    except BusigenError:
        return  # A part's own table, which its check has named.
    if not same:
        yield Problem(MANIFEST_FILE, "does not equal the parts' rows.", REPAIR)
        return
    if "healthy_sha256" in rows.columns:
        rows = rows.remove((pl.col("class") == NORMAL) & pl.col("healthy_sha256").is_not_null())
    repeated = rows.filter(pl.col("part").n_unique().over("image_sha256") > 1)
    for group in repeated.partition_by("image_sha256", maintain_order=True):
        one, *others = (f"{row['part']}/{row['key']}" for row in group.iter_rows(named=True))
        for other in others:
            problem = f"sample {other}: its image equals that of sample {one}."
            yield Problem(MANIFEST_FILE, problem, "Report it: every seed has noise of its own.")
