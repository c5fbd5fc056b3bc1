"""From figures to sentences: what a set of differing features says about the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from busigen.evaluation.physics.features import Feature
from busigen.evaluation.results import Figure, SectionResult
from busigen.records import read_json

CLEAR_SHIFT = 0.1
"""Distance of Mann-Whitney's probability from a half beyond which one set's values are called greater."""

SWAPPED = 0.5
"""Classes beyond the middle between their own place and the other's are called exchanged."""

MOST_SENTENCES = 12
"""Features that get a sentence of their own; the rest are counted."""


@dataclass(frozen=True)
class Evidence:
    """What one feature shows in one scope.

    Attributes:
        scope: A class, or ``all``.
        shift: Probability that a synthetic value exceeds a real one, minus 0.5.
        medians: Of the synthetic and of the real values.
        ranges: The same between their quartiles.
    """

    feature: Feature
    scope: str
    figures: tuple[Figure, ...]
    shift: float
    medians: Sequence[float]
    ranges: Sequence[float]

    @property
    def flagged(self) -> bool:
        """One of its figures is."""
        return any(figure.flagged for figure in self.figures)

    @property
    def excess(self) -> float:
        """The greatest ratio of a value to its floor's upper end; 0 without floors."""
        return max((_excess(figure) for figure in self.figures), default=0.0)

    @property
    def worst(self) -> Figure:
        """The figure with that ratio; flagged ones come first."""
        return max(self.figures, key=lambda figure: (figure.flagged, _excess(figure)))


def _excess(figure: Figure) -> float:
    if figure.floor is None or not figure.floor.high:
        return 0.0
    return figure.value.value / figure.floor.high


@dataclass(frozen=True)
class Pattern:
    """A defect that shows in several features at once.

    Attributes:
        raised: Features that it raises.
        lowered: Features that it lowers.
        needed: How many of them must have moved so.
        still: Features of which none is flagged, or another defect explains it: noise hides margins as well.
        mirrored: One whose median must also have changed sign, by at least half of its size; empty for none.
    """

    text: str
    raised: Sequence[str]
    lowered: Sequence[str]
    needed: int
    still: Sequence[str] = ()
    mirrored: str = ""


PATTERNS = tuple(Pattern(**row) for row in read_json(Path(__file__).with_name("patterns.json")))
"""In the order of the report."""


def describe(evidence: list[Evidence], result: SectionResult) -> None:
    """Add the flags to a result that holds its figures: what features say together, then one by one."""
    for figure in result.figures:
        if figure.flagged and figure.key.endswith("classes.swap"):
            swap = figure.value.value
            result.flag(
                "Classes look exchanged: benign images resemble real malignant ones, and the other way round."
                if swap >= SWAPPED
                else f"Benign and malignant images differ only {100 * (1 - 2 * swap):.0f} % as far as real ones do.",
                figure.key,
            )
    flagged: dict[str, list[Evidence]] = {}
    for item in evidence:
        if item.flagged:
            flagged.setdefault(item.feature.name, []).append(item)
    for pattern in PATTERNS:
        _describe_pattern(pattern, flagged, result)
    items = list(flagged.values())
    for same in items[:MOST_SENTENCES]:
        result.flag(_sentence(same), *(item.worst.key for item in same))
    if rest := items[MOST_SENTENCES:]:
        labels = ", ".join(same[0].feature.label for same in rest)
        result.flag(f"{len(rest)} more features differ: {labels}.", *(same[0].worst.key for same in rest))


def _describe_pattern(pattern: Pattern, flagged: dict[str, list[Evidence]], result: SectionResult) -> None:
    keys = []
    for names, sign in ((pattern.raised, 1.0), (pattern.lowered, -1.0)):
        for name in names:
            moved = [item for item in flagged.get(name, []) if item.shift * sign > CLEAR_SHIFT]
            keys += [item.worst.key for item in moved[:1]]
    if len(keys) < pattern.needed or not flagged.keys().isdisjoint(pattern.still):
        return
    if pattern.mirrored:
        medians = [item.medians for item in flagged.get(pattern.mirrored, [])]
        if not any(synthetic * real < -(real**2) / 2 for synthetic, real in medians):
            return
    result.flag(pattern.text, *keys)


def _sentence(same: list[Evidence]) -> str:
    worst = same[0]
    feature = worst.feature
    scopes = ", ".join(item.scope for item in same)
    if abs(worst.shift) > CLEAR_SHIFT:
        claim = f"The images {feature.more if worst.shift > 0 else feature.less}"
    else:
        narrower = worst.ranges[0] < worst.ranges[1]
        claim = f"The images' {feature.label} varies {'less' if narrower else 'otherwise'} than real"
    unit = f" {feature.unit}" if feature.unit else ""
    figure = worst.worst
    floor = "" if figure.floor is None else f", floor up to {figure.floor.high:.2f}"
    mine, theirs = (f"{median:.3g}{unit}" for median in worst.medians)
    measured = f"{feature.label[0].upper()}{feature.label[1:]}: median {mine} against {theirs}"
    return f"{claim} ({scopes}). {measured} ({worst.scope}; distance {figure.value.value:.2f}{floor})."
