"""How a checkpoint is exported."""

from __future__ import annotations

from dataclasses import dataclass

from busigen.errors import UsageError
from busigen.registry import ENGINE_TARGETS, LOOPS, OPSETS, PARITY_DRAWS, PRECISIONS

TARGETS = ("onnx",)
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Options:
    """How a checkpoint is exported.

    Attributes:
        target: a name in ``TARGETS``.
        precision: a name in ``registry.PRECISIONS``; components that fail in it get the next higher one.
        opset: one of ``registry.OPSETS``.
        loop: a name in ``registry.LOOPS``.
        batch_sizes: batches, 1 to ``LARGEST_BATCH``, that the bundle is made for: engines with static shapes are built
            for these. The ONNX graphs take any batch.
        draws: draws per class over which every target is compared with PyTorch.
        engines: names in ``registry.ENGINE_TARGETS``, on which the bundle is proved, too, where this machine can.

    Raises:
        UsageError: a value is not one of these.
    """

    target: str = "onnx"
    precision: str = next(iter(PRECISIONS))
    opset: int = OPSETS[0]
    loop: str = next(iter(LOOPS))
    batch_sizes: tuple[int, ...] = ()
    draws: int = PARITY_DRAWS
    engines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, allowed in (
            ("target", TARGETS),
            ("precision", tuple(PRECISIONS)),
            ("opset", OPSETS),
            ("loop", tuple(LOOPS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}.", fix=f"Choose one of: {', '.join(map(str, allowed))}.")
        for name in self.engines:
            if name not in ENGINE_TARGETS:
                raise UsageError(f"unknown target {name!r}.", fix=f"Choose from: onnx, {', '.join(ENGINE_TARGETS)}.")
        for size in self.batch_sizes:
            if not 1 <= size <= LARGEST_BATCH:
                raise UsageError(f"--batch-size {size}.", fix=f"Give whole numbers from 1 to {LARGEST_BATCH}.")
        if self.draws < 1:
            raise UsageError(f"--draws is {self.draws}.", fix="Give 1 or more.")


def batch_sizes(text: str | None) -> tuple[int, ...]:
    """Batches as a person lists them, ``4,16``; none where nothing is said.

    Raises:
        UsageError: a part is no whole number.
    """
    parts = [part.strip() for part in (text or "").split(",")] if text is not None else []
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise UsageError(f"--batch-size {text!r} holds {part!r}.", fix="Give whole numbers, such as 4,16.")
    return tuple(dict.fromkeys(map(int, parts)))
