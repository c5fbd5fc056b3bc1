"""Which precision a component gets: the one that was asked for, or the next higher one, and why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from busigen.errors import ParityError
from busigen.export.components import Component, Part
from busigen.export.exporter import export
from busigen.export.import_bundle import restore
from busigen.export.parity import LIMITS, RecordedCall, TorchBackend
from busigen.export.precision_search import choose, escalate
from busigen.export.report import report
from busigen.export.request import Options
from busigen.export.trace import Tracer
from busigen.registry import LESION_CLASSES, OPSETS
from busigen.runtime.backends.base import open_backend
from busigen.training.checkpoint import load_component, load_networks
from tests.harness.checkpoints import TINY, changed, untrained

FIRST, SECOND = "decoder.levels.0.0.conv1", "decoder.levels.0.0.conv2"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("checkpoints") / "sound")


def overflowing(state: dict[str, Tensor]) -> None:
    """Make activations of about a million between two convolutions, which the second one takes back."""
    state[f"{FIRST}.weight"].mul_(1e6)
    state[f"{FIRST}.bias"].mul_(1e6)
    state[f"{SECOND}.weight"].mul_(1e-6)


def decoder(checkpoint: Path) -> tuple[Component, dict[str, list[RecordedCall]]]:
    """The traced decoder of the small window, and what it was asked and answered."""
    networks, _ = load_networks(checkpoint)
    component = Component("decoder", {"decoder@128": Part(Tracer(OPSETS[0]).decoder(networks.decoder, 128))})
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.standard_normal((4, TINY.latent_channels, 16, 16)).astype(np.float32),
        "noise": rng.standard_normal((4, 1, 128, 128)).astype(np.float32),
        "mask": np.zeros((4, 1, 128, 128), np.float32),
    }
    return component, {"decoder@128": [RecordedCall(inputs, TorchBackend(networks).run("decoder@128", inputs))]}


def test_a_component_gets_what_was_asked_for_where_it_holds(sound: Path) -> None:
    component, asked = decoder(sound)
    chosen = choose(component, "fp16", asked)
    assert chosen.precision == "fp16" and [tried.refused for tried in chosen.tried] == [""]
    assert 0 < chosen.tried[0].error < 1
    # int8 is for the context encoder: nothing is tried here that would not be taken.
    assert choose(component, "int8", asked).precision == "fp32"

    later = escalate(chosen, "over the whole trajectory: dice", asked)
    assert later.precision == "fp32"
    assert [(tried.precision, tried.refused) for tried in later.tried] == [
        ("fp16", "over the whole trajectory: dice"),
        ("fp32", ""),
    ]


def test_weights_that_overflow_fp16_are_exported_in_fp32(sound: Path, tmp_path: Path) -> None:
    component, asked = decoder(changed(sound, tmp_path / "loud", "base/autoencoder", overflowing))
    chosen = choose(component, "fp16", asked)
    assert chosen.precision == "fp32"
    assert [tried.precision for tried in chosen.tried] == ["fp16", "fp32"]
    assert (
        "decoder@128 yields NaN or infinity" in chosen.tried[0].refused and chosen.tried[0].to_dict()["error"] is None
    )


def test_another_networks_answers_are_refused_in_every_precision(sound: Path) -> None:
    component, asked = decoder(sound)
    (call,) = asked["decoder@128"]
    wrong = {"decoder@128": [RecordedCall(call.inputs, call.output + 0.1)]}
    with pytest.raises(ParityError, match=r"decoder.*fp16: .*times the error allowed.*fp32: "):
        choose(component, "fp16", wrong)
    with pytest.raises(ParityError, match="never asked"):
        choose(component, "fp32", {})


def test_an_opset_whose_operators_do_not_run_here_is_refused_with_the_providers_reason(sound: Path) -> None:
    """ONNX Runtime 1.31 opens opset 23's attention and stops when it runs it; a later one may run it, and then may."""
    networks, _ = load_networks(sound)
    component = Component("context", {"context": Part(Tracer(OPSETS[-1]).context(networks))})
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.uniform(-1, 1, (2, 1, 256, 256)).astype(np.float32),
        "keep": np.ones((2, TINY.tokens), dtype=np.float32),
    }
    asked = {"context": [RecordedCall(inputs, TorchBackend(networks).run("context", inputs))]}
    try:
        assert choose(component, "fp32", asked).tried[-1].error <= 1
    except ParityError as error:
        assert re.search(r"context.*fp32: cannot be run: .*(Attention|attn|mask)", str(error)), error


def test_int8_is_taken_only_where_it_is_faster(sound: Path) -> None:
    """Whether it is depends on the machine; that it is said does not."""
    networks, _ = load_networks(sound)
    component = Component("context", {"context": Part(Tracer(OPSETS[0]).context(networks))})
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.uniform(-1, 1, (4, 1, 256, 256)).astype(np.float32),
        "keep": np.ones((4, TINY.tokens), dtype=np.float32),
    }
    chosen = choose(
        component, "int8", {"context": [RecordedCall(inputs, TorchBackend(networks).run("context", inputs))]}
    )
    first = chosen.tried[0]
    assert first.precision == "int8" and np.isfinite(first.error)
    kinds = {node.op_type for node in chosen.graphs["context"].graph.node}
    if chosen.precision == "int8":
        assert first.error <= 1 and "QuantizeLinear" in kinds
    else:
        assert "does not pay" in first.refused or "times the error allowed" in first.refused
        assert "QuantizeLinear" not in kinds


def weights(folder: Path, place: str) -> dict[str, Tensor]:
    state: dict[str, Any] = load_component(place.partition("/")[2].partition("-")[0], folder / place).state_dict()
    return state


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["loop", "unrolled"])
def test_a_bundle_in_fp16_is_proved_falls_back_and_is_restored(sound: Path, tmp_path: Path, loop: str) -> None:
    """About two minutes: two exports of a tiny checkpoint whose decoder overflows fp16."""
    loud = changed(sound, tmp_path / "loud", "base/autoencoder", overflowing)
    bundle = export(loud, tmp_path / "bundle", Options(precision="fp16", loop=loop, draws=8))
    found = {name: graph["precision"] for name, graph in bundle.info["graphs"].items()}
    assert {name for name, precision in found.items() if precision == "fp32"} == {"decoder@128", "decoder@256"}
    assert set(found.values()) == {"fp16", "fp32"}
    assert set(bundle.info["parity"]["targets"]) >= {"cpu", "emulated"}
    for figures in bundle.info["parity"]["targets"].values():
        for label in LESION_CLASSES:
            assert all(limit.holds(figures[label][name]) for name, limit in LIMITS.items())
    described = report(bundle.info)
    assert (
        "| decoder | fp16 |  | decoder@128 yields NaN or infinity |" in described
        and "| emulated | benign |" in described
    )
    assert "yields NaN or infinity" in (bundle.folder / "MODEL_CARD.md").read_text()
    json.dumps(bundle.info, allow_nan=False)

    noise = np.random.default_rng(0).standard_normal((2, *bundle.background_shape)).astype(np.float32)
    asked = {"noise": noise, "frame": np.array([[0, 0, 180, 256], [0, 40, 256, 176]] * 4, np.float32)[:2]}
    networks, _ = load_networks(loud)
    expected = TorchBackend(networks).run("prior", asked)
    assert np.abs(open_backend(bundle).run("prior", asked) - expected).max() < 0.05 * np.abs(expected).max()

    restore(bundle, tmp_path / "restored")
    for place in ("merged/lesion-malignant", "merged/mask-benign", "base/prior", "base/autoencoder"):
        back = weights(tmp_path / "restored", place)
        for name, value in weights(loud, place).items():
            if place == "base/prior" and (".norm2." in name or ".attn2." in name):
                continue  # They have no say in what it computes, and are left out.
            # Stored in fp16: 11 bits.
            assert torch.allclose(back[name], value, rtol=2.0**-11, atol=2.0**-11 * float(value.abs().max())), name


@pytest.mark.slow
def test_what_fails_leaves_nothing_behind(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that nothing can reach: the graphs are right, and are refused all the same."""
    from dataclasses import replace

    monkeypatch.setitem(LIMITS, "ssim", replace(LIMITS["ssim"], value=1.5))
    with pytest.raises(ParityError, match="ssim"):
        export(sound, tmp_path / "bundle", Options(precision="fp16", draws=8))
    assert list(tmp_path.iterdir()) == []
