"""The real-or-synthetic test: can a classifier tell the two sets apart, on whole images, lesions, or the seam alone?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from busigen.evaluation.context import CLEAN, AuditContext, ImageSet
from busigen.evaluation.realness.classifiers import (
    BAND,
    MARGIN,
    VIEWS,
    Ints,
    Ridge,
    Task,
    View,
    auc,
    bootstrap_auc,
    folds,
    network_name,
    resnet_scores,
    scattering_features,
    shuffled_sides,
)
from busigen.evaluation.results import Figure, Interval, Picture, SectionResult
from busigen.evaluation.statistics.grouped import (
    ALPHA,
    FEWEST_TO_FLAG,
    HALVINGS,
    RESAMPLES,
    adjusted,
    halves,
    joint_groups,
    middle,
)
from busigen.registry import SYNTHETIC

SECTION = "realness"

FOLDS = 5
PERMUTATIONS = 999

_SHOWN = 15
_REAL_BACKGROUNDS = (
    "The synthetic lesions were painted into real images, so most pixels of a whole image are real: what counts here "
    "is the lesion crop and the ring around the outline."
)


_Separation = tuple[Figure, tuple[float, ...]]
"""What one classifier makes of one view, its p-value not yet adjusted, and where shuffled labels lie."""


def run(context: AuditContext) -> SectionResult:
    """Train classifiers to tell the synthetic from the real set, by group-aware cross-validation.

    Flagged is a view on which the AUC's interval lies above what shuffled labels give, above what two halves of the
    real set give, and with an adjusted permutation p below ``ALPHA``. Wen et al. (J. Med. Imaging 13(2) 024002, 2026)
    report an AUC of 0.563 for a ResNet101 on whole images.

    Args:
        context: The audit. ``quick`` trains a ridge classifier on a fixed scattering network; ``full`` trains a ResNet
            as well.
    """
    result = SectionResult(SECTION)
    context = context.without_overlays()
    found: list[_Separation] = []
    for view in context.track("Real or synthetic?", VIEWS.values(), len(VIEWS)):
        sides = _sides(context, view, result)
        if sides is not None:
            found += _separations(context, view, *sides, result)
    if found:
        _report(context, found, result)
        result.note(CLEAN)
    if context.backgrounds == "real":
        result.note(_REAL_BACKGROUNDS)
    result.details["band"] = {"ring_px": BAND, "lesion_margin": MARGIN, "folds": FOLDS, "permutations": PERMUTATIONS}
    return result


def _sides(context: AuditContext, view: View, result: SectionResult) -> tuple[ImageSet, ImageSet] | None:
    """Real and synthetic images of the classes that both sides have, or None with a note."""
    real, synthetic = context.real, context.synthetic
    if view.name != "whole":
        real, synthetic = real.with_lesions(), synthetic.with_lesions()
    common = set(real.classes) & set(synthetic.classes)
    if common:
        left_out = (set(real.classes) | set(synthetic.classes)) - common
        real, synthetic = (s.take(np.isin(s.classes, sorted(common))) for s in (real, synthetic))
        if left_out:
            result.note(f"{view.label.capitalize()}: images of {', '.join(sorted(left_out))} are on one side only.")
    elif len(real) and len(synthetic):
        result.note(f"{view.label.capitalize()}: the sides share no class, so all images are compared with all.")
    for side, groups in (("real", real.groups), ("synthetic", _synthetic_groups(synthetic))):
        if len(np.unique(groups)) < 4:
            result.note(f"{view.label.capitalize()}: not tested, the {side} set has {len(np.unique(groups))} groups.")
            return None
    return real, synthetic


def _synthetic_groups(images: ImageSet) -> Ints:
    """Images that share a near-duplicate group or a real background belong together."""
    # A synthetic background is drawn anew for every image: the word that stands there instead of a hash links none.
    backgrounds = [None if name == SYNTHETIC else name for name in images.table["background"]]
    _, group = np.unique(images.groups, return_inverse=True)
    names = {name: k for k, name in enumerate(sorted({b for b in backgrounds if b is not None}))}
    rows = [k for k, name in enumerate(backgrounds) if name is not None]
    nodes = len(images) + len(images) + len(names)
    first = [*range(len(images)), *rows]
    second = [*(len(images) + group), *(2 * len(images) + names[backgrounds[k]] for k in rows)]
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    return np.asarray(component[: len(images)], dtype=np.int64)


def _task(first: ImageSet, second: ImageSet, groups: tuple[Ints, Ints]) -> Task:
    names = np.concatenate([first.classes, second.classes])
    if not set(first.classes) & set(second.classes):
        names[:] = ""
    return Task(
        side=np.repeat([0, 1], [len(first), len(second)]),
        label=np.unique(names, return_inverse=True)[1].astype(np.int64),
        group=joint_groups(*groups),
    )


def _fold_count(task: Task) -> int:
    return min(FOLDS, *(len(np.unique(task.group[task.side == side])) for side in (0, 1)))


def _separations(
    context: AuditContext, view: View, real: ImageSet, synthetic: ImageSet, result: SectionResult
) -> list[_Separation]:
    pixels = view.of(real), view.of(synthetic)
    task = _task(real, synthetic, (real.groups, _synthetic_groups(synthetic)))
    fold = folds(task, _fold_count(task), context.seed)
    features = scattering_features(np.concatenate(pixels), view.cells, context.device)
    ridge = Ridge(features, task, fold)
    rng = context.rng(SECTION, view.name)
    nulls = []
    for _ in range(PERMUTATIONS):
        side = shuffled_sides(task, rng)
        nulls.append(auc(ridge.scores(side), replace(task, side=side), fold))
    scores = ridge.scores(task.side)
    found = [
        _separation(
            f"{SECTION}.{view.name}.auc",
            f"AUC, {view.label}",
            scores,
            task,
            fold,
            nulls,
            _ridge_floor(context, view, real, features[: len(real)]),
            rng,
            "Ridge classifier on a fixed two-layer scattering network, trained anew for every permutation.",
        )
    ]
    if view.name == "lesion":
        _sheets(context, pixels[1], scores[task.side == 1], result)
    if context.effort == "full":
        found.append(_trained_separation(context, view, np.concatenate(pixels), real, task, fold, rng))
    return found


def _separation(
    key: str,
    label: str,
    scores: NDArray[np.float64],
    task: Task,
    fold: Ints,
    nulls: list[float],
    floor: Interval | None,
    rng: np.random.Generator,
    note: str,
) -> _Separation:
    value = auc(scores, task, fold)
    low, high = bootstrap_auc(scores, task, fold, rng, RESAMPLES)
    null = tuple(np.nanpercentile(nulls, [2.5, 97.5]).tolist())
    p = (1 + sum(other >= value for other in nulls)) / (len(nulls) + 1)
    figure = Figure(
        key=key,
        label=label,
        value=Interval(value, low, high),
        floor=floor,
        synthetic=int((task.side == 1).sum()),
        real=int((task.side == 0).sum()),
        p=p,
        note=f"{note} Shuffled labels give {null[0]:.2f} to {null[1]:.2f} in 95 of 100 cases.",
    )
    return figure, null


def _halved(real: ImageSet, rows: tuple[Ints, Ints], seed: int) -> tuple[Task, Ints] | None:
    first, second = real.take(rows[0]), real.take(rows[1])
    task = _task(first, second, (first.groups, second.groups))
    count = _fold_count(task)
    return (task, folds(task, count, seed)) if count > 1 else None


def _ridge_floor(context: AuditContext, view: View, real: ImageSet, features: NDArray[np.float32]) -> Interval | None:
    rng = context.rng(SECTION, view.name, "floor")
    values = []
    for _ in range(HALVINGS):
        rows = halves(real.groups, rng)
        halved = _halved(real, rows, context.seed)
        if halved is not None:
            ridge = Ridge(features[np.concatenate(rows)], *halved)
            values.append(auc(ridge.scores(halved[0].side), *halved))
    known = [value for value in values if not np.isnan(value)]
    return middle(known) if known else None


def _trained_separation(
    context: AuditContext,
    view: View,
    pixels: NDArray[np.uint8],
    real: ImageSet,
    task: Task,
    fold: Ints,
    rng: np.random.Generator,
) -> _Separation:
    """A ResNet's: its null shuffles labels under fixed scores, its floor is one halving; more would take trainings."""
    scores = resnet_scores(pixels, task, fold, seed=context.seed, device=context.device)
    nulls = [auc(scores, replace(task, side=shuffled_sides(task, rng)), fold) for _ in range(PERMUTATIONS)]
    rows = halves(real.groups, rng)
    halved = _halved(real, rows, context.seed)
    floor = None
    if halved is not None:
        part = resnet_scores(pixels[np.concatenate(rows)], *halved, seed=context.seed, device=context.device)
        floor = Interval(auc(part, *halved), *bootstrap_auc(part, *halved, rng, RESAMPLES))
    name = network_name(context.device)
    note = f"{name} of MONAI, from random weights. The floor is one halving with its bootstrap interval."
    key, label = f"{SECTION}.{view.name}.{name}.auc", f"AUC of {name}, {view.label}"
    return _separation(key, label, scores, task, fold, nulls, floor, rng, note)


def _report(context: AuditContext, found: list[_Separation], result: SectionResult) -> None:
    p_values = adjusted(np.array([figure.p for figure, _ in found], dtype=np.float64))
    for (figure, null), p in zip(found, p_values, strict=True):
        low = figure.value.low if figure.value.low is not None else 0.0
        limit = figure.floor.high if figure.floor is not None and figure.floor.high is not None else null[1]
        few = min(figure.synthetic, figure.real) < FEWEST_TO_FLAG
        flagged = bool(not few and p < ALPHA and low > null[1] and figure.value.value > limit)
        result.figures.append(
            replace(
                figure,
                p=float(p),
                flagged=flagged,
                headline=".whole." not in figure.key or context.backgrounds != "real",
                note=figure.note + (f" Fewer than {FEWEST_TO_FLAG} images on a side: never flagged." if few else ""),
            )
        )
        result.details[figure.key] = {"null_low": null[0], "null_high": null[1], "p": figure.p}
        if flagged:
            what = figure.label.removeprefix("AUC").lstrip(", ")
            result.flag(
                f"A classifier tells the set from real images ({what}): AUC {figure.value.value:.2f}, where shuffled "
                f"labels reach {null[1]:.2f}.",
                figure.key,
            )

    plot(context.folder(SECTION) / "auc.svg", [(one.label, one.value, null, one.floor) for one, null in found])
    result.pictures.append(
        Picture(
            "auc.svg", "AUC with its interval, what shuffled labels give (grey), and halves of the real set (line)."
        )
    )


def _sheets(
    context: AuditContext, crops: NDArray[np.uint8], scores: NDArray[np.float64], result: SectionResult
) -> None:
    order = np.argsort(scores, kind="stable")
    sheets: tuple[tuple[str, Ints, str], ...] = (
        ("convincing.png", order[:_SHOWN], "Synthetic lesions that the classifier takes for real most firmly."),
        ("obvious.png", order[::-1][:_SHOWN], "Synthetic lesions that the classifier recognises most firmly."),
    )
    for file, rows, caption in sheets:
        _sheet(crops[rows]).save(context.folder(SECTION) / file, optimize=True)
        result.pictures.append(Picture(file, caption))


def _sheet(crops: NDArray[np.uint8], columns: int = 5) -> Image.Image:
    side = crops.shape[1]
    sheet = Image.new("L", (columns * side, -(-len(crops) // columns) * side))
    for k, crop in enumerate(crops):
        sheet.paste(Image.fromarray(crop), (k % columns * side, k // columns * side))
    return sheet


Row = tuple[str, Interval, tuple[float, ...], Interval | None]
"""Label, AUC, null band, floor."""


def plot(file: Path, rows: Sequence[Row]) -> None:
    """Draw one line per classifier and view as SVG: AUC with interval, null band as a bar, floor as a thin line."""
    canvas = Canvas(figsize=(6.4, 0.9 + 0.45 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for y, (_, value, null, floor) in enumerate(rows):
        axes.barh(y, null[1] - null[0], left=null[0], height=0.5, color="0.85")
        if floor is not None and floor.low is not None and floor.high is not None:
            axes.plot([floor.low, floor.high], [y + 0.32] * 2, color="0.45", linewidth=1)
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [y, y], color="C0", linewidth=2)
        axes.plot(value.value, y, "o", color="C0")
    axes.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0.3, 1.01), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), xlabel="AUC")
    axes.set_yticklabels([row[0] for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(file, format="svg", metadata={"Date": None})
