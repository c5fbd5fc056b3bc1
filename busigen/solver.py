"""The few-step solver's table of times, for training's reference sampler and the exported graphs.

Flow matching on the straight path ``x_t = (1 - t) x_0 + t noise`` (Lipman et al. 2023, Liu et al. 2023): the network
predicts the velocity ``noise - x_0``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from busigen.registry import SOLVER_SHIFT

TIME_SCALE = 1000.0  # The networks' timestep embedding is fed ``t * TIME_SCALE``, the range it was designed for.


@dataclass(frozen=True)
class SolverStep:
    """One step ``x = a x + b net(x, t)`` from ``t`` to ``s``, in [0, 1], 1 being pure noise (`gaussian_constants`)."""

    t: float
    s: float


def gaussian_constants(t: Any, s: Any, spread: Any) -> tuple[Any, Any]:
    """``a`` and ``b`` of the step from ``t`` to ``s`` that is exact where the data have the deviation ``spread``.

    Euler steps go straight to the mean of all data that may have led to ``x_t``, and lose the spread: images get too
    smooth. For normal data the path is ``x_t = (1 - t) mean + d(t) z`` with ``d(t)^2 = (1 - t)^2 spread^2 + t^2``,
    along which this step goes (an exponential integrator, as DPM-Solver, Lu et al. 2022). Without spread it is Euler's
    step. Arguments are numbers, arrays or tensors.
    """

    def deviation(time: Any) -> Any:
        return ((1.0 - time) ** 2 * spread**2 + time**2) ** 0.5

    slope = (t - (1.0 - t) * spread**2) / deviation(t)
    a = ((1.0 - s) * slope + deviation(s)) * deviation(t) / t
    return a, a * (1.0 - t) - (1.0 - s)


def solver_steps(name: str, count: int, start: float = 1.0) -> list[SolverStep]:
    """The ``count`` steps of a denoiser from a time ``start`` on, shifted towards noise by ``registry.SOLVER_SHIFT``.

    A ValueError says that there is no step, or that ``start`` is not above 0 and at most 1.
    """
    if count < 1:
        raise ValueError(f"a solver needs at least 1 step, not {count}")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"a solver starts at a time above 0 and at most 1, not {start}")
    shift = SOLVER_SHIFT[name]
    first = start / (shift - (shift - 1.0) * start)
    uniform = [first * (1.0 - k / count) for k in range(count + 1)]
    times = [shift * u / (1.0 + (shift - 1.0) * u) for u in uniform]
    return [SolverStep(t, s) for t, s in pairwise(times)]
