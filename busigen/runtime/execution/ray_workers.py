"""Workers as Ray actors, on this machine or on a cluster's."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from busigen.errors import BusigenError, InputError, MissingDependencyError, UsageError
from busigen.runtime.backends.base import provider_named, usable_cores
from busigen.runtime.execution.launchers import Launcher, require_workers
from busigen.runtime.execution.workers import (
    Event,
    Order,
    RemoteSourceInfo,
    SourceMaker,
    Worker,
    WorkerMessage,
    WorkerPool,
    WorkerStopped,
)
from busigen.text import counted, install_command, without_credentials

if TYPE_CHECKING:
    from busigen.runtime.execution.run import GenerateOptions

_THREADS = 2  # cores per actor, where nothing else is asked for
_ORDERS = "orders"  # what an actor does in a thread of its own, so that it can be called while it makes a shard


class OnRay(Launcher):
    """One actor per so many cores, or per GPU, wherever Ray finds them."""

    def worker_pool(self, make: Callable[[int | None], SourceMaker], options: GenerateOptions) -> WorkerPool:
        """A pool of actors."""
        if options.workers is not None:
            require_workers(options.workers)
            if options.ray_address is None:
                options.require_memory(options.workers)
        threads = options.threads or (min(_THREADS, usable_cores()) if options.ray_address is None else _THREADS)
        resources = {"num_cpus": threads, "num_gpus": int(provider_named(options.provider).gpu)}
        return RayWorkerPool(make(threads), options.workers, resources, options.ray_address)


class _Actor:
    """A worker inside of Ray. Opening its source is a call of its own, so that an error there comes back as it is."""

    def open(self, make: SourceMaker) -> RemoteSourceInfo | Exception:
        try:
            self._worker = Worker(make)
        except BusigenError as error:
            return error
        return self._worker.source_info()

    def messages(self) -> Iterator[WorkerMessage | Exception]:
        try:
            yield from self._worker.messages()
        except BusigenError as error:
            yield error

    def order(self, order: Order | None) -> None:
        self._worker.order(order)


class RayWorkerPool:
    """Ray actors. One that is lost, with its machine or without, is replaced wherever Ray has room.

    ``make`` opens a worker's source, by paths that hold on every machine. Without ``size``, there are as many workers,
    of these ``resources``, as there is room for. Without the ``address`` of a cluster, one begins and ends with this
    pool.
    """

    def __init__(self, make: SourceMaker, size: int | None, resources: dict[str, int], address: str | None) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            problem = f"--launcher ray needs {error.name}, which is not installed."
            raise MissingDependencyError(problem, fix=f"Run {install_command('ray')}.") from error
        self._ray = ray
        self.where = "a Ray cluster" if address else "Ray on this machine"
        self.size = size or 0
        self._make, self._resources, self._address = make, resources, address
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}
        self._next = 0

    def __enter__(self) -> Self:
        # A cluster of our own has as many cores as there are, or as the workers that were asked for need.
        cores = max(usable_cores(), (self.size or 1) * self._resources["num_cpus"])
        own = {} if self._address else {"include_dashboard": False, "num_cpus": cores}
        with _handlers_kept():
            try:
                self._ray.init(address=self._address or "local", log_to_driver=False, configure_logging=False, **own)
            except Exception as error:  # Ray's have no base class: a node that comes up too slowly raises a plain one.
                with suppress(Exception):
                    self._ray.shutdown()
                lines = str(error).splitlines() or ["it does not say why"]
                place, fix = "started on this machine", "Try again when the machine has less to do, or use --launcher "
                fix += "local with --workers, without Ray."
                if self._address:
                    place = f"reached at {without_credentials(self._address)}"
                    fix = "Give the --ray-address of a cluster that runs, or leave it out for one on this machine."
                problem = f"Ray cannot be {place}: {without_credentials(lines[0].rstrip('.'))}."
                raise InputError(problem, fix=fix) from error
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors.values():
            with suppress(Exception):
                self._ray.kill(actor)
        with _handlers_kept():
            self._ray.shutdown()

    def order(self, worker: int, order: Order | None) -> None:
        """See :class:`busigen.runtime.execution.workers.WorkerPool`."""
        self._actors[worker].order.options(concurrency_group=_ORDERS).remote(order)

    def events(self, timeout: float) -> list[Event]:
        """See :class:`busigen.runtime.execution.workers.WorkerPool`."""
        if not self._calls:
            return []
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout, fetch_local=True)
        return [event for call in ready if (event := self._received(call)) is not None]

    def _received(self, call: Any) -> Event | None:
        worker = self._calls[call]
        # What a worker makes is a stream of messages; what opens its source is one of them.
        streaming = isinstance(call, self._ray.ObjectRefGenerator)
        try:
            message = self._ray.get(next(call) if streaming else call)
        except StopIteration:
            del self._calls[call]
            return None
        except self._ray.exceptions.RayTaskError as error:
            raise RuntimeError(str(error)) from error  # A bug: what is the user's own comes back as a value.
        except self._ray.exceptions.RayError as error:
            del self._calls[call]
            with suppress(Exception):
                self._ray.kill(self._actors[worker])
            del self._actors[worker]
            self._start_worker()
            return worker, str(error).splitlines()[0].rstrip(":. ")
        if not streaming or isinstance(message, WorkerStopped):
            del self._calls[call]
        if isinstance(message, RemoteSourceInfo):
            self._calls[self._actors[worker].messages.options(num_returns="streaming").remote()] = worker
        return worker, message

    def _start_all(self) -> None:
        cores, gpu = self._resources["num_cpus"], self._resources["num_gpus"]
        each = "a GPU" if gpu else counted(cores, "core")
        total = self._ray.cluster_resources()
        room = int(total.get("CPU", 0) // cores)
        if gpu:
            room = min(room, int(total.get("GPU", 0)))
        self.size = self.size or room
        if room < max(1, self.size):
            problem = f"{self.where} has room for {room} workers of {each} each, not for {max(1, self.size)}."
            raise UsageError(problem, fix="Give fewer --workers or --threads.")
        self.where += f": {counted(self.size, 'worker')} of {each}"
        for _ in range(self.size):
            self._start_worker()

    def _start_worker(self) -> None:
        options = {**self._resources, "max_restarts": 0, "concurrency_groups": {_ORDERS: 1}}
        actor = self._ray.remote(**options)(_Actor).remote()
        self._actors[self._next] = actor
        self._calls[actor.open.remote(self._make)] = self._next
        self._next += 1


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep Ray from taking over what Ctrl-C and SIGTERM do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
