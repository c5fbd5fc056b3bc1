"""A folder may be called anything: what lies in it is made, read and judged as in any other."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import read_recorded
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from tests.harness.command import run
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs
from tests.harness.synthetic_datasets import draw_frame

ODD = ("study [2024]", "a*b", "a?b", "**", "{a,b}", "[/x]", "two  spaces ", "new\nline", "q'u\"o`t$e", "-dash", "~")
ODD += ("ünï-文字", "%20", "a=b", "s3:", "tab\tand\x1b[31m", "x" * 200)
BYTES = os.fsdecode(b"caf\xe9-\xff") if sys.platform == "linux" else "café"
"""No UTF-8, which only Linux lets a file be called."""

names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)


def made(folder: Path, seed: int) -> Path:
    generate(NoiseSource(), folder, count=4, seed=seed, shard_size=2)
    return folder


@settings(max_examples=15, deadline=None)
@given(name=names)
@example(name=BYTES)
@example(name="study [2024]")
@example(name="a*b")
@example(name="-?-")
def test_datasets_in_a_folder_of_any_name(name: str) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place) / name
        # What a pattern would match as well, so that its tables would be read in place of the folder's own.
        twin = Path(place) / re.sub(r"[*?]", "x", name)
        beside = [made(twin / "one", seed=9)] if twin != folder else []
        one, two = made(folder / "one", seed=1), made(folder / "two", seed=2)
        report = verify(one)
        assert report.ok and verify(two).ok, report.problems
        assert Dataset.open(one).manifest()["key"].to_list() == [f"{n:09d}" for n in range(4)]
        assert read_recorded(one, "3").problems == []
        (one / "shards" / "000001.parquet").unlink()
        (one / "manifest.parquet").unlink()
        assert repair(one, inputs=NoiseInputs()).after.ok
        merge(folder / "merged", [one, two])
        assert verify(folder / "merged").ok
        assert generate(NoiseSource(), one, count=4, seed=1, shard_size=2).already_complete
        assert all(verify(other).ok for other in beside)


def source(folder: Path) -> Path:
    """Four images and their masks, two of each class, with a table of classes."""
    rng = np.random.default_rng(1)
    rows = ["file,class"]
    for number, label in enumerate(("benign", "malignant") * 2):
        frame = draw_frame(rng, (190, 180), label)
        for kind, pixels in (("images", frame.pixels), ("masks", frame.lesions[0])):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
        rows.append(f"{number}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("name", [*ODD, BYTES])
def test_sets_are_prepared_from_and_into_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    given, out = source(tmp_path / name / "set"), tmp_path / name / "prepared"
    assert prepare([given], out).by_class == {"benign": 2, "malignant": 2}
    assert Prepared.open(out, check=True).table.height == 4
    assert prepare([given], out).kept_splits == 4


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "p[/x]"
    done = run("prepare", source(tmp_path / "[red]set"), "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"4 images prepared in {out} (")
    assert "sources: [red]set 4" in done.stdout


def test_a_command_ends_well_and_names_its_successor_as_a_shell_takes_it(tmp_path: Path) -> None:
    out = tmp_path / "study [2024]" / "it's"
    done = run("generate", "--count", 1, "--batch-size", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.split("check with: ")[1])
    assert command == ["busigen", "verify", str(out)]
    assert run(*command[1:]).stdout.startswith(f"{out} is sound: 1 sample")
