"""The solver's table is what training samples with and what the exported graphs hold: its sums must be exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from busigen.registry import SOLVER_STEPS
from busigen.solver import euler_steps, normal_steps

COUNTS = sorted({1, 2, 3, 16, 50, *SOLVER_STEPS.values()})


@pytest.mark.parametrize("count", COUNTS)
def test_times_fall_from_pure_noise_and_never_reach_data(count: int) -> None:
    times = [step.t for step in euler_steps(count)]
    assert len(times) == count
    assert times[0] == 1.0
    assert all(later < earlier for earlier, later in pairwise(times))
    assert times[-1] > 0


@pytest.mark.parametrize("count", COUNTS)
def test_a_constant_velocity_is_integrated_exactly(count: int) -> None:
    rng = np.random.default_rng(count)
    noise, velocity = rng.normal(size=(2, 64))
    x = noise
    for step in euler_steps(count):
        x = step.a * x + step.b * velocity + step.c * noise
    # On a straight path every number of steps ends at the data; each step adds one rounding error of 2^-53.
    np.testing.assert_allclose(x, noise - velocity, rtol=0, atol=1e-14 * count)


def gaussian(deviation: float, count: int) -> float:
    """The deviation that normal data of a given one come out with, under their own exact velocity."""
    factor = 1.0
    for step in normal_steps(count):
        t = step.t
        velocity = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
        factor = step.a * factor + step.b * velocity * factor
    return factor


@pytest.mark.parametrize("count", COUNTS)
def test_standard_normal_data_keep_their_deviation_in_any_number_of_steps(count: int) -> None:
    assert gaussian(1.0, count) == pytest.approx(1.0, abs=1e-12)


def test_other_normal_data_keep_theirs_better_than_by_euler() -> None:
    assert [step.t for step in normal_steps(8)] == [step.t for step in euler_steps(8)]
    # Euler gives 0.58, 1.20 and 1.70.
    for deviation in (0.7, 1.4, 2.0):
        assert gaussian(deviation, 8) == pytest.approx(deviation, rel=0.08)
        assert gaussian(deviation, 400) == pytest.approx(deviation, rel=2e-3)


def test_steps_are_smaller_near_noise() -> None:
    lengths = [-step.b for step in euler_steps(8)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize("count", [0, -3])
def test_no_steps_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        euler_steps(count)
