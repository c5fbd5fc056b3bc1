"""Engines: something that runs a bundle's graphs by name. Here, ONNX Runtime's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from busigen.errors import IntegrityError, UsageError
from busigen.registry import PROVIDERS
from busigen.runtime.bundle import Bundle

Arrays = Mapping[str, NDArray[Any]]


class Backend(Protocol):
    """Runs graphs. ``name`` and ``version`` become part of a dataset's record."""

    name: str
    version: str

    def run(self, graph: str, inputs: Arrays) -> NDArray[np.float32]:
        """Run one graph on a batch and return its single output."""
        ...


class OnnxBackend:
    """ONNX Runtime sessions, all but the first opened when first needed.

    Args:
        bundle: an opened, checked bundle.
        provider: a name in ``registry.PROVIDERS``.
        threads: compute threads; ``None`` takes one per core that this process may use.

    Raises:
        UsageError: the provider is unknown, or not usable here.
        IntegrityError: a graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, *, provider: str = "cpu", threads: int | None = None) -> None:
        if provider not in PROVIDERS:
            raise UsageError(f"unknown provider {provider!r}.", fix=f"Choose one of: {', '.join(PROVIDERS)}.")
        if threads is not None and threads < 1:
            raise UsageError(f"--threads is {threads}.", fix="Give 1 or more, or leave it out for one per core.")
        self.name = provider
        self.version = str(ort.__version__)
        self._bundle = bundle
        self._provider = PROVIDERS[provider]
        self._options = _session_options(threads or _usable_cores())
        # One session now, not all of them later: a provider that cannot be used must not leave a claimed folder behind.
        self._sessions: dict[str, ort.InferenceSession] = {"context": self._open("context")}

    def run(self, graph: str, inputs: Arrays) -> NDArray[np.float32]:
        """See :class:`Backend`."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        (output,) = self._sessions[graph].run(None, dict(inputs))
        result: NDArray[np.float32] = output
        return result

    def _open(self, graph: str) -> ort.InferenceSession:
        path = self._bundle.graph(graph)
        try:
            session = ort.InferenceSession(str(path), self._options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise IntegrityError(
                f"{path} cannot be loaded by ONNX Runtime {ort.__version__}: {str(error).splitlines()[0]}.",
                fix="Export the bundle again with 'busigen export'.",
            ) from error
        # ONNX Runtime falls back to the CPU without an error; a slow night is worse than a clear refusal.
        if self._provider not in session.get_providers():
            raise UsageError(
                f"--provider {self.name}: ONNX Runtime cannot use {self._provider} here.",
                fix="Install the extra 'cuda' on a machine with an NVIDIA GPU, or use --provider cpu.",
            )
        return session


def _usable_cores() -> int:
    """Cores that this process may use; where the system does not say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _register_arena() -> None:
    """Give all sessions of the process one memory arena.

    Graphs run one after the other, but an arena keeps the most its session ever used: sixteen of them hold several
    times what the largest graph needs.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _session_options(threads: int) -> ort.SessionOptions:
    _register_arena()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores from the thread that compresses the previous shard's PNGs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
