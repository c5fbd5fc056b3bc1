"""The stages as calls of a bundle's graphs: what each is given, in padded batches, and what is made of its answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask, Window, paste, patches_outside, ring_region
from busigen.errors import CapacityError
from busigen.noise_styles import styled
from busigen.registry import BUCKETS, MIN_BATCH, RESOLUTION, SCANNERS, rows_per_call
from busigen.runtime.backends.base import Backend
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.sampling.batching import Draft, DrawRequest
from busigen.runtime.sampling.noise import normal

CACHED_TOKENS = 256  # number of healthy images whose context tokens are kept: those used last

Floats = NDArray[np.float32]


class Graphs:
    """A bundle's graphs on a backend, called with ``batch_size`` rows at most at the smallest window."""

    def __init__(self, bundle: Bundle, backend: Backend, batch_size: int) -> None:
        self.bundle, self.backend, self.batch_size = bundle, backend, batch_size
        # One engine call at a time on the processor: it has all compute threads, and two would need twice the memory.
        # A card takes the next call's inputs while it computes.
        self._engine = threading.Semaphore(backend.max_concurrent_calls)
        self._token_cache: OrderedDict[Hashable, Floats] = OrderedDict()
        self._token_lock = threading.Lock()

    @property
    def whole_rows(self) -> int:
        """Rows of a full call on whole images."""
        return rows_per_call(RESOLUTION, self.batch_size)

    def backgrounds(
        self,
        seed: int,
        batch: Sequence[DrawRequest],
        places: Sequence[tuple[int, int, int, int]],
        scanners: Iterable[str | None],
        starts: Sequence[NDArray[np.uint8]] = (),
    ) -> list[NDArray[np.uint8]]:
        """The prior's square pictures, ``(256, 256)``, of each of which one of ``places`` becomes an image.

        These are top, left, height and width. ``starts`` are what pictures begin with, if they begin with any.
        """
        full, count = self.whole_rows, len(batch)
        noise, styles = _noise(seed, batch, "prior", self.bundle.background_shape), self.bundle.styles
        if styles is not None:
            noise = styled(noise, styles, _noise(seed, batch, "style", styles.shape[1:]))
        inputs = {"noise": noise, "frame": np.array(places, np.float32), "scanner": self.told(scanners)}
        if starts:
            inputs["start"] = self.run(f"encoder@{RESOLUTION}", full, count, pixels=_pictures(starts))
        latents = self.run("prior", full, count, **inputs)
        speckle = _noise(seed, batch, "prior speckle", (1, RESOLUTION, RESOLUTION))
        speckle *= np.float32(self.bundle.background_speckle)
        decoder = self.bundle.background_decoder
        nothing, told = np.zeros_like(speckle), inputs["scanner"]
        pixels = self.run(decoder, full, count, latents=latents, noise=speckle, mask=nothing, scanner=told)
        return [to_grey(image[0]) for image in pixels]

    def outlines(self, seed: int, batch: Sequence[Draft], asked: Floats) -> list[Mask]:
        """The outlines that stage 1 draws, as masks ``(256, 256)``; for ``asked`` see `SampleConditions.vector`."""
        keep = np.ones((len(batch), (RESOLUTION // self.bundle.patch) ** 2), dtype=np.float32)
        inputs = {
            "noise": _noise(seed, batch, "mask", (self.bundle.code_length,)),
            "tokens": self._whole_tokens(batch, keep),
            "keep": keep,
            "asked": asked,
        }
        distance = self.run(f"mask-{batch[0].label}", self.rows(), len(batch), **inputs)
        return [field[0] > 0 for field in distance]

    def images(self, seed: int, batch: Sequence[Draft]) -> list[NDArray[np.uint8]]:
        """The whole images that stages 2 and 3 paint for drafts of one class and window side, ``(256, 256)`` uint8."""
        count, (_, label, side) = len(batch), batch[0].kind
        full, shown, factor = self.rows(side), self.bundle.windows[side], self.bundle.latent_factor
        masks = [draft.mask for draft in batch if draft.mask is not None]
        edits = [draft.edit for draft in batch if draft.edit is not None]
        windows = [draft.window for draft in batch if draft.window is not None]
        keep = np.stack([patches_outside(edit, self.bundle.patch) for edit in edits]).astype(np.float32)
        grey = [np.where(e, 0.0, to_unit(d.canvas)) for d, e in zip(batch, edits, strict=True)]
        mask = cut(masks, windows)
        edit, ring = (shown_at(shown, cut(one, windows)) for one in (edits, [ring_region(e) for e in edits]))
        known = self.keep(f"encoder@{side}", full, count, pixels=cut(grey, windows))
        common = {
            "tokens": self.keep("context", full, count, image=_pictures(d.canvas for d in batch), keep=keep),
            "keep": keep,
            "known": known,
            "mask": shown_at(shown, mask),
            "edit": edit,
            "scanner": self.told(draft.healthy.row.get("scanner") for draft in batch),
        }

        def stage(name: str, painted: Any, ring: Floats) -> Any:
            graph, shape = f"{name}-{label}@{side}", self.bundle.latent_shape(side)
            noise = {"noise": _noise(seed, batch, name, shape)}
            if steps := self.bundle.fresh(graph):
                noise["fresh"] = _noise(seed, batch, f"{name} fresh", (steps, *shape))
            return self.keep(graph, full, count, painted=painted, ring=ring, **noise, **common)

        # A graph that serves both stages has all inputs; nothing is painted yet, and no ring is to be repainted.
        painted = stage("lesion", known, np.zeros_like(ring))
        blended = stage("blend", painted, ring)
        # Stage 3 redraws all latents, but the lesion is stage 2's: only the ring, and what lies beyond it, is blended.
        inside = cells_of(edit, factor) & ~cells_of(ring, factor)
        blended = self.backend.select(padded_to(inside, len(painted)), painted, blended)
        speckle = _noise(seed, batch, "speckle", (1, side, side))
        pixels = self.run(
            f"decoder@{side}", full, count, latents=blended, noise=speckle, mask=mask, scanner=common["scanner"]
        )
        return [
            paste(draft.canvas, new[0], edit, window, self.bundle.grain_fade)
            for draft, new, edit, window in zip(batch, pixels, edits, windows, strict=True)
        ]

    def _whole_tokens(self, batch: Sequence[Draft], keep: Floats) -> Floats:
        """Context tokens of whole healthy images; those of a user's image are computed once and kept."""
        keys: list[Hashable] = [draft.healthy.row["healthy_sha256"] or draft.position for draft in batch]
        with self._token_lock:
            found = {key: self._token_cache[key] for key in keys if key in self._token_cache}
        # Keyed by image, so that several draws of a batch share one computation, too.
        if fresh := {key: draft for key, draft in zip(keys, batch, strict=True) if key not in found}:
            # Of further lesions, too: stage 1 was trained on images without any.
            images = _pictures(draft.healthy.pixels for draft in fresh.values())
            tokens = self.run("context", self.rows(), len(fresh), image=images, keep=keep[: len(fresh)])
            # Copied, because a view of one row would keep its whole batch in memory.
            found |= {key: row.copy() for key, row in zip(fresh, tokens, strict=True)}
        with self._token_lock:
            for key in dict.fromkeys(keys):
                if isinstance(key, str):
                    self._token_cache[key] = found[key]
                    self._token_cache.move_to_end(key)
            while len(self._token_cache) > CACHED_TOKENS:
                self._token_cache.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def told(self, names: Iterable[str | None]) -> Floats:
        """Scanners as graphs are told them, ``(B, SCANNERS)``."""
        known = list(self.bundle.scanners)
        told = np.zeros((len(rows := list(names)), SCANNERS), np.float32)
        for row, name in zip(told, rows, strict=True):
            if name is not None:
                row[known.index(name)] = 1.0
        return told

    def rows(self, side: int = 0) -> int:
        """Rows of a full call on windows of that side; without one, of calls that have no window."""
        return rows_per_call(self.bundle.windows[side] if side else BUCKETS[0], self.batch_size)

    def run(self, graph: str, full: int, count: int, **inputs: Any) -> Floats:
        """Run a graph on a padded batch: the last row is repeated, and what comes of it thrown away."""
        result: Floats = self._call(self.backend.run, graph, full, count, inputs)
        return result[:count]

    def keep(self, graph: str, full: int, count: int, **inputs: Any) -> Any:
        """Run a graph, and leave what comes out, padding and all, where it was computed."""
        return self._call(self.backend.keep, graph, full, count, inputs)

    def _call(
        self, run: Callable[[str, Mapping[str, Any]], Any], graph: str, full: int, count: int, inputs: dict[str, Any]
    ) -> Any:
        """Pad the batch to a power of two, ``full`` rows at most, and call the engine with what the graph reads."""
        # So the engine plans few shapes, and a rest of three rows does not cost as much as sixteen.
        size = min(max(count, full), max(MIN_BATCH, 1 << (count - 1).bit_length()))
        inputs |= self.bundle.constants(graph)
        if (read := self.bundle.inputs(graph)) is not None:
            inputs = {name: inputs[name] for name in read}
        # Kept outputs are padded already, and may be on the device.
        padded = {
            name: array if len(array) == size else padded_to(array, size).astype(np.float32, copy=False)
            for name, array in inputs.items()
        }
        try:
            with self._engine:
                return run(graph, padded)
        except CapacityError as error:
            if not (fitting := self.batch_size * error.fits // max(1, error.rows)):
                raise
            raise CapacityError(
                f"--batch-size is {self.batch_size}: {error.problem}",
                fix=f"Run the same command with --batch-size {fitting}, which changes no sample.",
                rows=error.rows,
                fits=error.fits,
            ) from error


def _pictures(images: Iterable[NDArray[np.uint8]]) -> Floats:
    """Whole images as the context encoder reads them, ``(B, 1, 256, 256)`` from -1 to 1."""
    return np.stack([to_unit(pixels)[None] for pixels in images])


def _noise(seed: int, batch: Sequence[DrawRequest], stream: str, shape: Sequence[int]) -> Floats:
    return np.stack([normal(seed, item.seeded, item.attempt, stream, shape, item.part) for item in batch])


def to_unit(pixels: NDArray[np.uint8]) -> Floats:
    """Grey levels to [-1, 1]."""
    return (pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)).astype(np.float32)


def to_grey(pixels: Floats) -> NDArray[np.uint8]:
    """[-1, 1] to grey levels."""
    grey: NDArray[np.uint8] = np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return grey


def cells_of(region: Floats, factor: int) -> NDArray[np.bool_]:
    """Latent cells, ``factor`` pixels wide, that a region ``(B, 1, S, S)`` touches, ``(B, 1, S/factor, S/factor)``."""
    batch, _, side, _ = region.shape
    cells = side // factor
    tiles = region.reshape(batch, 1, cells, factor, cells, factor)
    return np.asarray((tiles > 0).any(axis=(3, 5)))


def cut(arrays: Sequence[NDArray[Any]], windows: Sequence[Window]) -> Floats:
    """Windows of whole images as a batch, ``(B, 1, S, S)`` float32."""
    cuts = [array[window.slices] for array, window in zip(arrays, windows, strict=True)]
    return np.stack(cuts)[:, None].astype(np.float32)


def shown_at(side: int, windows: Floats) -> Floats:
    """Windows ``(B, 1, S, S)`` at a side that is a multiple of theirs, by repeated pixels."""
    times = side // windows.shape[-1]
    return windows.repeat(times, axis=2).repeat(times, axis=3)


def padded_to(array: NDArray[Any], size: int) -> NDArray[Any]:
    """An array with its last row repeated until it has ``size`` rows."""
    return np.concatenate((array, np.repeat(array[-1:], size - len(array), axis=0)))
