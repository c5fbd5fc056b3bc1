"""Privacy: does the set show the images that its generator was trained on?

Nearest training neighbours by correlation (`nearest`) of lesion crops and of whole images, and by distance between
radiomic vectors; the same of held-out real images says what is usual. See `memorisation` for the statistics.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.evaluation.comparing.statistics import ALPHA, FEWEST_TO_FLAG, adjusted
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.privacy import memorisation as memory
from busigen.evaluation.privacy.figures import figures_of, reference
from busigen.evaluation.privacy.memorisation import Values
from busigen.evaluation.privacy.nearest import align, crop_box
from busigen.evaluation.privacy.pair_sheet import COLUMNS, write_pairs
from busigen.evaluation.privacy.similarity import Space, image_space, radiomic_space
from busigen.evaluation.report.texts import PRIVACY
from busigen.evaluation.results import Figure, Picture, SectionResult

LISTED = 20
"""Nearest pairs listed in ``details``."""


def run(context: AuditContext) -> SectionResult:
    """Look for training images in the synthetic set.

    Args:
        context: The audit. Without ``train`` only copies of ``real`` images can be found.

    Returns:
        Figures ``privacy.<crop|whole|radiomic>.all.<measure>.value``, the nearest pairs as pictures, and in ``details``
        the thresholds and the nearest pairs by name.

    Raises:
        OutputError: The report's folder cannot be written.
    """
    start = time.monotonic()
    result = SectionResult("privacy")
    result.note(PRIVACY[context.backgrounds])
    if context.train is None:
        result.note(
            "Nobody said which images trained the generator, so the set was compared with the real images alone. A "
            "copy of one of them is found. Whether the set shows other images that the generator has seen, whether it "
            "lies nearer to them than chance would have it, and whether membership can be inferred: none of that can "
            "be concluded. Name the training images with --train-split."
        )
    spaces = [space for name in ("crop", "whole") if (space := image_space(context, name)) is not None]
    if spaces and spaces[0].name == "crop":
        radiomic = radiomic_space(context, spaces[0])
        spaces += [radiomic] if radiomic is not None else []
    else:
        result.note("There are no lesions to compare: the synthetic, the training or the real set has none.")
    if unshared := [space.label for space in spaces if not space.shared]:
        result.note(
            f"Training and held-out images share no class ({', '.join(unshared)}), so all of them were compared. Where "
            "their classes really differ, and not just their names, that difference can pass for memory."
        )
    found: list[tuple[Space, Figure]] = []
    for space in spaces:
        found += [(space, figure) for figure in figures_of(context, space, result)]
    _judge(context, found, result)
    for space in spaces:
        if space.views is not None:
            _show(context, space, result)
    result.seconds = time.monotonic() - start
    return result


def _judge(context: AuditContext, found: list[tuple[Space, Figure]], result: SectionResult) -> None:
    """Adjust the p-values for their number, flag, and say so in words."""
    p_values = np.array([figure.p for _, figure in found], dtype=np.float64)
    # Copies are what the section exists for: a family of their own, so that the indirect tests do not dilute them.
    copies = np.array([figure.key.endswith(".copies.value") for _, figure in found], dtype=np.bool_)
    known = np.empty_like(p_values)
    for family in (copies, ~copies):
        known[family] = adjusted(p_values[family])
    preferring = {
        space.name
        for (space, figure), p in zip(found, known, strict=True)
        if figure.key.endswith(".preference.value") and p < ALPHA
    }
    for (space, figure), p in zip(found, known, strict=True):
        assert figure.floor is not None and figure.floor.low is not None and figure.floor.high is not None
        value, low, high = figure.value.value, figure.floor.low, figure.floor.high
        beyond = value < low if figure.better == "higher" else value > high
        by_construction = space.name == "whole" and context.backgrounds == "real"
        sides = [len(part) for part in (space.synthetic, space.train, space.held) if part is not None]
        alone = figure.key.endswith(".nearer.value") and space.name not in preferring
        flagged = bool(beyond and p < ALPHA and min(sides) >= FEWEST_TO_FLAG and not by_construction and not alone)
        note = figure.note
        if by_construction:
            note += "; never flagged: whole images painted into real ones copy those by construction"
        if min(sides) < FEWEST_TO_FLAG:
            note += f"; fewer than {FEWEST_TO_FLAG} images: never flagged"
        result.figures.append(replace(figure, p=float(p), flagged=flagged, note=note))
        if flagged:
            result.flag(
                f"{figure.label}: {value:.3g}, where real images give {low:.3g} to {high:.3g} (p = {p:.2g}).",
                figure.key,
            )


def _show(context: AuditContext, space: Space, result: SectionResult) -> None:
    """Nearest pairs as a picture and by name and, where there are enough images to judge, copies by number."""
    assert space.views is not None
    similarity = space.to_held if space.to_train is None else space.to_train
    others = space.held if space.train is None else space.train
    side = "real" if space.train is None else "training"
    best = similarity.max(axis=1)
    pairs, listed = [], []
    for row in np.argsort(-best, kind="stable")[:LISTED].tolist():
        column = int(similarity[row].argmax())
        at = align(space.views[0][row], space.views[1][column])
        listed.append(
            {
                "synthetic": space.synthetic.table["id"][row],
                side: others.table["id"][column],
                "correlation": round(at.correlation, 4),
                "mirrored": at.mirrored,
            }
        )
        text = f"{at.correlation:.3f}{', mirrored' if at.mirrored else ''}"
        pairs.append((_picture(space, space.synthetic, row), _picture(space, others, column), text))
    details: dict[str, Any] = {"nearest": listed}
    result.details[space.name] = details
    write_pairs(context.folder("privacy") / f"nearest-{space.name}.png", pairs[:COLUMNS])
    caption = f"Nearest {side} neighbours of {space.label}: synthetic above, {side} image below, correlation beneath."
    result.pictures.append(Picture(f"nearest-{space.name}.png", caption))
    # Too few images for a figure are too few for a threshold.
    if any(figure.key.startswith(f"privacy.{space.name}.") for figure in result.figures):
        _count(space, best, side, details, result)


def _count(space: Space, best: Values, side: str, details: dict[str, Any], result: SectionResult) -> None:
    """Copies by number, with notes on those that no test can judge."""
    usual = reference(space)
    threshold = memory.copy_threshold(usual)
    copies = int((best > threshold).sum())
    details |= {"threshold": threshold, "copies": copies, "reference_copies": int((usual > threshold).sum())}
    key = f"privacy.{space.name}.all.copies.value"
    if copies and not any(figure.key == key and figure.flagged for figure in result.figures):
        result.note(
            f"{copies} of {len(best)} {space.label} correlate above {threshold:.2f} with a {side} image. Too few for a "
            "test to tell; look at the pictured pairs.",
            key,
        )
    if space.to_train is not None and (leaked := int((space.to_held.max(axis=1) > threshold).sum())):
        result.note(
            f"{leaked} {space.label} correlate above {threshold:.2f} with a real image that is said to be held out. "
            "Either the generator saw it after all, or it resembles a training image."
        )


def _picture(space: Space, images: ImageSet, row: int) -> NDArray[np.uint8]:
    if space.name == "whole":
        return images.images[row]
    left, top, right, bottom = (round(edge) for edge in crop_box(images.masks[row], images.valid[row]))
    return images.images[row][top:bottom, left:right]
