"""Where the tensors of a call lie: one block of memory for what goes in, and one for what comes out."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import BusigenError, CapacityError, IntegrityError, ProviderError
from busigen.runtime.backends.base import Arrays, says_ran_out
from busigen.runtime.backends.tensorrt.build import Library
from busigen.runtime.backends.tensorrt.device import CudaFailure, answered, cuda, device_memory, pinned_memory
from busigen.runtime.backends.tensorrt.profiles import Call, Profile

ALIGNMENT = 256
"""Bytes at whose multiples a tensor begins, as cudaMalloc's blocks do."""

ITEM = np.dtype(np.float32).itemsize
"""Bytes of a number: bundles take and give fp32, whatever they compute in."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its block: first byte, and shape with the batch in front."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * ITEM


def places(shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Place], int]:
    """Lay tensors out one after the other.

    Args:
        shapes: of each, the batch in front.

    Returns:
        Each one's place, and the block's size in bytes.
    """
    laid, at = {}, 0
    for name, shape in shapes.items():
        laid[name] = Place(at, tuple(shape))
        at += -(-laid[name].size // ALIGNMENT) * ALIGNMENT
    return laid, at


def fill(block: NDArray[np.uint8], laid: Mapping[str, Place], inputs: Arrays, first: int, end: int) -> None:
    """Write rows of a batch to their places, the last one repeated to the end of each.

    Args:
        block: the bytes of all inputs.
        laid: their places.
        inputs: the batch.
        first: row that the call begins with.
        end: row before which it ends.

    Raises:
        IntegrityError: an input is missing or has another shape than the engine's.
    """
    for name, place in laid.items():
        rows = inputs.get(name)
        if rows is None or rows.shape[1:] != place.shape[1:]:
            found = "is missing" if rows is None else f"has rows of shape {rows.shape[1:]}"
            raise IntegrityError(
                f"the engine's input {name!r} {found}; it takes {place.shape[1:]}.",
                fix="Export the bundle again with 'busigen export'.",
            )
        room = view(block, place)
        room[: end - first] = rows[first:end]
        room[end - first :] = rows[end - 1]


def view(block: NDArray[np.uint8], place: Place) -> NDArray[np.float32]:
    """A tensor in a block, as an array."""
    return block[place.offset : place.offset + place.size].view(np.float32).reshape(place.shape)


_SHOWN = 300
"""Characters of the library's own messages that an error quotes."""

_log = logging.getLogger(__name__)


@dataclass
class Slot:
    """Memory and stream of one call at a time. Two of them, taken in turns, are the double buffer.

    Attributes:
        stream: CUDA's, on which this slot's upload, computation and download follow one another.
        computed: event that is recorded after a computation.
        sent: pinned bytes of the inputs, and ``received`` of the output; as arrays.
        inputs: address of the inputs on the card, and ``output`` of the output.
    """

    stream: Any
    computed: Any
    sent: NDArray[np.uint8]
    received: NDArray[np.uint8]
    inputs: int
    output: int

    @classmethod
    def make(cls, inputs: int, output: int) -> Slot:
        """A slot with room for the largest inputs and the largest output, in bytes.

        Raises:
            CudaFailure: there is no room.
        """
        runtime = cuda()
        return cls(
            answered(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)),
            answered(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming)),
            _array_at(pinned_memory(inputs), inputs),
            _array_at(pinned_memory(output), output),
            device_memory(inputs),
            device_memory(output),
        )


@dataclass
class _Shape:
    """An engine at one profile: its context, and where the tensors lie in a slot."""

    context: Any
    inputs: dict[str, Place]
    input_bytes: int
    output: Place
    warm: bool = False
    # CUDA graphs by slot, whose addresses they hold; None where the call cannot be captured.
    replays: dict[int, Any] = field(default_factory=dict)


class Session:
    """A deserialised engine.

    Args:
        library: that made it.
        runtime: the library's, which deserialises.
        content: the serialised engine.
        profiles: that it was built with.
        kept: the library's cache of kernels that it compiled for this card; empty for none.

    Raises:
        ProviderError: the engine cannot be used on this card.
        CapacityError: the card has too little memory for it.
    """

    def __init__(
        self, library: Library, runtime: Any, content: bytes, profiles: Sequence[Profile], kept: bytes = b""
    ) -> None:
        self.profiles = tuple(profiles)
        self._library = library
        said = len(library.said)
        self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self._unusable(said)
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        is_input = library.module.TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == is_input]
        (self._output,) = (name for name in names if name not in self._inputs)
        self._kept = kept
        self._kernels: Any = None
        self._scratch = (0, 0)
        # By profile and rows: a static profile has one number of rows, a dynamic one all that come.
        self._shapes = {
            (number, profile.most): self._open(number, profile.most) for number, profile in enumerate(self.profiles)
        }

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs at the largest profile."""
        return max(shape.input_bytes for shape in self._shapes.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the output at the largest profile."""
        return max(shape.output.size for shape in self._shapes.values())

    @property
    def scratch_bytes(self) -> int:
        """Bytes that a computation needs for what lies between inputs and output, at the largest profile."""
        return int(self._engine.device_memory_size_v2)

    def use_scratch(self, address: int, size: int) -> None:
        """Compute in this memory of the card, which other sessions may use in turns."""
        self._scratch = (address, size)
        for shape in self._shapes.values():
            shape.context.set_device_memory(address, size)

    def kernels(self) -> bytes:
        """The library's cache of what it compiled for this card, to be kept; empty where it has none."""
        kept = None if self._kernels is None else self._kernels.serialize()
        return b"" if kept is None else bytes(kept)

    def enqueue(self, call: Call, inputs: Arrays, slot: Slot, number: int, before: Any) -> bool:
        """Have the card upload rows of a batch, compute, and download the result; returns at once.

        Args:
            call: which rows, with which profile.
            inputs: the batch.
            slot: whose last call has been collected.
            number: of the slot.
            before: event after which the computation may begin, because it uses the same memory in between; or None.

        Returns:
            Whether this was the profile's first call.
        """
        runtime, shape = cuda(), self._shape(call)
        fill(slot.sent, shape.inputs, inputs, call.first, call.end)
        to_card, to_host = (
            getattr(runtime.cudaMemcpyKind, f"cudaMemcpy{way}") for way in ("HostToDevice", "DeviceToHost")
        )
        copy = runtime.cudaMemcpyAsync
        answered(copy(slot.inputs, slot.sent.ctypes.data, shape.input_bytes, to_card, slot.stream))
        if before is not None:
            answered(runtime.cudaStreamWaitEvent(slot.stream, before, 0))
        first = not shape.warm
        self._compute(shape, slot, number)
        answered(runtime.cudaEventRecord(slot.computed, slot.stream))
        answered(copy(slot.received.ctypes.data, slot.output, shape.output.size, to_host, slot.stream))
        return first

    def collect(self, call: Call, slot: Slot) -> NDArray[np.float32]:
        """Wait for a call that was enqueued in the slot and copy its rows out."""
        answered(cuda().cudaStreamSynchronize(slot.stream))
        output = self._shape(call).output
        return view(slot.received, output)[: call.end - call.first].copy()

    def _compute(self, shape: _Shape, slot: Slot, number: int) -> None:
        runtime, stream = cuda(), slot.stream
        if not shape.warm:
            # The first call compiles kernels and settles what it put off, none of which can be captured.
            self._launch(shape, slot)
            answered(runtime.cudaStreamSynchronize(stream))
            shape.warm = True
            return
        if number not in shape.replays:
            shape.replays[number] = self._captured(shape, slot)
        if (replay := shape.replays[number]) is None:
            self._launch(shape, slot)
        else:
            answered(runtime.cudaGraphLaunch(replay, stream))

    def _captured(self, shape: _Shape, slot: Slot) -> Any:
        """The computation as a CUDA graph, which one call to the driver replays; None where it cannot be one."""
        runtime = cuda()
        self._address(shape, slot)
        capturable = getattr(shape.context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(slot.stream)):
            return None
        relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            answered(runtime.cudaStreamBeginCapture(slot.stream, relaxed))
            launched = shape.context.execute_async_v3(int(slot.stream))
            graph = answered(runtime.cudaStreamEndCapture(slot.stream))
            if launched:
                return answered(runtime.cudaGraphInstantiate(graph, 0))
        except CudaFailure as error:
            # Loops decide on the host how they go on; such an engine runs call by call.
            _log.info("no CUDA graph of %s: %s", self._output, error.problem)
            runtime.cudaGetLastError()
        return None

    def _launch(self, shape: _Shape, slot: Slot) -> None:
        self._address(shape, slot)
        said = len(self._library.said)
        if not shape.context.execute_async_v3(int(slot.stream)):
            raise self._unusable(said)

    def _address(self, shape: _Shape, slot: Slot) -> None:
        for name, place in shape.inputs.items():
            shape.context.set_tensor_address(name, slot.inputs + place.offset)
        shape.context.set_tensor_address(self._output, slot.output)

    def _shape(self, call: Call) -> _Shape:
        if (wanted := (call.profile, call.rows)) not in self._shapes:
            self._shapes[wanted] = self._open(*wanted)
            self._shapes[wanted].context.set_device_memory(*self._scratch)
        return self._shapes[wanted]

    def _open(self, number: int, rows: int) -> _Shape:
        module, said = self._library.module, len(self._library.said)
        config = self._engine.create_runtime_config()
        # All engines compute in turns: one piece of memory serves them all.
        config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "create_runtime_cache"):
            if self._kernels is None:
                self._kernels = config.create_runtime_cache()
                if self._kept:
                    # It looks at its version, the card and the driver, and leaves the rest as it was.
                    self._kernels.deserialize(self._kept)
            config.set_runtime_cache(self._kernels)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._unusable(said)
        stream = answered(cuda().cudaStreamCreateWithFlags(cuda().cudaStreamNonBlocking))
        context.set_optimization_profile_async(number, int(stream))
        answered(cuda().cudaStreamSynchronize(stream))
        shapes = {name: (rows, *tuple(self._engine.get_tensor_shape(name))[1:]) for name in self._inputs}
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        laid, size = places(shapes)
        return _Shape(context, laid, size, Place(0, tuple(context.get_tensor_shape(self._output))))

    def _unusable(self, said: int) -> BusigenError:
        return unusable(self._library.name, self._library.version, self._library.said[said:])


def unusable(name: str, version: str, said: Sequence[str]) -> BusigenError:
    """Why an engine cannot be loaded or run, from what its library said.

    Args:
        name: of the library's target.
        version: the library's.
        said: its messages, oldest first.
    """
    account = " ".join(" ".join(said).split())
    what = f"--provider {name}: {version} cannot run an engine here: {account[:_SHOWN] or 'it does not say why'}."
    if says_ran_out(account):
        return CapacityError(
            what,
            fix="End what else uses the card (nvidia-smi shows it), or give a smaller --batch-size.",
        )
    return ProviderError(what, fix="Install a newer NVIDIA driver, or use --provider cuda or cpu.")


def _array_at(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))
