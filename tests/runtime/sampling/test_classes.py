"""The class mix that was asked for is the class mix that is dealt, at every length of the dataset."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from busigen.errors import UsageError
from busigen.registry import CLASSES, LESION_CLASSES
from busigen.runtime.sampling.conditions import class_at, parse_classes, parse_shares

WEIGHTS = st.floats(1e-9, 1e9, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("benign=0.5,malignant=0.5", {"benign": 0.5, "malignant": 0.5}),
        ("malignant", {"malignant": 1.0}),
        ("malignant=3, benign=1", {"malignant": 3.0, "benign": 1.0}),
        ("benign,malignant", {"benign": 1.0, "malignant": 1.0}),
        ("benign=1e-3", {"benign": 0.001}),
        ("benign=0.7,malignant=0.7", {"benign": 0.7, "malignant": 0.7}),
        ("Benign=2,MALIGNANT", {"benign": 2.0, "malignant": 1.0}),
    ],
)
def test_weights_are_read_however_a_dataset_records_them(text: str, weights: dict[str, float]) -> None:
    assert parse_classes(text) == weights


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("purple=1", "'purple'"),
        ("", "''"),
        ("benign=1,", "''"),
        ("benign,Benign", "'benign' twice"),
        ("benign=0", "'0'"),
        ("benign=-1", "'-1'"),
        ("benign=nan", "'nan'"),
        ("benign=inf", "'inf'"),
        ("benign=much", "'much'"),
        ("benign=0.5=0.5", "'0.5=0.5'"),
    ],
)
def test_anything_else_is_refused_by_name_and_with_an_example(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        parse_classes(text)
    assert all(name in caught.value.fix for name in LESION_CLASSES)
    assert "--classes benign=0.7,malignant=0.3" in caught.value.fix


def test_normals_are_asked_for_by_an_option_of_their_own() -> None:
    with pytest.raises(UsageError, match="'normal'") as caught:
        parse_classes("normal=1")
    assert "--normals 0.2" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("benign=0.7,malignant=0.7", "1.4"),
        ("benign=0.5", "0.5"),
        ("benign=0.5,malignant", "1.5"),
        ("malignant=2.5", "2.5"),
    ],
)
def test_a_run_is_not_asked_for_shares_that_do_not_sum_to_one(text: str, total: str) -> None:
    with pytest.raises(UsageError, match=f"whose shares sum to {total}\\.") as caught:
        parse_shares(text)
    assert "sum to 1, or whole numbers as weights, such as benign=2,malignant=1" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["benign=0.3,malignant=0.7", "benign=0.3333,malignant=0.6666", "benign=3,malignant", "benign"]
)
def test_shares_that_were_rounded_and_whole_weights_are_taken(text: str) -> None:
    assert parse_shares(text) == parse_classes(text)


@settings(max_examples=60, deadline=None)
@given(benign=WEIGHTS, malignant=WEIGHTS)
def test_every_prefix_has_the_exact_proportion(benign: float, malignant: float) -> None:
    weights = {"benign": benign, "malignant": malignant}
    # The user's decimals, not the doubles that are nearest to them.
    share = Fraction(str(benign)) / (Fraction(str(benign)) + Fraction(str(malignant)))
    dealt = 0
    for count in range(1, 200):
        dealt += class_at(count - 1, weights) == "benign"
        assert abs(dealt - count * share) < 1


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({"benign": 0.5, "malignant": 0.5}, {"benign": 500, "malignant": 500}),
        ({"benign": 0.7, "malignant": 0.3}, {"benign": 700, "malignant": 300}),
        ({"benign": 0.1, "malignant": 0.2}, {"benign": 334, "malignant": 666}),
        ({"benign": 1e-9, "malignant": 1e-9}, {"benign": 500, "malignant": 500}),
        ({"malignant": 2.0}, {"malignant": 1000}),
    ],
)
def test_whole_datasets_hold_what_was_asked_for(weights: dict[str, float], wanted: dict[str, int]) -> None:
    counts = Counter(class_at(index, weights) for index in range(1000))
    assert sum(counts.values()) == 1000
    assert all(abs(counts[name] - number) <= 1 for name, number in wanted.items())
    if 1000 % len(weights) == 0 and weights.get("benign") != 0.1:
        assert dict(counts) == wanted


@settings(max_examples=40, deadline=None)
@given(weights=st.dictionaries(st.sampled_from(CLASSES), st.integers(1, 9), min_size=1))
def test_shares_hold_for_any_number_of_classes(weights: dict[str, int]) -> None:
    counts: Counter[str] = Counter()
    for index in range(100):
        counts[class_at(index, weights)] += 1
        for name, weight in weights.items():
            assert abs(counts[name] - (index + 1) * weight / sum(weights.values())) < len(weights)


def test_a_class_depends_on_index_and_weights_alone() -> None:
    weights = {"benign": 0.4, "malignant": 0.6}
    forwards = [class_at(index, weights) for index in range(50)]
    backwards = [class_at(index, dict(reversed(weights.items()))) for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert class_at(999_999_999, weights) == class_at(999_999_999, weights)
    assert forwards[:5] * 10 == forwards, "two in five, evenly spread"
