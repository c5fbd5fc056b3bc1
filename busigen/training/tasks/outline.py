"""Stage 1's training: outlines' codes, the images that they are learnt in, and the calibration to a class's lesions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from busigen.data.geometry import Mask, largest_component
from busigen.registry import ASKED_LENGTH, BUCKETS, CLASSES, SOLVER_STEPS
from busigen.runtime.sampling import quality_gates
from busigen.solver import solver_steps
from busigen.training.examples import (
    ENCODE_BATCH,
    Frame,
    Frames,
    Progress,
    WindowExamples,
    joined,
    random_lesion,
    select,
    to_tensor,
)
from busigen.training.networks.inference import Networks, integrate
from busigen.training.networks.outline import COUNT, OutlineSpace, birads_flags
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import background_images
from busigen.training.tasks import base as sheets
from busigen.training.tasks.base import TaskContext
from busigen.training.tasks.denoiser import DenoiserTask

CONDITIONED_SHARE, ATTRIBUTE_SHARE, BIRADS_SHARE = 0.5, 0.3, 0.5
"""Share of draws in which anything is asked for, and then of each attribute; share of known BI-RADS that is shown."""


def lesions(frames: Frames, seed: int) -> list[Mask]:
    """One lesion of each image that has any: what the outline space is fitted on."""
    rows = [k for k in range(len(frames)) if frames.table["class"][k] != "normal"]
    return [random_lesion(frames[k], np.random.default_rng((seed, k))) for k in rows]


@torch.no_grad()
def outline_examples(
    frames: Frames,
    healed: Callable[[int, int], NDArray[np.uint8]],
    space: OutlineSpace,
    *,
    networks: Networks,
    variants: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """Encode stage 1's examples.

    ``healed(row, variant)`` returns the image without lesion, with decoy edits (:mod:`busigen.training.healing`).
    Half of the variants fill the frame, because synthetic backgrounds have no letterbox bars.

    Returns:
        ``clean`` ``(N, D)`` fp32 codes, ``birads`` ``(N, 4)`` bool, ``tokens`` ``(N, T, C)`` fp16, ``keep`` ``(N, T)``
        bool, ``weight`` ``(N, 1)``, ``label`` and ``row`` ``(N,)``; nothing at all where no row has a lesion.
    """
    parts: list[dict[str, Tensor]] = []
    rows = [k for k in range(len(frames)) if frames.table["class"][k] != "normal"]
    jobs = [(position, variant) for position in rows for variant in range(variants)]
    for start in range(0, len(jobs), ENCODE_BATCH):
        part = jobs[start : start + ENCODE_BATCH]
        chosen = [_varied(frames, position, variant, healed, seed) for position, variant in part]
        images = torch.stack([to_tensor(frame.image) for frame in chosen]).to(device)
        keep = torch.ones(len(chosen), networks.preset.tokens, device=device)
        parts.append(
            {
                "clean": space.encode([frame.lesions > 0 for frame in chosen]).cpu(),
                "birads": torch.from_numpy(birads_flags([frames.table["birads"][position] for position, _ in part])),
                "tokens": networks.tokens(images, keep).half().cpu(),
                "keep": keep.bool().cpu(),
                "weight": torch.ones(len(chosen), 1),
                "label": torch.tensor([CLASSES.index(frame.label) for frame in chosen]),
                "row": torch.tensor([int(frames.table["row"][position]) for position, _ in part]),
            }
        )
        progress(min(start + ENCODE_BATCH, len(jobs)), len(jobs))
    return joined(parts) if parts else {}


def _varied(
    frames: Frames, position: int, variant: int, healed: Callable[[int, int], NDArray[np.uint8]], seed: int
) -> Frame:
    """One healed image with one of its lesions, under another gain, flip and cut per variant."""
    row = int(frames.table["row"][position])
    rng = np.random.default_rng((seed, row, variant, 1))
    frame = frames[position]
    # One lesion is drawn before the geometry changes, so that the others do not become targets half way.
    lesion = random_lesion(frame, rng).astype(np.uint8)
    frame = replace(frame, image=healed(row, variant), lesions=lesion).with_gain(rng)
    frame = frame.flipped() if rng.random() < 0.5 else frame
    return frame.filling(rng) if rng.random() < 0.5 else frame


def random_condition(code: Tensor, birads: Tensor, generator: Generator) -> Tensor:
    """The part of the answer that a training step conditions stage 1 on.

    Args:
        code: ``(B, D)``, standardised.
        birads: ``(B, 4)`` one-hot or all zero.
        generator: draws which attributes are given.

    Returns:
        ``(B, ASKED_LENGTH)`` as :meth:`OutlineSpace.condition` gives it.
    """
    size = code.shape[0]
    anything = torch.rand(size, 1, generator=generator) < CONDITIONED_SHARE
    flags = (anything & (torch.rand(size, COUNT, generator=generator) < ATTRIBUTE_SHARE)).to(code)
    shown = (torch.rand(size, 1, generator=generator) < BIRADS_SHARE).to(code)
    return torch.cat((code[:, :COUNT] * flags, flags, birads * shown), dim=1)


MEASURED_OUTLINES, MEASURED_FORMS, BATCH = 768, 256, 32
"""Outlines whose attributes are measured, half of them in healed images and half in backgrounds that the prior draws;
of these, those whose form is; how many are drawn at a time."""


class MaskTask(DenoiserTask):
    """Stage 1: the outline's code from the healed image's tokens and, now and then, a part of the answer."""

    examples = "outlines"

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        # Adapters keep the base's basis, or their codes would mean something else to the frozen weights.
        if spec.label is None:
            module.space.fit(lesions(setting.frames("train", spec), setting.seed))
        self.space = module.space
        super().__init__(spec, setting, module)
        # An adapter's outlines differ from each other by as much as its class's do.
        module.spectrum.fit(torch.cat([part.tensors["clean"] for part in self.train.values()]))

    def _encode(self, frames: Frames, options: dict[str, Any]) -> dict[int, WindowExamples]:
        assert self.setting.healed is not None
        tensors = outline_examples(frames, self.setting.healed, self.space, **options)
        return {BUCKETS[0]: WindowExamples(tensors)} if tensors else {}

    def _condition(self, batch: dict[str, Tensor], generator: Generator) -> tuple[Tensor, ...]:
        return (random_condition(batch["clean"], batch["birads"], generator),)

    def findings(self) -> dict[str, Any]:
        """Carries a class's drawn outlines over to how its lesions are distributed."""
        spread = self.module.spectrum
        spread.forget()
        if self.spec.label is None:
            return {}
        images, valid = self._healthy_images()
        codes = self._sampled_codes(images).to(self.device)
        # Its distribution is that of all lesions of the class, of which an adapter's sources may hold few, and where
        # they are: training mirrors and crops images, and what it was shown lies elsewhere.
        frames = self._rows(self.spec.label)
        real = lesions(frames, self.setting.seed)
        spread.fit_attributes(codes, self.space.encode(real))
        spread.fit_form(
            codes[:MEASURED_FORMS], lambda calibrated: self._accepted(calibrated, valid[:MEASURED_FORMS]), real
        )
        return {"gains": [[round(float(value), 3) for value in band] for band in spread.gains]}

    def _rows(self, label: str | None) -> Frames:
        """Training images of a class, or of all."""
        rows = select(self.setting.prepared, "train", limit=self.setting.max_images, label=label)
        return Frames(self.setting.prepared, rows)

    def _healthy_images(self) -> tuple[list[NDArray[np.uint8]], list[Mask]]:
        """Healthy images as stage 1 will see them, of both kinds and in no order, and which pixels are image."""
        assert self.setting.healed is not None
        frames = self._rows(None)
        # Any lesion's image: where its own class is, an adapter has learnt by heart.
        places = np.flatnonzero((frames.table["class"] != "normal").to_numpy())
        rng = np.random.default_rng(self.setting.seed)
        chosen = [int(k) for k in rng.permutation(places)[: MEASURED_OUTLINES // 2]]
        found = [(self.setting.healed(int(frames.table["row"][k]), 0), frames[k].valid) for k in chosen]
        if self.setting.drawer is not None:
            found += background_images(
                self.setting.drawer,
                len(found),
                seed=self.setting.seed,
                device=self.device,
                progress=self.setting.report("backgrounds: drawing"),
            )
        mixed = [found[int(k)] for k in rng.permutation(len(found))]
        return [image for image, _ in mixed], [valid for _, valid in mixed]

    def _sampled_codes(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """What the solver draws of the task's class in images where nothing is asked for."""
        generator = Generator().manual_seed(self.setting.seed + 1)
        table = solver_steps("mask", SOLVER_STEPS["mask"])
        parts = []
        for start in range(0, len(images), BATCH):
            seen = torch.stack([to_tensor(image) for image in images[start : start + BATCH]]).to(self.device)
            keep = torch.ones(len(seen), self.setting.networks.preset.tokens, device=self.device)
            noise = torch.randn(len(seen), self.module.length, generator=generator).to(self.device)
            label = torch.full((len(seen),), CLASSES.index(str(self.spec.label)), device=self.device)
            asked = torch.zeros(len(seen), ASKED_LENGTH, device=self.device)
            tokens = self.setting.networks.tokens(seen, keep).float()
            parts.append(integrate(self.velocity, noise, label, tokens, keep, table, asked).cpu())
        return torch.cat(parts)

    def _accepted(self, codes: Tensor, valid: Sequence[Mask]) -> list[Mask]:
        """The lesions that codes stand for in images with these pixels, but for those that gates refuse."""
        nothing = torch.zeros(len(codes), ASKED_LENGTH, device=self.device)
        distances = torch.cat(
            [self.space.distance(*part) for part in zip(codes.split(BATCH), nothing.split(BATCH), strict=True)]
        )
        accepted = []
        for distance, inside in zip(distances, valid, strict=True):
            raw = distance[0].cpu().numpy() > 0
            mask = largest_component(raw & inside)
            if quality_gates.mask_reason(raw, mask, inside) is None:
                accepted.append(mask)
        return accepted

    def sheet(self) -> Image.Image:
        """Real and sampled outlines on their signed distances."""
        batch, samples = self._sampled(10)
        nothing = torch.zeros(len(samples), ASKED_LENGTH, device=self.device)
        rows = []
        for code in (batch["clean"], samples):
            pictures = self.space.distance(code, nothing) / 32.0
            rows.append([sheets.outlined(sheets.to_picture(p), p[0].cpu().numpy() > 0) for p in pictures])
        return sheets.grid(rows)
