"""What a Stable Diffusion is refused for before minutes pass (kind, memory, disk), and what its bundle says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from busigen.data.prepared import Prepared
from busigen.errors import CapacityError, InputError, OutputError, UsageError
from busigen.export.import_bundle import restore
from busigen.export.report import model_card
from busigen.runtime.backends import memory
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.training.pipeline import train
from busigen.training.recipe import recipe_for
from busigen.training.stable_diffusion import room
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.painter import asked_of
from tests.harness import stable_diffusion as tiny
from tests.harness.command import error_line, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "folder")


def test_a_base_is_as_large_as_its_networks_in_every_layout(folder: Path, tmp_path: Path) -> None:
    wanted = {
        part: sum(value.numel() for value in network.parameters())
        for part, network in zip(("unet", "vae", "text_encoder"), tiny.networks(), strict=True)
    }
    wanted["text_encoder"] += tiny.TOKENS  # The numbers of positions, which older files hold.
    file = tiny.write_single_file(tmp_path / "model.safetensors")
    half = tiny.write_folder(tmp_path / "half", variant="fp16")
    for base in (BaseModel.open(folder), BaseModel.open(file, folder), BaseModel.open(half)):
        assert base.sizes == wanted


def test_too_little_memory_is_seen_before_anything_is_loaded(
    folder: Path, tmp_path: Path, synthetic_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 200000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    asked = asked_of(str(folder), None, prompts=(), context=True, shown_at=512)
    with pytest.raises(CapacityError, match=r"needs at least 4\.31 GB of memory, and 205 MB are free") as caught:
        train(synthetic_prepared.folder, tmp_path / "out", recipe_for("sd15"), device="cpu", **asked)
    assert "--window 256" in caught.value.fix
    with pytest.raises(UsageError, match="at most 77 are read"):
        asked_of(str(folder), None, prompts=["malignant=" + 20 * "lesion "], context=True, shown_at=256)
    assert not (tmp_path / "out").exists()
    (tmp_path / "meminfo").write_text("MemAvailable: 2000000 kB\n")
    room.require_memory(asked["base_model"], 256, torch.device("cpu"))


def test_a_disk_without_room_for_an_export_is_named(folder: Path, tmp_path: Path) -> None:
    base = BaseModel.open(folder)
    room.require_disk(base, tmp_path / "new" / "bundle")
    huge = replace(base, sizes={**base.sizes, "unet": 1 << 50})
    with pytest.raises(OutputError, match=r"exporting writes some [\d,]+ TB to the disk of .*, which has .* free"):
        room.require_disk(huge, tmp_path / "new" / "bundle")
    assert not (tmp_path / "new").exists()


def test_train_refuses_a_base_that_is_not_for_inpainting(folder: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    config = plain / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 4}))
    out = tmp_path / "out"
    done = run("train", "--preset", "sd15", "--base-model", plain, "--data", tmp_path, "--out", out)
    line = error_line(done, 3)
    assert f"{plain} cannot be a base: its UNet reads 4 channels" in line and "inpainting variant" in line
    assert not out.exists()


def test_a_prompt_that_is_too_long_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    out, prompt = tmp_path / "out", "benign=" + 20 * "a cyst "
    asked = ("train", "--preset", "sd15", "--base-model", folder, "--data", tmp_path, "--out", out, "--prompt", prompt)
    assert "at most 77 are read" in error_line(run(*asked), 2)
    assert not out.exists()


def test_export_refuses_a_model_of_the_hub_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    out = tmp_path / "bundle"
    done = run("export", tmp_path, "--base-model", "some/model@v1", "--out", out)
    assert "the hub cannot be asked for it" in error_line(done, 3)
    assert not out.exists() and not (tmp_path / "home").exists()


PAINTING = {
    "sha256": {"unet/diffusion_pytorch_model.safetensors": "1" * 64},
    "licence": "creativeml-openrail-m",
    "source": "some/model@" + "2" * 40,
    "prompts": {"benign": "a benign lesion", "malignant": "a malignant lesion"},
    "context": True,
    "shown_at": 256,
    "guidance": 7.5,
    "fresh_noise": 0.25,
    "loras": [{"for": "lesion-benign", "sha256": "3" * 64, "weight": 0.8}],
    "decoder": "TAESD",
}


def test_the_card_says_which_terms_and_weights_come_with_a_stable_diffusion() -> None:
    info = Bundle.open(default_bundle()).info
    record = {"tasks": info["training"]["tasks"], "data": info["training"]["data"], "device": "cpu"}
    assert "Stable Diffusion" not in model_card(record, info)
    card = model_card(record, info | {"painting": PAINTING, "solver_steps": info["solver_steps"] | {"lesion": 30}})
    for said in ("1" * 64, "2" * 40, "3" * 64, "creativeml-openrail-m", "use restrictions", "a malignant lesion"):
        assert said in card
    for said in ("lesion 30", "guidance: 7.5", "fresh noise: 0.25", "decoder: TAESD", "0.8"):
        assert said in card


def test_a_bundle_with_a_stable_diffusion_is_not_restored(tmp_path: Path) -> None:
    bundle = Bundle.open(default_bundle())
    painted = replace(bundle, info=bundle.info | {"preset": "sd15"})
    with pytest.raises(InputError, match="draws with a Stable Diffusion") as caught:
        restore(painted, tmp_path / "out")
    assert "checkpoint that it was exported from" in caught.value.fix
    assert not (tmp_path / "out").exists()
