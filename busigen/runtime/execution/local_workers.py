"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from busigen.errors import BusigenError, UsageError
from busigen.runtime.backends.base import usable_cores
from busigen.runtime.dataset.format import Plan
from busigen.runtime.execution.coordinator import Event
from busigen.runtime.execution.worker import SourceMaker, Worker
from busigen.terminal import log_to_stderr
from busigen.text import counted, without_credentials

if TYPE_CHECKING:
    from busigen.runtime.execution.run import GenerateOptions

# A fresh interpreter: an engine's threads do not survive a fork.
_FRESH = multiprocessing.get_context("spawn")


class Local:
    """This machine: one process, or with ``--workers`` several."""

    def task(self, asked: str | None) -> str | None:
        """See :class:`busigen.runtime.execution.launchers.Launcher`."""
        return asked

    def worker_pool(
        self, make: Callable[[int | None], SourceMaker], options: GenerateOptions
    ) -> LocalWorkerPool | None:
        """See :class:`busigen.runtime.execution.launchers.Launcher`."""
        if options.ray_address is not None:
            address = without_credentials(options.ray_address)
            raise UsageError(f"--ray-address is {address!r}, without Ray.", fix="Add --launcher ray.")
        workers = 1 if options.workers is None else options.workers
        require_workers(workers)
        if workers == 1:
            return None
        return LocalWorkerPool(make(options.threads or max(1, usable_cores() // workers)), workers)


def require_workers(workers: int) -> None:
    """Refuse a number of workers that none can mean.

    Raises:
        UsageError: it is not positive, or very large.
    """
    if not 1 <= workers <= 4096:
        raise UsageError(f"--workers is {workers}.", fix="Give a whole number from 1 to 4096.")


@dataclass
class _LocalWorker:
    process: Any
    pipe: Connection


class LocalWorkerPool:
    """Processes that are started afresh, talk through a pipe each, and end with this process, however that ends.

    Args:
        make: opens a worker's source.
        size: number of workers.
    """

    def __init__(self, make: SourceMaker, size: int) -> None:
        self.where = f"{counted(size, 'worker')} on this machine"
        self._make, self.size = make, size
        self._workers: dict[int, _LocalWorker] = {}
        self._next = 0

    def __enter__(self) -> Self:
        self._scratch = Path(tempfile.mkdtemp(prefix="busigen-workers-"))
        try:
            for _ in range(self.size):
                self._start_worker()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._workers.values():
            handle.process.kill()
        for handle in self._workers.values():
            handle.process.join()
            handle.pipe.close()
        self._workers.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def hand(self, worker: int, plan: Plan, number: int) -> None:
        """See :class:`busigen.runtime.execution.coordinator.WorkerPool`."""
        self._tell(worker, (plan, number))

    def end(self, worker: int) -> None:
        """See :class:`busigen.runtime.execution.coordinator.WorkerPool`."""
        self._tell(worker, None)

    def events(self, timeout: float) -> list[Event]:
        """See :class:`busigen.runtime.execution.coordinator.WorkerPool`."""
        ready = wait([handle.pipe for handle in self._workers.values()], timeout)
        return [self._heard(number) for number, handle in list(self._workers.items()) if handle.pipe in ready]

    def _tell(self, worker: int, order: tuple[Plan, int] | None) -> None:
        # Of a worker that is gone, its closed pipe tells in a moment.
        with contextlib.suppress(OSError):
            self._workers[worker].pipe.send(order)

    def _heard(self, worker: int) -> Event:
        handle = self._workers[worker]
        try:
            return Event(worker, handle.pipe.recv())
        except (EOFError, OSError):
            pass
        # The pipe is closed a moment before the process has ended.
        handle.process.join(10)
        code = handle.process.exitcode
        handle.process.kill()
        handle.pipe.close()
        del self._workers[worker]
        self._start_worker()
        if code is not None and code < 0:
            return Event(worker, f"{signal.Signals(-code).name} ended it")
        return Event(worker, f"it ended with code {code}")

    def _start_worker(self) -> None:
        mine, theirs = _FRESH.Pipe()
        process = _FRESH.Process(
            target=_work, args=(theirs, self._make, self._scratch, self._next == 0), name=f"worker-{self._next}"
        )
        with _signals_blocked():
            process.start()
        theirs.close()
        self._workers[self._next] = _LocalWorker(process, mine)
        self._next += 1


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Have a process that starts in the block inherit that it hears neither Ctrl-C nor SIGTERM.

    A terminal and many batch systems send these to every process; it is for the one that was started by hand to say
    what they mean.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(pipe: Connection, make: SourceMaker, scratch: Path, speaks: bool) -> None:
    """What runs in the worker's process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, args=(scratch,), name="parent", daemon=True).start()
    # All of them read the same folder of healthy images, and one account of it is enough.
    log_to_stderr(logging.INFO if speaks else logging.ERROR)
    try:
        worker = Worker(make, scratch)
        pipe.send(worker.identity())
        threading.Thread(target=_listen, args=(pipe, worker), name="orders", daemon=True).start()
        for message in worker.messages():
            pipe.send(message)
        # Whoever asked it to end has no more to say, and ends this process.
        threading.Event().wait()
    except (EOFError, BrokenPipeError):
        return
    except BusigenError as error:
        pipe.send(error)
    except Exception as error:  # A bug, which its own process has to tell of.
        logging.exception("worker failed")
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _listen(pipe: Connection, worker: Worker) -> None:
    """Take orders while others are carried out."""
    with contextlib.suppress(EOFError, OSError):
        while (order := pipe.recv()) is not None:
            worker.hand(*order)
        worker.end()


def _follow_parent(scratch: Path) -> None:
    """End with the process that started this one: what it would make, nobody would fetch."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)


_NAMES = ("ID", "COUNT", "MIN", "MAX")


class Slurm(Local):
    """Reads ``SLURM_ARRAY_TASK_ID`` and ``SLURM_ARRAY_TASK_COUNT``; all else is as without Slurm."""

    def task(self, asked: str | None) -> str | None:
        """See :class:`busigen.runtime.execution.launchers.Launcher`."""
        if asked is not None:
            raise UsageError(
                f"--array-task {asked} is given with --launcher slurm, which reads it from Slurm.",
                fix="Leave out one of them.",
            )
        return array_task(os.environ)


def array_task(environment: Mapping[str, str]) -> str:
    """The ``K/N`` of this process in its job array, whatever number the array begins with and steps by.

    Raises:
        UsageError: this is no job array, or one with gaps, whose numbers do not say which part is whose.
    """
    values = {}
    for name in _NAMES:
        text = environment.get(f"SLURM_ARRAY_TASK_{name}", "")
        if not text.isdecimal():
            raise UsageError(
                f"--launcher slurm: SLURM_ARRAY_TASK_{name} is {text!r}, so this is no task of a job array.",
                fix="Start it with `sbatch --array=1-N`, or give --array-task K/N yourself.",
            )
        values[name] = int(text)
    step = (values["MAX"] - values["MIN"]) / max(1, values["COUNT"] - 1) or 1
    position = (values["ID"] - values["MIN"]) / step
    if step != int(step) or position != int(position) or not 0 <= position < values["COUNT"]:
        raise UsageError(
            f"--launcher slurm: the job array {values['MIN']} to {values['MAX']} has gaps: it has {values['COUNT']} "
            "tasks.",
            fix="Use an array without gaps, or give each task its --array-task K/N with the N of the whole array.",
        )
    return f"{int(position) + 1}/{values['COUNT']}"
