"""The task that trains stage 1, and measures how what it draws differs from real outlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from busigen.data.geometry import Mask, largest_component
from busigen.registry import ASKED_LENGTH, BUCKETS, CLASSES, SOLVER_STEPS
from busigen.runtime import gates
from busigen.solver import solver_steps
from busigen.training import sheets
from busigen.training.denoiser_task import DenoiserTask
from busigen.training.drawn import background_images
from busigen.training.examples import Frames, WindowExamples, select, to_tensor
from busigen.training.networks import integrate
from busigen.training.outline_examples import lesions, outline_examples, random_asking
from busigen.training.recipe import TaskSpec
from busigen.training.setting import Setting

MEASURED, FORMS, BATCH = 768, 256, 32
"""Outlines whose attributes are measured, half of them in healed images and half in backgrounds that the prior draws;
of these, those whose form is; how many are drawn at a time."""


class MaskTask(DenoiserTask):
    """Stage 1: the outline's code from the healed image's tokens and, now and then, a part of the answer."""

    examples = "outlines"

    def __init__(self, spec: TaskSpec, setting: Setting, module: Any) -> None:
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
        return (random_asking(batch["clean"], batch["birads"], generator),)

    def findings(self) -> dict[str, Any]:
        """Carries a class's drawn outlines over to how its lesions are distributed."""
        spread = self.module.spectrum
        spread.forget()
        if self.spec.label is None:
            return {}
        images, valid = self._contexts()
        codes = self._sampled_codes(images).to(self.device)
        # Its distribution is that of all lesions of the class, of which an adapter's sources may hold few, and where
        # they are: training mirrors and crops images, and what it was shown lies elsewhere.
        frames = self._rows(self.spec.label)
        real = lesions(frames, self.setting.seed)
        spread.fit_attributes(codes, self.space.encode(real))
        spread.fit_form(codes[:FORMS], lambda calibrated: self._accepted(calibrated, valid[:FORMS]), real)
        return {"gains": [[round(float(value), 3) for value in band] for band in spread.gains]}

    def _rows(self, label: str | None) -> Frames:
        """Training images of a class, or of all."""
        rows = select(self.setting.prepared, "train", limit=self.setting.max_images, label=label)
        return Frames(self.setting.prepared, rows)

    def _contexts(self) -> tuple[list[NDArray[np.uint8]], list[Mask]]:
        """Healthy images as stage 1 will see them, of both kinds and in no order, and which pixels are image."""
        assert self.setting.healed is not None
        frames = self._rows(None)
        # Any lesion's image: where its own class is, an adapter has learnt by heart.
        places = np.flatnonzero((frames.table["class"] != "normal").to_numpy())
        rng = np.random.default_rng(self.setting.seed)
        chosen = [int(k) for k in rng.permutation(places)[: MEASURED // 2]]
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
            if gates.mask_reason(raw, mask, inside) is None:
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
