"""Backends, which run a bundle's graphs, and what opens one by its provider's name."""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import ProviderError, UsageError
from busigen.registry import AUTO, DEFAULT_BATCH, MIN_BATCH, PROVIDERS, Provider
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.bundle_record import component_of
from busigen.runtime.backends.tensorrt.profiles import Batches
from busigen.text import install_command

FALLBACK = "cpu"  # the provider that `--allow-fallback` goes on with: the one that needs nothing

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own words, and TensorRT's
    "outofmemory",
    "memory allocation",  # TensorRT's builder
    "insufficient memory",
    "cudaerror 2:",
    "failed to allocate memory",  # ONNX Runtime's arena, on the processor and on a card
    "bad_alloc",
    "bad allocation",
    "available memory of",  # ONNX Runtime's arena under gpu_mem_limit
    "cudaerrormemoryallocation",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
)

_log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]

Feed = Mapping[str, Any]  # inputs of a graph: arrays, or what :meth:`Backend.keep` returned


class Backend(ABC):
    """Runs a bundle's graphs."""

    name: str  # of the provider; part of a dataset's record
    version: str  # of what decides the bytes of a sample; recorded as well
    providers: tuple[str, ...] = ()  # the library's names of what really runs the graphs, the one asked first in front
    max_concurrent_calls: int = 1  # of ``run``
    batches: Batches | None = None  # that calls of a fixed size were built for, recorded; None where they take any

    @abstractmethod
    def run(self, graph: str, inputs: Feed) -> NDArray[np.float32]:
        """Run one graph on a batch and return its single output; some of the inputs may have been kept."""

    def keep(self, graph: str, inputs: Feed) -> Any:
        """Run one graph, and leave its output where it was computed, for the graphs of this backend that read it next.

        ``len`` of the result is the rows of its batch, ``numpy.asarray`` makes it an array.
        """
        return self.run(graph, inputs)

    def select(self, where: NDArray[np.bool_], chosen: Any, other: Any) -> Any:
        """``numpy.where`` of two kept outputs of four dimensions, kept."""
        return np.where(where, chosen, other)


@dataclass(frozen=True)
class EngineOptions:
    """How graphs are to be run. An engine reads what concerns it."""

    threads: int | None = None  # on the processor; None for one per core that this process may use
    bound: bool | None = None  # keep inputs and outputs in fixed buffers on the device; None does so on a card
    batch_sizes: tuple[int, ...] = (DEFAULT_BATCH,)  # that fixed engines are made for, the full one first
    exact_batches: Batches | None = None
    processes: int = 1  # that open the graphs here; of several, who starts them has looked whether there is memory

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}.", fix="Give 1 or more, or leave it out for one per core.")


@dataclass(frozen=True)
class Engine:
    """What a provider's module offers; both raise a ``ProviderError`` if the provider cannot be used here.

    ``open`` makes a backend on a checked bundle, with the first graph loaded, or raises an ``IntegrityError``.
    ``probe`` runs a network of one node, and says in a few words on what; broken libraries may end its process
    (`probe.probe`).
    """

    open: Callable[[Bundle, Provider, EngineOptions], Backend]
    probe: Callable[[Provider], str]


def _onnxruntime() -> Engine:
    from busigen.runtime.backends.onnxruntime import ENGINE

    return ENGINE


def _tensorrt() -> Engine:
    from busigen.runtime.backends.tensorrt.backend import ENGINE

    return ENGINE


ENGINES: dict[str, Callable[[], Engine]] = {
    "cpu": _onnxruntime,
    "cuda": _onnxruntime,
    "cuda-tf32": _onnxruntime,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}  # of each provider of `registry.PROVIDERS`, what imports its engine


def engine_of(provider: Provider) -> Engine:
    """The engine that runs a provider's graphs; a ``ProviderError`` if a module that it needs is not installed."""
    try:
        return ENGINES[provider.name]()
    except ModuleNotFoundError as error:
        raise ProviderError(
            f"--provider {provider.name} needs {error.name}, which is not installed.",
            fix=f"On a machine with an NVIDIA GPU run {install_command(provider.extra)}, or use --provider {FALLBACK}.",
        ) from error


def provider_named(name: str) -> Provider:
    """The provider of that name; a ``UsageError`` if there is none."""
    if name not in PROVIDERS:
        raise UsageError(f"unknown provider {name!r}.", fix=f"Choose one of: {', '.join((AUTO, *PROVIDERS))}.")
    return PROVIDERS[name]


def open_backend(
    bundle: Bundle, provider: str = FALLBACK, options: EngineOptions | None = None, *, allow_fallback: bool = False
) -> Backend:
    """A backend on an opened, checked bundle, by the provider's name in ``registry.PROVIDERS``; see `Engine`.

    With ``allow_fallback``, the processor takes the place of a provider that cannot be used. The backend then says
    ``cpu``, as the dataset's record will. A ``UsageError`` says that there is no such provider.
    """
    chosen, options = provider_named(provider), options or EngineOptions()
    try:
        return engine_of(chosen).open(bundle, chosen, options)
    except ProviderError as error:
        if not allow_fallback or provider == FALLBACK:
            raise
        _log.warning("provider: %s, because of --allow-fallback: %s", FALLBACK, error.problem)
    return open_backend(bundle, FALLBACK, options)


def usable_cores() -> int:
    """Cores that this process may use; where the system does not say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ran_out(error: BaseException | str) -> bool:
    """Whether an engine's error, or a library's message, says that there was too little memory."""
    account = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in account for sign in _OUT_OF_MEMORY)


def largest_that_fits(rows: int, fits: Callable[[int], bool]) -> int:
    """The first of a half, a quarter, an eighth... of ``rows`` that fits; 0 if not even ``MIN_BATCH`` do."""
    while (rows := rows // 2) >= MIN_BATCH:
        if fits(rows):
            return rows
    return 0


class TimedBackend(Backend):
    """A backend that runs another one and adds up the time of its calls, by stage; first calls include loading."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name, self.version = backend, backend.name, backend.version
        self.max_concurrent_calls, self.batches = backend.max_concurrent_calls, backend.batches
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def run(self, graph: str, inputs: Feed) -> NDArray[np.float32]:
        """See :class:`Backend`."""
        output: NDArray[np.float32] = self._timed(self.backend.run, graph, inputs)
        return output

    def keep(self, graph: str, inputs: Feed) -> Any:
        """See :class:`Backend`."""
        return self._timed(self.backend.keep, graph, inputs)

    def select(self, where: NDArray[np.bool_], chosen: Any, other: Any) -> Any:
        """See :class:`Backend`."""
        return self.backend.select(where, chosen, other)

    def _timed(self, run: Callable[[str, Feed], Any], graph: str, inputs: Feed) -> Any:
        began = time.perf_counter()
        output = run(graph, inputs)
        self.called(graph, inputs, output, began, time.perf_counter())
        return output

    def called(self, graph: str, inputs: Feed, output: Any, began: float, ended: float) -> None:
        """Take note of a call that ended; may come from any thread."""
        stage = component_of(graph)
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + ended - began

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far, the longest first."""
        with self._lock:
            return dict(sorted(self._seconds.items(), key=lambda item: -item[1]))
