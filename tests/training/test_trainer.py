from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Generator, Tensor, nn

from busigen.training.recipe import TaskSpec
from busigen.training.trainer import Trainer

SPEC = TaskSpec("line", "line", "line", steps=40, batch=8, lr=0.05, warmup=4, ema=0.9)


class LineTask:
    """Fits a line. Small, but trained by the real trainer."""

    fused_attention = False

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.spec = SPEC
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.calls = 0
        self.interrupt_at = interrupt_at

    def loss(self, generator: Generator) -> Tensor:
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        x = torch.rand(SPEC.batch, 1, generator=generator)
        return (self.module(x) - 3 * x).pow(2).mean()

    @torch.no_grad()
    def validate(self) -> float:
        x = torch.linspace(0, 1, 11)[:, None]
        return float((self.module(x) - 3 * x).pow(2).mean())

    def sheet(self) -> Image.Image:
        return Image.new("L", (4, 4))


def _train(task: LineTask, folder: Path) -> dict:
    console = Console(file=io.StringIO())
    return Trainer(task, seed=1, folder=folder, device=torch.device("cpu"), console=console).run()


def test_training_lowers_the_held_out_loss_and_leaves_its_traces(tmp_path: Path) -> None:
    task = LineTask()
    untrained = task.validate()
    figures = _train(task, tmp_path)
    assert figures["steps"] == SPEC.steps
    assert figures["validation"][-1][0] == SPEC.steps
    assert figures["validation"][-1][1] < 0.5 * untrained
    assert (tmp_path / "samples" / "line" / "000040.png").is_file()
    assert any((tmp_path / "tensorboard").iterdir())
    assert not any(path.suffix in (".pt", ".pth", ".pkl", ".bin") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("stop", [1, 2, 17, 39])
def test_an_interrupted_run_ends_with_the_very_weights_of_an_undisturbed_one(tmp_path: Path, stop: int) -> None:
    whole = LineTask()
    _train(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(LineTask(interrupt_at=stop), tmp_path / "cut")
    resumed = LineTask()
    _train(resumed, tmp_path / "cut")
    assert resumed.calls == SPEC.steps - (stop - 1), "steps that were done are not done again"
    for expected, found in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(expected, found)


class PassingTask(LineTask):
    """Held-out data follow a flatter line than the training data: training goes through it and on."""

    @torch.no_grad()
    def validate(self) -> float:
        x = torch.linspace(0, 1, 11)[:, None]
        return float((self.module(x) - x).pow(2).mean())


@pytest.mark.parametrize("stop", [None, 30])
def test_the_weights_of_the_lowest_held_out_loss_are_kept(tmp_path: Path, stop: int | None) -> None:
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            _train(PassingTask(interrupt_at=stop), tmp_path)
    task = PassingTask()
    figures = _train(task, tmp_path)
    held_out = dict(figures["validation"])
    assert held_out[SPEC.steps] > min(held_out.values()), "the case is not one of training for too long"
    assert figures["kept"] < SPEC.steps
    assert task.validate() == held_out[figures["kept"]] == min(held_out.values())


def test_a_task_may_keep_its_last_weights_instead(tmp_path: Path) -> None:
    task = PassingTask()
    task.spec = replace(SPEC, keep="last")
    figures = _train(task, tmp_path)
    assert figures["kept"] == SPEC.steps
    assert task.validate() == dict(figures["validation"])[SPEC.steps] > min(dict(figures["validation"]).values())
