"""The end of a run: one process completes the dataset, or whichever task finds the last shard there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from busigen.runtime.layout import Plan
from busigen.runtime.lock import turn
from busigen.runtime.shards import ShardRecord
from busigen.runtime.shelf import Shelf


@dataclass(frozen=True)
class Closing:
    """Completes the dataset of a run.

    Attributes:
        shelf: where its shards stand.
        run: its run record.
        plan: of the dataset.
        part: of this task; None if this process makes the whole dataset.
    """

    shelf: Shelf
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
        return len(everyone) == self.plan.shards and self.shelf.is_finished(self.run, list(everyone.values()))

    def reopen(self, records: Mapping[int, ShardRecord]) -> None:
        """Take back the claim that the dataset is complete, where shards of it are about to be made again."""
        if self.part is None or len(records) < self.part.shards:
            with self._alone():
                self.shelf.unfinish()

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
            if not self.shelf.is_finished(self.run, found):
                self.shelf.finish(self.run, found)
        return found, 0

    def _all(self, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
        if self.part is None:
            return {record.number: record for record in _in_order(records)}
        return self.shelf.complete(self.plan)

    def _alone(self) -> AbstractContextManager[None]:
        return turn(self.shelf.folder) if self.part else nullcontext()


def _in_order(records: Mapping[int, ShardRecord]) -> list[ShardRecord]:
    return [records[number] for number in sorted(records)]
