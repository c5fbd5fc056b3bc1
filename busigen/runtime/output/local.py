"""A dataset in the folder that it is written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from busigen.runtime.dataset.finalize import finish, is_finished, unfinish
from busigen.runtime.dataset.format import Plan
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.output.base import Output
from busigen.runtime.output.completed_shards import complete_shards, sound_shards
from busigen.runtime.output.ownership import acquire_run, existing_run


class LocalOutput(Output):
    """A dataset in the folder that it is written in.

    Args:
        folder: the dataset's folder; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self.name = folder

    def stored_run(self) -> dict[str, Any] | None:
        """See :class:`Output`."""
        return existing_run(self.folder)

    def acquire(self, run: Mapping[str, Any], part: Plan | None) -> AbstractContextManager[dict[str, Any]]:
        """See :class:`Output`."""
        return acquire_run(self.folder, run, part)

    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards whose files have their recorded content."""
        return sound_shards(self.folder, plan)

    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards whose files have their recorded sizes."""
        return complete_shards(self.folder, plan)

    def keep(self, record: ShardRecord, kept: Callable[[ShardRecord], None]) -> None:
        """A shard in ``folder`` is safe already."""
        kept(record)

    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """See :func:`busigen.runtime.dataset.finalize.is_finished`."""
        return is_finished(self.folder, run, records)

    def unfinish(self) -> None:
        """See :class:`Output`."""
        unfinish(self.folder)

    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """See :class:`Output`."""
        finish(self.folder, run, records)
