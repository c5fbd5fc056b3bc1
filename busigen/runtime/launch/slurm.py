"""One task of a Slurm job array: like local, with the task's number from Slurm."""

from __future__ import annotations

import os
from collections.abc import Mapping

from busigen.errors import UsageError
from busigen.runtime.launch.local import Local

_NAMES = ("ID", "COUNT", "MIN", "MAX")


class Slurm(Local):
    """Reads ``SLURM_ARRAY_TASK_ID`` and ``SLURM_ARRAY_TASK_COUNT``; all else is as without Slurm."""

    def task(self, asked: str | None) -> str | None:
        """See :class:`busigen.runtime.launch.Launcher`."""
        if asked is not None:
            raise UsageError(
                f"--array-task {asked} is given with --launcher slurm, which reads it from Slurm.",
                fix="Leave out one of them.",
            )
        return array_task(os.environ)


LAUNCHER = Slurm()


def array_task(environment: Mapping[str, str]) -> str:
    """The ``K/N`` of this process in its job array, whatever number the array begins with and steps by.

    Raises:
        UsageError: this is no job array, or one with gaps, whose numbers do not say which part is whose.
    """
    values = {}
    for name in _NAMES:
        text = environment.get(f"SLURM_ARRAY_TASK_{name}", "")
        if not text.isdecimal():
            raise UsageError(
                f"--launcher slurm: SLURM_ARRAY_TASK_{name} is {text!r}, so this is no task of a job array.",
                fix="Start it with `sbatch --array=1-N`, or give --array-task K/N yourself.",
            )
        values[name] = int(text)
    step = (values["MAX"] - values["MIN"]) / max(1, values["COUNT"] - 1) or 1
    position = (values["ID"] - values["MIN"]) / step
    if step != int(step) or position != int(position) or not 0 <= position < values["COUNT"]:
        raise UsageError(
            f"--launcher slurm: the job array {values['MIN']} to {values['MAX']} has gaps: it has {values['COUNT']} "
            "tasks.",
            fix="Use an array without gaps, or give each task its --array-task K/N with the N of the whole array.",
        )
    return f"{int(position) + 1}/{values['COUNT']}"
