"""What the trainings of all denoisers have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from busigen.registry import CLASSES, LATENT_FACTOR, SOLVER_STEPS
from busigen.solver import solver_steps
from busigen.training import objectives
from busigen.training.examples import (
    Frames,
    WindowExamples,
    bucket_sizes,
    load_examples,
    save_examples,
    select,
)
from busigen.training.networks import Velocity, integrate
from busigen.training.recipe import TaskSpec
from busigen.training.setting import Setting, mean_loss, nothing_to_train_on


class DenoiserTask:
    """Common to all denoisers: the velocity objective over examples that a subclass supplies.

    ``examples`` names the encoding that a subclass draws from.
    """

    examples: str

    def __init__(self, spec: TaskSpec, setting: Setting, module: Any) -> None:
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
        x, t, target = objectives.noisy(batch["clean"], generator, self.times)
        output = self.velocity(x, t, batch["label"], batch["tokens"], batch["keep"], *condition)
        return objectives.velocity(output.float(), target, batch["weight"])

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
