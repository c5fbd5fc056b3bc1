"""Bases of the hub: what is downloaded for an id, what is taken from the cache, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from busigen.errors import InputError, OutputError
from busigen.training.stable_diffusion.hub import open_base
from tests.harness import stable_diffusion as tiny
from tests.harness.model_hub import COMMIT, serving

NAME = "some/stable-diffusion-inpainting"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub has it, with what nobody needs."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("hub") / "repository")
    tiny.write_folder(folder, variant="fp16")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    for name in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin", "model.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _point(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As the variable HF_ENDPOINT does, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def test_an_id_is_downloaded_once_as_far_as_it_is_needed(
    repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository, NAME, "v1") as (address, fetched):
        _point(monkeypatch, address)
        base = open_base(f"{NAME}@v1")
        parts = ("unet", "vae", "text_encoder")
        assert sorted(fetched) == sorted(
            [
                "README.md",
                "scheduler/scheduler_config.json",
                *(f"{part}/config.json" for part in parts),
                *(f"{part}/diffusion_pytorch_model.safetensors" for part in parts[:2]),
                "text_encoder/model.safetensors",
                *(f"tokenizer/{path.name}" for path in (repository / "tokenizer").iterdir()),
            ]
        )
        assert base.source == f"{NAME}@{COMMIT}"
        assert base.licence == "creativeml-openrail-m"
        here = open_base(str(repository))
        assert (base.sha256, here.source) == (here.sha256, None)
        assert base.prompt("a lesion").shape == (1, tiny.TOKENS, tiny.WIDTH)
        fetched.clear()
        open_base(f"{NAME}@v1")
        assert fetched == []
    # The server is gone: what was downloaded is enough, by tag and by commit, and nothing else is.
    for revision in ("v1", COMMIT):
        assert open_base(f"{NAME}@{revision}").sha256 == base.sha256
    with pytest.raises(InputError, match=r"@v2, and the hub cannot be asked for it: "):
        open_base(f"{NAME}@v2")


def test_a_path_that_exists_is_never_asked_for(
    repository: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository, NAME, "v1") as (address, fetched):
        _point(monkeypatch, address)
        monkeypatch.chdir(tmp_path)
        tiny.write_folder(tmp_path / f"{NAME}@v1")
        assert open_base(f"{NAME}@v1").source is None
        assert fetched == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NAME, f"for one of the hub the revision is missing. .*{NAME}@REVISION"),
        (f"{NAME}@v2", "the hub has no such revision"),
        ("some/other@v1", "the hub has no such model, or it is private"),
        ("some/../other@v1", "there is no base model at some/../other@v1"),
        ("some--other/model@v1", "the hub has no such model"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(
    repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    with serving(repository, NAME, "v1") as (address, fetched):
        _point(monkeypatch, address)
        with pytest.raises(InputError, match=said):
            open_base(text)
        assert fetched == []
        assert not cache.exists()


def test_a_model_of_another_kind_is_refused_before_its_weights_are_downloaded(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write_folder(tmp_path / "repository")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 4}))
    with serving(folder, NAME, "v1") as (address, fetched):
        _point(monkeypatch, address)
        with pytest.raises(InputError, match="its UNet reads 4 channels") as caught:
            open_base(f"{NAME}@v1")
        assert "inpainting variant" in caught.value.fix
        assert not [name for name in fetched if name.endswith(".safetensors")]
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(InputError, match=r"has no unet/.*, but a pickle") as caught:
            open_base(f"{NAME}@v1")
        assert "safe_serialization" in caught.value.fix


def test_a_model_that_is_not_for_everybody_says_how_to_get_access(
    repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository, NAME, "v1", gated=True) as (address, _):
        _point(monkeypatch, address)
        with pytest.raises(InputError, match="only to those who have access") as caught:
            open_base(f"{NAME}@v1")
        assert "hf auth login" in caught.value.fix


def test_a_full_disk_is_seen_before_the_download(
    repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(repository, NAME, "v1", claimed=1 << 60) as (address, fetched):
        _point(monkeypatch, address)
        with pytest.raises(OutputError, match=r"takes [\d.,]+ TB in .*cache, which has .* free") as caught:
            open_base(f"{NAME}@v1")
        assert "HF_HOME" in caught.value.fix
        assert fetched == []
