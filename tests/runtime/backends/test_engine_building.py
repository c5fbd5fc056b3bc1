"""Engines built for real, by TensorRT for RTX, which needs no card for that."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from busigen.errors import CapacityError, InputError, UsageError
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnx_graph import with_conditions
from busigen.runtime.backends.probe import driver_cuda
from busigen.runtime.backends.tensorrt.backend import trial_engine
from busigen.runtime.backends.tensorrt.engine_builder import (
    CONTENT,
    KIND,
    RECORD,
    BuildRequest,
    Cache,
    EngineBuilder,
    kept_batches,
    key_of,
)
from busigen.runtime.backends.tensorrt.library import (
    BuildSpec,
    Library,
    build,
    capabilities,
    check_capability,
    parsed,
)
from busigen.runtime.backends.tensorrt.profiles import Batches, Profile
from busigen.runtime.storage.lock import LOCK_FILE
from tests.harness.checkpoints import untrained
from tests.harness.command import CLI, ROOT, error_line, run
from tests.harness.engine_library import TARGET, rtx

GRAPHS = Bundle.recorded(default_bundle()).graph_names

SMALL = "encoder@128"
"""The graph that builds fastest."""


@pytest.fixture(scope="module")
def library() -> Library:
    return rtx()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_bundle())


def model_of(
    *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, weights: tuple[TensorProto, ...] = ()
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "tests",
        [helper.make_tensor_value_info("x", kind, ["batch", 3, 3])],
        [helper.make_tensor_value_info("y", kind, None)],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def spec(model: ModelProto | bytes, capability: str = "") -> BuildSpec:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return BuildSpec("test", Path("test.onnx"), content, [Profile(4, 4, 4)], capability)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_of_the_shipped_bundle_is_parsed(library: Library, bundle: Bundle, graph: str) -> None:
    """That each becomes an engine takes minutes (below, slow); that its operators are taken, a tenth of a second."""
    path = bundle.graph(graph)
    parsed(library, BuildSpec(graph, path, path.read_bytes(), []))


def test_a_network_of_one_node_becomes_an_engine(library: Library) -> None:
    engine = trial_engine(library)
    # The plan's magic number, then its version: the library reads it from there.
    assert len(engine) > library.module.Runtime(library.logger).engine_header_size


def test_an_operator_that_is_refused_is_named_with_its_node(library: Library) -> None:
    model = model_of(
        helper.make_node("Relu", ["x"], ["r"], name="first"), helper.make_node("Det", ["r"], ["y"], name="stage/odd")
    )
    with pytest.raises(InputError, match=r"test.onnx .*tensorrt-rtx 1\..*operator Det, node 'stage/odd'") as caught:
        build(library, spec(model))
    assert "--provider" in caught.value.fix


def test_a_bundle_with_an_operator_that_is_refused_is_refused_before_anything_is_built(
    library: Library, tmp_path: Path
) -> None:
    """The last graph of all is the odd one, and is named."""
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle(), folder)
    record = json.loads((folder / "bundle.json").read_text())
    odd = record["graphs"][GRAPHS[-1]]
    model = onnx.load(folder / odd["file"], load_external_data=False)
    model.graph.node.append(helper.make_node("Det", [model.graph.input[0].name], ["odd"], name="stage/odd"))
    onnx.save(model, folder / odd["file"])
    odd["files"][odd["file"]] = hashlib.sha256((folder / odd["file"]).read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(record))
    cache = Cache(tmp_path / "cache")
    with pytest.raises(InputError, match=rf"{odd['file']} .*operator Det, node 'stage/odd'"):
        EngineBuilder(library, Bundle.open(folder), Batches((2,)), cache).make_all()
    assert not cache.keys(KIND)


def test_graphs_that_share_a_file_get_one_engine(library: Library, bundle: Bundle, tmp_path: Path) -> None:
    graphs = {**bundle.info["graphs"], "decoder@128": bundle.info["graphs"]["decoder@256"]}
    sharing = replace(bundle, info={**bundle.info, "graphs": graphs})
    lacking = EngineBuilder(library, sharing, Batches((2,)), Cache(tmp_path)).lacking()
    assert set(GRAPHS) - set(lacking) == {"decoder@256"}
    assert BuildRequest([TARGET]).count(sharing) == len(GRAPHS) - 1


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x00" * 100], ids=["empty", "text", "zeros"])
def test_what_is_no_graph_is_refused_by_its_name(library: Library, content: bytes) -> None:
    with pytest.raises(InputError, match=r"test\.onnx"):
        build(library, spec(content))


def test_a_graph_in_fp16_is_built_as_it_is_typed(library: Library) -> None:
    kernel = numpy_helper.from_array(np.eye(3, dtype=np.float16), "kernel")
    model = model_of(helper.make_node("MatMul", ["x", "kernel"], ["y"]), kind=TensorProto.FLOAT16, weights=(kernel,))
    assert build(library, spec(model))


def test_a_card_that_cannot_compute_it_is_named(library: Library) -> None:
    """Turing has no matrix products in fp32 here: the library says so, and so does the error."""
    kernel = numpy_helper.from_array(np.eye(3, dtype=np.float32), "kernel")
    model = model_of(helper.make_node("MatMul", ["x", "kernel"], ["y"]), weights=(kernel,))
    assert build(library, spec(model, "8.9"))
    with pytest.raises(UsageError, match=r"compute capability 7\.5.*(Turing|SM75)"):
        build(library, spec(model, "7.5"))


@pytest.mark.parametrize("capability", ["9", "8.7.1", "100.0", "sm89", "3.5", " 8.9"])
def test_a_compute_capability_that_is_none_is_refused_with_those_that_are(library: Library, capability: str) -> None:
    with pytest.raises(UsageError, match="--compute-capability") as caught:
        check_capability(library, capability)
    assert "8.9" in caught.value.fix
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(capabilities(library))


def test_a_loop_without_a_condition_computes_the_same_with_one(bundle: Bundle) -> None:
    """ONNX Runtime runs the rewritten graph to the same bits, and every file of the bundle stays as it was."""
    import onnxruntime as ort

    path = bundle.graph("mask-benign")
    content = path.read_bytes()
    changed = with_conditions(content)
    assert changed != content
    rng = np.random.default_rng(0)
    inputs = {
        "noise": rng.standard_normal((2, bundle.code_length)).astype(np.float32),
        "tokens": rng.standard_normal((2, 256, 128)).astype(np.float32),
        "keep": np.ones((2, 256), np.float32),
        "asked": np.zeros((2, 12), np.float32),
    }
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    outputs = [
        ort.InferenceSession(given, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for given in (content, changed)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("graph", ["context", "encoder@128", "decoder@256"])
def test_a_graph_without_a_loop_stays_as_it_is(bundle: Bundle, graph: str) -> None:
    content = bundle.graph(graph).read_bytes()
    assert with_conditions(content) == content


@pytest.mark.parametrize("batches", [Batches((4, 2)), Batches((4,), dynamic=True)], ids=["static", "dynamic"])
def test_an_engine_is_built_once_and_again_where_it_was_damaged(
    library: Library, bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, batches: Batches
) -> None:
    cache = Cache(tmp_path / "cache")
    builder = EngineBuilder(library, bundle, batches, cache)
    first, engine = builder.make(SMALL)
    assert not first.cached and first.seconds > 0 and first.size == len(engine)
    again, kept = EngineBuilder(library, bundle, batches, Cache(cache.folder)).make(SMALL)
    assert again.cached and kept == engine

    content = cache.entry(KIND, key_of(library, bundle, SMALL, batches, "")) / CONTENT
    content.write_bytes(engine[:-1] + bytes([engine[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        repaired, whole = builder.make(SMALL)
    assert "sha256" in caplog.text
    assert not repaired.cached and content.read_bytes() == whole


def test_engines_of_another_version_are_built_again_and_it_is_said_once(
    library: Library, bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, batches = Cache(tmp_path / "cache"), Batches((2,))
    for graph in (SMALL, "encoder@256"):
        old = {**key_of(library, bundle, graph, batches, ""), "version": "1.0.0"}
        cache.write(KIND, old, b"an engine of an older library")
    builder = EngineBuilder(library, bundle, batches, cache)
    with caplog.at_level(logging.INFO):
        made = [builder.make(graph)[0] for graph in (SMALL, "encoder@256")]
    assert not any(one.cached for one in made)
    assert caplog.text.count("built again") == 1
    assert "version 1.0.0" in caplog.text


def test_engines_for_another_card_are_built_again_and_it_is_said_once(
    library: Library, bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, batches = Cache(tmp_path / "cache"), Batches((2,))
    cache.write(KIND, key_of(library, bundle, SMALL, batches, "9.0"), b"an engine for another card")
    builder = EngineBuilder(library, bundle, batches, cache, capability="8.9")
    with caplog.at_level(logging.INFO):
        made = [builder.make(SMALL)[0] for _ in range(2)]
    assert [one.cached for one in made] == [False, True]
    assert made[0].size > 1000, "not the other card's"
    assert caplog.text.count("built again") == 1
    assert "compute capability 9.0" in caplog.text


class Cramped:
    """TensorRT's module on a machine whose memory holds so many rows: its builder then says and does what it would."""

    def __init__(self, library: Library, rows: int) -> None:
        self._real, self._said, self._rows = library.module, library.said, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Builder(self, logger: Any) -> Any:
        real, said, limit = self._real.Builder(logger), self._said, self._rows
        profiles: list[Any] = []

        class Builder:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def create_optimization_profile(self) -> Any:
                profiles.append(real.create_optimization_profile())
                return profiles[-1]

            def build_serialized_network(self, network: Any, config: Any) -> Any:
                largest = [tuple(profile.get_shape(network.get_input(0).name)[2]) for profile in profiles]
                if max(shape[0] for shape in largest) > limit:
                    said.append("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)")
                    return None
                return real.build_serialized_network(network, config)

        return Builder()


@pytest.mark.parametrize(("rows", "proposed"), [(5, 4), (1, 0)])
def test_a_batch_that_cannot_be_built_for_is_refused_with_one_that_can(
    library: Library, bundle: Bundle, tmp_path: Path, rows: int, proposed: int
) -> None:
    cramped = replace(library, module=Cramped(library, rows))
    with pytest.raises(
        CapacityError, match=rf"{SMALL} for 16 rows: the memory does not suffice.*out of memory"
    ) as caught:
        EngineBuilder(cramped, bundle, Batches((16, 4)), Cache(tmp_path)).make(SMALL)
    assert (caught.value.exit_code, caught.value.fits) == (11, proposed)
    assert (f"--batch-size {proposed}," if proposed else "No batch fits") in caught.value.fix
    assert not Cache(tmp_path).keys(KIND)


def test_the_key_changes_with_all_that_an_engine_depends_on(library: Library, bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "bundle.json"
    info = json.loads(path.read_text())

    def key(batches: Batches = Batches((16,)), capability: str = "", graph: str = SMALL) -> dict:  # noqa: B008
        return dict(key_of(library, Bundle(path.parent, info, ""), graph, batches, capability))

    def changed(change) -> dict:
        nonlocal info
        before = json.loads(json.dumps(info))
        change(info["graphs"][SMALL])
        try:
            return key()
        finally:
            info = before

    ordinary = key()
    assert key() == ordinary
    record = info["graphs"][SMALL]
    others = [
        key(Batches((16, 4))),
        key(Batches((16,), dynamic=True)),
        key(Batches((8,))),
        key(capability="8.9"),
        key(graph="encoder@256"),
        changed(lambda record: record["files"].update({record["file"]: "0" * 64})),
        # Weights alone: an adapter's, whose graph may be the same bytes.
        changed(
            lambda record: record["files"].update({name: "1" * 64 for name in record["files"] if "weights" in name})
        ),
        changed(lambda record: record.update(precision="fp16")),
    ]
    assert len(record["files"]) == 2
    texts = {json.dumps(other, sort_keys=True) for other in others}
    assert len(texts) == len(others) and json.dumps(ordinary, sort_keys=True) not in texts


def test_what_was_built_ahead_is_what_a_run_finds(library: Library, bundle: Bundle, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert kept_batches(library, bundle, cache, 16) == []
    built = [Batches((16, 4)), Batches((16,)), Batches((16,), dynamic=True), Batches((8,)), Batches((8, 2))]
    for batches in built:
        cache.write(KIND, key_of(library, bundle, "context", batches, "8.9"), b"engine")
    assert kept_batches(library, bundle, cache, 16) == built[:3]
    assert kept_batches(library, bundle, cache, 8) == [built[4], built[3]]
    # One graph's engine is not a bundle's.
    assert EngineBuilder(library, bundle, built[0], cache, capability="8.9").lacking()


def test_a_graph_that_changes_under_the_run_is_refused(library: Library, tmp_path: Path) -> None:
    shutil.copytree(default_bundle(), tmp_path / "copy")
    opened = Bundle.open(tmp_path / "copy")
    path = opened.graph(SMALL)
    path.write_bytes(path.read_bytes() + b"\n\0")
    cache = Cache(tmp_path / "cache")
    with pytest.raises(Exception, match="has changed since the bundle was opened") as caught:
        EngineBuilder(library, opened, Batches((2,)), cache).make(SMALL)
    assert getattr(caught.value, "exit_code", 1) == 5
    assert not cache.keys(KIND)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--target", "tensorrt_rtx"), 2, "unknown target 'tensorrt_rtx'"),
        (("--target", "onnx"), 2, "unknown target 'onnx'. Choose from: tensorrt"),
        (("--target", TARGET, "--batch-size", "0"), 2, "--batch-size is '0'"),
        (("--target", TARGET, "--compute-capability", "1.0"), 2, "--compute-capability '1.0'"),
        (("--target", TARGET, "--bundle", "nowhere"), 3, "nowhere is no bundle"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_is_built(tmp_path: Path, arguments, code: int, said: str) -> None:
    rtx()
    done = run("build-engines", *arguments, "--out", tmp_path / "cache")
    assert said in error_line(done, code)
    assert not (tmp_path / "cache").exists()


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path: Path) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        line = error_line(run("build-engines", "--target", "tensorrt", "--out", tmp_path / "cache"), 7)
        assert "tensorrt" in line and "pip install" in line and "[tensorrt]" in line
    else:
        pytest.skip("tensorrt is installed here")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_kill_while_engines_are_built_keeps_the_finished_ones_alone(tmp_path: Path) -> None:
    """Killed once an engine is there and others are being built: no half entry, and a rerun builds the rest alone."""
    rtx()
    folder = tmp_path / "cache"
    order = ["build-engines", "--target", TARGET, "--batch-size", "2", "--out", str(folder), "--json"]
    process = subprocess.Popen([*CLI, *order], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob(f"{KIND}/*/{RECORD}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    finished = {path.parent.name for path in folder.glob(f"{KIND}/*/{RECORD}")}
    assert 1 <= len(finished) < len(GRAPHS)

    done = subprocess.run([*CLI, *order], cwd=ROOT, capture_output=True, text=True, timeout=900, check=True)
    engines = json.loads(done.stdout)["engines"]
    assert [engine["graph"] for engine in engines] == list(GRAPHS)
    assert sum(engine["cached"] for engine in engines) == len(finished)
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    # An entry that was finished keeps the file of a lock that died with its holder; nothing half-written is there.
    assert left - {LOCK_FILE} == {CONTENT, RECORD}


@pytest.mark.slow
@pytest.mark.parametrize("size", [("16,4",), ("16", "--dynamic")], ids=["static", "dynamic"])
def test_every_graph_of_the_shipped_bundle_becomes_an_engine(tmp_path: Path, size: tuple[str, ...]) -> None:
    """One to four minutes on two cores."""
    rtx()
    order = ("build-engines", "--target", TARGET, "--out", tmp_path / "cache", "--json", "--batch-size", *size)
    done = subprocess.run([*CLI, *map(str, order)], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [engine["graph"] for engine in report["engines"]] == list(GRAPHS)
    for engine in report["engines"]:
        assert not engine["cached"] and engine["bytes"] > 100_000
    profiles = {engine["graph"]: engine["profiles"] for engine in report["engines"]}
    assert profiles["context"] == ([[2, 16, 16]] if "--dynamic" in size else [[16, 16, 16], [4, 4, 4]])


@pytest.mark.slow
def test_export_leaves_engines_of_a_tiny_bundle_in_fp16_where_a_run_finds_them(tmp_path: Path) -> None:
    """About three minutes: an export of a checkpoint that was never trained, and its sixteen engines of either kind."""
    rtx()
    untrained(tmp_path / "checkpoint")

    def described(*arguments: object) -> str:
        environment = {**os.environ, "BUSIGEN_CACHE": str(tmp_path / "cache")}
        command = [*CLI, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1800, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    bundle, batches = tmp_path / "bundle", ("--batch-size", "4,2", "--target", TARGET)
    exported = described(
        *("export", tmp_path / "checkpoint", "--out", bundle, "--precision", "fp16", "--draws", 8),
        *("--target", "onnx", *batches, "--report", tmp_path / "report.md"),
    )
    if driver_cuda() is None:
        assert f"parity {TARGET}: not compared: this machine has no NVIDIA driver" in exported
        assert f"{TARGET} (this machine has no NVIDIA driver)" in (tmp_path / "report.md").read_text()
    assert f"{len(GRAPHS)} engines built" in exported
    engines = json.loads(described("build-engines", "--bundle", bundle, *batches, "--json"))["engines"]
    assert all(engine["cached"] for engine in engines)
    assert "fp16" in {engine["precision"] for engine in engines}
    dynamic = described(
        "build-engines", "--bundle", bundle, "--target", TARGET, "--batch-size", 4, "--dynamic", "--json"
    )
    profiles = {engine["graph"]: engine["profiles"] for engine in json.loads(dynamic)["engines"]}
    assert set(profiles) == set(GRAPHS) and profiles["context"] == [[2, 4, 4]]
