"""Stage 1's examples: codes of outlines beside the tokens of healed images, and what of them the network is told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from busigen.data.geometry import Mask
from busigen.registry import ATTRIBUTES, CLASSES
from busigen.training.examples import ENCODE_BATCH, Frame, Frames, Progress, joined, random_lesion, to_tensor
from busigen.training.networks import Networks
from busigen.training.outline_space import OutlineSpace, birads_flags

ASKING_SHARE, ATTRIBUTE_SHARE, BIRADS_SHARE = 0.5, 0.3, 0.5
"""Share of draws in which anything is asked for, and then of each attribute; share of known BI-RADS that is shown."""

COUNT = len(ATTRIBUTES)


def lesions(frames: Frames, seed: int) -> list[Mask]:
    """One lesion of each image that has any: what the outline space is fitted on."""
    rows = [k for k in range(len(frames)) if frames.table["class"][k] != "normal"]
    return [random_lesion(frames[k], np.random.default_rng((seed, k))) for k in rows]


@torch.no_grad()
def outline_examples(
    frames: Frames,
    healed: Callable[[int, int], NDArray[np.uint8]],
    space: OutlineSpace,
    *,
    networks: Networks,
    variants: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """Encode stage 1's examples.

    ``healed(row, variant)`` returns the image without its lesion and with decoy edits (:mod:`busigen.training.heal`).
    Half of the variants fill the frame, because synthetic backgrounds have no letterbox bars.

    Returns:
        ``clean`` ``(N, D)`` fp32 codes, ``birads`` ``(N, 4)`` bool, ``tokens`` ``(N, T, C)`` fp16, ``keep`` ``(N, T)``
        bool, ``weight`` ``(N, 1)``, ``label`` and ``row`` ``(N,)``; nothing at all where no row has a lesion.
    """
    parts: list[dict[str, Tensor]] = []
    rows = [k for k in range(len(frames)) if frames.table["class"][k] != "normal"]
    jobs = [(position, variant) for position in rows for variant in range(variants)]
    for start in range(0, len(jobs), ENCODE_BATCH):
        part = jobs[start : start + ENCODE_BATCH]
        chosen = [_varied(frames, position, variant, healed, seed) for position, variant in part]
        images = torch.stack([to_tensor(frame.image) for frame in chosen]).to(device)
        keep = torch.ones(len(chosen), networks.preset.tokens, device=device)
        parts.append(
            {
                "clean": space.encode([frame.lesions > 0 for frame in chosen]).cpu(),
                "birads": torch.from_numpy(birads_flags([frames.table["birads"][position] for position, _ in part])),
                "tokens": networks.tokens(images, keep).half().cpu(),
                "keep": keep.bool().cpu(),
                "weight": torch.ones(len(chosen), 1),
                "label": torch.tensor([CLASSES.index(frame.label) for frame in chosen]),
                "row": torch.tensor([int(frames.table["row"][position]) for position, _ in part]),
            }
        )
        progress(min(start + ENCODE_BATCH, len(jobs)), len(jobs))
    return joined(parts) if parts else {}


def _varied(
    frames: Frames, position: int, variant: int, healed: Callable[[int, int], NDArray[np.uint8]], seed: int
) -> Frame:
    """One healed image with one of its lesions, under another gain, flip and cut per variant."""
    row = int(frames.table["row"][position])
    rng = np.random.default_rng((seed, row, variant, 1))
    frame = frames[position]
    # One lesion is drawn before the geometry changes, so that the others do not become targets half way.
    lesion = random_lesion(frame, rng).astype(np.uint8)
    frame = Frame(healed(row, variant), lesion, frame.overlay, frame.valid, frame.label).with_gain(rng)
    frame = frame.flipped() if rng.random() < 0.5 else frame
    return frame.filling(rng) if rng.random() < 0.5 else frame


def random_asking(code: Tensor, birads: Tensor, generator: Generator) -> Tensor:
    """What a training step tells the network of the answer, as stage 1's condition.

    Args:
        code: ``(B, D)``, standardised.
        birads: ``(B, 4)`` one-hot or all zero.
        generator: draws which attributes are given.

    Returns:
        ``(B, ASKED_LENGTH)`` as :meth:`OutlineSpace.condition` gives it.
    """
    size = code.shape[0]
    anything = torch.rand(size, 1, generator=generator) < ASKING_SHARE
    flags = (anything & (torch.rand(size, COUNT, generator=generator) < ATTRIBUTE_SHARE)).to(code)
    shown = (torch.rand(size, 1, generator=generator) < BIRADS_SHARE).to(code)
    return torch.cat((code[:, :COUNT] * flags, flags, birads * shown), dim=1)
