"""A source whose engine never ends a call, as ``generate`` would have it with a graph that takes 2^62 turns.

``python -m tests.harness.endless_source OUT WHERE`` runs the factory with it, in the ``main`` thread, in a ``thread``
that the main one waits for, or in a pool of two ``workers``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from busigen.errors import BusigenError
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.execution.events import supervised
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.launchers import launcher
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.execution.workers import Coordinator
from busigen.runtime.progress import Progress
from tests.harness.noise_source import NoiseSource


def endless_graph() -> bytes:
    """A loop that adds its input to itself 2^62 times."""
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Identity", ["on"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "", "start"], ["end"], body=body)],
        "endless",
        [helper.make_tensor_value_info("start", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, [1])],
        [helper.make_tensor("turns", TensorProto.INT64, [], [1 << 62])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return bytes(model.SerializeToString())


class EndlessSource(NoiseSource):
    """Draws nothing, for ever."""

    in_thread = False

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        session = onnxruntime.InferenceSession(endless_graph(), providers=["CPUExecutionProvider"])
        inputs = {"start": np.ones(1, np.float32)}
        print(f"the engine is at work in process {os.getpid()}", file=sys.stderr, flush=True)
        if self.in_thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(session.run, None, inputs).result()
        session.run(None, inputs)
        raise AssertionError("it came to an end")


def endless(progress: Progress) -> EndlessSource:
    """What a worker opens."""
    return EndlessSource()


def main(out: Path, where: str) -> int:
    numbers = {"count": 4, "seed": 7, "shard_size": 2}
    source = EndlessSource()
    source.in_thread = where == "thread"
    try:
        with supervised(out, None) as (progress, stop):
            if where == "workers":
                with launcher("local").worker_pool(
                    lambda threads: endless, GenerateOptions(out=out, workers=2, threads=1)
                ) as worker_pool:
                    coordinator = Coordinator(worker_pool, progress)
                    generate(coordinator.source(), out, **numbers, progress=progress, stop=stop, make=coordinator.make)
            else:
                generate(source, out, **numbers, progress=progress, stop=stop)
    except BusigenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
