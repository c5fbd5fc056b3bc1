"""The tasks that learn from pixels: those of the autoencoder, of its decoder and of the context encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from busigen.data.geometry import GRAIN_SCALE, Mask, around, overlap
from busigen.mtf import KNOTS, LARGEST_GAIN, Transfer, detail, passed
from busigen.noise_styles import Floats, bounded, fitted
from busigen.registry import BACKGROUND_SPECKLE, LATENT_FACTOR, MASK_CHANNELS, RESOLUTION, SCANNERS, SPECKLE_GAIN
from busigen.training import losses
from busigen.training.examples import ANY_SHARE, Frame, Frames, to_tensor, told
from busigen.training.losses import FEATURES, Discriminant, Texture, large_enough, patches, profile
from busigen.training.networks.autoencoder import Critic
from busigen.training.networks.build import MaskedAutoencoder, mask_condition, region_condition, scanner_condition
from busigen.training.networks.inference import shown
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import SIDE, ZONES, away_from_cuts, letterboxed, rollout_backgrounds, rollout_windows
from busigen.training.tasks import Task, TaskContext, grid, random_frames, to_pictures
from busigen.training.trainer import load_state, save_state


class ContextTask(Task):
    """Masked-autoencoder pre-training of the context encoder on all images."""

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        super().__init__(spec, context)
        self.module = self.network = MaskedAutoencoder(module).to(context.device)

    def _batch(self, frames: Frames, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        side = 256 // self.network.patch
        images, keeps = [], []
        for frame, rng in random_frames(frames, size, generator):
            keep = np.ones((side, side), dtype=np.float32)
            # Blocks, as edit regions drop patches, and scattered ones, which make the task hard enough.
            for _ in range(2):
                y, x = rng.integers(0, side, 2)
                keep[y : y + rng.integers(side // 4, side // 2 + 1), x : x + rng.integers(side // 4, side // 2 + 1)] = 0
            keep[rng.random((side, side)) < 0.4] = 0
            images.append(to_tensor(frame.image))
            keeps.append(torch.from_numpy(keep.ravel()))
        return torch.stack(images).to(self.device), torch.stack(keeps).to(self.device)

    def _loss(self, data: Frames, generator: Generator) -> Tensor:
        images, keep = self._batch(data, self.spec.batch, generator)
        return losses.masked_patches(self.network(images, keep).float(), images, keep, self.network.patch)

    def sheet(self) -> Image.Image:
        """Images, their kept patches, and what is predicted."""
        images, keep = self._batch(self.held_out, 6, Generator().manual_seed(1))
        output = self.network(images, keep).transpose(1, 2)
        patch = self.network.patch
        full = nn.functional.fold(output, 256, patch, stride=patch)
        seen = nn.functional.interpolate(keep.view(-1, 1, 256 // patch, 256 // patch), scale_factor=patch)
        return grid([to_pictures(row) for row in (images, images * seen, full)])


HOLE_SHARE = 0.3  # Share of the autoencoder's crops with a grey hole, as windows of stage 2 have.
LATENT_NOISE = 0.15  # Noise on the latents in the autoencoder's training, as a share of each channel's deviation.

Decoded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # Two decodings, pixels, their weight, and latents.


class AutoencoderTask(Task):
    """The whole autoencoder, on random crops."""

    crop = 96

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        super().__init__(spec, context)
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
                # The encoder must cope with holes, and the decoder need not paint them.
                window[hole], weight[hole] = 0.0, 0.0
            pixels.append(window)
            weights.append(weight)
        return torch.stack(pixels).to(self.device), torch.stack(weights).to(self.device)

    def _decoded(self, data: Any, generator: Generator) -> Decoded:
        pixels, weight = self._batch(data, self.spec.batch, generator)
        latents = self.autoencoder.encoder(pixels)
        return *self._twice(latents, pixels, generator, self.autoencoder.decoder), pixels, weight, latents.float()

    @staticmethod
    def _twice(
        latents: Tensor, pixels: Tensor, generator: Generator, decoder: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Two decodings of the same latents, with noise in the shape of ``pixels``."""
        spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True).to(latents)
        # Noise makes the decoder forgive small errors of the denoisers, and keeps grains out of the latents.
        noisy = latents + LATENT_NOISE * spread * torch.randn(latents.shape, generator=generator).to(latents)
        noise = torch.cat([torch.randn(pixels.shape, generator=generator).to(pixels) for _ in range(2)])
        first, second = decoder(torch.cat((noisy, noisy)), noise).float().chunk(2)
        return first, second

    def _score(self, decoded: Decoded, generator: Generator) -> Tensor:
        return losses.reconstruction(*decoded, generator)

    def _loss(self, data: Frames, generator: Generator) -> Tensor:
        return self._score(self._decoded(data, generator), generator)

    def sheet(self) -> Image.Image:
        """Held-out crops above their reconstructions."""
        generator = Generator().manual_seed(1)
        pixels, _ = self._batch(self.held_out, 8, generator)
        output = self.autoencoder(pixels, torch.randn(pixels.shape, generator=generator).to(pixels))
        return grid([to_pictures(pixels), to_pictures(output)])


class DecoderTask(AutoencoderTask):
    """The decoder alone, against visible cells of the latents and a critic, which sees more than single patches.

    With the lattice loss from the start on, the decoder would avoid edges, and lose sharpness.
    """

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        super().__init__(spec, context, module)
        module.encoder.requires_grad_(False)
        self.critic = Critic(module.config.latent_channels).to(context.device)
        self.module = nn.ModuleDict({"autoencoder": module, "critic": self.critic})

    def _contested(self, decoded: Decoded, generator: Generator) -> Tensor:
        first, _, pixels, weight, latents = decoded
        side = LATENT_FACTOR * latents.shape[-1]
        ours, critics = self.critic.contest(shown(first * weight, side), shown(pixels * weight, side), latents)
        return self._score(decoded, generator) + losses.CRITIC_WEIGHT * ours + critics

    def _score(self, decoded: Decoded, generator: Generator) -> Tensor:
        """The decoder's loss without its critic, whose scores change their meaning with every step."""
        first, second, pixels, _, _ = decoded
        seams = losses.lattice(first, pixels) + losses.lattice(second, pixels)
        return super()._score(decoded, generator) + losses.LATTICE_WEIGHT * seams

    def loss(self, generator: Generator) -> Tensor:
        """The sum of the decoder's and the critic's losses of one training batch."""
        return self._contested(self._decoded(self.train, generator), generator)


FEWEST, BACKGROUNDS = 128, 512  # Fewest images of either kind from which filters are fitted; most that are drawn.
CORRECTIONS = 2  # Times that the fit corrects its filters, since short ones cannot follow every gain.
MOST_MENDED = 2.0  # Largest factor by which a correction changes the filters' spread.
Picture = tuple[NDArray[np.uint8], Mask]  # An image ``(H, W)`` and its pixels that count.


def fit_transfer(real: Iterable[Picture], generated: Sequence[Picture], seed: int) -> Transfer | None:
    """The filters through which drawn images have their detail distributed as real ones have.

    Pixels of ``generated`` images that do not count lie outside their frame; ``seed`` seeds the filters that are tried.
    They are clipped to :data:`busigen.mtf.LARGEST_GAIN` with a warning. None with fewer than ``FEWEST`` images of
    either, or if drawn images lack nothing that real ones vary by.
    """
    if len(generated) < FEWEST:
        return None
    wanted, plain = _measured(real), _measured(generated)
    if min(len(wanted), len(plain)) < FEWEST:
        return None
    result = Transfer(wanted.mean(axis=0) - plain.mean(axis=0), fitted(wanted, plain))
    if not result.factor.size:
        return None
    for _ in range(CORRECTIONS):
        # Clipped as in use: what lies beyond the bound has no effect, and must not sway the rest.
        mean, factor = (np.clip(part, -LARGEST_GAIN, LARGEST_GAIN) for part in (result.mean, result.factor))
        clipped = Transfer(mean, factor)
        found = _measured(_filtered(clipped, generated, seed))
        before, aim, after = (float(values.var(axis=0).sum()) for values in (plain, wanted, found))
        share = math.sqrt(max(aim - before, 1e-9) / max(after - before, 1e-9))
        share = min(max(share, 1.0 / MOST_MENDED), MOST_MENDED)
        result = Transfer(result.mean + wanted.mean(axis=0) - found.mean(axis=0), share * result.factor)
    mean, factor = (bounded(part, LARGEST_GAIN, "transfer") for part in (result.mean, result.factor))
    return Transfer(mean, factor)


def _measured(pictures: Iterable[Picture]) -> Floats:
    found = [detail(image, usable) for image, usable in pictures]
    return np.array([part for part in found if part is not None]).reshape(-1, 2 * len(KNOTS))


def _filtered(transfer: Transfer, generated: Iterable[Picture], seed: int) -> Iterable[Picture]:
    rng = np.random.default_rng(seed)
    for image, usable in generated:
        frame = around(usable, 0)
        result = image.copy()
        normals = rng.standard_normal((transfer.factor.shape[1],))
        result[frame] = passed(image[frame], transfer.kernels(normals))
        yield result, usable


class FinishTask(DecoderTask):
    """The decoder, against opponents that see its pixels as a user will.

    It gets what the stages draw in the places of real lesions, judged after the paste against real pixels, backgrounds
    of the prior, and real latents, lest they be forgotten. Here it first reads masks, to draw margins. Opponents are a
    second critic, which sees the outline and knows the scanner, and linear discriminants of texture and of brightness
    across outlines.
    """

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        super().__init__(spec, context, module)
        mean, std = context.networks.latents_mean, context.networks.latents_std
        self.latents_mean, self.latents_std = (part.view(1, -1, 1, 1).to(self.device) for part in (mean, std))
        self.texture = Texture().to(self.device)
        self.judge = Critic(MASK_CHANNELS + 1 + SCANNERS, pixel_channels=2).to(self.device)
        groups = ("image", "background", *ZONES)
        self.discriminants: Any = nn.ModuleDict({name: Discriminant(self.texture.features) for name in groups})
        self.discriminants["profile"] = Discriminant(FEATURES)
        self.discriminants.to(self.device)
        parts = {"critic": self.critic, "judge": self.judge, "discriminants": self.discriminants}
        self.module = nn.ModuleDict({"autoencoder": module, **parts})
        self.windows = self._cached("drawn", rollout_windows, frames=self.train, variants=spec.variants)
        count = min(BACKGROUNDS, len(self.train))
        self.backgrounds = self._cached("drawn-backgrounds", rollout_backgrounds, count=count)
        self.of_scanner = [self.train.of_scanner(number) for number in range(SCANNERS + 1)]

    def _cached(self, name: str, draw: Callable[..., dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
        """Drawn latents, from the run's cache."""
        path = self.context.cache / f"{name}-{self.spec.variants}.safetensors"
        if not path.exists():
            assert self.context.drawer is not None
            progress = self.context.report(f"{name}: drawing")
            found = draw(drawer=self.context.drawer, seed=self.context.seed, progress=progress, **options)
            save_state(path, found, {})
        return load_state(path)[0]

    def loss(self, generator: Generator) -> Tensor:
        """The sum of the decoder's and its opponents' losses of one training batch."""
        decoded = self._decoded(self.train, generator)
        first, _, pixels, weight, _ = decoded
        total = self._contested(decoded, generator) + self._texture_loss(("image",), first, pixels, weight)
        return total + self._windows_loss(generator) + self._backgrounds_loss(generator)

    def _texture_loss(self, names: tuple[str, ...], generated: Tensor, real: Tensor, zones: Tensor) -> Tensor:
        """Loss to the discriminants of zones ``(B, Z, H, W)``, one for each."""
        usable = large_enough(zones)
        ours, theirs = self.texture(generated, zones), self.texture(real, zones)
        total = generated.new_zeros(())
        for number, name in enumerate(names):
            rows = usable[:, number]
            total = total + self.discriminants[name](ours[rows, number], theirs[rows, number])
        return losses.TEXTURE_WEIGHT * total

    def _decode(self, latents: Tensor, mask: Tensor | None, scanner: Tensor, generator: Generator) -> Tensor:
        """Normalised latents of lesions with their masks, or of backgrounds, to pixels as in use."""
        noise = torch.randn(len(latents), 1, *(LATENT_FACTOR * n for n in latents.shape[2:]), generator=generator)
        gain = BACKGROUND_SPECKLE * SPECKLE_GAIN if mask is None else SPECKLE_GAIN
        raw = latents * self.latents_std + self.latents_mean
        shown = told(scanner).to(self.device) * (torch.rand(len(latents), 1, generator=generator) >= ANY_SHARE).to(raw)
        pixels: Tensor = self.autoencoder.decoder(raw, gain * noise.to(latents), mask, shown).float()
        return pixels

    def _pasted(self, chosen: Tensor, generator: Generator) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Drawn lesions: their batch, the real pixels, the decoded ones, and these pasted into the real ones."""
        batch = {name: tensor[chosen].to(self.device).float() for name, tensor in self.windows.items()}
        real = batch["pixels"] / 127.5 - 1.0
        decoded = self._decode(batch["latents"], batch["mask"], self.windows["scanner"][chosen], generator)
        return batch, real, decoded, pasted_into(real, decoded.clamp(-1.0, 1.0), batch["brightness"], batch["grains"])

    def _windows_loss(self, generator: Generator) -> Tensor:
        """Loss of drawn lesions, pasted into real images."""
        if not self.windows:
            return self.latents_mean.new_zeros(())
        chosen = torch.randint(len(self.windows["latents"]), (self.spec.batch,), generator=generator)
        batch, real, decoded, pasted = self._pasted(chosen, generator)
        usable, mask = batch["usable"], batch["mask"]
        described = torch.cat((mask_condition(mask), region_condition(batch["edit"])), dim=1)
        ours, critics = self._judged(pasted * usable, real * usable, mask, described, self.windows["scanner"][chosen])
        seams = losses.LATTICE_WEIGHT * losses.lattice(decoded, real)
        textures = self._texture_loss(ZONES, pasted, real, batch["zones"] * usable)
        places = patches(mask, usable)
        (ours_across, seen), (theirs_across, _) = profile(pasted, places), profile(real, places)
        margins = self.discriminants["profile"](ours_across[seen], theirs_across[seen])
        return losses.CRITIC_WEIGHT * ours + critics + seams + textures + losses.TEXTURE_WEIGHT * margins

    def _judged(
        self, generated: Tensor, real: Tensor, mask: Tensor, described: Tensor, scanner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses of the decoder and of the critic that knows mask, edit region and scanner."""
        described = torch.cat((described, scanner_condition(described, told(scanner).to(self.device))), dim=1)
        generated, real = (torch.cat((pixels, mask), dim=1) for pixels in (generated, real))
        return self.judge.contest(generated, real, described)

    def _backgrounds_loss(self, generator: Generator) -> Tensor:
        """Loss of drawn backgrounds, compared with healthy places of real images at the same depth."""
        count = self.spec.batch
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        latents, real, weights, scanners = [], [], [], []
        for position in rng.integers(0, len(self.backgrounds["latents"]), count):
            background, frame = (self.backgrounds[name][int(position)] for name in ("latents", "frame"))
            cells, inside, depth = _part_of(background.float(), frame, rng)
            scanners.append(self.backgrounds["scanner"][int(position)])
            pixels, healthy = self._place(depth, int(scanners[-1]), rng)
            latents.append(cells)
            real.append(pixels)
            weights.append(inside * healthy)
        scanner = torch.stack(scanners)
        generated = self._decode(torch.stack(latents).to(self.device), None, scanner, generator)
        theirs, weight = torch.stack(real).to(self.device), torch.stack(weights).to(self.device)
        described = torch.zeros(count, MASK_CHANNELS + 1, *(SIDE // LATENT_FACTOR,) * 2, device=self.device)
        pixels = generated.clamp(-1.0, 1.0)
        ours, critics = self._judged(pixels * weight, theirs * weight, torch.zeros_like(weight), described, scanner)
        seams = losses.LATTICE_WEIGHT * losses.lattice(generated, theirs)
        textures = self._texture_loss(("background",), pixels, theirs, weight)
        return losses.CRITIC_WEIGHT * ours + critics + seams + textures

    def _place(self, depth: float, scanner: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A crop of a scanner's real image at a depth of 0 (its top) to 1, and where it shows healthy tissue."""
        frame = self.train[int(rng.choice(self.of_scanner[scanner]))].varied(rng)
        top, left, height, width = frame.place
        y = min(top + round(depth * max(0, height - SIDE)), RESOLUTION - SIDE)
        x = min(left + int(rng.integers(0, max(0, width - SIDE) + 1)), RESOLUTION - SIDE)
        cut = (slice(y, y + SIDE), slice(x, x + SIDE))
        return to_tensor(frame.image[cut]), torch.from_numpy(_healthy(frame)[cut].astype(np.float32))[None]

    def findings(self) -> dict[str, Any]:
        """Half the squared Mahalanobis distances of statistics, and the filters of :mod:`busigen.mtf`."""
        distances = {name: round(part.distance, 3) for name, part in self.discriminants.items()}
        generator = Generator().manual_seed(self.context.seed)
        generated: list[Picture] = []
        parts = (self.backgrounds[name].split(self.spec.batch) for name in ("latents", "frame", "scanner"))
        for latents, places, scanner in zip(*parts, strict=True):
            generated += letterboxed(self._decode(latents.to(self.device).float(), None, scanner, generator), places)
        transfer = self._transfer(range(len(self.train)), generated)
        if transfer is not None:
            shown_as = np.array(self.backgrounds["scanner"])
            single = {
                name: self._transfer(self.of_scanner[k], [generated[int(at)] for at in np.flatnonzero(shown_as == k)])
                for k, name in enumerate(self.context.scanners, start=1)
            }
            transfer = replace(transfer, scanners={name: own for name, own in single.items() if own is not None})
        return {"texture": distances, "transfer": None if transfer is None else transfer.to_json()}

    def _transfer(self, positions: Iterable[int], generated: Sequence[Picture]) -> Transfer | None:
        frames = (self.train[int(position)] for position in positions)
        return fit_transfer(((frame.image, _healthy(frame)) for frame in frames), generated, self.context.seed)

    def sheet(self) -> Image.Image:
        """Real windows, what is drawn in their places, and drawn backgrounds."""
        generator = Generator().manual_seed(1)
        rows = []
        if self.windows:
            chosen = torch.linspace(0, len(self.windows["latents"]) - 1, 10).long()
            _, real, _, pasted = self._pasted(chosen, generator)
            rows += [to_pictures(real), to_pictures(pasted)]
        cells = SIDE // LATENT_FACTOR
        latents = self.backgrounds["latents"][:10, :, :cells, :cells].to(self.device).float()
        rows.append(
            to_pictures(self._decode(latents, None, self.backgrounds["scanner"][:10], generator).clamp(-1.0, 1.0))
        )
        return grid(rows)


def _healthy(frame: Frame) -> Mask:
    return frame.valid & ~frame.overlay & (frame.lesions == 0)


def _part_of(latents: Tensor, frame: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """A crop of a drawn background: latents of ``SIDE`` pixels a side, which pixels count, and its depth."""
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
    """:func:`busigen.data.geometry.paste` with a fade and a gradient; all ``(B, 1, S, S)``, the last two opacities."""
    with torch.autocast(image.device.type, enabled=False):
        change = painted - image
        # A Gaussian, cut off as that of scipy.ndimage.
        radius = math.ceil(4.0 * GRAIN_SCALE)
        offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / GRAIN_SCALE) ** 2)
        kernel = (kernel / kernel.sum()).to(change)
        both = F.pad(torch.cat((change, image)), (radius,) * 4, mode="replicate")
        smooth, old = F.conv2d(F.conv2d(both, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).chunk(2)
        return image + brightness * smooth + grains * (change - smooth) + overlap(grains) * (image - old)
