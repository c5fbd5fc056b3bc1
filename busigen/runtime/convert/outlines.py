"""Outlines of masks as polygons along the pixels' edges, which hold exactly the mask's pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Points = list[tuple[int, int]]


def polygons(mask: NDArray[np.bool_]) -> list[Points]:
    """A polygon of (x, y) corners for each part of a mask, in pixels; parts that touch at a corner are one.

    A hole is joined to its part by lines there and back, so that whoever fills by the even-odd rule leaves it out.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        top, left = box[0].start, box[1].start
        found.append([(x + left, y + top) for x, y in _joined(rings(labels[box] == number))])
    return found


def polygon(mask: NDArray[np.bool_]) -> Points:
    """One polygon for all parts of a mask, joined as holes are; empty for an empty mask."""
    return _joined(polygons(mask))


def _joined(rings: list[Points]) -> Points:
    if len(rings) < 2:
        return rings[0] if rings else []
    start = rings[0][0]
    found = [*rings[0], start]
    for ring in rings[1:]:
        turn = (ring[0][0], start[1])  # Lines along the pixels' edges meet no pixel's centre.
        found += [turn, *ring, ring[0], turn, start]
    return found[:-1]


def rings(mask: NDArray[np.bool_]) -> list[Points]:
    """The closed outlines of a mask, each without the corners that lie on a straight line."""
    padded = np.pad(mask, 1)
    inside, above, left = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    ends: dict[tuple[int, int], Points] = {}
    # Each edge between a pixel inside and one outside, with the inside to its right.
    for rows_columns, start, end in (
        (inside & ~above, (0, 0), (1, 0)),
        (above & ~inside, (1, 0), (0, 0)),
        (left & ~inside, (0, 0), (0, 1)),
        (inside & ~left, (0, 1), (0, 0)),
    ):
        for y, x in np.argwhere(rows_columns).tolist():
            ends.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    rings = []
    while ends:
        ring = [next(iter(ends))]
        while ring[-1] in ends:
            following = ends[ring[-1]]
            point = following.pop()
            if not following:
                del ends[ring[-1]]
            ring.append(point)
        rings.append(_corners(ring[:-1]))
    return rings


def _corners(ring: Points) -> Points:
    around = zip([ring[-1], *ring[:-1]], ring, [*ring[1:], ring[0]], strict=True)
    return [here for before, here, after in around if not (before[0] == after[0] or before[1] == after[1])]
