"""Training examples: prepared images as the tensors that the denoisers' losses read.

On a CPU, encoding takes most of a step. So every image is encoded once per variant, each with another flip, gain,
window offset and edit region, and a step picks from these. All randomness is keyed by (seed, row, variant).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from busigen.data.geometry import Mask, Window, edit_region, grow, patches_outside, ring_region, shrink, window_for
from busigen.data.prepared import Prepared
from busigen.registry import BUCKETS, CLASSES, FEWEST_OF_SCANNER, LATENT_FACTOR, RESOLUTION, SCANNERS
from busigen.runtime.backends.bundle_record import LEAST_FRAME
from busigen.training.networks.build import mask_condition, region_condition
from busigen.training.networks.inference import Networks, shown
from busigen.training.networks.outline import OutlineSpace, birads_flags
from busigen.training.trainer import load_state, save_state

log = logging.getLogger("busigen.training")

Progress = Callable[[int, int], None]  # Is called with what is done and of how much.
Healed = Callable[[int, int], NDArray[np.uint8]]  # The image of a prepared row and variant, without its lesion.

ENCODE_BATCH = 16
FRAMES = 64  # Most image shapes that a checkpoint records for synthetic backgrounds.
ANY_SHARE = 0.1  # Share of examples whose scanner a network is not told, so that it learns what any is.
WIDE = 15  # Least side in pixels of overlays that no loss counts: text, but not calipers at a lesion's outline.

assert LATENT_FACTOR == 8, "the window jitter and the two-cell ring are written for f8 latents"


@dataclass(frozen=True)
class Frame:
    """An image and its masks, ``(256, 256)`` each; ``scanner`` counts the known ones from 1, and is 0 for others."""

    image: NDArray[np.uint8]
    lesions: NDArray[np.uint8]
    overlay: Mask
    valid: Mask
    label: str
    scanner: int = 0

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Top, left, height and width in pixels of the valid part."""
        rows, columns = np.flatnonzero(self.valid.any(axis=1)), np.flatnonzero(self.valid.any(axis=0))
        return int(rows[0]), int(columns[0]), rows.size, columns.size

    def flipped(self) -> Frame:
        """Mirror left and right, never top and bottom: skin is at the top and shadows fall downwards."""
        parts: tuple[Any, ...] = (self.image, self.lesions, self.overlay, self.valid)
        image, lesions, overlay, valid = (np.ascontiguousarray(part[:, ::-1]) for part in parts)
        return replace(self, image=image, lesions=lesions, overlay=overlay, valid=valid)

    def with_gain(self, rng: np.random.Generator) -> Frame:
        """Vary gain by up to 8 % and contrast by a gamma between 0.85 and 1.18."""
        gamma, gain = np.exp(rng.uniform(-0.16, 0.16)), rng.uniform(0.92, 1.08)
        table = np.clip(255.0 * gain * (np.arange(256) / 255.0) ** gamma, 0, 255).astype(np.uint8)
        return replace(self, image=table[self.image])

    def varied(self, rng: np.random.Generator) -> Frame:
        """Flip at random, and vary gain and contrast."""
        return (self.flipped() if rng.random() < 0.5 else self).with_gain(rng)

    def filling(self, rng: np.random.Generator) -> Frame:
        """Replace letterbox bars by the image's mirror image, at the same scale.

        Tall images are moved sideways at random; wide ones are moved to the top, where skin is, and mirrored below.
        Enlarging images instead would coarsen their speckle. ``valid`` marks what is not mirrored.
        """
        top, side, height, width = self.place
        part = (slice(top, top + height), slice(side, side + width))
        left = int(rng.integers(0, RESOLUTION - width + 1))
        bars = ((0, RESOLUTION - height), (left, RESOLUTION - width - left))
        return replace(
            self,
            image=np.pad(self.image[part], bars, mode="reflect"),
            lesions=np.pad(self.lesions[part], bars),
            overlay=np.pad(self.overlay[part], bars, mode="reflect"),
            valid=np.pad(self.valid[part], bars),
        )


class Frames:
    """The rows of a prepared folder that a task trains on, as :class:`Frame`; ``scanners`` are those that it knows."""

    def __init__(self, prepared: Prepared, rows: pl.DataFrame, scanners: Sequence[str] = ()) -> None:
        self.prepared, self.table = prepared, rows
        self._scanner = {name: number for number, name in enumerate(scanners, start=1)}

    def __len__(self) -> int:
        return self.table.height

    def __getitem__(self, position: int) -> Frame:
        record = self.table.row(position, named=True)
        row, top, left = record["row"], record["top"], record["left"]
        valid = np.zeros((RESOLUTION, RESOLUTION), dtype=bool)
        valid[top : top + record["inner_height"], left : left + record["inner_width"]] = True
        return Frame(
            image=np.array(self.prepared.clean[row]),
            lesions=np.array(self.prepared.masks[row]),
            overlay=grow(shrink(np.array(self.prepared.suspects[row]), WIDE // 2), WIDE // 2),
            valid=valid,
            label=record["class"],
            scanner=self._scanner.get(record["scanner"], 0),
        )

    def jobs(self, variants: int, *, lesions_only: bool = False) -> list[tuple[int, int]]:
        """All pairs of position and variant, in order."""
        places = self.with_lesion() if lesions_only else range(len(self))
        return [(position, variant) for position in places for variant in range(variants)]

    def of_scanner(self, scanner: int) -> list[int]:
        """The positions of a scanner's images; of all for 0, which is any, and where there is none."""
        names = [name for name, number in self._scanner.items() if number == scanner]
        return [k for k, name in enumerate(self.table["scanner"]) if name in names] or list(range(len(self)))

    def with_lesion(self) -> list[int]:
        """Positions of images that are not of class ``normal``."""
        return [position for position, label in enumerate(self.table["class"]) if label != "normal"]


def at_most(rows: pl.DataFrame, limit: int | None) -> pl.DataFrame:
    """At most ``limit`` rows, evenly spaced, so that all sources and classes stay in."""
    if limit is None or rows.height <= limit:
        return rows
    return rows[np.linspace(0, rows.height - 1, limit).round().astype(int).tolist()]


def scanners_of(rows: pl.DataFrame, known: Sequence[str] = ()) -> list[str]:
    """The scanners that can be learnt from by name: those ``known`` before, then those of enough images, ``SCANNERS``.

    The others' images teach what all have in common.
    """
    named = rows["scanner"].drop_nulls().value_counts().filter(pl.col("count") >= FEWEST_OF_SCANNER)
    found = named.sort("count", "scanner", descending=[True, False])["scanner"].to_list()
    return [*known, *(name for name in found if name not in known)][:SCANNERS]


def told(scanner: Tensor) -> Tensor:
    """Scanners counted from 1, ``(B,)`` int64, as the networks are told them, ``(B, SCANNERS)``; 0 is any."""
    return F.one_hot(scanner, SCANNERS + 1)[:, 1:].float()


def frames_of(rows: pl.DataFrame) -> list[list[int]]:
    """At most ``FRAMES`` heights and widths of letterboxed images, none below ``LEAST_FRAME``, by their ratio."""
    shapes = rows.select("inner_height", "inner_width").sort(pl.col("inner_height") / pl.col("inner_width"))
    if narrow := shapes.filter(pl.min_horizontal(pl.all()) < LEAST_FRAME).height:
        log.warning(
            "frames: %d of %d images are strips of less than %d pixels of %d; synthetic backgrounds are never narrower",
            *(narrow, shapes.height, LEAST_FRAME, RESOLUTION),
        )
    return [list(shape) for shape in at_most(shapes, FRAMES).select(pl.all().clip(lower_bound=LEAST_FRAME)).iter_rows()]


def select(
    prepared: Prepared, split: str, *, limit: int | None = None, sources: tuple[str, ...] = (), label: str | None = None
) -> pl.DataFrame:
    """Rows of a split, of at most ``limit`` images; with a ``label``, those that are under no other class as well.

    The split is bounded before it is filtered, so that all tasks see the same images.
    """
    rows = at_most(prepared.table.filter(pl.col("split") == split), limit)
    if sources:
        rows = rows.filter(pl.col("source").is_in(list(sources)))
    if label is not None:
        rows = rows.filter((pl.col("class") == label) & ~pl.col("class_conflict"))
    return rows


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Grey pixels ``(..., H, W)`` uint8 as ``(..., 1, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).unsqueeze(-3)


def greyed(image: NDArray[np.uint8], edit: Mask) -> NDArray[np.float32]:
    """The image in [-1, 1] with the edit region at 0, as the encoder sees it in training and in use."""
    return np.where(edit, 0.0, image.astype(np.float32) / 127.5 - 1.0).astype(np.float32)


def random_lesion(frame: Frame, rng: np.random.Generator) -> Mask:
    """The largest part of one of the image's lesions, chosen at random."""
    mask = frame.lesions == rng.integers(1, int(frame.lesions.max()) + 1)
    labels, count = ndimage.label(mask)
    return np.asarray(labels == np.bincount(labels.ravel())[1:].argmax() + 1) if count else np.asarray(mask)


def decoy_region(frame: Frame, shape: Mask, rng: np.random.Generator) -> Mask | None:
    """The edit region of another lesion's ``shape``, moved to healthy tissue of this image; ``None`` if none fits."""
    rows, columns = np.nonzero(shape)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    free_rows, free_columns = np.nonzero(frame.valid)
    for _ in range(8):
        at = rng.integers(free_rows.size)
        moved = np.zeros_like(shape)
        y = rows - rows.min() + free_rows[at] - height // 2
        x = columns - columns.min() + free_columns[at] - width // 2
        inside = (y >= 0) & (y < RESOLUTION) & (x >= 0) & (x < RESOLUTION)
        moved[y[inside], x[inside]] = True
        edit = edit_region(moved & frame.valid, frame.valid)
        if edit.sum() > 400 and not (edit & (frame.lesions > 0)).any():
            return edit
    return None


@dataclass
class WindowExamples:
    """Encoded windows of one size; ``s`` is their side / 8.

    ``clean``/``known`` ``(N, C, s, s)`` fp16 latents of the whole and of the greyed window; ``mask`` ``(N, 4, s, s)``;
    ``edit``, ``ring``, ``weight`` ``(N, 1, s, s)``; ``tokens`` ``(N, T, D)``; ``keep`` ``(N, T)``; ``label``, ``row``,
    ``scanner`` ``(N,)``.
    Of Stable Diffusion, ``s`` is the side at which it is shown / 8, and there are grey ``pixels`` and ``lesion``, the
    mask, ``(N, 1, S, S)`` at the windows' own side.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return self.tensors["clean"].shape[0]

    def batch(self, index: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The examples at ``index`` on ``device``, with fp16 and bool as fp32."""
        picked = {name: tensor[index].to(device) for name, tensor in self.tensors.items()}
        return {name: t if t.dtype == torch.long else t.float() for name, t in picked.items()}

    def only(self, rows: Tensor, label: int | None) -> WindowExamples:
        """The examples of some prepared rows and, if given, of one class."""
        keep = torch.isin(self.tensors["row"], rows)
        if label is not None:
            keep &= self.tensors["label"] == label
        return WindowExamples({name: tensor[keep] for name, tensor in self.tensors.items()})


def save_examples(path: Path, buckets: dict[int, WindowExamples]) -> None:
    """Write encoded examples, by rename."""
    save_state(path, {f"{side}.{name}": t for side, part in buckets.items() for name, t in part.tensors.items()}, {})


def load_examples(path: Path) -> dict[int, WindowExamples]:
    """Read what :func:`save_examples` wrote."""
    buckets: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_state(path)[0].items():
        side, _, name = key.partition(".")
        buckets.setdefault(int(side), {})[name] = tensor
    return {side: WindowExamples(buckets[side]) for side in sorted(buckets)}


def window_examples(
    frames: Frames, networks: Networks, variants: int, seed: int, progress: Progress, buckets: Sequence[int] = BUCKETS
) -> dict[int, WindowExamples]:
    """Encode windows for stages 2 and 3, by bucket; possibly none.

    A lesion image gives ``variants`` windows around its lesion, and half as many elsewhere that teach to heal.
    """
    pending: dict[int, list[dict[str, Tensor]]] = {side: [] for side in buckets}
    done: dict[int, list[dict[str, Tensor]]] = {side: [] for side in buckets}
    jobs = list(_window_jobs(frames, variants, seed))
    for count, (row, frame, mask, edit, label, rng) in enumerate(jobs, start=1):
        window = window_for(edit, buckets)
        limit = RESOLUTION - window.side
        top, left = (int(np.clip(v + rng.integers(-8, 9), 0, limit)) for v in (window.top, window.left))
        window = Window(top, left, window.side)
        arrays = window_tensors(frame, mask, edit, label, window, networks.preset.patch)
        pending[window.side].append({**arrays, "row": torch.tensor(row)})
        if len(pending[window.side]) == ENCODE_BATCH:
            done[window.side].append(_encode_windows(pending[window.side], networks))
            pending[window.side] = []
            progress(count, len(jobs))
    for side, rest in pending.items():
        if rest:
            done[side].append(_encode_windows(rest, networks))
    progress(len(jobs), len(jobs))
    return {side: WindowExamples(joined(parts)) for side, parts in done.items() if parts}


def _window_jobs(
    frames: Frames, variants: int, seed: int
) -> Iterator[tuple[int, Frame, Mask, Mask, str, np.random.Generator]]:
    """Yield (row, frame, lesion mask, edit region, label, generator) of each window."""
    lesion_rows = frames.with_lesion()
    for position in range(len(frames)):
        base, row = frames[position], int(frames.table["row"][position])
        for variant in range(variants):
            rng = np.random.default_rng((seed, row, variant))
            frame = base.varied(rng)
            scales = {"margin_scale": rng.uniform(0.8, 1.4), "shadow_scale": rng.uniform(0.7, 1.3)}
            if frame.label != "normal":
                mask = random_lesion(frame, rng)
                edit = edit_region(mask, frame.valid, **scales)
                if edit.any():
                    yield row, frame, mask, edit, frame.label, rng
            if lesion_rows and (variant % 2 == 0 or frame.label == "normal"):
                other = frames[lesion_rows[int(rng.integers(len(lesion_rows)))]]
                elsewhere = decoy_region(frame, random_lesion(other, rng), rng)
                if elsewhere is not None:
                    yield row, frame, np.zeros_like(elsewhere), elsewhere, "normal", rng


def window_tensors(frame: Frame, mask: Mask, edit: Mask, label: str, window: Window, patch: int) -> dict[str, Tensor]:
    """What a window and its image are encoded from: pixels in [-1, 1] and bool masks."""
    cut = window.slices
    return {
        "pixels": to_tensor(frame.image[cut]),
        "greyed": torch.from_numpy(greyed(frame.image, edit)[cut])[None],
        "mask": torch.from_numpy(mask[cut])[None],
        "edit": torch.from_numpy(edit[cut])[None],
        "ring": torch.from_numpy(ring_region(edit)[cut])[None],
        # Neither bars nor overlays are tissue.
        "usable": torch.from_numpy((frame.valid & ~frame.overlay)[cut])[None],
        "image": to_tensor(frame.image),
        "keep": torch.from_numpy(patches_outside(edit, patch)),
        "label": torch.tensor(CLASSES.index(label)),
        "scanner": torch.tensor(frame.scanner),
    }


@torch.no_grad()
def _encode_windows(items: list[dict[str, Tensor]], networks: Networks) -> dict[str, Tensor]:
    stacked = {name: torch.stack([item[name] for item in items]).to(networks.device) for name in items[0]}
    keep = stacked["keep"].float()
    clean = networks.encoder(stacked["pixels"])
    side = clean.shape[-1] * LATENT_FACTOR
    mask, edit, ring, usable = (shown(stacked[name].float(), side) for name in ("mask", "edit", "ring", "usable"))
    encoded = {
        "clean": clean.half(),
        "known": networks.encoder(stacked["greyed"]).half(),
        "mask": mask_condition(mask).half(),
        "edit": region_condition(edit).bool(),
        "ring": region_condition(ring).bool(),
        # A cell counts if all of its pixels do.
        "weight": (1.0 - region_condition(1.0 - usable)).bool(),
        "tokens": networks.tokens(stacked["image"], keep).half(),
        "keep": keep.bool(),
        "label": stacked["label"],
        "scanner": stacked["scanner"],
        "row": stacked["row"],
    }
    if networks.shown_at is not None:  # A decoder for these latents learns from the same windows.
        encoded |= {"pixels": (127.5 * (stacked["pixels"] + 1.0)).round().byte(), "lesion": stacked["mask"]}
    return {name: tensor.cpu() for name, tensor in encoded.items()}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates tables of tensors."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def background_examples(
    frames: Frames, healed: Healed, networks: Networks, *, variants: int, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """The healthy prior's examples: latents of whole healthy or healed images without letterbox bars."""
    parts: list[dict[str, Tensor]] = []
    jobs = frames.jobs(variants)
    for start in range(0, len(jobs), ENCODE_BATCH):
        images, weights, rows, places, scanners = [], [], [], [], []
        for position, variant in jobs[start : start + ENCODE_BATCH]:
            row = int(frames.table["row"][position])
            rng = np.random.default_rng((seed, row, variant, 2))
            frame = frames[position]
            image = frame.image if frame.label == "normal" else healed(row, variant)
            frame = replace(frame, image=image).filling(rng).with_gain(rng)
            frame = frame.flipped() if rng.random() < 0.5 else frame
            rows.append(row)
            images.append(to_tensor(frame.image))
            places.append(frame.place)
            scanners.append(frame.scanner)
            weights.append(torch.from_numpy((frame.overlay | ~frame.valid).astype(np.float32))[None])
        parts.append(
            {
                "clean": networks.encoder(torch.stack(images).to(networks.device)).half().cpu(),
                "weight": (1.0 - region_condition(torch.stack(weights))).bool(),
                "frame": torch.tensor(places, dtype=torch.int16),
                "row": torch.tensor(rows),
                "scanner": torch.tensor(scanners),
            }
        )
        progress(min(start + ENCODE_BATCH, len(jobs)), len(jobs))
    return joined(parts)


@torch.no_grad()
def outline_examples(
    frames: Frames,
    healed: Healed,
    space: OutlineSpace,
    *,
    networks: Networks,
    variants: int,
    seed: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Encode stage 1's examples: healed images, each with one of its lesions, under another gain, flip and cut.

    ``clean`` ``(N, D)`` fp32 codes, ``birads`` ``(N, 4)`` bool, ``tokens`` ``(N, T, C)`` fp16, ``keep``
    ``(N, T)`` bool, ``weight`` ``(N, 1)``, ``label`` and ``row`` ``(N,)``; empty if no image has a lesion.
    """
    parts: list[dict[str, Tensor]] = []
    jobs = frames.jobs(variants, lesions_only=True)
    for start in range(0, len(jobs), ENCODE_BATCH):
        part = jobs[start : start + ENCODE_BATCH]
        rows = [int(frames.table["row"][position]) for position, _ in part]
        chosen = []
        for row, (position, variant) in zip(rows, part, strict=True):
            rng = np.random.default_rng((seed, row, variant, 1))
            frame = frames[position]
            # The lesion is chosen before the geometry changes, or another one could become the target.
            lesion = random_lesion(frame, rng).astype(np.uint8)
            frame = replace(frame, image=healed(row, variant), lesions=lesion).with_gain(rng)
            frame = frame.flipped() if rng.random() < 0.5 else frame
            # Synthetic backgrounds have no letterbox bars.
            chosen.append(frame.filling(rng) if rng.random() < 0.5 else frame)
        images = torch.stack([to_tensor(frame.image) for frame in chosen]).to(networks.device)
        keep = torch.ones(len(chosen), networks.preset.tokens, device=networks.device)
        parts.append(
            {
                "clean": space.encode([frame.lesions > 0 for frame in chosen]).cpu(),
                "birads": torch.from_numpy(birads_flags([frames.table["birads"][position] for position, _ in part])),
                "tokens": networks.tokens(images, keep).half().cpu(),
                "keep": keep.bool().cpu(),
                "weight": torch.ones(len(chosen), 1),
                "label": torch.tensor([CLASSES.index(frame.label) for frame in chosen]),
                "row": torch.tensor(rows),
            }
        )
        progress(min(start + ENCODE_BATCH, len(jobs)), len(jobs))
    return joined(parts) if parts else {}
