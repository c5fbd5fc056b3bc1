"""What opening a bundle takes is said before it is taken, and refused where there is less."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from busigen.errors import CapacityError
from busigen.runtime.backends import memory
from busigen.runtime.backends.base import open_backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.memory import LARGE, available_memory, memory_of, require_memory
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.progress import Progress
from tests.harness.made_bundles import stated, written

GB = 10**9


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return Bundle.recorded(default_bundle())


def saying(bundle: Bundle, size: int) -> Bundle:
    return replace(bundle, info={**bundle.info, "memory": size})


def machine(root: Path, monkeypatch: pytest.MonkeyPatch, *, available: int, groups: str = "", **files: str) -> None:
    """A system that says so: ``files`` by their paths below the hierarchy of control groups, ``__`` for a slash."""
    (root / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "groups" / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(memory, "_MEMINFO", root / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", root / "cgroup")
    monkeypatch.setattr(memory, "_HIERARCHY", root / "groups")


def test_twice_the_weights_of_every_file_that_is_opened_is_reckoned_with(shipped: Bundle) -> None:
    weights = sum(
        os.path.getsize(shipped.folder / file)
        for name in shipped.graph_names
        for file in shipped.info["graphs"][name]["files"]
        if file.endswith(".weights")
    )
    assert memory_of(shipped) == pytest.approx(2.2 * weights)
    # Graphs that share a file are opened once.
    graphs = dict(shipped.info["graphs"])
    saved = sum(os.path.getsize(shipped.folder / file) for file in graphs["decoder@128"]["files"] if "weights" in file)
    sharing = replace(shipped, info={**shipped.info, "graphs": {**graphs, "decoder@128": graphs["decoder@256"]}})
    assert memory_of(sharing) == pytest.approx(2.2 * (weights - saved))
    assert memory_of(saying(shipped, 5 * GB)) == 5 * GB


def test_the_shipped_bundle_is_opened_without_a_word(shipped: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    require_memory(shipped)
    assert not caplog.records


def test_much_memory_is_said_once_with_what_there_is(
    shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(tmp_path, monkeypatch, available=21 * GB)
    caplog.set_level(logging.INFO)
    require_memory(saying(shipped, 6 * GB))
    assert caplog.messages == ["opening the graphs takes about 6.00 GB of memory; 21.0 GB are available"]
    caplog.clear()
    require_memory(saying(shipped, 6 * GB), 3)
    assert caplog.messages == ["opening the graphs in 3 processes takes about 18.0 GB of memory; 21.0 GB are available"]


def test_large_graphs_are_opened_in_another_way_and_compute_the_same(shipped: Bundle) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 1, 128, 128)).astype(np.float32)
    plain, large = (
        open_backend(bundle).run("encoder@128", {"pixels": pixels}) for bundle in (shipped, saying(shipped, LARGE + 1))
    )
    # Sums in another order.
    np.testing.assert_allclose(large, plain, atol=1e-4 * np.abs(plain).max())


def test_too_little_memory_is_refused_before_a_graph_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "bundle", {**stated(), "memory": 6 * GB})
    bundle = Bundle.open(folder)
    # It could not be opened: the refusal comes first.
    (folder / "context.onnx").unlink()
    machine(tmp_path, monkeypatch, available=5 * GB)
    with pytest.raises(CapacityError, match=r"takes about 6\.00 GB of memory, and 5\.00 GB are available") as caught:
        open_backend(bundle)
    assert caught.value.exit_code == 11 and "--workers" in caught.value.fix
    machine(tmp_path, monkeypatch, available=13 * GB)
    options = GenerateOptions(out=tmp_path / "set", count=4, bundle=folder, provider="cpu", workers=3)
    with pytest.raises(CapacityError, match=r"in 3 processes takes about 18\.0 GB of memory, and 13\.0 GB"):
        options.run(Progress())
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("", {}, 8 * GB),
        (
            "0::/job\n",
            {
                "job__memory-max": f"{4 * GB}\n",
                "job__memory-current": f"{3 * GB}\n",
                "job__memory-stat": f"anon 5\ninactive_file {GB}\nactive_file {GB // 2}\n",
            },
            int(2.5 * GB),
        ),
        # The limit of the group above is the tighter one, and the group's own has none.
        (
            "0::/job/step\n",
            {
                "job__step__memory-max": "max\n",
                "job__memory-max": f"{2 * GB}\n",
                "job__memory-current": f"{GB}\n",
                "job__memory-stat": "inactive_file 0\nactive_file 0\n",
            },
            GB,
        ),
        # Version 1; the path is the host's, and the container has its own group at the top.
        (
            "12:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            {
                "memory__memory-limit_in_bytes": f"{3 * GB}\n",
                "memory__memory-usage_in_bytes": f"{GB}\n",
                "memory__memory-stat": f"inactive_file 7\ntotal_inactive_file {GB // 2}\ntotal_active_file 0\n",
            },
            int(2.5 * GB),
        ),
        ("0::/job\n", {"job__memory-max": "nonsense\n"}, 8 * GB),
    ],
    ids=["none", "v2", "above", "v1", "nonsense"],
)
def test_what_is_available_is_bounded_by_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], left: int
) -> None:
    machine(tmp_path, monkeypatch, available=8 * GB, groups=groups, **files)
    assert available_memory() == pytest.approx(left, abs=1024)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_this_machine_says_what_it_has() -> None:
    found = available_memory()
    assert found is not None and 1 << 20 < found < 1 << 50


def test_a_system_that_says_nothing_refuses_nothing(
    shipped: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert available_memory() is None
    require_memory(saying(shipped, 1 << 43))
