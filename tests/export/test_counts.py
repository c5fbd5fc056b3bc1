"""Counts of fused nodes: in every bundle, of every graph, and what ONNX Runtime really makes of it."""

from __future__ import annotations

import onnxruntime as ort

from busigen.export.report import KINDS, counts_table, fused
from busigen.runtime.backends.bundle import Bundle, default_bundle

GRAPHS = Bundle.recorded(default_bundle()).graph_names


def test_the_shipped_bundle_keeps_the_counts_of_every_graph() -> None:
    bundle = Bundle.open(default_bundle())
    recorded = bundle.info["fused"]
    assert set(recorded) == set(GRAPHS)
    assert all(set(found) == {"nodes", *KINDS} for found in recorded.values())
    for name in GRAPHS:
        if name.startswith(("lesion", "blend", "mask", "prior", "context")):
            assert recorded[name]["normalisation"] > 0 and recorded[name]["softmax"] + recorded[name]["attention"] > 0
    assert counts_table(recorded).count("\n") == len(recorded) + 1
    if bundle.info["versions"]["onnxruntime"] == ort.__version__:
        # Another version may fuse otherwise.
        for name in ("context", "encoder@128", "mask-benign"):
            assert fused(bundle.graph(name)) == recorded[name]
