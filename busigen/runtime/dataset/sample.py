"""What a source of samples hands to the factory, and what the factory asks of a source."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from busigen.records import Text, Whole


@dataclass(frozen=True)
class Sample:
    """One accepted sample.

    Attributes:
        index: position in the dataset, from 0.
        attempt: number of draws that the quality gates refused for this index before this one.
        label: one of ``registry.LESION_CLASSES``.
        image: (256, 256) uint8, grey.
        mask: (256, 256) bool, true on the lesion.
        row: further manifest fields; flat, JSON-able scalars under the same keys in every sample of a source.
    """

    index: int
    attempt: int
    label: str
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    row: dict[str, Any]


@dataclass(frozen=True)
class Rejection:
    """One draw that a quality gate refused, and the gate's reason."""

    index: Whole
    attempt: Whole
    label: Text
    reason: Text


@dataclass(frozen=True)
class SampleBatch:
    """The answer to one request: a sample per requested index, in index order, and every refused draw."""

    samples: list[Sample]
    rejections: list[Rejection]


class Source(Protocol):
    """What the factory drives. Samples must be a pure function of the fingerprint, the seed and the index."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which samples exist, nested and JSON-able (bundle, healthy images, classes)."""
        ...

    def options(self) -> Mapping[str, str | None]:
        """Names, never paths, of the folders that options gave, by option; None where the default was taken.

        Recorded for people to read. They decide nothing: the fingerprint holds what is in the folders.
        """
        ...

    def row_types(self) -> Mapping[str, type]:
        """Type (``str``, ``int``, ``float`` or ``bool``) of each field of ``Sample.row``; any field may hold None.

        Declared, never guessed from values: a shard whose column is all None, or whose floats all happen to be whole
        numbers, must get the same table schema as its neighbours.
        """
        ...

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        """Draw one accepted sample per index; call ``done(n)`` whenever ``n`` more samples have been accepted."""
        ...


@runtime_checkable
class Stream(Source, Protocol):
    """A source that draws ahead of what is asked for next, so that its batches fill across shards."""

    def stream(
        self,
        seed: int,
        requests: Iterable[Sequence[int]],
        done: Callable[[int], None],
        stopping: Callable[[], bool],
    ) -> Generator[SampleBatch, None, None]:
        """Answer requests one after the other, each as :meth:`Source.draw` would.

        Args:
            seed: of the noise.
            requests: indices; read no further ahead than batches need. An empty request says that there is none for
                now: only while another one is unanswered, and to be asked again.
            done: told whenever more samples have been accepted, of whichever request.
            stopping: whether to end with the oldest request that has been begun.
        """
        ...


def batches_of(
    source: Source,
    seed: int,
    requests: Iterable[Sequence[int]],
    done: Callable[[int], None],
    stopping: Callable[[], bool],
) -> Generator[SampleBatch, None, None]:
    """The answers of a source to one request after the other; drawn ahead by a source that can. See :class:`Stream`."""
    if isinstance(source, Stream):
        yield from source.stream(seed, requests, done, stopping)
    else:
        yield from (source.draw(seed, indices, done) for indices in requests if len(indices))
