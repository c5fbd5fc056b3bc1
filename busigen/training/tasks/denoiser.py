"""The tasks that train denoisers: what all have in common, windows (stages 2, 3), the healthy prior, outlines (1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn

from busigen.data.geometry import Mask, largest_component
from busigen.noise_styles import LARGEST_FACTOR, Floats, bounded, fitted, powers, styled
from busigen.registry import ASKED_LENGTH, BUCKETS, CLASSES, LATENT_FACTOR
from busigen.runtime.sampling import quality_gates
from busigen.training import losses
from busigen.training.examples import (
    ANY_SHARE,
    Frames,
    WindowExamples,
    background_examples,
    outline_examples,
    random_lesion,
    to_tensor,
    told,
    window_examples,
)
from busigen.training.networks.build import place_condition, scanner_condition
from busigen.training.networks.inference import Velocity, blend_input, integrate
from busigen.training.networks.outline import COUNT
from busigen.training.networks.variance import Residuals, Spectrum, amplitudes, mean_square, transformed
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import background_images
from busigen.training.tasks import Buckets, Picture, Task, TaskContext, grid, nothing_to_train_on, outlined, to_pictures
from busigen.training.trainer import mixed_precision

Batch = dict[str, Tensor]


class DenoiserTask(Task):
    """A denoiser's velocity objective, over ``examples`` of a name that a stage's base and adapters share."""

    examples: str

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        self.module, self.velocity = module, Velocity(module)
        self.steps = self.velocity.steps(spec.component, context.networks.steps[spec.component])
        super().__init__(spec, context)

    def _encode(self, frames: Frames, **options: Any) -> Buckets:
        raise NotImplementedError

    def _data(self, split: str) -> Buckets:
        """The task's share of the examples."""
        wanted = torch.tensor(self.context.frames(split, self.spec).table["row"].to_list())
        label = None if self.spec.label is None else CLASSES.index(self.spec.label)
        chosen = {side: part.only(wanted, label) for side, part in self._encoded(split).items()}
        chosen = {side: part for side, part in chosen.items() if len(part)}
        if not chosen and split == "train":
            raise nothing_to_train_on(self.spec)
        # A class without a held-out image is validated on training ones: a poor figure, but no crash on small sets.
        return chosen or self._data("train")

    def _encoded(self, split: str) -> Buckets:
        """All of a split's examples, from the run's cache."""
        return self.context.examples(self.examples, split, self.spec.variants, self._encode)

    def _condition(self, batch: Batch, generator: Generator) -> tuple[Tensor, ...]:
        """The condition's channels; may change ``batch['weight']``, where the loss counts."""
        raise NotImplementedError

    def _loss(self, data: Buckets, generator: Generator, change: Callable[[Batch], Batch] | None = None) -> Tensor:
        counts = torch.tensor([float(len(part)) for part in data.values()])
        side = list(data)[int(torch.multinomial(counts, 1, generator=generator))]
        # A batch of large windows costs about what one of small ones does.
        least, cells = (data[key].tensors["clean"].shape[-1] for key in (min(data), side))
        size = max(2, self.spec.batch * least**2 // cells**2)
        batch = data[side].batch(torch.randint(len(data[side]), (size,), generator=generator), self.device)
        batch = batch if change is None else change(batch)
        condition = self._condition(batch, generator)
        x, t, target = losses.noisy(batch["clean"], generator, [step.t for step in self.steps], self.velocity.times)
        x = self.velocity.state(x, t)
        output = self.velocity(x, t, batch["label"], batch["tokens"], batch["keep"], *condition)
        return self._error(output.float(), target, t, batch["weight"])

    def _scanner(self, batch: Batch, generator: Generator) -> Tensor:
        """The condition of the images' scanners, some of which the network is not told, so that it learns any."""
        shown = torch.rand(len(batch["scanner"]), generator=generator) >= ANY_SHARE
        return scanner_condition(batch["clean"], told(batch["scanner"]) * shown.to(self.device)[:, None])

    def _error(self, output: Tensor, target: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        return losses.velocity(output, target, weight)

    def error(self, generator: Generator, change: Callable[[Batch], Batch]) -> Tensor:
        """Loss of a held-out batch after a change to it, for ablations."""
        return self._loss(self.held_out, generator, change)

    def _sampled(self, count: int) -> tuple[Batch, Tensor]:
        """Held-out examples, and what is sampled in their places."""
        generator = Generator().manual_seed(1)
        examples = self.held_out[min(self.held_out)]
        index = torch.linspace(0, len(examples) - 1, min(count, len(examples))).long()
        batch = examples.batch(index, self.device)
        condition = self._condition(batch, generator)
        noise = torch.randn(batch["clean"].shape, generator=generator).to(self.device)
        steps = self.velocity.steps(self.spec.component, 8)
        return batch, integrate(self.velocity, noise, batch["label"], batch["tokens"], batch["keep"], steps, *condition)

    def _pictures(self, latents: Tensor) -> list[Picture]:
        """Decoded latents, with the same speckle in every sheet."""
        side = latents.shape[-1] * LATENT_FACTOR
        noise = torch.randn(latents.shape[0], 1, side, side, generator=Generator().manual_seed(2))
        return to_pictures(self.context.networks.decoder(latents, noise.to(latents)))


MEASURED, MEASURED_BATCH = 384, 32  # Windows of one size on which a trained network is measured, and batch.
PAINTED_NOISE = 0.15  # On the latents that stage 3 continues, which are real only in training (Ho et al. 2022).
LESIONS = 64  # Fewest lesions, real or drawn, from which their variation is fitted.
TRIAL = 0.35  # Share of the missing deviation that is tried first; the network carries on and adds to what it is given.


def _share(has: Tensor | Floats, wants: Tensor | Floats, got: Tensor | Floats) -> float:
    """The share of the missing deviation by which drawn samples ``(N, K)`` vary as they should, from one trial."""
    before, aim, after = (float(values.var(0).sum()) for values in (has, wants, got))
    return min(1.0, TRIAL * math.sqrt(max(aim - before, 0.0) / max(after - before, 1e-9)))


def fit_lesion_styles(real: Tensor, draw: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """The ``styles`` ``(C, C)`` of Wavelets with which drawn lesions differ from each other as training lesions do.

    ``real`` are :func:`busigen.training.networks.variance.amplitudes` ``(N, C)`` of training lesions; ``draw`` gives
    those of lesions drawn with some styles. Zeros if these lack nothing or there are fewer than ``LESIONS`` of either.
    """
    nothing = torch.zeros(channels, channels)
    plain = draw(nothing)
    if min(len(real), len(plain)) < LESIONS:
        return nothing
    factor = torch.from_numpy(fitted(real.double().numpy(), plain.double().numpy(), least=0.1)).float()
    if not factor.numel():
        return nothing
    wanted = nn.functional.pad(factor, (0, channels - factor.shape[1]))
    found = wanted * _share(plain, real, draw(TRIAL * wanted))
    return torch.from_numpy(bounded(found.numpy(), LARGEST_FACTOR, "styles of lesions"))


class WindowTask(DenoiserTask):
    """Stages 2 and 3: paint a window's edit region, or the ring inside its rim."""

    examples = "windows"
    outside: ClassVar = {"lesion": 0.25, "blend": 0.1}  # Weights of what lies outside of the region to paint.
    shown = 8  # Windows in a sheet.

    def _encode(self, frames: Frames, **options: Any) -> Buckets:
        return window_examples(frames, **options)

    def _condition(self, batch: Batch, generator: Generator) -> tuple[Tensor, ...]:
        region, known = batch["edit"], batch["known"]
        if self.spec.component == "blend":
            noise = torch.randn(known.shape, generator=generator).to(known)
            known = blend_input(known, batch["clean"] + PAINTED_NOISE * noise, batch["edit"], batch["ring"])
            region = batch["ring"]
        batch["weight"] = batch["weight"] * torch.where(region > 0, 1.0, self.outside[self.spec.component])
        scanner = () if self.velocity.is_stable_diffusion else (self._scanner(batch, generator),)
        return *scanner, known, batch["mask"], region

    def findings(self) -> dict[str, Any]:
        """Fit the solver's steps to the residuals, of which ``held_out_gap`` is held-out ones by training ones."""
        spectrum = self.module.spectrum
        residuals = {side: list(self._residuals(part)) for side, part in self.train.items()}
        held_out = [part for found in self.held_out.values() for part in self._residuals(found)]
        # Training windows tell its shape, and held-out ones its size.
        gap = mean_square(held_out) / max(mean_square([part for found in residuals.values() for part in found]), 1e-9)
        for side, parts in residuals.items():
            spectrum.fit(side // LATENT_FACTOR, parts, max(1.0, gap))
        # At held-out places of any class: where it has learnt, a network holds back more than in use.
        places = self._places()
        for side, part in places.items():
            spectrum.compensate(side // LATENT_FACTOR, list(self._residuals(part, generated=True)))
        if self.spec.component == "lesion" and places:
            # Stage 3 continues what lies on both sides of its ring, and needs none.
            real = [amplitudes(b["clean"], b["mask"]) for part in self.train.values() for b in self._batches(part)]

            def draw(styles: Tensor) -> Tensor:
                spectrum.styles.copy_(styles)
                found = [amplitudes(self._generated(b), b["mask"]) for p in places.values() for b in self._batches(p)]
                return torch.cat(found).cpu()

            spectrum.styles.copy_(fit_lesion_styles(torch.cat(real).cpu(), draw, len(spectrum.styles)))
        return {"held_out_gap": round(gap, 4)}

    def _places(self) -> Buckets:
        """All held-out windows; for an adapter, those around lesions, as if of its class."""
        places = self._encoded("val")
        if self.spec.label is not None:
            for part in places.values():
                around = part.tensors["label"] != CLASSES.index("normal")
                part.tensors = {name: tensor[around] for name, tensor in part.tensors.items()}
                part.tensors["label"].fill_(CLASSES.index(self.spec.label))
        return {side: part for side, part in places.items() if len(part)}

    def _batches(self, part: WindowExamples) -> Iterator[Batch]:
        """At most ``MEASURED`` examples in batches, the same ones every time."""
        generator = Generator().manual_seed(self.context.seed)
        for index in torch.randperm(len(part), generator=generator)[:MEASURED].split(MEASURED_BATCH):
            yield part.batch(index, self.device)

    def _residuals(self, part: WindowExamples, *, generated: bool = False) -> Iterator[Residuals]:
        """What two answers to pure noise miss of real windows, or of those that the solver draws in their places."""
        generator = Generator().manual_seed(self.context.seed)
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

    def _generated(self, batch: Batch) -> Tensor:
        generator = Generator().manual_seed(self.context.seed + 1)
        noise = torch.randn(batch["clean"].shape, generator=generator).to(self.device)
        seen = (batch["label"], batch["tokens"], batch["keep"])
        with mixed_precision(self.device):
            return integrate(self.velocity, noise, *seen, self.steps, *self._condition(dict(batch), generator)).float()

    def sheet(self) -> Image.Image:
        """Real windows, the same with the model's latents, and these with outlines of the masks."""
        batch, latents = self._sampled(self.shown)
        rows = [self._pictures(batch["clean"]), self._pictures(latents)]
        grids = nn.functional.pixel_shuffle(batch["mask"], 2)
        grids = nn.functional.interpolate(grids, scale_factor=LATENT_FACTOR // 2, mode="bilinear")
        masks = [mask[0].cpu().numpy() >= 0.5 for mask in grids]
        rows.append([outlined(p, m) for p, m in zip(rows[1], masks, strict=True)])
        return grid(rows)


class PaintingTask(WindowTask):
    """Stages 2 and 3 by Stable Diffusion: one adapter, which learns the region to paint and nothing else."""

    outside: ClassVar = {"lesion": 0.0, "blend": 0.0}
    shown = 2
    fused_attention = True

    def _error(self, output: Tensor, target: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        # Of the noise, as it was trained: errors of the velocity grow without bound towards pure noise.
        signal = (1.0 - t)[:, None, None, None]
        return losses.velocity(signal * output, signal * target, weight)

    def findings(self) -> dict[str, Any]:
        """Nothing: DDIM's steps have no spread to measure."""
        return {}


STYLED_IMAGES = 128  # Images that are drawn to see what the prior varies by, and again to see the effect of styles.


def fit_styles(spectrum: Spectrum, clean: Tensor, draw: Callable[[Tensor], Tensor], seed: int) -> list[list[float]]:
    """The ``styles`` of a bundle, with which drawn latents vary in their bands as training latents do.

    One trial measures how much of a style the solver carries on: the sum of all bands' variances grows with the square
    of the share that is tried. ``clean`` are training latents ``(N, C, s, s)``; ``draw`` samples the prior from noise.
    Rows are those of :func:`busigen.noise_styles.styled`'s ``factor``; none if drawn images lack nothing or there are
    fewer than ``STYLED_IMAGES`` training images.
    """
    if len(clean) < STYLED_IMAGES:
        return []
    mean, spread = clean.double().mean(0).float(), spectrum.marginal.cpu()

    def measured(latents: Tensor) -> Floats:
        parts = [powers((transformed(part.float() - mean) / spread).numpy()) for part in latents.split(64)]
        return np.concatenate(parts)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(STYLED_IMAGES, *clean.shape[1:], generator=generator)
    real, plain = measured(clean), measured(draw(noise))
    factor = fitted(real, plain)
    if not factor.size:
        return []
    normals = torch.randn(STYLED_IMAGES, factor.shape[1], generator=generator).numpy()
    tried = measured(draw(torch.from_numpy(styled(noise.numpy(), TRIAL * factor, normals))))
    styles = bounded(_share(plain, real, tried) * factor, LARGEST_FACTOR, "styles")
    return [[round(float(value), 4) for value in row] for row in styles]


class BackgroundTask(DenoiserTask):
    """The healthy prior: whole healthy images from noise."""

    examples = "backgrounds"

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        super().__init__(spec, context, module)
        module.spectrum.fit(torch.cat([part.tensors["clean"] for part in self.train.values()]))

    def _encode(self, frames: Frames, **options: Any) -> Buckets:
        assert self.context.healed is not None
        tensors = background_examples(frames, self.context.healed, **options)
        count = tensors["clean"].shape[0]
        tokens, keep = self.context.networks.no_context(1)
        tensors["tokens"], tensors["keep"] = tokens.repeat(count, 1, 1), keep.repeat(count, 1)
        tensors["label"] = torch.full((count,), CLASSES.index("normal"))
        return {BUCKETS[0]: WindowExamples(tensors)}

    def _condition(self, batch: Batch, generator: Generator) -> tuple[Tensor, ...]:
        return self._scanner(batch, generator), place_condition(batch["clean"], batch["frame"])

    def findings(self) -> dict[str, Any]:
        """The styles that drawn images lack (:mod:`busigen.noise_styles`)."""
        names = ("clean", "frame", "scanner")
        clean, places, scanners = (torch.cat([part.tensors[name] for part in self.train.values()]) for name in names)
        chosen = torch.randperm(len(places), generator=Generator().manual_seed(self.context.seed))

        def draw(noise: Tensor) -> Tensor:
            parts = []
            for x, rows in zip(noise.split(16), chosen.split(16), strict=False):
                x, frame, scanner = x.to(self.device), places[rows].to(self.device), told(scanners[rows])
                label = torch.full((len(x),), CLASSES.index("normal"), device=self.device)
                context = self.context.networks.no_context(len(x))
                condition = scanner_condition(x, scanner.to(self.device)), place_condition(x, frame)
                parts.append(integrate(self.velocity, x, label, *context, self.steps, *condition).cpu())
            return torch.cat(parts)

        return {"styles": fit_styles(self.module.spectrum, clean, draw, self.context.seed)}

    def sheet(self) -> Image.Image:
        """Held-out backgrounds (through the autoencoder) above sampled ones."""
        batch, latents = self._sampled(6)
        return grid([self._pictures(batch["clean"]), self._pictures(latents)])


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
