"""The lowest precision in which a component reproduces the checkpoint, int8 among them.

In int8 are the context encoder's matrix products, with Q/DQ nodes, calibrated on the draws' images. Only those, because
only there int8 may pay: the denoisers and the autoencoder are convolutions, which ONNX Runtime's
CPU provider computes in its own layout in fp32 and as plain ones in int8. ``docs/export.md`` has the figures.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

from busigen.errors import OutputError, UsageError
from busigen.export.components import Component, Graphs
from busigen.export.graph_rewrites import TYPES
from busigen.export.parity import RecordedCall, pixels_off, refused, relative_error
from busigen.export.weights import WeightFiles, whole, write_graphs
from busigen.registry import OPSETS, PRECISIONS
from busigen.runtime.backends.base import Backend, usable_cores
from busigen.runtime.backends.memory import LARGE
from busigen.runtime.backends.onnxruntime import frugal

QUANTISED = ("context",)  # Components, and their only graphs, that int8 is for.

OPERATORS = ("MatMul",)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for graphs that are tried out; an OutputError if there is no room for them."""
    try:
        # On Windows, what a session has mapped into its memory cannot be removed before that ends.
        with tempfile.TemporaryDirectory(prefix="busigen-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(
            f"graphs cannot be tried out in {tempfile.gettempdir()}: {error.strerror or error}.",
            fix="Free some space there, or name another folder with the environment variable TMPDIR.",
        ) from error


def quantised(
    graphs: Mapping[str, ModelProto], calls: Mapping[str, Sequence[RecordedCall]], operators: Sequence[str] = OPERATORS
) -> dict[str, ModelProto]:
    """Graphs of fp32 with nodes of some kinds in int8: weights per channel, activations by the range they were seen in.

    ``calls`` have the calibration inputs per graph, of which none may be empty.
    """
    found = {}
    for name, model in graphs.items():
        reader = SimpleNamespace(get_next=partial(next, iter([call.inputs for call in calls[name]]), None))
        with scratch() as folder:
            # It warns that a model was not pre-processed, which busigen's own folding has done.
            logging.disable(logging.WARNING)
            try:
                quantize_static(
                    whole(model),
                    str(folder / "int8.onnx"),
                    reader,
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(operators),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
            finally:
                logging.disable(logging.NOTSET)
            found[name] = onnx.load(str(folder / "int8.onnx"))
        del found[name].graph.value_info[:]
    return found


def runs(provider: str, precision: str, opset: int = OPSETS[0]) -> str:
    """Why a provider, by ONNX Runtime's name, cannot run a convolution and product in a precision; empty if it can."""
    opset = max(opset, 22) if precision == "bf16" else opset
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TYPES.get(precision, TensorProto.FLOAT)),
        helper.make_node("Conv", ["low", "low"], ["seen"]),
        helper.make_node("MatMul", ["seen", "seen"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, n, n]) for name, n in (("x", 4), ("y", 1)))
    graph = helper.make_graph(nodes, "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    # What cannot be loaded is said by the exception; ONNX Runtime would say it again on the terminal.
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider], enable_fallback=False)
        if provider not in session.get_providers():
            return f"{provider} cannot be loaded here"
        session.run(None, {"x": np.ones((1, 1, 4, 4), dtype=np.float32)})
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return str(error).splitlines()[0][:200]
    return ""


def check_opset(opset: int) -> None:
    """Raise a UsageError for an opset that this ONNX Runtime does not know."""
    if problem := runs("CPUExecutionProvider", "fp32", opset):
        raise UsageError(
            f"ONNX Runtime {ort.__version__} cannot run opset {opset}: {problem}.",
            fix=f"Choose one of: {', '.join(map(str, OPSETS))}; or install a newer onnxruntime.",
        )


log = logging.getLogger("busigen.export")

ERROR_LIMIT = 0.02
"""Largest error of a component's output, relative to the output's own size: four of these in a row (encoder, lesion,
blend, decoder), independent of each other, are 4 %, and 35 dB of an image whose values deviate by 0.35 are 10 %."""

PIXEL_LIMIT = 0.5
"""Largest error of stage 1's distances near the outline, in pixels: no pixel's centre is passed by a whole pixel."""

_TIMED_CALLS = 7


@dataclass(frozen=True)
class PrecisionAttempt:
    """One precision that was tried: the error as a multiple of its limit, and why it was not taken (empty: it was)."""

    precision: str
    error: float
    refused: str

    def to_dict(self) -> dict[str, Any]:
        """For a record; an error that is no number is ``None``, because JSON has none."""
        return {
            "precision": self.precision,
            "error": round(self.error, 4) if np.isfinite(self.error) else None,
            "refused": self.refused,
        }


@dataclass
class Choice:
    """A component's precision, its graphs, and what was tried."""

    component: Component
    precision: str
    graphs: Graphs
    tried: list[PrecisionAttempt] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The component's."""
        return self.component.name

    @property
    def rounded(self) -> Graphs:
        """The graphs for a processor without half precision."""
        if self.precision not in TYPES:
            return self.graphs
        return self.component.graphs(self.precision, rounded=True)


class GraphsBackend(Backend):
    """Graphs of some components, by the components' names, behind the runtime's interface: as files, as they ship."""

    name = "emulated"
    version = str(ort.__version__)

    def __init__(self, folder: Path, components: Mapping[str, Graphs]) -> None:
        folder.mkdir(exist_ok=True)
        files = WeightFiles(folder)
        written = [write_graphs(name, graphs, folder, files) for name, graphs in components.items()]
        self._files = {graph: folder / record["file"] for records in written for graph, record in records.items()}
        self._large = sum(path.stat().st_size for path in folder.glob("*.weights")) > LARGE
        self.close()

    def close(self) -> None:
        """Close what is open: every graph's session holds all of its weights."""
        self._sessions: dict[Path, ort.InferenceSession] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backends.base.Backend`."""
        file = self._files[graph]
        if file not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = usable_cores()
            options.log_severity_level = 4
            left_out = frugal(options) if self._large else None
            self._sessions[file] = ort.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
            )
        session = self._sessions[file]
        (output,) = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
        return np.asarray(output, dtype=np.float32)


def choose(component: Component, target: str, calls: Mapping[str, Sequence[RecordedCall]]) -> Choice:
    """Lay a component out in the wanted precision, or in the next higher one that reproduces the checkpoint.

    ``calls`` are those of each graph, with what PyTorch answers. A ParityError says that not even fp32 reproduces it.
    """
    tried: list[PrecisionAttempt] = []
    precision = target if target != "int8" or component.name in QUANTISED else PRECISIONS[target].above
    while precision:
        graphs, error, reason = _attempt(component, precision, calls)
        tried.append(PrecisionAttempt(precision, error, reason))
        if not reason:
            return Choice(component, precision, graphs, tried)
        _fall_back(component.name, tried)
        precision = PRECISIONS[precision].above
    raise refused(component.name, [f"{attempt.precision}: {attempt.refused}" for attempt in tried])


def escalate(choice: Choice, reason: str, calls: Mapping[str, Sequence[RecordedCall]]) -> Choice:
    """A component's choice once more, above the precision that failed for ``reason`` over the whole trajectory."""
    last = choice.tried[-1]
    tried = [*choice.tried[:-1], PrecisionAttempt(last.precision, last.error, reason)]
    _fall_back(choice.name, tried)
    again = choose(choice.component, PRECISIONS[choice.precision].above, calls)
    return Choice(again.component, again.precision, again.graphs, [*tried, *again.tried])


def _fall_back(component: str, tried: Sequence[PrecisionAttempt]) -> None:
    last = tried[-1]
    if above := PRECISIONS[last.precision].above:
        log.warning("%s: %s fails (%s); %s is tried", component, last.precision, last.refused, above)


def _attempt(
    component: Component, precision: str, calls: Mapping[str, Sequence[RecordedCall]]
) -> tuple[Graphs, float, str]:
    """The graphs, their error as a multiple of its limit, and why they cannot be taken."""
    plain = component.graphs("fp32" if precision == "int8" else precision)
    graphs = quantised(plain, calls) if precision == "int8" else plain
    proved = component.graphs(precision, rounded=True) if precision in TYPES else graphs
    with scratch() as folder:
        errors = {}
        try:
            backend = GraphsBackend(folder / "proved", {component.name: proved})
            model: ModelProto | None = None
            asked = {id(proved[graph]) for graph in proved if calls.get(graph)}
            for graph in proved:
                if id(proved[graph]) in asked and not calls.get(graph):
                    continue  # It is asked by another of its names.
                if proved[graph] is not model:
                    model = proved[graph]
                    backend.close()
                errors[graph] = _error(component.name, backend, graph, calls.get(graph, ()))
            backend.close()
        except OSError:  # No room, which another precision would not have either.
            raise
        except Exception as problem:  # ONNX Runtime's exceptions share no public base class
            return graphs, float("inf"), f"cannot be run: {str(problem).splitlines()[0][:200]}"
        worst = max(errors, key=lambda graph: errors[graph])
        error = errors[worst]
        if not error <= 1.0:
            found = f"has {error:.3g} times the error allowed" if np.isfinite(error) else "yields NaN or infinity"
            found = found if calls.get(worst) else "was never asked in the draws: compare more of them"
            return graphs, error, f"{worst} {found}"
        if precision == "int8":
            slower = _slower(backend, GraphsBackend(folder / "plain", {component.name: plain}), calls)
            if slower >= 1.0:
                return graphs, error, f"it does not pay: {slower:.2f} times the time of fp32"
    return graphs, error, ""


def _error(component: str, backend: GraphsBackend, graph: str, calls: Sequence[RecordedCall]) -> float:
    measure, limit = (pixels_off, PIXEL_LIMIT) if component == "mask" else (relative_error, ERROR_LIMIT)
    return max((measure(backend.run(graph, call.inputs), call.output) / limit for call in calls), default=float("inf"))


def _slower(quick: GraphsBackend, whole: GraphsBackend, calls: Mapping[str, Sequence[RecordedCall]]) -> float:
    """Time of one set of graphs as a multiple of the other's, taken in turns."""
    timed = [(graph, call.inputs) for graph in QUANTISED for call in calls.get(graph, ())]
    seconds: dict[str, list[float]] = {"quick": [], "whole": []}
    for turn in range(_TIMED_CALLS + 1):
        for name, backend in (("quick", quick), ("whole", whole)):
            started = time.perf_counter()
            for graph, inputs in timed:
                backend.run(graph, inputs)
            # The first turn opens sessions and takes memory.
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["quick"]) / statistics.median(seconds["whole"])
