"""The one place where classes, components, stages, presets, solver steps and geometry are named.

The command line, training, export and runtime all read this module, so it imports neither torch nor onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RESOLUTION = 256
"""Side of the square, letterboxed working image in pixels."""

CLASSES = ("normal", "benign", "malignant")
"""Every image class. A class's position is its label index in the denoisers' class embedding."""

LESION_CLASSES = ("benign", "malignant")
"""The classes that get a LoRA adapter and that ``generate --classes`` accepts."""

SYNTHETIC = "synthetic"
"""The value of ``generate --healthy`` that asks for synthetic backgrounds."""

STAGES = ("mask", "lesion", "blend")
"""The three denoising stages, in sampling order."""

BUCKETS = (128, 256)
"""Window sides in pixels, smallest first. Every sample uses the smallest one that holds its edit region."""

BUCKET_CONTEXT = 8
"""Pixels of untouched surroundings that a window keeps on each side of the edit region, where the image allows."""

LATENT_FACTOR = 8
"""Pixels per latent cell and axis."""

MASK_GRID = 64
"""Side of the grid on which stage 1 predicts the signed distance to the lesion's outline."""

MASK_CHANNELS = 4
"""Channels of a stage-1 sample and of a pixel-unshuffled mask condition: 2 x 2 grid points per cell."""

SDF_LIMIT = 24.0
"""The signed distance in pixels at which stage 1's target saturates; it is stored divided by this."""

SPLITS = {"train": 0.75, "val": 0.10, "test": 0.15}
"""Split names and the share of groups that each one gets."""


@dataclass(frozen=True)
class UNetShape:
    """Size of one denoiser (a diffusers ``UNet2DConditionModel``)."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int = 1
    head_dim: int = 32
    groups: int = 16


_TINY = UNetShape(channels=(16, 32), attention=(False, True), head_dim=16, groups=8)


@dataclass(frozen=True)
class Preset:
    """The sizes of every network. ``patch`` and window sides are pixels; the rest are channel or layer counts."""

    name: str
    about: str
    latent_channels: int
    encoder_channels: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    patch: int
    context_dim: int
    context_layers: int
    context_heads: int
    denoisers: dict[str, UNetShape] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of context tokens per image."""
        return (RESOLUTION // self.patch) ** 2


PRESETS = {
    "compact": Preset(
        name="compact",
        about="trained from scratch; the shipped default",
        latent_channels=8,
        encoder_channels=(32, 32, 64, 128),
        encoder_layers=(0, 1, 1, 2),
        decoder_channels=(16, 32, 64, 128),
        decoder_layers=(1, 1, 1, 2),
        patch=16,
        context_dim=128,
        context_layers=4,
        context_heads=4,
        denoisers={
            "mask": UNetShape(channels=(32, 64, 96), attention=(False, True, True)),
            "lesion": UNetShape(channels=(48, 80, 128), attention=(False, True, True)),
            "blend": UNetShape(channels=(32, 64, 96), attention=(False, True, True)),
            # No cross-attention above the middle: the prior has no context to look at, and 32 x 32 cells are dear.
            "prior": UNetShape(channels=(32, 64, 128, 160), attention=(False, False, False, False)),
        },
    ),
    "tiny": Preset(
        name="tiny",
        about="compact shrunk until a whole run takes minutes on two cores; for tests and trials, not for use",
        latent_channels=4,
        encoder_channels=(8, 8, 16, 16),
        encoder_layers=(0, 1, 1, 1),
        decoder_channels=(8, 8, 16, 16),
        decoder_layers=(0, 1, 1, 1),
        patch=32,
        context_dim=32,
        context_layers=1,
        context_heads=2,
        denoisers={name: _TINY for name in ("mask", "lesion", "blend", "prior")},
    ),
}

SOLVER_STEPS = {"mask": 8, "lesion": 6, "blend": 3, "prior": 10}
"""Network evaluations per denoiser. Fixed at export."""

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
"""Command-line provider names and ONNX Runtime's names for them."""
