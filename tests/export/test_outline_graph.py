"""Stage 1's graph against the network it came from, asked and not asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from busigen.data.geometry import attributes, largest_component
from busigen.export.components import Component, outlines
from busigen.export.trace import Tracer
from busigen.export.weights import WeightFiles, write_graphs
from busigen.registry import ASKED_LENGTH, LESION_CLASSES, LOOPS, OPSETS, PRESETS
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks
from tests.training.test_outline import blob

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    masks = [blob(rng) for _ in range(30)]
    channels = TINY.latent_channels
    made = Networks(TINY, build("autoencoder", TINY), torch.zeros(channels), torch.ones(channels))
    for label in LESION_CLASSES:
        model = build("mask", TINY).eval()
        model.space.fit(masks)
        for write in model.write:
            torch.nn.init.normal_(write.weight, std=0.02)
        made.denoisers[f"mask-{label}"] = model
    return made


@pytest.fixture(scope="module")
def traced(networks: Networks) -> Component:
    return outlines(Tracer(OPSETS[0]), networks, next(iter(LOOPS)))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_graph_draws_what_the_network_draws_and_what_is_asked_for(
    networks: Networks, traced: Component, tmp_path: Path, loop: str
) -> None:
    graphs = replace(traced, loop=loop).graphs("fp32")
    assert set(graphs) == {f"mask-{label}" for label in LESION_CLASSES}
    records = write_graphs("mask", graphs, tmp_path, WeightFiles(tmp_path))
    generator = torch.Generator().manual_seed(1)
    wanted = np.array([0.4, 0.6, np.log(50.0), np.log(0.8)])
    for label in LESION_CLASSES:
        name = f"mask-{label}"
        assert set(records[name]["inputs"]) == {"noise", "tokens", "keep", "asked"}
        assert records[name]["output"] == "distance"
        session = onnxruntime.InferenceSession(tmp_path / str(records[name]["file"]))
        for batch in (2, 3):
            asked = torch.zeros(batch, ASKED_LENGTH)
            asked[1, :4], asked[1, 4:8] = torch.from_numpy(wanted), 1.0
            inputs = {
                "noise": torch.randn(batch, networks.denoisers[name].length, generator=generator),
                "tokens": torch.randn(batch, TINY.tokens, TINY.context_dim, generator=generator),
                "keep": torch.ones(batch, TINY.tokens),
                "asked": asked,
            }
            expected = networks.outline(inputs["noise"], label, inputs["tokens"], inputs["keep"], asked).numpy()
            (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
            assert found.shape == (batch, 1, 256, 256)
            # Weights in fp16 move an outline by a fraction of a pixel.
            assert np.abs(found - expected)[np.abs(expected) < 5].max() < 0.5
            mask = largest_component(found[1, 0] > 0)
            assert (np.abs(attributes(mask) - wanted) < [0.002, 0.002, 0.02, 0.07]).all()
    # The classes' weights differ here, tensor by tensor, so one file holds both sets, each once, in two bytes.
    parameters = sum(value.numel() for value in networks.denoisers["mask-benign"].state_dict().values())
    size = (tmp_path / "mask.weights").stat().st_size
    assert size < 2.2 * 2 * parameters, "something is stored twice"
    own = sum(value.numel() for value in networks.denoisers["mask-benign"].parameters())
    assert size > 0.9 * 2 * 2 * own, "weights were left in a graph"
