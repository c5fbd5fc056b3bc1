"""Privacy: whether the set shows or betrays the images that its generator was trained on, by nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from busigen.evaluation.context import AuditContext, Better, Figure, ImageSet, Picture, SectionResult
from busigen.evaluation.fidelity.section import judge
from busigen.evaluation.privacy import nearest
from busigen.evaluation.privacy.nearest import Space, Values, Views
from busigen.evaluation.report.text import PRIVACY
from busigen.evaluation.statistics import grouped
from busigen.evaluation.statistics.grouped import ALPHA, Rows, adjusted, bootstrap, middle
from busigen.files import atomic_path
from busigen.runtime.storage.files import output_errors

PERMUTATIONS = {"quick": 1999, "full": 9999}  # Per test; fewer give 15 tests no adjusted p-value below ALPHA

FLOOR_DRAWS = 100

FEWEST_GROUPS = 4  # Independent images a side without which there is nothing to exchange
LISTED = 20  # Nearest pairs listed in details
COLUMNS = 8  # Nearest pairs shown
TILE = 140  # Side of a tile in pixels. Eight columns of two tiles stay below 400 kB even if nothing could be compressed
_TEXT = 14

Measure = Callable[[Values, Values], float]
Sample = tuple[Values, Rows]  # Values of one side of a test, with their groups.


@dataclass(frozen=True)
class _Test:
    """A two-sample measure; its floor is the same between halves of the second side."""

    name: str
    label: str
    measure: Measure
    first: Sample
    second: Sample
    note: str
    headline: bool = False
    better: Better = "lower"


def run(context: AuditContext) -> SectionResult:
    """Look for training images in the synthetic set; without ``context.train`` only copies of ``real`` can be found.

    Figures are ``privacy.<crop|whole|radiomic>.all.<measure>.value``; the nearest pairs are shown and listed.
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
    spaces = [space for name in ("crop", "whole") if (space := nearest.image_space(context, name)) is not None]
    if spaces and spaces[0].name == "crop":
        radiomic = nearest.radiomic_space(context, spaces[0])
        spaces += [radiomic] if radiomic is not None else []
    else:
        result.note("There are no lesions to compare: the synthetic, the training or the real set has none.")
    if unshared := [space.label for space in spaces if not space.shared]:
        result.note(
            f"Training and held-out images share no class ({', '.join(unshared)}), so all of them were compared. Where "
            "their classes really differ, and not just their names, that difference can pass for memory."
        )
    _judge(context, [(space, figure) for space in spaces for figure in _figures(context, space, result)], result)
    for space in spaces:
        if space.views is not None:
            _show(context, space, space.views, result)
    return result


def _figures(context: AuditContext, space: Space, result: SectionResult) -> list[Figure]:
    """All figures of one space; ``p`` is not adjusted yet."""
    tests = _tests(space)
    if min(len(np.unique(groups)) for test in tests for _, groups in (test.first, test.second)) < FEWEST_GROUPS:
        fewest = f"at least {FEWEST_GROUPS} a side are needed"
        result.note(f"Too few independent images for the tests on {space.label}: {fewest}.")
        return []
    figures = [_figure(context, space, test) for test in context.track(f"testing {space.label}", tests, len(tests))]
    if space.train is not None and space.to_train is not None:
        figures.append(_preference(context, space, space.train, space.to_train))
    return figures


def _tests(space: Space) -> list[_Test]:
    usual = space.usual, space.held.groups
    if space.train is None or space.to_train is None or space.held_to_train is None:
        note = "compared with the real images, since no training images are known"
        mine = space.to_held.max(axis=1), space.groups
        return [_copies(mine, usual, f"{note}; reference: real images of other groups")]
    mine = space.to_train.max(axis=1), space.groups
    members = space.to_train.max(axis=0), space.train.groups
    others = space.to_held.max(axis=0), space.held.groups
    nearer = (
        "chance that a synthetic image lies nearer to its training neighbour than a held-out image to its own "
        "(Meehan et al. 2020); flagged only together with the preference for training images, because blur or a "
        "narrow choice of images brings it about too"
    )
    attack = "an attacker who ranks real images by their nearest synthetic one; 0.5 tells nothing"
    sure = "the same attacker, sure of himself (Carlini et al. 2022)"
    crop = space.name == "crop"
    tests = [
        _Test("nearer", "nearer to training images than held-out images are", nearest.auc, mine, usual, nearer),
        _Test("membership", "membership inference AUC", nearest.auc, members, others, attack, headline=crop),
        _Test("detected", "members found at 1 % false alarms", nearest.detected, members, others, sure),
    ]
    if space.within is None:
        return [*tests, _copies(mine, usual, "reference: held-out images against the training images")]
    # Held-out images are authentic by definition, so their own figure is what is usual.
    own, theirs = (
        (nearest.authentic(to, space.within, space.train.groups).astype(np.float64), groups)
        for to, groups in ((space.to_train, space.groups), (space.held_to_train, space.held.groups))
    )
    note = "share not nearer to a training image than that is to other patients' (Alaa et al. 2022)"
    return [
        *tests,
        _Test("authenticity", "authenticity", lambda a, _: float(a.mean()), own, theirs, note, better="higher"),
    ]


def _copies(mine: Sample, usual: Sample, note: str) -> _Test:
    threshold = nearest.copy_threshold(usual[0])
    above = int((usual[0] > threshold).sum())
    note = (
        f"share that correlates above {threshold:.3f} with its neighbour: {nearest.COPY_SIGMAS:g} robust standard "
        f"deviations above the usual one; {above} of {len(usual[0])} reference images do; {note}"
    )
    return _Test("copies", "copied images", nearest.copied_share, mine, usual, note, headline=True)


def _figure(context: AuditContext, space: Space, test: _Test) -> Figure:
    rng = context.rng("privacy", space.name, test.name)
    (first, first_groups), (second, second_groups) = test.first, test.second
    joint = np.concatenate([first, second])

    def against(a: Rows, b: Rows) -> float:
        """Greater values speak against the set."""
        one, other = joint[a], joint[b]
        return test.measure(one, other) if test.better == "lower" else float(other.mean() - one.mean())

    # Neighbours are found before any image is repeated, so repeats do no harm.
    value = bootstrap(lambda a, b: test.measure(first[a], second[b]), rng, first_groups, second_groups)
    halves = grouped.disjoint_draws(second_groups, len(second) // 2, rng, FLOOR_DRAWS)
    floor = middle([test.measure(second[a], second[b]) for a, b in halves])
    count = PERMUTATIONS[context.effort]
    observed = against(np.arange(len(first)), np.arange(len(first), len(joint)))
    exchanged = grouped.permutations(first_groups, second_groups, rng, count)
    beyond = sum(against(a, b) >= observed for a, b in exchanged)
    key, label = f"privacy.{space.name}.all.{test.name}.value", f"{test.label}, {space.label}"
    counts = len(space.synthetic), len(space.held) + (0 if space.train is None else len(space.train))
    p = (beyond + 1) / (count + 1)
    return Figure(key, label, value, floor, *counts, test.better, p=p, headline=test.headline, note=test.note)


def _preference(context: AuditContext, space: Space, train: ImageSet, to_train: Values) -> Figure:
    """How much more often a synthetic image's nearest real neighbour is a training image than chance would have it.

    Chance is exact here: had the generator seen neither set, exchanging "trained on" and "held out" between groups
    changed nothing. So this cannot mistake blur, noise or a narrow choice of images for memory.
    """
    rng = context.rng("privacy", space.name, "preference")
    joint = grouped.joint_groups(train.groups, space.held.groups)
    neighbour = np.concatenate([to_train, space.to_held], axis=1).argmax(axis=1)
    hits = np.bincount(neighbour, minlength=len(joint))
    value = float(hits[: len(train)].sum() / len(neighbour) - len(train) / len(joint))
    parts = grouped.rows_by_group(joint)
    sizes = grouped.sizes_of(parts)
    votes = np.array([hits[part].sum() for part in parts])
    exchanged = np.empty(PERMUTATIONS[context.effort])
    for k in range(len(exchanged)):
        order, cut = grouped.deal(sizes, len(train), rng)
        exchanged[k] = votes[order[:cut]].sum() / len(neighbour) - sizes[order[:cut]].sum() / len(joint)
    nearer = (to_train.max(axis=1) >= space.to_held.max(axis=1)).astype(np.float64)
    chance = float(nearer.mean()) - value
    spread = bootstrap(lambda rows: float(nearer[rows].mean()) - chance, rng, space.groups)
    key, label = f"privacy.{space.name}.all.preference.value", f"preference for training images, {space.label}"
    p = float((np.sum(exchanged >= value - 1e-12) + 1) / (len(exchanged) + 1))
    note = (
        "share whose nearest real image is a training image, less the training images' share of the real ones; "
        "floor: the same with 'trained on' and 'held out' exchanged between groups"
    )
    interval, floor = replace(spread, value=value), middle(exchanged)
    return Figure(key, label, interval, floor, len(space.synthetic), len(joint), p=p, note=note)


def _judge(context: AuditContext, found: list[tuple[Space, Figure]], result: SectionResult) -> None:
    """Adjust the p-values for their number, flag, and say so in words."""
    p_values = np.array([figure.p for _, figure in found], dtype=np.float64)
    # Copies are what the section exists for: a family of their own, so that the indirect tests do not dilute them.
    copies = np.array([figure.key.endswith(".copies.value") for _, figure in found], dtype=np.bool_)
    for family in (copies, ~copies):
        p_values[family] = adjusted(p_values[family])
    p_of = {figure.key: float(p) for (_, figure), p in zip(found, p_values, strict=True)}
    for space, figure in found:
        p = p_of[figure.key]
        by_construction = space.name == "whole" and context.backgrounds == "real"
        if by_construction:
            never = "never flagged: whole images painted into real ones copy those by construction"
            figure = replace(figure, note=f"{figure.note}; {never}")
        preferring = p_of.get(f"privacy.{space.name}.all.preference.value", 1.0) < ALPHA
        alone = figure.key.endswith(".nearer.value") and not preferring
        smallest = min(len(part) for part in (space.synthetic, space.train, space.held) if part is not None)
        judge(figure, p, smallest, "real images", result, allowed=not by_construction and not alone)


def _show(context: AuditContext, space: Space, views: tuple[Views, Views], result: SectionResult) -> None:
    """Nearest pairs as a picture and by name and, where there are enough images to judge, copies by number."""
    similarity = space.to_train if space.to_train is not None else space.to_held
    others, side = (space.held, "real") if space.train is None else (space.train, "training")
    best = similarity.max(axis=1)
    pairs, listed = [], []
    for row in np.argsort(-best, kind="stable")[:LISTED].tolist():
        column = int(similarity[row].argmax())
        correlation, mirrored = nearest.align(views[0][row], views[1][column])
        names = {"synthetic": space.synthetic.table["id"][row], side: others.table["id"][column]}
        listed.append({**names, "correlation": round(correlation, 4), "mirrored": mirrored})
        text = f"{correlation:.3f}{', mirrored' if mirrored else ''}"
        pairs.append((_picture(space, space.synthetic, row), _picture(space, others, column), text))
    details: dict[str, Any] = {"nearest": listed}
    result.details[space.name] = details
    _write_pairs(context.folder("privacy") / f"nearest-{space.name}.png", pairs[:COLUMNS])
    caption = f"Nearest {side} neighbours of {space.label}: synthetic above, {side} image below, correlation beneath."
    result.pictures.append(Picture(f"nearest-{space.name}.png", caption))
    # Too few images for a figure are too few for a threshold.
    if not any(figure.key.startswith(f"privacy.{space.name}.") for figure in result.figures):
        return
    threshold = nearest.copy_threshold(space.usual)
    copies = int((best > threshold).sum())
    details |= {"threshold": threshold, "copies": copies, "reference_copies": int((space.usual > threshold).sum())}
    key = f"privacy.{space.name}.all.copies.value"
    if copies and not result.figure(key).flagged:
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
    left, top, right, bottom = map(round, nearest.crop_box(images.masks[row], images.valid[row]))
    return images.images[row][top:bottom, left:right]


def _write_pairs(path: Path, pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]) -> None:
    """Write pairs of grey images of any size: the first above, the second below, the text beneath."""
    sheet = Image.new("L", (TILE * max(len(pairs), 1), 2 * TILE + _TEXT), 255)
    draw = ImageDraw.Draw(sheet)
    for column, (above, below, text) in enumerate(pairs):
        for row, pixels in enumerate((above, below)):
            tile = Image.fromarray(pixels).resize((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * TILE + 1, row * TILE + 1))
        draw.text((column * TILE + 3, 2 * TILE + 1), text, fill=0)
    with output_errors(path.parent), atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
