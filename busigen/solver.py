"""The few-step solver as a table of constants: training's reference sampler and the exported graphs read the same one.

Flow matching on the straight path ``x_t = (1 - t) x_0 + t noise`` (Lipman et al. 2023, Liu et al. 2023): the network
predicts the velocity ``noise - x_0`` and an Euler step from ``t`` to ``s`` is ``x - (t - s) net(x, t)``.
"""

from __future__ import annotations

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
    if count < 1:
        raise ValueError(f"a solver needs at least 1 step, not {count}")
    uniform = [1.0 - k / count for k in range(count + 1)]
    times = [SHIFT * u / (1.0 + (SHIFT - 1.0) * u) for u in uniform]
    return [SolverStep(t=t, a=1.0, b=s - t, c=0.0) for t, s in pairwise(times)]
