"""The three-stage sampler, which turns a seed and an index into an accepted pair of image and mask.

Everything a sample depends on is keyed by its index, so draws can be regrouped by stage, class and window size to fill
batches without changing what any of them is. Batches are padded to powers of two, so that the engines see few shapes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import (
    largest_component,
)
from busigen.errors import AcceptanceError, UsageError
from busigen.mtf import Kernels, Transfer, apply_to_pair
from busigen.phantoms.distribution import Phantom, filled
from busigen.registry import (
    DEFAULT_BATCH,
    NORMAL,
    SYNTHETIC,
)
from busigen.runtime.backends.base import Backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.dataset.format import TISSUE_COLUMN, Rejection, Sample, SampleBatch, picture_columns
from busigen.runtime.sampling import grid, quality_gates, several
from busigen.runtime.sampling.batching import (
    BEGIN,
    OUTLINE,
    PAINT,
    BatchScheduler,
    Draft,
    DrawRequest,
    Kind,
    Outcome,
    in_order,
    of_whole_groups,
)
from busigen.runtime.sampling.conditions import SampleConditions, measured
from busigen.runtime.sampling.graphs import Graphs
from busigen.runtime.sampling.grid import Grid
from busigen.runtime.sampling.inputs import given_masks
from busigen.runtime.sampling.inputs.backgrounds import TISSUE_MEASURES, AskedTissue, phantom_at, with_tissue
from busigen.runtime.sampling.inputs.given_masks import MaskFolder
from busigen.runtime.sampling.inputs.healthy_images import Healthy, HealthyFolder, place_of, synthetic
from busigen.runtime.sampling.noise import normal, uniform
from busigen.runtime.sampling.sample_plan import SamplePlan

log = logging.getLogger("busigen.runtime")

MAX_ATTEMPTS = 64  # per index before the run is given up: with half of all draws refused, no index in 10^18 gets here
MANY_ATTEMPTS = 8  # after which a person is told once why it takes so long
WINDOW_BATCHES = 8  # batches by which samples are drawn ahead of the oldest unfinished one, so that most batches fill


class Sampler:
    """A :class:`busigen.runtime.dataset.format.Stream` on top of a bundle's graphs.

    Without ``healthy``, backgrounds are synthetic; with ``masks``, stage 1 is left out, and these are painted in turn,
    each moved, scaled and mirrored within ``jitter`` (`inputs.placement.place`). Of a ``grid``, all samples of a
    background share it and their noise, and what is ``asked`` but for their levels. ``normals``, from 0 to below 1, is
    the share of samples that are a healthy image and an empty mask. ``scanner`` is a name of the bundle's, ``any`` or
    ``mix``. ``lesions`` weighs numbers of lesions, "1" to "3"; without it, an image has one. ``batch_size``, 1 to 4096
    or a UsageError, counts images per engine call at the smallest window; larger windows use fewer, none fewer than
    ``MIN_BATCH``.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        classes: Mapping[str, float],
        healthy: HealthyFolder | None = None,
        asked: SampleConditions | None = None,
        masks: MaskFolder | None = None,
        jitter: float = 0.0,
        grid: Grid | None = None,
        tissue: AskedTissue | None = None,
        normals: float = 0.0,
        scanner: str | None = None,
        lesions: Mapping[str, float] | None = None,
        batch_size: int = DEFAULT_BATCH,
    ) -> None:
        if not 1 <= batch_size <= 4096:
            raise UsageError(f"--batch-size is {batch_size}.", fix="Give a whole number from 1 to 4096.")
        if lacking := sorted(set(classes) - set(bundle.classes)):
            raise UsageError(
                f"--classes names {lacking[0]!r}, and {bundle.folder} paints {' and '.join(bundle.classes)} lesions.",
                fix=f"Give --classes {','.join(bundle.classes)}, or another --bundle.",
            )
        self.bundle, self.backend = bundle, backend
        self.plan = SamplePlan(
            dict(classes),
            healthy,
            asked or SampleConditions(),
            masks,
            jitter,
            grid,
            normals,
            scanner,
            dict(lesions or {}),
        )
        self.plan.refuse_scanner(bundle.scanners)
        self._transfer, self._phantoms = bundle.transfer, bundle.phantoms
        self.tissue = tissue or AskedTissue()
        if self.tissue and self._phantoms is None:
            option = f"--{next(iter(self.tissue.typed())).replace('_', '-')}"
            raise UsageError(
                f"{option} is given, and backgrounds of {bundle.folder} do not begin with phantoms.",
                fix="Leave it out, or export a bundle with --phantoms.",
            )
        self.batch_size = batch_size
        self.graphs = Graphs(bundle, backend, batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`busigen.runtime.dataset.format.Source`. The batch size is absent: it changes no sample."""
        return {
            "bundle": self.bundle.sha256,
            "checkpoint": self.bundle.info.get("checkpoint"),
            "split_hash": self.bundle.info.get("split_hash"),
            "preset": self.bundle.info.get("preset"),
            "provider": self.backend.name,
            "engine_version": self.backend.version,
            **({"engine_batches": asdict(self.backend.batches)} if self.backend.batches else {}),
            **self.plan.fingerprint(),
            **self.tissue.typed(),
            "gates": quality_gates.limits(),
        }

    def options(self) -> Mapping[str, str | None]:
        """See :class:`busigen.runtime.dataset.format.Source`."""
        return {
            "--bundle": None if self.bundle.folder == default_bundle() else self.bundle.folder.resolve().name,
            **self.plan.options(),
        }

    def row_types(self) -> Mapping[str, type]:
        """See :class:`busigen.runtime.dataset.format.Source`."""
        return {
            **dict.fromkeys(("background", "healthy_file", "healthy_sha256"), str),
            **(self.plan.healthy.row_types() if self.plan.healthy else {}),
            **({"scanner": str} if self.bundle.scanners else {}),
            "letterbox_scale": float,
            **dict.fromkeys(("letterbox_left", "letterbox_top"), int),
            **several.COLUMNS,
            "asked_birads": str,
            **(given_masks.COLUMNS if self.plan.masks else {}),
            **(grid.COLUMNS if self.plan.grid else {}),
            **(dict.fromkeys(TISSUE_MEASURES, float) if self._phantoms and not self.plan.healthy else {}),
            **several.numbered_columns(self.plan.most_lesions),
            **({TISSUE_COLUMN: str} if self.tissue.maps else {}),
        }

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        """Draw until every index has an accepted sample; an AcceptanceError, or an IntegrityError as `stream`."""
        with closing(self.stream(seed, [indices], done)) as drawings:
            return next(drawings, SampleBatch([], []))

    def stream(
        self,
        seed: int,
        requests: Iterable[Sequence[int]],
        done: Callable[[int], None],
        stopping: Callable[[], bool] = lambda: False,
    ) -> Generator[SampleBatch, None, None]:
        """See :class:`busigen.runtime.dataset.format.Stream`; raises what :meth:`draw` does."""
        reasons: Counter[str] = Counter()
        warned = False

        def refused(rejection: Rejection) -> None:
            nonlocal warned
            reasons[rejection.reason] += 1
            if rejection.attempt + 1 == MANY_ATTEMPTS and not warned:
                warned = True
                log.warning(
                    "sample %d was refused %d times, last for: %s. Drawing goes on, %d times at most, and takes longer",
                    *(rejection.index, MANY_ATTEMPTS, rejection.reason, MAX_ATTEMPTS),
                )
            if rejection.attempt + 1 >= MAX_ATTEMPTS:
                mask = self.plan.mask(rejection.index)
                given = f" Its mask is {mask.file}." if mask else ""
                asked = self.plan.asked or self.plan.lesions
                less = ", or take this mask out" if mask else ", or ask for less" if asked else ""
                raise AcceptanceError(
                    f"sample {rejection.index} was refused {MAX_ATTEMPTS} times, last for: {rejection.reason}.{given}",
                    fix=f"Use another bundle or other healthy images{less}. "
                    f"Refused so far: {', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}.",
                )

        window = max(self.batch_size * WINDOW_BATCHES, 2 * self.plan.group)
        options: dict[str, Any] = {"window": window, "done": done, "refused": refused, "stopping": stopping}
        with self._stages(seed) as stages:
            answers = of_whole_groups(
                requests, self.plan.group, lambda whole: in_order(stages, whole, **options, group=self.plan.group)
            )
            with closing(answers):
                for generated in answers:
                    # Checked before each shard is written, so that no shard names files that are gone.
                    self.plan.refuse_changes()
                    yield generated

    def attempt(self, seed: int, jobs: Sequence[tuple[int, int]]) -> tuple[list[Sample], list[Rejection]]:
        """Make one draw per (index, attempt), and return those that the gates accept and those that they refuse."""
        ended: dict[int, Sample | Rejection] = {}
        with self._stages(seed) as stages:
            for position, (index, attempt) in enumerate(jobs):
                stages.put(DrawRequest(index=index, attempt=attempt, position=position))
            while len(ended) < len(jobs):
                for item, outcome in stages.finished():
                    if isinstance(outcome, Draft):
                        stages.put(outcome)
                    else:
                        ended[item.position] = outcome
        outcomes = [ended[position] for position in sorted(ended)]
        accepted = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
        return accepted, [outcome for outcome in outcomes if isinstance(outcome, Rejection)]

    def background(self, seed: int, index: int, attempt: int) -> NDArray[np.uint8]:
        """The synthetic background of a draw, ``(256, 256)``, as sharp as its pair: equal outside the edit region."""
        draw = DrawRequest(index=index, attempt=attempt)
        (healthy,) = self._backgrounds(seed, [draw])
        if self._transfer is None:
            return healthy.pixels
        same = healthy.pixels, healthy.pixels, healthy.valid, healthy.valid
        return apply_to_pair(*same, self._filters(self._transfer, seed, draw))

    def _stages(self, seed: int) -> BatchScheduler:
        steps = {BEGIN: self._begin, OUTLINE: self._outline, PAINT: self._paint}

        def size(kind: Kind) -> int:
            # Where whole images are synthesised, the prior's batch is theirs.
            whole = kind.stage == BEGIN and self.plan.healthy is None
            return self.graphs.whole_rows if whole else self.graphs.rows(kind.side)

        return BatchScheduler(size, lambda batch: steps[batch[0].kind.stage](seed, batch))

    def _begin(self, seed: int, batch: Sequence[DrawRequest]) -> Sequence[Outcome]:
        if self.plan.healthy is not None:
            picked = [self.plan.picked(self.plan.healthy, seed, draw) for draw in batch]
        else:
            # Of a grid, several draws have the same one.
            draws = {(draw.seeded, draw.attempt): draw for draw in batch}
            found = dict(zip(draws, self._backgrounds(seed, list(draws.values())), strict=True))
            picked = [found[draw.seeded, draw.attempt] for draw in batch]
        if self.bundle.scanners:
            picked = [self._scanned(seed, draw, one) for draw, one in zip(batch, picked, strict=True)]
        drafts = [self.plan.draft(seed, job, picture) for job, picture in zip(batch, picked, strict=True)]
        # Those of a folder were judged when it was read.
        backgrounds = [] if self.plan.healthy is not None else [draft.healthy.pixels for draft in drafts]
        reasons = [quality_gates.background_reason(pixels) for pixels in backgrounds] or [None] * len(drafts)
        begun = [d.refused(reason) if reason else d for d, reason in zip(drafts, reasons, strict=True)]
        return [self._on_its_way(seed, one) if isinstance(one, Draft) else one for one in begun]

    def _scanned(self, seed: int, draw: DrawRequest, picture: Healthy) -> Healthy:
        found = self.plan.painted_as(seed, draw, self.bundle.scanners)
        return replace(picture, row={**picture.row, "scanner": found})

    def _on_its_way(self, seed: int, draft: Draft) -> Outcome:
        """What becomes of a draft whose background is fit: to the next stage with a lesion, finished without one."""
        if draft.label == NORMAL:
            return self._normal(seed, draft)
        return self.plan.with_given(seed, draft, tuple(self.bundle.windows))

    def _normal(self, seed: int, draft: Draft) -> Sample:
        """The sample without a lesion; its background is all there is, filtered as if there were one."""
        empty = np.zeros_like(draft.healthy.valid)
        image = self._shown(seed, replace(draft, edit=empty), draft.healthy.pixels)
        types = self.row_types()
        empty_row = dict.fromkeys(name for name in types if name not in picture_columns(types))
        none = several.numbered_row(draft.most_lesions, (), ())
        row = {**empty_row, **draft.healthy.row, "edit_pixels": 0, **none}
        return Sample(draft.index, draft.attempt, NORMAL, image, empty, row, draft.healthy.tissue)

    def _backgrounds(self, seed: int, batch: Sequence[DrawRequest]) -> list[Healthy]:
        scanners = [self.plan.scanner_of(seed, draw, self.bundle.scanners) for draw in batch]
        shapes = [self.bundle.frames(scanner) for scanner in scanners]
        frames = [
            # A mask's own frame, in which all of it lies where it does in its image.
            mask.frame
            if (mask := self.plan.mask(d.index))
            else some[int(uniform(seed, d.seeded, d.attempt, "frame") * len(some))]
            for d, some in zip(batch, shapes, strict=True)
        ]
        places = [place_of(frame) for frame in frames]
        phantoms = self._phantoms_of(seed, batch, frames, scanners)
        starts = [filled(found.image, place) for found, place in zip(phantoms, places, strict=False)]
        pictures = self.graphs.backgrounds(seed, batch, places, scanners, starts)
        made = [synthetic(picture, frame) for picture, frame in zip(pictures, frames, strict=True)]
        if not phantoms:
            return made
        return [with_tissue(one, found, self.tissue.maps) for one, found in zip(made, phantoms, strict=True)]

    def _phantoms_of(
        self,
        seed: int,
        batch: Sequence[DrawRequest],
        frames: Sequence[tuple[int, int]],
        scanners: Sequence[str | None],
    ) -> list[Phantom]:
        """The phantoms that backgrounds begin with; none where they begin with noise alone."""
        if self._phantoms is None:
            return []
        return [
            phantom_at(self._phantoms.of(scanner), seed, draw.seeded, draw.attempt, frame, self.tissue)
            for draw, frame, scanner in zip(batch, frames, scanners, strict=True)
        ]

    def _outline(self, seed: int, batch: Sequence[DrawRequest]) -> Sequence[Outcome]:
        drafts = [draft for draft in batch if isinstance(draft, Draft)]
        asked = np.stack([self.plan.asked.vector(d.wanted, d.birads, d.healthy.valid) for d in drafts])
        outcomes: list[Outcome] = []
        for draft, raw in zip(drafts, self.graphs.outlines(seed, drafts, asked), strict=True):
            valid = draft.healthy.valid
            mask = largest_component(raw & valid)
            reason = quality_gates.mask_reason(raw, mask, valid) or quality_gates.asked_reason(
                measured(mask, valid), draft.wanted
            )
            outlined = draft if reason else draft.with_mask(mask, tuple(self.bundle.windows))
            reason = reason or quality_gates.near_reason(
                [one.edit for one in outlined.all_lesions if one.edit is not None]
            )
            most = self.bundle.outlines
            outcomes.append(self.plan.after_refusal(seed, draft, reason, most) if reason else outlined)
        return outcomes

    def _paint(self, seed: int, batch: Sequence[DrawRequest]) -> Sequence[Outcome]:
        drafts = [draft for draft in batch if isinstance(draft, Draft)]
        outcomes: list[Outcome] = []
        for draft, image in zip(drafts, self.graphs.images(seed, drafts), strict=True):
            picture = self._shown(seed, draft, image)
            masks = [one.mask for one in draft.all_lesions if one.mask is not None]
            reasons = [quality_gates.image_reason(picture, mask, draft.healthy.valid) for mask in masks]
            if reason := next(filter(None, reasons), None):
                outcomes.append(draft.refused(reason))
            elif len(masks) < draft.lesions:
                outcomes.append(self.plan.next_lesion(seed, draft, image))
            else:
                outcomes.append(draft.sample(picture))
        return outcomes

    def _shown(self, seed: int, draft: Draft, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image through a filter of its own, which makes it as sharp as some scanner would."""
        # A user's image keeps its own sharpness, and so does the lesion in it.
        if self._transfer is None or draft.healthy.row["background"] != SYNTHETIC:
            return image
        edit = np.logical_or.reduce([one.edit for one in draft.all_lesions if one.edit is not None])
        filters = self._filters(self._transfer, seed, draft)
        return apply_to_pair(image, draft.healthy.pixels, edit, draft.healthy.valid, filters)

    def _filters(self, transfer: Transfer, seed: int, draw: DrawRequest) -> Kernels:
        # One for the whole image, whichever of its lesions this is.
        own = transfer.of(self.plan.scanner_of(seed, draw, self.bundle.scanners))
        return own.kernels(normal(seed, draw.seeded, draw.attempt, "transfer", own.factor.shape[1:]))
