"""The three-stage sampler: (seed, index) in, accepted pair of image and mask out.

Everything a sample depends on is keyed by its index, so draws can be grouped by class and window size to fill batches
without changing what any of them is. Batches are padded to powers of two, so that the engines see few shapes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import (
    Mask,
    Window,
    edit_region,
    largest_component,
    paste,
    patches_outside,
    ring_region,
    window_for,
)
from busigen.errors import AcceptanceError, UsageError
from busigen.registry import ATTRIBUTES, BUCKETS, LATENT_FACTOR, RESOLUTION, SYNTHETIC
from busigen.runtime import gates
from busigen.runtime.asking import Asked, measured
from busigen.runtime.backend import Backend
from busigen.runtime.batching import batches, grouped
from busigen.runtime.bundle import Bundle, default_bundle, graph_names
from busigen.runtime.classes import class_at
from busigen.runtime.healthy import Healthy, HealthyFolder, synthetic
from busigen.runtime.noise import normal, uniform
from busigen.runtime.sample import Drawn, Rejection, Sample

MAX_ATTEMPTS = 64
"""Draws per index before the run is given up: at half of all draws refused, no index in 10^18 gets here."""

BATCHES_PER_ROUND = 8
"""Draws are collected for this many batches before they are grouped, so that most groups fill their batches."""

MIN_BATCH = 2
"""Rows that every engine call has at least: ONNX Runtime adds up a batch of one in another order than a larger one's
rows, and the bytes of a sample must not depend on the batch size."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Draft:
    """One draw on its way through the stages. Later fields are filled stage by stage."""

    index: int
    attempt: int
    label: str
    healthy: Healthy
    wanted: Mapping[str, float] = field(default_factory=dict)
    mask: Mask | None = None
    edit: Mask | None = None
    window: Window | None = None


class Sampler:
    """A :class:`busigen.runtime.sample.Source` on top of a bundle's graphs.

    Args:
        bundle: says what the graphs are.
        backend: runs them.
        classes: class weights (:func:`busigen.runtime.classes.parse_classes`).
        healthy: a folder of healthy images, or ``None`` for synthetic backgrounds.
        asked: what the outlines are asked to be.
        batch_size: images per engine call at the smallest window; larger windows use fewer, none fewer than
            ``MIN_BATCH``.

    Raises:
        UsageError: ``batch_size`` is not between 1 and 4096.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        classes: Mapping[str, float],
        healthy: HealthyFolder | None = None,
        asked: Asked | None = None,
        batch_size: int = 16,
    ) -> None:
        if not 1 <= batch_size <= 4096:
            raise UsageError(f"--batch-size is {batch_size}.", fix="Give a whole number from 1 to 4096.")
        self.bundle, self.backend, self.classes, self.healthy = bundle, backend, dict(classes), healthy
        self.asked = asked or Asked()
        self.batch_size = batch_size
        self._graphs = frozenset(graph_names())

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`busigen.runtime.sample.Source`. The batch size is absent: it changes no sample."""
        return {
            "bundle": self.bundle.sha256,
            "checkpoint": self.bundle.info.get("checkpoint"),
            "split_hash": self.bundle.info.get("split_hash"),
            "preset": self.bundle.info.get("preset"),
            "provider": self.backend.name,
            "engine_version": self.backend.version,
            "classes": self.classes,
            "healthy": self.healthy.fingerprint() if self.healthy else SYNTHETIC,
            **self.asked.typed(),
            "gates": {name: getattr(gates, name) for name in sorted(vars(gates)) if name.isupper()},
        }

    def options(self) -> Mapping[str, str | None]:
        """See :class:`busigen.runtime.sample.Source`."""
        return {
            "--bundle": None if self.bundle.folder == default_bundle() else self.bundle.folder.resolve().name,
            "--healthy": self.healthy.folder.resolve().name if self.healthy else SYNTHETIC,
        }

    def row_types(self) -> Mapping[str, type]:
        """See :class:`busigen.runtime.sample.Source`."""
        return {
            "background": str,
            "healthy_file": str,
            "healthy_sha256": str,
            "letterbox_scale": float,
            "letterbox_left": int,
            "letterbox_top": int,
            "window_top": int,
            "window_left": int,
            "window_side": int,
            "edit_pixels": int,
            "area_share": float,
            **{name: float for name in ATTRIBUTES if name != "size"},
            **{f"asked_{name}": float for name in ATTRIBUTES},
            "asked_birads": str,
        }

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> Drawn:
        """Draw until every index has an accepted sample.

        Raises:
            AcceptanceError: an index was refused ``MAX_ATTEMPTS`` times.
            IntegrityError: the healthy images are no longer those that the run began with.
        """
        pending = deque((index, 0) for index in indices)
        samples: dict[int, Sample] = {}
        rejections: list[Rejection] = []
        while pending:
            size = min(len(pending), self.batch_size * BATCHES_PER_ROUND)
            jobs = [pending.popleft() for _ in range(size)]
            accepted, refused = self.attempt(seed, jobs, done)
            samples.update((sample.index, sample) for sample in accepted)
            rejections += refused
            for rejection in refused:
                if rejection.attempt + 1 >= MAX_ATTEMPTS:
                    raise AcceptanceError(
                        f"sample {rejection.index} was refused {MAX_ATTEMPTS} times, last for: {rejection.reason}.",
                        fix=f"Use another bundle or other healthy images{', or ask for less' if self.asked else ''}. "
                        f"Refused so far: {_by_reason(rejections)}.",
                    )
                pending.append((rejection.index, rejection.attempt + 1))
        if self.healthy is not None:
            self.healthy.refuse_changes()
        rejections.sort(key=lambda rejection: (rejection.index, rejection.attempt))
        return Drawn([samples[index] for index in indices], rejections)

    def attempt(
        self, seed: int, jobs: Sequence[tuple[int, int]], done: Callable[[int], None] = lambda accepted: None
    ) -> tuple[list[Sample], list[Rejection]]:
        """Make one draw per (index, attempt) and judge each by the gates; ``done`` hears of the accepted per batch."""
        samples: list[Sample] = []
        rejections: list[Rejection] = []

        def passed(draft: Draft, reason: str | None) -> bool:
            if reason is not None:
                rejections.append(Rejection(draft.index, draft.attempt, draft.label, reason))
            return reason is None

        drafts = [draft for draft in self._backgrounds(seed, jobs) if passed(draft, _background_reason(draft))]
        outlined = []
        for draft, raw in self._outlines(seed, drafts):
            mask = largest_component(raw & draft.healthy.valid)
            if passed(draft, _mask_reason(draft, raw, mask)):
                edit = edit_region(mask, draft.healthy.valid)
                outlined.append(replace(draft, mask=mask, edit=edit, window=window_for(edit)))
        for batch in self._paint(seed, outlined):
            before = len(samples)
            for draft, image in batch:
                assert draft.mask is not None
                if passed(draft, gates.image_reason(image, draft.mask, draft.healthy.valid)):
                    samples.append(_sample(draft, image, self.asked.birads))
            done(len(samples) - before)
        return samples, rejections

    def _backgrounds(self, seed: int, jobs: Sequence[tuple[int, int]]) -> list[Draft]:
        """Pick or synthesise each draw's healthy image."""
        if self.healthy is not None:
            pictures = [self.healthy.pick(uniform(seed, i, a, "healthy")) for i, a in jobs]
        else:
            pictures = []
            for batch in batches(jobs, self._size(BUCKETS[-1])):
                # Whole images, so the prior's batch is that of the large windows.
                noise = np.stack([normal(seed, i, a, "prior", self.bundle.latent_shape) for i, a in batch])
                latents = self._run("prior", BUCKETS[-1], len(batch), noise=noise)
                speckle = np.stack([normal(seed, i, a, "prior speckle", (1, RESOLUTION, RESOLUTION)) for i, a in batch])
                pixels = self._run("decoder", BUCKETS[-1], len(batch), latents=latents, noise=speckle)
                pictures += [synthetic(_to_grey(image[0])) for image in pixels]
        return [
            Draft(index, attempt, class_at(index, self.classes), picture, self.asked.values(seed, index))
            for (index, attempt), picture in zip(jobs, pictures, strict=True)
        ]

    def _outlines(self, seed: int, drafts: Sequence[Draft]) -> Iterable[tuple[Draft, Mask]]:
        """Stage 1: where the lesion goes and what outline it has."""
        shape = (self.bundle.code_length,)
        for label, group in grouped(drafts, lambda draft: draft.label):
            for batch in batches(group, self._size(BUCKETS[0])):
                noise = np.stack([normal(seed, d.index, d.attempt, "mask", shape) for d in batch])
                keep = np.ones((len(batch), (RESOLUTION // self.bundle.patch) ** 2), dtype=np.float32)
                inputs = {
                    "noise": noise,
                    "tokens": self._tokens(batch, keep),
                    "keep": keep,
                    "asked": np.stack([self.asked.vector(d.wanted, d.healthy.valid) for d in batch]),
                }
                distance = self._run(f"mask-{label}", None, len(batch), **inputs)
                yield from ((draft, field[0] > 0) for draft, field in zip(batch, distance, strict=True))

    def _paint(self, seed: int, drafts: Sequence[Draft]) -> Iterable[list[tuple[Draft, NDArray[np.uint8]]]]:
        """Stages 2 and 3, and the paste into the healthy image, batch by batch."""
        for (label, side), group in grouped(drafts, lambda d: (d.label, d.window.side if d.window else 0)):
            for batch in batches(group, self._size(side)):
                yield list(zip(batch, self._paint_batch(seed, label, side, batch), strict=True))

    def _paint_batch(self, seed: int, label: str, side: int, batch: Sequence[Draft]) -> list[NDArray[np.uint8]]:
        count = len(batch)
        shape = (self.bundle.latent_shape[0], side // LATENT_FACTOR, side // LATENT_FACTOR)
        masks = [draft.mask for draft in batch if draft.mask is not None]
        edits = [draft.edit for draft in batch if draft.edit is not None]
        windows = [draft.window for draft in batch if draft.window is not None]
        keep = np.stack([patches_outside(edit, self.bundle.patch) for edit in edits]).astype(np.float32)
        grey = [np.where(e, 0.0, _to_unit(d.healthy.pixels)) for d, e in zip(batch, edits, strict=True)]
        common = {
            "tokens": self._tokens(batch, keep),
            "keep": keep,
            "known": self._run("encoder", side, count, pixels=_cut(grey, windows)),
            "mask": _cut(masks, windows),
            "edit": _cut(edits, windows),
        }

        def noise(stream: str, shape: Sequence[int]) -> Floats:
            return np.stack([normal(seed, d.index, d.attempt, stream, shape) for d in batch])

        painted = self._run(f"lesion-{label}", side, count, noise=noise("lesion", shape), **common)
        ring = _cut([ring_region(edit) for edit in edits], windows)
        blended = self._run(
            f"blend-{label}", side, count, noise=noise("blend", shape), painted=painted, ring=ring, **common
        )
        # Stage 3 redraws all latents, but the lesion is stage 2's: only the ring, and what lies beyond it, is blended.
        inside = _cells(common["edit"]) & ~_cells(ring)
        blended = np.where(inside, painted, blended)
        speckle = noise("speckle", (1, side, side))
        pixels = self._run("decoder", side, count, latents=blended, noise=speckle)
        return [
            paste(draft.healthy.pixels, new[0], edit, window)
            for draft, new, edit, window in zip(batch, pixels, edits, windows, strict=True)
        ]

    def _tokens(self, batch: Sequence[Draft], keep: Floats) -> Floats:
        image = np.stack([_to_unit(draft.healthy.pixels)[None] for draft in batch])
        return self._run("context", None, len(batch), image=image, keep=keep)

    def _size(self, side: int) -> int:
        return max(MIN_BATCH, self.batch_size * BUCKETS[0] ** 2 // side**2)

    def _run(self, graph: str, side: int | None, count: int, **inputs: NDArray[Any]) -> Floats:
        """Run a graph on a padded batch: the last row is repeated, and what comes of it thrown away.

        Padded to a power of two: few shapes for the engine to plan, and a tail of three rows does not pay for sixteen.
        """
        full = max(count, self._size(side or BUCKETS[0]))
        size = min(full, max(MIN_BATCH, 1 << (count - 1).bit_length()))
        padded = {
            name: np.concatenate((array, np.repeat(array[-1:], size - count, axis=0))).astype(np.float32, copy=False)
            for name, array in inputs.items()
        }
        name = graph if graph in self._graphs else f"{graph}@{side}"
        return self.backend.run(name, padded)[:count]


def _background_reason(draft: Draft) -> str | None:
    if draft.healthy.row["background"] != SYNTHETIC:
        return None
    return gates.background_reason(draft.healthy.pixels)


def _mask_reason(draft: Draft, raw: Mask, mask: Mask) -> str | None:
    valid = draft.healthy.valid
    return gates.mask_reason(raw, mask, valid) or gates.asked_reason(measured(mask, valid), draft.wanted)


def _sample(draft: Draft, image: NDArray[np.uint8], birads: str | None) -> Sample:
    assert draft.mask is not None and draft.edit is not None and draft.window is not None
    found = measured(draft.mask, draft.healthy.valid)
    row = {
        **draft.healthy.row,
        "window_top": draft.window.top,
        "window_left": draft.window.left,
        "window_side": draft.window.side,
        "edit_pixels": int(draft.edit.sum()),
        "area_share": found.pop("size"),
        **found,
        **{f"asked_{name}": draft.wanted.get(name) for name in ATTRIBUTES},
        "asked_birads": birads,
    }
    return Sample(draft.index, draft.attempt, draft.label, image, draft.mask, row)


def _by_reason(rejections: Sequence[Rejection]) -> str:
    counts = Counter(rejection.reason for rejection in rejections)
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def _to_unit(pixels: NDArray[np.uint8]) -> Floats:
    return (pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)).astype(np.float32)


def _to_grey(pixels: Floats) -> NDArray[np.uint8]:
    grey: NDArray[np.uint8] = np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return grey


def _cells(region: Floats) -> NDArray[np.bool_]:
    """Latent cells that a region of windows ``(B, 1, S, S)`` touches, ``(B, 1, S/8, S/8)``."""
    batch, _, side, _ = region.shape
    cells = side // LATENT_FACTOR
    tiles = region.reshape(batch, 1, cells, LATENT_FACTOR, cells, LATENT_FACTOR)
    return np.asarray((tiles > 0).any(axis=(3, 5)))


def _cut(arrays: Sequence[NDArray[Any]], windows: Sequence[Window]) -> Floats:
    """Windows of whole images as a batch, ``(B, 1, S, S)`` float32."""
    cuts = [array[window.slices] for array, window in zip(arrays, windows, strict=True)]
    return np.stack(cuts)[:, None].astype(np.float32)
