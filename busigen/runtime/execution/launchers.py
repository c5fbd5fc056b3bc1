"""Where a run's shards are made: in this process, by several processes on this machine, or by Ray on several."""

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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from busigen.errors import BusigenError, UsageError
from busigen.runtime.backends.base import usable_cores
from busigen.runtime.execution.workers import Event, Order, SourceMaker, Worker, WorkerPool
from busigen.terminal import log_to_stderr
from busigen.text import counted, without_credentials

if TYPE_CHECKING:
    from busigen.runtime.execution.run import GenerateOptions

# A fresh interpreter: an engine's threads do not survive a fork.
_FRESH = multiprocessing.get_context("spawn")


class Launcher:
    """Which shards this command makes, and where: all that are asked for, here, by one process or several."""

    def task(self, asked: str | None) -> str | None:
        """The ``--array-task`` of this command; ``asked`` was typed. A ``UsageError`` if it cannot be known."""
        return asked

    def worker_pool(self, make: Callable[[int | None], SourceMaker], options: GenerateOptions) -> WorkerPool | None:
        """The workers; None where this process makes the shards itself. Raises for options of other launchers."""
        # ``make`` gives what a worker of so many threads opens its source with.
        if options.ray_address is not None:
            address = without_credentials(options.ray_address)
            raise UsageError(f"--ray-address is {address!r}, without Ray.", fix="Add --launcher ray.")
        workers = 1 if options.workers is None else options.workers
        require_workers(workers)
        if workers == 1:
            return None
        options.require_memory(workers)
        return LocalWorkerPool(make(options.threads or max(1, usable_cores() // workers)), workers)


class Slurm(Launcher):
    """A task of a Slurm job array; all else is as without Slurm."""

    def task(self, asked: str | None) -> str | None:
        """The task that Slurm's variables name."""
        if asked is not None:
            problem = f"--array-task {asked} is given with --launcher slurm, which reads it from Slurm."
            raise UsageError(problem, fix="Leave out one of them.")
        return array_task(os.environ)


def _ray() -> Launcher:
    from busigen.runtime.execution.ray_workers import OnRay

    return OnRay()


# See registry.LAUNCHERS.
LAUNCHERS: dict[str, Callable[[], Launcher]] = {"local": Launcher, "ray": _ray, "slurm": Slurm}


def launcher(name: str) -> Launcher:
    """The launcher of that name, whose module is imported now; a ``UsageError`` if there is none."""
    if name not in LAUNCHERS:
        raise UsageError(f"--launcher is {name!r}.", fix=f"Choose one of: {', '.join(LAUNCHERS)}.")
    return LAUNCHERS[name]()


def require_workers(workers: int) -> None:
    """Raise a ``UsageError`` for a number of workers that is not positive, or very large."""
    if not 1 <= workers <= 4096:
        raise UsageError(f"--workers is {workers}.", fix="Give a whole number from 1 to 4096.")


def array_task(environment: Mapping[str, str]) -> str:
    """The ``K/N`` of this process in its job array, whatever number it begins with and steps by; it has no gaps."""
    values = {}
    for name in ("ID", "COUNT", "MIN", "MAX"):
        text = environment.get(f"SLURM_ARRAY_TASK_{name}", "")
        if not text.isdecimal():
            problem = f"--launcher slurm: SLURM_ARRAY_TASK_{name} is {text!r}, so this is no task of a job array."
            raise UsageError(problem, fix="Start it with `sbatch --array=1-N`, or give --array-task K/N yourself.")
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


class LocalWorkerPool:
    """Processes that are started afresh, talk through a pipe each, and end with this process, however that ends."""

    def __init__(self, make: SourceMaker, size: int) -> None:
        self.where = f"{counted(size, 'worker')} on this machine"
        self._make, self.size = make, size
        self._workers: dict[int, tuple[Any, Connection]] = {}
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
        for process, _ in self._workers.values():
            process.kill()
        for process, pipe in self._workers.values():
            process.join()
            pipe.close()
        self._workers.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def order(self, worker: int, order: Order | None) -> None:
        """See :class:`busigen.runtime.execution.workers.WorkerPool`."""
        # Of a worker that is gone, its closed pipe tells in a moment.
        with contextlib.suppress(OSError):
            self._workers[worker][1].send(order)

    def events(self, timeout: float) -> list[Event]:
        """See :class:`busigen.runtime.execution.workers.WorkerPool`."""
        ready = wait([pipe for _, pipe in self._workers.values()], timeout)
        return [(number, self._received(number)) for number, (_, pipe) in list(self._workers.items()) if pipe in ready]

    def _received(self, worker: int) -> Any:
        process, pipe = self._workers[worker]
        try:
            return pipe.recv()
        except (EOFError, OSError):
            pass
        # The pipe is closed a moment before the process has ended.
        process.join(10)
        code = process.exitcode
        process.kill()
        pipe.close()
        del self._workers[worker]
        self._start_worker()
        killed = code is not None and code < 0
        return f"{signal.Signals(-code).name} ended it" if killed else f"it ended with code {code}"

    def _start_worker(self) -> None:
        mine, theirs = _FRESH.Pipe()
        process = _FRESH.Process(
            target=_work, args=(theirs, self._make, self._scratch, self._next == 0), name=f"worker-{self._next}"
        )
        with _signals_blocked():
            process.start()
        theirs.close()
        self._workers[self._next] = process, mine
        self._next += 1


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Have a process that starts in the block hear neither Ctrl-C nor SIGTERM, which many systems send to all."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(pipe: Connection, make: SourceMaker, scratch: Path, speaks: bool) -> None:

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                worker.order(pipe.recv())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, args=(scratch,), name="parent", daemon=True).start()
    # All of them read the same folder of healthy images, and one account of it is enough.
    log_to_stderr(logging.INFO if speaks else logging.ERROR)
    try:
        worker = Worker(make, scratch)
        pipe.send(worker.source_info())
        threading.Thread(target=listen, name="orders", daemon=True).start()
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


def _follow_parent(scratch: Path) -> None:
    """End with the process that started this one: what it would make, nobody would fetch."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)
