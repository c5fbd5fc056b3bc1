"""The task that trains stages 2 and 3, and measures what a trained one leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from busigen.registry import CLASSES, LATENT_FACTOR, SOLVER_STEPS
from busigen.solver import solver_steps
from busigen.training import sheets
from busigen.training.compute import mixed_precision
from busigen.training.denoiser_task import DenoiserTask
from busigen.training.examples import (
    Frames,
    WindowExamples,
    window_examples,
)
from busigen.training.networks import blend_input, integrate
from busigen.training.style_fit import fit_lesion_styles
from busigen.training.wavelets import Missed, amplitudes, squares

MEASURED, MEASURED_BATCH = 384, 32
"""Windows of one size on which it is measured how much a trained network leaves open, and how many at a time."""

PAINTED_NOISE = 0.15
"""Noise put on the painted latents that stage 3 sees in training, where they are real, because in use they are not
(conditioning augmentation, Ho et al. 2022)."""


class WindowTask(DenoiserTask):
    """Stages 2 and 3: paint the edit region, or the ring inside its rim, of a window."""

    examples = "windows"

    def _encode(self, frames: Frames, options: dict[str, Any]) -> dict[int, WindowExamples]:
        return window_examples(frames, **options)

    def _condition(self, batch: dict[str, Tensor], generator: Generator) -> tuple[Tensor, ...]:
        region, known, outside = batch["edit"], batch["known"], 0.25
        if self.spec.component == "blend":
            noise = torch.randn(known.shape, generator=generator).to(known)
            known = blend_input(known, batch["clean"] + PAINTED_NOISE * noise, batch["edit"], batch["ring"])
            region, outside = batch["ring"], 0.1
        batch["weight"] = batch["weight"] * torch.where(region > 0, 1.0, outside)
        return known, batch["mask"], region

    def findings(self) -> dict[str, Any]:
        """How much more is missed of held-out windows; by what is left open of all, the solver's steps are set."""
        spectrum = self.module.spectrum
        missed = {side: list(self._missed(part)) for side, part in self.train.items()}
        held_out = [part for found in self.held_out.values() for part in self._missed(found)]
        # Training windows tell how what is left open is shaped, and held-out ones how much it is.
        gap = squares(held_out) / max(squares([part for found in missed.values() for part in found]), 1e-9)
        for side, parts in missed.items():
            spectrum.fit(side // LATENT_FACTOR, parts, max(1.0, gap))
        # Drawn at held-out places of any class: at those it has learnt, a network holds back more than it will in use.
        places = self._places()
        for side, part in places.items():
            spectrum.make_up(side // LATENT_FACTOR, list(self._missed(part, drawn=True)))
        if self.spec.component == "lesion" and places:
            # Stage 3 goes on with what is on both sides of its ring.
            real = [amplitudes(b["clean"], b["mask"]) for part in self.train.values() for b in self._batches(part)]

            def draw(styles: Tensor) -> Tensor:
                spectrum.styles.copy_(styles)
                return torch.cat(
                    [amplitudes(self._drawn(b), b["mask"]) for part in places.values() for b in self._batches(part)]
                ).cpu()

            spectrum.styles.copy_(fit_lesion_styles(torch.cat(real).cpu(), draw, len(spectrum.styles)))
        return {"held_out_gap": round(gap, 4)}

    def _places(self) -> dict[int, WindowExamples]:
        """All held-out windows, if there are any; for an adapter, those around lesions, as if of its class."""
        places = self._encoded("val")
        if self.spec.label is not None:
            for part in places.values():
                around = part.tensors["label"] != CLASSES.index("normal")
                part.tensors = {name: tensor[around] for name, tensor in part.tensors.items()}
                part.tensors["label"].fill_(CLASSES.index(self.spec.label))
        return {side: part for side, part in places.items() if len(part)}

    def _batches(self, part: WindowExamples) -> Iterator[dict[str, Tensor]]:
        """At most ``MEASURED`` examples, the same ones whenever they are asked for, in batches."""
        generator = Generator().manual_seed(self.setting.seed)
        for index in torch.randperm(len(part), generator=generator)[:MEASURED].split(MEASURED_BATCH):
            yield part.batch(index, self.device)

    def _missed(self, part: WindowExamples, *, drawn: bool = False) -> Iterator[Missed]:
        """What two answers to pure noise miss of windows, or of those that the solver draws in their places."""
        generator = Generator().manual_seed(self.setting.seed)
        for batch in self._batches(part):
            usable = batch["weight"]
            target = self._drawn(batch) if drawn else batch["clean"]
            condition = self._condition(batch, generator)
            seen = (batch["label"], batch["tokens"], batch["keep"])
            missed = []
            for _ in range(2):
                x = torch.randn(target.shape, generator=generator).to(self.device)
                with mixed_precision(self.device):
                    answer = x - self.velocity(x, torch.ones(len(x), device=self.device), *seen, *condition)
                missed.append(((target - answer) * usable).float().cpu())
            yield missed[0], missed[1], (condition[-1] * usable).cpu()

    def _drawn(self, batch: dict[str, Tensor]) -> Tensor:
        """What the solver draws in the place of examples."""
        generator = Generator().manual_seed(self.setting.seed + 1)
        noise = torch.randn(batch["clean"].shape, generator=generator).to(self.device)
        seen = (batch["label"], batch["tokens"], batch["keep"])
        table = solver_steps(self.spec.component, SOLVER_STEPS[self.spec.component])
        with mixed_precision(self.device):
            return integrate(self.velocity, noise, *seen, table, *self._condition(dict(batch), generator)).float()

    def sheet(self) -> Image.Image:
        """Real windows, the same with the model's latents, outlines of masks drawn in."""
        batch, latents = self._sampled(8)
        decode = self._decoder()
        rows = [[sheets.to_picture(p) for p in decode(z)] for z in (batch["clean"], latents)]
        grids = nn.functional.pixel_shuffle(batch["mask"], 2)
        grids = nn.functional.interpolate(grids, scale_factor=LATENT_FACTOR // 2, mode="bilinear")
        masks = [grid[0].cpu().numpy() >= 0.5 for grid in grids]
        rows.append([sheets.outlined(p, m) for p, m in zip(rows[1], masks, strict=True)])
        return sheets.grid(rows)
