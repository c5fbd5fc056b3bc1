"""verify proves that a dataset's masks are the user's, and says which are not."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.errors import OutputError
from busigen.runtime.dataset.format import Plan
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.output.ownership import refuse_other_run
from busigen.runtime.sampling.inputs.given_masks import MaskFolder
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.replaying import reseal
from tests.runtime.sampling.inputs.test_given_masks import save
from tests.runtime.sampling.inputs.test_placement import blob


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    save(tmp_path / "masks/benign/a.png", blob((310, 190)))
    save(tmp_path / "masks/malignant/b.png", blob((300, 420), down=0.4))
    return tmp_path / "masks"


def written(masks: Path, out: Path, jitter: float = 0.0) -> Path:
    generate(quick_sampler(QuickEngine(), masks=MaskFolder(masks), jitter=jitter), out, count=4, seed=1, shard_size=4)
    return out


def change(out: Path, edit: Callable[[dict[str, Any], np.ndarray[Any, Any]], None]) -> None:
    """Edit the first sample's row and mask in tar and table, so that all hashes fit, as someone who tampers would."""
    tar_path, rows = out / "shards/000000.tar", []
    with tarfile.open(tar_path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
    (image, pixels), (name, png), (text, row) = members[:3]
    found, mask = json.loads(row), np.array(Image.open(io.BytesIO(png)))
    edit(found, mask)
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    found["mask_sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
    members[:3] = [(image, pixels), (name, content.getvalue()), (text, json.dumps(found).encode())]
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            rows += [json.loads(data)] if member.endswith(".json") else []
    table = out / "shards/000000.parquet"
    pl.DataFrame(rows, schema=pl.read_parquet_schema(table)).write_parquet(table)
    reseal(out, 0)


def swapped_pixels(row: dict[str, Any], mask: np.ndarray[Any, Any]) -> None:
    """Another mask of the same area and box."""
    lines = np.flatnonzero(mask.any(axis=1))
    line = mask[lines[len(lines) // 3]]
    inside = np.flatnonzero(line)
    line[inside[len(inside) // 2]] = False
    row["lesion_pixels"] -= 1


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_every_mask_is_proven(masks: Path, tmp_path: Path, jitter: float) -> None:
    report = verify(written(masks, tmp_path / "set", jitter), masks=masks)
    assert report.ok, report.problems
    assert (report.masks_equal, report.masks_moved, report.masks_unproven) == ((0, 4, 0) if jitter else (4, 0, 0))
    (line,) = [line for line in report.lines(proving=False, masks=True) if "masks" in line]
    assert line.endswith("not proven: 0")
    assert verify(tmp_path / "set").masks_unproven == 4


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (swapped_pixels, "1 pixels of its mask differ from"),
        (lambda row, mask: row.update(given_mask_left=row["given_mask_left"] + 3), "pixels of its mask differ from"),
        (lambda row, mask: row.update(given_mask_scale=2 * row["given_mask_scale"]), "beyond what --jitter 0.2 allows"),
        (lambda row, mask: row.update(given_mask_top=None), "beyond what --jitter 0.2 allows"),
        (lambda row, mask: row.update({"class": "malignant" if row["class"] == "benign" else "benign"}), "it is "),
        (
            lambda row, mask: row.update(given_mask_sha256="0" * 64),
            "1 mask of the run's cannot be used, or not be found",
        ),
    ],
)
def test_a_mask_that_is_not_the_users_is_named(
    masks: Path, tmp_path: Path, edit: Callable[[dict[str, Any], np.ndarray[Any, Any]], None], words: str
) -> None:
    out = written(masks, tmp_path / "set", 0.2)
    change(out, edit)
    report = verify(out, masks=masks)
    assert any(words in problem.problem and problem.fix for problem in report.problems), report.problems
    assert (report.masks_moved, report.masks_unproven) == (3, 1)


def test_a_run_without_jitter_may_not_have_moved_anything(masks: Path, tmp_path: Path) -> None:
    out = written(masks, tmp_path / "set")
    change(out, lambda row, mask: row.update(given_mask_mirrored=True))
    assert any("beyond what --jitter 0 allows" in problem.problem for problem in verify(out, masks=masks).problems)


def test_the_card_says_whose_the_outlines_are(masks: Path, tmp_path: Path) -> None:
    card = (written(masks, tmp_path / "set", 0.2) / "README.md").read_text()
    assert "those of the masks given to the run, moved and scaled by up to 20%" in card
    assert "no sample holds a patient's pixels" in card
    assert "--masks masks --jitter 0.2" in card
    assert str(tmp_path) not in card


def test_a_run_is_continued_with_its_own_masks_alone(masks: Path, tmp_path: Path) -> None:
    out = written(masks, tmp_path / "set")
    before = json.loads((out / "run.json").read_text())
    save(masks / "benign/c.png", blob((200, 300)))
    for sampler, words in (
        (quick_sampler(QuickEngine(), masks=MaskFolder(masks)), "--masks: masks, but its content is another"),
        (quick_sampler(QuickEngine()), "--masks: masks -> the default"),
    ):
        with pytest.raises(OutputError, match=words):
            generate(sampler, out, count=4, seed=1, shard_size=4)
    (masks / "benign/c.png").unlink()
    for jitter, words in ((0.1, "--jitter: the default -> 0.1"), (0.0, None)):
        sampler = quick_sampler(QuickEngine(), jitter=jitter)
        if words is None:
            refuse_other_run(out, before, sampler, Plan(4, 1, 4), {"--masks": masks})
        else:
            with pytest.raises(OutputError, match=words):
                refuse_other_run(out, before, sampler, Plan(4, 1, 4), {"--masks": masks})
    assert generate(
        quick_sampler(QuickEngine(), masks=MaskFolder(masks)), out, count=4, seed=1, shard_size=4
    ).already_complete
