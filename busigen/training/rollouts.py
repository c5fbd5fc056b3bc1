"""Images that the model itself paints for its training: without their lesions, with new ones, and backgrounds.

From images with lesions, or with plain holes, stage 1 would learn to look for the lesion or the hole. So it is shown
images whose lesion is repainted as normal tissue, with a decoy repainted elsewhere.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from scipy import ndimage
from torch import Generator, Tensor

from busigen.data.geometry import Mask, Window, edit_region, feather, paste, patches_outside, window_for
from busigen.errors import IntegrityError
from busigen.files import atomic_file
from busigen.foreign import open_file
from busigen.noise_styles import styled
from busigen.phantoms.distribution import Phantoms, filled
from busigen.registry import BACKGROUND_SPECKLE, BUCKETS, CLASSES, GRAIN_FADE, LATENT_FACTOR, RESOLUTION
from busigen.runtime.sampling.graphs import to_grey
from busigen.runtime.sampling.inputs.backgrounds import phantom_at
from busigen.runtime.sampling.inputs.healthy_images import place_of, synthetic
from busigen.training.examples import (
    ENCODE_BATCH,
    Frame,
    Frames,
    Healed,
    Progress,
    decoy_region,
    greyed,
    joined,
    random_lesion,
    to_tensor,
    told,
    window_tensors,
)
from busigen.training.networks.build import region_condition
from busigen.training.networks.inference import Networks, blend_input
from busigen.training.trainer import REMAKE, mixed_precision

Pixels = NDArray[np.uint8]

REPAINT_BATCH = 16
HEAL_STEPS = 3  # Network evaluations per repaint: half of a lesion's, since normal tissue is forgiving.


def repaint(
    images: list[Pixels],
    edits: list[Mask],
    networks: Networks,
    seed: int,
    *,
    label: str = "normal",
    masks: list[Mask] | None = None,
    scanners: Sequence[int] | None = None,
    steps: int = HEAL_STEPS,
    buckets: Sequence[int] = BUCKETS,
) -> list[Pixels]:
    """Images whose edit region, if any, stage 2 alone has painted: normal tissue, or a lesion of a class and mask.

    ``scanners`` are those of :class:`Frame`, by default any.
    """
    results = list(images)
    scanners = [0] * len(images) if scanners is None else scanners
    masks = [np.zeros_like(edit) for edit in edits] if masks is None else masks
    jobs = [(k, window_for(edit, buckets)) for k, edit in enumerate(edits) if edit.any()]
    for side in buckets:
        members = [(k, window) for k, window in jobs if window.side == side]
        for start in range(0, len(members), REPAINT_BATCH):
            chosen = members[start : start + REPAINT_BATCH]
            generator = Generator().manual_seed(seed * 1_000_003 + chosen[0][0])
            items = [(images[k], edits[k], masks[k], window, scanners[k]) for k, window in chosen]
            painted = _repainted(items, networks, label, steps, generator)
            for (k, window), pixels in zip(chosen, painted, strict=True):
                results[k] = paste(images[k], pixels, edits[k], window, GRAIN_FADE)
    return results


@torch.no_grad()
def _repainted(
    items: list[tuple[Pixels, Mask, Mask, Window, int]],
    networks: Networks,
    label: str,
    steps: int,
    generator: Generator,
) -> NDArray[np.float32]:
    """Windows ``(B, S, S)`` in [-1, 1], painted anew, from images, edit regions, lesion masks and scanners."""
    images, edits, masks, windows, scanners = zip(*items, strict=True)
    device = networks.device

    def stacked(arrays: Sequence[NDArray]) -> Tensor:
        parts = [array[window.slices] for array, window in zip(arrays, windows, strict=True)]
        return torch.from_numpy(np.stack(parts)[:, None]).float().to(device)

    region, mask = stacked(edits), stacked(masks)
    known = networks.encoder(stacked([greyed(image, edit) for image, edit in zip(images, edits, strict=True)]))
    keep = torch.from_numpy(np.stack([patches_outside(edit, networks.preset.patch) for edit in edits]))
    keep = keep.float().to(device)
    tokens = networks.tokens(torch.stack([to_tensor(image) for image in images]).to(device), keep)
    noise = torch.randn(known.shape, generator=generator).to(device)
    scanner = told(torch.tensor(scanners)).to(device)
    condition = networks.window_condition(known, mask, region, scanner)
    with mixed_precision(device):
        latents = networks.sample("lesion", noise, label, tokens, keep, *condition, steps=steps).float()
    speckle = torch.randn(region.shape, generator=generator).to(device)
    painted: NDArray[np.float32] = networks.decoder(latents, speckle, mask, scanner).float().cpu().numpy()[:, 0]
    return painted


def remove_lesion(frames: Frames, networks: Networks, *, variants: int, seed: int, progress: Progress) -> Pixels:
    """Every image healed ``variants`` times, ``(N, variants, 256, 256)``; those without lesion get decoys only."""
    result = np.empty((len(frames), variants, *frames[0].image.shape), dtype=np.uint8)
    shapes = frames.with_lesion()
    jobs = frames.jobs(variants)
    chunk = 4 * REPAINT_BATCH
    for start in range(0, len(jobs), chunk):
        part = jobs[start : start + chunk]
        chosen = [frames[position] for position, _ in part]
        edits, decoys = [], []
        for number, frame in enumerate(chosen, start=start):
            labels, count = ndimage.label(frame.lesions > 0)
            regions = [edit_region(labels == lesion, frame.valid) for lesion in range(1, count + 1)]
            edits.append(np.any(regions, axis=0) if regions else np.zeros_like(frame.valid))
            # Elsewhere in the image, and shaped like another image's lesion.
            rng = np.random.default_rng((seed, number))
            shape = random_lesion(frames[shapes[int(rng.integers(len(shapes)))]], rng)
            decoy = decoy_region(frame, shape, rng)
            decoys.append(np.zeros_like(frame.valid) if decoy is None else decoy)
        scanners = [frame.scanner for frame in chosen]
        healed = repaint([frame.image for frame in chosen], edits, networks, seed + start, scanners=scanners)
        healed = repaint(healed, decoys, networks, seed + start + 7919, scanners=scanners)
        for (position, variant), image in zip(part, healed, strict=True):
            result[position, variant] = image
        progress(min(start + chunk, len(jobs)), len(jobs))
    return result


def save_healed(path: Path, rows: Iterable[int], images: Pixels) -> None:
    """Write healed images and their prepared rows, by rename; they never leave the run's folder."""
    with atomic_file(path) as file:
        np.savez(file, rows=np.fromiter(rows, dtype=np.int64), images=images)


def healed_reader(path: Path) -> Healed:
    """Read :func:`save_healed`'s file, in which variants repeat; an IntegrityError if it is missing or damaged."""
    try:
        # Uncompressed members take no more memory than disk.
        with open_file(path) as file, zipfile.ZipFile(file) as stored:
            rows, images = (_array(stored, f"{name}.npy") for name in ("rows", "images"))
        if rows.dtype != np.int64 or images.dtype != np.uint8 or rows.shape != images.shape[:1] or images.ndim != 4:
            raise ValueError("it holds other arrays")
    except (OSError, ValueError, LookupError, SyntaxError, zipfile.BadZipFile, NotImplementedError) as error:
        raise IntegrityError(f"{path} is damaged: {error}.", fix=REMAKE) from error
    position = {int(row): k for k, row in enumerate(rows)}
    return lambda row, variant: np.asarray(images[position[row], variant % images.shape[1]])


def _array(stored: zipfile.ZipFile, name: str) -> np.ndarray:
    """An uncompressed array of an archive; a ``ValueError`` if its header claims a larger one."""
    info = stored.getinfo(name)
    with stored.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED or npy.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is not as it was written")
        shape, _, dtype = npy.read_array_header_1_0(member)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > info.file_size:
            raise ValueError(f"{name} claims to hold {shape}")
        member.seek(0)
        return np.asarray(npy.read_array(member, allow_pickle=False))


SIDE = BUCKETS[0]  # Side in pixels of the crops of drawn windows: whole small ones, and a part of large ones.
RIM = 16  # Pixels along a crop's cut sides that do not count, because the decoder lacks what lies beyond.
BAND = 12  # Width in pixels, to either side of the outline, of the margin's zone.
ZONES = ("lesion", "margin", "behind")  # Inside the outline, along it, and the rest of the edit region.


@dataclass(frozen=True)
class Drawer:
    """The prior and, for lesions, every stage's class denoisers, with the backgrounds' heights, widths and styles.

    ``phantoms`` are what backgrounds begin with; None for noise alone. ``scanners`` are those that networks know, with
    their shares of the backgrounds; what is left is of any. ``scanner_frames`` are the frames of single scanners.
    """

    networks: Networks
    frames: Sequence[Sequence[int]]
    styles: Sequence[Sequence[float]]
    phantoms: Phantoms | None = None
    scanners: Sequence[tuple[str, float]] = ()
    scanner_frames: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)

    def starts(
        self, seed: int, first: int, places: Sequence[tuple[int, int, int, int]], scanners: Sequence[str | None]
    ) -> Tensor | None:
        """The latents of a phantom for each place and scanner, of samples from index ``first`` on."""
        if self.phantoms is None:
            return None
        found = [
            to_tensor(filled(phantom_at(self.phantoms.of(scanner), seed, first + k, 0, place[2:]).image, place))
            for k, (place, scanner) in enumerate(zip(places, scanners, strict=True))
        ]
        return self.networks.encoder(torch.stack(found).to(self.networks.device))


@torch.no_grad()
def rollout_windows(
    frames: Frames, drawer: Drawer, *, variants: int, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Lesions painted by stages 2 and 3 in the places of the images' own.

    ``latents`` ``(N, C, 16, 16)`` fp16 are the decoder's input, ``pixels`` ``(N, 1, 128, 128)`` uint8 the real image,
    ``zones`` ``(N, 3, 128, 128)`` bool those of :data:`ZONES`, ``brightness`` and ``grains`` fp16 the paste's
    opacities; ``mask``, ``edit`` and ``usable`` (no bars or overlays) are bool. Empty without a lesion.
    """
    pending: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
    parts: list[dict[str, Tensor]] = []
    jobs = frames.jobs(variants)
    for count, (position, variant) in enumerate(jobs, start=1):
        row = int(frames.table["row"][position])
        rng = np.random.default_rng((seed, row, variant, 3))
        frame = frames[position].varied(rng)
        if frame.label != "normal":
            mask = random_lesion(frame, rng)
            edit = edit_region(mask, frame.valid)
            if edit.any():
                key = (frame.label, window_for(edit).side)
                group = pending.setdefault(key, [])
                group.append(_arrays(frame, mask, edit, drawer.networks.preset.patch))
                if len(group) == ENCODE_BATCH:
                    parts.append(_cropped(_painted(pending.pop(key), drawer, seed, row), rng))
        if count % ENCODE_BATCH == 0:
            progress(count, len(jobs))
    rng = np.random.default_rng((seed, 3))
    parts += [_cropped(_painted(group, drawer, seed, -1), rng) for group in pending.values()]
    progress(len(jobs), len(jobs))
    parts = [part for part in parts if part]  # A batch of large windows may have no margin.
    return joined(parts) if parts else {}


def _arrays(frame: Frame, mask: Mask, edit: Mask, patch: int) -> dict[str, Tensor]:
    window = window_for(edit)
    cut, (brightness, grains) = window.slices, feather(edit, window, GRAIN_FADE)
    distance = ndimage.distance_transform_edt(~mask) + ndimage.distance_transform_edt(mask)
    margin = edit & (distance <= BAND)
    zones = np.stack([mask & ~margin, margin, edit & ~mask & ~margin])
    return {
        **window_tensors(frame, mask, edit, frame.label, window, patch),
        "zones": torch.from_numpy(zones[(slice(None), *cut)]),
        "brightness": torch.from_numpy(brightness)[None],
        "grains": torch.from_numpy(grains)[None],
    }


def _painted(items: list[dict[str, Tensor]], drawer: Drawer, seed: int, row: int) -> dict[str, Tensor]:
    """Windows of one class and size, painted by stages 2 and 3 as in use."""
    networks, device = drawer.networks, drawer.networks.device
    found = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    seen = {name: found[name].to(device).float() for name in ("greyed", "mask", "edit", "ring", "keep", "image")}
    label = CLASSES[int(found["label"][0])]
    generator = Generator().manual_seed((seed * 1_000_003 + row) % 2**62)
    with mixed_precision(device):
        known = networks.encoder(seen["greyed"]).float()
        context = (networks.tokens(seen["image"], seen["keep"]).float(), seen["keep"])

        def sample(stage: str, *condition: Tensor) -> Tensor:
            noise = torch.randn(known.shape, generator=generator).to(device)
            return networks.sample(stage, noise, label, *context, *condition).float()

        scanner = told(found["scanner"]).to(device)
        condition = networks.window_condition(known, seen["mask"], seen["edit"], scanner)
        painted = sample("lesion", *condition)
        edit, ring = condition[-1], region_condition(seen["ring"])
        continued = blend_input(known, painted, edit, ring)
        blended = sample("blend", *networks.window_condition(continued, seen["mask"], seen["ring"], scanner))
    # The lesion is stage 2's, as in the runtime's sampler.
    latents = torch.where((edit > 0) & (ring == 0), painted, blended)
    kept = ("mask", "edit", "zones", "brightness", "grains", "usable", "label", "scanner")
    return {
        "latents": latents.cpu().half(),
        "pixels": ((found["pixels"] + 1.0) * 127.5).round().byte(),
        **{name: found[name].half() if found[name].is_floating_point() else found[name] for name in kept},
    }


def _cropped(found: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """Windows of ``SIDE`` as they are, and of each larger one a crop with a part of the lesion's margin."""
    side, cells = found["pixels"].shape[-1], SIDE // LATENT_FACTOR
    if side == SIDE:
        return found
    items = []
    for number in range(len(found["pixels"])):
        rows, columns = np.nonzero(found["zones"][number, 1].numpy())
        if not len(rows):
            continue
        at = int(rng.integers(len(rows)))
        last = (side - SIDE) // LATENT_FACTOR
        top, left = (int(np.clip((part[at] - SIDE // 2) // LATENT_FACTOR, 0, last)) for part in (rows, columns))
        y, x = top * LATENT_FACTOR, left * LATENT_FACTOR
        item = {name: tensor[number] for name, tensor in found.items()}
        for name, tensor in item.items():
            if name == "latents":
                item[name] = tensor[:, top : top + cells, left : left + cells]
            elif tensor.dim() == 3:
                item[name] = tensor[:, y : y + SIDE, x : x + SIDE].clone()
        item["usable"] &= away_from_cuts(top, left, side // LATENT_FACTOR)
        items.append(item)
    return {name: torch.stack([item[name] for item in items]) for name in items[0]} if items else {}


def away_from_cuts(top: int, left: int, cells: int) -> Tensor:
    """Which pixels count, ``(1, SIDE, SIDE)`` bool, of a crop at a cell of a window of ``cells`` a side."""
    counts = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    last = cells - SIDE // LATENT_FACTOR
    rows, columns = (slice(RIM * (at > 0), SIDE - RIM * (at < last)) for at in (top, left))
    counts[:, rows, columns] = True
    return counts


@torch.no_grad()
def rollout_backgrounds(drawer: Drawer, count: int, *, seed: int, progress: Progress) -> dict[str, Tensor]:
    """Backgrounds of the prior: ``latents`` ``(N, C, 32, 32)`` fp16, ``frame`` ``(N, 4)`` int16, ``scanner``."""
    rng = np.random.default_rng((seed, 4))
    networks, device = drawer.networks, drawer.networks.device
    cells, channels = RESOLUTION // LATENT_FACTOR, networks.preset.latent_channels
    factor = np.array(drawer.styles, np.float64)
    names = [None, *(name for name, _ in drawer.scanners)]
    shares = np.array([max(0.0, 1.0 - sum(share for _, share in drawer.scanners)), *(s for _, s in drawer.scanners)])
    shares /= shares.sum()
    parts = []
    for first in range(0, count, ENCODE_BATCH):
        size = min(ENCODE_BATCH, count - first)
        scanner = rng.choice(len(shares), size, p=shares)
        painted_as = [names[k] for k in scanner]
        frames = [drawer.scanner_frames.get(name or "", drawer.frames) for name in painted_as]
        shapes = [some[int(rng.integers(len(some)))] for some in frames]
        found = [place_of((int(height), int(width))) for height, width in shapes]
        places = torch.tensor(found, dtype=torch.float32)
        noise = rng.standard_normal((size, channels, cells, cells), np.float32)
        if factor.size:
            noise = styled(noise, factor, rng.standard_normal((size, factor.shape[1])))
        with mixed_precision(device):
            start = drawer.starts(seed, first, found, painted_as)
            seen = (torch.from_numpy(noise), places, told(torch.from_numpy(scanner)))
            x, frame, shown = (part.to(device) for part in seen)
            latents = networks.background(x, frame, start, shown)
        parts.append({"latents": latents.cpu().half(), "frame": places.short(), "scanner": torch.from_numpy(scanner)})
        progress(first + size, count)
    return joined(parts)


@torch.no_grad()
def background_images(drawer: Drawer, count: int, *, seed: int, progress: Progress) -> list[tuple[Pixels, Mask]]:
    """Backgrounds as lesions are painted into: letterboxed ``(256, 256)`` uint8, and bool where they are no bars."""
    found = rollout_backgrounds(drawer, count, seed=seed, progress=progress)
    generator = Generator().manual_seed(seed)
    images: list[tuple[Pixels, Mask]] = []
    device = drawer.networks.device
    parts = (found[name].split(ENCODE_BATCH) for name in ("latents", "frame", "scanner"))
    for latents, frames, scanner in zip(*parts, strict=True):
        speckle = BACKGROUND_SPECKLE * torch.randn(len(latents), 1, RESOLUTION, RESOLUTION, generator=generator)
        shown = told(scanner).to(device)
        pixels = drawer.networks.decoder(latents.float().to(device), speckle.to(device), scanner=shown)
        images += letterboxed(pixels, frames)
    return images


def letterboxed(pixels: Tensor, frames: Tensor) -> list[tuple[Pixels, Mask]]:
    """Decoded backgrounds ``(N, 1, 256, 256)`` in their ``(N, 4)`` frames, as :func:`background_images` gives them."""
    pairs = zip(pixels[:, 0].detach().float().cpu().numpy(), frames.tolist(), strict=True)
    framed = [synthetic(to_grey(image), (height, width)) for image, (_, _, height, width) in pairs]
    return [(background.pixels, background.valid) for background in framed]
