"""Bases as users have them: which are read, to what, and what is said of those that are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file, save_file

from busigen.errors import InputError, IntegrityError, UsageError
from busigen.training.stable_diffusion.base_model import LICENCE, BaseModel
from tests.harness import stable_diffusion as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "folder")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder_and_a_single_file_hold_the_same_networks(folder: Path, tmp_path: Path) -> None:
    file = tiny.write_single_file(tmp_path / "model.safetensors")
    made = tiny.networks()
    for base in (BaseModel.open(folder), BaseModel.open(file, config=folder)):
        for network, wanted in zip((base.unet(), base.autoencoder(), base.text_encoder()), made, strict=True):
            found = network.state_dict()
            assert found.keys() == wanted.state_dict().keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
            assert not network.training


def test_an_fp16_variant_is_found_and_computed_in_fp32(folder: Path, tmp_path: Path) -> None:
    half = BaseModel.open(tiny.write_folder(tmp_path / "half", variant="fp16"))
    assert set(half.sha256) == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    found, whole = half.unet().state_dict(), BaseModel.open(folder).unet().state_dict()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, whole[name].half().float()) for name, value in found.items()
    )


def test_a_prompt_is_what_diffusers_makes_of_it(folder: Path) -> None:
    base = BaseModel.open(folder)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        str(folder), local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    for text in ("", "Breast ultrasound, malignant lesion"):
        wanted, _ = pipeline.encode_prompt(text, "cpu", 1, False)
        # The same network on the same numbers; another order of sums may differ in the last bit.
        torch.testing.assert_close(base.prompt(text), wanted, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="tokens; at most 77 are read"):
        base.prompt("lesion " * 30)


def test_the_licence_is_the_cards_where_there_is_one(copy: Path) -> None:
    assert BaseModel.open(copy).licence == LICENCE
    (copy / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# A model\n")
    assert BaseModel.open(copy).licence == "creativeml-openrail-m"


def test_another_base_is_refused_with_both_hashes(folder: Path, copy: Path) -> None:
    base = BaseModel.open(folder)
    BaseModel.open(copy).refuse_other(base.sha256, "the checkpoint")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    changed = load_file(weights)
    changed["conv_out.bias"] += 1
    save_file(changed, weights)
    other = BaseModel.open(copy)
    with pytest.raises(IntegrityError, match="was made with") as caught:
        other.refuse_other(base.sha256, "the checkpoint")
    for found in (base, other):
        assert found.sha256["unet/diffusion_pytorch_model.safetensors"] in str(caught.value)


def _edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _sdxl(folder: Path) -> None:
    (folder / "text_encoder_2").mkdir()


def _four_channels(folder: Path) -> None:
    _edit(folder, "unet/config.json", in_channels=4)


def _velocity(folder: Path) -> None:
    _edit(folder, "scheduler/scheduler_config.json", prediction_type="v_prediction")


def _other_factor(folder: Path) -> None:
    _edit(folder, "vae/config.json", block_out_channels=[16, 32, 32])


def _other_text(folder: Path) -> None:
    _edit(folder, "text_encoder/config.json", hidden_size=64)


def _second(folder: Path) -> None:
    _edit(folder, "unet/config.json", cross_attention_dim=1024)
    _edit(folder, "text_encoder/config.json", hidden_size=1024)


def _no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _cut_short(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _lying_header(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def _pickle(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def _wider_than_its_weights(folder: Path) -> None:
    _edit(folder, "unet/config.json", block_out_channels=[320, 640, 1280, 1280])


def _more_layers(folder: Path) -> None:
    _edit(folder, "unet/config.json", layers_per_block=3)


def _fewer_layers(folder: Path) -> None:
    _edit(folder, "unet/config.json", layers_per_block=1)


def _smaller_autoencoder(folder: Path) -> None:
    _edit(folder, "vae/config.json", layers_per_block=1)


def _deeper_text(folder: Path) -> None:
    _edit(folder, "text_encoder/config.json", num_hidden_layers=3)


def _no_activation(folder: Path) -> None:
    _edit(folder, "unet/config.json", act_fn="none such")


def _no_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("[")


def _text_for_a_number(folder: Path) -> None:
    _edit(folder, "unet/config.json", in_channels="nine")


def _pipe(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").unlink()
    os.mkfifo(folder / "tokenizer" / "vocab.json")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_sdxl, "Stable Diffusion XL"),
        (_four_channels, "its UNet reads 4 channels"),
        (_velocity, "predicts 'v_prediction'"),
        (_other_factor, "a factor of 4"),
        (_other_text, "its text gives 64"),
        (_second, "Stable Diffusion 2, with 1024 numbers a token"),
        (_no_vae, "vae/config.json"),
        (_cut_short, "cannot be read"),
        (_lying_header, "cannot be read"),
        (_pickle, "is a pickle"),
        (_wider_than_its_weights, "is another model"),
        (_more_layers, "its unet has"),
        (_fewer_layers, "its unet has"),
        (_smaller_autoencoder, "its vae has"),
        (_deeper_text, "its text_encoder has"),
        (_no_activation, "unet/config.json cannot be loaded"),
        (_no_json, "unet/config.json"),
        (_text_for_a_number, "in_channels"),
        pytest.param(_pipe, "is a pipe", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")),
    ],
)
def test_what_cannot_be_a_base_is_refused_before_it_is_loaded(
    copy: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(copy)
    with pytest.raises(InputError, match=said) as caught:
        BaseModel.open(copy)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_single_file_needs_a_configuration_and_no_pickle(folder: Path, tmp_path: Path) -> None:
    file = tiny.write_single_file(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="neither configuration nor tokenizer"):
        BaseModel.open(file)
    pickle = file.rename(tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="pickle"):
        BaseModel.open(pickle, config=folder)
    with pytest.raises(InputError, match="there is no base model at"):
        BaseModel.open(tmp_path / "none")
