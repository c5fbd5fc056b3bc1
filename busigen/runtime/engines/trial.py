"""A network of one node, built and run: the shortest proof that library, driver and card work together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from busigen.errors import ProviderError
from busigen.runtime.engines.building import Blueprint, build
from busigen.runtime.engines.device import device_memory
from busigen.runtime.engines.library import Library
from busigen.runtime.engines.profiles import Call, Profile
from busigen.runtime.engines.session import Session, Slot
from busigen.runtime.engines.tiny_graphs import FLOAT, one_node

_ROWS = 2
_VALUES = np.array([[-1.5, 0.0, 2.5], [3.0, -0.25, 1.0]], dtype=np.float32)


def trial_engine(library: Library) -> bytes:
    """An engine of ``Relu`` for two rows of three numbers.

    Raises:
        BusigenError: the library cannot build it here.
    """
    model = one_node("Relu", {"x": (FLOAT, ("batch", 3))}, (FLOAT, ("batch", 3)))
    return build(library, Blueprint("trial", Path("trial.onnx"), model, [Profile(_ROWS, _ROWS, _ROWS)]))


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
