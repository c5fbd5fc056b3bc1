"""What ONNX Runtime makes of a graph: how many nodes are left, and how many of them are fused kernels."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import GraphProto, NodeProto

KINDS = {
    "attention": frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention"}),
    "normalisation": frozenset(
        {
            *("GroupNorm", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
            *("SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization"),
        }
    ),
    "activation": frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"}),
    "product": frozenset({"FusedConv", "FusedGemm", "FusedMatMul"}),
    "softmax": frozenset({"Softmax"}),
}
"""Operators that count as one kernel for what PyTorch has several of; ``QuickGelu`` is ONNX Runtime's SiLU, too."""


def fused(graph: Path | bytes, provider: str = "CPUExecutionProvider") -> dict[str, int]:
    """Count the nodes of a graph as ONNX Runtime optimises it, those of a loop's body among them.

    Args:
        graph: a file, or a graph with its weights.
        provider: ONNX Runtime's name of it.

    Returns:
        ``nodes`` in all, and as many as there are of each of ``KINDS``. A solver's loop counts once.
    """
    with tempfile.TemporaryDirectory(prefix="busigen-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        # It warns that what it writes is for this machine, which is where it is counted.
        options.log_severity_level = 4
        ort.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options, providers=[provider])
        nodes = Counter(node.op_type for node in _nodes(onnx.load(str(optimised), load_external_data=False).graph))
    return {"nodes": nodes.total(), **{kind: sum(nodes[name] for name in names) for kind, names in KINDS.items()}}


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
