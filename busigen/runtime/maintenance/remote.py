"""Commands that read a dataset, where it may be at a URL: its files are fetched shard by shard, and checked locally."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from busigen.errors import InputError, UsageError
from busigen.records import BYTES_PER_SHARD, MAX_BYTES
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    FINISHED_FILES,
    RUN_FILE,
    SHARD_FOLDER,
    record_number,
    shard_number,
    shard_path,
)
from busigen.runtime.dataset.reader import plan_of
from busigen.runtime.maintenance.explain import Explanation, explain, parse_key
from busigen.runtime.maintenance.merge import PARTS_FOLDER
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.maintenance.verify import VerifyReport, read_run, verify
from busigen.runtime.maintenance.verify_shard import FINISH, MEND, REPAIR, Problem
from busigen.runtime.progress import Progress
from busigen.runtime.storage.object_store import RetryingCaller, Store
from busigen.runtime.storage.url import Address
from busigen.text import disk_size


def verify_place(
    place: Path | Address,
    *,
    healthy: Path | None = None,
    masks: Path | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a dataset in a folder or at a URL (`verify`); a BusigenError if nothing here speaks its protocol."""
    if isinstance(place, Path):
        return verify(place, healthy=healthy, masks=masks, progress=progress)
    with viewed(place, progress) as view:
        names = view.store.sizes
        given = {"healthy": healthy, "masks": masks}
        report = verify(view.folder, **given, progress=progress, names=names, shard=view.shard)
    return replace(report, folder=place, problems=tuple(_at_url(problem) for problem in report.problems))


def explain_place(
    place: Path | Address, key: str, *, inputs: Inputs, replay: bool = True, out: Path | None = None
) -> Explanation:
    """Explain a sample in a folder or at a URL; see :func:`busigen.runtime.maintenance.explain.explain`."""
    if isinstance(place, Path):
        return explain(place, key, inputs=inputs, replay=replay, out=out)
    with viewed(place, inputs.progress) as view:
        plan = plan_of(read_run(view.folder), view.folder / RUN_FILE)
        with view.shard(parse_key(key, plan) // plan.shard_size):
            described = explain(view.folder, key, inputs=inputs, replay=replay, out=out)
    return replace(described, history={**described.history, "dataset": str(place)})


def refuse_repair(place: Path | Address) -> Path:
    """The folder that is to be repaired; a UsageError if it is a URL."""
    if isinstance(place, Path):
        return place
    fix = "Without it, verify names what to delete there, so that the same `busigen generate` command makes it anew."
    raise UsageError(f"--repair mends folders, and {place} is a URL.", fix=fix)


@contextmanager
def viewed(address: Address, progress: Progress | None = None) -> Iterator[RemoteView]:
    """See a dataset at a URL as a folder while the block runs; raises what :func:`verify_place` does."""
    store = Store(RetryingCaller(address, notify=(progress or Progress()).note, kind=InputError))
    with tempfile.TemporaryDirectory(prefix="busigen-") as name:
        yield RemoteView(store, Path(name))


class RemoteView:
    """A dataset at a URL: small files are fetched at once, shards as needed; or an InputError."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        sizes = store.sizes
        if any(name.startswith(f"{PARTS_FOLDER}/") for name in sizes):
            problem = f"{store.address} is a merged dataset in parts."
            raise InputError(problem, fix=f"Name one part, such as {store.address}/parts/000.")
        if RUN_FILE not in sizes and DATASET_FILE not in sizes:
            raise InputError(
                f"{store.address} is no busigen dataset: it has neither {RUN_FILE} nor {DATASET_FILE}.",
                fix="Give the URL that was the `--out` of `busigen generate`.",
            )
        records = sorted(name for name in sizes if record_number(name) is not None)
        for name in FINISHED_FILES:
            json = name in (RUN_FILE, DATASET_FILE)
            self._fetch(name, MAX_BYTES + BYTES_PER_SHARD * len(records) if json else None)
        (folder / SHARD_FOLDER).mkdir(exist_ok=True)
        for name in [name for name in records if sizes[name] > MAX_BYTES]:
            self._fetch(name, MAX_BYTES)
        for name, content in store.read_all([name for name in records if sizes[name] <= MAX_BYTES]):
            (folder / name).write_bytes(content)

    @contextmanager
    def shard(self, number: int) -> Iterator[None]:
        """Have a shard's tar and table in the folder while the block runs; its record is there in any case."""
        names = [shard_path(number, suffix) for suffix in ("tar", "parquet")]
        try:
            for name in names:
                self._fetch(name)
            yield
        finally:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, name: str, limit: int | None = None) -> None:
        """Have a file in the folder if there is one; in place of one beyond the limit, a hole of its size."""
        size, path = self.store.sizes.get(name), self.folder / name
        if size is not None and limit is not None and size > limit:
            with path.open("wb") as file:
                file.truncate(size)
        elif size is not None:
            fetch(self.store, name, path)


def fetch(store: Store, name: str, path: Path) -> None:
    """Copy a file that was listed to ``path``, unless it is gone by now; an InputError where there is no room."""
    size, free = store.sizes[name], shutil.disk_usage(path.parent).free
    if size > free:
        problem = f"{store.address / name} has {disk_size(size)}, and {path.parent} {disk_size(free)} free."
        raise InputError(problem, fix="Set TMPDIR to a folder with more room.")
    with contextlib.suppress(FileNotFoundError):  # Gone since it was listed, which a check tells.
        store.get(name, path)


def _at_url(problem: Problem) -> Problem:
    """The problem with what helps at a URL, where nothing is repaired in place."""
    if not any(problem.fix.endswith(fix) for fix in (FINISH, MEND, REPAIR)):
        return problem
    number = shard_number(problem.file)
    record = DATASET_FILE if number is None else shard_path(number, "json")
    anew = "the files that describe the dataset" if number is None else "that shard"
    return replace(
        problem,
        fix=f"Delete {record} there, if it is there, and run `busigen generate` with the same options again: it makes "
        f"anew {anew}.",
    )
