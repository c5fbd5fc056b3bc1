"""One sample's whole history, and the proof of it: the sample drawn again from what the dataset records."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from busigen.errors import BusigenError, IntegrityError, UsageError
from busigen.runtime.atomic import atomic_file, output_errors
from busigen.runtime.collection import find_sample
from busigen.runtime.dataset import Member, decode_image, decode_mask, read_members
from busigen.runtime.history import REPAIR_FIRST, Recorded, contents, history_of, read_recorded
from busigen.runtime.layout import IMAGE_SUFFIX, MASK_SUFFIX, ROW_SUFFIX, SHARD_FOLDER, differences, key_of
from busigen.runtime.replay import Inputs, other_conditions
from busigen.runtime.sample import Drawn, Source
from busigen.runtime.shards import write_shard
from busigen.runtime.wording import told


@dataclass(frozen=True)
class Replay:
    """What drawing the sample again showed.

    Attributes:
        image_agrees: the drawn PNG's bytes are those in the shard and those that every row records.
        mask_agrees: likewise.
        differs: everything in which the drawn sample and the dataset differ, in words.
        conditions: in what the replay's conditions differ from the run's, in words.
        files: hashes of the drawn files by their kind.
    """

    image_agrees: bool
    mask_agrees: bool
    differs: tuple[str, ...]
    conditions: tuple[str, ...]
    files: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """A sample's history; everything in it is plain JSON but ``error``.

    Attributes:
        history: what the dataset records, by topic.
        problems: where the dataset's records contradict each other or its files, in words.
        replay: what drawing it again showed; None if that was not asked for or not possible.
        error: what the command ends with; None if everything agrees.
    """

    history: dict[str, Any]
    problems: tuple[str, ...]
    replay: Replay | None
    error: BusigenError | None

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            **self.history,
            "problems": list(self.problems),
            "replay": asdict(self.replay) if self.replay else None,
            "error": str(self.error) if self.error else None,
        }


def explain(
    folder: Path, key: str, *, inputs: Inputs | None = None, replay: bool = True, out: Path | None = None
) -> Explanation:
    """Tell one sample's history and draw it again.

    Args:
        folder: a dataset, whole or damaged.
        key: the sample's key as it stands in the manifest, or its index; of a merged dataset in parts, ``part/key``.
        inputs: where the run's bundle and healthy images lie; None for the shipped bundle.
        replay: whether to draw the sample again.
        out: folder for the drawn image, mask and row; nothing is written if None.

    Raises:
        InputError: ``folder`` is no dataset.
        UsageError: no sample of that key can be in the dataset, or ``out`` lies inside it.
        IntegrityError: nothing is left of the sample in the dataset.
        OutputError: ``out`` cannot be written.
    """
    inputs = inputs or Inputs()
    if out is not None and not replay:
        raise UsageError("--out is given with --no-replay, which draws nothing.", fix="Leave out one of them.")
    if out is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UsageError(f"--out {out} lies inside the dataset.", fix="Choose a folder outside it.")
    folder, key = find_sample(folder, key)
    recorded = read_recorded(folder, key)
    history = history_of(folder, recorded, inputs.graphs(recorded.run))
    result, error = None, None
    if replay:
        try:
            source = inputs.open(recorded.run, other_bundle=True)
            result, drawn = _replay(recorded, source)
        except BusigenError as refusal:
            error = refusal
        else:
            if out is not None:
                _write(drawn, out)
            error = _disagreement(recorded, result)
    if error is None and recorded.problems:
        error = IntegrityError(
            f"what the dataset holds of {key_of(recorded.index)} is damaged or contradicts itself.", fix=REPAIR_FIRST
        )
    return Explanation(history, tuple(recorded.problems), result, error)


def _replay(recorded: Recorded, source: Source) -> tuple[Replay, Member]:
    """Draw the sample alone and compare it with everything that the dataset holds of it.

    Alone is enough: a row of a batch is computed as if it were the only one, from two rows on, which every engine call
    has (``sampler.MIN_BATCH``). ONNX Runtime's CPU kernels cut a product into tiles by rows and columns but add up each
    entry in one order, whatever else is in the batch; only a single row takes another kernel (matrix times vector).
    Fourteen samples drawn alone, in batches of 16 and of 64 had the same bytes, and tests hold this for other sizes. On
    a GPU, libraries choose kernels by the batch's shape, so there a difference of few grey levels can be the batch's.
    """
    drawn = source.draw(recorded.plan.seed, [recorded.index], lambda accepted: None)
    member = _packed(drawn, recorded.number, source)
    differs, agrees = [], {}
    for kind, content in contents(member).items():
        wrong = [] if recorded.stored is None else _file_differences(kind, content, recorded.stored)
        sha256 = hashlib.sha256(content).hexdigest()
        for name, row in recorded.rows.items():
            if row.get(f"{kind}_sha256") != sha256:
                recorded_hash = str(row.get(f"{kind}_sha256"))[:12]
                wrong.append(f"{kind}: {name} records another sha256, {recorded_hash}... and not {sha256[:12]}....")
        differs += wrong
        agrees[kind] = not wrong
    hashed = ("image_sha256", "mask_sha256")
    for name, row in recorded.rows.items():
        changed = [change for change in differences(row, member.row) if change[0] not in hashed]
        differs += [f"{name}: {field} is {told(then)}, drawn again {told(now)}." for field, then, now in changed]
    if recorded.refused is not None and recorded.refused != drawn.rejections:
        draws = (recorded.refused, drawn.rejections)
        then, now = (", ".join(draw.reason for draw in refused) or "none" for refused in draws)
        differs.append(f"refused draws: {then}, drawn again {now}.")
    conditions = tuple(
        f"{name}: {told(then)} then, {told(now)} now" for name, then, now in other_conditions(recorded.run, source)
    )
    files = {kind: hashlib.sha256(content).hexdigest() for kind, content in contents(member).items()}
    return Replay(agrees["image"], agrees["mask"], tuple(differs), conditions, files), member


def _packed(drawn: Drawn, number: int, source: Source) -> Member:
    """The sample as the factory's own writer packs it."""
    index = drawn.samples[0].index
    with tempfile.TemporaryDirectory(prefix="busigen-") as name, output_errors(Path(name)):
        folder = Path(name)
        (folder / SHARD_FOLDER).mkdir()
        record = write_shard(folder, number, drawn, source.row_types())
        return next(read_members(folder / record.tar.file, range(index, index + 1)))


def _file_differences(kind: str, content: bytes, stored: Member) -> list[str]:
    before = contents(stored)[kind]
    if content == before:
        return []
    decode: Callable[[bytes], Any] = decode_image if kind == "image" else decode_mask
    try:
        new, old = decode(content).astype(np.int16), decode(before).astype(np.int16)
    except ValueError as error:
        return [f"{kind}: what the shard holds is {error}."]
    changed = int((new != old).sum())
    if changed == 0:
        return [f"{kind}: the same pixels, packed into other bytes."]
    levels = f", by up to {int(np.abs(new - old).max())} grey levels" if kind == "image" else ""
    return [f"{kind}: {changed} of {new.size} pixels differ{levels}."]


def _disagreement(recorded: Recorded, replay: Replay) -> IntegrityError | None:
    if not replay.differs:
        return None
    wrong = [kind for kind, agrees in (("image", replay.image_agrees), ("mask", replay.mask_agrees)) if not agrees]
    what = f"the bytes of {' and '.join(wrong)} differ" if wrong else "the files agree, but what is recorded differs"
    if replay.conditions:
        fix = "The conditions are others than the run's (see above), which can explain it: repeat them to be sure."
    elif recorded.problems:
        fix = REPAIR_FIRST
    else:
        fix = "Another kind of processor can shift grey levels; if this is the run's, the dataset was altered."
    return IntegrityError(f"sample {key_of(recorded.index)} does not replay: {what}.", fix=fix)


def _write(member: Member, out: Path) -> None:
    row = json.dumps(member.row, ensure_ascii=False).encode()
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((IMAGE_SUFFIX, member.image), (MASK_SUFFIX, member.mask), (ROW_SUFFIX, row)):
            with atomic_file(out / f"{member.key}.{suffix}") as file:
                file.write(content)
