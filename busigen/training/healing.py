"""Healing: images whose lesion the model itself has replaced by normal tissue, with decoy edits elsewhere.

Stage 1 learns where lesions go from images that have one. Shown the image as it is, or with a plain hole, it would
learn to look for the lesion or the hole. So it is shown a healed image, and decoy repaints elsewhere in it, so that
"was repainted" does not tell the place either.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import Mask, Window, edit_region, paste, patches_outside, window_for
from busigen.errors import IntegrityError
from busigen.files import atomic_file
from busigen.foreign import open_file
from busigen.registry import BUCKETS
from busigen.training.examples import Frame, Frames, Progress, decoy_region, greyed, random_lesion, to_tensor
from busigen.training.networks.inference import Networks, window_condition
from busigen.training.trainer import mixed_precision

REPAINT_BATCH = 16
HEAL_STEPS = 3
"""Network evaluations per repaint. Half of a lesion's: normal tissue is forgiving, and there is much to heal."""

Pixels = NDArray[np.uint8]


def lesion_edit(frame: Frame) -> Mask:
    """The union of the edit regions of all of an image's lesions."""
    edit = np.zeros_like(frame.valid)
    labels, count = ndimage.label(frame.lesions > 0)
    for number in range(1, count + 1):
        edit |= edit_region(labels == number, frame.valid)
    return edit


@dataclass(frozen=True)
class Repaint:
    """What stage 2 shall paint: normal tissue, or a lesion of one class and of each image's ``masks``."""

    label: str = "normal"
    masks: list[Mask] | None = None
    steps: int = HEAL_STEPS
    buckets: tuple[int, ...] = BUCKETS


NORMAL_TISSUE = Repaint()


def repaint(
    images: list[Pixels],
    edits: list[Mask],
    networks: Networks,
    seed: int,
    device: torch.device,
    what: Repaint = NORMAL_TISSUE,
) -> list[Pixels]:
    """Repaint each edit region by stage 2 alone, in batches of one window size. Images with an empty region stay."""
    results = list(images)
    jobs = [(k, edit, window_for(edit, what.buckets)) for k, edit in enumerate(edits) if edit.any()]
    for side in what.buckets:
        members = [job for job in jobs if job[2].side == side]
        for start in range(0, len(members), REPAINT_BATCH):
            chosen = members[start : start + REPAINT_BATCH]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + chosen[0][0])
            painted = _painted([images[k] for k, _, _ in chosen], chosen, networks, generator, device, what)
            for (k, edit, window), pixels in zip(chosen, painted, strict=True):
                results[k] = paste(images[k], pixels, edit, window)
    return results


@torch.no_grad()
def _painted(
    images: list[Pixels],
    jobs: list[tuple[int, Mask, Window]],
    networks: Networks,
    generator: torch.Generator,
    device: torch.device,
    what: Repaint,
) -> NDArray[np.float32]:
    """Repainted windows of one size, ``(B, S, S)`` in [-1, 1]."""
    edits, cuts = [edit for _, edit, _ in jobs], [window.slices for _, _, window in jobs]
    masks = [np.zeros_like(edit) if what.masks is None else what.masks[k] for k, edit, _ in jobs]

    def stacked(arrays: list[NDArray]) -> torch.Tensor:
        return torch.from_numpy(np.stack([a[c] for a, c in zip(arrays, cuts, strict=True)])[:, None]).float().to(device)

    region, mask = stacked(list(edits)), stacked(list(masks))
    known = networks.encoder(stacked([greyed(image, edit) for image, edit in zip(images, edits, strict=True)]))
    keep = torch.from_numpy(np.stack([patches_outside(edit, networks.preset.patch) for edit in edits]))
    keep = keep.float().to(device)
    tokens = networks.tokens(torch.stack([to_tensor(image) for image in images]).to(device), keep)
    noise = torch.randn(known.shape, generator=generator).to(device)
    condition = window_condition(known, mask, region)
    with mixed_precision(device):
        latents = networks.sample("lesion", noise, what.label, tokens, keep, *condition, steps=what.steps).float()
    speckle = torch.randn(region.shape, generator=generator).to(device)
    painted: NDArray[np.float32] = networks.decoder(latents, speckle, mask).float().cpu().numpy()[:, 0]
    return painted


def remove_lesion(
    frames: Frames, networks: Networks, *, variants: int, seed: int, device: torch.device, progress: Progress
) -> Pixels:
    """Heal every lesion image ``variants`` times.

    Returns:
        ``(N, variants, 256, 256)`` uint8, ``N`` in the order of ``frames``; images without lesion get decoys only.
    """
    result = np.empty((len(frames), variants, *frames[0].image.shape), dtype=np.uint8)
    shapes = [k for k in range(len(frames)) if frames.table["class"][k] != "normal"]
    jobs = [(position, variant) for position in range(len(frames)) for variant in range(variants)]
    chunk = 4 * REPAINT_BATCH
    for start in range(0, len(jobs), chunk):
        part = jobs[start : start + chunk]
        chosen = [frames[position] for position, _ in part]
        healed = repaint([f.image for f in chosen], [lesion_edit(f) for f in chosen], networks, seed + start, device)
        decoys = [_decoy(frame, frames, shapes, (seed, start + k)) for k, frame in enumerate(chosen)]
        healed = repaint(healed, decoys, networks, seed + start + 7919, device)
        for (position, variant), image in zip(part, healed, strict=True):
            result[position, variant] = image
        progress(min(start + chunk, len(jobs)), len(jobs))
    return result


def _decoy(frame: Frame, frames: Frames, shapes: list[int], key: tuple[int, int]) -> Mask:
    """A region elsewhere in the image, shaped like another image's edit region; empty where none fits."""
    rng = np.random.default_rng(key)
    shape = random_lesion(frames[shapes[int(rng.integers(len(shapes)))]], rng)
    edit = decoy_region(frame, shape, rng)
    return np.zeros_like(frame.valid) if edit is None else edit


def save_healed(path: Path, rows: Iterable[int], images: Pixels) -> None:
    """Write healed images and the prepared rows that they belong to, by rename. They never leave the run's folder."""
    with atomic_file(path) as file:
        np.savez(file, rows=np.fromiter(rows, dtype=np.int64), images=images)


def healed_reader(path: Path) -> Callable[[int, int], Pixels]:
    """Read :func:`save_healed`'s file as ``healed(row, variant)``; variants repeat cyclically.

    Raises:
        IntegrityError: it is missing, damaged, or no such file.
    """
    try:
        # What is stored as it is takes no more memory than disk.
        with open_file(path) as file, zipfile.ZipFile(file) as stored:
            rows, images = (_array(stored, f"{name}.npy") for name in ("rows", "images"))
        if rows.dtype != np.int64 or images.dtype != np.uint8 or rows.shape != images.shape[:1] or images.ndim != 4:
            raise ValueError("it holds other arrays")
    except (OSError, ValueError, LookupError, SyntaxError, zipfile.BadZipFile, NotImplementedError) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}.", fix="Delete it; the same command makes it again."
        ) from error
    position = {int(row): k for k, row in enumerate(rows)}
    return lambda row, variant: np.asarray(images[position[row], variant % images.shape[1]])


def _array(stored: zipfile.ZipFile, name: str) -> np.ndarray:
    """An uncompressed array of an archive, which its header must not claim to be larger than it is.

    Raises:
        ValueError: it is another.
    """
    info = stored.getinfo(name)
    with stored.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED or npy.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is not as it was written")
        shape, _, dtype = npy.read_array_header_1_0(member)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > info.file_size:
            raise ValueError(f"{name} claims to hold {shape}")
        member.seek(0)
        return np.asarray(npy.read_array(member, allow_pickle=False))
