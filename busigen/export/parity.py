"""Parity: the same draws through PyTorch and through the bundle, over the whole trajectory, on image and mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from busigen.errors import ParityError
from busigen.registry import LESION_CLASSES
from busigen.runtime.backend import Backend, OnnxBackend
from busigen.runtime.bundle import Bundle
from busigen.runtime.sampler import Sampler
from busigen.training.models import region_condition
from busigen.training.networks import Networks, blend_input, distance_to_pixels, window_condition

DRAWS = 8
"""Draws compared per class."""

PARITY_SEED = 20_240_02
"""Seed of the compared draws; fixed, so that two exports of one checkpoint report the same figures."""

MIN_DICE = 0.99
"""A mask of 2,000 pixels has an outline of about 160: this allows one pixel in eight of it to flip, which rounding of
weights to fp16 (relative error 5e-4) stays well below."""

MIN_PSNR = 35.0
"""Decibels over the painted window: errors of 4.5 grey levels, below the grain of speckle and not visible."""


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
            return networks.decoder(v["latents"])
        if component == "prior":
            return networks.sample("prior", v["noise"], "normal", *networks.no_context(len(v["noise"])))
        stage, _, label = component.partition("-")
        context = (v["tokens"], v["keep"])
        if stage == "mask":
            return distance_to_pixels(networks.sample(stage, v["noise"], label, *context))
        if stage == "lesion":
            condition = window_condition(v["known"], v["mask"], v["edit"])
        else:
            edit, ring = region_condition(v["edit"]), region_condition(v["ring"])
            condition = window_condition(blend_input(v["known"], v["painted"], edit, ring), v["mask"], v["ring"])
        return networks.sample(stage, v["noise"], label, *context, *condition)


def compare(networks: Networks, bundle: Bundle, *, draws: int = DRAWS) -> dict[str, Any]:
    """Draw the same samples twice and measure how far they are apart, per class.

    Returns:
        Per class: draws compared, smallest Dice, share of masks that are equal to the pixel, smallest PSNR in dB over
        the painted window, largest difference in grey levels, and whether the gates decided alike every time.

    Raises:
        ParityError: a figure misses its threshold.
    """
    report: dict[str, Any] = {"seed": PARITY_SEED, "thresholds": {"dice": MIN_DICE, "psnr": MIN_PSNR}}
    for label in LESION_CLASSES:
        reference = _draws(bundle, TorchBackend(networks), label, draws)
        exported = _draws(bundle, OnnxBackend(bundle), label, draws)
        report[label] = _figures(reference, exported, draws)
    failures = [
        f"{label} {name} {report[label][name]:.4g} is below {limit}"
        for label in LESION_CLASSES
        for name, limit in (("dice", MIN_DICE), ("psnr", MIN_PSNR))
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


Drawn = dict[int, tuple[NDArray[np.uint8], NDArray[np.bool_]]]


def _draws(bundle: Bundle, backend: Backend, label: str, count: int) -> tuple[Drawn, set[tuple[int, str]]]:
    sampler = Sampler(bundle, backend, classes={label: 1.0}, batch_size=4)
    samples, rejections = sampler.attempt(PARITY_SEED, [(index, 0) for index in range(count)])
    return {s.index: (s.image, s.mask) for s in samples}, {(r.index, r.reason) for r in rejections}


def _figures(reference: tuple[Drawn, set], exported: tuple[Drawn, set], draws: int) -> dict[str, Any]:
    (expected, refused), (found, refused_too) = reference, exported
    dice, psnr, largest, equal = [1.0], [99.0], 0, 0
    for index in sorted(set(expected) & set(found)):
        (image, mask), (other, other_mask) = expected[index], found[index]
        dice.append(2.0 * float((mask & other_mask).sum()) / float(mask.sum() + other_mask.sum()))
        difference = np.abs(image.astype(int) - other.astype(int))
        changed = difference[difference > 0]
        # Over the painted pixels alone: the untouched ones would flatter the figure.
        error = float((changed.astype(float) ** 2).sum()) / max(int(mask.sum()), 1)
        psnr.append(min(99.0, 10.0 * float(np.log10(255.0**2 / max(error, 1e-9)))))
        largest, equal = max(largest, int(difference.max())), equal + int((mask == other_mask).all())
    return {
        "draws": draws,
        "compared": len(set(expected) & set(found)),
        "dice": min(dice),
        "equal_masks": equal,
        "psnr": min(psnr),
        "max_grey_difference": largest,
        "same_gates": refused == refused_too,
    }
