"""Fitting how sharp images are and drawn ones are not (:mod:`busigen.transfer`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask, around
from busigen.styles import Floats, bounded, fitted
from busigen.transfer import KNOTS, LARGEST, Transfer, detail, passed

FEWEST = 128
"""Real images, and drawn ones, from which it is believed how their detail is distributed."""

CORRECTIONS = 2
"""Times that the fit looks at what its filters do and mends them: a short filter cannot follow every gain."""

MOST_MENDED = 2.0
"""Factor by which a correction may change the filters' spread."""

Picture = tuple[NDArray[np.uint8], Mask]
"""An image ``(H, W)`` and which of its pixels count."""


def fit_transfer(real: Iterable[Picture], drawn: Sequence[Picture], seed: int) -> Transfer | None:
    """The filters through which drawn images have their detail distributed as real ones have.

    Args:
        real: training images.
        drawn: what the decoder draws; what does not count lies around the image's frame.
        seed: seeds the filters that are tried.

    Returns:
        Filters within the bounds that bundles have (:data:`busigen.transfer.LARGEST`); a warning says where they were
        clipped to them. None where fewer than ``FEWEST`` images of either say what to fit, or where drawn images lack
        nothing that real ones vary by.
    """
    if len(drawn) < FEWEST:
        return None
    wanted, plain = _measured(real), _measured(drawn)
    if min(len(wanted), len(plain)) < FEWEST:
        return None
    result = Transfer(wanted.mean(axis=0) - plain.mean(axis=0), fitted(wanted, plain))
    if not result.factor.size:
        return None
    for _ in range(CORRECTIONS):
        # As they will be used: what has no effect beyond its bound is not to sway the rest.
        found = _measured(_through(_within(result), drawn, seed))
        missing, brought = (_spread(part) - _spread(plain) for part in (wanted, found))
        share = math.sqrt(max(missing, 1e-9) / max(brought, 1e-9))
        share = min(max(share, 1.0 / MOST_MENDED), MOST_MENDED)
        result = Transfer(result.mean + wanted.mean(axis=0) - found.mean(axis=0), share * result.factor)
    return Transfer(*(bounded(part, LARGEST, "transfer") for part in (result.mean, result.factor)))


def _within(transfer: Transfer) -> Transfer:
    return Transfer(*(np.clip(part, -LARGEST, LARGEST) for part in (transfer.mean, transfer.factor)))


def _measured(pictures: Iterable[Picture]) -> Floats:
    found = [detail(image, usable) for image, usable in pictures]
    return np.array([part for part in found if part is not None]).reshape(-1, 2 * len(KNOTS))


def _spread(measured: Floats) -> float:
    return float(measured.var(axis=0).sum())


def _through(transfer: Transfer, drawn: Iterable[Picture], seed: int) -> Iterable[Picture]:
    rng = np.random.default_rng(seed)
    for image, usable in drawn:
        frame = around(usable, 0)
        result = image.copy()
        normals = rng.standard_normal((transfer.factor.shape[1],))
        result[frame] = passed(image[frame], transfer.kernels(normals))
        yield result, usable
