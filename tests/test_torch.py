"""PyTorch sees every pair once, whatever number of workers, ranks and shards, and goes on where a training stopped."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

import busigen
from busigen.api.pairs import Pair
from busigen.errors import UsageError
from busigen.runtime.execution.factory import generate
from busigen.torch import PairDataset, PairLoader, PairStream
from tests.harness.noise_source import NoiseSource

COUNT = 20
OPTIONS: dict[str, Any] = {"seed": 3, "threads": 1, "batch_size": 2}


@pytest.fixture(scope="module", params=[1, COUNT], ids=["one shard", "a shard each"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "set"
    generate(NoiseSource(), out, count=COUNT, seed=7, shard_size=COUNT // request.param)
    return out


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pairs in four shards."""
    out = tmp_path_factory.mktemp("many") / "set"
    generate(NoiseSource(), out, count=23, seed=7, shard_size=6)
    return out


def key(pair: Pair) -> str:
    return pair.key


def keys(batches: Any) -> list[list[str]]:
    return [list(batch["key"] if isinstance(batch, dict) else batch) for batch in batches]


def flat(batches: list[list[str]]) -> list[str]:
    return [name for batch in batches for name in batch]


def every(count: int = COUNT) -> list[str]:
    return [f"{index:09d}" for index in range(count)]


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_every_pair_comes_once(folder: Path, workers: int) -> None:
    for data in (PairDataset(folder), PairStream(folder), PairStream(folder, shuffle=False)):
        batches = list(DataLoader(data, batch_size=3, num_workers=workers))
        assert sorted(flat(keys(batches))) == every()
    assert flat(keys(PairLoader(PairStream(folder, shuffle=False), 3, num_workers=workers))) == every()


def test_a_part_of_a_dataset_is_one_too(many: Path) -> None:
    part = busigen.Dataset(many)[4:20:3]
    for workers in (0, 2):
        loader = PairLoader(PairStream(part, transform=key), 2, num_workers=workers)
        assert sorted(flat(keys(loader))) == every(20)[4::3]
        assert list(PairLoader(PairStream(part[:0]), 2, num_workers=workers)) == []


def test_a_batch_is_what_the_dataset_holds(folder: Path) -> None:
    batch = next(iter(DataLoader(PairDataset(folder), batch_size=4)))
    assert batch["image"].shape == batch["mask"].shape == (4, 1, 256, 256)
    assert batch["image"].dtype == batch["mask"].dtype == torch.float32
    for row, pair in enumerate(busigen.Dataset(folder)[:4]):
        assert np.array_equal((batch["image"][row, 0] * 255).round().numpy(), pair.image)
        assert np.array_equal(batch["mask"][row, 0].numpy(), pair.mask)
        assert ("benign", "malignant")[batch["label"][row]] == pair.label


def test_labels_balance_the_classes(folder: Path) -> None:
    data = PairDataset(folder)
    labels = torch.tensor(data.labels())
    assert labels.tolist() == [item["label"] for item in (data[position] for position in range(COUNT))]
    weights = 1 / torch.bincount(labels)[labels]
    torch.manual_seed(0)
    drawn = [int(label) for batch in DataLoader(data, 10, sampler=WeightedRandomSampler(weights.tolist(), 400))
             for label in batch["label"]]  # fmt: skip
    assert 0.4 < np.mean(drawn) < 0.6  # 400 draws deviate by 0.025; the set itself has 0.35 or so


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_ranks_share_each_epoch(many: Path, workers: int) -> None:
    orders = []
    for epoch in (0, 1):
        shares = []
        for rank in range(3):
            stream = PairStream(many, rank=rank, ranks=3)
            stream.set_epoch(epoch)
            loader = PairLoader(stream, 2, num_workers=workers)
            shares.append(keys(loader))
            assert len(loader) == len(shares[-1])
        assert sorted(name for share in shares for name in flat(share)) == every(23)
        assert {len(flat(share)) for share in shares} == {7, 8}
        orders.append(shares)
    assert orders[0] != orders[1]


def _rank(rank: int, folder: Path, place: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    for method in ("fork", "spawn"):
        loader = PairLoader(PairStream(folder, transform=key), 4, num_workers=1, multiprocessing_context=method)
        (place / f"{method}-{rank}").write_text(" ".join(flat(keys(loader))))
    torch.distributed.destroy_process_group()


def test_ranks_of_a_process_group_know_which_they_are(many: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (many, tmp_path), nprocs=2)
    for method in ("fork", "spawn"):
        shares = [(tmp_path / f"{method}-{rank}").read_text().split() for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == every(23)
        assert {len(share) for share in shares} == {11, 12}


def test_batches_are_the_same_with_any_number_of_workers(many: Path) -> None:
    batches = [keys(PairLoader(PairStream(many, seed=1), 4, num_workers=workers)) for workers in (0, 1, 3)]
    assert batches[0] == batches[1] == batches[2]
    assert batches[0] != keys(PairLoader(PairStream(many, seed=2), 4))


def test_workers_that_persist_hear_of_the_next_epoch(many: Path) -> None:
    stream = PairStream(many)
    loader = PairLoader(stream, 4, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        epochs.append(keys(loader))
        assert sorted(flat(epochs[-1])) == every(23)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0), (1, 3)])
def test_a_training_goes_on_in_the_middle_of_an_epoch(many: Path, before: int, after: int) -> None:
    def loader(workers: int) -> PairLoader:
        return PairLoader(PairStream(many, transform=key), 4, num_workers=workers)

    whole = loader(0)
    whole.stream.set_epoch(1)
    expected = keys(whole)
    stopped = loader(before)
    stopped.stream.set_epoch(1)
    seen = keys(islice(stopped, 3))
    state = stopped.state_dict()
    assert state == {"epoch": 1, "taken": 12, "ranks": 1}
    resumed = loader(after)
    resumed.load_state_dict(state)
    assert seen + keys(resumed) == expected
    resumed.stream.set_epoch(2)
    assert sorted(flat(keys(resumed))) == every(23)


def test_a_plain_loader_with_workers_has_no_state_to_tell(many: Path) -> None:
    stream = PairStream(many)
    next(iter(DataLoader(stream, num_workers=1)))
    with pytest.raises(UsageError, match="PairLoader"):
        stream.state_dict()
    for state in ({}, {"epoch": 0, "taken": -1}, {"epoch": "1", "taken": 0}):
        with pytest.raises(UsageError, match="no state"):
            stream.load_state_dict(state)  # type: ignore[arg-type]
    state = PairStream(many, rank=0, ranks=2).state_dict()
    with pytest.raises(UsageError, match="taken by 2 ranks"):
        PairStream(many, rank=0, ranks=3).load_state_dict(state)
    with pytest.raises(UsageError, match="rank is 2"):
        PairStream(many, rank=2, ranks=2)


def test_a_stream_from_the_engine_has_the_pairs_of_generate() -> None:
    expected = list(busigen.generate(5, **OPTIONS))
    batches = list(PairLoader(PairStream.drawn(5, **OPTIONS), 2, num_workers=2))
    assert flat(keys(batches)) == [pair.key for pair in expected]
    pixels = torch.cat([batch["image"] for batch in batches])[:, 0]
    assert np.array_equal((pixels * 255).round().numpy(), [pair.image for pair in expected])


def test_a_stream_without_an_end_goes_on_where_it_was() -> None:
    loader = PairLoader(PairStream.drawn(transform=key, **OPTIONS), 1)
    assert flat(keys(islice(loader, 2))) + flat(keys(islice(loader, 1))) == every(3)
    assert loader.state_dict() == {"epoch": 0, "taken": 3, "ranks": 1}
    with pytest.raises(UsageError, match="epoch is 1"):
        loader.stream.set_epoch(1)


def test_epochs_from_the_engine_have_pairs_of_their_own() -> None:
    stream = PairStream.drawn(2, first=5, transform=key, **OPTIONS)
    epochs = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        epochs += list(stream)
    assert epochs == [f"{index:09d}" for index in range(5, 9)]
