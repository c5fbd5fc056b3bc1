"""The solver's table is what training samples with and what the exported graphs hold: its sums must be exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from busigen.registry import SOLVER_SHIFT, SOLVER_STEPS
from busigen.solver import SolverStep, gaussian_constants, solver_steps

COUNTS = sorted({1, 2, 3, 16, 50, *SOLVER_STEPS.values()})


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", sorted(SOLVER_STEPS))
def test_times_fall_from_pure_noise_and_never_reach_data(name: str, count: int) -> None:
    times = [step.t for step in solver_steps(name, count)]
    assert len(times) == count
    assert times[0] == 1.0
    assert all(later < earlier for earlier, later in pairwise(times))
    assert times[-1] > 0


@pytest.mark.parametrize("count", COUNTS)
def test_a_constant_velocity_is_integrated_exactly(count: int) -> None:
    rng = np.random.default_rng(count)
    noise, velocity = rng.normal(size=(2, 64))
    x = noise
    for step in solver_steps("mask", count):
        a, b = gaussian_constants(step.t, step.s, 0.0)
        x = a * x + b * velocity
    # On a straight path every number of steps ends at the data; each step adds a few rounding errors of 2^-53.
    np.testing.assert_allclose(x, noise - velocity, rtol=0, atol=1e-14 * count)


def generated(noise: float, mean: float, deviation: float, steps: list[SolverStep], assumed: float) -> float:
    """Where a noise ends under the exact velocity of normal data, with steps that assume a deviation."""
    x = noise
    for step in steps:
        t = step.t
        a, b = gaussian_constants(t, step.s, assumed)
        slope = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
        x = a * x + b * (slope * (x - (1 - t) * mean) - mean)
    return x


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.5, 0.7), (-2.0, 0.1), (0.5, 0.0)])
def test_normal_data_come_out_exactly_in_any_number_of_steps(mean: float, deviation: float, count: int) -> None:
    steps = solver_steps("prior", count)
    for noise in (-1.0, 0.0, 2.0):
        assert generated(noise, mean, deviation, steps, deviation) == pytest.approx(mean + deviation * noise, abs=1e-10)


def test_with_many_steps_any_assumed_spread_ends_at_the_same_data() -> None:
    for assumed in (0.0, 0.5, 1.0, 1.5):
        # First order: 4,000 steps leave an error of about a thousandth.
        assert generated(1.0, 0.5, 0.8, solver_steps("mask", 4000), assumed) == pytest.approx(1.3, abs=3e-3)


def test_eight_steps_lose_less_spread_than_by_euler() -> None:
    def spread(assumed: float) -> float:
        return generated(1.0, 0.0, 1.0, solver_steps("mask", 8), assumed)

    assert spread(0.0) < 0.85
    assert abs(spread(0.8) - 1.0) < abs(spread(0.0) - 1.0) / 2


def test_a_greater_shift_puts_more_steps_near_pure_noise() -> None:
    least, most = (sorted(SOLVER_SHIFT, key=lambda name: SOLVER_SHIFT[name])[k] for k in (0, -1))
    assert all(
        plain.t < shifted.t
        for plain, shifted in zip(solver_steps(least, 6)[1:], solver_steps(most, 6)[1:], strict=True)
    )


@pytest.mark.parametrize("count", [0, -3])
def test_no_steps_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        solver_steps("lesion", count)
