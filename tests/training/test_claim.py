"""A training run's folder: what another run is told apart by, and what a run says before it starts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.errors import OutputError
from busigen.training.claim import claim
from busigen.training.pipeline import train
from busigen.training.recipe import recipe_for
from busigen.training.trainer import write_json


@pytest.mark.parametrize(
    ("other", "described"),
    [
        ({"preset": "compact"}, "--preset: 'tiny' there, 'compact' now"),
        ({"preset": "tiny", "seed": 7}, "--seed: 0 there, 7 now"),
        ({"preset": "tiny", "scale": 0.5}, "--scale: tasks.autoencoder.steps 200 there, 100 now"),
        ({"preset": "compact", "seed": 7}, "--preset: 'tiny' there, 'compact' now; --seed: 0 there, 7 now"),
    ],
)
def test_another_run_is_told_apart_by_its_options(
    synthetic_prepared: Prepared, tmp_path: Path, other: dict[str, object], described: str
) -> None:
    claim(tmp_path, recipe_for("tiny"), synthetic_prepared)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(OutputError) as caught:
        train(synthetic_prepared.folder, tmp_path, recipe_for(**other), device="cpu")
    assert caught.value.problem == f"{tmp_path} belongs to another run ({described})."
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == before


def test_nothing_is_written_through_a_link(synthetic_prepared: Prepared, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    claim(run, recipe_for("tiny"), synthetic_prepared)
    mine.mkdir()
    (run / "base").symlink_to(mine)
    with pytest.raises(OutputError, match=r"run/base is a link"):
        train(synthetic_prepared.folder, run, recipe_for("tiny"), device="cpu")
    (mine / "notes").write_text("mine")
    (mine / "state.json.tmp").symlink_to(mine / "notes")
    write_json(mine / "state.json", {"step": 1})
    assert (mine / "notes").read_text() == "mine" and not (mine / "state.json").is_symlink()


def test_other_data_is_another_run(synthetic_prepared: Prepared, synthetic_busi: Path, tmp_path: Path) -> None:
    claim(tmp_path / "run", recipe_for("tiny"), synthetic_prepared)
    prepare([synthetic_busi], tmp_path / "other")
    with pytest.raises(OutputError, match=r"\(--data: other images or splits\)"):
        train(tmp_path / "other", tmp_path / "run", recipe_for("tiny"), device="cpu")


def test_a_run_says_what_it_will_do_before_it_starts(synthetic_prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "busigen.cli", "train", "--data", synthetic_prepared.folder, "--out", out]
    process = subprocess.Popen(
        [*map(str, command), "--preset", "tiny", "--device", "cpu"], stderr=subprocess.PIPE, text=True
    )
    try:
        first = process.stderr.readline()
    finally:
        process.kill()
        process.communicate()
    steps = sum(task.steps for task in recipe_for("tiny").tasks)
    splits = synthetic_prepared.info["splits"]
    said = re.fullmatch(
        r"\S+ training tiny on cpu: images train (\d+), val (\d+), test (\d+) \(at most 160 of a split are used\); "
        r"15 tasks, (\d+) steps; pictures in (\S+), curves in (\S+)\n",
        first,
    )
    assert said is not None, first
    assert [int(number) for number in said.groups()[:4]] == [*(splits[n] for n in ("train", "val", "test")), steps]
    assert said.groups()[4:] == (str(out / "samples"), str(out / "tensorboard"))
