"""Losses: functions and statistics of plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from busigen.registry import LATENT_FACTOR

GRAIN_PATCH, COARSE_FACTOR = 8, 4  # Side of the patches that are compared by pixels, and factor of the coarser view.
SPECTRAL_PATCHES = (8, 16, 32)  # Sides of the patches whose spectra are compared: from one speckle grain to several.
SPECTRAL_WEIGHT = 0.1  # Weight of each spectral term: log-magnitudes differ ten times as much as pixels in [-1, 1].
LATTICE_WEIGHT = 5.0  # Weight of the lattice term, which is about 0.02 where cells are visible in the speckle.
CRITIC_WEIGHT = 0.3  # Weight of the decoder's loss to its critic: a third of the pull of the energy distance.
TEXTURE_WEIGHT = 0.005  # Weight of the decoder's loss to the discriminants.
AT_SHARE = 0.5  # Share of a denoiser's training times that are those of the few-step solver.


def _patches(image: Tensor, side: int, stride: int) -> Tensor:
    """Patches of ``(B, 1, H, W)`` as ``(B, P, side, side)``."""
    return image.unfold(2, side, stride).unfold(3, side, stride).flatten(1, 3)


def _views(image: Tensor, offsets: list[int]) -> Iterator[tuple[float, Tensor]]:
    """Yield weight and patches ``(B, P, n)`` of each view of an image: grey levels, fine and coarse, and spectra.

    Log-magnitudes of spectra show speckle's texture without its places. ``offsets`` shift the tilings' rims.
    """
    yield 1.0, _patches(image[..., offsets[0] :, offsets[0] :], GRAIN_PATCH, GRAIN_PATCH).flatten(2)
    yield 1.0, _patches(F.avg_pool2d(image, COARSE_FACTOR), 4, 4).flatten(2)
    for side, offset in zip(SPECTRAL_PATCHES, offsets[1:], strict=True):
        window = torch.hann_window(side, periodic=False, device=image.device)
        patches = _patches(image[..., offset:, offset:], side, side // 2 if side > GRAIN_PATCH else side)
        patches = (patches - patches.mean(dim=(-2, -1), keepdim=True)) * (window[:, None] * window[None, :])
        # The floor is a few times what rounding to grey levels leaves in a frequency.
        yield SPECTRAL_WEIGHT, torch.log(torch.fft.rfft2(patches).abs() / side + 0.004).flatten(2)


def energy(first: Tensor, second: Tensor, target: Tensor, generator: Generator) -> Tensor:
    """Generalised energy distance of a decoder's draws and the image, ``(B, 1, H, W)`` each.

    ``first`` and ``second`` are draws from the same latents. Both are pulled to the image and pushed from each other,
    or they would be a blur (Gritsenko et al. 2020, A spectral energy distance for parallel speech synthesis).
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        # The root of the mean square of each patch makes the energy distance a proper score.
        return ((a - b).pow(2).mean(dim=-1) + 1e-6).sqrt().mean()

    offsets = [int(torch.randint(side, (1,), generator=generator)) for side in (GRAIN_PATCH, *SPECTRAL_PATCHES)]
    total = first.new_zeros(())
    views = (_views(image, offsets) for image in (first, second, target))
    for (weight, one), (_, two), (_, real) in zip(*views, strict=True):
        total = total + weight * (distance(one, real) + distance(two, real) - distance(one, two))
    return total


def lattice(generated: Tensor, target: Tensor) -> Tensor:
    """How visible the latents' cells are in decodings ``(B, 1, H, W)`` of whole cells, compared with their images.

    A decoder's faint seams repeat with every cell, and are noise to the energy distance with its random offsets. So
    grey steps at each of a cell's eight places are compared with the target's, whose edges prefer some places, too.
    """
    total = generated.new_zeros(())
    for turned in (False, True):
        ours, theirs = (image.transpose(2, 3) if turned else image for image in (generated, target))
        for lag in (1, 2, 4):
            total = total + (_steps_by_place(ours, lag) - _steps_by_place(theirs, lag)).pow(2).mean()
    return total


def _steps_by_place(image: Tensor, lag: int) -> Tensor:
    """Mean steps over ``lag`` columns from each place of a cell, relative to their mean."""
    steps = (image[..., lag:] - image[..., :-lag]).abs().mean(dim=(0, 1, 2))
    whole = steps.numel() // LATENT_FACTOR * LATENT_FACTOR
    places = steps[:whole].view(-1, LATENT_FACTOR).mean(dim=0)
    return places / places.mean().clamp(min=1e-6)


def reconstruction(
    first: Tensor, second: Tensor, target: Tensor, weight: Tensor, latents: Tensor, generator: Generator
) -> Tensor:
    """Autoencoder loss: the energy distance of two decodings where ``weight`` is 1, and a pull of latents to zero."""
    score = energy(first * weight, second * weight, target * weight, generator)
    return score + 1e-3 * latents.pow(2).mean()


def masked_patches(output: Tensor, image: Tensor, keep: Tensor, patch: int) -> Tensor:
    """MAE loss: squared error of ``output`` ``(B, N, patch * patch)`` on the dropped patches."""
    target = F.unfold(image, patch, stride=patch).transpose(1, 2)
    hidden = 1.0 - keep
    return ((output - target).pow(2).mean(dim=-1) * hidden).sum() / hidden.sum().clamp(min=1.0)


def noisy(
    clean: Tensor, generator: Generator, at: Sequence[float] = (), within: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """The flow-matching pair at random times, ``within`` bounds: ``x_t``, ``t`` and the target velocity.

    Times are logit-normal (Esser et al. 2024, 3.1), except for a share ``AT_SHARE`` from ``at``, the solver's own. It
    starts at pure noise, which decides the look of what is painted, and where few logit-normal times lie.
    """
    count = clean.shape[0]
    t = torch.sigmoid(torch.randn(count, generator=generator) * 1.1 + 0.2)
    if at:
        asked = torch.tensor(at, dtype=t.dtype)[torch.randint(len(at), (count,), generator=generator)]
        t = torch.where(torch.rand(count, generator=generator) < AT_SHARE, asked, t)
    t = t.clamp(*within).to(clean)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    wide = t.view(-1, *[1] * (clean.ndim - 1))
    return (1.0 - wide) * clean + wide * noise, t, noise - clean


def velocity(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error with a ``weight`` that broadcasts over channels."""
    weight = weight.expand_as(output)
    return ((output - target).pow(2) * weight).sum() / weight.sum().clamp(min=1.0)


OCTAVES, ORIENTATIONS = 4, 6  # Sizes of detail, each twice the one before, and directions.
SIDE, WAVELENGTH, WIDTH = 9, 3.4, 1.9  # Side, wavelength and width (sigma) in pixels of the filters.
FLOOR = 2e-3  # Added before a logarithm: the effect of rounding to grey levels, in units of [-1, 1].
LEAST_SHARE = 0.04  # Least share of a crop that a zone covers whose statistics are used.
MEMORY = 0.99  # Momentum of the running moments, which are those of the last hundred batches or so.
ENOUGH = 0.5  # Share of the memory that is filled before a discriminant has a loss, because early covariances mislead.
RIDGE = 0.05  # Added to the covariance, as a share of every feature's variance.


class Texture(nn.Module):
    """Logarithms of mean and fourth-power mean wavelet moduli, of one and of two layers, in zones of an image.

    Moduli of two layers tell apart textures with one spectrum (Bruna and Mallat 2013, 2; Portilla and Simoncelli
    2000); fourth powers show a few bright grains. Images have sides that are divisible by 8.
    """

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        grid = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        window = torch.exp(-(x**2 + y**2) / (2.0 * WIDTH**2))
        window /= window.sum()
        filters = []  # Real and imaginary parts, each of zero mean.
        for number in range(ORIENTATIONS):
            angle = math.pi * number / ORIENTATIONS
            phase = 2.0 * math.pi / WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle))
            filters += [window * (wave - (window * wave).sum()) for wave in (torch.cos(phase), torch.sin(phase))]
        self.register_buffer("bank", torch.stack(filters).unsqueeze(1).float(), persistent=False)

    features = 2 * ORIENTATIONS * OCTAVES + ORIENTATIONS**2 * OCTAVES * (OCTAVES - 1) // 2  # Numbers per zone.

    def forward(self, image: Tensor, zones: Tensor) -> Tensor:
        """Statistics ``(B, Z, features)`` of images ``(B, 1, H, W)`` in zones ``(B, Z, H, W)`` in [0, 1]."""
        # Logarithms of small moduli need more digits than half precision has.
        with torch.autocast(image.device.type, enabled=False):
            image, zones = image.float(), zones.float()
            found: list[Tensor] = []
            deeper: list[Tensor] = []
            for octave in range(OCTAVES):
                if octave:
                    image, zones = F.avg_pool2d(image, 2), F.avg_pool2d(zones, 2)
                    deeper = [F.avg_pool2d(maps, 2) for maps in deeper]
                first = self._moduli(image)
                found.append(_pooled(first, zones))
                found.append(0.25 * _pooled(first.pow(4), zones, FLOOR**4))
                found += [_pooled(self._moduli(maps), zones) for maps in deeper]
                deeper.append(first)
            return torch.cat(found, dim=2)

    def _moduli(self, maps: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C * ORIENTATIONS, H, W)``."""
        batch, channels, height, width = maps.shape
        flat = F.pad(maps.reshape(batch * channels, 1, height, width), (SIDE // 2,) * 4, mode="reflect")
        parts = F.conv2d(flat, self.bank).view(batch, channels * ORIENTATIONS, 2, height, width)
        # The square root has no gradient at zero, as in flat parts of an image.
        return (parts.square().sum(dim=2) + 1e-8).sqrt()


def _pooled(maps: Tensor, zones: Tensor, floor: float = FLOOR) -> Tensor:
    """Logarithm of the maps' means in each zone: ``(B, C, H, W)`` and ``(B, Z, H, W)`` to ``(B, Z, C)``."""
    sums = torch.einsum("bchw,bzhw->bzc", maps, zones)
    return torch.log(sums / zones.sum(dim=(2, 3)).clamp(min=1e-3)[:, :, None] + floor)


class Discriminant(nn.Module):
    """Fisher's linear discriminant of drawn and real statistics, as a loss of the one who draws.

    It is the gradient of half the squared Mahalanobis distance of two means, so running means and the covariance of
    real items give it in closed form, without training (mean feature matching, Mroueh et al. 2017, McGan).
    """

    shift: Tensor
    mean: Tensor
    covariance: Tensor
    seen: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        for name, dimensions in (("shift", 1), ("mean", 1), ("covariance", 2), ("seen", 0)):
            self.register_buffer(name, torch.zeros((features,) * dimensions))

    def forward(self, generated: Tensor, real: Tensor) -> Tensor:
        """Loss of ``generated`` against ``real`` items, ``(B, features)`` each; zero at first, and without items."""
        if not len(generated):
            return generated.sum()
        with torch.autocast(generated.device.type, enabled=False):
            if self.training:
                self._remember(generated.detach(), real)
            if self.seen < ENOUGH:
                return generated.sum() * 0.0
            return ((generated - real) @ self._direction()).mean()

    @property
    def distance(self) -> float:
        """Half the squared Mahalanobis distance of the running means."""
        return 0.5 * float(self._direction() @ self.shift) / max(float(self.seen), 1e-9)

    def _direction(self) -> Tensor:
        share = self.seen.clamp(min=1e-9)
        covariance = self.covariance / share
        ridge = RIDGE * covariance.diagonal() + 1e-6
        return torch.linalg.solve(covariance + ridge.diag(), self.shift / share)

    @torch.no_grad()
    def _remember(self, generated: Tensor, real: Tensor) -> None:
        self.seen.lerp_(torch.ones_like(self.seen), 1.0 - MEMORY)
        self.shift.lerp_((generated - real).mean(dim=0), 1.0 - MEMORY)
        self.mean.lerp_(real.mean(dim=0), 1.0 - MEMORY)
        centred = real - self.mean / self.seen
        self.covariance.lerp_(centred.T @ centred / len(real), 1.0 - MEMORY)


def large_enough(zones: Tensor) -> Tensor:
    """Which zones ``(B, Z, H, W)`` are large enough to use, ``(B, Z)`` bool."""
    return zones.mean(dim=(2, 3)) >= LEAST_SHARE


BANDS, BAND_WIDTH = 8, 2  # Bands along the outline, half of them inside, and their width in pixels.
SECTORS = 8  # Directions from the lesion's centre: margins are sharp on one side and not on another.
FEWEST = 24  # Fewest of the ``BANDS * SECTORS`` patches that must be seen.
LEAST_PIXELS = 6.0  # Fewest pixels of a patch that counts as seen.
STEP_FLOOR = 1e-3  # Added before a logarithm of squared steps in brightness: speckle alone makes such steps.
FEATURES = BANDS + BANDS - 1  # Numbers per lesion.


def patches(mask: Tensor, usable: Tensor) -> Tensor:
    """The patch of every pixel near an outline by band and sector, ``(B, H * W)`` int64; ``BANDS * SECTORS`` is none.

    ``mask`` and ``usable`` are ``(B, 1, H, W)``, above 0 in the lesion and where pixels count.
    """
    pairs = zip(mask[:, 0].cpu().numpy() > 0, usable[:, 0].cpu().numpy() > 0, strict=True)
    return torch.from_numpy(np.stack([_places(*pair) for pair in pairs])).flatten(1).to(mask.device)


def _places(inside: NDArray[np.bool_], usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    if not inside.any() or inside.all():
        return np.full(inside.shape, BANDS * SECTORS)
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    # The outline lies half a pixel from the centres of the pixels on either side.
    distance -= 0.5 * np.sign(distance)
    band = np.floor(distance / BAND_WIDTH).astype(np.int64) + BANDS // 2
    row, column = ndimage.center_of_mass(inside)
    y, x = np.arange(inside.shape[0]) - row, np.arange(inside.shape[1]) - column
    angle = np.arctan2(y[:, None], x[None]) / (2.0 * np.pi) + 0.5
    sector = np.minimum((angle * SECTORS).astype(np.int64), SECTORS - 1)
    return np.where((band >= 0) & (band < BANDS) & usable, band * SECTORS + sector, BANDS * SECTORS)


def profile(image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """How brightness changes across outlines, in images ``(B, 1, H, W)`` and their :func:`patches`.

    Gives ``(B, FEATURES)``: each band's mean, from the inmost, relative to that of all, and the logarithm of the mean
    square over sectors of the steps from band to band; and ``(B,)`` bool, which lesions are seen well enough.
    """
    with torch.autocast(image.device.type, enabled=False):
        flat = image.float().flatten(1)
        empty = flat.new_zeros(len(flat), BANDS * SECTORS + 1)
        totals = (empty.scatter_add(1, places, part) for part in (torch.ones_like(flat), flat))
        counts, sums = (total[:, :-1].unflatten(1, (BANDS, SECTORS)) for total in totals)
        seen = (counts >= LEAST_PIXELS).float()
        means = sums / counts.clamp(min=1.0)
        bands = (means * seen).sum(dim=2) / seen.sum(dim=2).clamp(min=1.0)
        both = seen[:, 1:] * seen[:, :-1]
        squares = ((means[:, 1:] - means[:, :-1]).square() * both).sum(dim=2) / both.sum(dim=2).clamp(min=1.0)
        found = torch.cat((bands - bands.mean(dim=1, keepdim=True), 0.5 * torch.log(squares + STEP_FLOOR)), dim=1)
        enough = (seen.sum(dim=(1, 2)) >= FEWEST) & (both.sum(dim=2) > 0).all(dim=1)
        return found, enough
