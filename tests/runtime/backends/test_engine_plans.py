"""What engines are asked for, and what is said where they cannot run: no engine and no card needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from busigen.errors import IntegrityError, UsageError
from busigen.registry import PROVIDERS
from busigen.runtime.backends.base import EngineOptions
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.probe import driver_cuda
from busigen.runtime.backends.tensorrt.backend import EngineBackend, wanted_batches
from busigen.runtime.backends.tensorrt.engine_builder import KIND, Cache, key_of
from busigen.runtime.backends.tensorrt.library import (
    CudaFailure,
    card_for,
    cuda,
    cuda_problem,
    device_problem,
    memory_problem,
    unusable,
)
from busigen.runtime.backends.tensorrt.profiles import ALIGNMENT, Batches, Profile, calls, fill, places
from tests.harness.command import error_line, run
from tests.harness.engine_library import TARGET, rtx
from tests.harness.quick_engine import QuickEngine, quick_sampler

GRAPHS = Bundle.recorded(default_bundle()).graph_names


@pytest.mark.parametrize("sizes", [(16,), (16, 4), (16, 8, 2)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_row_of_a_batch_is_computed_once(sizes: tuple[int, ...], dynamic: bool) -> None:
    profiles = Batches(sizes, dynamic).profiles(128)
    for count in range(1, 70):
        planned = calls(count, profiles)
        assert [row for call in planned for row in range(call.first, call.end)] == list(range(count))
        for call in planned:
            profile = profiles[call.profile]
            assert profile.least <= call.rows <= profile.most
            assert call.end - call.first <= call.rows


def test_what_is_left_over_takes_the_smallest_batch_that_holds_it() -> None:
    profiles = Batches((16, 4)).profiles(128)
    assert [(call.rows, call.end - call.first) for call in calls(35, profiles)] == [(16, 16), (16, 16), (4, 3)]
    assert [call.rows for call in calls(5, profiles)] == [16]


def side_of(stage: str) -> int:
    return int(stage.partition("@")[2] or (256 if stage == "prior" else 128))


def test_no_call_of_the_sampler_is_larger_than_a_full_one() -> None:
    """What engines are built for holds every call, and is filled by the largest calls of each stage."""
    engine = QuickEngine()
    quick_sampler(engine, batch_size=16).draw(0, range(60), lambda done: None)
    rows: dict[str, int] = {}
    for stage, count in engine.calls:
        rows[stage] = max(count, rows.get(stage, 0))
    assert len(rows) >= 7
    for stage, most in rows.items():
        (profile,) = Batches((16,)).profiles(side_of(stage))
        assert most <= profile.most, stage
    full = [stage for stage, most in rows.items() if most == Batches((16,)).profiles(side_of(stage))[0].most]
    assert {"prior", "mask"} <= set(full)


def test_a_dynamic_engine_takes_every_batch_and_a_static_one_its_own() -> None:
    assert Batches((16,), dynamic=True).profiles(128) == (Profile(2, 16, 16),)
    assert Batches((16, 4)).profiles(128) == (Profile(16, 16, 16), Profile(4, 4, 4))
    # A quarter of the rows where a window has four times the pixels, and never a batch of one.
    assert Batches((16, 4)).profiles(256) == (Profile(4, 4, 4), Profile(2, 2, 2))
    assert Batches((4, 2)).profiles(256) == (Profile(2, 2, 2),)
    assert Batches((1,)).profiles(128) == Batches((1,)).profiles(256) == (Profile(2, 2, 2),)


def test_calls_are_sized_by_the_windows_that_a_graph_is_shown() -> None:
    bundle = Bundle.recorded(default_bundle())
    sides = {name: bundle.call_side(name) for name in GRAPHS}
    assert {name for name, side in sides.items() if side == 256} == {"prior", *(n for n in GRAPHS if "@256" in n)}
    assert set(sides.values()) == {128, 256}


@pytest.mark.parametrize("text", ["", "x", "16,", "0", "16,0", "4097", "-1", "1.5"])
def test_a_batch_size_that_is_none_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(UsageError, match=f"--batch-size is {re.escape(repr(text))}"):
        Batches.parse(text)


def test_rows_lie_apart_and_the_last_one_is_repeated() -> None:
    laid, size = places({"a": (4, 3), "b": (4, 2, 5)})
    block = np.zeros(size, dtype=np.uint8)
    rng = np.random.default_rng(0)
    inputs = {"a": rng.normal(size=(9, 3)).astype(np.float32), "b": rng.normal(size=(9, 2, 5)).astype(np.float32)}
    fill(block, laid, inputs, 6, 9)
    for name, array in inputs.items():
        assert laid[name].offset % ALIGNMENT == 0
        found = laid[name].view(block)
        np.testing.assert_array_equal(found[:3], array[6:9])
        np.testing.assert_array_equal(found[3], array[8])


def test_an_input_of_another_shape_is_refused_by_name() -> None:
    laid, size = places({"a": (4, 3)})
    block = np.zeros(size, dtype=np.uint8)
    with pytest.raises(IntegrityError, match=r"input 'a' has rows of shape \(4,\)"):
        fill(block, laid, {"a": np.zeros((4, 4), np.float32)}, 0, 4)
    with pytest.raises(IntegrityError, match="input 'a' is missing"):
        fill(block, laid, {}, 0, 4)


@pytest.mark.parametrize(
    ("status", "driver", "said", "fix"),
    [
        (35, 0, "no NVIDIA driver", "its driver"),
        (35, 12080, "driver knows CUDA up to 12.8, and 13.0 is the least", "newer NVIDIA driver"),
        (100, 13000, "no card", "CUDA_VISIBLE_DEVICES"),
        (3, 13000, "error 3", "nvidia-smi"),
    ],
)
def test_what_stands_against_the_card_is_told_with_what_helps(status: int, driver: int, said: str, fix: str) -> None:
    problem = device_problem(TARGET, status, driver, 13040)
    assert problem is not None
    assert problem.exit_code == 2
    assert said in problem.problem
    assert TARGET in problem.problem
    assert fix in problem.fix


def test_a_driver_of_the_same_major_version_is_new_enough() -> None:
    assert device_problem(TARGET, 0, 13000, 13040) is None
    assert device_problem(TARGET, 0, 14010, 13040) is None


def test_workers_share_the_cards_evenly() -> None:
    assert [card_for(f"worker-{number}", 3) for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [card_for(name, 3) for name in ("MainProcess", "worker-", "worker-x", "12")] == [0, 0, 0, 0]
    assert card_for("worker-5", 1) == 0


def test_the_largest_batch_that_fits_is_proposed() -> None:
    gib = 1 << 30
    for free in range(0, 6 * gib, gib // 7):
        found = memory_problem(TARGET, "NVIDIA L4", 64, 4 * gib, free)
        fits = found.fits if found else 64
        assert 4 * gib * fits / 64 <= free
        assert fits == 64 or 4 * gib * (fits + 1) / 64 > free
    problem = memory_problem(TARGET, "NVIDIA L4", 64, 4 * gib, 2 * gib)
    assert problem is not None
    assert "needs 4.00 GiB on NVIDIA L4, of which 2.00 GiB are free" in problem.problem
    assert "--batch-size 32" in problem.fix
    assert (problem.exit_code, problem.rows, problem.fits) == (11, 64, 32)
    nothing = memory_problem(TARGET, "NVIDIA L4", 64, 4 * gib, 0)
    assert nothing is not None
    assert "No batch fits" in nothing.fix


def test_memory_that_is_gone_when_it_is_taken_is_told_as_that() -> None:
    """Between the plan and the allocation something else may have taken it: code 11, and a batch to go on with."""
    gone = cuda_problem(TARGET, CudaFailure(2, "cudaErrorMemoryAllocation"), 16)
    assert gone.exit_code == 11 and "--batch-size 16" in gone.problem and "--batch-size 8" in gone.fix
    assert "--batch-size" not in cuda_problem(TARGET, CudaFailure(2, "cudaErrorMemoryAllocation"), 2).fix
    other = cuda_problem(TARGET, CudaFailure(719, "cudaErrorLaunchFailure"), 16)
    assert other.exit_code == 2 and "cudaErrorLaunchFailure (719)" in other.problem


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (["[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)", "passed on"], 11),
        (["Requested amount of GPU memory could not be allocated: OutOfMemory"], 11),
        (["The engine plan file is not compatible with this version of TensorRT"], 2),
        ([], 2),
    ],
)
def test_an_engine_that_does_not_load_is_told_in_the_librarys_words(said: list[str], code: int) -> None:
    error = unusable(TARGET, "1.7", said)
    assert error.exit_code == code
    assert (said[0] if said else "it does not say why") in error.problem
    assert ("--batch-size" if code == 11 else "--provider cuda or cpu") in error.fix


@pytest.mark.skipif(driver_cuda() is not None, reason="this machine has an NVIDIA driver")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler makes a driver's library here")
def test_a_driver_that_is_too_old_is_refused_by_its_version(tmp_path: Path) -> None:
    """A real library in the driver's place, which CUDA's own runtime asks for its version."""
    rtx()
    source = tmp_path / "cuda.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "BUSIGEN_CACHE": str(tmp_path / "cache")}
    done = run("generate", "--count", 1, "--out", tmp_path / "set", "--provider", TARGET, env=environment)
    line = error_line(done, 2)
    assert "knows CUDA up to 12.4" in line and "newer NVIDIA driver" in line
    assert not (tmp_path / "set").exists() and not (tmp_path / "cache").exists()


def test_without_a_card_the_provider_says_so_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx()
    if not int(cuda().cudaGetDeviceCount()[0]):
        pytest.skip("this machine has a card")
    monkeypatch.setenv("BUSIGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=f"--provider {TARGET}: .*(no NVIDIA driver|no card|driver knows)"):
        EngineBackend(Bundle.open(default_bundle()), PROVIDERS[TARGET], EngineOptions())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("batches", [Batches((16,)), Batches((256, 64, 4)), Batches((16,), dynamic=True)])
def test_the_batches_in_a_datasets_record_are_read_back(tmp_path: Path, batches: Batches) -> None:
    """Samples are drawn again by engines for these, whatever else the cache has by then."""
    library, bundle = rtx(), Bundle.open(default_bundle())
    version = f"1.7.1 on NVIDIA L4, {batches}"
    # A display text may change; only in records of before they had a field is it read.
    field = json.loads(json.dumps(asdict(batches)))
    for record in (
        {"fingerprint": {"engine_version": version}},
        {"fingerprint": {"engine_version": "1.7.1 on NVIDIA L4, any batch 3"}, "engine_batches": field},
    ):
        assert Batches.recorded(record) == batches
    cache = Cache(tmp_path)
    for kept in (Batches((16, 4)), Batches((16, 8, 2))):
        cache.write(KIND, key_of(library, bundle, "context", kept, ""), b"engine")
    assert wanted_batches(library, bundle, EngineOptions(exact_batches=batches), cache) == [batches]
    assert wanted_batches(library, bundle, EngineOptions(), cache) == [
        *(Batches((16, 8, 2)), Batches((16, 4)), Batches((16,)))
    ]
    assert wanted_batches(library, bundle, EngineOptions(batch_sizes=(16, 2)), cache) == [Batches((16, 2))]


@pytest.mark.parametrize(
    "text", ["", "1.31.1", "1.7 on a card, batch 0", "batch 16, and more", "batch 16,", "x batch "]
)
def test_a_record_that_tells_no_batches_asks_for_none(text: str) -> None:
    assert Batches.recorded({"fingerprint": {"engine_version": text}}) is None
