"""Tasks that share one folder, and datasets that begin anywhere: the bytes of one run, whoever made which part."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from busigen.errors import OutputError, UsageError
from busigen.runtime.dataset.format import Plan
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate, parse_range, parse_task, part_of, planned
from busigen.runtime.execution.launchers import array_task
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.processes import GUARD_SECONDS, wait_for
from tests.harness.replaying import NoiseInputs, flip
from tests.harness.scaled import SEED, started

COUNT, SIZE = 22, 2
NUMBERS = {"count": COUNT, "seed": SEED, "shard_size": SIZE}
PLAN = Plan(**NUMBERS)


def kth(position: int, tasks: int) -> Plan:
    part = part_of(PLAN, task=(position, tasks))
    assert part is not None
    return part


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone") / "set"
    generate(NoiseSource(), out, **NUMBERS)
    return hashes(out)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, described = process.communicate(timeout=GUARD_SECONDS)
    return process.returncode, described


def test_tasks_that_start_at_once_make_the_dataset_of_one_run(tmp_path: Path, alone: dict[str, str]) -> None:
    out = tmp_path / "set"
    tasks = [started(out, COUNT, SIZE, 0.02, f"{number}/3") for number in (1, 2, 3)]
    described = [ended(task) for task in tasks]
    assert [code for code, _ in described] == [0, 0, 0], described
    assert hashes(out) == alone
    assert not [path for path in out.rglob(".*") if path.is_file()]


def test_the_last_of_many_tasks_completes_the_dataset(tmp_path: Path, alone: dict[str, str]) -> None:
    left = []
    for part in ("0:6", "6:20", "20:22"):
        report = generate(NoiseSource(), tmp_path, **NUMBERS, part=part_of(PLAN, parse_range(part)))
        left.append((report.samples, report.shards, report.written, report.missing))
    assert left == [(6, 3, 3, 8), (14, 7, 7, 1), (22, 11, 1, 0)]
    assert hashes(tmp_path) == alone
    again = generate(NoiseSource(), tmp_path, **NUMBERS, part=kth(2, 3))
    assert (again.already_complete, again.written) == (True, 0)


def test_a_killed_task_is_refused_twice_at_once_and_continues(tmp_path: Path, alone: dict[str, str]) -> None:
    out = tmp_path / "set"
    task = started(out, COUNT, SIZE, 0.2, "1/2")
    try:
        wait_for(task, (out / "shards" / "000000.json").exists)
        with pytest.raises(OutputError, match=rf"shards 0 to 4 of .* are being made by process {task.pid} on "):
            generate(NoiseSource(), out, **NUMBERS, part=kth(1, 3))
        with pytest.raises(OutputError, match="is being written by array tasks"):
            generate(NoiseSource(), out, **NUMBERS)
        with pytest.raises(OutputError, match="belongs to another run"):
            generate(NoiseSource(), out, **{**NUMBERS, "seed": 8}, part=kth(2, 2))
        # The other part is made beside it.
        assert generate(NoiseSource(), out, **NUMBERS, part=kth(2, 2)).missing >= 1
    finally:
        task.send_signal(signal.SIGKILL)
        ended(task)
    assert list(out.glob(".lock-task-*"))
    assert generate(NoiseSource(), out, **NUMBERS, part=kth(1, 2)).missing == 0
    assert hashes(out) == alone


def test_a_task_is_refused_beside_a_run_of_the_whole(tmp_path: Path) -> None:
    class Peeking(NoiseSource):
        def draw(self, seed, indices, done):
            with pytest.raises(OutputError, match="is being written by process"):
                generate(NoiseSource(), tmp_path, **NUMBERS, part=kth(1, 2))
            return super().draw(seed, indices, done)

    generate(Peeking(), tmp_path, **{**NUMBERS, "count": 2})


def test_a_damaged_shard_is_made_again_by_its_task(tmp_path: Path, alone: dict[str, str]) -> None:
    generate(NoiseSource(), tmp_path, **NUMBERS)
    flip(tmp_path / "shards" / "000001.tar")
    assert generate(NoiseSource(), tmp_path, **NUMBERS, part=kth(2, 2)).already_complete
    assert generate(NoiseSource(), tmp_path, **NUMBERS, part=kth(1, 2)).written == 1
    assert hashes(tmp_path) == alone


def test_a_dataset_that_begins_later_has_the_same_shards(tmp_path: Path, alone: dict[str, str]) -> None:
    report = generate(NoiseSource(), tmp_path, **{**NUMBERS, "count": 12}, first=10)
    assert (report.samples, report.shards) == (12, 6)
    made = hashes(tmp_path)
    shards = {name: sha256 for name, sha256 in alone.items() if name.startswith("shards/")}
    assert {name: made[name] for name in made if name.startswith("shards/")} == {
        name: sha256 for name, sha256 in shards.items() if name >= "shards/000005"
    }
    dataset = Dataset.open(tmp_path)
    assert [sample.index for sample in dataset.samples([21, 10])] == [21, 10]
    assert dataset.manifest()["index"].to_list() == list(range(10, 22))
    with pytest.raises(IndexError, match="9 is outside 10 to 21"):
        dataset.samples([9])
    readme = (tmp_path / "README.md").read_text()
    assert "--index-range 10:22" in readme and "--count" not in readme
    assert "{000005..000010}" in readme and "000000010.image.png" in readme
    assert verify(tmp_path).ok
    inputs = NoiseInputs(source=NoiseSource(bundle="b"))
    with pytest.raises(UsageError, match="Give a key from 000000010 to 000000021"):
        explain(tmp_path, "3", inputs=inputs)
    assert explain(tmp_path, "17", replay=False, inputs=inputs).history["index"] == 17
    flip(tmp_path / "shards" / "000007.tar")
    assert repair(tmp_path, inputs=NoiseInputs()).error is None
    assert hashes(tmp_path) == made
    with pytest.raises(OutputError, match=r"--count: the default -> 22; --index-range: 10:22 -> the default"):
        generate(NoiseSource(), tmp_path, **NUMBERS)


def test_an_older_reader_refuses_what_it_would_misread(tmp_path: Path) -> None:
    generate(NoiseSource(), tmp_path / "later", count=2, seed=SEED, shard_size=2, first=2)
    generate(NoiseSource(), tmp_path / "first", count=2, seed=SEED, shard_size=2)
    records = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("later", "first")]
    assert [record["schema_version"] for record in records] == [2, 1]


def test_parts_cover_the_dataset_once_and_are_of_whole_shards() -> None:
    plan = Plan(count=1005, seed=0, shard_size=10)
    for tasks in (1, 2, 7, 101):
        parts = [part_of(plan, task=(number, tasks)) for number in range(1, tasks + 1)]
        assert [index for part in parts for index in part.span] == list(plan.span)
        assert max(part.shards for part in parts) - min(part.shards for part in parts) <= 1
    _, part = planned(1005, "500:1005", "2/2", seed=0, shard_size=10)
    assert part.span == range(750, 1005)
    whole, part = planned(None, "500:1005", None, seed=0, shard_size=10)
    assert (whole.span, part) == (range(500, 1005), None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((100, "0:101", None), "not made of whole shards"),
        ((100, "5:100", None), "not made of whole shards"),
        ((100, "0:15", None), "not made of whole shards"),
        ((None, "15:40", None), "begins at 15"),
        ((None, None, "1/2"), "neither --count nor --index-range"),
        ((100, None, "1/11"), "only 10 shards"),
        ((100, "40:60", "1/3"), "only 2 shards"),
        *(((100, text, None), "--index-range is") for text in ("5", "5:5", "9:3", "-1:5", "a:b", "1:2:3", "")),
        *(((100, None, text), "--array-task is") for text in ("0/2", "3/2", "1", "1/0", "-1/2", "1/x", "")),
    ],
)
def test_impossible_parts_are_refused(options: tuple[int | None, str | None, str | None], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        planned(*options, seed=0, shard_size=10)


def test_slurm_says_which_task_this_is() -> None:
    def names(*values: int) -> dict[str, str]:
        return {
            f"SLURM_ARRAY_TASK_{name}": str(value)
            for name, value in zip(("ID", "COUNT", "MIN", "MAX"), values, strict=True)
        }

    assert [array_task(names(number, 4, 0, 3)) for number in range(4)] == ["1/4", "2/4", "3/4", "4/4"]
    assert [array_task(names(number, 3, 10, 20)) for number in (10, 15, 20)] == ["1/3", "2/3", "3/3"]
    assert array_task(names(5, 1, 5, 5)) == "1/1"
    assert parse_task(array_task(names(8, 8, 1, 8))) == (8, 8)
    for gaps in (names(5, 2, 1, 6), names(2, 3, 1, 6), names(4, 3, 1, 8)):
        with pytest.raises(UsageError, match="has gaps"):
            array_task(gaps)
    with pytest.raises(UsageError, match="no task of a job array"):
        array_task({"SLURM_ARRAY_TASK_ID": "1"})
