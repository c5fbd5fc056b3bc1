"""The checkpoint's networks as the reference that graphs are held against, and what they were asked and answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from busigen.data.geometry import Mask, largest_component
from busigen.registry import RESOLUTION
from busigen.runtime import gates
from busigen.runtime.backend import Backend
from busigen.runtime.bundle import Bundle
from busigen.runtime.drafts import Draft
from busigen.runtime.sampler import Sampler
from busigen.training.models import region_condition
from busigen.training.networks import Networks, blend_input, window_condition

BATCH = 16
"""Draws that are computed together."""

ROWS = 16
"""Rows per graph that are kept of what the reference was asked: as many as one batch of small windows."""


class TorchBackend:
    """The checkpoint's networks behind the runtime's interface: the reference that a bundle is held against."""

    name = "torch"
    version = str(torch.__version__)

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    @torch.no_grad()
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backend.Backend`."""
        component = graph.partition("@")[0]
        values = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        result: NDArray[np.float32] = self._evaluate(component, values).numpy()
        return result

    def _evaluate(self, component: str, v: dict[str, Tensor]) -> Tensor:
        networks = self._networks
        if component == "context":
            return networks.tokens(v["image"], v["keep"])
        if component == "encoder":
            return networks.encoder(v["pixels"])
        if component == "decoder":
            return networks.decoder(v["latents"], v["noise"], v["mask"])
        if component == "prior":
            return networks.background(v["noise"], v["frame"])
        stage, _, label = component.partition("-")
        context = (v["tokens"], v["keep"])
        if stage == "mask":
            return networks.outline(v["noise"], label, *context, v["asked"])
        if stage == "lesion":
            condition = window_condition(v["known"], v["mask"], v["edit"])
        else:
            edit, ring = region_condition(v["edit"]), region_condition(v["ring"])
            condition = window_condition(blend_input(v["known"], v["painted"], edit, ring), v["mask"], v["ring"])
        return networks.sample(stage, v["noise"], label, *context, *condition)


@dataclass
class Asked:
    """Some of what one graph was asked, and what the reference answered."""

    inputs: dict[str, NDArray[Any]]
    output: NDArray[np.float32]


class Recorder:
    """A backend that keeps up to ``ROWS`` rows of what each graph was asked, those that fill up a batch among them."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.version, self.backend = backend.name, backend.version, backend
        self.asked: dict[str, list[Asked]] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backend.Backend`."""
        output = self.backend.run(graph, inputs)
        kept = self.asked.setdefault(graph, [])
        room = ROWS - sum(len(found.output) for found in kept)
        if room > 0:
            kept.append(Asked({name: value[:room].copy() for name, value in inputs.items()}, output[:room].copy()))
        return output


class Witness(Sampler):
    """The runtime's sampler, with every draw carried to its end and what it made on the way kept.

    A draw whose outline the gates refuse would leave stages 2 and 3 unproved, so it is painted with a fixed ellipse;
    so are two draws in eight, because a model may draw lesions of one window size alone.

    With ``forced`` outlines, all draws are painted with those instead of their own.
    """

    def __init__(self, bundle: Bundle, backend: Backend, label: str, forced: Mapping[int, Mask] | None = None) -> None:
        super().__init__(bundle, backend, classes={label: 1.0}, batch_size=BATCH)
        self.forced = forced or {}
        self.painted: dict[int, Mask] = {}
        self.outlines: dict[int, Mask] = {}
        self.images: dict[int, NDArray[np.uint8]] = {}
        self.edits: dict[int, Mask] = {}
        self.refused: dict[int, str | None] = {}

    def _outlines(self, seed: int, batch: Sequence[Draft]) -> list[Mask]:
        for draft, raw in zip(batch, super()._outlines(seed, batch), strict=True):
            valid = draft.healthy.valid
            self.outlines[draft.index] = raw
            self.refused[draft.index] = gates.mask_reason(raw, largest_component(raw & valid), valid)
            drawn = self.refused[draft.index] is None and draft.index % 8 < 6
            own = raw if drawn else _ellipse(draft.index)
            self.painted[draft.index] = self.forced.get(draft.index, own)
        return [self.painted[draft.index] for draft in batch]

    def _images(self, seed: int, batch: Sequence[Draft]) -> list[NDArray[np.uint8]]:
        images = super()._images(seed, batch)
        for draft, image in zip(batch, images, strict=True):
            assert draft.mask is not None and draft.edit is not None
            self.images[draft.index], self.edits[draft.index] = image, draft.edit
            reason = gates.image_reason(image, draft.mask, draft.healthy.valid)
            self.refused[draft.index] = self.refused[draft.index] or reason
        return images


def _ellipse(index: int) -> Mask:
    """A lesion-sized ellipse, small for even and large for odd indices, so that both windows are proved."""
    rows, columns = np.ogrid[:RESOLUTION, :RESOLUTION]
    height, width = (18, 26) if index % 2 == 0 else (45, 60)
    result: Mask = ((rows - 110) / height) ** 2 + ((columns - 128) / width) ** 2 <= 1.0
    return result
