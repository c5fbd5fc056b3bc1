"""What a run needs of the place that its dataset goes to, and how the dataset is completed there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from busigen.runtime.dataset.format import Plan
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.storage.lock import turn
from busigen.runtime.storage.url import Address

Records = Mapping[int, ShardRecord]


class Output(ABC):
    """The place that a dataset is written to. A run writes each shard to ``folder`` and hands it over with ``keep``.

    Attributes:
        folder: local folder where shards are written.
        name: what the user called the dataset's place.
    """

    folder: Path
    name: Path | Address

    @abstractmethod
    def stored_run(self) -> dict[str, Any] | None:
        """The run record that is there; None for a new dataset.

        Raises:
            OutputError: something else is there.
        """

    @abstractmethod
    def acquire(self, run: Mapping[str, Any], part: Plan | None) -> AbstractContextManager[dict[str, Any]]:
        """Hold the place for this run; see :func:`busigen.runtime.output.ownership.acquire_run`."""

    @abstractmethod
    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that need not be made again."""

    @abstractmethod
    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that are complete now."""

    @abstractmethod
    def keep(self, record: ShardRecord, kept: Callable[[ShardRecord], None]) -> None:
        """Take a shard that was written to ``folder``; calls ``kept`` once it is safe."""

    @abstractmethod
    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """Whether the files that describe the whole dataset are there; see :mod:`busigen.runtime.dataset.finalize`."""

    @abstractmethod
    def unfinish(self) -> None:
        """Take back the claim that the dataset is complete."""

    @abstractmethod
    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """Write the files that describe the whole dataset, ``dataset.json`` last."""

    def abort(self) -> None:  # noqa: B027 -- nothing to do where nobody waits
        """Let nobody wait: the run is to end at once."""

    def held(self, plan: Plan, records: Records) -> tuple[Plan, Records]:
        """What of a plan, and of its complete shards, takes room in ``folder`` at a time."""
        return plan, records

    holds_all = True
    """Whether the whole dataset lies on the disk of ``folder``."""

    elsewhere = "another --out or a smaller --count"
    """What to choose where the disk of ``folder`` is too small."""


@contextmanager
def aborting(destination: Output) -> Iterator[None]:
    """Abort the output where the block is left by Ctrl-C, before anybody waits for what it still does."""
    try:
        yield
    except KeyboardInterrupt:
        destination.abort()
        raise


@dataclass(frozen=True)
class DatasetFinalizer:
    """Completes the dataset of a run.

    Attributes:
        destination: where its shards are.
        run: its run record.
        plan: of the dataset.
        part: of this task; None if this process makes the whole dataset.
    """

    destination: Output
    run: Mapping[str, Any]
    plan: Plan
    part: Plan | None

    def is_done(self, records: Mapping[int, ShardRecord]) -> bool:
        """Whether nothing is left to do for this process, whose sound shards ``records`` are.

        A task has nothing left to do, too, where shards of other tasks are missing: one of those completes the dataset.
        """
        mine = self.part or self.plan
        if len(records) < mine.shards:
            return False
        everyone = self._all(records)
        return len(everyone) == self.plan.shards and self.destination.is_finished(self.run, list(everyone.values()))

    def reopen(self, records: Mapping[int, ShardRecord]) -> None:
        """Take back the claim that the dataset is complete, where shards of it are about to be made again."""
        if self.part is None or len(records) < self.part.shards:
            with self._alone():
                self.destination.unfinish()

    def close(self, records: Mapping[int, ShardRecord]) -> tuple[list[ShardRecord], int]:
        """Write the files that describe the whole dataset if all its shards are there; two tasks may end at once.

        Args:
            records: of this process's shards, all of them.

        Returns:
            The records of the dataset's shards, or of this process's if some are still missing; how many are.
        """
        with self._alone():
            everyone = self._all(records)
            if len(everyone) < self.plan.shards:
                return _in_order(records), self.plan.shards - len(everyone)
            found = list(everyone.values())
            if not self.destination.is_finished(self.run, found):
                self.destination.finish(self.run, found)
        return found, 0

    def _all(self, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
        if self.part is None:
            return {record.number: record for record in _in_order(records)}
        return self.destination.complete(self.plan)

    def _alone(self) -> AbstractContextManager[None]:
        return turn(self.destination.folder) if self.part else nullcontext()


def _in_order(records: Mapping[int, ShardRecord]) -> list[ShardRecord]:
    return [records[number] for number in sorted(records)]
