"""What a bundle of schema 6 says of itself is what the sampler does, with graphs made of the shipped ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from busigen.errors import UsageError
from busigen.registry import LESION_CLASSES
from busigen.runtime.backends.base import open_backend
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.dataset.format import Sample
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.sampling.conditions import parse_conditions
from busigen.runtime.sampling.noise import normal
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.made_bundles import loaded, plain, read_afresh, resized, saved, stated, switched, written

SEED = 5
MIX = {"benign": 0.5, "malignant": 0.5}
SMALL = parse_conditions(size="0.02")
"""Lesions whose edit region fits the smaller window."""


class Watched(OnnxBackend):
    """Remembers what each graph was last fed and gave, and how many sessions were opened."""

    opened = 0

    def __init__(self, bundle: Bundle) -> None:
        self.seen: dict[str, dict[str, NDArray[Any]]] = {}
        super().__init__(bundle)

    def _session(self, *arguments: Any, **more: Any) -> Any:
        self.opened += 1
        return super()._session(*arguments, **more)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        output = super().run(graph, inputs)
        self.seen[graph] = {**inputs, "output": output}
        return output


def drawn(folder: Path, backend: OnnxBackend | None = None, count: int = 2, **options: Any) -> list[Sample]:
    bundle = Bundle.open(folder)
    options = {"classes": MIX, "asked": SMALL, "batch_size": 2, **options}
    found = Sampler(bundle, backend or OnnxBackend(bundle), **options).draw(SEED, range(count), lambda done: None)
    return found.samples


@pytest.fixture(scope="module")
def shipped() -> list[Sample]:
    return drawn(plain())


def assert_same(found: list[Sample], expected: list[Sample]) -> None:
    assert [sample.row for sample in found] == [sample.row for sample in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.mask, other.mask) and np.array_equal(one.image, other.image)


def test_the_shipped_bundle_described_in_full_draws_the_same_samples(tmp_path: Path, shipped: list[Sample]) -> None:
    """With a decoder for backgrounds that has a name of its own, and the file of another."""
    info = stated()
    info["background"]["decoder"] = "background-decoder"
    info["graphs"]["background-decoder"] = dict(info["graphs"]["decoder@256"])
    folder = written(tmp_path / "bundle", info)
    backend = Watched(Bundle.open(folder))
    assert_same(drawn(folder, backend), shipped)
    assert {"background-decoder", "decoder@128"} <= set(backend.seen) and "decoder@256" not in backend.seen
    sampler = Sampler(Bundle.open(folder), backend, classes=MIX, asked=SMALL, batch_size=2)
    generate(sampler, tmp_path / "set", count=2, seed=SEED)
    told = explain(tmp_path / "set", "0", inputs=Inputs(bundle=folder))
    assert told.error is None and told.replay is not None and told.replay.image_agrees
    links = [link["link"] for link in told.history["chain"] if link["link"].startswith("ONNX")]
    assert links[:2] == ["ONNX prior", "ONNX background-decoder"] and links[-1] == "ONNX decoder@128"


def test_classes_that_share_a_file_are_told_apart_by_a_constant(tmp_path: Path, shipped: list[Sample]) -> None:
    folder, info = tmp_path / "bundle", stated()
    names = [f"lesion-{label}@128" for label in LESION_CLASSES]
    weights = {file: sha for name in names for file, sha in info["graphs"][name]["files"].items()}
    record = saved(folder, switched(info, names), "lesion-128.onnx", weights)
    for number, name in enumerate(names):
        chosen = [float(place == number) for place in range(4)]
        info["graphs"][name] = {**record, "files": dict(record["files"]), "constants": {"adapter": chosen}}
    written(folder, info)
    backend = Watched(Bundle.open(folder))
    # Zero times the other class's latents is added to each: no number changes.
    assert_same(drawn(folder, backend), shipped)
    assert set(names) <= set(backend.seen)
    assert backend.opened == len(backend.seen) - 1, "the two share a session"
    distinct = Bundle.open(folder).distinct_graphs
    assert len(distinct) == len(info["graphs"]) - 1 and set(names) & set(distinct) == {names[0]}


def test_a_window_is_shown_larger_than_it_is(tmp_path: Path) -> None:
    """Windows of 128 pixels go through the graphs of 256, which two resizes surround."""
    folder, info = tmp_path / "bundle", stated()
    info["windows"] = {"128": 256, "256": 256}
    graphs = info["graphs"]
    for name, inputs in (("encoder", ["pixels"]), ("decoder", ["noise", "mask"])):
        model = resized(loaded(info, f"{name}@256"), inputs, output=name == "decoder")
        graphs[f"{name}@128"] = saved(folder, model, f"{name}-shown.onnx", graphs[f"{name}@256"]["files"])
    for label in LESION_CLASSES:
        for stage in ("lesion", "blend"):
            graphs[f"{stage}-{label}@128"] = dict(graphs[f"{stage}-{label}@256"])
    written(folder, info)
    bundle = Bundle.open(folder)
    assert {bundle.call_side(name) for name in bundle.graph_names if "@" in name} == {256}
    backend = Watched(bundle)
    samples = drawn(folder, backend, batch_size=8)
    assert {sample.row["window_side"] for sample in samples} == {128}
    for sample in samples:
        lesion, decoder = backend.seen[f"lesion-{sample.label}@128"], backend.seen["decoder@128"]
        assert lesion["noise"].shape == lesion["known"].shape == (2, 8, 32, 32)
        assert decoder["mask"].shape == decoder["noise"].shape == (2, 1, 128, 128)
        assert lesion["mask"].shape == (2, 1, 256, 256)
        top, left = sample.row["window_top"], sample.row["window_left"]
        window = sample.mask[top : top + 128, left : left + 128]
        assert np.array_equal(lesion["mask"][0, 0], np.kron(window, np.ones((2, 2))))
        blend = backend.seen[f"blend-{sample.label}@128"]
        assert blend["ring"].shape == (2, 1, 256, 256) and blend["ring"].any()
        assert not (blend["ring"] > blend["edit"]).any()


def test_a_graph_of_both_stages_is_fed_the_inputs_of_both(tmp_path: Path, shipped: list[Sample]) -> None:
    """Stage 2 in graphs that also read what stage 3 does: nothing is painted yet, and there is no ring."""
    folder, info = tmp_path / "bundle", stated()
    for label in LESION_CLASSES:
        record = info["graphs"][f"lesion-{label}@128"]
        model = loaded(info, f"lesion-{label}@128")
        values = {value.name: value for value in loaded(info, f"blend-{label}@128").graph.input}
        model.graph.input.extend([values["painted"], values["ring"]])
        info["graphs"][f"lesion-{label}@128"] = saved(folder, model, f"both-{label}.onnx", record["files"])
    written(folder, info)
    backend = Watched(Bundle.open(folder))
    assert_same(drawn(folder, backend), shipped)
    for label in LESION_CLASSES:
        seen = backend.seen[f"lesion-{label}@128"]
        assert np.array_equal(seen["painted"], seen["known"]) and not seen["ring"].any()


def test_fresh_noise_is_the_samples_own(tmp_path: Path) -> None:
    folder, info = tmp_path / "bundle", stated()
    for label in LESION_CLASSES:
        record = info["graphs"][f"lesion-{label}@128"]
        model = read_afresh(loaded(info, f"lesion-{label}@128"), 2, 3)
        info["graphs"][f"lesion-{label}@128"] = saved(folder, model, f"fresh-{label}.onnx", record["files"], fresh=3)
    written(folder, info)
    backend = Watched(Bundle.open(folder))
    samples = drawn(folder, backend, count=3, batch_size=2)
    # Index 1 is the only one of its class.
    graph = f"lesion-{samples[1].label}@128"
    seen = backend.seen[graph]
    expected = normal(SEED, 1, samples[1].attempt, "lesion fresh", (3, 8, 16, 16))
    assert np.array_equal(seen["fresh"], np.stack([expected] * 2)), "the row, and the one that fills the batch"
    # The graph starts from the last of the three arrays as the shipped one does from its noise.
    known = {name: seen[name] for name in ("known", "mask", "edit", "tokens", "keep")}
    again = open_backend(Bundle.open(plain())).run(graph, {**known, "noise": seen["fresh"][:, 2]})
    np.testing.assert_array_equal(seen["output"], again)
    # Whatever else is in its batch.
    (alone,) = (
        Sampler(Bundle.open(folder), backend, classes=MIX, asked=SMALL, batch_size=1).draw(SEED, [2], print).samples
    )
    assert_same([alone], [samples[2]])


def test_a_class_that_a_bundle_does_not_paint_is_refused_with_those_that_it_does(tmp_path: Path) -> None:
    info = stated()
    info["classes"] = ["benign"]
    info["graphs"] = {name: record for name, record in info["graphs"].items() if "malignant" not in name}
    folder = written(tmp_path / "bundle", info)
    with pytest.raises(UsageError, match=r"names 'malignant', and .* paints benign lesions") as caught:
        drawn(folder)
    assert "--classes benign" in caught.value.fix
    assert {sample.label for sample in drawn(folder, count=1, classes={"benign": 1.0})} == {"benign"}
