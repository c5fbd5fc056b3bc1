"""The checkpoint's networks as the reference that graphs are held against, and what they were asked and answered."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from busigen.data.geometry import Mask, largest_component
from busigen.errors import ParityError
from busigen.registry import LESION_CLASSES, PARITY_DRAWS, RESOLUTION
from busigen.runtime.backends.base import Backend
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.bundle_record import BACKGROUND_DECODER
from busigen.runtime.progress import Progress
from busigen.runtime.sampling import quality_gates
from busigen.runtime.sampling.batching import Draft
from busigen.runtime.sampling.graphs import Floats, Graphs
from busigen.runtime.sampling.sampler import Sampler
from busigen.training.networks.build import region_condition
from busigen.training.networks.inference import Networks, blend_input

BATCH = 16  # Draws that are computed together.
ROWS = 16  # Rows per graph that are kept of what the reference was asked: as many as one batch of small windows.


@dataclass
class RecordedCall:
    """Some of what one graph was asked, and what the reference answered."""

    inputs: dict[str, NDArray[Any]]
    output: NDArray[np.float32]


class TorchBackend(Backend):
    """The checkpoint's networks behind the runtime's interface: the reference that a bundle is held against.

    Up to ``ROWS`` rows of what each graph was asked are kept in ``calls``, those that fill up a batch among them.
    """

    name = "torch"
    version = str(torch.__version__)

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self.calls: dict[str, list[RecordedCall]] = {}

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backends.base.Backend`."""
        values = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        output: NDArray[np.float32] = self._evaluate(graph.partition("@")[0], values).numpy()
        kept = self.calls.setdefault(graph, [])
        if (room := ROWS - sum(len(call.output) for call in kept)) > 0:
            first = {name: value[:room].copy() for name, value in inputs.items()}
            kept.append(RecordedCall(first, output[:room].copy()))
        return output

    def _evaluate(self, component: str, v: Mapping[str, Tensor]) -> Tensor:
        networks = self._networks
        if component == "context":
            return networks.tokens(v["image"], v["keep"])
        if component == "encoder":
            return networks.encoder(v["pixels"])
        if component == "decoder":
            return networks.decoder(
                v["latents"], v["noise"], v["mask"], v.get("scanner") if networks.shown_at is None else None
            )
        if component == BACKGROUND_DECODER:
            assert networks.prior_decoder is not None
            return networks.prior_decoder(v["latents"], v["noise"], v["mask"])
        if component == "prior":
            return networks.background(v["noise"], v["frame"], v.get("start"), v.get("scanner"))
        stage, _, label = component.partition("-")
        context = (v["tokens"], v["keep"])
        if stage == "mask":
            return networks.outline(v["noise"], label, *context, v["asked"])
        if stage == "lesion":
            condition = networks.window_condition(v["known"], v["mask"], v["edit"], v.get("scanner"))
        else:
            edit, ring = region_condition(v["edit"]), region_condition(v["ring"])
            seen = blend_input(v["known"], v["painted"], edit, ring)
            condition = networks.window_condition(seen, v["mask"], v["ring"], v.get("scanner"))
        return networks.sample(stage, v["noise"], label, *context, *condition, fresh=v.get("fresh"))


class RecordingGraphs(Graphs):
    """The runtime's stages, with every draw carried to its end and what it made on the way kept.

    A draw whose outline the gates refuse would leave stages 2 and 3 unproved, so it is painted with a fixed ellipse;
    so are two draws in eight, because a model may draw lesions of one window size alone.

    With ``forced`` outlines, all draws are painted with those instead of their own.
    """

    def __init__(self, bundle: Bundle, backend: Backend, forced: Mapping[int, Mask] | None = None) -> None:
        super().__init__(bundle, backend, BATCH)
        self.forced = forced or {}
        self.painted: dict[int, Mask] = {}
        self.drawn: dict[int, Mask] = {}
        self.made: dict[int, NDArray[np.uint8]] = {}
        self.edits: dict[int, Mask] = {}
        self.refused: dict[int, str | None] = {}

    def outlines(self, seed: int, batch: Sequence[Draft], asked: Floats) -> list[Mask]:
        """See :class:`Graphs`; what is returned is what will be painted."""
        for draft, raw in zip(batch, super().outlines(seed, batch, asked), strict=True):
            valid = draft.healthy.valid
            self.drawn[draft.index] = raw
            self.refused[draft.index] = quality_gates.mask_reason(raw, largest_component(raw & valid), valid)
            generated = self.refused[draft.index] is None and draft.index % 8 < 6
            own = raw if generated else _ellipse(draft.index)
            self.painted[draft.index] = self.forced.get(draft.index, own)
        return [self.painted[draft.index] for draft in batch]

    def images(self, seed: int, batch: Sequence[Draft]) -> list[NDArray[np.uint8]]:
        """See :class:`Graphs`."""
        images = super().images(seed, batch)
        for draft, image in zip(batch, images, strict=True):
            assert draft.mask is not None and draft.edit is not None
            self.made[draft.index], self.edits[draft.index] = image, draft.edit
            reason = quality_gates.image_reason(image, draft.mask, draft.healthy.valid)
            self.refused[draft.index] = self.refused[draft.index] or reason
        return images


def _ellipse(index: int) -> Mask:
    """A lesion, small for even and large for odd indices, so that both windows are proved."""
    rows, columns = np.ogrid[:RESOLUTION, :RESOLUTION]
    height, width = (18, 26) if index % 2 == 0 else (45, 60)
    return ((rows - 110) / height) ** 2 + ((columns - 128) / width) ** 2 <= 1.0


Image = NDArray[np.uint8]

MAX_PSNR = 99.0  # Reported for images that are equal to the byte.

_SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 1.5, 0.01, 0.03
"""Of Wang et al. 2004 (IEEE Trans. Image Process. 13(4)), section III.C."""


def psnr(image: Image, other: Image, region: Mask) -> float:
    """Peak signal-to-noise ratio in decibels over a region that is not empty."""
    error = float(((image.astype(np.float64) - other)[region] ** 2).mean())
    return min(MAX_PSNR, 10.0 * float(np.log10(255.0**2 / error))) if error else MAX_PSNR


def ssim(image: Image, other: Image, region: Mask) -> float:
    """Structural similarity, -1 to 1, averaged over a region that is not empty (Wang et al. 2004, Gaussian window)."""
    x, y = image.astype(np.float64), other.astype(np.float64)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(values, _SSIM_SIGMA, truncate=3.5))

    small, smaller = (_SSIM_K1 * 255.0) ** 2, (_SSIM_K2 * 255.0) ** 2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    structure = (2.0 * both + smaller) / (var_x + var_y + smaller)
    return float((luminance * structure)[region].mean())


def dice(mask: Mask, other: Mask) -> float:
    """Overlap of two masks, 0 to 1; two empty ones are equal."""
    total = int(mask.sum() + other.sum())
    return 2.0 * float((mask & other).sum()) / total if total else 1.0


def boundary_distance(mask: Mask, other: Mask) -> float:
    """95th percentile of the distances in pixels from each mask's outline to the other's; infinite if one is empty."""
    edges = [found & ~ndimage.binary_erosion(found) for found in (mask, other)]
    if not (edges[0].any() and edges[1].any()):
        return 0.0 if edges[0].any() == edges[1].any() else float("inf")
    both = [ndimage.distance_transform_edt(~there)[here] for here, there in (edges, edges[::-1])]
    return float(np.percentile(np.concatenate(both), 95))


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square of the differences over that of what was expected, of the worst row; infinite if any is NaN."""
    if not np.isfinite(found).all():
        return float("inf")
    rows = (len(expected), -1)
    error = ((found.astype(np.float64) - expected) ** 2).reshape(rows).mean(axis=1)
    size = (expected.astype(np.float64) ** 2).reshape(rows).mean(axis=1)
    return float(np.sqrt(error / np.maximum(size, 1e-12)).max())


def pixels_off(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square error in pixels of signed distances within five pixels of the outline, of the worst row."""
    if not np.isfinite(found).all():
        return float("inf")
    near = np.abs(expected) < 5.0
    errors = [float(((f - e)[n] ** 2).mean()) for f, e, n in zip(found, expected, near, strict=True) if n.any()]
    return float(np.sqrt(max(errors, default=0.0)))


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
    """What PyTorch draws, so many ``draws`` per class, once for all targets that are compared with it.

    ``bundle`` says which graphs there are and how large their inputs; its files need not exist yet. ``progress``, which
    the caller has started, counts draws.
    """

    def __init__(
        self, networks: Networks, bundle: Bundle, *, draws: int = PARITY_DRAWS, progress: Progress | None = None
    ) -> None:
        self.draws, self.progress = draws, progress or Progress()
        backend = TorchBackend(networks)
        self.witnesses = {label: self._witness(bundle, backend, label) for label in LESION_CLASSES}
        self.calls = backend.calls

    def compare(self, bundle: Bundle, backend: Backend) -> dict[str, Any]:
        """Draw the same samples with a backend and measure how far they are apart, per class.

        Gives masks and images compared; the figures of :data:`LIMITS` (the worst draw's each, but for the last two);
        masks that are equal to the pixel; draws that the gates accept. A figure without anything to compare fails.
        """
        return {label: self._figures(label, bundle, backend) for label in LESION_CLASSES}

    def _witness(
        self, bundle: Bundle, backend: Backend, label: str, forced: Mapping[int, Mask] | None = None
    ) -> RecordingGraphs:
        sampler = Sampler(bundle, backend, classes={label: 1.0}, batch_size=BATCH)
        sampler.graphs = recorded = RecordingGraphs(bundle, backend, forced)
        for first in range(0, self.draws, BATCH):
            jobs = [(index, 0) for index in range(first, min(first + BATCH, self.draws))]
            sampler.attempt(PARITY_SEED, jobs)
            self.progress.advance(len(jobs))
        return recorded

    def _figures(self, label: str, bundle: Bundle, backend: Backend) -> dict[str, Any]:
        reference, own = self.witnesses[label], self._witness(bundle, backend, label)
        # Again with the reference's outlines: a pixel more or less in an outline is another question to stage 2, whose
        # answer may differ visibly although every graph is right.
        same = self._witness(bundle, backend, label, forced=reference.painted)
        outlines = [(mask, own.drawn[k]) for k, mask in reference.drawn.items() if k in own.drawn]
        seen, ends = (
            [(image, painted[k], reference.edits[k]) for k, image in reference.made.items() if k in painted]
            for painted in (same.made, own.made)
        )
        judged = reference.refused.keys() | own.refused.keys()
        alike = [reference.refused.get(k, "background") == own.refused.get(k, "background") for k in judged]
        return {
            "draws": self.draws,
            "masks_compared": len(outlines),
            "images_compared": len(seen),
            "dice": min((dice(*pair) for pair in outlines), default=0.0),
            "boundary": max((boundary_distance(*pair) for pair in outlines), default=float("inf")),
            "equal_masks": sum(bool((one == other).all()) for one, other in outlines),
            "psnr": min((psnr(*pair) for pair in seen), default=0.0),
            "ssim": min((ssim(*pair) for pair in seen), default=0.0),
            "max_grey_difference": max((int(np.abs(a.astype(int) - b).max()) for a, b, _ in seen), default=256),
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
