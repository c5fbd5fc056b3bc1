"""The real-or-synthetic test: can a classifier tell the two sets apart, on whole images, lesions, or the seam alone?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from busigen.evaluation.context import CLEAN, AuditContext, Figure, ImageSet, Interval, Picture, SectionResult
from busigen.evaluation.realness import classifiers
from busigen.evaluation.realness.classifiers import VIEWS, Floats, Ints, Pixels, Ridge, Task, View, auc, bootstrap_auc
from busigen.evaluation.statistics import grouped
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, adjusted, halves
from busigen.registry import SYNTHETIC

SECTION = "realness"

FOLDS = 5
PERMUTATIONS = 999

_SHOWN = 15
_COLUMNS = 5


def run(context: AuditContext) -> SectionResult:
    """Train classifiers to tell the synthetic from the real set, by group-aware cross-validation.

    ``quick`` trains a ridge classifier on a fixed scattering network; ``full`` trains a ResNet as well. Flagged is a
    view on which the AUC's interval lies above what shuffled labels give, above what two halves of the real set give,
    and with an adjusted permutation p below ``ALPHA``. Wen et al. 2026 report an AUC of 0.563 on whole images.
    """
    result = SectionResult(SECTION)
    context = context.without_overlays()
    found: list[Figure] = []
    for view in context.track("Real or synthetic?", VIEWS.values(), len(VIEWS)):
        sides = _sides(context, view, result)
        if sides is not None:
            found += _separations(context, view, *sides, result)
    if found:
        _report(context, found, result)
        result.note(CLEAN)
    if context.backgrounds == "real":
        result.note(
            "The synthetic lesions were painted into real images, so most pixels of a whole image, and its coarse "
            "structure, are real: what counts here is the lesion crop and the ring around the outline."
        )
    band = {"ring_px": classifiers.BAND, "lesion_margin": classifiers.MARGIN}
    result.details["band"] = {**band, "folds": FOLDS, "permutations": PERMUTATIONS}
    return result


def _sides(context: AuditContext, view: View, result: SectionResult) -> tuple[ImageSet, ImageSet] | None:
    """Real and synthetic images of the classes that both sides have, or None with a note."""
    real, synthetic = context.real, context.synthetic
    name = view.label.capitalize()
    if view.name not in classifiers.WHOLE:
        real, synthetic = real.with_lesions(), synthetic.with_lesions()
    common = set(real.classes) & set(synthetic.classes)
    if common:
        left_out = (set(real.classes) | set(synthetic.classes)) - common
        real, synthetic = (s.take(np.isin(s.classes, sorted(common))) for s in (real, synthetic))
        if left_out:
            result.note(f"{name}: images of {', '.join(sorted(left_out))} are on one side only.")
    elif len(real) and len(synthetic):
        result.note(f"{name}: the sides share no class, so all images are compared with all.")
    for side, groups in (("real", real.groups), ("synthetic", _synthetic_groups(synthetic))):
        if (count := len(np.unique(groups))) < 4:
            result.note(f"{name}: not tested, the {side} set has {count} groups.")
            return None
    return real, synthetic


def _synthetic_groups(images: ImageSet) -> Ints:
    """Images that share a near-duplicate group or a real background belong together."""
    backgrounds = images.table["background"]
    # A synthetic background is drawn anew for every image and links none.
    rows = np.flatnonzero((backgrounds.is_not_null() & (backgrounds != SYNTHETIC)).to_numpy())
    _, group = np.unique(images.groups, return_inverse=True)
    _, background = np.unique(backgrounds.to_numpy()[rows].astype(np.str_), return_inverse=True)
    # Nodes are the images, then their groups, then their backgrounds.
    count = len(images)
    first = np.concatenate([np.arange(count), rows])
    second = np.concatenate([count + group, 2 * count + background])
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(3 * count, 3 * count))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component[:count], dtype=np.int64)


def _task(first: ImageSet, second: ImageSet, groups: tuple[Ints, Ints]) -> Task:
    names = np.concatenate([first.classes, second.classes])
    if not set(first.classes) & set(second.classes):
        names[:] = ""
    return Task(
        side=np.repeat([0, 1], [len(first), len(second)]),
        label=np.unique(names, return_inverse=True)[1].astype(np.int64),
        group=grouped.joint_groups(*groups),
    )


def _fold_count(task: Task) -> int:
    return min(FOLDS, *(len(np.unique(task.group[task.side == side])) for side in (0, 1)))


def _halved(real: ImageSet, rows: tuple[Ints, Ints], seed: int) -> tuple[Task, Ints] | None:
    """The task of telling two halves of the real set apart, and its folds; None for too few groups."""
    first, second = real.take(rows[0]), real.take(rows[1])
    task = _task(first, second, (first.groups, second.groups))
    count = _fold_count(task)
    return (task, classifiers.folds(task, count, seed)) if count > 1 else None


def _ridge_floor(context: AuditContext, view: View, real: ImageSet, features: NDArray[np.float32]) -> Interval | None:
    values = []
    rng = context.rng(SECTION, view.name, "floor")
    for _ in range(grouped.HALVINGS):
        rows = halves(real.groups, rng)
        if (part := _halved(real, rows, context.seed)) is not None:
            values.append(auc(Ridge(features[np.concatenate(rows)], *part).scores(part[0].side), *part))
    known = [value for value in values if not np.isnan(value)]
    return grouped.middle(known) if known else None


def _separations(
    context: AuditContext, view: View, real: ImageSet, synthetic: ImageSet, result: SectionResult
) -> list[Figure]:
    crops = view.of(synthetic)
    pixels = np.concatenate([view.of(real), crops])
    task = _task(real, synthetic, (real.groups, _synthetic_groups(synthetic)))
    fold = classifiers.folds(task, _fold_count(task), context.seed)
    rng = context.rng(SECTION, view.name)

    def shuffled() -> list[Task]:
        return [replace(task, side=classifiers.shuffled_sides(task, rng)) for _ in range(PERMUTATIONS)]

    def judged(key: str, label: str, scores: Floats, nulls: list[float], floor: Interval | None, note: str) -> Figure:
        """The figure of one classifier, its p-value not yet adjusted; where shuffled labels lie is kept in details."""
        value = auc(scores, task, fold)
        low, high = np.nanpercentile(nulls, [2.5, 97.5]).tolist()
        note = f"{note} Shuffled labels give {low:.2f} to {high:.2f} in 95 of 100 cases."
        key, label = f"{SECTION}.{view.name}.{key}", f"{label}, {view.label}"
        p = (1 + sum(other >= value for other in nulls)) / (len(nulls) + 1)
        result.details[key] = {"null_low": low, "null_high": high, "p": p}
        interval = Interval(value, *bootstrap_auc(scores, task, fold, rng))
        return Figure(key, label, interval, floor, len(synthetic), len(real), p=p, note=note)

    features = classifiers.scattering_features(pixels, view.cells, context.device)
    ridge = Ridge(features, task, fold)
    scores = ridge.scores(task.side)
    nulls = [auc(ridge.scores(other.side), other, fold) for other in shuffled()]
    note = "Ridge classifier on a fixed two-layer scattering network, trained anew for every permutation."
    found = [judged("auc", "AUC", scores, nulls, _ridge_floor(context, view, real, features[: len(real)]), note)]
    if view.name == "lesion":
        _show_extremes(context, crops, scores[task.side == 1], result)
    if context.effort == "full":
        # Its null shuffles labels under fixed scores, its floor is one halving; more would take trainings.
        scores = classifiers.resnet_scores(pixels, task, fold, seed=context.seed, device=context.device)
        nulls = [auc(scores, other, fold) for other in shuffled()]
        rows = halves(real.groups, rng)
        floor = None
        if (part := _halved(real, rows, context.seed)) is not None:
            halved = pixels[np.concatenate(rows)]
            own = classifiers.resnet_scores(halved, *part, seed=context.seed, device=context.device)
            floor = Interval(auc(own, *part), *bootstrap_auc(own, *part, rng))
        name = classifiers.network_name(context.device)
        note = f"{name} of MONAI, from random weights. The floor is one halving with its bootstrap interval."
        found.append(judged(f"{name}.auc", f"AUC of {name}", scores, nulls, floor, note))
    return found


def _report(context: AuditContext, found: list[Figure], result: SectionResult) -> None:
    p_values = adjusted(np.array([figure.p for figure in found], dtype=np.float64))
    for figure, p in zip(found, p_values, strict=True):
        value, floor, null_high = figure.value, figure.floor, result.details[figure.key]["null_high"]
        low = value.low if value.low is not None else 0.0
        limit = floor.high if floor is not None and floor.high is not None else null_high
        few = min(figure.synthetic, figure.real) < FEWEST_TO_FLAG
        flagged = bool(not few and p < ALPHA and low > null_high and value.value > limit)
        background = figure.key.split(".")[1] in classifiers.WHOLE
        headline = not background or context.backgrounds != "real"
        note = figure.note + (f" Fewer than {FEWEST_TO_FLAG} images on a side: never flagged." if few else "")
        result.figures.append(replace(figure, p=float(p), flagged=flagged, headline=headline, note=note))
        if flagged:
            what = figure.label.removeprefix("AUC").lstrip(", ")
            seen = f"AUC {value.value:.2f}, where shuffled labels reach {null_high:.2f}"
            result.flag(f"A classifier tells the set from real images ({what}): {seen}.", figure.key)
    _plot(context.folder(SECTION) / "auc.svg", found, result.details)
    caption = "AUC with its interval, what shuffled labels give (grey), and halves of the real set (line)."
    result.pictures.append(Picture("auc.svg", caption))


def _show_extremes(context: AuditContext, crops: Pixels, scores: NDArray[np.float64], result: SectionResult) -> None:
    """Sheets of the synthetic lesions that the classifier takes for real most and least firmly."""
    order, side = np.argsort(scores, kind="stable"), crops.shape[1]
    for file, rows, caption in (
        ("convincing.png", order[:_SHOWN], "Synthetic lesions that the classifier takes for real most firmly."),
        ("obvious.png", order[::-1][:_SHOWN], "Synthetic lesions that the classifier recognises most firmly."),
    ):
        sheet = Image.new("L", (_COLUMNS * side, -(-len(rows) // _COLUMNS) * side))
        for k, crop in enumerate(crops[rows]):
            sheet.paste(Image.fromarray(crop), (k % _COLUMNS * side, k // _COLUMNS * side))
        sheet.save(context.folder(SECTION) / file, optimize=True)
        result.pictures.append(Picture(file, caption))


def _plot(file: Path, found: list[Figure], details: dict[str, Any]) -> None:
    """Draw one line per classifier and view as SVG: AUC with interval, null band as a bar, floor as a thin line."""
    canvas = Canvas(figsize=(6.4, 0.9 + 0.45 * len(found)), layout="constrained")
    axes = canvas.subplots()
    for y, figure in enumerate(found):
        value, floor, null = figure.value, figure.floor, details[figure.key]
        axes.barh(y, null["null_high"] - null["null_low"], left=null["null_low"], height=0.5, color="0.85")
        if floor is not None and floor.low is not None and floor.high is not None:
            axes.plot([floor.low, floor.high], [y + 0.32] * 2, color="0.45", linewidth=1)
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [y, y], color="C0", linewidth=2)
        axes.plot(value.value, y, "o", color="C0")
    axes.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0.3, 1.01), ylim=(len(found) - 0.4, -0.6), yticks=range(len(found)), xlabel="AUC")
    axes.set_yticklabels([figure.label for figure in found])
    axes.spines[["top", "right"]].set_visible(False)
    # Without a salt of its own, every run names the paths of a drawing differently.
    with rc_context({"svg.hashsalt": "busigen"}):
        canvas.savefig(file, format="svg", metadata={"Date": None})
