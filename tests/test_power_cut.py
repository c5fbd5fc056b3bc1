"""A power cut at any moment loses nothing that a record vouches for, and the same command continues from there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from busigen.files import atomic_path
from tests.harness.power_cut import cut, cut_off, recorded
from tests.harness.power_cut_cases import CASES, inputs_of

POINTS = {
    "generate": 20,
    "merge": 20,
    "repair": 20,
    "convert": 20,
    "prepare": 20,
    "prepare-again": 20,
    "save": 20,
    "appear": 20,
}
"""Cuts of the cases that take a moment; ``python -m benchmarks.power_cut`` tries a thousand of each, and all cases."""

CONTINUED = {"prepare": 4, "prepare-again": 4, "save": 10}
"""After every so many cuts the command goes on, where that takes longest."""


@pytest.mark.parametrize("name", POINTS)
def test_nothing_vouched_for_is_lost_and_the_command_continues(name: str, tmp_path: Path) -> None:
    case = CASES[name](inputs_of(name, tmp_path))
    (tmp_path / "work").mkdir()
    tally = cut_off(case, tmp_path / "work", POINTS[name], continue_every=CONTINUED.get(name, 1))
    assert tally.states > 10
    assert (tally.faults, tally.differing) == ([], [])


@pytest.mark.parametrize("flushed", [True, False])
def test_a_file_that_is_renamed_without_being_flushed_is_seen_to_be_torn(tmp_path: Path, flushed: bool) -> None:
    root = tmp_path / "root"
    root.mkdir()
    content = bytes(range(256)) * 8
    with recorded(root) as recording:
        if flushed:
            with atomic_path(root / "record") as temporary:
                temporary.write_bytes(content)
        else:
            (root / "half").write_bytes(content)
            os.replace(root / "half", root / "record")
    found = set()
    for point in range(60):
        place = tmp_path / str(point)
        cut(recording, recording.states[-1], random.Random(point), place)
        found.add((place / "record").read_bytes() if (place / "record").exists() else None)
    assert (found == {content}) is flushed
    assert flushed or {None, b""} < found
