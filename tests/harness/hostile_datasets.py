"""Datasets that were made to hurt their reader, and a process with little memory that verifies and repairs them.

``python -m tests.harness.hostile_datasets FOLDER...`` prints a line of JSON for each: what ``verify`` and
``verify --repair``
said, and how long they took.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import BusigenError
from busigen.records import MAX_BYTES
from busigen.runtime.dataset.shards import schema_of
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs, reseal

ROOM = 1 << 30
"""Bytes that the process may map beyond what it has after its imports."""

TAR, TABLE, RECORD = "shards/000001.tar", "shards/000001.parquet", "shards/000001.json"
NOT_READ = "cannot be read as a table:"
VICTIM = "victim"
"""A folder beside the dataset that nobody may touch."""


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def evil_tar(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> Callable[[Path], None]:
    """A shard whose first member is replaced, behind hashes that fit."""

    def damage(folder: Path) -> None:
        with tarfile.open(folder / TAR) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        member = members[0][0]
        member.name, member.type = name, kind
        for field, value in fields.items():
            setattr(member, field, value)
        with tarfile.open(folder / TAR, "w", format=tarfile.GNU_FORMAT) as tar:
            for one, content in members:
                tar.addfile(one, io.BytesIO(content) if one.isreg() else None)
        reseal(folder, 1)

    return damage


def sparse_tar(folder: Path) -> None:
    """A header that claims 8 GiB, and a file that has them: as a hole."""
    member = tarfile.TarInfo("000000003.image.png")
    member.size = 8 << 30
    (folder / TAR).write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(folder / TAR, 64 << 20)
    reseal(folder, 1)


def seal_manifest(folder: Path) -> None:
    data = (folder / "manifest.parquet").read_bytes()
    fact = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit(folder / "dataset.json", lambda info: info["files"]["manifest.parquet"].update(fact))


def table_bomb(file: str, rows: bool) -> Callable[[Path], None]:
    """A table of a million rows, or with a text of 64 MiB: some kilobytes on disk, behind hashes that fit."""

    def damage(folder: Path) -> None:
        schema = schema_of(NoiseSource().row_types())
        if rows:
            columns = [pl.repeat(None, 1 << 20, dtype=kind).alias(name) for name, kind in schema.items()]
            pl.select(columns).write_parquet(folder / file)
        else:
            whole = pl.read_parquet(folder / file)
            whole.with_columns(pl.lit("x" * (64 << 20)).alias("key")).write_parquet(
                folder / file, compression="zstd", statistics=False
            )
        assert (folder / file).stat().st_size < 1 << 20
        seal_manifest(folder) if file.startswith("manifest") else reseal(folder, 1)

    return damage


def foreign_table(folder: Path) -> None:
    pl.DataFrame({"index": list(range(8)), "evil": ["x"] * 8}).write_parquet(folder / "manifest.parquet")
    seal_manifest(folder)


def pipe(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def link(name: str, target: str) -> Callable[[Path], None]:
    """``name`` becomes a link to ``target`` in the folder beside the dataset; a folder's content moves there."""

    def damage(folder: Path) -> None:
        place = folder.parent / VICTIM / target
        if (folder / name).is_dir():
            (folder / name).rename(place)
        else:
            (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(place)
        (folder / RECORD).unlink()  # So that there is something to repair.

    return damage


def claim(count: int, shard_size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in ("run.json", "dataset.json"):
            edit(folder / name, lambda info: info["config"].update(count=count, shard_size=shard_size))

    return damage


def huge(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 2 * MAX_BYTES)


def brackets(name: str) -> Callable[[Path], None]:
    """As many empty lists as a file has room for, each of which takes fifty times that room in memory."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text().rstrip().removesuffix("}")
        (folder / name).write_text(f'{text}, "more": [{"[]," * (20 << 20)}[]]}}')

    return damage


def nested(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text().rstrip().removesuffix("}")
        (folder / name).write_text(f'{text}, "deep": {"[" * 800}{"]" * 800}}}')

    return damage


def attempts(folder: Path) -> None:
    table = pl.read_parquet(folder / TABLE)
    table.with_columns(pl.lit(1 << 62).cast(pl.Int64).alias("attempt")).write_parquet(folder / TABLE)
    reseal(folder, 1)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absolute name": (evil_tar("/etc/passwd"), f"{TAR}: "),
    "name with ..": (evil_tar("../../evil.png"), f"{TAR}: "),
    "name of a line and an escape": (evil_tar("a\n\x1b[2Jb"), f"{TAR}: "),
    "symbolic link": (evil_tar("000000003.image.png", tarfile.SYMTYPE, linkname="/etc/passwd"), f"{TAR}: "),
    "hard link": (evil_tar("000000003.image.png", tarfile.LNKTYPE, linkname="../victim/file"), f"{TAR}: "),
    "device": (evil_tar("000000003.image.png", tarfile.CHRTYPE, devmajor=1, devminor=5), f"{TAR}: "),
    "pipe in a tar": (evil_tar("000000003.image.png", tarfile.FIFOTYPE), f"{TAR}: "),
    "sparse member": (evil_tar("000000003.image.png", tarfile.GNUTYPE_SPARSE), f"{TAR}: "),
    "huge member": (sparse_tar, f"{TAR}: "),
    "manifest of a million rows": (
        table_bomb("manifest.parquet", rows=True),
        f"manifest.parquet: {NOT_READ} it does not",
    ),
    "manifest of much text": (
        table_bomb("manifest.parquet", rows=False),
        f"manifest.parquet: {NOT_READ} its pages unpack",
    ),
    "manifest of another schema": (foreign_table, "manifest.parquet: does not equal"),
    "table of a million rows": (table_bomb(TABLE, rows=True), f"{TABLE}: {NOT_READ} it does not"),
    "table of much text": (table_bomb(TABLE, rows=False), f"{TABLE}: {NOT_READ} its pages unpack"),
    "endless attempts": (attempts, f"{RECORD}: lists other refused draws"),
    "record as a pipe": (pipe(RECORD), f"{RECORD}: is not the record"),
    "tar as a pipe": (pipe(TAR), f"{TAR}: is a pipe, not a file"),
    "run.json as a pipe": (pipe("run.json"), "run.json: "),
    "dataset.json as a pipe": (pipe("dataset.json"), "dataset.json: "),
    "record larger than any": (huge(RECORD), f"{RECORD}: is not the record"),
    "dataset.json larger than any": (huge("dataset.json"), "dataset.json: cannot be read"),
    "record of 800 levels": (nested(RECORD), f"{RECORD}: is not the record"),
    "run.json of 800 levels": (nested("run.json"), "run.json: cannot be read"),
    "record of 20 million lists": (brackets(RECORD), f"{RECORD}: is not the record"),
    "run.json of 20 million lists": (brackets("run.json"), "run.json: cannot be read"),
    "a billion shards": (claim(10**9, 1), "shards: lacks 999998997 more shards"),
    "a shard of a billion": (claim(10**9, 10**9), "shards/000000.json: records "),
    "file name of two lines": (lambda folder: (folder / "a\n\x1b[2Jb").write_text(""), r"a\n\x1b[2Jb: is no part"),
    "lock as a link": (link(".lock", "file"), f"{RECORD}: is missing"),
    "shards as a link": (link("shards", "folder"), f"{RECORD}: is missing"),
    "tar as a link": (link(TAR, "file"), f"{RECORD}: is missing"),
}
"""How to make each dataset evil, and the start of a problem that ``verify`` has to name."""


def described(folder: Path) -> dict[str, Any]:
    """What both commands say of a dataset; a bug is whatever comes out as no answer of theirs."""
    started = time.monotonic()
    said: dict[str, Any] = {"problems": [], "verify": 0, "repair": 0, "bug": None}
    try:
        said["problems"] = [str(problem) for problem in verify(folder).problems]
        said["verify"] = 5 if said["problems"] else 0
        report = repair(folder, inputs=NoiseInputs())
        said["repair"] = report.error.exit_code if report.error else 0
        said["refused"] = [*report.refused, str(report.error or "")]
    except BusigenError as error:
        said["repair" if said["verify"] else "verify"] = error.exit_code
        said["refused"] = [str(error)]
    except BaseException as error:
        said["bug"] = repr(error)
    return {**said, "seconds": time.monotonic() - started}


def main(folders: list[str]) -> None:
    # polars starts its threads now: their stacks are no part of what is measured.
    pl.DataFrame({"a": [1]}).lazy().select(pl.len()).collect()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM,) * 2)
    for folder in folders:
        print(json.dumps(described(Path(folder))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
