"""What a finished model draws where its training images have lesions, and as backgrounds: the last task's examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from busigen.data.geometry import Mask, edit_region, feather, window_for
from busigen.noise_styles import styled
from busigen.registry import BACKGROUND_SPECKLE, BUCKETS, CLASSES, LATENT_FACTOR, RESOLUTION
from busigen.runtime.sampling.healthy_images import place_of, synthetic
from busigen.runtime.sampling.sampler import to_grey
from busigen.training.examples import ENCODE_BATCH, Frame, Frames, Progress, joined, random_lesion, window_tensors
from busigen.training.networks.inference import Networks, blend_input, window_condition
from busigen.training.trainer import mixed_precision

SIDE = BUCKETS[0]
"""Side in pixels of the crops that are kept: whole small windows, and a part of large ones."""

RIM = 16
"""Pixels at the cut sides of a part of a large window that do not count: there the decoder lacks what lies beyond."""

BAND = 12
"""Pixels to either side of the outline that make up the zone of the margin."""

ZONES = ("lesion", "margin", "behind")
"""Zones of a drawn window: inside of the outline, around it, and what else of the edit region there is."""


@dataclass(frozen=True)
class Drawer:
    """A model that draws.

    Attributes:
        networks: with the prior, and for lesions with every stage's class denoisers.
        frames: heights and widths that synthetic backgrounds have.
        styles: of backgrounds (:func:`busigen.noise_styles.styled`'s ``factor``); empty for none.
    """

    networks: Networks
    frames: Sequence[Sequence[int]]
    styles: Sequence[Sequence[float]]


@torch.no_grad()
def rollout_windows(
    frames: Frames, drawer: Drawer, *, variants: int, seed: int, device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """Lesions painted by stages 2 and 3 where the images have theirs, beside the images.

    Returns:
        ``latents`` ``(N, C, 16, 16)`` fp16, as the decoder gets them; ``pixels`` ``(N, 1, 128, 128)`` uint8, the image;
        ``zones`` ``(N, 3, 128, 128)`` bool, those of :data:`ZONES`; ``mask`` and ``edit`` ``(N, 1, 128, 128)`` bool;
        ``brightness`` and ``grains`` ``(N, 1, 128, 128)`` fp16, the paste's opacities; ``usable`` bool, where neither
        bars nor overlays are. Empty without a lesion.
    """
    pending: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
    parts: list[dict[str, Tensor]] = []
    jobs = [(position, variant) for position in range(len(frames)) for variant in range(variants)]
    for count, (position, variant) in enumerate(jobs, start=1):
        base, row = frames[position], int(frames.table["row"][position])
        rng = np.random.default_rng((seed, row, variant, 3))
        frame = (base.flipped() if rng.random() < 0.5 else base).with_gain(rng)
        if frame.label != "normal":
            mask = random_lesion(frame, rng)
            edit = edit_region(mask, frame.valid)
            if edit.any():
                side = window_for(edit).side
                group = pending.setdefault((frame.label, side), [])
                group.append(_arrays(frame, mask, edit, drawer.networks.preset.patch))
                if len(group) == ENCODE_BATCH:
                    parts.append(_cropped(_painted(pending.pop((frame.label, side)), drawer, seed, row, device), rng))
        if count % ENCODE_BATCH == 0:
            progress(count, len(jobs))
    rng = np.random.default_rng((seed, 3))
    parts += [_cropped(_painted(group, drawer, seed, -1, device), rng) for group in pending.values()]
    progress(len(jobs), len(jobs))
    # Of a batch of large windows there may be none whose margin is seen.
    parts = [part for part in parts if part]
    return joined(parts) if parts else {}


def _arrays(frame: Frame, mask: Mask, edit: Mask, patch: int) -> dict[str, Tensor]:
    window = window_for(edit)
    cut = window.slices
    brightness, grains = feather(edit)
    distance = ndimage.distance_transform_edt(~mask) + ndimage.distance_transform_edt(mask)
    margin = edit & (distance <= BAND)
    return {
        **window_tensors(frame, mask, edit, frame.label, window, patch),
        "zones": torch.from_numpy(np.stack([mask & ~margin, margin, edit & ~mask & ~margin])[(slice(None), *cut)]),
        "brightness": torch.from_numpy(brightness[cut])[None],
        "grains": torch.from_numpy(grains[cut])[None],
    }


def _painted(
    items: list[dict[str, Tensor]], drawer: Drawer, seed: int, row: int, device: torch.device
) -> dict[str, Tensor]:
    """Stages 2 and 3 as in use, for windows of one class and size."""
    networks = drawer.networks
    found = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    seen = {name: found[name].to(device).float() for name in ("greyed", "mask", "edit", "ring", "keep", "image")}
    label = CLASSES[int(found["label"][0])]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**62)
    with mixed_precision(device):
        known = networks.encoder(seen["greyed"]).float()
        context = (networks.tokens(seen["image"], seen["keep"]).float(), seen["keep"])

        def sample(stage: str, *condition: Tensor) -> Tensor:
            noise = torch.randn(known.shape, generator=generator).to(device)
            return networks.sample(stage, noise, label, *context, *condition).float()

        painted = sample("lesion", *window_condition(known, seen["mask"], seen["edit"]))
        _, _, edit = window_condition(known, seen["mask"], seen["edit"])
        _, _, ring = window_condition(known, seen["mask"], seen["ring"])
        condition = window_condition(blend_input(known, painted, edit, ring), seen["mask"], seen["ring"])
        blended = sample("blend", *condition)
    # The lesion stays stage 2's, as in the runtime's sampler.
    latents = torch.where((edit > 0) & (ring == 0), painted, blended)
    kept = ("mask", "edit", "zones", "brightness", "grains", "usable", "label")
    return {
        "latents": latents.cpu().half(),
        "pixels": ((found["pixels"] + 1.0) * 127.5).round().byte(),
        **{name: found[name].half() if found[name].is_floating_point() else found[name] for name in kept},
    }


def _cropped(found: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """Windows of ``SIDE`` as they are; of larger ones a part that holds a part of the lesion's margin."""
    side = found["pixels"].shape[-1]
    if side == SIDE:
        return found
    items = []
    for number in range(len(found["pixels"])):
        rows, columns = np.nonzero(found["zones"][number, 1].numpy())
        if not len(rows):
            continue
        at = int(rng.integers(len(rows)))
        top, left = (
            int(np.clip((place - SIDE // 2) // LATENT_FACTOR, 0, (side - SIDE) // LATENT_FACTOR))
            for place in (rows[at], columns[at])
        )
        items.append(_part(found, number, top, left))
    return {name: torch.stack([item[name] for item in items]) for name in items[0]} if items else {}


def _part(found: dict[str, Tensor], number: int, top: int, left: int) -> dict[str, Tensor]:
    """The crop of one item that begins at the cell in row ``top`` and column ``left``."""
    side, cells = found["pixels"].shape[-1], SIDE // LATENT_FACTOR
    result = {}
    for name, tensor in found.items():
        item = tensor[number]
        if name == "latents":
            item = item[:, top : top + cells, left : left + cells]
        elif item.dim() == 3:
            y, x = top * LATENT_FACTOR, left * LATENT_FACTOR
            item = item[:, y : y + SIDE, x : x + SIDE].clone()
        result[name] = item
    usable = away_from_cuts(top, left, side // LATENT_FACTOR)
    result["usable"] &= usable
    return result


def away_from_cuts(top: int, left: int, cells: int) -> Tensor:
    """Which pixels count of a part of a window of ``cells`` a side, that begins at a cell: ``(1, SIDE, SIDE)`` bool.

    Along a cut, the decoder lacks what lies beyond it.
    """
    counts = torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    last = cells - SIDE // LATENT_FACTOR
    counts[:, : RIM * (top > 0)] = False
    counts[:, SIDE - RIM * (top < last) :] = False
    counts[:, :, : RIM * (left > 0)] = False
    counts[:, :, SIDE - RIM * (left < last) :] = False
    return counts


@torch.no_grad()
def rollout_backgrounds(
    drawer: Drawer, count: int, *, seed: int, device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """Backgrounds as the prior draws them: ``latents`` ``(N, C, 32, 32)`` fp16, ``frame`` ``(N, 4)`` int16."""
    rng = np.random.default_rng((seed, 4))
    cells, channels = RESOLUTION // LATENT_FACTOR, drawer.networks.preset.latent_channels
    factor = np.array(drawer.styles, np.float64)
    parts = []
    for size in _sizes(count):
        shapes = [drawer.frames[int(k)] for k in rng.integers(0, len(drawer.frames), size)]
        places = torch.tensor([place_of((int(height), int(width))) for height, width in shapes], dtype=torch.float32)
        noise = rng.standard_normal((size, channels, cells, cells), np.float32)
        if factor.size:
            noise = styled(noise, factor, rng.standard_normal((size, factor.shape[1])))
        with mixed_precision(device):
            latents = drawer.networks.background(torch.from_numpy(noise).to(device), places.to(device))
        parts.append({"latents": latents.cpu().half(), "frame": places.short()})
        progress(sum(len(part["frame"]) for part in parts), count)
    return joined(parts)


@torch.no_grad()
def background_images(
    drawer: Drawer, count: int, *, seed: int, device: torch.device, progress: Progress
) -> list[tuple[NDArray[np.uint8], Mask]]:
    """Backgrounds as lesions are painted into, letterboxed: ``(256, 256)`` uint8, and bool where they are image."""
    found = rollout_backgrounds(drawer, count, seed=seed, device=device, progress=progress)
    generator = torch.Generator().manual_seed(seed)
    images: list[tuple[NDArray[np.uint8], Mask]] = []
    for latents, frames in zip(found["latents"].split(ENCODE_BATCH), found["frame"].split(ENCODE_BATCH), strict=True):
        speckle = torch.randn(len(latents), 1, RESOLUTION, RESOLUTION, generator=generator)
        pixels = drawer.networks.decoder(latents.float().to(device), BACKGROUND_SPECKLE * speckle.to(device))
        images += letterboxed(pixels, frames)
    return images


def letterboxed(pixels: Tensor, frames: Tensor) -> list[tuple[NDArray[np.uint8], Mask]]:
    """Decoded backgrounds ``(N, 1, 256, 256)`` in their ``(N, 4)`` frames, as :func:`background_images` gives them."""
    pairs = zip(pixels[:, 0].detach().float().cpu().numpy(), frames.tolist(), strict=True)
    framed = [synthetic(to_grey(image), (height, width)) for image, (_, _, height, width) in pairs]
    return [(background.pixels, background.valid) for background in framed]


def _sizes(count: int) -> Iterator[int]:
    for start in range(0, count, ENCODE_BATCH):
        yield min(ENCODE_BATCH, count - start)
