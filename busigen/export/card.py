"""The part of a model card that a machine can write: what it was trained on, for how long, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from busigen.export.report import parity_table, precision_table, unproved


def card(record: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """A model card in Markdown.

    Args:
        record: the checkpoint's ``busigen.json``.
        info: the bundle's ``bundle.json``.
    """
    tasks = "\n".join(
        f"| {name} | {task.get('steps', '')} | {_held_out(task)} | {task['seconds']:.0f} |"
        for name, task in record["tasks"].items()
    )
    return f"""# Model card

Preset `{info["preset"]}`, trained on {record["device"]} on the training split of {record["data"]["images"]} images
(split hash `{info["split_hash"]}`).
{_origin(record.get("base"))}
Solver steps per stage: {", ".join(f"{k} {v}" for k, v in info["solver_steps"].items())}.

| task | steps | held-out loss | seconds (of the last sitting) |
| --- | --- | --- | --- |
{tasks}

PyTorch against the exported graphs over the whole trajectory, same draws:

{parity_table(info["parity"])}

{unproved(info["parity"])}

What each component computes in:

{precision_table(info["components"])}

Not for diagnosis. Lesions painted into a patient's image still hold that patient's pixels.
"""


def _held_out(task: Mapping[str, Any]) -> str:
    """The loss of the weights that were kept; nothing for a task that trains none."""
    losses = [loss for _, loss in task.get("validation", ())]
    return f"{min(losses):.4f}" if losses else ""


def _origin(base: Mapping[str, str] | None) -> str:
    """Where the base comes from, if not from the same run: what its images taught it is in the bundle, too."""
    if base is None:
        return ""
    return f"""
These images trained the tasks below. All else is the base's, unchanged: it was trained on the training split with hash
`{base["split_hash"]}`, and its weights have the digest `{base["weights"]}`.
"""
