"""Sessions whose inputs and outputs stay in buffers of their own on the device: IO binding, with CUDA graphs.

A graph is run in buffers of one shape each, made once per shape: what comes from the host is copied into them, what a
graph before it has left on the device is copied there. CUDA graphs need that, because they replay addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from busigen.runtime.backend import Feed

_NO_CAPTURE = "-1"
"""ONNX Runtime's ``gpu_graph_id`` of a run that is neither captured nor replayed."""


class OnDevice:
    """A graph's output that stays where it was computed."""

    def __init__(self, value: ort.OrtValue) -> None:
        self.value = value

    def __len__(self) -> int:
        return int(self.value.shape()[0])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.value.numpy(), dtype=dtype)


@dataclass
class _Buffers:
    """What one shape of inputs is run in."""

    binding: ort.IOBinding
    inputs: dict[str, ort.OrtValue]
    output: ort.OrtValue
    options: ort.RunOptions = field(default_factory=ort.RunOptions)


class BoundSession:
    """A session that is fed through fixed buffers on its device.

    Args:
        session: of one output.
        device: ``cpu`` or ``cuda``.
        capture: the session records CUDA graphs, one per shape.
    """

    def __init__(self, session: ort.InferenceSession, device: str, *, capture: bool = False) -> None:
        self._session, self._device, self._capture = session, device, capture
        (output,) = session.get_outputs()
        self._output = output.name
        self._buffers: dict[tuple[Any, ...], _Buffers] = {}

    def run(self, inputs: Feed) -> ort.OrtValue:
        """Run on a batch; the output lies in a buffer that the next run on the same shapes overwrites."""
        shapes = tuple(sorted((name, _shape(array)) for name, array in inputs.items()))
        if shapes not in self._buffers:
            self._buffers[shapes] = self._made(inputs)
        buffers = self._buffers[shapes]
        for name, array in inputs.items():
            buffers.inputs[name].update_inplace(array.value if isinstance(array, OnDevice) else array)
        buffers.binding.synchronize_inputs()
        self._session.run_with_iobinding(buffers.binding, buffers.options)
        buffers.binding.synchronize_outputs()
        return buffers.output

    def kept(self, output: ort.OrtValue) -> OnDevice:
        """A copy of an output that no later run overwrites."""
        copy = self._empty(output.shape(), np.float32)
        copy.update_inplace(output)
        return OnDevice(copy)

    def _made(self, inputs: Feed) -> _Buffers:
        binding = self._session.io_binding()
        fed = {name: self._empty(_shape(array), _dtype(array)) for name, array in inputs.items()}
        for name, value in fed.items():
            value.update_inplace(np.zeros(value.shape(), _dtype(inputs[name])))
            binding.bind_ortvalue_input(name, value)
        # What shape comes out is found by a run: graphs do not always say.
        binding.bind_output(self._output, self._device)
        self._session.run_with_iobinding(binding, self._numbered(_NO_CAPTURE))
        output = self._empty(binding.get_outputs()[0].shape(), np.float32)
        binding.clear_binding_outputs()
        binding.bind_ortvalue_output(self._output, output)
        return _Buffers(binding, fed, output, self._numbered(str(len(self._buffers))))

    def _numbered(self, number: str) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._capture:
            options.add_run_config_entry("gpu_graph_id", number)
        return options

    def _empty(self, shape: Any, dtype: DTypeLike) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._device, 0)


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.value.shape()) if isinstance(array, OnDevice) else tuple(array.shape)


def _dtype(array: Any) -> DTypeLike:
    return np.float32 if isinstance(array, OnDevice) else array.dtype
