"""What a dataset records of one sample, gathered from every place that holds it, and where these contradict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from busigen.errors import BusigenError, IntegrityError, UsageError
from busigen.files import atomic_file
from busigen.records import checked
from busigen.registry import ATTRIBUTES, MAX_LESIONS, NORMAL, SYNTHETIC
from busigen.runtime.backends.bundle import Bundle, unproven
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    Plan,
    Rejection,
    Source,
    as_typed,
    differences,
    extra_pictures,
    key_of,
    picture_columns,
    shard_path,
)
from busigen.runtime.dataset.reader import Member, plan_of, read_members, read_object, refuse_unreadable
from busigen.runtime.dataset.run_record import ListedShard
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, find_row
from busigen.runtime.maintenance.merge import find_sample
from busigen.runtime.maintenance.replay import Inputs, other_conditions, redrawn_shard, then_and_now
from busigen.runtime.maintenance.verify import read_run
from busigen.runtime.sampling.inputs.placement import Placement
from busigen.runtime.storage.files import output_errors
from busigen.text import describe, unproven_line

REPAIR_FIRST = "Run `busigen verify --repair` on the dataset."


@dataclass(frozen=True)
class Recorded:
    """What a dataset holds of one sample."""

    run: dict[str, Any]  # content of run.json
    plan: Plan
    index: int
    number: int  # its shard's
    record: ShardRecord | None  # that shard's; None if it is missing or damaged
    rows: dict[str, dict[str, Any]]  # the sample's row by the file that it stands in; one at least
    stored: Member | None  # None if it cannot be read
    problems: list[str]  # what is missing, damaged or contradicts the rest

    @property
    def refused(self) -> list[Rejection] | None:
        """Refused draws of this index; None where the shard's record is lost."""
        return [draw for draw in self.record.rejections if draw.index == self.index] if self.record else None


def parse_key(key: str, plan: Plan) -> int:
    """The index that a key stands for; a UsageError for anything but a number among the dataset's indices."""
    # No key has more digits, and Python refuses to read thousands of them.
    index = int(key) if key.isascii() and key.isdecimal() and len(key) <= 18 else -1
    if index not in plan.span:
        problem = f"the dataset has no sample {key!r}."
        raise UsageError(problem, fix=f"Give a key from {key_of(plan.span[0])} to {key_of(plan.span[-1])}.")
    return index


def read_recorded(folder: Path, key: str) -> Recorded:
    """Gather what a dataset, whole or damaged, holds of a sample; raises as `read_run` and `parse_key`.

    An IntegrityError says that nothing is left of the sample, an InputError also that there are links.
    """
    refuse_unreadable(folder)
    run = read_run(folder)
    plan = plan_of(run, folder / RUN_FILE)
    index = parse_key(key, plan)
    number = index // plan.shard_size
    indices, tar, table = plan.indices(number), shard_path(number, "tar"), shard_path(number, "parquet")
    problems: list[str] = []

    def tried(name: str, read: Callable[[], Any]) -> Any:
        """What ``read`` returns; None, with a problem, where the file is missing or damaged."""
        try:
            return read()
        except (IntegrityError, OSError, pl.exceptions.PolarsError) as error:
            if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
                problems.append(f"{name} is missing.")
            else:
                reason = error.problem if isinstance(error, IntegrityError) else str(error)
                problems.append(f"{name}: {reason.splitlines()[0] if reason else 'it cannot be read.'}")
        return None

    record = tried(shard_path(number, "json"), lambda: ShardRecord.read(folder, number))
    member = tried(tar, lambda: next(read_members(folder / tar, indices, only=[index])))
    rows: dict[str, Any] = {}
    if (folder / DATASET_FILE).exists():  # Else the run is unfinished, and has no manifest yet.
        rows[MANIFEST_FILE] = tried(MANIFEST_FILE, lambda: find_row(folder / MANIFEST_FILE, plan.count, index))
    rows[table] = tried(table, lambda: find_row(folder / table, len(indices), index))
    if member is not None:
        rows[f"{tar}:{member.key}.json"] = member.row
    if not (rows := {name: row for name, row in rows.items() if row is not None}):
        raise IntegrityError(f"nothing is left of sample {key_of(index)}: {' '.join(problems)}", fix=REPAIR_FIRST)
    recorded = Recorded(run, plan, index, number, record, rows, member, problems)
    problems += _contradictions(folder, recorded)
    return recorded


def _contradictions(folder: Path, recorded: Recorded) -> list[str]:
    found = []
    (first, row), *others = recorded.rows.items()
    for name, other in others:
        found += [
            f"{name} says {field} is {describe(b)}, {first} {describe(a)}." for field, a, b in differences(row, other)
        ]
    for kind, content in recorded.stored.pictures.items() if recorded.stored else ():
        for name, other in recorded.rows.items():
            if other.get(f"{kind}_sha256") != hashlib.sha256(content).hexdigest():
                found.append(f"the {kind} in the shard has another sha256 than {name} records.")
    if recorded.record is None:
        return found
    for file in (recorded.record.tar, recorded.record.parquet):
        try:
            # By its size first: what has another one may be endless to hash.
            if (folder / file.file).stat().st_size != file.size or FileRecord.of(folder, file.file) != file:
                found.append(f"{file.file} has another sha256 or size than its shard's record says.")
        except OSError:
            continue  # Named already, by who wanted to read it.
    info = read_object(folder / DATASET_FILE)
    if info is not None and listed_files(info).get(recorded.number, (None,))[0] != recorded.record.tar:
        found.append(f"{DATASET_FILE} records another {recorded.record.tar.file} than the shard's own record.")
    return found


def listed_files(info: Mapping[str, Any]) -> dict[int, tuple[FileRecord, FileRecord]]:
    """Tar and table of the shards that a ``dataset.json`` lists, by number; whatever else it lists is passed over."""
    entries, found = info.get("shards"), {}
    for entry in entries if isinstance(entries, list) else []:
        try:
            shard = checked(ListedShard, entry, DATASET_FILE, fix="")
        except IntegrityError:
            continue
        found[shard.number] = (shard.tar, shard.parquet)
    return found


def _history(folder: Path, recorded: Recorded, bundle: Bundle | None) -> dict[str, Any]:
    """A sample's history by topic, as plain JSON; ``bundle`` is the run's, if that is at hand."""
    run, row, refused = recorded.run, next(iter(recorded.rows.values())), recorded.refused
    fingerprint = run["fingerprint"]
    tar = shard_path(recorded.number, "tar")
    # The graphs that drew the sample, in the order in which they ran.
    label = row.get("class")
    sides = [row.get("window_side"), *(row.get(f"lesion_{number}_window_side") for number in range(2, MAX_LESIONS + 1))]
    graphs = bundle.info["graphs"] if bundle else {}
    used = ["prior", bundle.background_decoder] if bundle and row.get("background") == SYNTHETIC else []
    given = row.get("given_mask_sha256")
    if label != NORMAL:
        used += [
            "context",
            *([] if given else [f"mask-{label}"]),
            *(
                f"{graph}@{side}"
                for side in (sides[0], *filter(None, sides[1:]))
                for graph in ("encoder", f"lesion-{label}", f"blend-{label}", "decoder")
            ),
        ]
    used = list(dict.fromkeys(used))
    chain = [
        ("training split", fingerprint.get("split_hash")),
        ("checkpoint (base, LoRA, merged)", fingerprint.get("checkpoint")),
        ("bundle", fingerprint.get("bundle")),
        *((f"ONNX {name}", graphs[name]["files"][graphs[name]["file"]]) for name in used if name in graphs),
        ("healthy image", row.get("healthy_sha256")),
        ("given mask", given),
        (tar, recorded.record.tar.sha256 if recorded.record else None),
        ("image", row.get("image_sha256")),
        ("mask", row.get("mask_sha256")),
        *((kind.replace("_", " "), row.get(f"{kind}_sha256")) for kind in extra_pictures(row)),
    ]
    return {
        "dataset": str(folder),
        "key": key_of(recorded.index),
        "index": recorded.index,
        "seed": recorded.plan.seed,
        "class": row.get("class"),
        "attempt": row.get("attempt"),
        "refused": None if refused is None else [{"attempt": draw.attempt, "reason": draw.reason} for draw in refused],
        "asked": {
            "classes": as_typed(run, "--classes"),
            **{name: as_typed(run, f"--{name}") for name in ("normals", "lesions") if fingerprint.get(name)},
            **{name: row.get(f"asked_{name}") for name in (*ATTRIBUTES, "birads")},
        },
        "background": {
            "kind": row.get("background"),
            "file": row.get("healthy_file"),
            "sha256": row.get("healthy_sha256"),
            "folder": as_typed(run, "--healthy"),
            "folder_fingerprint": fingerprint.get("healthy"),
        },
        "given_mask": {
            "file": row.get("given_mask_file"),
            "sha256": given,
            "folder": as_typed(run, "--masks"),
            "folder_fingerprint": fingerprint.get("masks"),
            **{name: row.get(f"given_mask_{name}") for name in ("scale", "left", "top", "mirrored")},
        },
        "unproven": unproven(fingerprint),
        "bundle": {"name": as_typed(run, "--bundle") or "shipped with busigen", "sha256": fingerprint.get("bundle")},
        "lesions": _lesions(row),
        "shard": {"number": recorded.number, "file": tar},
        "chain": [{"link": name, "sha256": sha256} for name, sha256 in chain if sha256 is not None],
        "made_with": {
            "busigen": run.get("busigen"),
            "provider": fingerprint.get("provider"),
            "onnxruntime": fingerprint.get("engine_version"),
            **run.get("versions", {}),
        },
        "row": row,
    }


def _lesions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pixels, box and attributes of each of a sample's lesions, where a row may say them of several."""
    prefixes = [f"lesion_{number}_" for number in range(1, MAX_LESIONS + 1)]
    found = [{k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)} for prefix in prefixes]
    return [lesion for lesion in found if lesion.get("pixels") is not None]


@dataclass(frozen=True)
class Replay:
    """What drawing the sample again showed."""

    image_agrees: bool  # the PNG's bytes are those in the shard and those that every row records
    mask_agrees: bool
    extra_agree: dict[str, bool]  # likewise, of each lesion's mask and the map of tissues, where there are any
    differs: tuple[str, ...]  # everything in which the new sample and the dataset differ
    conditions: tuple[str, ...]  # in what the replay's conditions differ from the run's
    files: dict[str, str]  # hashes of the new files by their kind

    @property
    def agrees(self) -> dict[str, bool]:
        """Whether each picture agrees, by its kind, in the order of a shard."""
        return {"image": self.image_agrees, "mask": self.mask_agrees, **self.extra_agree}


@dataclass(frozen=True)
class Explanation:
    """A sample's history; everything in it is plain JSON but ``error``."""

    history: dict[str, Any]  # what the dataset records, by topic
    problems: tuple[str, ...]  # where the dataset's records contradict each other or its files
    replay: Replay | None  # None if it was not asked for or not possible
    error: BusigenError | None  # what the command ends with; None if everything agrees

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            **self.history,
            "problems": list(self.problems),
            "replay": asdict(self.replay) if self.replay else None,
            "error": str(self.error) if self.error else None,
        }

    def lines(self) -> Iterator[str]:
        """The lines of ``busigen explain``."""
        past = self.history
        made, background, bundle = past["made_with"], past["background"], past["bundle"]
        yield f"sample {past['key']} of {past['dataset']}: index {past['index']}, seed {past['seed']}, {past['class']}"
        yield f"  bundle        {bundle['name']} ({bundle['sha256']})"
        yield "  made with     " + ", ".join(f"{name} {version}" for name, version in made.items())
        yield f"  asked for     {_said(past['asked'])}"
        how = "it is        " if past["class"] == NORMAL else "painted into "
        if background["sha256"]:
            yield f"  {how} {background['file']} of {background['folder']} ({background['sha256']})"
        else:
            yield f"  {how} a {background['kind'] or 'generated'} background"
        if (mask := past["given_mask"])["sha256"]:
            yield f"  outline       {mask['file']} of {mask['folder']} ({mask['sha256']})"
            if at := Placement.recorded(past["row"]):
                turned = "mirrored, " if at.mirrored else ""
                yield f"                {turned}scaled by {at.scale:.4g}, {at.left} across, {at.top} down"
        if len(past["lesions"]) > 1:
            yield from (f"  lesion {number}      {_said(one)}" for number, one in enumerate(past["lesions"], start=1))
        attempts, refused = "1, nothing refused", past["refused"]
        if refused is None:
            attempts = "unknown: the record is lost"
        elif refused:
            reasons = ", ".join(f"attempt {draw['attempt']} refused: {draw['reason']}" for draw in refused)
            attempts = f"{len(refused) + 1} ({reasons})"
        yield f"  attempts      {attempts}"
        yield f"  shard         {past['shard']['file']}"
        yield "  fingerprints"
        width = max(len(link["link"]) for link in past["chain"])
        yield from (f"    {link['link']:{width}}  {link['sha256']}" for link in past["chain"])
        if past["unproven"]:
            yield f"  unproven: {unproven_line(past['unproven'])}"
        yield from (f"  problem: {problem}" for problem in self.problems)
        replay = self.replay
        if replay is None:
            return
        for kind, agrees in replay.agrees.items():
            name = f"the {kind}" if kind.isalpha() else kind.replace("_", " ")
            yield f"  replay: {name}'s bytes {'agree' if agrees else 'DIFFER'} ({replay.files[kind]})"
        yield from (f"    {difference}" for difference in replay.differs)
        if replay.conditions:
            yield "  replay: under other conditions than the run's; with another engine, grey levels may differ:"
            yield from (f"    {condition}" for condition in replay.conditions)


def _said(figures: Mapping[str, Any]) -> str:
    """What a person wants to read of each figure that there is; --json and the manifest hold all digits."""
    short = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in figures.items()}
    return ", ".join(f"{name} {value}" for name, value in short.items() if value is not None)


def explain(
    folder: Path, key: str, *, inputs: Inputs | None = None, replay: bool = True, out: Path | None = None
) -> Explanation:
    """Tell one sample's history and draw it again; raises what `read_recorded` does.

    ``key`` is the sample's in the manifest, or its index; of a merged dataset in parts, ``part/key``. ``inputs`` say
    where the run's bundle and healthy images lie; ``out`` is a folder outside the dataset for image, mask and row.
    """
    inputs = inputs or Inputs()
    if out is not None and not replay:
        raise UsageError("--out is given with --no-replay, which draws nothing.", fix="Leave out one of them.")
    if out is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UsageError(f"--out {out} lies inside the dataset.", fix="Choose a folder outside it.")
    folder, key = find_sample(folder, key)
    recorded = read_recorded(folder, key)
    history = _history(folder, recorded, inputs.recorded_bundle(recorded.run))
    result, error = None, None
    if replay:
        try:
            result, member = _replay(recorded, inputs.open(recorded.run, other_bundle=True))
        except BusigenError as refusal:
            error = refusal
        else:
            if out is not None:
                with output_errors(out):
                    out.mkdir(parents=True, exist_ok=True)
                    row = json.dumps(member.row, ensure_ascii=False).encode()
                    files = {f"{kind}.png": content for kind, content in member.pictures.items()} | {"json": row}
                    for suffix, content in files.items():
                        with atomic_file(out / f"{member.key}.{suffix}") as file:
                            file.write(content)
            error = _disagreement(recorded, result)
    if error is None and recorded.problems:
        error = IntegrityError(
            f"what the dataset holds of {key_of(recorded.index)} is damaged or contradicts itself.", fix=REPAIR_FIRST
        )
    return Explanation(history, tuple(recorded.problems), result, error)


def _replay(recorded: Recorded, source: Source) -> tuple[Replay, Member]:
    """Draw the sample alone and compare it with everything that the dataset holds of it.

    Alone is enough: on the processor, a row of a batch of ``MIN_BATCH`` or more does not depend on the others, as tests
    hold. On a GPU, libraries choose kernels by the batch's shape, so a difference of few grey levels can be due to it.
    """
    alone = range(recorded.index, recorded.index + 1)
    with redrawn_shard(source, recorded.plan, recorded.number, alone, lambda accepted: None) as (folder, record):
        member = next(read_members(folder / record.tar.file, alone))
    files = {kind: hashlib.sha256(content).hexdigest() for kind, content in member.pictures.items()}
    differs, agrees = [], {}
    for kind, sha256 in files.items():
        wrong = _pixel_differences(kind, member, recorded.stored) if recorded.stored else []
        for name, row in recorded.rows.items():
            then = row.get(f"{kind}_sha256")
            if then != sha256:
                wrong.append(f"{kind}: {name} records another sha256, {str(then)[:12]}... and not {sha256[:12]}....")
        differs += wrong
        agrees[kind] = not wrong
    for name, row in recorded.rows.items():
        differs += [
            f"{name}: {field} is {describe(then)}, drawn again {describe(now)}."
            for field, then, now in differences(row, member.row)
            if field not in ("image_sha256", "mask_sha256", *picture_columns(member.row))
        ]
    if recorded.refused is not None and recorded.refused != record.rejections:
        then, now = (
            ", ".join(draw.reason for draw in draws) or "none" for draws in (recorded.refused, record.rejections)
        )
        differs.append(f"refused draws: {then}, drawn again {now}.")
    conditions = tuple(then_and_now(other_conditions(recorded.run, source)))
    image_agrees, mask_agrees = (agrees.pop(kind) for kind in ("image", "mask"))
    return Replay(image_agrees, mask_agrees, agrees, tuple(differs), conditions, files), member


def _pixel_differences(kind: str, member: Member, stored: Member) -> list[str]:
    """In what a picture drawn again differs from the stored one, in words; empty where the bytes agree."""
    if member.pictures[kind] == stored.pictures[kind]:
        return []
    try:
        new, old = (one.decoded(kind).astype(np.int16) for one in (member, stored))
    except ValueError as error:
        return [f"{kind}: what the shard holds is {error}."]
    if not (changed := int((new != old).sum())):
        return [f"{kind}: the same pixels, packed into other bytes."]
    levels = f", by up to {int(np.abs(new - old).max())} grey levels" if kind == "image" else ""
    return [f"{kind}: {changed} of {new.size} pixels differ{levels}."]


def _disagreement(recorded: Recorded, replay: Replay) -> IntegrityError | None:
    if not replay.differs:
        return None
    wrong = [kind.replace("_", " ") for kind, agrees in replay.agrees.items() if not agrees]
    what = f"the bytes of {' and '.join(wrong)} differ" if wrong else "the files agree, but what is recorded differs"
    if replay.conditions:
        fix = "The conditions are others than the run's (see above), which can explain it: repeat them to be sure."
    elif recorded.problems:
        fix = REPAIR_FIRST
    else:
        fix = "Another kind of processor can shift grey levels; if this is the run's, the dataset was altered."
    return IntegrityError(f"sample {key_of(recorded.index)} does not replay: {what}.", fix=fix)
