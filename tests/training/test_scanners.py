"""Scanners as a condition: who is learnt by name, how networks are told, and what became of earlier versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor

from busigen.export.components import components
from busigen.registry import FEWEST_OF_SCANNER, LOOPS, OPSETS, PRESETS, SCANNERS
from busigen.training.checkpoint import Base, load_component, save_component
from busigen.training.examples import scanners_of, told
from busigen.training.networks.build import build, lacks_scanners, tell_scanners, widened
from busigen.training.networks.inference import Networks
from busigen.training.pipeline import _Run
from busigen.training.recipe import recipe_for

TINY = PRESETS["tiny"]
LATENTS = TINY.latent_channels


def networks(scanners: list[str]) -> Networks:
    torch.manual_seed(0)
    denoisers = {"prior": build("prior", TINY).eval()}
    denoisers |= {
        f"{stage}-{label}": build(stage, TINY).eval() for stage in ("lesion",) for label in ("benign", "malignant")
    }
    made = Networks(TINY, build("autoencoder", TINY), torch.zeros(LATENTS), torch.ones(LATENTS), None, denoisers)
    for weight in made.autoencoder.decoder.scanners.parameters():
        torch.nn.init.normal_(weight)
    made.scanners = scanners
    return made


def test_scanners_of_enough_images_are_learnt_by_name_and_known_ones_keep_their_place() -> None:
    counts = {"A": FEWEST_OF_SCANNER - 1, "B": FEWEST_OF_SCANNER, "C": FEWEST_OF_SCANNER + 1, None: 100}
    rows = pl.DataFrame({"scanner": [name for name, count in counts.items() for _ in range(count)]})
    assert scanners_of(rows) == ["C", "B"]
    assert scanners_of(rows, ["Z", "B"]) == ["Z", "B", "C"]
    many = pl.DataFrame({"scanner": [str(k % 12) for k in range(12 * FEWEST_OF_SCANNER)]})
    assert len(scanners_of(many)) == SCANNERS


def test_any_scanner_is_told_as_nothing() -> None:
    assert told(torch.tensor([0, 1, SCANNERS])).tolist() == [
        [0.0] * SCANNERS,
        [1.0, *[0.0] * (SCANNERS - 1)],
        [*[0.0] * (SCANNERS - 1), 1.0],
    ]


def test_a_denoiser_of_an_earlier_version_is_read_and_no_scanner_changes_it_yet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    later = build("lesion", TINY).eval()
    config = {**later.config, "in_channels": later.config.in_channels - SCANNERS}
    earlier = type(later).from_config(config).eval()
    assert lacks_scanners("lesion", earlier.config) and not lacks_scanners("lesion", later.config)
    save_component(earlier, tmp_path / "lesion")
    found = load_component("lesion", tmp_path / "lesion", TINY)
    assert found.config.in_channels == later.config.in_channels

    def velocity(model: torch.nn.Module, *parts: Tensor) -> Tensor:
        tokens, keep = torch.zeros(2, 4, TINY.context_dim), torch.ones(2, 4)
        label, t = torch.ones(2, dtype=torch.long), torch.full((2,), 500.0)
        x = torch.cat(parts, dim=1)
        return model(x, t, tokens, class_labels=label, encoder_attention_mask=keep).sample

    torch.manual_seed(1)
    x, scanner = torch.randn(2, LATENTS, 16, 16), torch.randn(2, SCANNERS, 16, 16)
    rest = torch.randn(2, earlier.config.in_channels - LATENTS, 16, 16)
    with torch.no_grad():
        expected = velocity(earlier, x, rest)
        # Sums over more channels are rounded in another order.
        assert torch.allclose(velocity(found, x, scanner, rest), expected, atol=1e-5)
        tell_scanners(earlier)
        assert torch.equal(
            earlier.conv_in.weight,
            widened(
                earlier.conv_in.weight[
                    :, [*range(LATENTS), *range(LATENTS + SCANNERS, x.shape[1] + SCANNERS + rest.shape[1])]
                ],
                LATENTS,
            ),
        )


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_graphs_are_told_the_scanner_as_the_networks_are_row_by_row(loop: str) -> None:
    made = networks(["A", "B"])
    (prior,) = components(made, opset=OPSETS[0], loop=loop, only=("prior",))
    (decoder,) = components(made, opset=OPSETS[0], loop=loop, only=("decoder",))
    scanner = told(torch.tensor([0, 1, 2]))
    noise, frame = torch.randn(3, LATENTS, 32, 32), torch.tensor([[0.0, 0.0, 256.0, 256.0]] * 3)
    pixels = torch.randn(3, 1, 128, 128)
    mask, latents = torch.zeros_like(pixels), torch.randn(3, LATENTS, 16, 16)
    with torch.no_grad():
        expected = made.background(noise, frame, None, scanner), made.decoder(latents, pixels, mask, scanner)
        anything = made.background(noise, frame), made.decoder(latents, pixels, mask)
    for component, graph, inputs, one, other in (
        (prior, "prior", {"noise": noise, "frame": frame}, expected[0], anything[0]),
        (decoder, "decoder@128", {"latents": latents, "noise": pixels, "mask": mask}, expected[1], anything[1]),
    ):
        session = onnxruntime.InferenceSession(component.graphs("fp32")[graph].SerializeToString())
        assert {value.name for value in session.get_inputs()} == {*inputs, "scanner"}
        (found,) = session.run(None, {name: value.numpy() for name, value in {**inputs, "scanner": scanner}.items()})
        # Two engines round differently, and so do evaluations in turn.
        assert np.abs(found - one.numpy()).max() < 1e-3
        assert torch.allclose(one[0], other[0], atol=1e-5)
        assert (one[1] - other[1]).abs().max() > 0.01 < (one[1] - one[2]).abs().max() + 1.0


@pytest.mark.slow
def test_without_named_scanners_no_graph_asks_for_one() -> None:
    made = networks([])
    for component in components(made, opset=OPSETS[0], loop="loop", only=("prior", "decoder", "lesion")):
        for model in component.graphs("fp32").values():
            assert "scanner" not in {value.name for value in model.graph.input}


@pytest.mark.parametrize(("retrain", "expected"), [("mask", ["A"]), ("prior", ["A", "B"]), ("lesion", ["A", "B"])])
def test_a_run_that_tells_no_network_the_scanner_adds_none_to_its_bases(
    tmp_path: Path, retrain: str, expected: list[str]
) -> None:
    table = pl.DataFrame({"split": "train", "scanner": ["B"] * FEWEST_OF_SCANNER})
    recorded = {"preset": "tiny", "recipe": recipe_for("tiny").to_dict(), "scanners": [["A", 0.5]]}
    base = Base(tmp_path, recorded)
    prepared: Any = SimpleNamespace(table=table)
    run = _Run(prepared, tmp_path, base.recipe(retrain=[retrain]), base, torch.device("cpu"), Console())
    assert [name for name, _ in run._scanners] == expected
