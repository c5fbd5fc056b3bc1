"""The last task: the decoder learns on what the stages draw, and nothing else changes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from busigen.data.geometry import edit_region, feather, paste, window_for
from busigen.data.prepared import Prepared
from busigen.registry import GRAIN_FADE, LESION_CLASSES, PRESETS, STAGES
from busigen.training.checkpoint import load_component
from busigen.training.examples import Frames, select
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import SIDE, ZONES, Drawer, background_images, rollout_windows
from busigen.training.tasks import TaskContext
from busigen.training.tasks.autoencoder import FinishTask, pasted_into
from busigen.training.trainer import Trainer

TINY = PRESETS["tiny"]
SPEC = TaskSpec("finish", "finish", "autoencoder", steps=4, batch=2, lr=2e-3, warmup=1, ema=0.5, keep="last")


@pytest.fixture(scope="module")
def drawer() -> Drawer:
    torch.manual_seed(0)
    channels = TINY.latent_channels
    names = ("prior", *(f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES))
    networks = Networks(
        TINY,
        build("autoencoder", TINY).eval(),
        torch.zeros(channels),
        torch.ones(channels),
        build("context", TINY).eval(),
        {name: build(name.partition("-")[0], TINY).eval() for name in names},
    )
    return Drawer(networks, [[200, 256], [256, 180]], [])


@pytest.fixture
def setting(synthetic_prepared: Prepared, drawer: Drawer, tmp_path: Path) -> TaskContext:
    return TaskContext(
        prepared=synthetic_prepared,
        networks=drawer.networks,
        device=torch.device("cpu"),
        seed=0,
        report=lambda what: lambda done, total: None,
        cache=tmp_path / "cache",
        drawer=drawer,
    )


def test_the_decoder_learns_and_the_encoder_stays(setting: TaskContext, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = build("autoencoder", TINY)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    task = FinishTask(SPEC, setting, module)
    Trainer(
        task, seed=0, folder=tmp_path / "run", device=torch.device("cpu"), console=Console(file=io.StringIO())
    ).run()
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    # The outline is told for the first time here: it starts at nothing, and is learnt.
    described = {name for name in before if name.startswith("decoder.outlines.")}
    assert described and not any(before[name].any() for name in described)
    assert described <= changed
    assert set(task.findings()["texture"]) == {"image", "background", "profile", *ZONES}
    assert (tmp_path / "run" / "samples" / "finish" / "000004.png").is_file()


def test_what_was_drawn_is_kept_and_not_drawn_again(setting: TaskContext) -> None:
    first = FinishTask(SPEC, setting, build("autoencoder", TINY))
    setting.drawer = None
    again = FinishTask(SPEC, setting, build("autoencoder", TINY))
    assert torch.equal(first.windows["latents"], again.windows["latents"])
    assert torch.equal(first.backgrounds["latents"], again.backgrounds["latents"])


def test_a_window_knows_what_the_image_shows_and_what_may_change(setting: TaskContext, drawer: Drawer) -> None:
    frames = Frames(setting.prepared, select(setting.prepared, "train"))
    found = rollout_windows(frames, drawer, variants=1, seed=0, progress=lambda done, total: None)
    count = len(found["latents"])
    assert count == sum(frames.table["class"] != "normal")
    assert found["pixels"].shape == (count, 1, SIDE, SIDE) and found["zones"].shape == (count, len(ZONES), SIDE, SIDE)
    zones, edit = found["zones"], found["edit"][:, 0]
    # Every pixel of the edit region is in one zone, and none beside it is; but for lesions that touch its rim.
    assert torch.equal(zones.sum(dim=1) > 0, edit | (zones[:, 0] & ~edit))
    assert int(zones.sum(dim=1).max()) == 1
    assert not found["brightness"][:, 0][~edit].any()


def test_pasting_with_a_gradient_is_the_runtimes_paste() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(40, 200, (256, 256)).astype(np.uint8)
    mask = np.zeros((256, 256), dtype=bool)
    mask[90:130, 100:150] = True
    edit = edit_region(mask, np.ones_like(mask))
    window = window_for(edit)
    painted = rng.uniform(-0.9, 0.9, (window.side, window.side)).astype(np.float32)
    wanted = paste(image, painted, edit, window, GRAIN_FADE)[window.slices]

    def batch(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]

    opacities = (batch(part[window.slices]) for part in feather(edit, grain_fade=GRAIN_FADE))
    found = pasted_into(batch(image[window.slices] / 127.5 - 1.0), batch(painted), *opacities)
    grey = ((found[0, 0] + 1.0) * 127.5).clamp(0.0, 255.0).round().numpy()
    # Sums in another order may round the other way.
    assert np.abs(grey - wanted).max() <= 1


def test_backgrounds_come_letterboxed_as_lesions_are_painted_into_them(drawer: Drawer) -> None:
    images = background_images(drawer, 6, seed=0, progress=lambda done, total: None)
    assert len(images) == 6
    for image, valid in images:
        assert image.shape == (256, 256) and image.dtype == np.uint8 and not image[~valid].any()
        rows, columns = (np.flatnonzero(image.any(axis=axis)) for axis in (1, 0))
        # One of the drawer's two frames, in the middle; what the networks paint is hardly ever black along a side.
        assert (rows[0], rows[-1], columns[0], columns[-1]) in [(28, 227, 0, 255), (0, 255, 38, 217)]


def test_a_decoder_from_before_it_was_told_masks_still_loads(tmp_path: Path) -> None:
    saved = build("autoencoder", TINY)
    weights = {name: value for name, value in saved.state_dict().items() if not name.startswith("decoder.outlines.")}
    saved.save_pretrained(str(tmp_path))
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_component("autoencoder", tmp_path)
    latents, noise = torch.randn(1, TINY.latent_channels, 4, 4), torch.randn(1, 1, 32, 32)
    mask = torch.ones(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.decoder(latents, noise, mask), loaded.decoder(latents, noise))
        torch.nn.init.normal_(loaded.decoder.outlines[-1].weight)
        assert not torch.equal(loaded.decoder(latents, noise, mask), loaded.decoder(latents, noise))
