"""The utility experiment: what synthetic images do for a segmentation network that is tested on real images."""

from __future__ import annotations

import time

from busigen.evaluation.context import CLEAN, AuditContext
from busigen.evaluation.results import SectionResult
from busigen.evaluation.utility.arms import EXTENTS, arms_for, outcomes, splits
from busigen.evaluation.utility.figures import LEARNT, SECTION, arm_figures, flagged, untaught
from busigen.evaluation.utility.probe import probe_figures


def run(context: AuditContext) -> SectionResult:
    """Train the arms of ``arms.ARMS`` with equal optimiser steps and test all of them on the same real images.

    Besides, the network trained on real images alone segments the synthetic ones: masks that do not belong to their
    images show there at once (`probe`). Every training is kept under the section's folder, so a killed run
    goes on where it stood.

    Args:
        context: The audit. With ``train``, those images train and all of ``real`` tests; else group folds of ``real``.
    """
    started = time.perf_counter()
    result = SectionResult(SECTION)
    context = context.without_overlays()
    synthetic = len(context.synthetic.with_lesions())
    lesions = int(context.real.masks.any(axis=(1, 2)).sum())
    if not synthetic or lesions < 2:
        result.note(f"Not run: it takes synthetic and real lesions, and there are {synthetic} and {lesions}.")
        return result
    parts, notes = splits(context, synthetic)
    if not parts or not all(len(part.train) for part in parts):
        result.note(" ".join(notes))
        return result
    smallest = min(len(part.train) for part in parts)
    arms, left_out = arms_for(context, smallest, synthetic)
    found = outcomes(context, parts, arms)
    figures = arm_figures(context, found, parts, smallest) + probe_figures(context, found, parts)
    weak = untaught(context, found, parts)
    flagged(figures, result, trusted=not weak)
    if weak:
        result.note(
            f"{weak} of the trainings on real images did not learn to find lesions (Dice below {LEARNT}), for want of "
            "images or steps, so nothing is flagged."
        )
    for text in (*notes, *left_out, CLEAN):
        result.note(text)
    extent = EXTENTS[context.effort]
    result.details["experiment"] = {
        "training_images": {part.name: len(part.train) for part in parts},
        "seeds": extent.seeds,
        "arms": {arm.name: arm.label for arm in arms},
    }
    result.seconds = time.perf_counter() - started
    return result
