"""Parity: the same draws through PyTorch and through the bundle, over the whole trajectory, on image and mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from busigen.data.geometry import Mask, largest_component
from busigen.errors import ParityError
from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime import gates
from busigen.runtime.backend import Backend, open_backend
from busigen.runtime.bundle import Bundle
from busigen.runtime.drafts import Draft
from busigen.runtime.sampler import Sampler
from busigen.training.models import region_condition
from busigen.training.networks import Networks, blend_input, window_condition

DRAWS = 8
"""Draws compared per class."""

PARITY_SEED = 20_240_02
"""Seed of the compared draws; fixed, so that two exports of one checkpoint report the same figures."""

MINIMUM = {"dice": 0.99, "psnr": 35.0, "psnr_end_to_end": 25.0}
"""What every draw must reach.

``dice`` of the outlines: a mask of 2,000 pixels has an outline of about 160, so this lets one pixel in eight of it
flip, far more than rounding weights to fp16 (relative error 5e-4) does. ``psnr`` in decibels over the edit region, both
painted with the same outline: errors of 4.5 grey levels, below the grain of speckle. ``psnr_end_to_end``, each with its
own outline: the same lesion in the same place, whose texture may follow an outline that differs by a few pixels.
"""

MAX_PSNR = 99.0
"""Reported for images that are equal to the byte."""


class TorchBackend:
    """The checkpoint's networks behind the runtime's interface: the reference that a bundle is held against."""

    name = "torch"
    version = str(torch.__version__)

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backend.Backend`."""
        component = graph.partition("@")[0]
        values = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        result: NDArray[np.float32] = self._evaluate(component, values).numpy()
        return result

    def _evaluate(self, component: str, v: dict[str, Tensor]) -> Tensor:
        networks = self._networks
        if component == "context":
            return networks.tokens(v["image"], v["keep"])
        if component == "encoder":
            return networks.encoder(v["pixels"])
        if component == "decoder":
            return networks.decoder(v["latents"], v["noise"])
        if component == "prior":
            return networks.background(v["noise"])
        stage, _, label = component.partition("-")
        context = (v["tokens"], v["keep"])
        if stage == "mask":
            return networks.outline(v["noise"], label, *context, v["asked"])
        if stage == "lesion":
            condition = window_condition(v["known"], v["mask"], v["edit"])
        else:
            edit, ring = region_condition(v["edit"]), region_condition(v["ring"])
            condition = window_condition(blend_input(v["known"], v["painted"], edit, ring), v["mask"], v["ring"])
        return networks.sample(stage, v["noise"], label, *context, *condition)


def compare(networks: Networks, bundle: Bundle, *, draws: int = DRAWS) -> dict[str, Any]:
    """Draw the same samples twice and measure how far they are apart, per class.

    Returns:
        Per class: masks and images compared, the figures of :data:`MINIMUM` (the worst draw's each), number of masks
        that are equal to the pixel, largest difference in grey levels, draws that the gates accept, and whether they
        decided alike every time. A figure without anything to compare is 0 and fails.

    Raises:
        ParityError: a figure misses its threshold.
    """
    report: dict[str, Any] = {"seed": PARITY_SEED, "thresholds": dict(MINIMUM)}
    for label in LESION_CLASSES:
        reference = _witness(bundle, TorchBackend(networks), label, draws)
        exported = _witness(bundle, open_backend(bundle), label, draws)
        # Again with the reference's outlines: a pixel more or less in an outline is another question to stage 2, whose
        # answer may differ visibly although every graph is right.
        same_outline = _witness(bundle, open_backend(bundle), label, draws, forced=reference.painted)
        report[label] = _figures(reference, exported, same_outline, draws)
    failures = [
        f"{label} {name} {report[label][name]:.4g} is below {limit}"
        for label in LESION_CLASSES
        for name, limit in MINIMUM.items()
        if report[label][name] < limit
    ]
    failures += [
        f"{label}: the gates decide differently" for label in LESION_CLASSES if not report[label]["same_gates"]
    ]
    if failures:
        raise ParityError(
            f"the exported graphs do not reproduce the checkpoint: {'; '.join(failures)}.",
            fix="Nothing was written. Report it with the versions of torch, onnx and onnxruntime.",
        )
    return report


class _Witness(Sampler):
    """The runtime's sampler, with every draw carried to its end and what it made on the way kept.

    A draw whose outline the gates refuse would leave stages 2 and 3 unproved, so it is painted with a fixed ellipse.
    With ``forced`` outlines, all draws are painted with those instead of their own.
    """

    def __init__(self, bundle: Bundle, backend: Backend, label: str, forced: Mapping[int, Mask] | None = None) -> None:
        super().__init__(bundle, backend, classes={label: 1.0}, batch_size=4)
        self.forced = forced or {}
        self.painted: dict[int, Mask] = {}
        self.outlines: dict[int, Mask] = {}
        self.images: dict[int, NDArray[np.uint8]] = {}
        self.edits: dict[int, Mask] = {}
        self.refused: dict[int, str | None] = {}

    def _outlines(self, seed: int, batch: Sequence[Draft]) -> list[Mask]:
        for draft, raw in zip(batch, super()._outlines(seed, batch), strict=True):
            valid = draft.healthy.valid
            self.outlines[draft.index] = raw
            self.refused[draft.index] = gates.mask_reason(raw, largest_component(raw & valid), valid)
            own = raw if self.refused[draft.index] is None else _ellipse(draft.index)
            self.painted[draft.index] = self.forced.get(draft.index, own)
        return [self.painted[draft.index] for draft in batch]

    def _images(self, seed: int, batch: Sequence[Draft]) -> list[NDArray[np.uint8]]:
        images = super()._images(seed, batch)
        for draft, image in zip(batch, images, strict=True):
            assert draft.mask is not None and draft.edit is not None
            self.images[draft.index], self.edits[draft.index] = image, draft.edit
            reason = gates.image_reason(image, draft.mask, draft.healthy.valid)
            self.refused[draft.index] = self.refused[draft.index] or reason
        return images


def _ellipse(index: int) -> Mask:
    """A lesion-sized ellipse, small for even and large for odd indices, so that both windows are proved."""
    rows, columns = np.ogrid[:RESOLUTION, :RESOLUTION]
    height, width = (18, 26) if index % 2 == 0 else (45, 60)
    result: Mask = ((rows - 110) / height) ** 2 + ((columns - 128) / width) ** 2 <= 1.0
    return result


def _witness(
    bundle: Bundle, backend: Backend, label: str, draws: int, forced: Mapping[int, Mask] | None = None
) -> _Witness:
    sampler = _Witness(bundle, backend, label, forced)
    sampler.attempt(PARITY_SEED, [(index, 0) for index in range(draws)])
    return sampler


def _figures(reference: _Witness, exported: _Witness, same_outline: _Witness, draws: int) -> dict[str, Any]:
    dice, equal = [], 0
    for index in sorted(set(reference.outlines) & set(exported.outlines)):
        mask, other = reference.outlines[index], exported.outlines[index]
        total = int(mask.sum() + other.sum())
        dice.append(2.0 * float((mask & other).sum()) / total if total else 1.0)
        equal += int((mask == other).all())
    compared = sorted(set(reference.images) & set(same_outline.images))
    return {
        "draws": draws,
        "masks_compared": len(dice),
        "images_compared": len(compared),
        "dice": min(dice, default=0.0),
        "equal_masks": equal,
        "psnr": min((_psnr(reference, same_outline, index) for index in compared), default=0.0),
        "psnr_end_to_end": min((_psnr(reference, exported, index) for index in exported.images), default=0.0),
        "max_grey_difference": max((int(_difference(reference, same_outline, k).max()) for k in compared), default=0),
        "accepted": sum(reason is None for reason in reference.refused.values()),
        "same_gates": reference.refused == exported.refused,
    }


def _difference(reference: _Witness, other: _Witness, index: int) -> NDArray[np.int64]:
    return np.abs(reference.images[index].astype(np.int64) - other.images[index].astype(np.int64))


def _psnr(reference: _Witness, other: _Witness, index: int) -> float:
    """Over the edit region alone: the untouched pixels would flatter the figure."""
    error = float((_difference(reference, other, index)[reference.edits[index]] ** 2).mean())
    return min(MAX_PSNR, 10.0 * float(np.log10(255.0**2 / error))) if error else MAX_PSNR
