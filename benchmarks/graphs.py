"""How a stage's steps are best laid out in a graph, what ONNX Runtime fuses per opset, and what int8 brings.

python benchmarks/graphs.py                                   # the shipped bundle, restored; all three tables
python benchmarks/graphs.py --checkpoint runs/mine --what forms --provider cuda --repeats 5

Every measurement of the forms is a process of its own; forms take turns.

- ``loop``: one ONNX ``Loop`` whose body is an evaluation, as in the shipped bundle
- ``unrolled``: every step written out
- ``steps``: a graph of one step, called from Python through IO binding; sample and conditions stay where they are
- ``torch``: PyTorch eager, the reference
"""

from __future__ import annotations

# isort: off
import busigen  # noqa: F401  # Before ONNX Runtime, which would report home.

# isort: on
import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from measuring import RESULTS, about, in_turns, median, run, show, write
from onnx import ModelProto

from busigen.registry import BUCKETS, LOOPS, OPSETS, PROVIDERS, RESOLUTION
from busigen.runtime.backends.base import usable_cores
from busigen.solver import solver_steps

FORMS = (*LOOPS, "steps", "torch")
GRAPHS = ("mask-benign", "lesion-benign@128", "lesion-benign@256", "blend-benign@128", "blend-benign@256", "prior")
CONSTANTS = frozenset({"t", "s", "a", "b"})
"""What a step reads of its turn, some of it each."""

TABLES = ("forms", "opsets", "int8")


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="what to measure; the shipped bundle, restored, without")
    parser.add_argument("--what", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument(
        "--provider", choices=[name for name, found in PROVIDERS.items() if found.onnxruntime], default="cpu"
    )
    parser.add_argument(
        "--batch", type=int, default=16, help="rows per call at the small window; a quarter at the large"
    )
    parser.add_argument("--calls", type=int, default=5, help="timed calls per process, after one that is not")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--results", type=Path, default=RESULTS / "graphs.json")
    parser.add_argument("--measure", nargs=2, metavar=("FORM", "GRAPH"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options)))
        return
    with tempfile.TemporaryDirectory(prefix="busigen-") as folder:
        options.work = Path(folder)
        if options.checkpoint is None:
            options.checkpoint = options.work / "checkpoint"
            run([sys.executable, "-m", "busigen.cli", "restore", "--out", str(options.checkpoint)])
        tables: dict[str, Callable[[argparse.Namespace], Any]] = {"forms": forms, "opsets": opsets, "int8": int8}
        record = {name: tables[name](options) for name in options.what}
    asked = {key: getattr(options, key) for key in ("provider", "batch", "calls", "repeats", "threads")}
    write(options.results, {**about("torch", "onnx", "onnxruntime-gpu", "onnxruntime"), "options": asked, **record})


def forms(options: argparse.Namespace) -> dict[str, Any]:
    """Time every form of every graph."""
    # In a process of its own: those that are measured would begin with this one's memory.
    measured("prepare", options.graphs[0], options)
    runs: dict[str, Any] = {}
    rows = []
    for graph in options.graphs:
        found = in_turns(options.forms, options.repeats, lambda form, _, graph=graph: measured(form, graph, options))
        runs[graph] = found
        for form in options.forms:
            error = max(run["difference"] for run in found if run["name"] == form)
            rows.append(
                [
                    graph,
                    form,
                    *(
                        f"{median(found, form, key):.3g}"
                        for key in ("milliseconds", "cpu_milliseconds", "open_seconds")
                    ),
                    f"{median(found, form, 'peak_mb'):.0f}",
                    f"{error:.1e}",
                ]
            )
    header = ["graph", "form", "ms a call", "processor ms a call", "processor s to open", "peak MB", "from torch"]
    show(f"Forms of the solver's loop, batch {options.batch}, {options.provider}", header, rows)
    return runs


def measured(form: str, graph: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process that opens one form of one graph and calls it."""
    names = ("checkpoint", "work", "provider", "batch", "calls", "threads")
    given = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    given += ["--graphs", *options.graphs]
    process = run([sys.executable, __file__, "--measure", form, graph, *given])
    return {**process.described, "peak_mb": process.peak_memory / 1e6}


def measure(form: str, graph: str, options: argparse.Namespace) -> dict[str, Any]:
    """Open and call one form here; ``difference`` is the largest from PyTorch's answer, relative to its largest."""
    if form == "prepare":
        prepare(options)
        return {}
    inputs = dict(np.load(options.work / f"{graph}.npz"))
    expected = inputs.pop("expected")
    started = time.process_time()
    call = {"torch": _torch, "steps": _steps}.get(form, _whole)(form, graph, options, inputs)
    opened = time.process_time() - started
    found = call()
    walls, processor = [], []
    for _ in range(options.calls):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    return {
        "open_seconds": opened,
        "milliseconds": 1000 * statistics.median(walls),
        "cpu_milliseconds": 1000 * statistics.median(processor),
        "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
    }


Call = Callable[[], Any]


def _session(path: Path, options: argparse.Namespace) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    return ort.InferenceSession(
        str(path), settings, providers=[PROVIDERS[options.provider].onnxruntime], enable_fallback=False
    )


def _whole(form: str, graph: str, options: argparse.Namespace, inputs: dict[str, Any]) -> Call:
    session = _session(options.work / f"{graph}.{form}.onnx", options)
    return lambda: session.run(None, inputs)[0]


def _torch(form: str, graph: str, options: argparse.Namespace, inputs: dict[str, Any]) -> Call:
    import torch

    from busigen.export.parity import TorchBackend
    from busigen.training.checkpoint import load_networks

    torch.set_num_threads(options.threads)
    backend = TorchBackend(load_networks(options.checkpoint)[0])
    return lambda: backend.run(graph, inputs)


def _steps(form: str, graph: str, options: argparse.Namespace, inputs: dict[str, Any]) -> Call:
    parts = {
        name: _session(path, options)
        for name in ("before", "step", "after")
        if (path := options.work / f"{graph}.{name}.onnx").exists()
    }
    stage = graph.partition("@")[0].partition("-")[0]
    table = solver_steps(stage, json.loads((options.work / "steps.json").read_text())[stage])
    device = "cpu" if options.provider == "cpu" else "cuda"
    wanted = [value.name for value in parts["step"].get_inputs()]

    def call() -> Any:
        known = {**inputs, "label": np.load(options.work / f"{graph}.label.npy")}
        if "before" in parts:
            session = parts["before"]
            answers = session.run(None, {value.name: known[value.name] for value in session.get_inputs()})
            known |= dict(zip([value.name for value in session.get_outputs()], answers, strict=True))
        # Two buffers that take turns: a step must not write what it reads. On the CPU they are these arrays themselves,
        # which nothing else holds.
        buffers = known["noise"].copy(), np.empty_like(known["noise"])
        x, spare = (ort.OrtValue.ortvalue_from_numpy(buffer, device, 0) for buffer in buffers)
        held = {
            name: ort.OrtValue.ortvalue_from_numpy(known[name], device, 0)
            for name in wanted
            if name not in ("x", *CONSTANTS)
        }
        binding = parts["step"].io_binding()
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for step in table:
            # Kept until the step has run: a binding reads an array's memory and does not hold it.
            now = {name: np.array([getattr(step, name)], dtype=np.float32) for name in CONSTANTS.intersection(wanted)}
            for name, value in now.items():
                binding.bind_cpu_input(name, value)
            binding.bind_ortvalue_input("x", x)
            binding.bind_ortvalue_output("following", spare)
            parts["step"].run_with_iobinding(binding)
            x, spare = spare, x
        result = x.numpy().copy()
        if "after" not in parts:
            return result
        session = parts["after"]
        first, *rest = (value.name for value in session.get_inputs())
        return session.run(None, {first: result, **{name: known[name] for name in rest}})[0]

    return call


def prepare(options: argparse.Namespace) -> None:
    """Write every graph in every form, and what it is asked with PyTorch's answer."""
    from busigen.export.components import components
    from busigen.export.parity import TorchBackend
    from busigen.training.checkpoint import load_networks

    networks, _ = load_networks(options.checkpoint)
    (options.work / "steps.json").write_text(json.dumps(networks.steps))
    only = {graph.partition("@")[0].partition("-")[0] for graph in options.graphs}
    for component in components(networks, opset=OPSETS[0], loop=next(iter(LOOPS)), only=only):
        wanted = {graph: part for graph, part in component.parts.items() if graph in options.graphs}
        for loop in LOOPS:
            for graph, model in replace(component, parts=wanted, loop=loop).graphs("fp32").items():
                onnx.save(model, str(options.work / f"{graph}.{loop}.onnx"))
        for graph, part in wanted.items():
            _write_steps(options.work, graph, part)
    rng = np.random.default_rng(0)
    for graph in options.graphs:
        model = onnx.load(str(options.work / f"{graph}.loop.onnx"), load_external_data=False)
        side = int(graph.partition("@")[2] or (BUCKETS[-1] if graph == "prior" else BUCKETS[0]))
        batch = max(2, options.batch * BUCKETS[0] ** 2 // side**2)
        inputs = {value.name: _made_up(value, batch, rng) for value in model.graph.input}
        expected = TorchBackend(networks).run(graph, inputs)
        np.savez(options.work / f"{graph}.npz", **inputs, expected=expected)


def _made_up(value: onnx.ValueInfoProto, batch: int, rng: np.random.Generator) -> Any:
    shape = [size.dim_value or batch for size in value.type.tensor_type.shape.dim]
    if value.name in ("keep", "edit", "mask", "ring"):
        return np.ones(shape, dtype=np.float32)
    if value.name == "frame":
        return np.array([[0, 0, RESOLUTION, RESOLUTION]] * shape[0], dtype=np.float32)
    made = np.zeros(shape) if value.name == "asked" else rng.standard_normal(shape)
    return made.astype(np.float32)


def _write_steps(folder: Path, graph: str, part: Any) -> None:
    """The graph of one step, of what comes before the first one and of what comes after the last one."""
    from onnx import TensorProto, helper

    from busigen.export.assembly import TIMES, Assembly
    from busigen.export.graph_rewrites import make_sums_deterministic
    from busigen.registry import CLASSES

    step: ModelProto = make_sums_deterministic(part.evaluation)
    assembly = Assembly(step.opset_import, step.ir_version)
    names = assembly.paste(step, "", {}, "")
    now = {name: name for name in TIMES}
    for name in now:
        assembly.inputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
    following = assembly.followed("x", names[step.graph.output[0].name], now, "solver/", part.update)
    model = assembly.build(following, step.graph.input[0], "following", "step")
    onnx.save(model, str(folder / f"{graph}.step.onnx"))
    for name, found in (("before", part.before), ("after", part.after)):
        if found is not None:
            onnx.save(found, str(folder / f"{graph}.{name}.onnx"))
    label = graph.partition("@")[0].partition("-")[2] or "normal"
    np.save(folder / f"{graph}.label.npy", np.array([CLASSES.index(label)]))


def opsets(options: argparse.Namespace) -> dict[str, Any]:
    """Count what ONNX Runtime's CPU provider fuses of one evaluation, per opset, and whether it runs at all."""
    from busigen.export.components import components
    from busigen.export.graph_rewrites import make_sums_deterministic
    from busigen.export.report import KINDS, fused
    from busigen.training.checkpoint import load_networks

    networks, _ = load_networks(options.checkpoint)
    found: dict[str, Any] = {}
    rows = []
    for opset in OPSETS:
        for component in components(networks, opset=opset, loop="loop"):
            graph, part = next(iter(component.parts.items()))
            model = make_sums_deterministic(part.evaluation)
            counts: dict[str, Any] = fused(model.SerializeToString())
            counts["runs"] = _runs(model)
            found.setdefault(graph, {})[str(opset)] = counts
            rows.append(
                [graph, str(opset), *(str(counts[kind]) for kind in ("nodes", *KINDS)), counts["runs"] or "yes"]
            )
    show(
        "One evaluation as ONNX Runtime's CPU provider optimises it", ["graph", "opset", "nodes", *KINDS, "runs"], rows
    )
    return found


def _runs(model: ModelProto) -> str:
    """Why a graph of one evaluation does not run on the CPU; empty if it does."""
    rng = np.random.default_rng(0)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    inputs = {value.name: _made_up(value, 2, rng) for value in model.graph.input if value.name != "label"}
    try:
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=[PROVIDERS["cpu"].onnxruntime])
        if any(value.name == "label" for value in model.graph.input):
            inputs["label"] = np.ones(1, dtype=np.int64)
        session.run(None, inputs)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return str(error).splitlines()[0][-90:]
    return ""


def int8(options: argparse.Namespace) -> dict[str, Any]:
    """Quantise the context encoder and one evaluation of stage 2, and time them in turns with fp32."""
    from busigen.export.components import components
    from busigen.export.graph_rewrites import make_sums_deterministic
    from busigen.export.parity import RecordedCall, relative_error
    from busigen.export.precision_search import quantised
    from busigen.training.checkpoint import load_networks

    networks, _ = load_networks(options.checkpoint)
    found: dict[str, Any] = {}
    rows = []
    tried = {"context": [["MatMul"]], "lesion": [["MatMul"], ["MatMul", "Conv"]]}
    for component in components(networks, opset=OPSETS[0], loop="loop", only=tried):
        graph, part = next(iter(component.parts.items()))
        for operators in tried[component.name]:
            model = make_sums_deterministic(part.evaluation)
            inputs = _asked(model, options.batch)
            sessions = {"fp32": _in_memory(model, options.threads)}
            (expected,) = sessions["fp32"].run(None, inputs)
            low = quantised({graph: model}, {graph: [RecordedCall(inputs, expected)]}, operators)[graph]
            sessions["int8"] = _in_memory(low, options.threads)
            error = relative_error(sessions["int8"].run(None, inputs)[0], expected)
            seconds = {name: _seconds(session, inputs, options) for name, session in sessions.items()}
            name = f"{graph}, {' and '.join(operators)}"
            found[name] = {"error": error, **{key: 1000 * value for key, value in seconds.items()}}
            rows.append([name, *(f"{1000 * seconds[key]:.1f}" for key in ("fp32", "int8")), f"{error:.4f}"])
    header = ["one evaluation", "fp32, processor ms", "int8, processor ms", "relative error"]
    show(f"int8, batch {options.batch}", header, rows)
    return found


def _asked(model: ModelProto, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    inputs = {value.name: _made_up(value, batch, rng) for value in model.graph.input if value.name != "label"}
    if "t" in inputs:
        inputs |= {"t": np.full(1, 0.5, dtype=np.float32), "label": np.ones(1, dtype=np.int64)}
    return inputs


def _in_memory(model: ModelProto, threads: int) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), settings, providers=[PROVIDERS["cpu"].onnxruntime])


def _seconds(session: ort.InferenceSession, inputs: dict[str, Any], options: argparse.Namespace) -> float:
    taken: Sequence[float] = []
    for _ in range(options.calls * options.repeats + 1):
        started = time.process_time()
        session.run(None, inputs)
        taken = [*taken, time.process_time() - started]
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
