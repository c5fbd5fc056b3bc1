"""The tasks that train the autoencoder: as a whole, its decoder alone, and the decoder against what stages draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from busigen.data.geometry import GRAIN_SCALE
from busigen.registry import BACKGROUND_SPECKLE, LATENT_FACTOR, MASK_CHANNELS, RESOLUTION, SPECKLE_GAIN
from busigen.training import losses
from busigen.training.examples import Frames, to_tensor
from busigen.training.fitting import Picture, fit_transfer
from busigen.training.losses import FEATURES, Discriminant, Texture, large_enough, patches, profile
from busigen.training.networks.autoencoder import Critic
from busigen.training.networks.build import mask_condition, region_condition
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import SIDE, ZONES, away_from_cuts, letterboxed, rollout_backgrounds, rollout_windows
from busigen.training.tasks import base as sheets
from busigen.training.tasks.base import PixelTask, TaskContext, mean_loss, random_frames
from busigen.training.trainer import load_state, save_state

HOLE_SHARE = 0.3
"""Share of the autoencoder's crops with a grey hole, as the windows of stage 2 have."""

LATENT_NOISE = 0.15
"""Noise on the latents in the autoencoder's training, as a share of each channel's deviation."""


Decoded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Two decodings of a batch, the pixels, where they count, and the latents that were decoded, without noise."""


class AutoencoderTask(PixelTask):
    """Random crops through encoder and decoder; some crops carry a grey hole, as the windows of stage 2 do."""

    crop = 96

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        super().__init__(spec, setting)
        self.autoencoder = self.module = module

    def _batch(self, frames: Frames, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        pixels, weights = [], []
        for frame, rng in random_frames(frames, size, generator):
            top, left = rng.integers(0, frame.image.shape[0] - self.crop + 1, 2)
            cut = (slice(top, top + self.crop), slice(left, left + self.crop))
            window = to_tensor(frame.image[cut])
            weight = torch.from_numpy((~frame.overlay[cut]).astype(np.float32))[None]
            if rng.random() < HOLE_SHARE:
                y, x = rng.integers(0, 64, 2)
                hole = (..., slice(y, y + rng.integers(16, 64)), slice(x, x + rng.integers(16, 64)))
                # The encoder must cope with holes; nobody will ever ask the decoder for one.
                window[hole], weight[hole] = 0.0, 0.0
            pixels.append(window)
            weights.append(weight)
        return torch.stack(pixels).to(self.device), torch.stack(weights).to(self.device)

    def _noise(self, pixels: Tensor, generator: Generator) -> Tensor:
        return torch.randn(pixels.shape, generator=generator).to(pixels)

    def _decoded(self, frames: Frames, generator: Generator) -> Decoded:
        pixels, weight = self._batch(frames, self.spec.batch, generator)
        latents = self.autoencoder.encoder(pixels)
        spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True).to(latents)
        # Noise makes the decoder forgive what the denoisers get slightly wrong, and keeps grains out of the latents.
        noisy = latents + LATENT_NOISE * spread * torch.randn(latents.shape, generator=generator).to(latents)
        noise = torch.cat([self._noise(pixels, generator) for _ in range(2)])
        first, second = self.autoencoder.decoder(torch.cat((noisy, noisy)), noise).float().chunk(2)
        return first, second, pixels, weight, latents.float()

    def _loss(self, frames: Frames, generator: Generator) -> Tensor:
        return losses.reconstruction(*self._decoded(frames, generator), generator)

    def sheet(self) -> Image.Image:
        """Held-out crops above their reconstructions."""
        generator = Generator().manual_seed(1)
        pixels, _ = self._batch(self.held_out, 8, generator)
        output = self.autoencoder(pixels, self._noise(pixels, generator))
        return sheets.grid([[sheets.to_picture(p) for p in pixels], [sheets.to_picture(p) for p in output]])


class DecoderTask(AutoencoderTask):
    """The decoder alone, once the latents are settled: against its cells' showing in what it draws, and a critic.

    From the start on, pressure against the cells would cost sharpness: the decoder then flees from edges instead. The
    critic finds what the energy distance, which compares patch by patch, does not see.
    """

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        super().__init__(spec, setting, module)
        module.encoder.requires_grad_(False)
        self.critic = Critic(module.config.latent_channels).to(setting.device)
        self.module = nn.ModuleDict({"autoencoder": module, "critic": self.critic})

    def _contested(self, decoded: Decoded, generator: Generator) -> Tensor:
        """The sum of what the decoder and what the critic lose."""
        first, _, pixels, weight, latents = decoded
        ours, critics = self.critic.contest(first * weight, pixels * weight, latents)
        return self._score(decoded, generator) + losses.CRITIC_WEIGHT * ours + critics

    def _score(self, decoded: Decoded, generator: Generator) -> Tensor:
        first, second, pixels, weight, latents = decoded
        seams = losses.lattice(first, pixels) + losses.lattice(second, pixels)
        score = losses.reconstruction(first, second, pixels, weight, latents, generator)
        return score + losses.LATTICE_WEIGHT * seams

    def loss(self, generator: Generator) -> Tensor:
        """See :class:`busigen.training.trainer.Task`; the sum of what the decoder and what the critic lose."""
        return self._contested(self._decoded(self.train, generator), generator)

    def validate(self) -> float:
        """Mean loss of fixed held-out crops, without the critic's part: its scores mean another thing every step."""
        return mean_loss(lambda g: self._score(self._decoded(self.held_out, g), g))


BACKGROUNDS = 512
"""Backgrounds that are drawn, if there are as many training images."""

Generated = dict[str, Tensor]


class FinishTask(DecoderTask):
    """The decoder, against opponents that see its pixels as a user will.

    It has learnt on latents of real images. Drawn ones differ from these in what no loss of stage 2 or 3 sees, and a
    lesion's window is pasted into an image: so here the decoder is given what the stages draw at the places of real
    lesions, and backgrounds that the prior draws, and both are judged after the paste and beside what is really there.
    Here it is first told masks, and can draw a margin where the outline says. One opponent is a critic, told the
    outline pixel by pixel as well; others are linear discriminants between statistics of texture, and of how brightness
    goes across the outline.
    Latents of real images stay a part of every batch, or the decoder would forget what they mean.
    """

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        super().__init__(spec, setting, module)
        self.setting = setting
        mean, std = setting.networks.latents_mean, setting.networks.latents_std
        self.latents_mean, self.latents_std = (part.view(1, -1, 1, 1).to(self.device) for part in (mean, std))
        self.texture = Texture().to(self.device)
        self.judge = Critic(MASK_CHANNELS + 1, pixel_channels=2).to(self.device)
        groups = ("image", "background", *ZONES)
        self.discriminants = nn.ModuleDict({name: Discriminant(self.texture.features) for name in groups})
        self.discriminants["profile"] = Discriminant(FEATURES)
        self.discriminants.to(self.device)
        self.module = nn.ModuleDict(
            {
                "autoencoder": module,
                "critic": self.critic,
                "judge": self.judge,
                "discriminants": self.discriminants,
            }
        )
        self.windows = self._cached(
            "drawn", lambda options: rollout_windows(self.train, variants=spec.variants, **options)
        )
        count = min(BACKGROUNDS, len(self.train))
        self.backgrounds = self._cached(
            "drawn-backgrounds", lambda options: rollout_backgrounds(count=count, **options)
        )

    def _cached(self, name: str, draw: Callable[[dict[str, Any]], Generated]) -> Generated:
        """What the stages draw, from the run's cache or for it."""
        path = self.setting.cache / f"{name}-{self.spec.variants}.safetensors"
        if not path.exists():
            assert self.setting.drawer is not None
            options = {
                "drawer": self.setting.drawer,
                "seed": self.setting.seed,
                "device": self.device,
                "progress": self.setting.report(f"{name}: drawing"),
            }
            save_state(path, draw(options), {})
        return load_state(path)[0]

    def loss(self, generator: Generator) -> Tensor:
        """See :class:`busigen.training.trainer.Task`; the sum of what the decoder and what its opponents lose."""
        decoded = self._decoded(self.train, generator)
        first, _, pixels, weight, _ = decoded
        total = self._contested(decoded, generator) + self._texture_loss(("image",), first, pixels, weight)
        return total + self._windows_loss(generator) + self._backgrounds_loss(generator)

    def _texture_loss(self, names: tuple[str, ...], generated: Tensor, real: Tensor, zones: Tensor) -> Tensor:
        """What is lost to the discriminants of some zones ``(B, Z, H, W)``, each of which has its own."""
        usable = large_enough(zones)
        ours, theirs = self.texture(generated, zones), self.texture(real, zones)
        total = generated.new_zeros(())
        for number, name in enumerate(names):
            rows = usable[:, number]
            total = total + self.discriminants[name](ours[rows, number], theirs[rows, number])
        return losses.TEXTURE_WEIGHT * total

    def _decode(self, latents: Tensor, mask: Tensor | None, gain: float, generator: Generator) -> Tensor:
        """Normalised latents, and a mask if they show a lesion, to pixels as in use."""
        noise = torch.randn(len(latents), 1, *(LATENT_FACTOR * n for n in latents.shape[2:]), generator=generator)
        raw = latents * self.latents_std + self.latents_mean
        pixels: Tensor = self.autoencoder.decoder(raw, gain * noise.to(latents), mask).float()
        return pixels

    def _windows_loss(self, generator: Generator) -> Tensor:
        """Of lesions in real images, once they are pasted."""
        if not self.windows:
            return self.latents_mean.new_zeros(())
        chosen = torch.randint(len(self.windows["latents"]), (self.spec.batch,), generator=generator)
        batch = {name: tensor[chosen].to(self.device).float() for name, tensor in self.windows.items()}
        real, usable = batch["pixels"] / 127.5 - 1.0, batch["usable"]
        mask = batch["mask"]
        decoded = self._decode(batch["latents"], mask, SPECKLE_GAIN, generator)
        pasted = pasted_into(real, decoded.clamp(-1.0, 1.0), batch["brightness"], batch["grains"])
        described = torch.cat((mask_condition(mask), region_condition(batch["edit"])), dim=1)
        ours, critics = self._judged(pasted * usable, real * usable, mask, described)
        seams = losses.LATTICE_WEIGHT * losses.lattice(decoded, real)
        textures = self._texture_loss(ZONES, pasted, real, batch["zones"] * usable)
        margins = self._margin_loss(pasted, real, patches(mask, usable))
        return losses.CRITIC_WEIGHT * ours + critics + seams + textures + margins

    def _margin_loss(self, generated: Tensor, real: Tensor, places: Tensor) -> Tensor:
        """What is lost to the discriminant of how brightness goes across outlines."""
        (ours, seen), (theirs, _) = profile(generated, places), profile(real, places)
        return losses.TEXTURE_WEIGHT * self.discriminants["profile"](ours[seen], theirs[seen])

    def _judged(self, generated: Tensor, real: Tensor, mask: Tensor, described: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder and its judge lose over crops ``(B, 1, S, S)`` with a mask of the same shape."""
        generated, real = (torch.cat((pixels, mask), dim=1) for pixels in (generated, real))
        return self.judge.contest(generated, real, described)

    def _backgrounds_loss(self, generator: Generator) -> Tensor:
        """Of backgrounds, beside places of real images as deep that show no lesion."""
        count = self.spec.batch
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        latents, real, weights = [], [], []
        for position in rng.integers(0, len(self.backgrounds["latents"]), count):
            background, frame = (self.backgrounds[name][int(position)] for name in ("latents", "frame"))
            cells, inside, depth = _part_of(background.float(), frame, rng)
            pixels, healthy = self._place(depth, rng)
            latents.append(cells)
            real.append(pixels)
            weights.append(inside * healthy)
        generated = self._decode(
            torch.stack(latents).to(self.device), None, BACKGROUND_SPECKLE * SPECKLE_GAIN, generator
        )
        theirs, weight = torch.stack(real).to(self.device), torch.stack(weights).to(self.device)
        described = torch.zeros(
            count, MASK_CHANNELS + 1, *(n // LATENT_FACTOR for n in generated.shape[2:]), device=self.device
        )
        pixels = generated.clamp(-1.0, 1.0)
        ours, critics = self._judged(pixels * weight, theirs * weight, torch.zeros_like(weight), described)
        seams = losses.LATTICE_WEIGHT * losses.lattice(generated, theirs)
        textures = self._texture_loss(("background",), pixels, theirs, weight)
        return losses.CRITIC_WEIGHT * ours + critics + seams + textures

    def _place(self, depth: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A crop of a real image at a depth of 0 (its top) to 1, and where it shows healthy tissue."""
        frame = self.train[int(rng.integers(len(self.train)))]
        frame = (frame.flipped() if rng.random() < 0.5 else frame).with_gain(rng)
        top, left, height, width = frame.place
        y = min(top + round(depth * max(0, height - SIDE)), RESOLUTION - SIDE)
        x = min(left + int(rng.integers(0, max(0, width - SIDE) + 1)), RESOLUTION - SIDE)
        cut = (slice(y, y + SIDE), slice(x, x + SIDE))
        healthy = frame.valid & ~frame.overlay & (frame.lesions == 0)
        return to_tensor(frame.image[cut]), torch.from_numpy(healthy[cut].astype(np.float32))[None]

    def findings(self) -> dict[str, Any]:
        """How far apart drawn and real statistics were at the end, and what filters drawn images still want.

        The first is half the squared Mahalanobis distance; the others see :mod:`busigen.mtf`.
        """
        parts = {name: part for name, part in self.discriminants.items() if isinstance(part, Discriminant)}
        distances = {name: round(part.distance, 3) for name, part in parts.items()}
        transfer = fit_transfer(self._healthy(), self._background_pictures(), self.setting.seed)
        return {"texture": distances, "transfer": None if transfer is None else transfer.to_json()}

    def _healthy(self) -> Iterator[Picture]:
        """Training images, and where they show healthy tissue."""
        for position in range(len(self.train)):
            frame = self.train[position]
            yield frame.image, frame.valid & ~frame.overlay & (frame.lesions == 0)

    def _background_pictures(self) -> list[Picture]:
        """What the prior draws, as it is decoded in use."""
        generator = Generator().manual_seed(self.setting.seed)
        found: list[Picture] = []
        parts = (self.backgrounds[name].split(self.spec.batch) for name in ("latents", "frame"))
        for latents, frames in zip(*parts, strict=True):
            raw = latents.to(self.device).float()
            found += letterboxed(self._decode(raw, None, BACKGROUND_SPECKLE * SPECKLE_GAIN, generator), frames)
        return found

    def sheet(self) -> Image.Image:
        """Real windows, what is drawn in their places, and drawn backgrounds."""
        generator = Generator().manual_seed(1)
        rows = []
        if self.windows:
            chosen = torch.linspace(0, len(self.windows["latents"]) - 1, 10).long()
            batch = {name: tensor[chosen].to(self.device).float() for name, tensor in self.windows.items()}
            real = batch["pixels"] / 127.5 - 1.0
            decoded = self._decode(batch["latents"], batch["mask"], SPECKLE_GAIN, generator).clamp(-1.0, 1.0)
            pasted = pasted_into(real, decoded, batch["brightness"], batch["grains"])
            rows += [[sheets.to_picture(p) for p in part] for part in (real, pasted)]
        cells = SIDE // LATENT_FACTOR
        latents = self.backgrounds["latents"][:10, :, :cells, :cells].to(self.device).float()
        generated = self._decode(latents, None, BACKGROUND_SPECKLE * SPECKLE_GAIN, generator).clamp(-1.0, 1.0)
        rows.append([sheets.to_picture(p) for p in generated])
        return sheets.grid(rows)


def _part_of(latents: Tensor, frame: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """A part of a drawn background: latents of ``SIDE`` pixels a side, which of these count, and how deep it lies.

    What lies outside the image's frame does not count, nor what the decoder draws along a cut.
    """
    top, left, height, width = frame.tolist()
    depth = float(rng.random())
    places = (top + depth * max(0, height - SIDE), left + rng.random() * max(0, width - SIDE))
    last = (RESOLUTION - SIDE) // LATENT_FACTOR
    row, column = (min(round(place / LATENT_FACTOR), last) for place in places)
    cells = SIDE // LATENT_FACTOR
    counts = torch.zeros(1, RESOLUTION, RESOLUTION)
    counts[:, top : top + height, left : left + width] = 1.0
    y, x = row * LATENT_FACTOR, column * LATENT_FACTOR
    inside = counts[:, y : y + SIDE, x : x + SIDE] * away_from_cuts(row, column, RESOLUTION // LATENT_FACTOR)
    return latents[:, row : row + cells, column : column + cells], inside, depth


def pasted_into(image: Tensor, painted: Tensor, brightness: Tensor, grains: Tensor) -> Tensor:
    """:func:`busigen.data.geometry.paste` with a gradient: all ``(B, 1, S, S)``, the last two are its opacities."""
    with torch.autocast(image.device.type, enabled=False):
        change = painted - image
        smooth = _smoothed(change)
        return image + brightness * smooth + grains * (change - smooth)


def _smoothed(image: Tensor) -> Tensor:
    """A Gaussian of ``GRAIN_SCALE`` pixels, cut off where ``scipy.ndimage`` does."""
    radius = math.ceil(4.0 * GRAIN_SCALE)
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / GRAIN_SCALE) ** 2)
    kernel = (kernel / kernel.sum()).to(image)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
