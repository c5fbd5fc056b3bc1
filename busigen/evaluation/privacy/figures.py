"""The figures of the privacy section: which samples are compared, by which measure, against which floor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from busigen.evaluation.comparing.matched import Groups, disjoint_draws
from busigen.evaluation.comparing.statistics import RESAMPLES, resample, rows_by_group
from busigen.evaluation.context import AuditContext
from busigen.evaluation.privacy import memorisation as memory
from busigen.evaluation.privacy.memorisation import Measure, Values
from busigen.evaluation.privacy.similarity import Space
from busigen.evaluation.results import Better, Figure, Interval, SectionResult

PERMUTATIONS = {"quick": 1999, "full": 9999}
"""Group permutations per test. With 15 tests, fewer could not get one adjusted p-value below ``ALPHA``."""

FLOOR_DRAWS = 100

FEWEST_GROUPS = 4
"""Independent images a side without which there is nothing to exchange."""


@dataclass(frozen=True)
class _Sample:
    """Values of one side of a test, with their groups."""

    values: Values
    groups: Groups

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

    Args:
        context: The audit.
        space: Similarities.
        result: Gets a note where there are too few images.

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
    sides = (test.first.values, test.first.groups, test.second.values, test.second.groups)
    against: Measure = (
        test.measure if test.better == "lower" else lambda first, second: float(second.mean() - first.mean())
    )
    low, high = memory.interval(test.measure, *sides, rng, RESAMPLES)
    floor = test.floor or test.second
    halves = disjoint_draws(floor.groups, len(floor) // 2, rng, FLOOR_DRAWS)
    drawn = [test.measure(floor.values[a], floor.values[b]) for a, b in halves]
    lowest, middle, highest = np.percentile(drawn, [2.5, 50.0, 97.5])
    return Figure(
        key=f"privacy.{space.name}.all.{test.name}.value",
        label=f"{test.label}, {space.label}",
        value=Interval(test.measure(test.first.values, test.second.values), low, high),
        floor=Interval(float(middle), float(lowest), float(highest)),
        synthetic=len(space.synthetic),
        real=len(space.held) + (0 if space.train is None else len(space.train)),
        better=test.better,
        p=memory.permuted_p(against, *sides, rng, PERMUTATIONS[context.effort]),
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
    parts = rows_by_group(space.groups)
    drawn = [float(nearer[resample(parts, rng)].mean()) - chance for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    lowest, middle, highest = np.percentile(exchanged, [2.5, 50.0, 97.5])
    return Figure(
        key=f"privacy.{space.name}.all.preference.value",
        label=f"preference for training images, {space.label}",
        value=Interval(value, float(low), float(high)),
        floor=Interval(float(middle), float(lowest), float(highest)),
        synthetic=len(space.synthetic),
        real=len(space.held) + len(space.train),
        p=float((np.sum(exchanged >= value - 1e-12) + 1) / (count + 1)),
        note="share whose nearest real image is a training image, less the training images' share of the real ones; "
        "floor: the same with 'trained on' and 'held out' exchanged between groups",
    )
