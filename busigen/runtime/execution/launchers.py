"""Where a run's shards are made: in this process, by several processes on this machine, or by Ray on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from busigen.errors import UsageError
from busigen.runtime.execution.coordinator import WorkerPool
from busigen.runtime.execution.worker import SourceMaker

if TYPE_CHECKING:
    from busigen.runtime.execution.run import GenerateOptions


class Launcher(Protocol):
    """Decides which shards this command makes, and where."""

    def task(self, asked: str | None) -> str | None:
        """The ``--array-task`` that this command makes; ``asked`` is what was typed.

        Raises:
            UsageError: the launcher knows it better, or cannot know it.
        """
        ...

    def worker_pool(self, make: Callable[[int | None], SourceMaker], options: GenerateOptions) -> WorkerPool | None:
        """The workers; None where this process makes the shards itself.

        Args:
            make: gives what a worker of so many threads opens its source with.
            options: of the run; ``workers``, ``threads``, ``provider`` and ``ray_address`` concern a launcher.

        Raises:
            UsageError: an option has a value that cannot be used, or belongs to another launcher.
            MissingDependencyError: the launcher's extra is not installed.
        """
        ...


def _local() -> Launcher:
    from busigen.runtime.execution.local_workers import Local

    return Local()


def _ray() -> Launcher:
    from busigen.runtime.execution.ray_workers import OnRay

    return OnRay()


def _slurm() -> Launcher:
    from busigen.runtime.execution.local_workers import Slurm

    return Slurm()


LAUNCHERS: dict[str, Callable[[], Launcher]] = {"local": _local, "ray": _ray, "slurm": _slurm}
"""What imports and makes the launcher of each name in ``registry.LAUNCHERS``."""


def launcher(name: str) -> Launcher:
    """The launcher of that name; its module is imported when it is asked for.

    Raises:
        UsageError: there is none.
    """
    if name not in LAUNCHERS:
        raise UsageError(f"--launcher is {name!r}.", fix=f"Choose one of: {', '.join(LAUNCHERS)}.")
    return LAUNCHERS[name]()
