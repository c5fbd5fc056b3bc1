"""Nothing that a user gets changes unnoticed; `python -m tests.golden` writes what is meant to change."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests import golden

BLOCK_TOLERANCE = 0.1
"""Grey levels by which a block's mean may differ: another processor may tip single pixels of its 256 by one."""

MASK_TOLERANCE = 3.0
"""The same for masks, whose pixels are 0 or 255: two of a block's 256 may lie on the other side of the outline."""


def stored(name: str) -> Any:
    return json.loads((golden.HERE / name).read_text())


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return json.loads(json.dumps(golden.frozen(tmp_path_factory.mktemp("golden"))))


@pytest.mark.parametrize("name", ["noise.json", "bundle.json"])
def test_records_and_tables_are_what_they_were(frozen: Any, name: str) -> None:
    before, now = stored(name), frozen[name]
    assert now["records"] == before["records"]
    assert list(now["columns"].items()) == list(before["columns"].items())


def test_samples_of_the_noise_source_are_what_they_were(frozen: Any) -> None:
    before, now = stored("noise.json")["members"], frozen["noise.json"]["members"]
    assert list(now.items()) == list(before.items())


def test_samples_of_the_shipped_bundle_are_what_they_were(frozen: Any) -> None:
    before, now = stored("bundle.json")["members"], frozen["bundle.json"]["members"]
    assert list(now) == list(before)
    for name, value in before.items():
        if name.endswith(".png"):
            tolerance = MASK_TOLERANCE if name.endswith("mask.png") else BLOCK_TOLERANCE
            np.testing.assert_allclose(now[name], value, rtol=0, atol=tolerance, err_msg=name)
        else:
            assert list(now[name]) == list(value)
            # Numbers measured on the mask move with its pixels; texts do not.
            texts = {key: text for key, text in value.items() if isinstance(text, str) and "sha256" not in key}
            assert {key: now[name][key] for key in texts} == texts
            numbers = {key: number for key, number in value.items() if isinstance(number, (int, float))}
            assert {key: now[name][key] for key in numbers} == pytest.approx(numbers, rel=0.02, abs=1e-6), name


def test_commands_and_options_are_what_they_were(frozen: Any) -> None:
    before, now = stored("commands.json"), frozen["commands.json"]
    assert list(now.items()) == list(before.items())
