"""Integrity: files, grey levels, masks, overlays and repeats, and the proof that backgrounds were left as they were."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats

from busigen.data.geometry import around
from busigen.data.overlays import find_overlays
from busigen.data.splits import NEAR_DUPLICATE, unit
from busigen.evaluation import grids
from busigen.evaluation.context import AuditContext, Better, Figure, ImageSet, Interval, Picture, SectionResult
from busigen.evaluation.reading.sets import thumbnails
from busigen.evaluation.statistics import grouped
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, Comparison, Groups
from busigen.files import atomic_file
from busigen.records import read_json
from busigen.registry import SYNTHETIC
from busigen.runtime.dataset.finalize import outline
from busigen.runtime.sampling.inputs.healthy_images import Backgrounds

Facts = dict[str, NDArray[np.float64]]  # One number per image, by name; NaN where it has none.


@dataclass(frozen=True)
class Measure:
    """One figure of the section, of a ``fact`` of `image_facts` or `find_duplicates`.

    Attributes:
        defect: Sentence of the finding, with ``{value}`` and ``{floor}``.
        side: Where the synthetic mean must lie to be a defect; None compares distributions.
        unit: ``%`` for shares.
        absolute: Flagged without a test wherever it exceeds the floor.
        repeats: Tested by image, not by group: repeats make up a group, and it is their number that counts.
    """

    fact: str
    key: str
    label: str
    defect: str
    side: grouped.Side | None = "greater"
    unit: str = "%"
    absolute: bool = False
    repeats: bool = False
    headline: bool = False


MEASURES = tuple(Measure(**row) for row in read_json(Path(__file__).with_suffix(".json")))  # In the order of the report
REACH, STEP = 16, 2  # Farthest displacement in pixels, down and across, at which an outline is tried, and the step
BLUR = 2.0  # Width in pixels of the Gaussian before the gradient, above a speckle grain: speckle has edges everywhere
MIN_OUTLINE = 24  # Outline pixels on the image, away from its rim, that a judgement needs
RIM = 3  # Pixels along the image's rim that do not count: the step to a letterbox bar is no lesion's edge
TINY, HUGE = 0.002, 0.60  # Shares of the image beyond which a mask is tiny or huge; BUSI's lesions take 0.003 to 0.56
SPECK = 9  # Pixels below which a part of a mask is a speck that resampling may have left
SHOWN = 12  # Masks, or images of near-duplicates, in a picture
_NAMED, _BLOCK = 50, 512
_SIDE, _LABEL = 192, 18
_CONTOUR = (0, 200, 255)
_FACTS = (
    *("empty", "contradiction", "aspect", "levels", "range", "clipped", "text", "calipers"),
    *("tiny", "huge", "parts", "holes", "border", "displacement", "contrast"),
)


def run(context: AuditContext) -> SectionResult:
    """Look at files, grey levels, masks, overlays and repeats."""
    result = SectionResult("integrity")
    synthetic, real = context.synthetic, context.real
    # Lesions change what an image looks like.
    if not (synthetic.classes == "normal").any() and (real.classes != "normal").any():
        real = real.take(real.classes != "normal")
    context.progress.start("integrity", len(synthetic) + len(real), unit="image")
    (repeats, twins), (real_repeats, _) = find_duplicates(synthetic), find_duplicates(real)
    mine, theirs = (
        {**image_facts(part, lambda: context.progress.advance(1)), **found}
        for part, found in ((synthetic, repeats), (real, real_repeats))
    )

    @cache
    def thinned() -> Facts:
        """Repeats in as many synthetic images as there are real ones, drawn at random."""
        rows = context.rng("integrity", "repeats").permutation(len(synthetic))[: len(real)]
        return find_duplicates(synthetic.take(np.sort(rows)))[0]

    groups = Groups(synthetic.groups, real.groups, context.rng("integrity"))
    compared = [(one, found) for one in MEASURES if (found := _compare(one, mine, theirs, groups)) is not None]
    p_values = grouped.adjusted(np.array([np.nan if measure.absolute else one.p for measure, one in compared]))
    for (measure, comparison), p in zip(compared, p_values, strict=True):
        _report(result, measure, comparison, float(p), mine, theirs, thinned)
    _report_files(result, synthetic)
    if deep := int(np.nansum(mine["depth"])):
        result.note(f"{deep} image files have more than 8 bits per pixel; they are judged at 8 bits.")
    _prove_backgrounds(context, result)
    grids.prove(context, result)
    if min(len(synthetic), len(real)) < FEWEST_TO_FLAG:
        result.note(f"With fewer than {FEWEST_TO_FLAG} images on a side, nothing is flagged by comparison.")
    _draw_pictures(context, result, mine, twins)
    sizes = Counter(f"{w}x{h}" for w, h in synthetic.table.select("width", "height").iter_rows())
    names = synthetic.table["id"].to_list()
    result.details |= {
        "modes": dict(Counter(str(mode) for mode in synthetic.table["mode"])),
        "sizes": dict(sizes.most_common(10)),
        "empty_masks": [names[row] for row in np.flatnonzero(mine["empty"] == 1)[:_NAMED]],
        "repeated_images": [names[row] for row in np.flatnonzero(mine["exact"] == 1)[:_NAMED]],
        "refused": [refusal.to_dict() for refusal in synthetic.refused],
    }
    return result


def _compare(measure: Measure, synthetic: Facts, real: Facts, groups: Groups) -> Comparison | None:
    """The measure's comparison; None where one of the sets has no image it applies to."""
    scale = 100.0 if measure.unit == "%" else 1.0
    first, second = scale * synthetic[measure.fact], scale * real[measure.fact]
    if np.isnan(first).all() or (np.isnan(second).all() and not measure.absolute):
        return None
    if measure.side is None:
        return grouped.compare_distributions(first, second, groups)
    comparison = grouped.compare_means(first, second, groups, measure.side)
    if not measure.repeats:
        return comparison
    return Comparison(comparison.value, comparison.floor, _repeats_p(first > 0, second > 0))


def _repeats_p(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """P-value of "the first set repeats itself no more often than the second" (Fisher's exact test, by image)."""
    table = [[int(rows.sum()), int((~rows).sum())] for rows in (first, second)]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


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
    counts = [int((~np.isnan(facts[measure.fact])).sum()) for facts in (synthetic, real)]
    less = measure.side == "less"
    low, high = (None, None) if floor is None else (floor.low, floor.high)
    beyond = (low is not None and value.value < low) if less else value.value > (high or 0.0)
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
    key, p_value = f"integrity.{measure.key}", None if measure.absolute or np.isnan(p) else p
    figure = Figure(key, measure.label, value, floor, counts[0], counts[1], unit=measure.unit, p=p_value, note=note)
    better: Better = "higher" if less else "lower"
    result.figures.append(replace(figure, better=better, flagged=flagged, headline=measure.headline))
    if flagged:
        unit = measure.unit if measure.unit == "%" else f" {measure.unit}".rstrip()
        texts = ["none" if one is None else f"{one.value:.3g}{unit}" for one in (value, floor)]
        result.flag(measure.defect.format(value=texts[0], floor=texts[1]), key)


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


def _prove_backgrounds(context: AuditContext, result: SectionResult) -> None:
    """Compare every sample that names its healthy image with it, bit for bit outside the edit region."""
    images = context.synthetic
    names = enumerate(images.table["background"])
    named = [(row, str(name)) for row, name in names if name not in (None, SYNTHETIC, "real")]
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
        # Whatever wrote the set's rows may name anything; what is not there proves nothing.
        if sha256 not in backgrounds.paths:
            problems.append(f"{images.table['id'][row]} names a healthy image that is not below --healthy.")
        elif problem := backgrounds.difference(sha256, images.images[row], _parts(images.masks[row])):
            problems.append(f"{images.table['id'][row]}: {problem.problem}")
    key, share = "integrity.background.unproven", Interval(100 * len(problems) / len(named))
    label, counts = "Backgrounds that are not their healthy image's", (len(named), len(backgrounds.paths))
    note = "Every pixel outside the edit region is compared; there is nothing to estimate, hence no interval."
    result.figures.append(Figure(key, label, share, None, *counts, unit="%", flagged=bool(problems), note=note))
    if problems:
        result.flag(f"{len(problems)} of {len(named)} backgrounds are not proven. The first: {problems[0]}", key)
    else:
        result.note(
            f"All {len(named)} backgrounds equal their healthy image outside the edit region, bit for bit.", key
        )


def _draw_pictures(context: AuditContext, result: SectionResult, facts: Facts, twins: NDArray[np.int64]) -> None:
    names = context.synthetic.table["id"].to_list()
    off = np.nan_to_num(facts["displacement"], nan=-1.0)
    worst = np.lexsort((facts["contrast"], -off))[:SHOWN]
    worst = worst[off[worst] > 0]
    pairs = np.flatnonzero(twins >= 0)[: SHOWN // 2]
    pairs = np.stack([pairs, twins[pairs]], axis=1).ravel()
    masks = Picture("masks-worst.png", "Synthetic masks that lie farthest from an edge of their image.")
    twice = Picture("near-duplicates.png", "Synthetic images that nearly equal another: pairs, side by side.")
    for picture, rows, captions in (
        (masks, worst, [f"{names[k]}: {off[k]:.0f} px" for k in worst]),
        (twice, pairs, [names[k] for k in pairs]),
    ):
        if len(rows):
            _write_tiles(context.synthetic.take(rows), captions, context.folder("integrity") / picture.file)
            result.pictures.append(picture)


def _write_tiles(images: ImageSet, captions: Sequence[str], path: Path) -> None:
    """Draw at least one image with its mask's contour, row by row, into a PNG."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (_SIDE * columns, (_SIDE + _LABEL) * rows))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, caption in enumerate(captions):
        left, top = place % columns * _SIDE, place // columns * (_SIDE + _LABEL)
        painted = Image.fromarray(outline(images.images[place], images.masks[place], _CONTOUR))
        sheet.paste(painted.resize((_SIDE - 2, _SIDE - 2), Image.Resampling.BILINEAR), (left, top))
        draw.text((left + 3, top + _SIDE), caption[:28], fill=(255, 255, 255), font=font)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def image_facts(images: ImageSet, done: Callable[[], None]) -> Facts:
    """Measure every image, and call ``done`` after each.

    Returns:
        Shares, as 0 and 1: ``colour``, ``depth`` (more or less than 8 bits), ``text`` and ``calipers`` (as seen in the
        working frame, so that sets of any resolution compare), ``empty`` (no lesion marked, in an image not labelled
        normal that has a mask file), ``contradiction`` (a lesion marked in a normal image); and, NaN for empty masks,
        ``tiny``, ``huge``, ``parts`` (more than mask files), ``holes``, ``border``. Numbers: ``aspect`` (width / height
        of the image), ``levels`` (distinct grey levels), ``range`` (99th less 1st percentile of grey), ``clipped``
        (share of pixels at 255), ``displacement`` and ``contrast`` of `edge_fit`.
    """
    rows = []
    # Where there is no mask file, nobody marked nothing: that is another defect, and said apart.
    to_mark = (images.classes != "normal") & (images.table["mask_files"] > 0).to_numpy()
    files = images.table["mask_files"]
    frames = zip(images.images, images.masks, images.valid, images.classes, to_mark, files, strict=True)
    for image, mask, valid, label, lesion, marks in frames:
        marked = bool(mask.any())
        row = {"empty": float(not marked)} if lesion else {}
        if label == "normal":
            row["contradiction"] = float(marked)
        if valid.any():
            grey, overlays = image[valid], find_overlays(image[around(valid, 0)])
            low, high = np.percentile(grey, [1, 99])
            row |= {
                "aspect": float(valid.any(axis=0).sum() / valid.any(axis=1).sum()),
                "levels": float(len(np.unique(grey))),
                "range": float(high - low),
                "clipped": float((grey == 255).mean()),
                "text": float(overlays.text),
                "calipers": float(overlays.calipers),
            }
        if marked:
            row |= _mask_facts(image, mask, valid, marks)
        rows.append(row)
        done()
    facts = {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float64) for name in _FACTS}
    facts["colour"] = images.table["colour"].to_numpy().astype(np.float64)
    modes = images.table["mode"].to_list()
    facts["depth"] = np.array([np.nan if mode is None else float(mode[0] in "IF") for mode in modes])
    return facts


def _mask_facts(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], valid: NDArray[np.bool_], files: int
) -> dict[str, float]:
    area = mask.sum() / max(int(valid.sum()), 1)
    sizes = np.bincount(ndimage.label(mask, structure=np.ones((3, 3)))[0].ravel())[1:]
    rim = valid & ~ndimage.binary_erosion(valid)
    return {
        "tiny": float(area < TINY),
        "huge": float(area > HUGE),
        "parts": float((sizes >= SPECK).sum() > max(files, 1)),
        "holes": float((ndimage.binary_fill_holes(mask) & ~mask).sum() >= SPECK),
        "border": float((mask & rim).any()),
        **edge_fit(image, mask, valid),
    }


def edge_fit(image: NDArray[np.uint8], mask: NDArray[np.bool_], valid: NDArray[np.bool_]) -> dict[str, float]:
    """How well an outline fits in its place, compared with every place up to ``REACH`` pixels away.

    In each place the smoothed image's gradient is averaged along the outline's outward normals: nearly all lesions are
    darker than what is around them. ``displacement`` is the distance to the place that fits best, 0 to 22.6 pixels;
    ``contrast`` is the average in the outline's own place, standardised over all places tried. Empty where less than
    ``MIN_OUTLINE`` pixels of outline lie on the image.
    """
    inside = ndimage.binary_erosion(valid, iterations=RIM)
    rows, columns = np.nonzero((mask ^ ndimage.binary_erosion(mask)) & inside)
    if len(rows) < MIN_OUTLINE:
        return {}
    slope = np.gradient(ndimage.gaussian_filter(image.astype(np.float32), BLUR))
    normal = -np.stack(np.gradient(ndimage.gaussian_filter(mask.astype(np.float32), BLUR)))[:, rows, columns]
    normal /= np.linalg.norm(normal, axis=0) + 1e-6
    steps = np.arange(-REACH, REACH + 1, STEP)
    down, across = (part.ravel()[:, None] for part in np.meshgrid(steps, steps, indexing="ij"))
    distance = np.hypot(down, across).ravel()
    down, across = rows + down, columns + across
    height, width = image.shape
    within = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    down, across = down.clip(0, height - 1), across.clip(0, width - 1)
    within &= inside[down, across]
    rise = (slope[0][down, across] * normal[0] + slope[1][down, across] * normal[1]) * within
    fit = rise.sum(axis=1) / np.maximum(within.sum(axis=1), 1)
    # A place where most of the outline hangs over the rim is judged by too little of it.
    tried = within.mean(axis=1) >= 0.5
    here = int(np.argmin(distance))
    if not tried[here]:
        return {}
    best = int(np.argmax(np.where(tried, fit, -np.inf)))
    contrast = (fit[here] - fit[tried].mean()) / (fit[tried].std() + 1e-6)
    return {"displacement": float(distance[best]), "contrast": float(contrast)}


def _parts(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """A mask as a whole, which may be of one lesion, and each of its parts, which may be lesions of their own."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return [mask, *(labels == number for number in range(1, count + 1))]


def find_duplicates(images: ImageSet) -> tuple[Facts, NDArray[np.int64]]:
    """Which images repeat an earlier one, as facts of 0 and 1, and the most alike of the earlier ones, or -1.

    ``exact``: the same pixels. ``near``: thumbnails correlate above ``splits.NEAR_DUPLICATE``; pairs painted into one
    background do not count. ``mask``: the same lesion mask, pixel by pixel.
    """
    small = thumbnails(images)
    # Images of one background are alike by construction: each that shares none gets a name of its own.
    names = enumerate(zip(images.table["background"], grids.groups_of(images), strict=True))
    named = [group or (name if name not in (None, SYNTHETIC) else f"#{row}") for row, (name, group) in names]
    _, background = np.unique(np.array(named, dtype=np.str_), return_inverse=True)
    twin = np.full(len(images), -1, np.int64)
    rows = np.arange(len(images))
    for start in range(0, len(images), _BLOCK):
        block = rows[start : start + _BLOCK, None]
        before = rows[: start + _BLOCK]
        other = (before < block) & (background[before] != background[block])
        alike = np.where(other, unit(small[block[:, 0]]) @ unit(small[before]).T, -1.0)
        best = alike.argmax(axis=1)
        twin[block[:, 0]] = np.where(alike.max(axis=1) > NEAR_DUPLICATE, best, -1)
    marked = np.asarray(images.masks.any(axis=(1, 2)))
    found = {"exact": _repeats(images.images), "near": twin >= 0, "mask": _repeats(images.masks) & marked}
    return {name: repeated.astype(np.float64) for name, repeated in found.items()}, twin


def _repeats(arrays: NDArray[np.uint8] | NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which arrays equal an earlier one."""
    digests = [hashlib.sha256(np.ascontiguousarray(array).data).digest() for array in arrays]
    return ~pl.Series(digests, dtype=pl.Binary).is_first_distinct().to_numpy()
