"""Pools of workers, as real processes and real Ray actors: any of them may die, and the bytes are those of one run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from busigen.errors import InputError, UsageError, WorkerError
from busigen.runtime.dataset.format import Plan
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.launchers import LocalWorkerPool, launcher
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.execution.workers import Coordinator, ShardDone, ShardStarted, SourceMaker, Worker, WorkerStopped
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from tests.harness import command
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource, noise
from tests.harness.processes import GUARD_SECONDS, Hold, read_until, wait_for
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.scaled import SEED, started

COUNT, SIZE = 16, 2
NUMBERS = {"count": COUNT, "seed": SEED, "shard_size": SIZE}

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone") / "set"
    generate(NoiseSource(), out, **NUMBERS)
    return hashes(out)


def below(parent: int, name: str) -> list[int]:
    """Processes that descend from another one and have a word in their command line."""
    parents, named = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if name in (path / "cmdline").read_bytes().decode(errors="replace"):
                named.append(int(path.name))
        except OSError:
            continue

    def descends(pid: int) -> bool:
        return pid == parent or (pid in parents and descends(parents[pid]))

    return [pid for pid in named if pid != parent and descends(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GUARD_SECONDS
    while not seen():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def run_and_kill_one(out: Path, how: str, name: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Run with a pool of workers and kill one of its two processes in its second shard."""
    hold = Hold(out.parent, 4)
    run = started(out, COUNT, SIZE, 0.0, how, hold)
    described = read_until(run, "starting")
    wait_for(run, lambda: (out / "shards" / "000001.json").exists() and len(hold.reached()) == 2)
    workers = below(run.pid, name)
    assert sorted(workers) == sorted(hold.reached())
    os.kill(workers[0], signal.SIGKILL)
    hold.release()
    described += run.communicate(timeout=GUARD_SECONDS)[1].splitlines()
    return run, described


@linux
def test_a_killed_workers_shard_is_made_by_another(tmp_path: Path, alone: dict[str, str]) -> None:
    out = tmp_path / "set"
    run, described = run_and_kill_one(out, "local:2", "spawn_main")
    assert run.returncode == 0, described
    assert any("is lost (SIGKILL ended it), with shard" in line for line in described), described
    assert hashes(out) == alone


@linux
def test_a_killed_ray_actors_shard_is_made_by_another(tmp_path: Path, alone: dict[str, str]) -> None:
    # Takes about 15 s, most of which Ray needs to start.
    out = tmp_path / "set"
    run, described = run_and_kill_one(out, "ray:2", "ray::_Actor")
    assert run.returncode == 0, described
    assert any("is lost (" in line and "with shard" in line for line in described), described
    assert hashes(out) == alone


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""A Ray cluster with two GPUs, as far as Ray is told. It ends with its standard input."""


@linux
def test_a_cluster_that_runs_gets_a_worker_per_gpu(
    tmp_path: Path, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The source computes on no card; that Ray hands out two is what decides how many workers there are.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Newer versions would write a token into the user's home folder for whoever joins.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    out, pipes = tmp_path / "set", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], **pipes) as cluster:
        try:
            address = cluster.stdout.readline().strip()
            assert address, "the cluster did not start"
            run = started(out, COUNT, SIZE, 0.0, f"ray@{address}")
            described = run.communicate(timeout=GUARD_SECONDS)[1]
            assert run.returncode == 0, described
            assert cluster.poll() is None, "it is not this run's to end"
        finally:
            cluster.communicate("", timeout=GUARD_SECONDS)
    assert "a Ray cluster: 2 workers of a GPU" in described
    assert hashes(out) == alone


@linux
def test_a_ray_that_does_not_start_is_told_in_one_line(tmp_path: Path) -> None:
    # Its sockets' names may have 107 characters. A node that comes up too slowly is no error of a kind either.
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("deep" * 30))}
    ordered = ("generate", "--count", 1, "--out", tmp_path / "set", "--launcher", "ray", "--workers", 1)
    done = command.run(*ordered, env=environment)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert line.startswith("error: Ray cannot be started on this machine: ") and "107 bytes" in line
    assert "use --launcher local with --workers" in line
    assert not (tmp_path / "set").exists()


@linux
def test_workers_end_with_the_run_that_was_killed(tmp_path: Path, alone: dict[str, str]) -> None:
    out = tmp_path / "set"
    hold = Hold(tmp_path, 2)
    run = started(out, COUNT, SIZE, 0.0, "local:2", hold)
    wait_for(run, lambda: (out / "shards" / "000000.json").exists() and len(hold.reached()) == 2)
    workers = below(run.pid, "spawn_main")
    assert sorted(workers) == sorted(hold.reached())
    run.kill()
    run.communicate()
    wait_until(lambda: not any(map(alive, workers)))
    generate(NoiseSource(), out, **NUMBERS)
    assert hashes(out) == alone


@linux
def test_ctrl_c_finishes_the_open_shards_of_all_workers(tmp_path: Path, alone: dict[str, str]) -> None:
    out = tmp_path / "set"
    hold = Hold(tmp_path, 2)
    run = started(out, COUNT, SIZE, 0.0, "local:2", hold)
    wait_for(run, lambda: (out / "shards" / "000000.json").exists() and len(hold.reached()) == 2)
    # As a terminal does, to every process of the run.
    for pid in (*below(run.pid, "spawn_main"), run.pid):
        os.kill(pid, signal.SIGINT)
    described = "".join(read_until(run, "Ctrl-C: finishing"))
    hold.release()
    described += run.communicate(timeout=GUARD_SECONDS)[1]
    assert run.returncode == 130, described
    assert "open shard" in described
    kept = len(list((out / "shards").glob("*.json")))
    assert f"{kept} of 8 shards complete" in described and 1 < kept < 8
    assert "lost with" not in described and "is lost" not in described
    report = generate(NoiseSource(), out, **NUMBERS)
    assert report.written == 8 - kept
    assert hashes(out) == alone


class Dying(NoiseSource):
    def draw(self, seed, indices, done):
        if indices[0] == 4:
            os._exit(3)
        return super().draw(seed, indices, done)


def dying(progress: Progress) -> NoiseSource:
    return Dying()


def unable(progress: Progress) -> NoiseSource:
    raise InputError("no healthy image.", fix="Give some.")


class Watched(LocalWorkerPool):
    """Counts the shards that wait with a worker which has not begun them."""

    def __init__(self, make: SourceMaker, size: int) -> None:
        super().__init__(make, size)
        self.waiting: Counter[int] = Counter()
        self.most = 0

    def order(self, worker, order):
        self.waiting[worker] += order is not None
        self.most = max(self.most, self.waiting[worker])
        super().order(worker, order)

    def events(self, timeout):
        events = super().events(timeout)
        self.waiting.subtract(worker for worker, message in events if isinstance(message, ShardStarted))
        return events


class Notes(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text):
        self.notes.append(text)


def made_with(make: SourceMaker, out: Path, *, workers: int = 1, **numbers: int) -> Notes:
    progress = Notes()
    with Watched(make, workers) as worker_pool:
        coordinator = Coordinator(worker_pool, progress)
        generate(coordinator.source(), out, **{**NUMBERS, **numbers}, make=coordinator.make, progress=progress)
    assert worker_pool.most == 1
    return progress


def test_a_shard_that_ends_every_worker_ends_the_run(tmp_path: Path, alone: dict[str, str]) -> None:
    with pytest.raises(WorkerError, match="shard 2 has lost 4 workers, the last one so: it ended with code 3"):
        made_with(dying, tmp_path)
    assert generate(NoiseSource(), tmp_path, **NUMBERS).written == 6
    assert hashes(tmp_path) == alone


def test_an_error_of_a_worker_is_the_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no healthy image\. Give some\.") as caught:
        made_with(unable, tmp_path / "set")
    assert caught.value.fix == "Give some."
    assert not (tmp_path / "set").exists()


class Noted(QuickEngine):
    """Notes each call in a file; ends its process at one of the calls, unless another process has done so before."""

    def __init__(self, log: Path, last: int) -> None:
        super().__init__()
        self.log, self.last = log, last

    def run(self, graph, inputs):
        output = super().run(graph, inputs)
        with self.log.open("a") as file:
            file.write(f"{self.calls[-1][0]}\n")
        if len(self.calls) == self.last and not self.log.with_suffix(".lost").exists():
            self.log.with_suffix(".lost").touch()
            os._exit(3)
        return output


def streaming(progress: Progress, log: Path, last: int = 0) -> Sampler:
    return quick_sampler(Noted(log, last))


STREAM = {"count": 40, "seed": SEED, "shard_size": 5}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("streamed") / "set"
    generate(quick_sampler(QuickEngine()), out, **STREAM)
    return hashes(out)


def test_a_workers_batches_fill_across_its_shards(tmp_path: Path, streamed: dict[str, str]) -> None:
    made_with(partial(streaming, log=tmp_path / "log"), tmp_path / "set", **STREAM)
    assert hashes(tmp_path / "set") == streamed
    calls = (tmp_path / "log").read_text().split()
    engine = QuickEngine()
    for first in range(0, 40, 5):
        quick_sampler(engine).draw(SEED, range(first, first + 5), lambda accepted: None)
    for stage in ("mask", "lesion@128"):
        # As in test_streaming: a shard of five fills one batch of four per class at the most.
        assert calls.count(stage) < 0.75 * [name for name, _ in engine.calls].count(stage), stage


def test_a_lost_worker_loses_none_of_its_shards(tmp_path: Path, streamed: dict[str, str]) -> None:
    # Some forty calls make half of the dataset: by the twentieth, several shards are open and one may be complete.
    make = partial(streaming, log=tmp_path / "log", last=20)
    progress = made_with(make, tmp_path / "set", workers=2, **STREAM)
    assert hashes(tmp_path / "set") == streamed
    assert progress.done == 40
    assert any("it ended with code 3), with shards " in note for note in progress.notes), progress.notes


def test_a_worker_that_is_told_to_end_finishes_its_oldest_shard_alone() -> None:
    worker = Worker(lambda progress: quick_sampler(QuickEngine()))
    for number in range(4):
        worker.order((Plan(**STREAM), number))
    described = []
    for message in worker.messages():
        described.append(message)
        if isinstance(message, int):
            worker.order(None)
    begun = [message.number for message in described if isinstance(message, ShardStarted)]
    made = [message.record.number for message in described if isinstance(message, ShardDone)]
    assert begun == list(range(len(begun))) and len(begun) > len(made)
    # The batch with the first accepted sample may have finished the first shard; the next one is then the oldest.
    assert made in ([0], [0, 1])
    assert isinstance(described[-1], WorkerStopped)


def opening(progress: Progress, images: Path, log: Path) -> Sampler:
    """Notes every time that a file of a folder is opened."""

    def noted(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(images)):
            with log.open("a") as file:
                file.write(f"{os.getpid()} {arguments[0]}\n")

    sys.addaudithook(noted)
    return quick_sampler(QuickEngine(), healthy=HealthyFolder(images))


def test_a_worker_reads_each_healthy_image_once(tmp_path: Path, synthetic_busi: Path) -> None:
    images = synthetic_busi / "normal"
    made_with(partial(opening, images=images, log=tmp_path / "log"), tmp_path / "set", workers=2, **STREAM)
    opened = Counter(line.partition(" ")[::2] for line in (tmp_path / "log").read_text().splitlines())
    workers = {process for process, _ in opened}
    assert len(workers) == 2
    for process in workers:
        for _, path in HealthyFolder(images).items:
            assert opened[process, str(path)] == 1


def random(progress: Progress) -> NoiseSource:
    return NoiseSource(0.05, process=os.getpid())


def test_workers_that_would_draw_other_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"worker . would draw other samples.*fingerprint\.process"):
        made_with(random, tmp_path / "set", workers=2, count=2000)


def test_impossible_numbers_of_workers_are_refused() -> None:
    for wanted, problem in (
        ({"workers": 0}, "--workers is 0"),
        ({"ray_address": "x"}, "--ray-address is 'x'"),
    ):
        with pytest.raises(UsageError, match=problem):
            launcher("local").worker_pool(lambda threads: noise, GenerateOptions(out=Path(), **wanted))
    with pytest.raises(UsageError, match=r"--launcher is 'sun'\. Choose one of: local, ray, slurm"):
        launcher("sun")
    assert launcher("local").worker_pool(lambda threads: noise, GenerateOptions(out=Path(), workers=1)) is None
