"""What few steps of DDIM leave of the deviation of data, if the network is the best there is: a calculation, no trial.

python benchmarks/studies/ddim_spread.py

Data are normal, with one deviation. The best network then answers with the mean of what may have led to a noisy sample,
which is known, and a solver's steps multiply a sample by a number. The table has what is left of the deviation with
Stable Diffusion's noise schedule and the steps of `busigen export --steps`: by DDIM, and by the steps that the other
stages take (`busigen.solver.gaussian_constants`), told the deviation.
"""

from __future__ import annotations

from diffusers import DDIMScheduler

from busigen.solver import SolverStep, gaussian_constants
from busigen.training.stable_diffusion.denoiser import ddim_steps, times_of

COUNTS = (1, 2, 4, 8, 25, 50)
DEVIATIONS = (0.25, 0.5, 1.0, 2.0)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def at(time: float, spread: float) -> float:
    """The deviation of samples at a time of the straight path."""
    return float(((1.0 - time) ** 2 * spread**2 + time**2) ** 0.5)


def left(steps: list[SolverStep], spread: float, told: float) -> float:
    """The share of the deviation ``spread`` that is left by steps that are told another; 0 is DDIM's."""
    found = at(steps[0].t, 1.0)  # Stable Diffusion begins with noise alone.
    for step in steps:
        velocity = (step.t - (1.0 - step.t) * spread**2) / at(step.t, spread) ** 2
        a, b = gaussian_constants(step.t, step.s, told)
        found *= a + b * velocity
    return found / at(steps[-1].s, spread)


def main() -> None:
    """Print the table."""
    times = times_of(DDIMScheduler(**SCHEDULE).alphas_cumprod.double())
    print("steps | " + " | ".join(f"deviation {spread:g}: DDIM, told" for spread in DEVIATIONS))
    for count in COUNTS:
        steps = ddim_steps(times, count)
        cells = [f"{left(steps, spread, 0.0):.2f}, {left(steps, spread, spread):.2f}" for spread in DEVIATIONS]
        print(f"{count:5} | " + " | ".join(cells))


if __name__ == "__main__":
    main()
