"""Text, calipers, rulers and badges that scanners paint into images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import grow, highest, lowest, shrink

# What `find_overlays` looks for, in pixels, grey levels and numbers of strokes.
STROKE_WIDTH, STROKE_HEIGHT = 7, 4  # A bright run along a row below it can be a pen stroke; least run down a column.
STROKE_CONTRAST, CROSS_CONTRAST = 40.0, 36.0  # Of a stroke over its sides, of a caliper's arms over its quadrants.
NOISE_FACTOR = 4.0  # Both also exceed the mean stroke contrast by it: grainy images are full of short runs.
LINE_STROKES, WORD_STROKES = 5, 3  # Side by side: a line of text; a word, or badge, in which a cross is no caliper.
LINE_HEIGHT = (6, 30)  # Least and greatest height of a line of text.
CORNER_SIDE = 40  # From the upper left corner: a cross in there is part of a badge rather than a caliper.

_Level = TypeVar("_Level", np.uint8, np.int16)
_Mask = NDArray[np.bool_]
_LINE_GAP, _ARM, _GROW = 13, 4, 2
_STRAIGHT = ((-1, 0), (1, 0), (0, -1), (0, 1))
_OBLIQUE = ((-1, -1), (-1, 1), (1, -1), (1, 1))


@dataclass(frozen=True)
class Overlays:
    """What is suspected in one image: a line of text, two calipers, and ``bool (H, W)`` pixels with 2 around them."""

    text: bool
    calipers: bool
    mask: _Mask


def find_overlays(pixels: NDArray[np.uint8]) -> Overlays:
    """Text and calipers in native grey levels, ``uint8 (H, W)``.

    Ultrasound is much finer along the beam than across it, so thin bright structures in it lie flat; those that stand
    upright with crisp sides are pen strokes, and several side by side are text. A caliper is a bright cross with four
    dark quadrants, and comes in pairs.

    A suspicion is nearly always right (by eye, on 18 images each of BUSI and BUS-BRA: 18 of 18 with ``text``, 17 with
    ``calipers``), its absence proves nothing (9 of 18 still had a faint, dark or single caliper or a ruler).
    """
    contrast = _top_hat(pixels, STROKE_WIDTH // 2, axis=1)
    noise = NOISE_FACTOR * float(contrast.mean())
    strokes = _upright_runs(contrast >= max(STROKE_CONTRAST, noise), STROKE_HEIGHT)
    lines, words = _text(strokes)
    # Lines two pixels wide have their middle between pixels; the maximum of 2 x 2 makes both kinds alike.
    bright = np.pad(highest(highest(pixels, 1, 0, axis=0), 1, 0, axis=1), _ARM, mode="edge")
    dark = np.pad(pixels, _ARM, mode="edge")
    excess = np.maximum(_excess(bright, dark, _STRAIGHT, _OBLIQUE), _excess(bright, dark, _OBLIQUE, _STRAIGHT))
    crosses = (excess >= max(CROSS_CONTRAST, noise)) & ~words
    crosses[:CORNER_SIDE, :CORNER_SIDE] = False
    spots = grow(crosses, _ARM)
    calipers = bool(crosses.any()) and ndimage.label(spots)[1] >= 2
    marked = strokes | lines | (spots if calipers else False)
    return Overlays(text=bool(lines.any()), calipers=calipers, mask=grow(marked, _GROW))


def _text(strokes: _Mask) -> tuple[_Mask, _Mask]:
    """Boxes around strokes that stand side by side: lines of text, and anything that may be a word."""
    lines, words = np.zeros_like(strokes), np.zeros_like(strokes)
    numbers, count = ndimage.label(strokes, structure=np.ones((3, 3)))
    if count < WORD_STROKES:
        return lines, words
    clusters, _ = ndimage.label(highest(strokes.view(np.uint8), _LINE_GAP // 2, _LINE_GAP // 2, axis=1))
    for box in ndimage.find_objects(clusters):
        members = np.count_nonzero(np.unique(numbers[box]))
        height, width = (side.stop - side.start for side in box)
        if members >= WORD_STROKES:
            words[box] = True
        tall = LINE_HEIGHT[0] <= height <= LINE_HEIGHT[1]
        if members >= LINE_STROKES and tall and width - _LINE_GAP >= 2 * height:
            lines[box] = True
    return lines, words


def _shifted(padded: NDArray[_Level], margin: int, down: int, right: int) -> NDArray[_Level]:
    """The array without ``margin`` pixels on each side, moved."""
    height, width = (side - 2 * margin for side in padded.shape)
    return padded[margin + down : margin + down + height, margin + right : margin + right + width]


def _excess(
    bright: NDArray[np.uint8],
    dark: NDArray[np.uint8],
    arms: tuple[tuple[int, int], ...],
    quadrants: tuple[tuple[int, int], ...],
) -> NDArray[np.int16]:
    """By how much the darkest point of the arms exceeds the brightest quadrant, ``int16 (H, W)``."""
    darkest = _shifted(bright, _ARM, 0, 0)
    for down, right in arms:
        for reach in (2, 3):
            darkest = np.minimum(darkest, _shifted(bright, _ARM, down * reach, right * reach))
    reach = 3 if 0 not in quadrants[0] else 4
    brightest = np.zeros_like(darkest)
    for down, right in quadrants:
        brightest = np.maximum(brightest, _shifted(dark, _ARM, down * reach, right * reach))
    return darkest.astype(np.int16) - brightest.astype(np.int16)


# Least contrast in grey levels, and as a multiple of what is usual nearby (strokes, labels), in the whole image (large
# letters, outlines, dashes, ticks) or of fine structure (crosses, dots).
STROKE_FLOOR, STROKE_NOISE = 22.0, 5.5  # Upright strokes, over both of their sides.
LARGE_FLOOR, LARGE_NOISE = 60.0, 6.0  # Strokes of large letters.
OUTLINE_FLOOR, OUTLINE_NOISE = 26.0, 8.0  # Dark upright lines of a pixel or two, as around marks on bright ground.
DASH_FLOOR, DASH_NOISE = 60.0, 6.0  # Flat lines with crisp ends, over what lies above and below.
LABEL_FLOOR, LABEL_NOISE = 14.0, 3.0  # Strokes beside a caliper, where its number stands.
CROSS_FLOOR, CROSS_NOISE = 18.0, 1.9  # Bright crosses.
DARK_FLOOR, DARK_NOISE = 24.0, 2.5  # Dark crosses.
DOT_FLOOR, DOT_NOISE = 14.0, 1.2  # The dots of a dotted line, over what lies beside the line.
TICK_FLOOR, TICK_NOISE = 44.0, 10.0  # Marks at the sides that are small in both directions.

# Sizes of the same structures.
LARGE_WIDTH, LARGE_HEIGHT = 13, 9  # As STROKE_WIDTH and STROKE_HEIGHT, of large letters.
LINE_DOTS, RUN_DOTS = 10, 5  # Dots in a row that make a dotted line; dots in a row whose spacings agree.
LINE_LENGTH, LINE_GAP = 30.0, 40.0  # Least length in pixels of such a line, longest gap in it that is bridged.
LINE_EXCESS = 7.0  # Standard deviations by which the dots on a line exceed what chance puts there.
SIDE_SHARE = 0.1  # Of the width, on either side, that may hold a ruler, ticks or a scale of grey levels.
BAR_ROWS, BAR_STEP = 25, 8  # Least height of a scale of grey levels, and least step in grey levels at its sides.
BADGE_SIDE = 24  # Pixels from the upper left corner within which some scanners put a badge.
_REACHES = ((1, 2, 3), (2, 4, 5))
_MARGIN, _LABEL, _ANGLES = 8, 16, 180


def suspect_mask(pixels: NDArray[np.uint8], coloured: _Mask | None = None, found: _Mask | None = None) -> _Mask:
    """Mark whatever may be text, a caliper, a dotted line, a ruler, a scale of grey levels, a badge or colour.

    Much more generous than `find_overlays`, whose marks (``found``) it includes with ``coloured`` pixels: a wrong mark
    costs a small patch of texture, a missed one is learnt. By eye, of 33 random images of BUSI and BUS-BRA with
    overlays, 28 had none left after painting over. All are ``(H, W)``, with 2 pixels around what is suspected.
    """
    found = find_overlays(pixels).mask if found is None else found
    fine, upright = pixels - np.minimum(grow(shrink(pixels, 4), 4), pixels), _top_hat(pixels, STROKE_WIDTH // 2, axis=1)
    usual_fine, usual_upright = _usual(fine), _usual(upright)
    crosses = _faint_crosses(pixels, np.maximum(CROSS_FLOOR, CROSS_NOISE * usual_fine))
    dark = _faint_crosses(255 - pixels, np.maximum(DARK_FLOOR, DARK_NOISE * usual_fine))
    strokes = _upright_runs(upright >= np.maximum(STROKE_FLOOR, STROKE_NOISE * usual_upright), STROKE_HEIGHT)
    labels = _upright_runs(upright >= np.maximum(LABEL_FLOOR, LABEL_NOISE * usual_upright), STROKE_HEIGHT)
    strokes |= labels & grow(crosses, _LABEL)
    letters = _stands_out(_top_hat(pixels, LARGE_WIDTH // 2, axis=1), LARGE_FLOOR, LARGE_NOISE)
    large = _upright_runs(letters, LARGE_HEIGHT)
    strong = strokes & (upright >= 60)
    bright = fine >= np.maximum(30.0, 2.5 * usual_fine)
    marked = strokes | large | (bright & (grow(strokes, 3) | grow(strong | large, 8))) | grow(crosses | dark, 5)
    marked |= _dotted(pixels, fine, np.maximum(DOT_FLOOR, DOT_NOISE * usual_fine))
    marked |= _upright_runs(_stands_out(_top_hat(255 - pixels, 1, axis=1), OUTLINE_FLOOR, OUTLINE_NOISE), 3)
    marked |= _dashes(pixels) | _side_marks(pixels) | _badge(pixels)
    if coloured is not None:
        marked |= coloured
    return grow(marked, _GROW) | found


def _usual(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean over about 100 x 100 pixels, ``float32 (H, W)``."""
    height, width = values.shape
    step = 8
    padded = np.pad(values, ((0, -height % step), (0, -width % step)), mode="edge")
    bands = padded.reshape(-1, step, padded.shape[1]).sum(axis=1, dtype=np.float32)
    blocks = bands.reshape(bands.shape[0], -1, step).mean(axis=2) / step
    smooth = ndimage.uniform_filter(blocks, 13, mode="nearest")
    return np.repeat(np.repeat(smooth, step, axis=0), step, axis=1)[:height, :width]


def _dashes(pixels: NDArray[np.uint8]) -> _Mask:
    """Flat bright lines with crisp ends, such as cursors; bright lines in tissue fade out."""
    labels, _ = ndimage.label(_stands_out(_top_hat(pixels, 2, axis=0), DASH_FLOOR, DASH_NOISE))
    marked = np.zeros(pixels.shape, dtype=np.bool_)
    for rows, columns in ndimage.find_objects(labels):
        width, height = columns.stop - columns.start, rows.stop - rows.start
        if not (5 <= width <= 40 and height <= 4 and columns.start >= 2 and columns.stop + 2 <= pixels.shape[1]):
            continue
        level = float(np.median(pixels[rows, columns].max(axis=0)))
        beyond = pixels[rows, [columns.start - 2, columns.stop + 1]]
        if float(beyond.max()) <= 0.4 * level:
            marked[rows, columns] = True
    return marked


def _stands_out(contrast: NDArray[np.uint8], floor: float, noise: float) -> _Mask:
    """Where contrast reaches a floor, and a multiple of its mean over the image."""
    return contrast >= max(floor, noise * float(contrast.mean()))


def _upright_runs(crisp: _Mask, rows: int) -> _Mask:
    """The upright runs of at least so many rows."""
    # The second window looks the other way, or an even height would shift the strokes by a pixel.
    runs = lowest(crisp.view(np.uint8), 0, rows - 1, axis=0)
    return highest(runs, rows - 1, 0, axis=0).view(np.bool_)


def _faint_crosses(pixels: NDArray[np.uint8], floor: NDArray[np.float32]) -> _Mask:
    """Centres of upright and oblique crosses, small and large, ``bool (H, W)``.

    Each arm must stand out from both of its own sides: on the lesion's edge, quadrants may be as bright as other arms.
    """
    bright = np.pad(highest(highest(pixels, 1, 0, axis=0), 1, 0, axis=1), 2 * _MARGIN, mode="edge").astype(np.int16)
    dark = np.pad(pixels, 2 * _MARGIN, mode="edge").astype(np.int16)
    found = np.zeros(pixels.shape, dtype=np.bool_)
    sum_floor = np.ceil(3 * floor).astype(np.int16)
    for arms in (((1, 0, 0, 3), (0, 1, 3, 0)), ((1, 1, -2, 2), (1, -1, 2, 2))):
        ridges = []
        for down, right, y, x in arms:
            beside = np.maximum(_shifted(dark, _MARGIN, y, x), _shifted(dark, _MARGIN, -y, -x))
            ridges.append((down, right, _shifted(bright, _MARGIN, 0, 0) - beside))
        for reaches in _REACHES:
            weakest = np.full(pixels.shape, 3 * 255, dtype=np.int16)
            for down, right, ridge in ridges:
                for way in (1, -1):
                    parts = [_shifted(ridge, _MARGIN, way * down * reach, way * right * reach) for reach in reaches]
                    np.minimum(weakest, parts[0] + parts[1] + parts[2], out=weakest)
            found |= weakest >= sum_floor
    return found


def _dotted(pixels: NDArray[np.uint8], fine: NDArray[np.uint8], floors: NDArray[np.float32]) -> _Mask:
    """Rows of evenly spaced dots in any direction that exceed a floor, ``bool (H, W)``."""
    marked = np.zeros(pixels.shape, dtype=np.bool_)
    peak = grow(pixels, 1) == pixels
    padded = np.pad(pixels, 4, mode="edge").astype(np.int16)
    y, x = np.nonzero(peak & (fine >= floors))
    level, floor = padded[y + 4, x + 4], floors[y, x]

    def at(down: int, right: int) -> NDArray[np.int16]:
        return padded[y + 4 + down, x + 4 + right]

    for (down, right), steps in (((0, 3), (1, 2, 3)), ((2, 2), (1, 2)), ((3, 0), (1, 2, 3)), ((2, -2), (1, 2))):
        isolated = level - np.maximum(at(down, right), at(-down, -right)) >= floor
        # A line in tissue is even along its way, a dotted one is not. (right, -down) is the way along, normalised.
        ahead, aside = np.sign(-right), np.sign(down)
        for way in (1, -1):
            gap = np.minimum.reduce([at(way * step * ahead, way * step * aside) for step in steps])
            isolated &= level - gap >= 0.5 * floor
        _mark_lines(marked, y[isolated], x[isolated], float(np.arctan2(down, right)))
    return marked


def _mark_lines(marked: _Mask, y: NDArray[np.int64], x: NDArray[np.int64], normal: float) -> None:
    """Draw the lines whose normal lies within 22.5 degrees of an angle and that hold more dots than chance does."""
    if y.size < LINE_DOTS:
        return
    height, width = marked.shape
    diagonal = int(np.hypot(height, width)) + 2
    angles = normal + np.linspace(-np.pi / 8, np.pi / 8, _ANGLES // 4, endpoint=False)
    across = np.cos(angles)[:, None] * x + np.sin(angles)[:, None] * y
    bins = np.floor(across).astype(np.int64) + diagonal
    width = 2 * diagonal + 2
    counts = np.bincount((bins + width * np.arange(angles.size)[:, None]).ravel(), minlength=width * angles.size)
    pairs = (counts[:-1] + counts[1:]).astype(np.float32)
    busy = pairs >= LINE_DOTS
    if not busy.any():
        return
    usual = ndimage.uniform_filter1d(pairs, 41)
    for place in np.flatnonzero(busy & (pairs >= usual + LINE_EXCESS * np.sqrt(usual + 1))):
        row, hit = divmod(int(place), width)
        angle = float(angles[row])
        on = (bins[row] == hit) | (bins[row] == hit + 1)
        along = np.sort(-x[on] * np.sin(angle) + y[on] * np.cos(angle))
        for first, last in _stretches(along):
            steps, line = np.arange(first - 3, last + 3, 0.5), hit + 1 - diagonal
            columns = np.round(line * np.cos(angle) - steps * np.sin(angle)).astype(np.int64)
            rows = np.round(line * np.sin(angle) + steps * np.cos(angle)).astype(np.int64)
            inside = (columns >= 0) & (columns < marked.shape[1]) & (rows >= 0) & (rows < marked.shape[0])
            marked[rows[inside], columns[inside]] = True


def _stretches(along: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Stretches of a line whose dots are evenly spaced, gaps bridged, without short ones."""
    gaps = np.diff(along)
    runs: list[tuple[float, float]] = []
    for spacing in (3.0, 4.0, 5.0, 6.0, 8.0, 10.0):
        for (box,) in ndimage.find_objects(ndimage.label(np.abs(gaps - spacing) <= 1.2)[0]):
            if box.stop - box.start >= RUN_DOTS - 1:
                runs.append((float(along[box.start]), float(along[box.stop])))
    joined: list[tuple[float, float]] = []
    for first, last in sorted(runs):
        if joined and first - joined[-1][1] <= LINE_GAP:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return [(first, last) for first, last in joined if last - first >= LINE_LENGTH]


def _side_marks(pixels: NDArray[np.uint8]) -> _Mask:
    """Ticks, dots and digits of a ruler, and scales of grey levels, along the left and right border."""
    strip = max(12, round(SIDE_SHARE * pixels.shape[1]))
    marked = np.zeros(pixels.shape, dtype=np.bool_)
    for side in (slice(None, strip), slice(-strip, None)):
        part = np.ascontiguousarray(pixels[:, side])
        compact = np.minimum(*(_top_hat(part, 6, axis) for axis in (0, 1)))
        marked[:, side] = _stands_out(compact, TICK_FLOOR, TICK_NOISE) | _bars(part)
    return marked


def _top_hat(pixels: NDArray[np.uint8], reach: int, axis: int) -> NDArray[np.uint8]:
    """How much brighter a pixel is than both sides of the run of at most ``2 * reach`` pixels that it lies in."""
    beside = highest(lowest(pixels, reach, reach, axis=axis), reach, reach, axis=axis)
    return pixels - np.minimum(beside, pixels)


def _bars(pixels: NDArray[np.uint8]) -> _Mask:
    """Boxes between two long upright edges that stand side by side, ``bool (H, W)``."""
    marked = np.zeros(pixels.shape, dtype=np.bool_)
    levels = np.pad(pixels, ((0, 0), (1, 1)), mode="edge").astype(np.int16)
    steps = levels[:, 2:] - levels[:, :-2]
    steady = np.zeros(pixels.shape, dtype=np.bool_)
    for way in (1, -1):
        # Grain makes steps of both signs; only a drawn edge keeps its sign for long.
        steady |= ndimage.uniform_filter1d((way * steps >= BAR_STEP).astype(np.float32), BAR_ROWS, axis=0) >= 0.95
    steady = grow(steady, 1)
    for rows, columns in ndimage.find_objects(ndimage.label(grow(steady, 5))[0]):
        columns_hit = np.flatnonzero(steady[rows, columns].any(axis=0))
        runs = 1 + np.count_nonzero(np.diff(columns_hit) > 1)
        if runs >= 2:
            # Where the scale has its surroundings' grey, it has no edge.
            more = max(3 * BAR_ROWS, (rows.stop - rows.start) // 2)
            marked[max(0, rows.start - more) : rows.stop + more, columns] = True
    return marked


def _badge(pixels: NDArray[np.uint8]) -> _Mask:
    """The maker's badge in the upper left corner: strokes as bright as can be, framed in black."""
    marked = np.zeros(pixels.shape, dtype=np.bool_)
    corner = pixels[:BADGE_SIDE, :BADGE_SIDE]
    black = grow(corner < 12, 2)
    strokes = (corner > 180) & black
    if np.count_nonzero(strokes) >= 6:
        marked[:BADGE_SIDE, :BADGE_SIDE] = grow(strokes, 2)
    return marked
