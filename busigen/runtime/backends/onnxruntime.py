"""Runs a bundle's graphs with ONNX Runtime, on the processor or on a card."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from busigen.errors import BusigenError, CapacityError, IntegrityError, OutputError, ProviderError
from busigen.registry import PROVIDERS, Provider
from busigen.runtime.backends.base import Backend, Engine, EngineOptions, Feed, largest_that_fits, ran_out, usable_cores
from busigen.runtime.backends.bundle import Bundle, default_bundle, openable
from busigen.runtime.backends.memory import LARGE, memory_of, require_memory
from busigen.runtime.backends.onnx_graph import BOOL, FLOAT, Graph, one_node
from busigen.runtime.backends.probe import driver_cuda
from busigen.text import install_command

_NO_CAPTURE = "-1"  # ONNX Runtime's `gpu_graph_id` of a run that is neither captured nor replayed
_SHOWN = 200  # characters of the beginning, and of the end, of ONNX Runtime's own message that an error quotes
_CONTROL_FLOW = {"If", "Loop", "Scan"}  # what a CUDA graph cannot hold

_HEAVY = {"Attention", "Conv", "ConvTranspose", "Einsum", "FusedConv", "FusedMatMul", "Gemm", "MatMul"}
"""Operators that do the work: what else a card leaves to the processor are shapes and counters."""


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
    binding: ort.IOBinding
    inputs: dict[str, ort.OrtValue]
    output: ort.OrtValue
    options: ort.RunOptions


class BoundSession:
    """A session that is fed through fixed buffers on its device, made once per shape of the inputs.

    CUDA graphs, which it records for every shape if it is to ``capture``, replay addresses and so need that.
    """

    def __init__(self, session: ort.InferenceSession, device: str, *, capture: bool = False) -> None:
        self._session, self._device, self._capture = session, device, capture
        self.buffers: dict[tuple[Any, ...], _Buffers] = {}
        # Never reused, even if buffers are given up: a CUDA graph replays the addresses that it was recorded with.
        self._numbers = count()

    def run(self, inputs: Feed) -> ort.OrtValue:
        """Run on a batch; the output lies in a buffer that the next run on the same shapes overwrites."""
        values = {name: array.value if isinstance(array, OnDevice) else array for name, array in inputs.items()}
        types: dict[str, tuple[tuple[int, ...], DTypeLike]] = {}
        for name, value in values.items():
            kept = isinstance(value, ort.OrtValue)
            types[name] = (tuple(value.shape()), np.float32) if kept else (value.shape, value.dtype)
        key = tuple(sorted((name, shape) for name, (shape, _) in types.items()))
        if key not in self.buffers:
            self.buffers[key] = self._made(types)
        buffers = self.buffers[key]
        for name, value in values.items():
            buffers.inputs[name].update_inplace(value)
        buffers.binding.synchronize_inputs()
        self._session.run_with_iobinding(buffers.binding, buffers.options)
        buffers.binding.synchronize_outputs()
        return buffers.output

    def kept(self, output: ort.OrtValue) -> OnDevice:
        """A copy of an output that no later run overwrites."""
        copy = self._empty(output.shape(), np.float32)
        copy.update_inplace(output)
        return OnDevice(copy)

    def _made(self, types: dict[str, tuple[tuple[int, ...], DTypeLike]]) -> _Buffers:
        binding = self._session.io_binding()
        fed = {name: self._empty(shape, dtype) for name, (shape, dtype) in types.items()}
        for name, value in fed.items():
            value.update_inplace(np.zeros(*types[name]))
            binding.bind_ortvalue_input(name, value)
        (name,) = (output.name for output in self._session.get_outputs())
        # What shape comes out is found by a run: graphs do not always say.
        binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding, self._options(_NO_CAPTURE))
        output = self._empty(binding.get_outputs()[0].shape(), np.float32)
        binding.clear_binding_outputs()
        binding.bind_ortvalue_output(name, output)
        return _Buffers(binding, fed, output, self._options(str(next(self._numbers))))

    def _options(self, number: str) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._capture:
            options.add_run_config_entry("gpu_graph_id", number)
        return options

    def _empty(self, shape: Any, dtype: DTypeLike) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._device, 0)


class OnnxBackend(Backend):
    """ONNX Runtime sessions on an opened, checked bundle, all but the first opened when first needed; see `Engine`."""

    def __init__(
        self, bundle: Bundle, provider: Provider = PROVIDERS["cpu"], options: EngineOptions | None = None
    ) -> None:
        options = options or EngineOptions()
        self.name, self.version = provider.name, str(ort.__version__)
        self._bundle, self._provider = bundle, provider
        self._threads = options.threads or usable_cores()
        self._device = "cuda" if provider.gpu else "cpu"
        self._is_bound = provider.gpu if options.bound is None else options.bound
        self._select: BoundSession | None = None
        # Where weights are large, none are laid out anew: that takes twice their memory while a graph is opened, and of
        # matrices in loops for good.
        self._frugal = not provider.gpu and memory_of(bundle) > LARGE
        if provider.gpu:
            prepare_cuda(provider)
        elif options.processes == 1:
            require_memory(bundle)
        # One session now, not all of them later: a provider that cannot be used must not leave a claimed folder behind.
        self._sessions: dict[str, BoundSession | ort.InferenceSession] = {}  # by the graph's file
        self._opened("context")

    def run(self, graph: str, inputs: Feed) -> NDArray[np.float32]:
        """See :class:`Backend`; a CapacityError if memory is short, an IntegrityError if no numbers come out."""
        result = np.asarray(self._output(graph, inputs, kept=False), dtype=np.float32)
        # A NaN has no grey level: what a cast makes of it depends on the processor, and some of it passes the gates.
        if not np.isfinite(result).all():
            raise self._useless(graph, "yields NaN or infinity, which is no image: its weights are damaged")
        return result

    def keep(self, graph: str, inputs: Feed) -> Any:
        """See :class:`Backend`; raises what :meth:`run` does."""
        # On a card nobody looks for NaN here: the last graph of the chain would hand it on to ``run``.
        return self._output(graph, inputs, kept=True) if self._is_bound else self.run(graph, inputs)

    def select(self, where: NDArray[np.bool_], chosen: Any, other: Any) -> Any:
        """See :class:`Backend`."""
        if not self._is_bound:
            return np.where(where, chosen, other)
        if self._select is None:
            dimensions = ["n", "c", "h", "w"]
            types = {"where": (BOOL, dimensions), "chosen": (FLOAT, dimensions), "other": (FLOAT, dimensions)}
            self._select = BoundSession(self._session(one_node("Where", types, (FLOAT, dimensions))), self._device)
        return self._select.kept(self._select.run({"where": where, "chosen": chosen, "other": other}))

    def _output(self, graph: str, inputs: Feed, *, kept: bool) -> Any:
        rows = len(next(iter(inputs.values())))
        try:
            result = self._evaluate(graph, inputs, kept=kept)
            found = len(result)
        except BusigenError:
            raise
        except Exception as error:  # ONNX Runtime's share no public base class; the rest is a graph of another make
            if ran_out(error):
                raise self._too_large(graph, inputs, rows) from error
            raise self._useless(graph, f"cannot be run: {_first_line(error)}") from error
        if found != rows:
            raise self._useless(graph, f"answers a batch of {rows} with {found} rows")
        return result

    def _evaluate(self, graph: str, inputs: Feed, *, kept: bool) -> Any:
        session = self._opened(graph)
        if isinstance(session, BoundSession):
            output = session.run(inputs)
            # Copied, because on the processor it is a view of the buffer.
            return session.kept(output) if kept else np.array(output.numpy())
        (output,) = session.run(None, dict(inputs))
        return output

    def _opened(self, graph: str) -> BoundSession | ort.InferenceSession:
        file = self._bundle.file(graph)
        if file not in self._sessions:
            self._sessions[file] = self._open(graph)
        return self._sessions[file]

    def _open(self, graph: str) -> BoundSession | ort.InferenceSession:
        path = self._bundle.graph(graph)
        try:
            with openable(path, self._bundle.info["graphs"][graph]["files"]) as place:
                if self._provider.gpu and self._is_bound and not Graph(path).operators() & _CONTROL_FLOW:
                    # Refused where a single node is left to the processor, which for a shape is no harm otherwise.
                    with contextlib.suppress(Exception):
                        return BoundSession(self._session(str(place), capture=True), self._device, capture=True)
                session = self._session(str(place))
                return BoundSession(session, self._device) if self._is_bound else session
        except ProviderError:
            raise
        except OSError as error:
            raise OutputError(
                f"{path} needs a copy of its weights in {tempfile.gettempdir()}, because they have other hard links, "
                f"and that failed: {error.strerror or error}.",
                fix="Free some space there, or name another folder with the environment variable TMPDIR.",
            ) from error
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            if self._provider.gpu:
                raise unusable(self._provider, f": {_first_line(error)}") from error
            reason = f"cannot be loaded by ONNX Runtime {ort.__version__}: {_first_line(error)}"
            raise self._useless(graph, reason) from error

    def _session(self, model: str | bytes, *, capture: bool = False) -> ort.InferenceSession:
        options = _session_options(self._threads)
        left_out = frugal(options) if self._frugal else None
        given = dict(self._provider.options)
        if self._provider.gpu:
            options.use_deterministic_compute = True
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            given["enable_cuda_graph"] = str(int(capture))
        name = self._provider.onnxruntime
        # With fallback, ONNX Runtime prints a banner of its own and goes on with the CPU.
        session = ort.InferenceSession(
            model,
            options,
            providers=[(name, given)],
            enable_fallback=False,
            disabled_optimizers=left_out,
        )
        # A provider whose libraries are missing is replaced by the CPU's without an error; a slow night is worse than
        # a clear refusal.
        if name not in session.get_providers():
            raise unusable(self._provider)
        if self._provider.gpu and (left := left_to_others(session, name)):
            described = ", ".join(f"{count} {operator}" for operator, count in left.most_common())
            raise unusable(self._provider, f": it would leave work to the processor ({described})")
        self.providers = tuple(session.get_providers())
        return session

    def _too_large(self, graph: str, inputs: Feed, rows: int) -> CapacityError:
        """The error for a batch that does not fit, with what does: half of it is tried, and half of that."""

        def fits(fewer: int) -> bool:
            try:
                self._evaluate(graph, {name: np.asarray(array)[:fewer] for name, array in inputs.items()}, kept=False)
            except Exception as error:  # As above.
                if ran_out(error):
                    return False
                raise
            return True

        if isinstance(session := self._sessions.get(self._bundle.file(graph)), BoundSession):
            session.buffers.clear()
        fitting = largest_that_fits(rows, fits)
        where = "the card" if self._provider.gpu else "this machine"
        return CapacityError(
            f"{graph} needs more memory for {rows} images at a time than {where} has free"
            + (f"; {fitting} fit." if fitting else "."),
            fix="Free some memory (nvidia-smi shows what holds a card's), or use another --provider.",
            rows=rows,
            fits=fitting,
        )

    def _useless(self, graph: str, reason: str) -> IntegrityError:
        shipped = self._bundle.folder == default_bundle()
        fix = "Install busigen again." if shipped else "Export the bundle again with 'busigen export'."
        return IntegrityError(f"{self._bundle.graph(graph)} {reason}.", fix=fix)


def _probe(provider: Provider) -> str:
    """Run a convolution, which on a card takes cuDNN."""
    if provider.gpu:
        prepare_cuda(provider)
    options = _session_options(1)
    if provider.gpu:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    model = one_node("Conv", {"x": (FLOAT, [1, 1, 4, 4]), "w": (FLOAT, [1, 1, 3, 3])}, (FLOAT, [1, 1, 2, 2]))
    chosen = (provider.onnxruntime, dict(provider.options))
    try:
        session = ort.InferenceSession(model, options, providers=[chosen], enable_fallback=False)
        ones = {"x": np.ones((1, 1, 4, 4), np.float32), "w": np.ones((1, 1, 3, 3), np.float32)}
        (found,) = session.run(None, ones)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise unusable(provider, f": {_first_line(error)}") from error
    if provider.onnxruntime not in session.get_providers() or not (found == 9).all():
        raise unusable(provider)
    return f"ONNX Runtime {ort.__version__}" + (f" with CUDA {ort.cuda_version}" if provider.gpu else "")


ENGINE = Engine(OnnxBackend, _probe)


def unusable(provider: Provider, reason: str = "") -> ProviderError:
    """The error for a provider that ONNX Runtime cannot use here; ``reason`` begins with a colon."""
    return ProviderError(
        f"--provider {provider.name}: ONNX Runtime cannot use {provider.onnxruntime} here{reason}.",
        fix=f"On a machine with an NVIDIA GPU run {install_command(provider.extra)}, or use --provider cpu; "
        "`busigen doctor` says more.",
    )


def left_to_others(session: ort.InferenceSession, provider: str) -> Counter[str]:
    """Operators that do the work and were given to another provider, counted; the session has to record assignments."""
    return Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type in _HEAVY
    )


def prepare_cuda(provider: Provider) -> None:
    """Load the CUDA libraries that pip installed; a ``ProviderError`` if the driver is too old for ONNX Runtime."""
    _preload()
    needed, found = str(getattr(ort, "cuda_version", "") or ""), driver_cuda()
    if found is not None and needed and found[0] < int(needed.partition(".")[0]):
        raise unusable(
            provider,
            f": the NVIDIA driver runs CUDA {found[0]}.{found[1]} at most, and ONNX Runtime {ort.__version__} is built "
            f"for CUDA {needed}; update the driver (CUDA 13 needs 580 or newer)",
        )


@cache
def _preload() -> None:
    # ONNX Runtime's library for CUDA does not look into pip's packages by itself. It prints what it does not find, and
    # the session that is opened next says the same as an error.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


@cache
def _prepare_runtime() -> None:
    """Give all sessions of the process one memory arena, and have ONNX Runtime neither print nor report."""
    # Errors are raised and printed in one line; ONNX Runtime would print its own account beside that.
    ort.set_default_logger_severity(4)
    # Builds for Windows that trace to the system instead of posting do not read the variable that busigen sets.
    ort.disable_telemetry_events()
    # Graphs run one after the other, and an arena keeps the most that its session ever used: sixteen hold far too much.
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def frugal(options: ort.SessionOptions) -> list[str]:
    """Have a session keep its weights once, as they are; returns the optimizers that it has to do without."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    # An arena grows by steps, which for large weights is much that nobody uses.
    options.add_session_config_entry("session.use_env_allocators", "0")
    options.enable_cpu_mem_arena = False
    return ["NchwcTransformer"]


def _session_options(threads: int) -> ort.SessionOptions:
    _prepare_runtime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores from the thread that compresses the previous shard's PNGs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # As above: it would print names from the bundle as they are.
    return options


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # What is wrong stands at the end, behind where it is wrong.
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]} ... {line[-_SHOWN:]}"
