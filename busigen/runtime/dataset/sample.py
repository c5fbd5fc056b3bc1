"""Samples, and the protocols of the sources that draw them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from busigen.records import Text, Whole


@dataclass(frozen=True)
class Sample:
    """One accepted sample: a grey image and the lesion's mask, both (256, 256)."""

    index: int  # position in the dataset, from 0
    attempt: int  # draws that the quality gates refused for this index before this one
    label: str  # one of registry.LESION_CLASSES
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    row: dict[str, Any]  # further manifest fields: JSON-able scalars under the same keys in every sample of a source


@dataclass(frozen=True)
class Rejection:
    """One draw that a quality gate refused, and the gate's reason."""

    index: Whole
    attempt: Whole
    label: Text
    reason: Text


@dataclass(frozen=True)
class SampleBatch:
    """The samples of one request, one per index, in index order, and every refused draw on the way to them."""

    samples: list[Sample]
    rejections: list[Rejection]


class Source(Protocol):
    """A source of samples, which must be a pure function of its fingerprint, the seed and the index."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which samples exist, nested and JSON-able (bundle, healthy images, classes)."""
        ...

    def options(self) -> Mapping[str, str | None]:
        """Names, never paths, of the folders that options gave, for people; None where the default was taken."""
        ...

    def row_types(self) -> Mapping[str, type]:
        """Type (``str``, ``int``, ``float`` or ``bool``) of each field of ``Sample.row``; any field may hold None.

        Declared, so that a shard whose column is all None gets the same table schema as its neighbours.
        """
        ...

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        """Draw one accepted sample per index; call ``done(n)`` whenever ``n`` more samples have been accepted."""
        ...


@runtime_checkable
class Stream(Source, Protocol):
    """A source that draws ahead of the oldest request, so that its batches fill across shards."""

    def stream(
        self, seed: int, requests: Iterable[Sequence[int]], done: Callable[[int], None], stopping: Callable[[], bool]
    ) -> Generator[SampleBatch, None, None]:
        """Yield the samples of one request after the other, each as :meth:`Source.draw` would return them.

        Args:
            seed: of the noise.
            requests: indices; read no further ahead than batches need. An empty request says that there is none for
                now; it may come only while another one is unanswered, and the next one is read later.
            done: called with the number of newly accepted samples, of any request.
            stopping: returns whether to end with the oldest request that has been begun.
        """
        ...


def batches_of(
    source: Source,
    seed: int,
    requests: Iterable[Sequence[int]],
    done: Callable[[int], None],
    stopping: Callable[[], bool],
) -> Generator[SampleBatch, None, None]:
    """A source's samples for one request after the other; a :class:`Stream` draws ahead, other sources do not."""
    if isinstance(source, Stream):
        yield from source.stream(seed, requests, done, stopping)
    else:
        yield from (source.draw(seed, indices, done) for indices in requests if len(indices))
