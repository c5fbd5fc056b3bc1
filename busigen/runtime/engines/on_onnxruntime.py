"""ONNX Runtime's sessions as a backend, on the processor or on an NVIDIA card."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from busigen.errors import IntegrityError, ProviderError
from busigen.registry import PROVIDERS, Provider
from busigen.runtime.backend import Arrays, EngineOptions, usable_cores
from busigen.runtime.bundle import Bundle
from busigen.runtime.install import install_command

_SHOWN = 200
"""Characters of ONNX Runtime's own message that an error quotes."""


class OnnxBackend:
    """ONNX Runtime sessions, all but the first opened when first needed.

    Args:
        bundle: an opened, checked bundle.
        provider: one of ``registry.PROVIDERS`` that ONNX Runtime has a name for; left out, the processor.
        options: how to run the graphs.

    Raises:
        ProviderError: the provider is not usable here.
        IntegrityError: a graph cannot be loaded.
    """

    def __init__(
        self, bundle: Bundle, provider: Provider = PROVIDERS["cpu"], options: EngineOptions | None = None
    ) -> None:
        self.name = provider.name
        self.version = str(ort.__version__)
        self._bundle = bundle
        self._provider = provider
        self._options = _session_options((options or EngineOptions()).threads or usable_cores())
        # One session now, not all of them later: a provider that cannot be used must not leave a claimed folder behind.
        self._sessions: dict[str, ort.InferenceSession] = {"context": self._open("context")}

    def run(self, graph: str, inputs: Arrays) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backend.Backend`.

        Raises:
            IntegrityError: the graph cannot be run, or what it yields is no batch of numbers.
        """
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        try:
            (output,) = self._sessions[graph].run(None, dict(inputs))
            result: NDArray[np.float32] = np.asarray(output, dtype=np.float32)
            rows = len(result)
        except Exception as error:  # ONNX Runtime's share no public base class; the rest is a graph of another make
            reason = (str(error).splitlines() or [type(error).__name__])[0][:_SHOWN]
            raise self._useless(graph, f"cannot be run: {reason}") from error
        if rows != len(next(iter(inputs.values()))):
            raise self._useless(graph, f"answers a batch of {len(next(iter(inputs.values())))} with {rows} rows")
        # A NaN has no grey level: what a cast makes of it depends on the processor, and some of it passes the gates.
        if not np.isfinite(result).all():
            raise self._useless(graph, "yields NaN or infinity, which is no image: its weights are damaged")
        return result

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime's names of the providers that really loaded, the one that is asked first in front."""
        return tuple(self._sessions["context"].get_providers())

    def _open(self, graph: str) -> ort.InferenceSession:
        path, provider = self._bundle.graph(graph), self._provider.onnxruntime
        try:
            # With fallback, ONNX Runtime prints a banner of its own and goes on with the CPU.
            session = ort.InferenceSession(str(path), self._options, providers=[provider], enable_fallback=False)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            reason = str(error).splitlines()[0][:_SHOWN]
            if self._provider.gpu:
                raise self._unusable(f": {reason}") from error
            raise IntegrityError(
                f"{path} cannot be loaded by ONNX Runtime {ort.__version__}: {reason}.",
                fix="Export the bundle again with 'busigen export'.",
            ) from error
        # A provider whose libraries are missing is replaced by the CPU's without an error; a slow night is worse than
        # a clear refusal.
        if provider not in session.get_providers():
            raise self._unusable()
        return session

    def _useless(self, graph: str, reason: str) -> IntegrityError:
        return IntegrityError(
            f"{self._bundle.graph(graph)} {reason}.",
            fix="Export the bundle again with 'busigen export'; if memory ran out, give a smaller --batch-size.",
        )

    def _unusable(self, reason: str = "") -> ProviderError:
        return ProviderError(
            f"--provider {self.name}: ONNX Runtime cannot use {self._provider.onnxruntime} here{reason}.",
            fix=f"On a machine with an NVIDIA GPU run {install_command(self.name)}, or use --provider cpu.",
        )


class _Onnxruntime:
    """See :class:`busigen.runtime.backend.Engine`."""

    def open(self, bundle: Bundle, provider: Provider, options: EngineOptions) -> OnnxBackend:
        """See :class:`busigen.runtime.backend.Engine`."""
        return OnnxBackend(bundle, provider, options)

    def probe(self, provider: Provider) -> str:
        """See :class:`busigen.runtime.backend.Engine`."""
        raise NotImplementedError


ENGINE = _Onnxruntime()


@cache
def _prepare_runtime() -> None:
    """Give all sessions of the process one memory arena, and keep ONNX Runtime's log off the terminal.

    Graphs run one after the other, but an arena keeps the most its session ever used: sixteen of them hold several
    times what the largest graph needs.
    """
    # What goes wrong is raised and told in one line; ONNX Runtime would dump its own account of it beside that.
    ort.set_default_logger_severity(4)
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _session_options(threads: int) -> ort.SessionOptions:
    _prepare_runtime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores from the thread that compresses the previous shard's PNGs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
