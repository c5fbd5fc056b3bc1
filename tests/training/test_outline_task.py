"""Stage 1 from fitting to merged adapter, at a size that takes seconds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from busigen.data.prepared import Prepared
from busigen.registry import ASKED_LENGTH, PRESETS
from busigen.training.checkpoint import load_component, merge, save_component, with_adapter
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks, Velocity
from busigen.training.networks.outline import birads_flags
from busigen.training.recipe import LoraSpec, TaskSpec
from busigen.training.tasks import TaskContext
from busigen.training.tasks.denoiser import MaskTask
from busigen.training.trainer import Trainer

TINY = PRESETS["tiny"]
BASE = TaskSpec("mask", "mask", "mask", steps=60, batch=16, lr=2e-3, warmup=5, ema=0.9)
ADAPTER = TaskSpec(
    "mask-malignant", "adapter", "mask", steps=10, batch=8, lr=4e-3, warmup=1, label="malignant", ema=0.9
)


@pytest.fixture(scope="module")
def setting(synthetic_prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> TaskContext:
    torch.manual_seed(0)
    channels = TINY.latent_channels
    autoencoder, context = build("autoencoder", TINY).eval(), build("context", TINY).eval()
    networks = Networks(TINY, autoencoder, torch.zeros(channels), torch.ones(channels), context)
    return TaskContext(
        prepared=synthetic_prepared,
        networks=networks,
        device=torch.device("cpu"),
        seed=0,
        report=lambda what: lambda done, total: None,
        cache=tmp_path_factory.mktemp("cache"),
        healed=lambda row, variant: synthetic_prepared.images[row],
    )


@torch.no_grad()
def training_loss(task: MaskTask) -> float:
    """Over fixed draws. Training ones, because a dozen drawn lesions say little of those held out."""
    return sum(float(task.loss(torch.Generator().manual_seed(k))) for k in range(20))


def train(spec: TaskSpec, setting: TaskContext, module: torch.nn.Module, folder: Path) -> MaskTask:
    task = MaskTask(spec, setting, module)
    untrained = training_loss(task)
    Trainer(task, seed=0, folder=folder, device=torch.device("cpu"), console=Console(file=io.StringIO())).run()
    module.eval()
    assert training_loss(task) < untrained
    return task


def test_stage_one_trains_and_its_adapter_keeps_the_bases_basis(setting: TaskContext, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build("mask", TINY)
    task = train(BASE, setting, base, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "mask" / "000060.png").is_file()
    codes = task.train[min(task.train)].tensors["clean"]
    # Fitted on these lesions' whole images and their mirrors, and half of the examples are cut closer, so the codes
    # are standard to within what that changes.
    assert codes.mean(dim=0).abs().max() < 2.0 and 0.3 < float(codes.std()) < 3.0

    save_component(base, tmp_path / "mask")
    loaded = load_component("mask", tmp_path / "mask")
    fitted = {name: buffer.clone() for name, buffer in base.named_buffers()}
    assert fitted and all(torch.equal(buffer, fitted[name]) for name, buffer in loaded.named_buffers())

    adapted = with_adapter(loaded, LoraSpec(), seed=0)
    train(ADAPTER, setting, adapted, tmp_path / "run")
    inputs = (
        torch.randn(2, base.length),
        torch.tensor([0.4, 0.9]),
        torch.tensor([2, 2]),
        torch.randn(2, TINY.tokens, TINY.context_dim),
        torch.ones(2, TINY.tokens),
        torch.zeros(2, ASKED_LENGTH),
    )
    with torch.no_grad():
        plain, with_lora = Velocity(base)(*inputs), Velocity(adapted)(*inputs)
        merged = merge(adapted)
        output = Velocity(merged)(*inputs)
    assert (with_lora - plain).abs().max() > 1e-3
    # The same sum in another order, through a few layers in fp32.
    assert (output - with_lora).abs().max() < 1e-5 * with_lora.abs().max().clamp(min=1.0)
    kept = {name for name, buffer in merged.named_buffers() if torch.equal(buffer, fitted[name])}
    assert kept == fitted.keys() - {"spectrum.spread"}


def test_categories_of_folders_prepared_earlier_are_learnt_as_well() -> None:
    flags = birads_flags(["4a", "4", "BI-RADS 5", "0", None, "4.0"])
    assert flags.argmax(axis=1)[flags.any(axis=1)].tolist() == [2, 2, 3, 2]
    assert flags.any(axis=1).tolist() == [True, True, True, False, False, True]
