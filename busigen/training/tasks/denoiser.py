"""What the trainings of all denoisers have in common, and the windows of stages 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from busigen.registry import CLASSES, LATENT_FACTOR, SOLVER_STEPS
from busigen.solver import solver_steps
from busigen.training import losses
from busigen.training.examples import (
    Frames,
    WindowExamples,
    bucket_sizes,
    load_examples,
    save_examples,
    select,
    window_examples,
)
from busigen.training.fitting import fit_lesion_styles
from busigen.training.networks.inference import Velocity, blend_input, integrate
from busigen.training.networks.variance import Residuals, amplitudes, mean_square
from busigen.training.recipe import TaskSpec
from busigen.training.tasks import base as sheets
from busigen.training.tasks.base import TaskContext, mean_loss, nothing_to_train_on
from busigen.training.trainer import mixed_precision


class DenoiserTask:
    """Common to all denoisers: the velocity objective over examples that a subclass supplies.

    ``examples`` names the encoding that a subclass draws from.
    """

    examples: str

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        self.spec, self.setting, self.device = spec, setting, setting.device
        self.module, self.velocity = module, Velocity(module)
        self.times = [step.t for step in solver_steps(spec.component, SOLVER_STEPS[spec.component])]
        self.train, self.held_out = self._examples("train"), self._examples("val")

    def _encode(self, frames: Frames, options: dict[str, Any]) -> dict[int, WindowExamples]:
        """Encode all of a split's images; supplied by the subclass."""
        raise NotImplementedError

    def _examples(self, split: str) -> dict[int, WindowExamples]:
        """The task's share of the stage's examples."""
        wanted = torch.tensor(self.setting.frames(split, self.spec).table["row"].to_list())
        label = None if self.spec.label is None else CLASSES.index(self.spec.label)
        chosen = {side: part.only(wanted, label) for side, part in self._encoded(split).items()}
        chosen = {side: part for side, part in chosen.items() if len(part)}
        if not chosen and split == "train":
            raise nothing_to_train_on(self.spec)
        # A class without a held-out image is validated on training ones: a poor figure, but no crash on small sets.
        return chosen or self._examples("train")

    def _encoded(self, split: str) -> dict[int, WindowExamples]:
        """All of a split's examples; base and adapters draw from one encoding, which is kept on disk."""
        variants = self.spec.variants if split == "train" else 1
        path = self.setting.cache / f"{self.examples}-{split}-{variants}.safetensors"
        if not path.exists():
            frames = Frames(self.setting.prepared, select(self.setting.prepared, split, limit=self.setting.max_images))
            options = {
                "networks": self.setting.networks,
                "variants": variants,
                "seed": self.setting.seed,
                "device": self.device,
                "progress": self.setting.report(f"{self.examples}: encoding {len(frames)} {split} images"),
            }
            save_examples(path, self._encode(frames, options) if len(frames) else {})
        return load_examples(path)

    def _condition(self, batch: dict[str, Tensor], generator: Generator) -> tuple[Tensor, ...]:
        """Condition channels and, in ``batch['weight']``, where the loss counts."""
        return ()

    def _draw(self, examples: dict[int, WindowExamples], generator: Generator) -> dict[str, Tensor]:
        sides = list(examples)
        counts = torch.tensor([float(len(examples[side])) for side in sides])
        side = sides[int(torch.multinomial(counts, 1, generator=generator))]
        size = bucket_sizes(examples, self.spec.batch)[side]
        return examples[side].batch(torch.randint(len(examples[side]), (size,), generator=generator), self.device)

    def _loss(
        self,
        examples: dict[int, WindowExamples],
        generator: Generator,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch,
    ) -> Tensor:
        batch = change(self._draw(examples, generator))
        condition = self._condition(batch, generator)
        x, t, target = losses.noisy(batch["clean"], generator, self.times)
        output = self.velocity(x, t, batch["label"], batch["tokens"], batch["keep"], *condition)
        return losses.velocity(output.float(), target, batch["weight"])

    def loss(self, generator: Generator) -> Tensor:
        """See :class:`busigen.training.trainer.Task`."""
        return self._loss(self.train, generator)

    def error(self, generator: Generator, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Tensor:
        """Velocity error of a held-out batch after a change to it, for ablations."""
        return self._loss(self.held_out, generator, change)

    def validate(self) -> float:
        """Mean velocity error on held-out groups."""
        return mean_loss(lambda g: self._loss(self.held_out, g))

    def findings(self) -> dict[str, Any]:
        """See :class:`busigen.training.trainer.Task`."""
        return {}

    def _sampled(self, count: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = Generator().manual_seed(1)
        examples = self.held_out[min(self.held_out)]
        index = torch.linspace(0, len(examples) - 1, min(count, len(examples))).long()
        batch = examples.batch(index, self.device)
        condition = self._condition(batch, generator)
        noise = torch.randn(batch["clean"].shape, generator=generator).to(self.device)
        steps = solver_steps(self.spec.component, 8)
        return batch, integrate(self.velocity, noise, batch["label"], batch["tokens"], batch["keep"], steps, *condition)

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        """Decode with fixed noise, so that sheets of different steps can be compared."""

        def decode(latents: Tensor) -> Tensor:
            side = latents.shape[-1] * LATENT_FACTOR
            noise = torch.randn(latents.shape[0], 1, side, side, generator=Generator().manual_seed(2))
            return self.setting.networks.decoder(latents, noise.to(latents))

        return decode


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
        residuals = {side: list(self._residuals(part)) for side, part in self.train.items()}
        held_out = [part for found in self.held_out.values() for part in self._residuals(found)]
        # Training windows tell how what is left open is shaped, and held-out ones how much it is.
        gap = mean_square(held_out) / max(mean_square([part for found in residuals.values() for part in found]), 1e-9)
        for side, parts in residuals.items():
            spectrum.fit(side // LATENT_FACTOR, parts, max(1.0, gap))
        # Drawn at held-out places of any class: at those it has learnt, a network holds back more than it will in use.
        places = self._places()
        for side, part in places.items():
            spectrum.compensate(side // LATENT_FACTOR, list(self._residuals(part, generated=True)))
        if self.spec.component == "lesion" and places:
            # Stage 3 goes on with what is on both sides of its ring.
            real = [amplitudes(b["clean"], b["mask"]) for part in self.train.values() for b in self._batches(part)]

            def draw(styles: Tensor) -> Tensor:
                spectrum.styles.copy_(styles)
                return torch.cat(
                    [amplitudes(self._generated(b), b["mask"]) for part in places.values() for b in self._batches(part)]
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

    def _residuals(self, part: WindowExamples, *, generated: bool = False) -> Iterator[Residuals]:
        """What two answers to pure noise miss of windows, or of those that the solver draws in their places."""
        generator = Generator().manual_seed(self.setting.seed)
        for batch in self._batches(part):
            usable = batch["weight"]
            target = self._generated(batch) if generated else batch["clean"]
            condition = self._condition(batch, generator)
            seen = (batch["label"], batch["tokens"], batch["keep"])
            residuals = []
            for _ in range(2):
                x = torch.randn(target.shape, generator=generator).to(self.device)
                with mixed_precision(self.device):
                    answer = x - self.velocity(x, torch.ones(len(x), device=self.device), *seen, *condition)
                residuals.append(((target - answer) * usable).float().cpu())
            yield residuals[0], residuals[1], (condition[-1] * usable).cpu()

    def _generated(self, batch: dict[str, Tensor]) -> Tensor:
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
