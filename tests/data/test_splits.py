"""Nobody is on two sides, nobody moves, and the shares are what was promised."""

from __future__ import annotations

import numpy as np
import pytest

from busigen.data.splits import EXCLUDED, assign_splits, draw_split, near_duplicate_groups, thumbnail
from busigen.registry import SPLITS
from tests.conftest import Sources


def test_no_group_and_no_patient_is_in_two_splits(any_sources: Sources) -> None:
    table = any_sources.prepared.table
    assert set(table["split"]) <= set(SPLITS)
    for key in ("group", "patient", "sha256"):
        known = table.drop_nulls(key)
        assert known.group_by(key).n_unique()["split"].max() == 1, key


def test_shares_are_as_promised() -> None:
    generated = [draw_split(0, f"group {number}") for number in range(4000)]
    for name, share in SPLITS.items():
        # Four standard deviations of a binomial draw.
        assert generated.count(name) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
    assert generated != [draw_split(1, f"group {number}") for number in range(4000)]


def test_adding_a_third_of_the_images_moves_nobody(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    table = prepared.table
    thumbnails = np.stack(
        [
            thumbnail(np.ascontiguousarray(image[top : top + height, left : left + width]))
            for image, top, height, left, width in zip(
                prepared.images, table["top"], table["inner_height"], table["left"], table["inner_width"], strict=True
            )
        ]
    )
    ids, patients = table["id"].to_list(), table["patient"].to_list()

    def assign(indices: np.ndarray, earlier: list[str | None]) -> tuple[list[str], np.ndarray]:
        def regroup(chosen: np.ndarray) -> np.ndarray:
            at = indices[chosen]
            return near_duplicate_groups(thumbnails[at], [patients[index] for index in at])

        return assign_splits([ids[i] for i in indices], [patients[i] for i in indices], earlier, regroup, seed=0)

    first = np.flatnonzero(np.random.default_rng(0).random(len(ids)) > 1 / 3)
    before: list[str | None] = [None] * len(ids)
    for index, split in zip(first, assign(first, [None] * len(first))[0], strict=True):
        before[index] = split
    after, numbers = assign(np.arange(len(ids)), before)
    assert all(before[index] == after[index] for index in first)
    sides: dict[int, set[str]] = {}
    for number, split in zip(numbers.tolist(), after, strict=True):
        sides.setdefault(number, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert after.count(EXCLUDED) <= 0.01 * len(ids)


class _Links:
    """Groups by a list of pairs, so that the cases below can be read."""

    def __init__(self, count: int, *pairs: tuple[int, int]) -> None:
        self.count = count
        self.pairs = pairs

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        label = {int(index): position for position, index in enumerate(indices)}
        for _ in range(self.count):
            for left, right in self.pairs:
                if left in label and right in label:
                    label[left] = label[right] = min(label[left], label[right])
        return np.array([label[int(index)] for index in indices], dtype=np.int64)


def test_a_new_image_joins_its_group() -> None:
    splits, _ = assign_splits(["a", "b"], [None, None], ["val", None], _Links(2, (0, 1)), seed=0)
    assert splits == ["val", "val"]


def test_a_new_image_between_two_splits_is_excluded_and_stays_so() -> None:
    links = _Links(3, (0, 1), (1, 2))
    splits, numbers = assign_splits(list("abc"), [None] * 3, ["train", None, "test"], links, seed=0)
    assert splits == ["train", EXCLUDED, "test"]
    assert len(set(numbers.tolist())) == 3
    again, _ = assign_splits(list("abc"), [None] * 3, list(splits), links, seed=0)
    assert again == splits


def test_when_known_images_turn_out_to_be_linked_the_test_split_stays() -> None:
    splits, _ = assign_splits(list("ab"), [None] * 2, ["train", "test"], _Links(2, (0, 1)), seed=0)
    assert splits == [EXCLUDED, "test"]


def test_a_patients_name_decides_before_file_names() -> None:
    with_name, _ = assign_splits(["z", "a"], ["p1", "p1"], [None, None], _Links(2, (0, 1)), seed=3)
    assert with_name == [draw_split(3, "p1")] * 2
