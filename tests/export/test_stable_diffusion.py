"""A Stable Diffusion with LoRAs, from its files to a verified dataset: exported, proved, drawn from, explained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from busigen.errors import UsageError
from busigen.export.request import Options, opened, solver_counts
from busigen.registry import LESION_CLASSES
from busigen.runtime.backends.bundle import Bundle
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.painter import PaintingOptions, parse_loras
from tests.harness import painting
from tests.harness import stable_diffusion as tiny
from tests.harness.command import error_line, run

pytestmark = pytest.mark.slow
EXPORT = ("--draws", 2, "--steps", "lesion=1", "--steps", "blend=2", "--guidance", 2, "--fresh-noise", 0.5)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def checkpoint(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return painting.untrained(tmp_path_factory.mktemp("checkpoint") / "run", base_model)


@pytest.fixture(scope="module")
def exported(base_model: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that can be asked of an export at once; treat it as read-only."""
    folder = tmp_path_factory.mktemp("bundle")
    lora = painting.kohya_lora(folder / "style.safetensors")
    done = run(
        *("export", checkpoint, "--out", folder / "bundle", "--base-model", base_model, *EXPORT),
        *("--lora", f"{lora}:0.5", "--lora", f"blend-benign={lora}"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


def test_the_bundle_says_what_it_is_and_what_it_was_made_of(exported: Path, base_model: Path) -> None:
    bundle = Bundle.open(exported)
    assert bundle.windows == {128: 256, 256: 256}
    assert bundle.latent_shape(128) == bundle.latent_shape(256) == (4, 32, 32)
    assert bundle.background_shape == (8, 32, 32) and bundle.background_decoder == "background-decoder"
    painted = bundle.info["painting"]
    assert (painted["guidance"], painted["fresh_noise"]) == (2.0, 0.5)
    assert [(lora["for"], lora["weight"]) for lora in painted["loras"]] == [("", 0.5), ("blend-benign", 1.0)]
    assert set(painted["prompts"]) == set(LESION_CLASSES)
    assert str(base_model) not in (exported / "bundle.json").read_text()


def test_one_network_serves_both_stages_all_classes_and_windows(exported: Path) -> None:
    bundle = Bundle.open(exported)
    painted = [name for name in bundle.graph_names if name.partition("-")[0] in ("lesion", "blend")]
    assert len(painted) == 8 and len({bundle.file(name) for name in painted}) == 1
    assert len({tuple(bundle.constants(name)["adapter"].ravel()) for name in painted}) == 4
    graph = onnx.load(str(bundle.graph(painted[0])), load_external_data=False)
    assert [node.op_type for node in graph.graph.node].count("Loop") == 1


def test_masks_and_images_are_pytorchs_over_the_whole_trajectory(exported: Path) -> None:
    parity = Bundle.open(exported).info["parity"]["targets"]["cpu"]
    for label in LESION_CLASSES:
        assert parity[label]["dice"] > 0.99 and parity[label]["images_compared"] == 2
        # fp32 beside fp32, with weights rounded to fp16.
        assert parity[label]["psnr"] > 40


def test_what_is_drawn_verifies_replays_and_leaves_the_healthy_image_alone(exported: Path, tmp_path: Path) -> None:
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        rows = np.linspace(170, 60, 256)[:, None] + rng.normal(0, 14, (256, 256))
        Image.fromarray(np.clip(rows, 1, 255).astype(np.uint8)).save(healthy / f"{number}.png")
    out = tmp_path / "out"
    options = ("--bundle", exported, "--healthy", healthy, "--batch-size", 2)
    done = run("generate", "--count", 2, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert run("verify", out).returncode == 0
    explained = run("explain", out, "0", *options[:4])
    assert explained.returncode == 0, explained.stdout + explained.stderr
    # Whether samples depend on the batch that they were drawn in.
    assert run("generate", "--count", 2, "--out", tmp_path / "again", *options[:4], "--batch-size", 3).returncode == 0
    first, second = (
        json.loads((folder / "dataset.json").read_text())["shards"] for folder in (out, tmp_path / "again")
    )
    assert first == second


def test_a_checkpoint_of_stable_diffusion_is_not_exported_without_it(checkpoint: Path, tmp_path: Path) -> None:
    assert "needs --base-model" in error_line(run("export", checkpoint, "--out", tmp_path / "bundle"), 2)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (lambda: PaintingOptions(guidance=99.0), "--guidance is 99"),
        (lambda: PaintingOptions(fresh_noise=2.0), "--fresh-noise is 2"),
        (lambda: PaintingOptions(alpha=0.0), "--lora-alpha is 0"),
        (lambda: PaintingOptions(alpha=float("nan")), "--lora-alpha is nan"),
        (lambda: solver_counts(["lesion=0"]), "--steps 'lesion=0'"),
        (lambda: solver_counts(["lesion"]), "--steps 'lesion'"),
        (lambda: solver_counts(["paint=3"]), "--steps 'paint=3'"),
        (lambda: parse_loras(["lesion-benign=x.safetensors:1000"]), "weight 1000"),
    ],
)
def test_what_cannot_be_is_refused(asked: Callable[[], object], problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        asked()


def test_written_out_steps_are_as_many_for_both_stages(checkpoint: Path, base_model: Path) -> None:
    options = Options(loop="unrolled", steps={"lesion": 2}, base_model=BaseModel.open(base_model))
    with pytest.raises(UsageError, match="--loop unrolled"):
        opened(checkpoint, options)


def test_another_base_is_refused_with_both_hashes(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny.write_folder(tmp_path / "other", seed=1)
    done = run("export", checkpoint, "--out", tmp_path / "bundle", "--base-model", other)
    recorded = json.loads((checkpoint / "busigen.json").read_text())["painting"]["sha256"]
    line = error_line(done, 5)
    assert all(digest in line for digest in recorded.values()) and str(other) in line
    assert not (tmp_path / "bundle").exists()
