"""The task that trains stage 1: codes of outlines, the images around them, and the calibration to a class's lesions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from busigen.data.geometry import Mask, largest_component
from busigen.registry import ASKED_LENGTH, BUCKETS, CLASSES
from busigen.runtime.sampling import quality_gates
from busigen.training.examples import Frames, WindowExamples, outline_examples, random_lesion, to_tensor
from busigen.training.networks.inference import integrate
from busigen.training.networks.outline import COUNT
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import background_images
from busigen.training.tasks import TaskContext, grid, outlined, to_pictures
from busigen.training.tasks.denoiser import Batch, Buckets, DenoiserTask

CONDITIONED_SHARE = 0.5  # Share of examples with any attribute given.
ATTRIBUTE_SHARE = 0.3  # Share of these with each attribute given.
BIRADS_SHARE = 0.5  # Share of examples with a known BI-RADS category given.


def lesions(frames: Frames, seed: int) -> list[Mask]:
    """One lesion of each image that has any."""
    return [random_lesion(frames[k], np.random.default_rng((seed, k))) for k in frames.with_lesion()]


def random_condition(code: Tensor, birads: Tensor, generator: Generator) -> Tensor:
    """A random part of codes ``(B, D)`` and BI-RADS flags ``(B, 4)``, as of :meth:`OutlineSpace.condition`."""
    size = code.shape[0]
    anything = torch.rand(size, 1, generator=generator) < CONDITIONED_SHARE
    flags = (anything & (torch.rand(size, COUNT, generator=generator) < ATTRIBUTE_SHARE)).to(code)
    shown = (torch.rand(size, 1, generator=generator) < BIRADS_SHARE).to(code)
    return torch.cat((code[:, :COUNT] * flags, flags, birads * shown), dim=1)


MEASURED_OUTLINES = 768  # Outlines whose attributes are measured, half in healed images and half in backgrounds.
MEASURED_FORMS = 256  # Those of them whose form is measured.
BATCH = 32  # Outlines that are measured at a time.


class MaskTask(DenoiserTask):
    """Stage 1: an outline's code from the healed image's tokens and, at times, a part of the answer."""

    examples = "outlines"

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        # Adapters keep the base's basis, since the frozen weights read codes in it.
        if spec.label is None:
            module.space.fit(lesions(context.frames("train", spec), context.seed))
        self.space = module.space
        super().__init__(spec, context, module)
        # An adapter has the spread of its class.
        module.spectrum.fit(torch.cat([part.tensors["clean"] for part in self.train.values()]))

    def _encode(self, frames: Frames, **options: Any) -> Buckets:
        assert self.context.healed is not None
        tensors = outline_examples(frames, self.context.healed, self.space, **options)
        return {BUCKETS[0]: WindowExamples(tensors)} if tensors else {}

    def _condition(self, batch: Batch, generator: Generator) -> tuple[Tensor, ...]:
        return (random_condition(batch["clean"], batch["birads"], generator),)

    def findings(self) -> dict[str, Any]:
        """Calibrate an adapter's outlines to its class's lesions."""
        spread = self.module.spectrum
        spread.forget()
        if self.spec.label is None:
            return {}
        images, valid = self._healthy_images()
        codes = self._sampled_codes(images).to(self.device)
        # Of all of the class's lesions, where they are: the adapter's sources may hold few of them, and training
        # mirrors and crops images.
        real = lesions(self.context.images("train", label=self.spec.label), self.context.seed)
        spread.fit_attributes(codes, self.space.encode(real))
        spread.fit_form(codes[:MEASURED_FORMS], lambda calibrated: self._accepted(calibrated, valid), real)
        return {"gains": [[round(float(value), 3) for value in band] for band in spread.gains]}

    def _healthy_images(self) -> tuple[list[NDArray[np.uint8]], list[Mask]]:
        """Healed images and backgrounds, shuffled, and which of their pixels are no bars."""
        assert self.context.healed is not None
        frames = self.context.images("train")
        rng = np.random.default_rng(self.context.seed)
        # Of lesions of any class, because the adapter knows the images of its own by heart.
        chosen = [int(k) for k in rng.permutation(frames.with_lesion())[: MEASURED_OUTLINES // 2]]
        found = [(self.context.healed(int(frames.table["row"][k]), 0), frames[k].valid) for k in chosen]
        if self.context.drawer is not None:
            progress = self.context.report("backgrounds: drawing")
            found += background_images(self.context.drawer, len(found), seed=self.context.seed, progress=progress)
        mixed = [found[int(k)] for k in rng.permutation(len(found))]
        return [image for image, _ in mixed], [valid for _, valid in mixed]

    def _sampled_codes(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The solver's codes of the task's class in images, without conditions."""
        generator = Generator().manual_seed(self.context.seed + 1)
        parts = []
        for start in range(0, len(images), BATCH):
            seen = torch.stack([to_tensor(image) for image in images[start : start + BATCH]]).to(self.device)
            keep = torch.ones(len(seen), self.context.networks.preset.tokens, device=self.device)
            noise = torch.randn(len(seen), self.module.length, generator=generator).to(self.device)
            label = torch.full((len(seen),), CLASSES.index(str(self.spec.label)), device=self.device)
            asked = torch.zeros(len(seen), ASKED_LENGTH, device=self.device)
            tokens = self.context.networks.tokens(seen, keep).float()
            parts.append(integrate(self.velocity, noise, label, tokens, keep, self.steps, asked).cpu())
        return torch.cat(parts)

    def _accepted(self, codes: Tensor, valid: Sequence[Mask]) -> list[Mask]:
        """The codes' lesions within the valid pixels of images, without those that the quality gates refuse."""
        nothing = torch.zeros(1, ASKED_LENGTH, device=self.device)
        distances = torch.cat([self.space.distance(part, nothing) for part in codes.split(BATCH)])
        accepted = []
        for distance, inside in zip(distances, valid, strict=False):
            raw = distance[0].cpu().numpy() > 0
            mask = largest_component(raw & inside)
            if quality_gates.mask_reason(raw, mask, inside) is None:
                accepted.append(mask)
        return accepted

    def sheet(self) -> Image.Image:
        """Real and sampled outlines on their signed distances."""
        batch, samples = self._sampled(10)
        nothing = torch.zeros(1, ASKED_LENGTH, device=self.device)
        rows = []
        for code in (batch["clean"], samples):
            fields = self.space.distance(code, nothing) / 32.0
            masks = (fields[:, 0] > 0).cpu().numpy()
            rows.append([outlined(p, mask) for p, mask in zip(to_pictures(fields), masks, strict=True)])
        return grid(rows)
