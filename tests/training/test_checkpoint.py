"""What training writes, export reads: a run that says it is finished can be exported."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from busigen.data.prepared import Prepared
from busigen.errors import InputError
from busigen.registry import RESOLUTION
from busigen.runtime.backends.bundle_record import LEAST_FRAME
from busigen.training.checkpoint import RECORD, write_record
from busigen.training.examples import frames_of
from busigen.training.pipeline import train
from busigen.training.recipe import recipe_for
from tests.harness.checkpoints import untrained


def test_a_record_that_export_would_refuse_is_not_left_as_one_of_a_finished_run(tmp_path: Path) -> None:
    folder = untrained(tmp_path / "run")
    content = json.loads((folder / RECORD).read_text())
    assert write_record(folder, content) == content
    with pytest.raises(InputError, match="none of the presets"):
        write_record(folder, {**content, "preset": "none of the presets"})
    assert not (folder / RECORD).exists()


def test_strips_get_frames_that_a_bundle_may_have(caplog: pytest.LogCaptureFixture) -> None:
    """A strip of 640 x 48 pixels is 19 pixels high once it is letterboxed; a bundle's frames have 32 or more."""
    rows = pl.DataFrame({"inner_height": [19, 256, 200], "inner_width": [256, 24, 256]})
    assert frames_of(rows) == [[LEAST_FRAME, RESOLUTION], [200, RESOLUTION], [RESOLUTION, LEAST_FRAME]]
    assert "2 of 3 images are strips" in caplog.text


def test_weights_that_are_no_numbers_end_training_after_their_task(
    synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    recipe = recipe_for("tiny", scale=1e-9)
    first, *others = recipe.tasks
    # AdamW takes steps of about the rate, whatever the gradient.
    diverging = replace(recipe, tasks=(replace(first, lr=1e30, warmup=0), *others))
    run = tmp_path / "run"
    with pytest.raises(InputError, match=f"in {first.name} are NaN or infinite") as error:
        train(synthetic_prepared.folder, run, diverging, device="cpu", console=Console(file=io.StringIO()))
    assert "diverged" in error.value.fix
    assert not (run / RECORD).exists()
    assert not list((run / "done").iterdir())
