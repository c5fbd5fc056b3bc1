"""Brightness across a lesion's outline: what the margin is judged by, beside its texture."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

BANDS, WIDTH = 8, 2
"""Bands along the outline, half of them inside, and pixels from one side of a band to the other."""

SECTORS = 8
"""Directions from the lesion's centre: margins are sharp on one side and not on another."""

FEWEST = 24
"""Of the ``BANDS * SECTORS`` patches, how many must be seen."""

LEAST_PIXELS = 6.0
"""Pixels from which a patch's mean is believed."""

FLOOR = 1e-3
"""Added before a logarithm of squares of steps in brightness, in units of [-1, 1]: less is speckle's doing."""

FEATURES = BANDS + BANDS - 1
"""Numbers per lesion."""


def patches(mask: Tensor, usable: Tensor) -> Tensor:
    """Share out the pixels near outlines by band and sector.

    Args:
        mask: ``(B, 1, H, W)``, above 0 in the lesion.
        usable: which pixels count, of the same shape.

    Returns:
        ``(B, H * W)`` int64, the number of every pixel's patch; ``BANDS * SECTORS`` for none.
    """
    pairs = zip(mask[:, 0].cpu() > 0, usable[:, 0].cpu() > 0, strict=True)
    return torch.stack([_places(*pair) for pair in pairs]).flatten(1).to(mask.device)


def _places(lesion: Tensor, usable: Tensor) -> Tensor:
    """The number of every pixel's patch, ``(H, W)``; ``BANDS * SECTORS`` for none."""
    inside = lesion.numpy()
    nowhere = torch.full(lesion.shape, BANDS * SECTORS)
    if not inside.any() or inside.all():
        return nowhere
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    # The outline lies half a pixel from the centres of the pixels to either side of it.
    distance -= 0.5 * np.sign(distance)
    band = np.floor(distance / WIDTH).astype(np.int64) + BANDS // 2
    row, column = ndimage.center_of_mass(inside)
    y, x = np.arange(inside.shape[0]) - row, np.arange(inside.shape[1]) - column
    angle = np.arctan2(y[:, None], x[None]) / (2.0 * np.pi) + 0.5
    sector = np.minimum((angle * SECTORS).astype(np.int64), SECTORS - 1)
    known = (band >= 0) & (band < BANDS) & usable.numpy()
    return torch.where(torch.from_numpy(known), torch.from_numpy(band * SECTORS + sector), nowhere)


def profile(image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Measure how brightness goes across outlines.

    Args:
        image: ``(B, 1, H, W)`` in [-1, 1].
        places: what :func:`patches` gives.

    Returns:
        ``(B, FEATURES)``: every band's mean about that of all, from the inmost on, and the logarithm of the mean
        square, over sectors, of the steps from band to band; and ``(B,)`` bool, of which lesions enough is seen.
    """
    with torch.autocast(image.device.type, enabled=False):
        flat = image.float().flatten(1)
        counts, sums = (_summed(part, places) for part in (torch.ones_like(flat), flat))
        seen = (counts >= LEAST_PIXELS).float()
        means = sums / counts.clamp(min=1.0)
        bands = (means * seen).sum(dim=2) / seen.sum(dim=2).clamp(min=1.0)
        both = seen[:, 1:] * seen[:, :-1]
        squares = ((means[:, 1:] - means[:, :-1]).square() * both).sum(dim=2) / both.sum(dim=2).clamp(min=1.0)
        found = torch.cat((bands - bands.mean(dim=1, keepdim=True), 0.5 * torch.log(squares + FLOOR)), dim=1)
        enough = (seen.sum(dim=(1, 2)) >= FEWEST) & (both.sum(dim=2) > 0).all(dim=1)
        return found, enough


def _summed(values: Tensor, places: Tensor) -> Tensor:
    """Sums of ``(B, H * W)`` values over patches, ``(B, BANDS, SECTORS)``."""
    sums = values.new_zeros(len(values), BANDS * SECTORS + 1).scatter_add(1, places, values)
    return sums[:, :-1].unflatten(1, (BANDS, SECTORS))
