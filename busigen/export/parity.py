"""Parity: the same draws through PyTorch and a bundle's graphs, over the whole trajectory, on image and mask."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from busigen.data.geometry import Mask
from busigen.errors import ParityError
from busigen.export.reference import BATCH, Recorder, TorchBackend, Witness
from busigen.export.similarity import boundary_distance, dice, grey_difference, psnr, ssim
from busigen.registry import LESION_CLASSES, PARITY_DRAWS
from busigen.runtime.backend import Backend, open_backend
from busigen.runtime.bundle import Bundle
from busigen.runtime.progress import Progress
from busigen.training.networks import Networks

PARITY_SEED = 20_240_02
"""Seed of the compared draws; fixed, so that two exports of one checkpoint report the same figures."""


@dataclass(frozen=True)
class Limit:
    """What a figure must not pass. ``least`` says that it is a lower limit; ``why`` is for the report."""

    value: float
    least: bool
    why: str

    def holds(self, figure: float) -> bool:
        """Whether a figure is good enough; one that is no number is not."""
        return bool((operator.ge if self.least else operator.le)(figure, self.value))


LIMITS = {
    "dice": Limit(
        0.99,
        True,
        "a mask of 2,000 pixels has an outline of about 160: one pixel in eight of it may flip, far more than rounding "
        "weights to fp16 does",
    ),
    "boundary": Limit(1.0, False, "pixels, 95th percentile: the grid's own resolution"),
    "psnr": Limit(
        35.0, True, "dB over the edit region, painted with the same outline: errors of 4.5 grey levels, below speckle"
    ),
    "ssim": Limit(0.95, True, "over the same region: the same grains of speckle in the same places"),
    "max_grey_difference": Limit(
        64, False, "grey levels, the same: a fault in a single spot would escape the two means"
    ),
    "psnr_end_to_end": Limit(
        25.0,
        True,
        "dB, each with its own outline, in 19 draws of 20: the same lesion in the same place. An outline that differs "
        "by a pixel may move the window by one, and all grains with it",
    ),
    "same_gates": Limit(
        0.98,
        True,
        "share of draws that the gates judge alike: a draw that lies on a gate's threshold may fall to either side",
    ),
}
"""What every draw must reach, but for ``psnr_end_to_end`` (19 in 20) and ``same_gates`` (a share)."""


class Reference:
    """What PyTorch draws, once for all targets that are compared with it.

    Args:
        networks: the checkpoint's.
        bundle: says which graphs there are and how large their inputs; its files need not exist yet.
        draws: draws per class.
        progress: counts draws; the caller has started it.
    """

    def __init__(
        self, networks: Networks, bundle: Bundle, *, draws: int = PARITY_DRAWS, progress: Progress | None = None
    ) -> None:
        self.draws, self.progress = draws, progress or Progress()
        recorder = Recorder(TorchBackend(networks))
        self.witnesses = {label: self._witness(bundle, recorder, label) for label in LESION_CLASSES}
        self.asked = recorder.asked

    def compare(self, bundle: Bundle, backend: Backend) -> dict[str, Any]:
        """Draw the same samples with a backend and measure how far they are apart.

        Returns:
            Per class: masks and images compared; the figures of :data:`LIMITS` (the worst draw's each, but for the last
            two); number of masks that are equal to the pixel; draws that the gates accept. A figure without anything
            to compare fails.
        """
        return {label: self._figures(label, bundle, backend) for label in LESION_CLASSES}

    def _witness(
        self, bundle: Bundle, backend: Backend, label: str, forced: Mapping[int, Mask] | None = None
    ) -> Witness:
        sampler = Witness(bundle, backend, label, forced)
        for first in range(0, self.draws, BATCH):
            jobs = [(index, 0) for index in range(first, min(first + BATCH, self.draws))]
            sampler.attempt(PARITY_SEED, jobs)
            self.progress.advance(len(jobs))
        return sampler

    def _figures(self, label: str, bundle: Bundle, backend: Backend) -> dict[str, Any]:
        reference, own = self.witnesses[label], self._witness(bundle, backend, label)
        # Again with the reference's outlines: a pixel more or less in an outline is another question to stage 2, whose
        # answer may differ visibly although every graph is right.
        same = self._witness(bundle, backend, label, forced=reference.painted)
        outlines = [
            (reference.outlines[k], own.outlines[k]) for k in sorted(reference.outlines.keys() & own.outlines.keys())
        ]
        seen = [
            (reference.images[k], same.images[k], reference.edits[k])
            for k in sorted(reference.images.keys() & same.images.keys())
        ]
        ends = [
            (reference.images[k], own.images[k], reference.edits[k])
            for k in sorted(reference.images.keys() & own.images.keys())
        ]
        judged = sorted(reference.refused.keys() | own.refused.keys())
        alike = [reference.refused.get(k, "background") == own.refused.get(k, "background") for k in judged]
        nothing = float("inf")
        return {
            "draws": self.draws,
            "masks_compared": len(outlines),
            "images_compared": len(seen),
            "dice": min((dice(*pair) for pair in outlines), default=0.0),
            "boundary": max((boundary_distance(*pair) for pair in outlines), default=nothing),
            "equal_masks": sum(bool((one == other).all()) for one, other in outlines),
            "psnr": min((psnr(*pair) for pair in seen), default=0.0),
            "ssim": min((ssim(*pair) for pair in seen), default=0.0),
            "max_grey_difference": max((grey_difference(one, other) for one, other, _ in seen), default=256),
            "psnr_end_to_end": float(np.percentile([psnr(*pair) for pair in ends], 5)) if ends else 0.0,
            "accepted": sum(reason is None for reason in reference.refused.values()),
            "same_gates": sum(alike) / len(alike) if alike else 0.0,
        }


def failures(figures: Mapping[str, Any]) -> list[str]:
    """What of :meth:`Reference.compare` misses its limit, in words."""
    return [
        f"{label} {name} {figures[label][name]:.4g} is {'below' if limit.least else 'above'} {limit.value:g}"
        for label in LESION_CLASSES
        for name, limit in LIMITS.items()
        if not limit.holds(figures[label][name])
    ]


def refused(target: str, found: list[str]) -> ParityError:
    """The error that ends an export whose graphs fail on a target."""
    return ParityError(
        f"the exported graphs do not reproduce the checkpoint ({target}): {'; '.join(found)}.",
        fix="Nothing was written. Report it with the versions of torch, onnx and onnxruntime.",
    )


def compare(
    networks: Networks, bundle: Bundle, *, draws: int = PARITY_DRAWS, backend: Backend | None = None
) -> dict[str, Any]:
    """Hold one bundle and one backend (ONNX Runtime on the CPU unless told otherwise) against a checkpoint.

    Returns:
        See :meth:`Reference.compare`.

    Raises:
        ParityError: a figure misses its limit.
    """
    figures = Reference(networks, bundle, draws=draws).compare(bundle, backend or open_backend(bundle))
    if found := failures(figures):
        raise refused(backend.name if backend else "cpu", found)
    return figures
