"""No mutated record makes a command stumble: it reads it, or says in a line what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.harness.json_fuzz import BUG, answer, readers, training_readers

TIMES = 8


def test_mutated_records_of_datasets_bundles_and_prepared_folders_are_answered(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="URLs need the extra 'remote'")
    _try(readers(tmp_path), tmp_path / "work")


def test_mutated_records_of_trainings_and_audits_are_answered(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="training needs the extra 'train'")
    _try(training_readers(tmp_path), tmp_path / "work")


def _try(every: list, work: Path) -> None:
    for reader in every:
        for number in range(TIMES):
            code, said = answer(reader, work, random.Random(f"{reader.name} {number}"))
            assert code != BUG and not said.startswith(BUG), (reader.name, number, said)
            assert said.isprintable() or not said, (reader.name, number, said)
