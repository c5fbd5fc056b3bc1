"""Where a run's complete shards stand: in the folder that it writes, or, from there, elsewhere (``runtime/remote``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from busigen.runtime.address import Address
from busigen.runtime.claim import claimed, standing_run
from busigen.runtime.finish import finish, is_finished, unfinish
from busigen.runtime.layout import Plan
from busigen.runtime.shards import ShardRecord
from busigen.runtime.standing import complete_shards, sound_shards

Records = Mapping[int, ShardRecord]


class Shelf:
    """A dataset in the folder that it is written in.

    Attributes:
        folder: where shards are written.
        name: what the user called the dataset's place.

    Args:
        folder: the dataset's folder; it need not exist.
    """

    name: Path | Address

    def __init__(self, folder: Path) -> None:
        self.folder = self.name = folder

    def standing_run(self) -> dict[str, Any] | None:
        """The run record that is there; None for a new dataset.

        Raises:
            OutputError: something else is there.
        """
        return standing_run(self.folder)

    def claimed(self, run: Mapping[str, Any], part: Plan | None) -> AbstractContextManager[dict[str, Any]]:
        """See :func:`busigen.runtime.claim.claimed`."""
        return claimed(self.folder, run, part)

    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that need not be made again."""
        return sound_shards(self.folder, plan)

    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that are complete now."""
        return complete_shards(self.folder, plan)

    def keep(self, record: ShardRecord, kept: Callable[[ShardRecord], None]) -> None:
        """Take a shard that was written to ``folder``; ``kept`` is told once it is safe."""
        kept(record)

    def hurry(self) -> None:
        """Let nobody wait: the run is to end at once."""

    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """See :func:`busigen.runtime.finish.is_finished`."""
        return is_finished(self.folder, run, records)

    def unfinish(self) -> None:
        """See :func:`busigen.runtime.finish.unfinish`."""
        unfinish(self.folder)

    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """See :func:`busigen.runtime.finish.finish`."""
        finish(self.folder, run, records)

    def held(self, plan: Plan, records: Records) -> tuple[Plan, Records]:
        """What of a plan, and of its complete shards, takes room in ``folder`` at a time."""
        return plan, records

    @property
    def holds_all(self) -> bool:
        """Whether the whole dataset lies on the disk of ``folder``."""
        return True

    @property
    def elsewhere(self) -> str:
        """What to choose where the disk of ``folder`` is too small."""
        return "another --out or a smaller --count"


@contextmanager
def hurried(shelf: Shelf) -> Iterator[None]:
    """Have the shelf hurry where the block is left by Ctrl-C, before anybody waits for what it still does."""
    try:
        yield
    except KeyboardInterrupt:
        shelf.hurry()
        raise
