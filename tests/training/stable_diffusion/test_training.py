"""LoRAs of a Stable Diffusion, trained on a few drawn images: what is kept, what is learnt, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from busigen.data.prepare import prepare
from busigen.errors import InputError, IntegrityError, OutputError, UsageError
from busigen.export.import_bundle import opened_base
from busigen.training.checkpoint import Base, Painting, load_networks
from busigen.training.networks.inference import ADAPTERS
from busigen.training.pipeline import train
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.painter import PaintingOptions, asked_of, with_painter
from tests.harness import painting
from tests.harness import stable_diffusion as tiny
from tests.harness.synthetic_datasets import draw_pairs

TASK = "lesion-benign"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "sd", variant="fp16")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare([draw_pairs(folder / "clinic", seed=5, count=12)], folder / "prepared")
    return folder / "prepared"


@pytest.fixture(scope="module")
def compact() -> Iterator[Base]:
    with opened_base(Path("default")) as base:
        assert base is not None
        yield base


def trained(prepared: Path, out: Path, compact: Base, sd: Path, prompts: tuple[str, ...] = ()) -> dict[str, object]:
    asked = asked_of(str(sd), None, prompts=prompts, context=True, shown_at=256)
    recipe = compact.recipe("sd15")
    short = {"steps": 2, "batch": 2, "warmup": 1, "variants": 1, "lr": 0.01}
    tasks = tuple(replace(task, **short) for task in recipe.tasks if task.name in (TASK, "decoder"))
    quiet = Console(file=io.StringIO())
    return train(prepared, out, replace(recipe, tasks=tasks), base=compact, device="cpu", console=quiet, **asked)


@pytest.fixture(scope="module")
def run(prepared: Path, compact: Base, sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one adapter and the decoder; treat it as read-only."""
    out = tmp_path_factory.mktemp("run") / "run"
    trained(prepared, out, compact, sd, ("benign=a harmless cyst",))
    return out


def test_the_checkpoint_holds_lora_and_conditions_and_names_the_base_by_its_hashes(run: Path, sd: Path) -> None:
    record = json.loads((run / "busigen.json").read_text())
    assert record["preset"] == "sd15"
    assert record["painting"]["sha256"] == dict(BaseModel.open(sd).sha256)
    assert record["painting"]["prompts"]["benign"] == "a harmless cyst"
    assert {path.name for path in (run / "merged").iterdir()} == {"mask-benign", "mask-malignant"}
    assert {path.name for path in (run / "base").iterdir()} == {"autoencoder", "context", "decoder", "mask", "prior"}
    held = sum(path.stat().st_size for path in (run / "adapters").rglob("*"))
    assert held < 0.2 * sum(path.stat().st_size for path in sd.rglob("*"))


def test_peft_reads_the_adapter_and_it_changes_what_the_network_says(run: Path, sd: Path) -> None:
    base = BaseModel.open(sd)
    adapted = PeftModel.from_pretrained(base.unet(), str(run / "adapters" / TASK)).eval()
    x, t, tokens = torch.randn(1, 9, 16, 16), torch.tensor([500]), base.prompt("a harmless cyst")
    with torch.no_grad():
        assert not torch.allclose(adapted(x, t, tokens).sample, base.unet()(x, t, tokens).sample, rtol=1e-3)
    conditions = load_file(run / "adapters" / TASK / "conditions.safetensors")
    assert set(conditions) == {"outline.weight", "context.weight"}
    assert conditions["outline.weight"].abs().max() > 0


def test_a_finished_run_is_not_trained_again_and_another_base_or_prompt_is_another_run(
    run: Path, prepared: Path, compact: Base, sd: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    trained(prepared, run, compact, sd, ("benign=a harmless cyst",))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="--prompt: 'a harmless cyst' there"):
        trained(prepared, run, compact, sd)
    with pytest.raises(OutputError, match="--base-model"):
        trained(prepared, run, compact, tiny.write_folder(tmp_path / "other", seed=9), ("benign=a harmless cyst",))


def test_without_context_the_network_has_no_projection(sd: Path, tmp_path: Path) -> None:
    folder = painting.untrained(tmp_path / "run", sd, context=False)
    networks, record = load_networks(folder)
    asked = Painting.model_validate(record["painting"])
    base = BaseModel.open(sd)
    full = with_painter(networks, base, asked, folder / "adapters", PaintingOptions())
    assert full.denoisers[ADAPTERS[0]].context is None
    shutil.rmtree(folder / "adapters" / ADAPTERS[1])
    with pytest.raises(InputError, match=ADAPTERS[1]):
        with_painter(networks, base, asked, folder / "adapters", PaintingOptions())
    with pytest.raises(IntegrityError, match="was made with"):
        other = BaseModel.open(tiny.write_folder(tmp_path / "other", seed=9))
        with_painter(networks, other, asked, folder / "adapters", PaintingOptions())


def test_a_checkpoint_of_stable_diffusion_is_no_base(run: Path) -> None:
    with pytest.raises(UsageError, match="has preset sd15"):
        Base.open(run).recipe("sd15")


@pytest.mark.parametrize("prompt", ["benign", "cyst=dark", "malignant= "])
def test_a_prompt_for_no_class_is_refused(sd: Path, prompt: str) -> None:
    with pytest.raises(UsageError, match="--prompt"):
        asked_of(str(sd), None, prompts=[prompt], context=True, shown_at=256)
