"""What is trained, in which order and for how long: one declarative table per preset, no script per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from busigen.errors import UsageError
from busigen.registry import LESION_CLASSES, PAINTING, PRESETS, STABLE_DIFFUSION, STAGES, Preset

LEARN_FROM_HEALED = ("mask", "prior")  # Components that are trained on healed images.


@dataclass(frozen=True)
class TaskSpec:
    """One step of a recipe.

    ``kind`` names the task class (:data:`busigen.training.pipeline.KINDS`), ``start`` the component whose weights it
    begins with, ``label`` an adapter's class. ``variants`` counts encodings per image, ``batch`` 128-pixel windows (or
    images). ``keep`` says which weights stay: the ``best`` on held-out images, or, with critics, the ``last``.
    """

    name: str
    kind: str
    component: str
    steps: int
    batch: int
    lr: float
    start: str | None = None
    label: str | None = None
    variants: int = 1
    schedule: str = "cosine"
    warmup: int = 100
    ema: float = 0.999
    weight_decay: float = 1e-2
    clip: float = 1.0
    sources: tuple[str, ...] = ()
    keep: Literal["best", "last"] = "best"


@dataclass(frozen=True)
class LoraSpec:
    """The adapters: rank, alpha and the modules they attach to."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2")


@dataclass(frozen=True)
class Recipe:
    """A preset's whole training run, with ``heal_variants`` of each image and at most ``max_images`` of a split."""

    preset: str
    seed: int
    tasks: tuple[TaskSpec, ...]
    lora: LoraSpec = LoraSpec()
    heal_variants: int = 1
    max_images: int | None = None

    @property
    def sizes(self) -> Preset:
        """The preset's network sizes."""
        return PRESETS[self.preset]

    def kind_of(self, component: str) -> str:
        """The kind of task by which the preset trains a component, even if this recipe does not train it."""
        return next(task.kind for task in _RECIPES[self.preset](self.seed).tasks if task.name == component)

    def to_dict(self) -> dict[str, Any]:
        """A copy for JSON."""
        return asdict(self)


def _contested(name: str, **options: Any) -> TaskSpec:
    """A task of the decoder against critics."""
    return TaskSpec(name, name, "autoencoder", start="autoencoder", keep="last", **options)


def _adapters(steps: int, batch: int, variants: Mapping[str, int]) -> Iterator[TaskSpec]:
    """Every stage's adapters, with as many ``variants`` as its base, whose encoded examples they share."""
    adapter = TaskSpec("", "adapter", "", steps, batch, lr=1e-3, schedule="constant_with_warmup", warmup=10, ema=0.99)
    for stage, label in product(STAGES, LESION_CLASSES):
        name = f"{stage}-{label}"
        # Stages that are told the scanner learn a class from all hospitals; outlines are of the paper's own set.
        sources = () if stage in PAINTING else ("busi",)
        yield replace(adapter, name=name, component=stage, label=label, variants=variants[stage], sources=sources)


def _compact() -> tuple[TaskSpec, ...]:
    """Sized for minutes of a large GPU; a CPU run scales the steps down (``--scale``)."""
    return (
        TaskSpec("autoencoder", "autoencoder", "autoencoder", steps=40_000, batch=8, lr=1.5e-3, ema=0.995),
        _contested("decoder", steps=10_000, batch=8, lr=3e-4),
        TaskSpec("context", "context", "context", steps=6_000, batch=32, lr=1e-3, ema=0.995),
        TaskSpec("lesion", "window", "lesion", steps=30_000, batch=32, lr=1e-3, variants=4),
        TaskSpec("heal", "heal", "lesion", steps=0, batch=16, lr=0.0),
        TaskSpec("mask", "mask", "mask", steps=30_000, batch=128, lr=1e-3, variants=2),
        TaskSpec("blend", "window", "blend", steps=8_000, batch=32, lr=1e-3, variants=4, start="lesion"),
        TaskSpec("prior", "background", "prior", steps=38_000, batch=24, lr=1e-3, variants=4),
        *_adapters(steps=800, batch=32, variants={"mask": 2, "lesion": 4, "blend": 4}),
        _contested("finish", steps=12_000, batch=4, lr=2e-4, variants=2),
    )


def _tiny() -> tuple[TaskSpec, ...]:
    return (
        TaskSpec("autoencoder", "autoencoder", "autoencoder", steps=200, batch=8, lr=3e-3, warmup=20, ema=0.98),
        _contested("decoder", steps=40, batch=8, lr=3e-4, ema=0.9),
        TaskSpec("context", "context", "context", steps=60, batch=8, lr=2e-3, warmup=10, ema=0.95),
        TaskSpec("lesion", "window", "lesion", steps=150, batch=16, lr=2e-3, warmup=20, ema=0.98),
        TaskSpec("heal", "heal", "lesion", steps=0, batch=16, lr=0.0),
        TaskSpec("mask", "mask", "mask", steps=200, batch=16, lr=2e-3, warmup=20, ema=0.98),
        TaskSpec("blend", "window", "blend", steps=80, batch=16, lr=2e-3, warmup=20, ema=0.98, start="lesion"),
        TaskSpec("prior", "background", "prior", steps=150, batch=16, lr=2e-3, warmup=20, ema=0.98),
        *_adapters(steps=20, batch=16, variants=dict.fromkeys(STAGES, 1)),
        _contested("finish", steps=10, batch=2, lr=2e-4, ema=0.9),
    )


# Wen et al. 2026: LoRA on attention alone, AdamW with 1e-4, batch 8, a cosine after 500 steps of warm-up.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _stable_diffusion() -> tuple[TaskSpec, ...]:
    adapter = TaskSpec("", "painting", "", steps=2_000, batch=8, lr=1e-4, warmup=500, variants=2, ema=0.99)
    adapters = (
        replace(adapter, name=f"{stage}-{label}", component=stage, label=label)
        for stage, label in product(PAINTING, LESION_CLASSES)
    )
    # On the windows that the adapters learnt from, which are encoded already.
    decoder = TaskSpec("decoder", "speckle", "decoder", steps=20_000, batch=8, lr=1e-3, variants=2, keep="last")
    return (*adapters, decoder)


_RECIPES: dict[str, Callable[[int], Recipe]] = {
    STABLE_DIFFUSION: lambda seed: Recipe(
        STABLE_DIFFUSION, seed, _stable_diffusion(), LoraSpec(rank=8, alpha=16, targets=_ATTENTION)
    ),
    "compact": lambda seed: Recipe("compact", seed, _compact()),
    "tiny": lambda seed: Recipe("tiny", seed, _tiny(), max_images=160),
}


def recipe_for(preset: str, *, seed: int = 0, scale: float = 1.0) -> Recipe:
    """The recipe of a preset; a UsageError if it is unknown.

    ``scale``, above 0, is a factor on every task's steps, of which at least 2 remain; warm-ups are a tenth of them.
    """
    if preset not in _RECIPES:
        raise UsageError(f"unknown preset {preset!r}.", fix=f"Choose one of: {', '.join(sorted(_RECIPES))}.")
    if not scale > 0:
        raise UsageError(f"--scale must be above 0, not {scale}.", fix="1 is the whole recipe, 0.05 a twentieth of it.")
    recipe = _RECIPES[preset](seed)
    tasks = []
    for task in recipe.tasks:
        steps = max(2, round(task.steps * scale)) if task.steps else 0
        warmup = min(task.warmup, max(1, steps // 10)) if task.steps else task.warmup
        tasks.append(replace(task, steps=steps, warmup=warmup))
    return replace(recipe, tasks=tuple(tasks))
