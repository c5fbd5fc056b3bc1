"""The solver's table is what training samples with and what the exported graphs hold: its sums must be exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from busigen.registry import SOLVER_STEPS
from busigen.solver import euler_steps

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


def test_steps_are_smaller_near_noise() -> None:
    lengths = [-step.b for step in euler_steps(8)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


@pytest.mark.parametrize("count", [0, -3])
def test_no_steps_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        euler_steps(count)
