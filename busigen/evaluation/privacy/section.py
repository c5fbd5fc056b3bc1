"""Privacy: whether the set shows or betrays the images that its generator was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.privacy import memorisation as memory
from busigen.evaluation.privacy.memorisation import Measure, Values
from busigen.evaluation.privacy.nearest import Space, align, crop_box, image_space, radiomic_space
from busigen.evaluation.report.text import PRIVACY
from busigen.evaluation.results import Better, Figure, Picture, SectionResult
from busigen.evaluation.statistics.grouped import (
    ALPHA,
    FEWEST_TO_FLAG,
    Rows,
    adjusted,
    bootstrap,
    disjoint_draws,
    middle,
)
from busigen.files import atomic_path
from busigen.runtime.storage.files import output_errors

PERMUTATIONS = {"quick": 1999, "full": 9999}
"""Group permutations per test. With 15 tests, fewer could not get one adjusted p-value below ``ALPHA``."""

FLOOR_DRAWS = 100

FEWEST_GROUPS = 4
"""Independent images a side without which there is nothing to exchange."""


@dataclass(frozen=True)
class _Sample:
    """Values of one side of a test, with their groups."""

    values: Values
    groups: Rows

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class _Test:
    """A two-sample measure. Its floor is the same between halves of ``floor``, by default of the second side."""

    name: str
    label: str
    measure: Measure
    first: _Sample
    second: _Sample
    note: str
    floor: _Sample | None = None
    headline: bool = False
    better: Better = "lower"


def figures_of(context: AuditContext, space: Space, result: SectionResult) -> list[Figure]:
    """All figures of one space.

    Returns:
        Figures whose ``p`` is not adjusted yet, none of them flagged.
    """
    tests = _without_train(space) if space.train is None else _with_train(space)
    if min(len(np.unique(sample.groups)) for test in tests for sample in (test.first, test.second)) < FEWEST_GROUPS:
        result.note(
            f"Too few independent images for the tests on {space.label}: at least {FEWEST_GROUPS} a side are needed."
        )
        return []
    figures = []
    for test in context.track(f"testing {space.label}", tests, len(tests)):
        figures.append(_figure(context, space, test))
    if space.to_train is not None:
        figures.append(_preference(context, space))
    return figures


def reference(space: Space) -> Values:
    """``(H,)``: what is usual between a real image and its nearest neighbour.

    Held-out images against the training images or, where there are none, against held-out images of other groups.
    """
    if space.held_to_train is not None:
        return np.asarray(space.held_to_train.max(axis=1))
    assert space.within is not None
    groups = space.held.groups
    return np.asarray(np.where(groups[:, None] == groups[None, :], -1.0, space.within).max(axis=1))


def _without_train(space: Space) -> list[_Test]:
    note = "compared with the real images, since no training images are known; reference: real images of other groups"
    synthetic = _Sample(space.to_held.max(axis=1), space.groups)
    return [_copies(space, synthetic, _Sample(reference(space), space.held.groups), note)]


def _with_train(space: Space) -> list[_Test]:
    assert space.train is not None and space.to_train is not None and space.held_to_train is not None
    nearest = _Sample(space.to_train.max(axis=1), space.groups)
    usual = _Sample(reference(space), space.held.groups)
    members = _Sample(space.to_train.max(axis=0), space.train.groups)
    others = _Sample(space.to_held.max(axis=0), space.held.groups)
    tests = [
        _Test(
            "nearer",
            "nearer to training images than held-out images are",
            memory.auc,
            nearest,
            usual,
            "chance that a synthetic image lies nearer to its training neighbour than a held-out image to its own "
            "(Meehan et al. 2020); flagged only together with the preference for training images, because blur or a "
            "narrow choice of images brings it about too",
        ),
        _Test(
            "membership",
            "membership inference AUC",
            memory.auc,
            members,
            others,
            "an attacker who ranks real images by their nearest synthetic one; 0.5 tells nothing",
            headline=space.name == "crop",
        ),
        _Test(
            "detected",
            "members found at 1 % false alarms",
            memory.detected,
            members,
            others,
            "the same attacker, sure of himself (Carlini et al. 2022)",
        ),
    ]
    if space.within is not None:
        mine, others_own = (
            _Sample(memory.authentic(to, space.within, space.train.groups).astype(np.float64), groups)
            for to, groups in ((space.to_train, space.groups), (space.held_to_train, space.held.groups))
        )
        note = "share not nearer to a training image than that is to other patients' (Alaa et al. 2022)"
        # Held-out images are authentic by definition, so their own figure is what is usual.
        tests.append(_Test("authenticity", "authenticity", _mean, mine, others_own, note, others_own, better="higher"))
    else:
        note = "reference: held-out images against the training images"
        tests.append(_copies(space, nearest, usual, note))
    return tests


def _copies(space: Space, nearest: _Sample, usual: _Sample, note: str) -> _Test:
    threshold = memory.copy_threshold(usual.values)
    above = int((usual.values > threshold).sum())
    return _Test(
        "copies",
        "copied images",
        memory.copied_share,
        nearest,
        usual,
        f"share that correlates above {threshold:.3f} with its neighbour: {memory.COPY_SIGMAS:g} robust standard "
        f"deviations above the usual one; {above} of {len(usual)} reference images do; {note}",
        headline=True,
    )


def _mean(first: Values, second: Values) -> float:
    return float(first.mean())


def _figure(context: AuditContext, space: Space, test: _Test) -> Figure:
    rng = context.rng("privacy", space.name, test.name)
    first, second = test.first, test.second
    against: Measure = (
        test.measure if test.better == "lower" else lambda first, second: float(second.mean() - first.mean())
    )

    def measured(a: Rows, b: Rows) -> float:
        # Neighbours are found before any image is repeated, so repeats do no harm.
        return test.measure(first.values[a], second.values[b])

    value = bootstrap(measured, rng, first.groups, second.groups)
    floor = test.floor or test.second
    halves = disjoint_draws(floor.groups, len(floor) // 2, rng, FLOOR_DRAWS)
    generated = [test.measure(floor.values[a], floor.values[b]) for a, b in halves]
    return Figure(
        key=f"privacy.{space.name}.all.{test.name}.value",
        label=f"{test.label}, {space.label}",
        value=value,
        floor=middle(generated),
        synthetic=len(space.synthetic),
        real=len(space.held) + (0 if space.train is None else len(space.train)),
        better=test.better,
        p=memory.permuted_p(
            against, first.values, first.groups, second.values, second.groups, rng, PERMUTATIONS[context.effort]
        ),
        headline=test.headline,
        note=test.note,
    )


def _preference(context: AuditContext, space: Space) -> Figure:
    assert space.train is not None and space.to_train is not None
    rng = context.rng("privacy", space.name, "preference")
    count = PERMUTATIONS[context.effort]
    groups = space.train.groups, space.held.groups
    value, exchanged = memory.training_preference(space.to_train, space.to_held, *groups, rng, count)
    nearer = (space.to_train.max(axis=1) >= space.to_held.max(axis=1)).astype(np.float64)
    chance = float(nearer.mean()) - value
    spread = bootstrap(lambda rows: float(nearer[rows].mean()) - chance, rng, space.groups)
    return Figure(
        key=f"privacy.{space.name}.all.preference.value",
        label=f"preference for training images, {space.label}",
        value=replace(spread, value=value),
        floor=middle(exchanged),
        synthetic=len(space.synthetic),
        real=len(space.held) + len(space.train),
        p=float((np.sum(exchanged >= value - 1e-12) + 1) / (count + 1)),
        note="share whose nearest real image is a training image, less the training images' share of the real ones; "
        "floor: the same with 'trained on' and 'held out' exchanged between groups",
    )


TILE = 140
"""Side of a tile in pixels. Eight columns of two tiles stay below 400 kB even if nothing could be compressed."""

COLUMNS = 8
_TEXT = 14


def write_pairs(path: Path, pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]) -> None:
    """Write at most `COLUMNS` pairs of grey images of any size: the first above, the second below, the text beneath."""
    shown = pairs[:COLUMNS]
    sheet = Image.new("L", (TILE * max(len(shown), 1), 2 * TILE + _TEXT), 255)
    draw = ImageDraw.Draw(sheet)
    for column, (above, below, text) in enumerate(shown):
        for row, pixels in enumerate((above, below)):
            tile = Image.fromarray(pixels).resize((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * TILE + 1, row * TILE + 1))
        draw.text((column * TILE + 3, 2 * TILE + 1), text, fill=0)
    with output_errors(path.parent), atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


LISTED = 20
"""Nearest pairs listed in ``details``."""


def run(context: AuditContext) -> SectionResult:
    """Look for training images in the synthetic set.

    Args:
        context: The audit. Without ``train`` only copies of ``real`` images can be found.

    Returns:
        Figures ``privacy.<crop|whole|radiomic>.all.<measure>.value``, the nearest pairs as pictures, and in ``details``
        the thresholds and the nearest pairs by name.
    """
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
