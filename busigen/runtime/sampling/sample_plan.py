"""What a sample is before anything of it is drawn: its class, what is asked of its lesion, its background, its mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask
from busigen.errors import UsageError
from busigen.registry import ATTRIBUTES, LESION_CLASSES, MAX_OUTLINES, NORMAL, SYNTHETIC
from busigen.runtime.dataset.format import Rejection
from busigen.runtime.sampling import quality_gates
from busigen.runtime.sampling.batching import Draft, DrawRequest
from busigen.runtime.sampling.conditions import SampleConditions, dealt, mix_text
from busigen.runtime.sampling.grid import Grid
from busigen.runtime.sampling.inputs.given_masks import GivenMask, MaskFolder
from busigen.runtime.sampling.inputs.healthy_images import Healthy, HealthyFolder
from busigen.runtime.sampling.inputs.placement import Placement, moved_inside, place
from busigen.runtime.sampling.noise import uniform, uniforms
from busigen.runtime.sampling.several import FURTHER, PLACE_DRAWS, free_place
from busigen.text import printable

ANY, MIX = "any", "mix"  # what can be asked for instead of a scanner's name
_PHASE = 617  # a prime, whose multiples for eight kinds differ in their last digit
PROBED_IMAGES = 64  # healthy images that are tried, one after the other, for one that holds a given mask where it lies


@dataclass
class SamplePlan:
    """What a user asked for, dealt out to samples by their index. For its fields, see `sampler.Sampler`."""

    classes: Mapping[str, float]
    healthy: HealthyFolder | None = None
    asked: SampleConditions = field(default_factory=SampleConditions)
    masks: MaskFolder | None = None
    jitter: float = 0.0
    grid: Grid | None = None
    normals: float = 0.0
    scanner: str | None = None
    lesions: Mapping[str, float] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Samples that share a background and their noise."""
        return len(self.grid.cells) if self.grid else 1

    @property
    def most_lesions(self) -> int:
        """Lesions of the samples with most of them; 0 where each has one and the manifest no columns of more."""
        return max(map(int, self.lesions), default=0)

    def fingerprint(self) -> dict[str, Any]:
        """Its part of :meth:`busigen.runtime.dataset.format.Source.fingerprint`."""
        return {
            "classes": dict(self.classes),
            "healthy": self.healthy.fingerprint() if self.healthy else SYNTHETIC,
            **({"masks": self.masks.fingerprint(self.healthy)} if self.masks else {}),
            **({"jitter": self.jitter} if self.jitter else {}),
            **({"vary": self.grid.vary, "cells": self.group} if self.grid else {}),
            **({"normals": self.normals} if self.normals else {}),
            **({"scanner": self.scanner} if self.scanner else {}),
            **({"lesions": mix_text(self.lesions)} if self.lesions else {}),
            **self.asked.typed(),
        }

    def options(self) -> dict[str, str | None]:
        """Its part of :meth:`busigen.runtime.dataset.format.Source.options`."""
        return {
            "--healthy": self.healthy.folder.resolve().name if self.healthy else SYNTHETIC,
            **({"--frames": str(self.healthy.frames)} if self.healthy and self.healthy.frames > 1 else {}),
            **({"--masks": self.masks.folder.resolve().name} if self.masks else {}),
        }

    def refuse_scanner(self, known: Mapping[str, float]) -> None:
        """A UsageError for a scanner that is not among the ``known``, or a mixture of them in a user's images."""
        painted = self.grid.levels("scanner") if self.grid else ()
        asked = [("--scanner is", self.scanner, (*known, ANY, MIX))] if self.scanner else []
        asked += [("--vary scanner names", name, (*known, ANY)) for name in sorted(painted)]
        for option, name, names in asked:
            if not known or name not in names:
                said = f"these: {', '.join(names)}" if known else "no scanners"
                raise UsageError(
                    f"{option} {printable(name)!r}, and the bundle knows {said}.",
                    fix="Give one of them." if known else "Leave it out, or give another --bundle.",
                )

    def scanner_of(self, seed: int, draw: DrawRequest, known: Mapping[str, float]) -> str | None:
        """The scanner of a draw; None for any. Unless one is asked for, backgrounds have the training images' mixture.

        A user's image shows what it was made with, and is of any.
        """
        asked = self.scanner or (ANY if self.healthy else MIX)
        if asked != MIX:
            return asked if asked in known else None
        # Of all attempts the same, so that what the gates refuse does not change the mixture.
        at = uniform(seed, draw.seeded, 0, "scanner")
        return next((name for name, end in zip(known, accumulate(known.values()), strict=True) if at < end), None)

    def painted_as(self, seed: int, draw: DrawRequest, known: Mapping[str, float]) -> str | None:
        """The scanner that a draw's lesion is painted as: its background's, unless a grid varies it."""
        own = self.grid.cell(draw.index).get("scanner") if self.grid else None
        return self.scanner_of(seed, draw, known) if own is None else own if own in known else None

    def refuse_changes(self) -> None:
        """An IntegrityError if a file of the user's folders is gone or another one."""
        for folder in (self.healthy, self.masks):
            if folder is not None:
                folder.refuse_changes()

    def _turn(self, index: int) -> tuple[bool, int]:
        """Whether a sample has a lesion, and how many that are like it in that came before; of a grid, backgrounds."""
        if not self.normals:
            return True, index // self.group
        share = Fraction(str(self.normals))
        kind, number = dealt(index, {"lesion": 1 - share, NORMAL: share})
        return kind != NORMAL, number

    def draft(self, seed: int, job: DrawRequest, picture: Healthy) -> Draft:
        """The draw on its background: whether it gets a lesion, of what class, and what is asked of that."""
        lesion, turn = self._turn(job.index)
        draft = Draft(
            index=job.index,
            attempt=job.attempt,
            position=job.position,
            label=NORMAL,
            healthy=picture,
            group=job.group,
            most_lesions=self.most_lesions,
        )
        if not lesion:
            return draft
        asked = self.grid.conditions(job.index, self.asked) if self.grid else self.asked
        own = self.grid.cell(job.index).get("class") if self.grid else None
        label, number = (own, turn) if own else dealt(turn, self.classes)
        # Dealt to each class and category by itself: with two halves of each, one would follow from the other.
        within = dealt(number, asked.birads)[1] if asked.birads else number
        return replace(
            draft,
            label=self.masks.label_at(turn, self.classes) if self.masks else label,
            given=self.grid.row(job.index) if self.grid else {},
            wanted=asked.values(seed, job.seeded, job.attempt if self.grid else 0),
            birads=asked.category(number),
            lesions=self._lesions(label, asked.category(number), within) if self.lesions else 1,
        )

    def _lesions(self, label: str, birads: str | None, within: int) -> int:
        """How many lesions the image gets that is this many'th of its class and category."""
        # Each class and category begins elsewhere: together, the first ones of all would have the rarest number.
        kind = 5 * LESION_CLASSES.index(label) + int(birads or 0)
        return int(dealt(_PHASE * kind + 4 + within, self.lesions)[0])

    def next_lesion(self, seed: int, draft: Draft, painted: NDArray[np.uint8]) -> Draft:
        """The draft on its way to its next lesion, which is painted into the image with those before it."""
        begun = replace(draft, earlier=draft.all_lesions, painted=painted, outlines=0)
        return self._further(seed, replace(begun, mask=None, edit=None, window=None))

    def after_refusal(self, seed: int, draft: Draft, reason: str, most: int) -> Draft | Rejection:
        """What becomes of a draft whose outline a gate refused: another one, ``most`` of a first lesion."""
        if draft.outlines + 1 >= (MAX_OUTLINES if draft.earlier else most):
            return draft.refused(reason)
        again = replace(draft, outlines=draft.outlines + 1)
        return self._further(seed, again) if draft.earlier else again

    def _further(self, seed: int, draft: Draft) -> Draft:
        """The draft with what is asked of its further lesion, at a place where the others leave room."""
        taken = [one.edit for one in draft.earlier if one.edit is not None]
        # Those before decide the values.
        count = len(ATTRIBUTES) + PLACE_DRAWS
        draws = uniforms(seed, draft.seeded, draft.attempt, "asked", count, draft.part)[len(ATTRIBUTES) :]
        asked = replace(self.asked, ranges={**FURTHER, **self.asked.ranges})
        at = free_place(draws, asked.ranges, taken, draft.healthy.valid)
        return replace(draft, wanted={**asked.values(seed, draft.seeded, part=draft.part), **at})

    def mask(self, index: int) -> GivenMask | None:
        """The user's mask of a sample; None where it has none."""
        lesion, turn = self._turn(index)
        return self.masks.at(turn) if self.masks and lesion else None

    def picked(self, healthy: HealthyFolder, seed: int, draw: DrawRequest) -> Healthy:
        """The healthy image of a draw: that which has its mask's name, else any, which holds the mask if one does.

        Without a lesion, all take turns.
        """
        lesion, turn = self._turn(draw.index)
        if not lesion:
            return healthy.numbered((int(uniform(seed, 0, 0, "normals") * len(healthy)) + turn) % len(healthy))
        mask = self.mask(draw.index)
        if self.masks and mask and (partner := self.masks.partner(mask, healthy)):
            return healthy.of(partner)
        first = int(uniform(seed, draw.seeded, draw.attempt, "healthy") * len(healthy))
        if self.grid and not draw.attempt:
            first = draw.seeded % len(healthy)  # In turn, so that its backgrounds are different ones.
        if self.masks:
            native, at = self._placed(self.masks, seed, draw)
            for number in range(first, first + min(len(healthy), PROBED_IMAGES)):
                found = healthy.numbered(number % len(healthy))
                if moved_inside(at, native, found.valid) == at:
                    return found
        return healthy.numbered(first)

    def with_given(self, seed: int, draft: Draft, sides: Sequence[int]) -> Draft | Rejection:
        """The draft with the user's mask, so that it need not wait for stage 1; without masks, as it is."""
        item = self.mask(draft.index)
        if self.masks is None or item is None:
            return draft
        native, at = self._placed(self.masks, seed, draft)
        at = moved_inside(at, native, draft.healthy.valid)
        mask = at.apply(native)
        if reason := quality_gates.given_reason(int(at.shape(native).sum()), mask, draft.healthy.valid):
            return draft.refused(reason)
        return replace(draft, given=item.row(at)).with_mask(mask, sides)

    def _placed(self, masks: MaskFolder, seed: int, draw: DrawRequest) -> tuple[Mask, Placement]:
        """A draw's mask as it was drawn, and where it goes in an image that holds it there."""
        _, turn = self._turn(draw.index)
        native = masks.native(turn)
        return native, place(native, self.jitter, uniforms(seed, draw.index, draw.attempt, "jitter", 4))
