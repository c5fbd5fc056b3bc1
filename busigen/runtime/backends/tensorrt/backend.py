"""Engines of all of a bundle's graphs on one card, as a backend."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import BusigenError, IntegrityError, MissingDependencyError, ProviderError
from busigen.registry import Provider
from busigen.runtime.backends.base import Arrays, Backend, EngineOptions, Feed
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.onnx_graph import FLOAT, one_node
from busigen.runtime.backends.tensorrt.build import BuildSpec, Library, build
from busigen.runtime.backends.tensorrt.device import (
    CudaFailure,
    Device,
    answered,
    cuda,
    cuda_problem,
    device_memory,
    free_memory,
    memory_problem,
    open_device,
)
from busigen.runtime.backends.tensorrt.engine_builder import EngineBuilder, EngineInfo, kept_batches
from busigen.runtime.backends.tensorrt.engine_cache import Cache, Key
from busigen.runtime.backends.tensorrt.profiles import Batches, Call, Profile, calls
from busigen.runtime.backends.tensorrt.session import Session, Slot

MAX_CONCURRENT_CALLS = 2
"""Calls that are under way at once: while one computes, another is uploaded or downloaded."""

_KERNELS = "kernels"
"""The cache's kind of what a library compiled for a card."""

_log = logging.getLogger(__name__)


class EngineBackend(Backend):
    """Engines of every graph, made where the cache lacks them, and loaded on the card before anything is drawn.

    ``run`` may be called by several threads: ``MAX_CONCURRENT_CALLS`` of their calls overlap, and one computes at a
    time.

    Args:
        bundle: an opened, checked bundle.
        provider: one of ``registry.PROVIDERS`` whose name is in ``registry.ENGINE_TARGETS``.
        options: how to run the graphs.
        cache: where engines are kept.

    Raises:
        ProviderError: library, card or driver is missing or too old.
        CapacityError: the card has too little memory; the largest batch that fits is named.
        BusigenError: an engine cannot be made.
    """

    def __init__(self, bundle: Bundle, provider: Provider, options: EngineOptions, cache: Cache | None = None) -> None:
        self._library = library_of(provider)
        self._device = open_device(provider.name)
        self._cache = cache or Cache()
        self._bundle = bundle
        builder, batches = _builder(self._library, bundle, options, self._cache, self._device)
        self.name = provider.name
        # Another engine may round otherwise, so what decides which one runs is part of a dataset's record.
        self.version = f"{self._library.version} on {self._device.name}, {batches}"
        self.providers = (f"{self._library.name} {self._library.version}", self._device.name)
        self.batches, self._largest = batches, batches.sizes[0]
        self.max_concurrent_calls = MAX_CONCURRENT_CALLS
        runtime = self._library.module.Runtime(self._library.logger)
        self._sessions: dict[str, Session] = {}
        self._kernel_keys: dict[str, Key] = {}
        try:
            for made in builder.make_all(_tell):
                key = kernels_key(made, self._device)
                kept = self._cache.read(_KERNELS, key) or b""
                _, content = builder.make(made.graph)
                profiles = batches.profiles(made.graph)
                self._sessions[made.graph] = Session(self._library, runtime, content, profiles, kept)
                self._kernel_keys[made.graph] = key
            self._slots = self._claim_memory(batches.sizes[0])
        except CudaFailure as error:
            raise cuda_problem(provider.name, error, batches.sizes[0]) from error
        self._runtime = runtime
        self._free = list(range(MAX_CONCURRENT_CALLS))
        self._turn = threading.Condition()
        self._queue = threading.Lock()
        self._last: Any = None

    def run(self, graph: str, inputs: Feed) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backends.base.Backend`.

        Raises:
            IntegrityError: what the engine yields is no batch of numbers.
            ProviderError: the card failed.
        """
        # The current card is each thread's own, and threads begin with the first one.
        answered(cuda().cudaSetDevice(self._device.number))
        session = self._sessions[graph]
        count = len(next(iter(inputs.values())))
        contiguous = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in inputs.items()}
        parts = [self._call(graph, session, call, contiguous) for call in calls(count, session.profiles)]
        result = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not np.isfinite(result).all():
            raise IntegrityError(
                f"{self._bundle.graph(graph)} yields NaN or infinity in {self.name}, which is no image.",
                fix="Export the bundle again in another precision, or use --provider cpu.",
            )
        return result

    def _call(self, graph: str, session: Session, call: Call, inputs: Arrays) -> NDArray[np.float32]:
        number = self._take_slot()
        slot = self._slots[number]
        try:
            with self._queue:
                first = session.enqueue(call, inputs, slot, number, self._last)
                self._last = slot.computed
            output = session.collect(call, slot)
        except CudaFailure as error:
            raise cuda_problem(self.name, error, self._largest) from error
        finally:
            with self._turn:
                self._free.append(number)
                self._turn.notify()
        if first and (kernels := session.kernels()):
            self._keep(self._kernel_keys[graph], kernels)
        return output

    def _take_slot(self) -> int:
        with self._turn:
            self._turn.wait_for(lambda: self._free)
            return self._free.pop()

    def _claim_memory(self, batch: int) -> list[Slot]:
        """Buffers for the largest call of all graphs, two of each, and the memory in which all of them compute."""
        sessions = self._sessions.values()
        inputs = max(session.input_bytes for session in sessions)
        output = max(session.output_bytes for session in sessions)
        scratch = max(session.scratch_bytes for session in sessions)
        needed = scratch + MAX_CONCURRENT_CALLS * (inputs + output)
        if problem := memory_problem(self.name, self._device.name, batch, needed, free_memory()):
            raise problem
        address = device_memory(scratch)
        for session in sessions:
            session.use_scratch(address, scratch)
        return [Slot.make(inputs, output) for _ in range(MAX_CONCURRENT_CALLS)]

    def _keep(self, key: Key, kernels: bytes) -> None:
        try:
            self._cache.write(_KERNELS, key, kernels)
        except BusigenError as error:  # A cache that was copied here may be read-only, and the next run compiles again.
            _log.debug("compiled kernels are not kept: %s", error)


def kernels_key(made: EngineInfo, device: Device) -> Mapping[str, Any]:
    """All that compiled kernels depend on: the engine, the card and its driver."""
    return {"engine": dict(made.key), "device": device.name, "capability": device.capability, "driver": device.driver}


def library_of(provider: Provider) -> Library:
    """The library that runs a provider's engines.

    Raises:
        ProviderError: it is not installed, or cannot be loaded.
    """
    try:
        return Library.load(provider.name)
    except MissingDependencyError as error:
        fix = f"{error.fix.removesuffix('.')}, or use --provider cpu."
        raise ProviderError(error.problem.replace("--target", "--provider", 1), fix=fix) from error


def wanted_batches(library: Library, bundle: Bundle, options: EngineOptions, cache: Cache) -> list[Batches]:
    """What engines may be taken for, the best first and, last, what is built where the cache has none of these.

    Samples that are drawn again are drawn with engines for the same batches; whoever asks for several batches, as
    ``build-engines`` does, means these; and a single one may be the first of several that somebody built ahead.
    """
    if options.exact_batches:
        return [options.exact_batches]
    batches = Batches(options.batch_sizes)
    kept = kept_batches(library, bundle, cache, batches.sizes[0]) if len(batches.sizes) == 1 else []
    return [*kept, batches]


def _builder(
    library: Library, bundle: Bundle, options: EngineOptions, cache: Cache, device: Device
) -> tuple[EngineBuilder, Batches]:
    """What makes engines for this card: where the cache has them all, those; else what was asked for."""
    capabilities = ("", device.capability) if library.target.ahead else (device.capability,)
    wanted = wanted_batches(library, bundle, options, cache)
    for one in wanted:
        for capability in reversed(capabilities):
            builder = EngineBuilder(library, bundle, one, cache, capability=capability, device=device)
            if builder.has_all():
                return builder, one
    batches = wanted[-1]
    return EngineBuilder(library, bundle, batches, cache, capability=capabilities[0], device=device), batches


def _tell(made: EngineInfo) -> None:
    if not made.cached:
        _log.info("engine of %s built in %.1f s", made.graph, made.seconds)


_ROWS = 2
_VALUES = np.array([[-1.5, 0.0, 2.5], [3.0, -0.25, 1.0]], dtype=np.float32)


def trial_engine(library: Library) -> bytes:
    """An engine of ``Relu`` for two rows of three numbers.

    Raises:
        BusigenError: the library cannot build it here.
    """
    model = one_node("Relu", {"x": (FLOAT, ("batch", 3))}, (FLOAT, ("batch", 3)))
    return build(library, BuildSpec("trial", Path("trial.onnx"), model, [Profile(_ROWS, _ROWS, _ROWS)]))


def run_trial(library: Library) -> None:
    """Build that engine and run it on the current card, twice: the second call replays a CUDA graph.

    Raises:
        ProviderError: it cannot be run, or it computes something else.
        BusigenError: it cannot be built.
    """
    runtime = library.module.Runtime(library.logger)
    session = Session(library, runtime, trial_engine(library), [Profile(_ROWS, _ROWS, _ROWS)])
    session.use_scratch(device_memory(session.scratch_bytes), session.scratch_bytes)
    slot = Slot.make(session.input_bytes, session.output_bytes)
    for _ in range(2):
        call = Call(0, _ROWS, 0, _ROWS)
        session.enqueue(call, {"x": _VALUES}, slot, 0, None)
        if not np.array_equal(session.collect(call, slot), np.maximum(_VALUES, 0)):
            raise ProviderError(
                f"--provider {library.name}: {library.version} computes wrong numbers on this card.",
                fix="Install a newer NVIDIA driver, or use --provider cuda or cpu.",
            )


class _Tensorrt:
    """See :class:`busigen.runtime.backends.base.Engine`."""

    def open(self, bundle: Bundle, provider: Provider, options: EngineOptions) -> EngineBackend:
        """See :class:`busigen.runtime.backends.base.Engine`."""
        return EngineBackend(bundle, provider, options)

    def probe(self, provider: Provider) -> str:
        """See :class:`busigen.runtime.backends.base.Engine`."""
        library = library_of(provider)
        device = open_device(provider.name)
        run_trial(library)
        return f"{provider.name} {library.version} on {device.name}"


ENGINE = _Tensorrt()
