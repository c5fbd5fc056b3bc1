"""The few-step solver as a table of constants: training's reference sampler and the exported graphs read the same one.

Flow matching on the straight path ``x_t = (1 - t) x_0 + t noise`` (Lipman et al. 2023, Liu et al. 2023): the network
predicts the velocity ``noise - x_0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from busigen.registry import SOLVER_SHIFT, SOLVER_SPREAD

TIME_SCALE = 1000.0
"""The networks' timestep embedding is fed ``t * TIME_SCALE``, the range it was designed for."""


@dataclass(frozen=True)
class SolverStep:
    """One step ``x = a x + b net(x, t) + c noise`` from ``t`` to ``s``, in [0, 1], 1 being pure noise."""

    t: float
    s: float
    a: float
    b: float
    c: float


def gaussian_constants(t: Any, s: Any, spread: Any) -> tuple[Any, Any]:
    """``a`` and ``b`` of the step from ``t`` to ``s`` that is exact where the data have the deviation ``spread``.

    A network predicts the mean of all data that may have led to ``x_t``. Euler steps go there in a straight line and
    lose the spread about it: eight of them leave standard normal data with a deviation of 0.84, and images smooth.
    For normal data the path is known, ``x_t = (1 - t) mean + d(t) z`` with ``d(t)^2 = (1 - t)^2 spread^2 + t^2``. A
    step finds ``mean`` and ``z`` from ``x`` and the velocity, and goes along it (an exponential integrator, as
    DPM-Solver is for point masses, Lu et al. 2022). Without spread it is Euler's step.

    Numbers, arrays and tensors will do, and so will a spread for each of many independent coefficients.
    """

    def deviation(time: Any) -> Any:
        return ((1.0 - time) ** 2 * spread**2 + time**2) ** 0.5

    slope = (t - (1.0 - t) * spread**2) / deviation(t)
    a = ((1.0 - s) * slope + deviation(s)) * deviation(t) / t
    return a, a * (1.0 - t) - (1.0 - s)


def gaussian_steps(count: int, spread: float, shift: float = 1.0) -> list[SolverStep]:
    """A table that is exact where the data are normal about any mean with deviation ``spread``, in any number of steps.

    Args:
        count: network evaluations.
        spread: deviation of the data that one context allows, in units of the network's sample; 0 or more.
        shift: how much denser the steps sit near pure noise (Esser et al. 2024, 5.3.2); 1 spaces them evenly.

    Raises:
        ValueError: ``count`` is below one, or ``spread`` negative.
    """
    if spread < 0:
        raise ValueError(f"a spread cannot be negative, not {spread}")
    return [SolverStep(t, s, *gaussian_constants(t, s, spread), c=0.0) for t, s in pairwise(_times(count, shift))]


def solver_steps(name: str, count: int) -> list[SolverStep]:
    """The table of a denoiser, with the spread of its data and the shift of its times (``registry``)."""
    return gaussian_steps(count, SOLVER_SPREAD[name], SOLVER_SHIFT[name])


def _times(count: int, shift: float) -> list[float]:
    """Times from 1 to 0 between which ``count`` steps go."""
    if count < 1:
        raise ValueError(f"a solver needs at least 1 step, not {count}")
    uniform = [1.0 - k / count for k in range(count + 1)]
    return [shift * u / (1.0 + (shift - 1.0) * u) for u in uniform]
