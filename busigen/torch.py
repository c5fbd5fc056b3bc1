"""Pairs for PyTorch: by number from a dataset, or as a stream, from a dataset or straight from the engine.

A stream has one order for each epoch. Each rank takes every n-th pair of it, and DataLoader workers take blocks of
``block`` pairs of that share in turn. So nothing is repeated or left out, whatever number of ranks and workers there
are, and where a block is a batch, as in a `PairLoader`, the batches are the same with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np

from busigen.api.functions import Place, SampleOptions, indices_of, source_options
from busigen.api.pairs import Dataset, Pair, drawn
from busigen.errors import UsageError, needs
from busigen.registry import DEFAULT_BATCH, SAMPLE_CLASSES
from busigen.runtime.backends.base import usable_cores
from busigen.runtime.dataset.format import MAX_COUNT
from busigen.runtime.execution.run import SourceOptions

with needs("train", "busigen.torch"):
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
    from torch.utils.data import Dataset as TorchDataset

Transform = Callable[[Pair], Any]

_NEIGHBOURS = 8  # shards whose pairs a stream shuffles with one another: as many as of a URL are kept at hand


def to_tensors(pair: Pair) -> dict[str, Any]:
    """``image`` and ``mask``, (1, 256, 256) float32 from 0 to 1, ``key``, and ``label`` (see `PairDataset.labels`)."""
    return {
        "image": torch.from_numpy(pair.image)[None].float() / 255,
        "mask": torch.from_numpy(pair.mask)[None].float(),
        "label": SAMPLE_CLASSES.index(pair.label),
        "key": pair.key,
    }


class PairDataset(TorchDataset[Any]):
    """The pairs of a dataset by number, for any sampler.

    ``source`` is a folder, a URL or a `busigen.Dataset`; ``transform`` makes of a pair what is yielded.
    """

    def __init__(self, source: Place | Dataset, *, transform: Transform = to_tensors) -> None:
        self.pairs = source if isinstance(source, Dataset) else Dataset(str(source))
        self._transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> Any:
        return self._transform(self.pairs[position])

    def labels(self) -> list[int]:
        """Each pair's label, as `to_tensors` gives it, without reading images: for samplers that balance classes."""
        return [SAMPLE_CLASSES.index(label) for label in self.pairs.manifest()["class"]]


class PairStream(IterableDataset[Any]):
    """Pairs one after the other, from a dataset or, with `drawn`, from the engine.

    Args:
        source: A folder, a URL or a `busigen.Dataset`.
        shuffle: Whether each epoch has an order of its own: of shards, and of the pairs of some shards together.
        seed: Seeds the orders.
        transform: Makes of a pair what is yielded.
        rank: This process's number among the ``ranks`` that share the stream; None for what torch.distributed says.
        ranks: See ``rank``.
    """

    def __init__(
        self,
        source: Place | Dataset,
        *,
        shuffle: bool = True,
        seed: int = 0,
        transform: Transform = to_tensors,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        pairs = source if isinstance(source, Dataset) else Dataset(str(source))
        self._set_up(_Stored(pairs, shuffle, seed), transform, rank, ranks)

    @classmethod
    def drawn(
        cls,
        count: int | None = None,
        *,
        first: int = 0,
        transform: Transform = to_tensors,
        rank: int | None = None,
        ranks: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> PairStream:
        """A stream that the engine draws while it is read, and that never touches the disk.

        ``count`` is the number of pairs of an epoch, of which each has new ones; None goes on without an end. All else
        is as in `busigen.generate`, whose pairs are those of epoch 0. Every DataLoader worker opens an engine of its
        own; without ``threads``, they share the cores.
        """
        made = source_options(options, ("count", "first", "transform", "rank", "ranks"))
        indices_of(count, first, made.seed)
        stream = cls.__new__(cls)
        stream._set_up(_Drawn(made, count, first), transform, rank, ranks)
        return stream

    def _set_up(self, order: _Stored | _Drawn, transform: Transform, rank: int | None, ranks: int | None) -> None:
        if (rank is None) != (ranks is None) or not 0 <= (rank or 0) < (1 if ranks is None else ranks):
            raise UsageError(f"rank is {rank} and ranks is {ranks}.", fix="Give both, rank from 0 to ranks - 1.")
        self.block = DEFAULT_BATCH
        self._order, self._transform = order, transform
        self._given = None if rank is None or ranks is None else (rank, ranks)
        # Epoch, pairs of the share that the next iteration leaves out, and whether a worker has read. In shared memory,
        # so that workers that persist hear of it.
        self._shared = torch.zeros(3, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._taken, self._counted = 0, False

    @property
    def epoch(self) -> int:
        """The epoch that `set_epoch` said last, or 0."""
        return int(self._shared[0])

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, from 0; call it before each, as for torch's DistributedSampler."""
        if epoch < 0 or (epoch and self._order.count is None):
            fix = "Give a whole number from 0; to have epochs at all, a drawn stream needs its count."
            raise UsageError(f"the epoch is {epoch}.", fix=fix)
        self._order.check(epoch)
        if epoch != self.epoch:
            self._shared[0], self._shared[1], self._taken = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where this rank is: ``epoch``, ``taken``, how many pairs of it came out here, and ``ranks`` that share it.

        A UsageError says that workers of a plain DataLoader have read the stream, which tell nobody how far they are.
        """
        if self._shared[2] and not self._counted:
            raise UsageError("DataLoader workers have read this stream.", fix="Use a PairLoader, which counts them.")
        return {"epoch": self.epoch, "taken": self._taken, "ranks": self._place()[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken, by as many ranks; the number of workers may be another."""
        epoch, taken = state.get("epoch"), state.get("taken")
        if type(epoch) is not int or type(taken) is not int or taken < 0:
            raise UsageError(f"{dict(state)!r:.80} is no state of a stream.", fix="Give what state_dict returned.")
        if (before := state.get("ranks")) != (now := self._place()[1]):
            fix = "Go on with as many, or begin an epoch anew by set_epoch."
            raise UsageError(f"the state was taken by {before} ranks, and {now} read the stream now.", fix=fix)
        self.set_epoch(epoch)
        self._shared[1] = self._taken = taken

    def share(self) -> int | None:
        """How many pairs this rank takes in an epoch; None without an end."""
        if self._order.count is None:
            return None
        rank, ranks = self._place()
        rows, rest = divmod(self._order.count, ranks)
        return rows + ((rank - rows) % ranks < rest)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        pairs = self._order.pairs(self.epoch, self._positions(int(self._shared[1]), worker, workers), workers)
        items = (self._transform(pair) for pair in pairs)
        if info is None:
            return self.counted(items, 1)
        self._shared[2] = 1
        return items

    def counted(self, items: Iterable[Any], pairs: int) -> Iterator[Any]:
        """The items, of so many pairs each, as they come out in the main process; `state_dict` tells how many did."""
        self._counted, self._taken = True, int(self._shared[1])
        taken, most = self._taken, self.share()
        try:
            for item in items:
                taken = taken + pairs if most is None else min(taken + pairs, most)
                self._taken = taken
                yield item
        finally:
            # What has no end goes on where it was; an epoch that is begun again, from its start.
            self._shared[1] = taken if most is None else 0

    def _positions(self, start: int, worker: int, workers: int) -> Iterator[int]:
        """The positions in the epoch's order that a worker reads, of this rank's share from ``start`` on."""
        (rank, ranks), count = self._place(), self._order.count
        while True:
            for row in range(start + worker * self.block, start + (worker + 1) * self.block):
                # Dealt out in rows, of which each begins with the next rank: classes may alternate.
                position = row * ranks + (rank - row) % ranks
                if position >= (MAX_COUNT if count is None else count):
                    return
                yield position
            start += workers * self.block

    def _place(self) -> tuple[int, int]:
        if self._given is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self._given or (0, 1)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh is in no group of processes.
        return {**self.__dict__, "_given": self._place()}


class PairLoader(DataLoader[Any]):
    """torch's DataLoader of a `PairStream`, with the same batches whatever ``num_workers`` is.

    ``state_dict`` says where the training loop is, between two batches; ``load_state_dict`` goes on there.
    ``options`` are all others of torch's DataLoader.
    """

    def __init__(self, stream: PairStream, batch_size: int, **options: Any) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}.", fix="Give 1 or more.")
        super().__init__(stream, batch_size=batch_size, **options)
        self.stream = stream
        stream.block = batch_size

    def __len__(self) -> int:
        if (share := self.stream.share()) is None:
            raise TypeError("a stream without an end has no length")
        return share // self.stream.block if self.drop_last else -(-share // self.stream.block)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own class, which nothing needs
        return self.stream.counted(super().__iter__(), self.stream.block)

    def state_dict(self) -> dict[str, int]:
        """See `PairStream.state_dict`."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `PairStream.load_state_dict`."""
        self.stream.load_state_dict(state)


@dataclass(frozen=True)
class _Stored:
    """The orders of a dataset's pairs."""

    source: Dataset
    shuffle: bool
    seed: int

    @property
    def count(self) -> int | None:
        return len(self.source)

    def check(self, epoch: int) -> None:
        """Every epoch can be had."""

    def pairs(self, epoch: int, positions: Iterable[int], workers: int) -> Iterator[Pair]:
        order = self._order(epoch)
        return (self.source[int(order[position])] for position in positions)

    def _order(self, epoch: int) -> Any:
        if not self.shuffle or not len(self.source):
            return range(len(self.source))
        draw, shards = np.random.default_rng([self.seed, epoch]), self.source.shards()
        mixed = [shards[number] for number in draw.permutation(len(shards))]
        groups = [np.concatenate(mixed[k : k + _NEIGHBOURS]) for k in range(0, len(mixed), _NEIGHBOURS)]
        return np.concatenate([draw.permutation(group) for group in groups])


@dataclass(frozen=True)
class _Drawn:
    """The orders of what an engine draws."""

    options: SourceOptions
    count: int | None
    first: int

    def check(self, epoch: int) -> None:
        """A UsageError where the epoch's indices are beyond the last one."""
        indices_of(self.count, self.first + epoch * (self.count or 0), self.options.seed)

    def pairs(self, epoch: int, positions: Iterable[int], workers: int) -> Iterator[Pair]:
        options, start = self.options, self.first + epoch * (self.count or 0)
        if workers > 1 and options.threads is None:
            options = replace(options, threads=max(1, usable_cores() // workers))
        # Only now: an engine does not outlive a fork.
        return drawn(options, (start + position for position in positions))
