"""Where a run's shards are made: in this process, by a crew of processes on this machine, or by Ray on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from busigen.errors import UsageError
from busigen.runtime.execution.coordinator import WorkerPool
from busigen.runtime.execution.worker import SourceMaker


@dataclass(frozen=True)
class WorkerOptions:
    """What was asked for of the workers.

    Attributes:
        workers: how many; None for what the launcher takes by itself.
        threads: compute threads of each; None likewise.
        provider: a name in ``registry.PROVIDERS``.
        ray_address: of a Ray cluster that runs; None for one of this command's own.
    """

    workers: int | None = None
    threads: int | None = None
    provider: str = "cpu"
    ray_address: str | None = None


class Launcher(Protocol):
    """Decides which shards this command makes, and where."""

    def task(self, asked: str | None) -> str | None:
        """The ``--array-task`` that this command makes; ``asked`` is what was typed.

        Raises:
            UsageError: the launcher knows it better, or cannot know it.
        """
        ...

    def worker_pool(self, make: Callable[[int | None], SourceMaker], wanted: WorkerOptions) -> WorkerPool | None:
        """The workers; None where this process makes the shards itself.

        Args:
            make: gives what a worker of so many threads opens its source with.
            wanted: what was asked for.

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
    """The launcher of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in LAUNCHERS:
        raise UsageError(f"--launcher is {name!r}.", fix=f"Choose one of: {', '.join(LAUNCHERS)}.")
    return LAUNCHERS[name]()
