"""Runs TensorRT engines of all of a bundle's graphs on one card, as a backend."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import BusigenError, IntegrityError, MissingDependencyError, ProviderError
from busigen.registry import Provider
from busigen.runtime.backends.base import Arrays, Backend, Engine, EngineOptions, Feed
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.onnx_graph import FLOAT, one_node
from busigen.runtime.backends.tensorrt.engine_builder import Cache, EngineBuilder, EngineInfo, Key, kept_batches
from busigen.runtime.backends.tensorrt.library import (
    BuildSpec,
    CudaFailure,
    Device,
    Library,
    answered,
    build,
    cuda,
    cuda_problem,
    device_memory,
    memory_problem,
    open_device,
    unusable,
)
from busigen.runtime.backends.tensorrt.profiles import Batches, Call, Place, Profile, calls, fill, places

MAX_CONCURRENT_CALLS = 2  # calls that are under way at once: while one computes, another is uploaded or downloaded
_KERNELS = "kernels"  # the cache's kind of what a library compiled for a card

_log = logging.getLogger(__name__)


class Slot:
    """Memory and stream of one call at a time; two of them, taken in turns, are the double buffer.

    Inputs and output have pinned host memory and an address on the card each. Upload, computation and download follow
    one another on ``stream``; ``computed`` is recorded after a computation. A `CudaFailure` says that there is no room.
    """

    def __init__(self, number: int, inputs: int, output: int) -> None:
        runtime = cuda()
        self.number = number
        self.stream: Any = answered(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.computed: Any = answered(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming))
        self.sent, self.received = _pinned(inputs), _pinned(output)
        self.inputs, self.output = device_memory(inputs), device_memory(output)


def _pinned(size: int) -> NDArray[np.uint8]:
    """Host memory that the card can read and write by itself, while the host works on."""
    size = max(size, 1)
    address = int(answered(cuda().cudaMallocHost(size)))
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@dataclass
class _Context:
    """An engine's execution context for one number of rows, and where the tensors lie in a slot."""

    raw: Any
    inputs: dict[str, Place]
    input_bytes: int
    output: Place
    warm: bool = False
    # CUDA graphs by the number of the slot, whose addresses they hold; None where the call cannot be captured.
    replays: dict[int, Any] = field(default_factory=dict)


class Session:
    """A deserialised engine of a library's ``runtime``, built with these ``profiles``.

    ``kept`` is the library's cache of kernels that it compiled for this card. A ProviderError says that the engine
    cannot be used on this card, a CapacityError that the card has too little memory for it.
    """

    def __init__(
        self, library: Library, runtime: Any, content: bytes, profiles: Sequence[Profile], kept: bytes = b""
    ) -> None:
        self.profiles, self._library = tuple(profiles), library
        module, said = library.module, len(library.said)
        self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise unusable(library.name, library.version, library.said[said:])
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
        (self._output,) = (name for name in names if name not in self._inputs)
        self._config = self._engine.create_runtime_config()
        # All engines compute in turns: one piece of memory serves them all.
        self._config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._kernels: Any = None
        if hasattr(self._config, "create_runtime_cache"):
            self._kernels = self._config.create_runtime_cache()
            if kept:
                # It looks at its version, the card and the driver, and leaves the rest as it was.
                self._kernels.deserialize(kept)
            self._config.set_runtime_cache(self._kernels)
        self._scratch = (0, 0)
        # By profile and rows: a fixed profile has one number of rows, a dynamic one all that come.
        self._contexts = {key: self._opened(*key) for key in enumerate(profile.most for profile in self.profiles)}
        self.input_bytes = max(context.input_bytes for context in self._contexts.values())
        self.output_bytes = max(context.output.size for context in self._contexts.values())
        self.scratch_bytes = int(self._engine.device_memory_size_v2)

    def _opened(self, number: int, rows: int) -> _Context:
        runtime, said = cuda(), len(self._library.said)
        if (context := self._engine.create_execution_context(self._config)) is None:
            raise unusable(self._library.name, self._library.version, self._library.said[said:])
        stream = answered(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        context.set_optimization_profile_async(number, int(stream))
        answered(runtime.cudaStreamSynchronize(stream))
        shapes = {name: (rows, *tuple(self._engine.get_tensor_shape(name))[1:]) for name in self._inputs}
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        laid, size = places(shapes)
        return _Context(context, laid, size, Place(0, tuple(context.get_tensor_shape(self._output))))

    def _context(self, call: Call) -> _Context:
        key = (call.profile, call.rows)
        if key not in self._contexts:
            self._contexts[key] = self._opened(*key)
            self._contexts[key].raw.set_device_memory(*self._scratch)
        return self._contexts[key]

    def use_scratch(self, address: int, size: int) -> None:
        """Compute in this memory of the card, which other sessions may use in turns."""
        self._scratch = (address, size)
        for context in self._contexts.values():
            context.raw.set_device_memory(address, size)

    def kernels(self) -> bytes:
        """The library's cache of what it compiled for this card, to be kept; empty where it has none."""
        kept = None if self._kernels is None else self._kernels.serialize()
        return b"" if kept is None else bytes(kept)

    def enqueue(self, call: Call, inputs: Arrays, slot: Slot, before: Any) -> bool:
        """Have the card upload rows of a batch, compute after the event ``before``, and download the result.

        It waits only for the first call with a profile and number of rows, and says whether this is one.
        """
        runtime, stream, said = cuda(), slot.stream, len(self._library.said)
        context = self._context(call)
        copy, kinds = runtime.cudaMemcpyAsync, runtime.cudaMemcpyKind
        fill(slot.sent, context.inputs, inputs, call.first, call.end)
        size = context.input_bytes
        answered(copy(slot.inputs, slot.sent.ctypes.data, size, kinds.cudaMemcpyHostToDevice, stream))
        if before is not None:
            answered(runtime.cudaStreamWaitEvent(stream, before, 0))
        for name, place in context.inputs.items():
            context.raw.set_tensor_address(name, slot.inputs + place.offset)
        context.raw.set_tensor_address(self._output, slot.output)
        first = not context.warm
        if not first and slot.number not in context.replays:
            context.replays[slot.number] = self._captured(context, stream)
        if (replay := context.replays.get(slot.number)) is not None:
            answered(runtime.cudaGraphLaunch(replay, stream))
        elif not context.raw.execute_async_v3(int(stream)):
            raise unusable(self._library.name, self._library.version, self._library.said[said:])
        if first:
            # This call compiles kernels and settles what it put off, none of which can be captured.
            answered(runtime.cudaStreamSynchronize(stream))
            context.warm = True
        answered(runtime.cudaEventRecord(slot.computed, stream))
        size = context.output.size
        answered(copy(slot.received.ctypes.data, slot.output, size, kinds.cudaMemcpyDeviceToHost, stream))
        return first

    def collect(self, call: Call, slot: Slot) -> NDArray[np.float32]:
        """Wait for a call that was enqueued in the slot and copy its rows out."""
        answered(cuda().cudaStreamSynchronize(slot.stream))
        return self._context(call).output.view(slot.received)[: call.end - call.first].copy()

    def _captured(self, context: _Context, stream: Any) -> Any:
        """The computation as a CUDA graph, which one call to the driver replays; None where it cannot be one."""
        runtime = cuda()
        capturable = getattr(context.raw, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(stream)):
            return None
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            answered(runtime.cudaStreamBeginCapture(stream, mode))
            launched = context.raw.execute_async_v3(int(stream))
            graph = answered(runtime.cudaStreamEndCapture(stream))
            if launched:
                return answered(runtime.cudaGraphInstantiate(graph, 0))
        except CudaFailure as error:
            # Loops decide on the host how they go on; such an engine runs call by call.
            _log.info("no CUDA graph of %s: %s", self._output, error.problem)
            runtime.cudaGetLastError()
        return None


class EngineBackend(Backend):
    """Engines of every graph, made where the cache lacks them, and loaded on the card before anything is drawn.

    ``MAX_CONCURRENT_CALLS`` calls of ``run`` overlap, and one computes at a time. A CapacityError names the largest
    batch that fits; a ProviderError says that library, card or driver is missing or too old.
    """

    def __init__(self, bundle: Bundle, provider: Provider, options: EngineOptions, cache: Cache | None = None) -> None:
        library, self._device, self._cache = library_of(provider), open_device(provider.name), cache or Cache()
        self._bundle = bundle
        builder, batches = _builder(library, bundle, options, self._cache, self._device)
        self.name = provider.name
        # Another engine may round otherwise, so what decides which one runs is part of a dataset's record.
        self.version = f"{library.version} on {self._device.name}, {batches}"
        self.providers = (f"{library.name} {library.version}", self._device.name)
        self.batches, self._largest = batches, batches.sizes[0]
        self.max_concurrent_calls = MAX_CONCURRENT_CALLS
        self._runtime = library.module.Runtime(library.logger)
        self._sessions: dict[str, Session] = {}  # by the graph's file
        self._kernel_keys: dict[str, Key] = {}
        self._slots: Queue[Slot] = Queue()
        self._enqueuing = threading.Lock()
        self._last: Any = None

        def tell(made: EngineInfo) -> None:
            if not made.cached:
                _log.info("engine of %s built in %.1f s", made.graph, made.seconds)

        try:
            for made in builder.make_all(tell):
                key = self._kernel_keys[bundle.file(made.graph)] = {"engine": dict(made.key), **self._device.key}
                kept = self._cache.read(_KERNELS, key) or b""
                _, content = builder.make(made.graph)
                profiles = batches.profiles(bundle.call_side(made.graph))
                self._sessions[bundle.file(made.graph)] = Session(library, self._runtime, content, profiles, kept)
            self._claim_memory()
        except CudaFailure as error:
            raise cuda_problem(provider.name, error, self._largest) from error

    def _claim_memory(self) -> None:
        sessions = self._sessions.values()
        inputs = max(session.input_bytes for session in sessions)
        output = max(session.output_bytes for session in sessions)
        scratch = max(session.scratch_bytes for session in sessions)
        needed = scratch + MAX_CONCURRENT_CALLS * (inputs + output)
        free, _ = answered(cuda().cudaMemGetInfo())
        if problem := memory_problem(self.name, self._device.name, self._largest, needed, int(free)):
            raise problem
        address = device_memory(scratch)
        for session in sessions:
            session.use_scratch(address, scratch)
        for number in range(MAX_CONCURRENT_CALLS):
            self._slots.put(Slot(number, inputs, output))

    def run(self, graph: str, inputs: Feed) -> NDArray[np.float32]:
        """See `Backend`; an ``IntegrityError`` if the output has NaN, a ``ProviderError`` if the card failed."""
        # The current card is each thread's own, and threads begin with the first one.
        answered(cuda().cudaSetDevice(self._device.number))
        count = len(next(iter(inputs.values())))
        contiguous = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in inputs.items()}
        file = self._bundle.file(graph)
        parts = [self._call(file, call, contiguous) for call in calls(count, self._sessions[file].profiles)]
        result = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not np.isfinite(result).all():
            wrong = f"{self._bundle.graph(graph)} yields NaN or infinity in {self.name}, which is no image."
            raise IntegrityError(wrong, fix="Export the bundle again in another precision, or use --provider cpu.")
        return result

    def _call(self, file: str, call: Call, inputs: Arrays) -> NDArray[np.float32]:
        session, slot = self._sessions[file], self._slots.get()
        try:
            with self._enqueuing:
                first = session.enqueue(call, inputs, slot, self._last)
                self._last = slot.computed
            output = session.collect(call, slot)
        except CudaFailure as error:
            raise cuda_problem(self.name, error, self._largest) from error
        finally:
            self._slots.put(slot)
        if first and (kernels := session.kernels()):
            try:
                self._cache.write(_KERNELS, self._kernel_keys[file], kernels)
            except BusigenError as error:  # A cache that was copied here may be read-only: the next run compiles again.
                _log.debug("compiled kernels are not kept: %s", error)
        return output


def library_of(provider: Provider) -> Library:
    """The library that runs a provider's engines; a ``ProviderError`` if it cannot be loaded."""
    try:
        return Library.load(provider.name)
    except MissingDependencyError as error:
        fix = f"{error.fix.removesuffix('.')}, or use --provider cpu."
        raise ProviderError(error.problem.replace("--target", "--provider", 1), fix=fix) from error


def wanted_batches(library: Library, bundle: Bundle, options: EngineOptions, cache: Cache) -> list[Batches]:
    """Batches whose engines may be taken, the best first; the last are built for if the cache has engines for none."""
    # Several sizes, as in build-engines, mean just these; a single one may be the first of several built ahead.
    if options.exact_batches:
        return [options.exact_batches]
    batches = Batches(options.batch_sizes)
    kept = kept_batches(library, bundle, cache, batches.sizes[0]) if len(batches.sizes) == 1 else []
    return [*kept, batches]


def _builder(
    library: Library, bundle: Bundle, options: EngineOptions, cache: Cache, device: Device
) -> tuple[EngineBuilder, Batches]:
    """What makes engines for this card: where the cache has them all, those; else what was asked for."""
    capabilities = (device.capability, "") if library.target.ahead else (device.capability,)
    for batches in wanted_batches(library, bundle, options, cache):
        for capability in capabilities:
            builder = EngineBuilder(library, bundle, batches, cache, capability=capability, device=device)
            if not builder.lacking():
                return builder, batches
    return builder, batches


def trial_engine(library: Library) -> bytes:
    """An engine of ``Relu`` for two rows of three numbers; a ``BusigenError`` if the library cannot build it here."""
    model = one_node("Relu", {"x": (FLOAT, ("batch", 3))}, (FLOAT, ("batch", 3)))
    return build(library, BuildSpec("trial", Path("trial.onnx"), model, [Profile(2, 2, 2)]))


def _probe(provider: Provider) -> str:
    """Build that engine and run it on the current card, twice: the second call replays a CUDA graph."""
    library, device = library_of(provider), open_device(provider.name)
    runtime = library.module.Runtime(library.logger)
    session = Session(library, runtime, trial_engine(library), [Profile(2, 2, 2)])
    session.use_scratch(device_memory(session.scratch_bytes), session.scratch_bytes)
    slot, call = Slot(0, session.input_bytes, session.output_bytes), Call(0, 2, 0, 2)
    values = np.array([[-1.5, 0.0, 2.5], [3.0, -0.25, 1.0]], dtype=np.float32)
    for _ in range(2):
        session.enqueue(call, {"x": values}, slot, None)
        if not np.array_equal(session.collect(call, slot), np.maximum(values, 0)):
            wrong = f"--provider {library.name}: {library.version} computes wrong numbers on this card."
            raise ProviderError(wrong, fix="Install a newer NVIDIA driver, or use --provider cuda or cpu.")
    return f"{provider.name} {library.version} on {device.name}"


ENGINE = Engine(EngineBackend, _probe)
