"""A null engine: a source whose samples are there already, so that what is measured is all that comes after engines.

Its images look like ultrasound to a PNG encoder: log-compressed speckle with the grain of real images over layers of
tissue, with a dark lesion. All of them differ, because equal ones would be duplicates to ``busigen verify``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.registry import ATTRIBUTES, RESOLUTION
from busigen.runtime.dataset.format import Rejection, Sample, SampleBatch

POOL = 64
"""Images that are drawn before anything is measured."""

REFUSED = 20
"""One index in this many has one refused draw before its accepted one, so that records hold some."""

_STRIDE = 641


class ReadyMade:
    """A :class:`busigen.runtime.dataset.format.Source`. A sample is an image of the pool, rotated by its index."""

    def __init__(self) -> None:
        self._pool = [_speckle(np.random.default_rng(number)) for number in range(POOL)]

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`busigen.runtime.dataset.format.Source`."""
        return {"source": "ready made", "pool": POOL}

    def options(self) -> Mapping[str, str | None]:
        """See :class:`busigen.runtime.dataset.format.Source`."""
        return {}

    def row_types(self) -> Mapping[str, type]:
        """The fields that the sampler's rows have."""
        return {
            "background": str,
            "healthy_file": str,
            "healthy_sha256": str,
            **{f"letterbox_{name}": kind for name, kind in (("scale", float), ("left", int), ("top", int))},
            **{f"window_{name}": int for name in ("top", "left", "side")},
            "edit_pixels": int,
            "area_share": float,
            **{name: float for name in ATTRIBUTES if name != "size"},
            **{f"asked_{name}": float for name in ATTRIBUTES},
            "asked_birads": str,
        }

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        """See :class:`busigen.runtime.dataset.format.Source`."""
        samples = list(self.samples(indices))
        done(len(samples))
        refused = [Rejection(s.index, 0, s.label, "the lesion is too small") for s in samples if s.attempt]
        return SampleBatch(samples, refused)

    def samples(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples of these indices, one after the other."""
        for index in indices:
            image, mask, row = self._pool[index % POOL]
            # The stride is odd and so visits every rotation of an image before it repeats one.
            flat, cut = image.reshape(-1), index // POOL * _STRIDE % image.size
            turned = np.concatenate((flat[cut:], flat[:cut])).reshape(image.shape)
            label = "benign" if index % 2 else "malignant"
            yield Sample(index, int(index % REFUSED == REFUSED - 1), label, turned, mask, row)


def _speckle(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_], dict[str, Any]]:
    rows, columns = np.mgrid[0:RESOLUTION, 0:RESOLUTION]
    centre, radii = rng.uniform(80, 176, 2), rng.uniform(16, 50, 2)
    mask = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 <= 1
    layers = ndimage.gaussian_filter(rng.normal(size=(RESOLUTION, RESOLUTION)), (6, 30))
    layers = layers / layers.std() * 5.0 - np.where(mask, 16.0, 0.0) - rows / RESOLUTION * 8.0
    # A point spreads further across the beam than along it.
    field = sum(k * ndimage.gaussian_filter(rng.normal(size=mask.shape), (1.4, 2.6)) for k in (1, 1j))
    decibels = 20.0 * np.log10(np.abs(field) / np.abs(field).mean() + 1e-6) + layers
    image = np.clip((decibels + 50.0) / 70.0 * 255.0, 0, 255).astype(np.uint8)
    row = {
        "background": "synthetic",
        "healthy_file": None,
        "healthy_sha256": None,
        "letterbox_scale": 1.0,
        "letterbox_left": 0,
        "letterbox_top": 0,
        "window_top": int(rng.integers(0, 128)),
        "window_left": int(rng.integers(0, 128)),
        "window_side": 128,
        "edit_pixels": int(mask.sum() * 2),
        "area_share": float(mask.mean()),
        **{name: float(rng.random()) for name in ATTRIBUTES if name != "size"},
        **{f"asked_{name}": None for name in ATTRIBUTES},
        "asked_birads": None,
    }
    return image, mask, row
