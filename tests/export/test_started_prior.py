"""The prior's graph where backgrounds begin with phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from busigen.errors import InputError, UsageError
from busigen.export.components import components
from busigen.export.request import fitted_phantoms
from busigen.phantoms.distribution import Phantoms
from busigen.registry import LOOPS, OPSETS, PRESETS, STARTED_STEPS
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_graph_starts_where_the_networks_do(loop: str) -> None:
    torch.manual_seed(0)
    statistics = torch.zeros(TINY.latent_channels), torch.ones(TINY.latent_channels)
    networks = Networks(TINY, build("autoencoder", TINY), *statistics, None, {"prior": build("prior", TINY).eval()})
    networks.start_prior(0.6)
    assert networks.steps["prior"] == STARTED_STEPS
    (component,) = components(networks, opset=OPSETS[0], loop=loop, only=("prior",))
    session = onnxruntime.InferenceSession(component.graphs("fp32")["prior"].SerializeToString())
    assert {value.name for value in session.get_inputs()} == {"noise", "frame", "start"}
    noise, start = (torch.randn(3, TINY.latent_channels, 32, 32) for _ in range(2))
    frame = torch.tensor([[0.0, 0.0, 256.0, 256.0], [0.0, 20.0, 256.0, 216.0], [0.0, 0.0, 190.0, 256.0]])
    (found,) = session.run(None, {"noise": noise.numpy(), "frame": frame.numpy(), "start": start.numpy()})
    with torch.no_grad():
        expected = networks.background(noise, frame, start).numpy()
        elsewhere = networks.background(noise, frame, torch.zeros_like(start)).numpy()
    # Two engines round differently, and so do four evaluations in turn.
    assert np.abs(found - expected).max() < 1e-3 < 0.1 * np.abs(expected - elsewhere).max()


def test_phantoms_to_export_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "phantom.json"
    path.write_text(json.dumps(Phantoms.unfitted().to_json() | {"rounds": []}))
    assert fitted_phantoms(path, 0.7) == Phantoms.unfitted().to_json() | {"start": 0.7}
    with pytest.raises(UsageError, match="--prior-start is 1"):
        fitted_phantoms(path, 1.0)
    with pytest.raises(InputError, match="is not there"):
        fitted_phantoms(tmp_path / "none.json", 0.7)
    path.write_text("{}")
    with pytest.raises(InputError, match="no fitted phantoms"):
        fitted_phantoms(path, 0.7)
