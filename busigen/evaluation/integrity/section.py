"""Integrity: files, grey levels, masks, overlays and repeats, and the proof that backgrounds were left as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.integrity.measures import MEASURES, Facts, Measure, find_duplicates, image_facts
from busigen.evaluation.results import Better, Figure, Interval, Picture, SectionResult
from busigen.evaluation.statistics.grouped import (
    ALPHA,
    FEWEST_TO_FLAG,
    Comparison,
    Groups,
    adjusted,
    compare_distributions,
    compare_means,
)
from busigen.files import atomic_file
from busigen.registry import SYNTHETIC
from busigen.runtime.dataset.finalize import outline
from busigen.runtime.sampling.healthy_images import Backgrounds

KEY = "integrity.background.unproven"


def prove_backgrounds(context: AuditContext, result: SectionResult) -> None:
    """Compare every sample that names its healthy image with it, bit for bit outside the edit region.

    Adds one figure, and a flag where a background is not its healthy image's; a note where nothing can be proven.
    """
    images = context.synthetic
    named = [
        (row, str(name)) for row, name in enumerate(images.table["background"]) if name not in (None, SYNTHETIC, "real")
    ]
    if context.healthy is None:
        if named:
            result.note("The set was painted into real images; --healthy DIR proves that it left them as they were.")
        return
    if not named:
        result.note("--healthy was given, but no sample names a healthy image: nothing can be proven.")
        return
    backgrounds = Backgrounds.below(context.healthy)
    problems = []
    for row, sha256 in context.track("proving backgrounds", named, len(named)):
        if sha256 not in backgrounds.paths:
            # Whatever wrote the set's rows may name anything; what is not there proves nothing.
            problems.append(f"{images.table['id'][row]} names a healthy image that is not below --healthy.")
            continue
        problem = backgrounds.difference(sha256, images.images[row], images.masks[row])
        if problem is not None:
            problems.append(f"{images.table['id'][row]}: {problem.problem}")
    share = 100 * len(problems) / len(named)
    result.figures.append(
        Figure(
            key=KEY,
            label="Backgrounds that are not their healthy image's",
            value=Interval(share),
            floor=None,
            synthetic=len(named),
            real=len(backgrounds.paths),
            unit="%",
            flagged=bool(problems),
            note="Every pixel outside the edit region is compared; there is nothing to estimate, hence no interval.",
        )
    )
    if problems:
        result.flag(f"{len(problems)} of {len(named)} backgrounds are not proven. The first: {problems[0]}", KEY)
    else:
        result.note(
            f"All {len(named)} backgrounds equal their healthy image outside the edit region, bit for bit.", KEY
        )


_SIDE = 192
_LABEL = 18
_CONTOUR = (0, 200, 255)


Tile = tuple[NDArray[np.uint8], NDArray[np.bool_], str]
"""One image of ``uint8 (256, 256)``, the mask whose contour is drawn, and a short caption."""


def write_tiles(tiles: Sequence[Tile], path: Path, columns: int = 4) -> None:
    """Draw at least one image, row by row, into a PNG."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (_SIDE * columns, (_SIDE + _LABEL) * rows))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (image, mask, caption) in enumerate(tiles):
        left, top = place % columns * _SIDE, place // columns * (_SIDE + _LABEL)
        painted = Image.fromarray(outline(image, mask, _CONTOUR))
        sheet.paste(painted.resize((_SIDE - 2, _SIDE - 2), Image.Resampling.BILINEAR), (left, top))
        draw.text((left + 3, top + _SIDE), caption[:28], fill=(255, 255, 255), font=font)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


SHOWN = 12
_NAMED = 50


def run(context: AuditContext) -> SectionResult:
    """Look at files, grey levels, masks, overlays and repeats."""
    result = SectionResult("integrity")
    synthetic, real = context.synthetic, _comparable(context)
    context.progress.start("integrity", len(synthetic) + len(real), unit="image")
    (mine, twins), (theirs, _) = find_duplicates(synthetic), find_duplicates(real)
    facts = tuple(
        {**image_facts(part, lambda: context.progress.advance(1)), **found}
        for part, found in zip((synthetic, real), (mine, theirs), strict=True)
    )
    groups = Groups.of(synthetic.groups, real.groups, context.rng("integrity"))
    compared = [_compare(measure, facts[0], facts[1], groups) for measure in MEASURES]
    p_values = adjusted(
        np.array([np.nan if one is None or m.absolute else one.p for m, one in zip(MEASURES, compared, strict=True)])
    )
    thinned = _thinned(context, real)
    for measure, comparison, p in zip(MEASURES, compared, p_values, strict=True):
        if comparison is not None:
            _report(result, measure, comparison, float(p), facts[0], facts[1], thinned)
    _report_files(result, synthetic)
    if deep := int(np.nansum(facts[0]["depth"])):
        result.note(f"{deep} image files have more than 8 bits per pixel; they are judged at 8 bits.")
    prove_backgrounds(context, result)
    if min(len(synthetic), len(real)) < FEWEST_TO_FLAG:
        result.note(f"With fewer than {FEWEST_TO_FLAG} images on a side, nothing is flagged by comparison.")
    _pictures(context, result, facts[0], twins)
    result.details |= {
        "modes": dict(Counter(str(mode) for mode in synthetic.table["mode"])),
        "sizes": dict(
            Counter(f"{w}x{h}" for w, h in synthetic.table.select("width", "height").iter_rows()).most_common(10)
        ),
        "empty_masks": _names(synthetic, facts[0]["empty"] == 1),
        "repeated_images": _names(synthetic, mine["exact"] == 1),
        "refused": [refusal.to_dict() for refusal in synthetic.refused],
    }
    return result


def _comparable(context: AuditContext) -> ImageSet:
    """The real set, without its normals where the synthetic set has none: lesions change what an image looks like."""
    if (context.synthetic.classes == "normal").any():
        return context.real
    lesions = context.real.take(context.real.classes != "normal")
    return lesions if len(lesions) else context.real


def _compare(measure: Measure, synthetic: Facts, real: Facts, groups: Groups) -> Comparison | None:
    """The measure's comparison; None where one of the sets has no image it applies to."""
    scale = 100.0 if measure.unit == "%" else 1.0
    first, second = scale * synthetic[measure.fact], scale * real[measure.fact]
    counts = [int((~np.isnan(values)).sum()) for values in (first, second)]
    if counts[0] == 0 or (counts[1] == 0 and not measure.absolute):
        return None
    if measure.side is None:
        return compare_distributions(first, second, groups)
    comparison = compare_means(first, second, groups, measure.side)
    if not measure.repeats:
        return comparison
    return Comparison(comparison.value, comparison.floor, _repeats_p(first > 0, second > 0))


def _repeats_p(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """P-value of "the first set repeats itself no more often than the second" (Fisher's exact test, by image)."""
    table = [[int(rows.sum()), int((~rows).sum())] for rows in (first, second)]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def _thinned(context: AuditContext, real: ImageSet) -> Callable[[], Facts]:
    """Repeats in as many synthetic images as there are real ones, drawn at random; looked for once, when asked."""

    @cache
    def facts() -> Facts:
        rows = context.rng("integrity", "repeats").permutation(len(context.synthetic))[: len(real)]
        return find_duplicates(context.synthetic.take(np.sort(rows)))[0]

    return facts


def _report(
    result: SectionResult,
    measure: Measure,
    comparison: Comparison,
    p: float,
    synthetic: Facts,
    real: Facts,
    thinned: Callable[[], Facts],
) -> None:
    value, floor = comparison.value, comparison.floor
    known = not np.isnan(floor.value)
    counts = [int((~np.isnan(facts[measure.fact])).sum()) for facts in (synthetic, real)]
    less = measure.side == "less"
    low, high = (floor.low, floor.high) if known else (None, None)
    beyond = (low is not None and value.value < low) if less else value.value > (0.0 if high is None else high)
    tested = min(counts) >= FEWEST_TO_FLAG and p < ALPHA
    flagged = bool(beyond and (measure.absolute or tested))
    note = "" if measure.side is None else "The floor is the same in random halves of the real set."
    if measure.repeats and counts[0] != counts[1]:
        note += f" Repeats grow with a set's size, and here {counts[0]} images stand against {counts[1]}."
        if flagged and counts[0] > counts[1]:
            # The more images, the more pairs that can be alike: what is no more frequent at one size is no defect.
            alike = thinned()[measure.fact] > 0
            flagged = _repeats_p(alike, real[measure.fact] > 0) < ALPHA
            note += f" Of {counts[1]} drawn at random, {100 * alike.mean():.3g}% repeat another"
            note += "." if flagged else ", no more than can be chance: not flagged."
    better: Better = "higher" if less else "lower"
    figure = Figure(
        key=f"integrity.{measure.key}",
        label=measure.label,
        value=value,
        floor=floor if known else None,
        synthetic=counts[0],
        real=counts[1],
        better=better,
        unit=measure.unit,
        p=None if measure.absolute or np.isnan(p) else p,
        flagged=flagged,
        headline=measure.headline,
        note=note,
    )
    result.figures.append(figure)
    if flagged:
        result.flag(
            measure.defect.format(value=_text(value, measure.unit), floor=_text(floor, measure.unit)), figure.key
        )


def _text(interval: Interval, unit: str) -> str:
    return f"{interval.value:.3g} {unit}".strip().replace(" %", "%") if not np.isnan(interval.value) else "none"


def _report_files(result: SectionResult, synthetic: ImageSet) -> None:
    refused = synthetic.refused
    if refused:
        first = "; ".join(f"{refusal.file}: {refusal.problem}" for refusal in refused[:3])
        result.flag(f"{len(refused)} files or entries could not be used, for example: {first}")
    lesions = synthetic.classes != "normal"
    missing = int((lesions & (synthetic.table["mask_files"] == 0).to_numpy()).sum())
    if missing and missing == lesions.sum():
        result.flag("No image has a mask file, apart from normal ones: nothing can be said about masks.")
    elif missing:
        result.flag(f"{missing} of {lesions.sum()} images not labelled normal have no mask file.")
    unlabelled = int((synthetic.classes == "unknown").sum())
    if unlabelled:
        result.note(f"{unlabelled} images have no known class: figures per class leave them out.")


def _pictures(context: AuditContext, result: SectionResult, facts: Facts, twins: NDArray[np.int64]) -> None:
    images = context.synthetic
    folder = context.folder("integrity")
    off = np.nan_to_num(facts["displacement"], nan=-1.0)
    worst = np.lexsort((facts["contrast"], -off))[:SHOWN]
    worst = worst[off[worst] > 0]
    if len(worst):
        tiles = [(images.images[k], images.masks[k], f"{images.table['id'][int(k)]}: {off[k]:.0f} px") for k in worst]
        write_tiles(tiles, folder / "masks-worst.png")
        result.pictures.append(
            Picture("masks-worst.png", "Synthetic masks that lie farthest from an edge of their image.")
        )
    pairs = np.flatnonzero(twins >= 0)[: SHOWN // 2]
    if len(pairs):
        rows = [int(k) for pair in pairs for k in (pair, twins[pair])]
        tiles = [(images.images[k], images.masks[k], str(images.table["id"][k])) for k in rows]
        write_tiles(tiles, folder / "near-duplicates.png")
        result.pictures.append(
            Picture("near-duplicates.png", "Synthetic images that nearly equal another: pairs, side by side.")
        )


def _names(images: ImageSet, rows: NDArray[np.bool_]) -> list[str]:
    return [str(images.table["id"][int(row)]) for row in np.flatnonzero(rows)[:_NAMED]]
