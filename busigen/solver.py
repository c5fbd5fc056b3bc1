"""The few-step solver as a table of constants: training's reference sampler and the exported graphs read the same one.

Flow matching on the straight path ``x_t = (1 - t) x_0 + t noise`` (Lipman et al. 2023, Liu et al. 2023): the network
predicts the velocity ``noise - x_0`` and an Euler step from ``t`` to ``s`` is ``x - (t - s) net(x, t)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

TIME_SCALE = 1000.0
"""The networks' timestep embedding is fed ``t * TIME_SCALE``, the range it was designed for."""

SHIFT = 1.5
"""How much denser the steps sit near pure noise, where the layout is decided (Esser et al. 2024, 5.3.2)."""


@dataclass(frozen=True)
class SolverStep:
    """One step ``x = a x + b net(x, t) + c noise``; ``t`` in (0, 1], 1 being pure noise."""

    t: float
    a: float
    b: float
    c: float


def euler_steps(count: int) -> list[SolverStep]:
    """The Euler table with ``count`` network evaluations, from noise (t = 1) to data (t = 0).

    Raises:
        ValueError: ``count`` is below one.
    """
    return [SolverStep(t=t, a=1.0, b=s - t, c=0.0) for t, s in pairwise(_times(count))]


def normal_steps(count: int) -> list[SolverStep]:
    """A table that is exact where the data are standard normal, whatever the number of steps.

    Such data have ``x_t`` of deviation ``d(t) = sqrt((1 - t)^2 + t^2)`` and the velocity ``x d'(t) / d(t)``. That part
    of the velocity is integrated in closed form, and only the rest is taken as constant over a step (an exponential
    integrator, as in Lu et al. 2022, DPM-Solver). Eight Euler steps would leave standard normal data with a deviation
    of 0.84.

    Raises:
        ValueError: ``count`` is below one.
    """

    def deviation(t: float) -> float:
        return math.hypot(1.0 - t, t)

    steps = []
    for t, s in pairwise(_times(count)):
        b = deviation(s) * (math.asinh(2.0 * s - 1.0) - math.asinh(2.0 * t - 1.0)) / math.sqrt(2.0)
        a = deviation(s) / deviation(t) - b * (2.0 * t - 1.0) / deviation(t) ** 2
        steps.append(SolverStep(t=t, a=a, b=b, c=0.0))
    return steps


def solver_steps(name: str, count: int) -> list[SolverStep]:
    """The table of a denoiser: stage 1's codes are standardised and nearly normal, latents are not."""
    return (normal_steps if name == "mask" else euler_steps)(count)


def _times(count: int) -> list[float]:
    """Times from 1 to 0 between which ``count`` steps go."""
    if count < 1:
        raise ValueError(f"a solver needs at least 1 step, not {count}")
    uniform = [1.0 - k / count for k in range(count + 1)]
    return [SHIFT * u / (1.0 + (SHIFT - 1.0) * u) for u in uniform]
