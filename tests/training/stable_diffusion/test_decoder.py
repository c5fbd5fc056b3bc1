"""What turns Stable Diffusion's latents into pixels: a decoder trained for them, its own, or a TAESD."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from busigen.data.prepared import Prepared
from busigen.errors import InputError, IntegrityError, UsageError
from busigen.export.trace import Tracer
from busigen.export.weights import whole
from busigen.registry import BUCKETS, OPSETS, PRESETS
from busigen.training.checkpoint import BASE, load_component, save_component
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.painter import BASES, OWN, chosen_decoder, with_base, with_decoder
from busigen.training.tasks import TaskContext
from busigen.training.tasks.decoder import SpeckleTask
from busigen.training.trainer import Trainer
from tests.harness import stable_diffusion as tiny

TINY = PRESETS["tiny"]
SPEC = TaskSpec("decoder", "speckle", "decoder", steps=24, batch=4, lr=1e-2, warmup=2, ema=0.5, keep="last")
SHOWN_AT = 256


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """Tiny's networks and the windows of a Stable Diffusion with random weights."""
    base = BaseModel.open(tiny.write_folder(tmp_path_factory.mktemp("base") / "folder"))
    torch.manual_seed(0)
    channels = TINY.latent_channels
    own = Networks(
        TINY,
        build("autoencoder", TINY).eval(),
        torch.zeros(channels),
        torch.ones(channels),
        build("context", TINY).eval(),
    )
    return with_base(own, base, SHOWN_AT)


@pytest.fixture(scope="module")
def setting(synthetic_prepared: Prepared, networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> TaskContext:
    return TaskContext(
        prepared=synthetic_prepared,
        networks=networks,
        device=torch.device("cpu"),
        seed=0,
        report=lambda what: lambda done, total: None,
        cache=tmp_path_factory.mktemp("cache"),
        max_images=24,
    )


def task_of(setting: TaskContext, kind: type[SpeckleTask] = SpeckleTask, steps: int = SPEC.steps) -> SpeckleTask:
    torch.manual_seed(1)
    return kind(replace(SPEC, steps=steps), setting, build("decoder", TINY))


def train(task: SpeckleTask, folder: Path) -> None:
    console = Console(file=io.StringIO())
    Trainer(task, seed=0, folder=folder, device=torch.device("cpu"), console=console).run()


def test_it_learns_what_windows_look_like_and_the_encoder_stays(
    setting: TaskContext, networks: Networks, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in networks.autoencoder.state_dict().items()}
    task = task_of(setting)
    assert set(task.train) == set(BUCKETS), "the case has windows of one size alone"
    untrained = task.validate()
    train(task, tmp_path)
    assert task.validate() < 0.8 * untrained
    assert all(torch.equal(value, before[name]) for name, value in networks.autoencoder.state_dict().items())
    assert (tmp_path / "samples" / "decoder" / f"{SPEC.steps:06d}.png").is_file()


def test_it_begins_with_what_the_decoder_of_other_latents_knows(setting: TaskContext, networks: Networks) -> None:
    assert networks.prior_decoder is not None
    known = networks.prior_decoder.network.state_dict()
    found = task_of(setting).decoder.network.state_dict()
    assert {name for name in known if torch.equal(known[name], found[name])} >= {
        name for name in known if not name.startswith("conv_in.")
    }
    assert not torch.equal(known["conv_in.weight"], found["conv_in.weight"])


class Stopped(SpeckleTask):
    """Is interrupted at its third step."""

    calls = 0

    def loss(self, generator: Generator) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().loss(generator)


def test_an_interrupted_run_ends_with_the_very_weights_of_an_undisturbed_one(
    setting: TaskContext, tmp_path: Path
) -> None:
    undisturbed, resumed = task_of(setting, steps=4), task_of(setting, steps=4)
    train(undisturbed, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(task_of(setting, Stopped, steps=4), tmp_path / "cut")
    train(resumed, tmp_path / "cut")
    expected = undisturbed.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.module.state_dict().items())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint with a decoder of its own, which reads masks."""
    torch.manual_seed(2)
    model = build("decoder", TINY)
    for weight in model.outlines.parameters():
        torch.nn.init.normal_(weight)
    save_component(model, tmp_path / "checkpoint" / BASE / "decoder")
    return tmp_path / "checkpoint"


@pytest.fixture
def taesd(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    model.save_pretrained(str(tmp_path / "taesd"))
    return tmp_path / "taesd"


def graph(networks: Networks, side: int, latents: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    model = whole(Tracer(OPSETS[0]).decoder(networks.decoder, side))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {"latents": latents, "noise": noise, "mask": mask}
    named = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    return torch.from_numpy(session.run(None, named)[0])


@pytest.mark.parametrize("side", BUCKETS)
def test_the_graph_of_the_checkpoints_decoder_draws_windows_from_noise_and_mask(
    networks: Networks, own: Path, side: int
) -> None:
    found = with_decoder(networks, None, own)
    generator = Generator().manual_seed(0)
    latents = torch.randn(2, 4, SHOWN_AT // 8, SHOWN_AT // 8, generator=generator)
    noise = torch.randn(2, 1, side, side, generator=generator)
    mask = (torch.rand(2, 1, side, side, generator=generator) > 0.5).float()
    with torch.no_grad():
        pixels = found.decoder(latents, noise, mask)
        assert pixels.shape == (2, 1, side, side)
        for other in (found.decoder(latents, -noise, mask), found.decoder(latents, noise, 1.0 - mask)):
            assert (other - pixels).abs().mean() > 0.01
    # fp32; sums are taken in another order.
    torch.testing.assert_close(graph(found, side, latents, noise, mask), pixels, rtol=0, atol=1e-4)


def test_the_graph_of_a_taesd_draws_what_diffusers_decodes(networks: Networks, own: Path, taesd: Path) -> None:
    found = with_decoder(networks, str(taesd), own)
    latents = torch.randn(2, 4, SHOWN_AT // 8, SHOWN_AT // 8, generator=Generator().manual_seed(0))
    zeros = torch.zeros(2, 1, SHOWN_AT, SHOWN_AT)
    with torch.no_grad():
        decoded = AutoencoderTiny.from_pretrained(str(taesd)).decode(latents).sample
    wanted = decoded.mean(dim=1, keepdim=True).clamp(-1.0, 1.0)
    assert wanted.std() > 0.01
    torch.testing.assert_close(graph(found, SHOWN_AT, latents, zeros, zeros), wanted, rtol=0, atol=1e-4)


def test_the_checkpoints_decoder_is_the_default_where_there_is_one(own: Path, tmp_path: Path) -> None:
    assert chosen_decoder(None, own) == OWN
    assert chosen_decoder(BASES, own) == BASES
    assert chosen_decoder(None, tmp_path) == BASES
    with pytest.raises(UsageError, match="no decoder of its own"):
        chosen_decoder(OWN, tmp_path)


def test_a_decoder_of_other_sizes_is_refused(own: Path) -> None:
    path = own / BASE / "decoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"channels": [1 << 14] * 4}))
    with pytest.raises(IntegrityError, match="has no valid 'channels'"):
        load_component("decoder", own / BASE / "decoder", TINY)


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _more_channels(folder: Path) -> None:
    AutoencoderTiny(latent_channels=16).save_pretrained(str(folder))


def _another_factor(folder: Path) -> None:
    sizes = {f"{half}_block_out_channels": (8,) * 3 for half in ("encoder", "decoder")}
    counts = {f"num_{half}_blocks": (1,) * 3 for half in ("encoder", "decoder")}
    AutoencoderTiny(**sizes, **counts).save_pretrained(str(folder))


def _cut_short(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def _another_network(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4}))


def _stable_diffusions_own(folder: Path) -> None:
    tiny.networks()[1].save_pretrained(str(folder))


def _other_shapes(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value[:1].contiguous() for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "spoil",
    [
        *(_no_config, _more_channels, _another_factor, _cut_short, _pickle, _another_network),
        *(_stable_diffusions_own, _other_shapes),
    ],
)
def test_a_folder_that_holds_no_taesd_is_refused(
    spoil: Callable[[Path], None], networks: Networks, taesd: Path, tmp_path: Path
) -> None:
    spoil(taesd)
    with pytest.raises(InputError, match="--decoder") as caught:
        with_decoder(networks, str(taesd), tmp_path)
    assert "taesd" in str(caught.value) and caught.value.fix
    assert "\n" not in str(caught.value)
