"""What a user asks for: how it is read, what each sample gets of it, and when a mask misses it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from busigen.data.geometry import attributes
from busigen.errors import UsageError
from busigen.registry import ASKED_LENGTH, ATTRIBUTES, BIRADS
from busigen.runtime.sampling.conditions import BOUNDS, SampleConditions, hardly_known, measured, parse_conditions
from busigen.runtime.sampling.quality_gates import ASKED_TOLERANCE, asked_reason

ROWS, COLUMNS = np.mgrid[0:256, 0:256] + 0.5
EVERYWHERE = np.ones((256, 256), dtype=bool)
STRIP = (ROWS > 40) & (ROWS < 200) & (COLUMNS > 10) & (COLUMNS < 240)
ALL = parse_conditions(size="0.02:0.06", depth="0.3", across="0.4:0.6", height_width="0.5:0.9", birads="4")


def test_nothing_asked_is_nothing_told() -> None:
    nothing = parse_conditions()
    assert not nothing
    assert nothing.values(3, 5) == {}
    assert nothing.category(0) is None
    assert (nothing.vector({}, None, EVERYWHERE) == 0).all()
    assert set(nothing.typed().values()) == {None}


def test_numbers_and_ranges_are_read_and_shown_as_typed() -> None:
    assert ALL.typed() == {
        "size": "0.02:0.06",
        "depth": "0.3",
        "across": "0.4:0.6",
        "height_width": "0.5:0.9",
        "birads": "4",
    }
    (low, high) = (0.031234567, 0.1 + 0.2)
    again = parse_conditions(size=parse_conditions(size=f"{low!r}:{high!r}").typed()["size"])
    assert again.ranges["size"] == (low, high), "what is recorded draws the same samples again"
    assert parse_conditions(size="0.0300").typed() == parse_conditions(size="3e-2:0.03").typed()
    assert parse_conditions(taller_than_wide=True).typed() == parse_conditions(height_width="1.05:1.6").typed()


def test_values_fill_their_range_and_do_not_depend_on_what_else_is_asked() -> None:
    generated = [ALL.values(7, index) for index in range(400)]
    sizes = np.array([values["size"] for values in generated])
    assert sizes.min() >= 0.02 and sizes.max() <= 0.06
    # Of 400 uniform draws, one misses a tenth at either end once in 10^18 seeds.
    assert sizes.min() < 0.024 and sizes.max() > 0.056
    assert {values["depth"] for values in generated} == {0.3}
    alone = parse_conditions(size="0.02:0.06")
    assert [alone.values(7, index)["size"] for index in range(400)] == sizes.tolist()
    assert alone.values(8, 0) != alone.values(7, 0)


@pytest.mark.parametrize("valid", [EVERYWHERE, STRIP])
def test_a_mask_that_is_what_the_graph_was_told_measures_what_the_user_asked(valid: np.ndarray) -> None:
    values = {"across": 0.4, "depth": 0.6, "size": 0.04, "height_width": 0.7}
    vector = parse_conditions(birads="3").vector(values, "3", valid)
    assert vector.shape == (ASKED_LENGTH,) and vector.dtype == np.float32
    across, down, size, ratio = vector[: len(ATTRIBUTES)]
    # An ellipse that has these attributes.
    half_height, half_width = np.exp(size + np.array([1, -1]) * ratio / 2) / np.sqrt(np.pi)
    mask = ((ROWS - 256 * down) / half_height) ** 2 + ((COLUMNS - 256 * across) / half_width) ** 2 <= 1
    found = measured(mask, valid)
    assert asked_reason(found, values) is None
    for name, value in values.items():
        assert found[name] == pytest.approx(value, rel=0.04)
    assert vector[len(ATTRIBUTES) :].tolist() == [1, 1, 1, 1, *(known == "3" for known in BIRADS)]
    np.testing.assert_allclose(attributes(mask), vector[: len(ATTRIBUTES)], atol=0.04)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_mask_beyond_the_tolerance_is_not_as_asked(name: str) -> None:
    wanted = {"across": 0.5, "depth": 0.4, "size": 0.05, "height_width": 0.8}
    scale = 1.0 if name in ("across", "depth") else wanted[name]
    for factor, reason in ((0.9, None), (-0.9, None), (1.1, "not as asked"), (-1.1, "not as asked")):
        found = {**wanted, name: wanted[name] + factor * ASKED_TOLERANCE[name] * scale}
        assert asked_reason(found, wanted) == reason
        assert asked_reason(found, {key: value for key, value in wanted.items() if key != name}) is None


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("text", ["", "wide", "0.3:0.4:0.5", "nan", "-1", "9", "0.6:0.3", "0.3:", "inf"])
def test_what_cannot_be_drawn_is_refused_by_name_and_value(name: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conditions(**{name: text})
    option = "--" + name.replace("_", "-")
    assert option in caught.value.problem and repr(text) in caught.value.problem
    low, high = BOUNDS[name]
    assert f"from {low:g} to {high:g}" in caught.value.fix


def test_contradictions_and_unknown_categories_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--height-width 0\.5 and --taller-than-wide"):
        parse_conditions(height_width="0.5", taller_than_wide=True)
    with pytest.raises(UsageError, match="--birads is '6'") as caught:
        parse_conditions(birads="6")
    assert "2, 3, 4, 5" in caught.value.fix


def test_a_mix_of_categories_is_dealt_to_within_one_and_recorded_so_that_it_is_dealt_again() -> None:
    asked = parse_conditions(birads="5:0.2, 2:0.1,3:0.4,4:0.3")
    assert asked.typed()["birads"] == "2:0.1,3:0.4,4:0.3,5:0.2"
    again = parse_conditions(birads=asked.typed()["birads"])
    found = [asked.category(number) for number in range(1000)]
    assert [again.category(number) for number in range(1000)] == found
    for count in (10, 137, 1000):
        dealt = Counter(found[:count])
        # Each takes its share of what those before it left, so the last of four is off by three at most.
        assert all(
            abs(dealt[name] - share * count) < 4 for name, share in zip("2345", (0.1, 0.4, 0.3, 0.2), strict=True)
        )
    assert {parse_conditions(birads="4").category(number) for number in range(9)} == {"4"}
    assert Counter(parse_conditions(birads="3:1,4:3").category(number) for number in range(8)) == {"3": 2, "4": 6}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2:0.5,6:0.5", "--birads is '2:0.5,6:0.5', and '6' is no category"),
        ("2:0.5,2:0.5", "names 2 twice"),
        ("2:0.5,3:0.4", "whose shares sum to 0.9"),
        ("2:0,3:1", "gives '2' the weight '0'"),
        ("2:many", "gives '2' the weight 'many'"),
        ("", "'' is no category"),
        ("3,", "'' is no category"),
        ("2=0.5,3=0.5", "with = where a colon stands"),
    ],
)
def test_a_mix_that_cannot_be_dealt_is_refused_with_its_text(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conditions(birads=text)
    assert words in caught.value.problem
    assert "2:" in caught.value.fix and "\n" not in str(caught.value)


def test_asking_is_true_where_anything_is_asked() -> None:
    assert SampleConditions(birads={"2": 1.0}) and parse_conditions(depth="0.3") and not SampleConditions()


def test_what_the_shipped_bundle_hardly_knows_is_said() -> None:
    """BUS-BRA has 4 malignant lesions of category 2, and 248 of category 4."""
    (line,) = hardly_known(["benign", "malignant"], ["2"])
    assert line.startswith("BI-RADS 2 with malignant: the shipped bundle learned it from 4 images")
    mixed = list(hardly_known(["benign", "malignant"], ["2", "4", "5"]))
    assert [line.partition(":")[0] for line in mixed] == ["BI-RADS 5 with benign", "BI-RADS 2 with malignant"]
    assert not [*hardly_known(["benign", "malignant"], ["4"]), *hardly_known(["benign"], [])]
