"""A bundle that is not byte for byte the exported one is refused, and the refusal names the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from busigen.errors import BusigenError, InputError, IntegrityError
from busigen.registry import BUCKETS, LESION_CLASSES
from busigen.runtime.backends.bundle import MAX_RECORD_BYTES, MAX_TURNS, Bundle, default_bundle
from busigen.runtime.backends.onnx_graph import MAX_GRAPH_BYTES, Graph
from busigen.runtime.backends.onnxruntime import OnnxBackend
from tests.harness.command import ROOT

Info = dict[str, Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(default_bundle(), tmp_path / "bundle"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(folder: Path, change: Callable[[Info], object]) -> None:
    info = json.loads((folder / "bundle.json").read_text())
    change(info)
    (folder / "bundle.json").write_text(json.dumps(info))


def seal(folder: Path, *files: str) -> None:
    """Make the record fit what now stands in the folder, as someone who tampers would."""

    def change(info: Info) -> None:
        for name in files:
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for graph in info["graphs"].values():
                graph["files"].update({name: digest} if name in graph["files"] else {})

    rewrite(folder, change)


def refusal(folder: Path) -> BusigenError:
    with pytest.raises(BusigenError) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)
    assert "busigen export" in caught.value.fix
    return caught.value


def test_the_shipped_bundle_is_whole() -> None:
    bundle = Bundle.open(default_bundle())
    assert set(bundle.info["graphs"]) == set(bundle.graph_names)
    for label in LESION_CLASSES:
        assert all(bundle.graph(f"lesion-{label}@{side}").is_file() for side in BUCKETS)
    assert bundle.sha256 == hashlib.sha256((default_bundle() / "bundle.json").read_bytes()).hexdigest()
    # What a package may weigh (CONTRIBUTING.md).
    assert sum(path.stat().st_size for path in default_bundle().rglob("*")) <= 64_000_000
    assert (default_bundle() / "MODEL_CARD.md").is_file()


def test_a_copy_is_the_same_bundle(bundle: Path) -> None:
    assert Bundle.open(bundle).sha256 == Bundle.open(default_bundle()).sha256


@pytest.mark.parametrize("name", ["context", "decoder@256", "blend-malignant@128"])
def test_tampered_graphs_and_weights_are_refused(bundle: Path, name: str) -> None:
    files = json.loads((bundle / "bundle.json").read_text())["graphs"][name]["files"]
    assert any(file.endswith(".weights") for file in files), "a graph and its weights, in one file or more"
    for file in files:
        whole = (bundle / file).read_bytes()
        flip(bundle / file)
        error = refusal(bundle)
        assert isinstance(error, IntegrityError)
        assert str(bundle / file) in error.problem
        (bundle / file).write_bytes(whole[:-1])
        assert str(bundle / file) in refusal(bundle).problem
        (bundle / file).unlink()
        error = refusal(bundle)
        assert isinstance(error, IntegrityError)
        assert str(bundle / file) in error.problem
        assert "No such file" in error.problem
        (bundle / file).write_bytes(whole)
    Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../evil", "sub/evil", "..", ".", "", ".evil", "..\\evil", "/{absolute}", "a\0b"])
def test_recorded_names_stay_in_the_folder(bundle: Path, name: str) -> None:
    evil = bundle.parent / "evil"
    evil.write_bytes(b"x")
    (bundle / "sub").mkdir()
    shutil.copy(evil, bundle / "sub" / "evil")
    shutil.copy(evil, bundle / ".evil")
    name = name.replace("/{absolute}", str(evil))
    # With the right hash, so that the name alone is what speaks against it.
    rewrite(bundle, lambda info: info["graphs"]["context"]["files"].update({name: hashlib.sha256(b"x").hexdigest()}))
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert "plain name" in error.problem or "cannot be read" in error.problem
    if name.strip("."):
        assert repr(name)[1:-1] in error.problem


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
@pytest.mark.parametrize("kind", ["symlink", "pipe", "folder"])
def test_only_regular_files_are_read(bundle: Path, kind: str) -> None:
    path = bundle / "context.weights"
    path.rename(bundle.parent / "moved")
    if kind == "symlink":
        # The content is right today; what it points to may change after the check.
        path.symlink_to(bundle.parent / "moved")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert str(path) in error.problem
    assert f"is a {'link' if kind == 'symlink' else kind}" in error.problem


def test_a_recorded_file_that_nobody_has_is_refused(bundle: Path) -> None:
    rewrite(bundle, lambda info: info["graphs"]["prior"]["files"].update({"extra.weights": "0" * 64}))
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert "extra.weights" in error.problem


def test_two_hashes_for_one_file_are_refused(bundle: Path) -> None:
    # Window sizes share their weights, so the second record is the one that a careless reader would skip.
    rewrite(bundle, lambda info: info["graphs"]["decoder@256"]["files"].update({"decoder.weights": "0" * 64}))
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert "decoder.weights" in error.problem


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.update(schema=1),
        lambda info: info.update(schema="1"),
        lambda info: info.pop("schema"),
    ],
)
def test_another_schema_is_refused(bundle: Path, change: Callable[[Info], object]) -> None:
    rewrite(bundle, change)
    error = refusal(bundle)
    assert isinstance(error, InputError)
    assert str(bundle / "bundle.json") in error.problem
    assert "this busigen reads 4 or 5 or 6 or 7 or 8." in error.problem


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info["graphs"].pop("prior"),
        lambda info: info["graphs"].update(more=info["graphs"]["prior"]),
        lambda info: info.update(graphs=[]),
        lambda info: info["graphs"].update(prior=[]),
        lambda info: info["graphs"]["prior"].pop("files"),
        lambda info: info["graphs"]["prior"].update(files=["prior.onnx"]),
        lambda info: info["graphs"]["prior"].update(files={}),
        lambda info: info["graphs"]["prior"].update(file="context.onnx"),
        lambda info: info["graphs"]["prior"].update(file=["prior.onnx"]),
        lambda info: info["graphs"]["prior"].pop("file"),
        lambda info: info.update(latent_channels="8"),
        lambda info: info.update(latent_channels=10**9),
        lambda info: info.update(patch=0),
        lambda info: info.pop("patch"),
        lambda info: info.update(frames=[]),
        lambda info: info.update(frames=[[256, 300]]),
        lambda info: info.update(frames=[[1, 256]]),
        lambda info: info.update(frames=[[200.5, 256]]),
        lambda info: info.update(frames=[[256, 256]] * 100_000),
        lambda info: info.update(styles=[[0.1]]),
        lambda info: info.update(styles=[[1e6]] * 32),
        lambda info: info.update(transfer={}),
        lambda info: info["transfer"].update(mean=[0.0]),
        lambda info: info["transfer"]["factor"][3].append(0.1),
        lambda info: info["transfer"]["factor"][3].__setitem__(0, 1e6),
        lambda info: info.update(background_speckle=-0.1),
        lambda info: info.update(background_speckle=float("nan")),
        lambda info: info.update(background_speckle="1"),
        lambda info: info.update(grain_fade=-1.0),
        lambda info: info.update(grain_fade=1e9),
    ],
)
def test_incomplete_records_are_refused(bundle: Path, change: Callable[[Info], object]) -> None:
    rewrite(bundle, change)
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert str(bundle / "bundle.json") in error.problem


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"schema": 5, "preset": "\\ud800"}', "cannot be read"),
        (b"[]", "schema"),
        (b'"bundle"', "schema"),
        (b"{}" + b" " * MAX_RECORD_BYTES, f"at most {MAX_RECORD_BYTES:,} are read"),
    ],
    ids=["empty", "cut", "encoding", "nesting", "surrogate", "list", "string", "huge"],
)
def test_records_that_are_none_are_refused(bundle: Path, content: bytes, named: str) -> None:
    (bundle / "bundle.json").write_bytes(content)
    error = refusal(bundle)
    assert isinstance(error, InputError)
    assert str(bundle / "bundle.json") in error.problem
    assert named in error.problem


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd" / "bundle.json").mkdir(parents=True)
    for name in ("file", "empty", "missing", "odd"):
        error = refusal(tmp_path / name)
        assert isinstance(error, InputError)
        assert str(tmp_path / name) in error.problem


def test_a_graph_that_does_not_load_is_named(bundle: Path) -> None:
    (bundle / "context.onnx").write_bytes(b"not a graph")
    seal(bundle, "context.onnx")
    assert "context.onnx is no ONNX graph" in refusal(bundle).problem
    (bundle / "context.onnx").write_bytes(b"\x08\x08")  # An empty model of version 8.
    seal(bundle, "context.onnx")
    with pytest.raises(IntegrityError, match=r"context\.onnx cannot be loaded") as caught:
        OnnxBackend(Bundle.open(bundle))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../evil.weights", "/{absolute}", "unrecorded.weights", "sub/../context.weights"])
@pytest.mark.parametrize("deep", [False, True], ids=["top", "nested"])
def test_weights_that_nobody_recorded_are_not_read(bundle: Path, place: str, deep: bool) -> None:
    onnx = pytest.importorskip("onnx")
    place = place.replace("/{absolute}", str(bundle.parent / "evil.weights"))
    for target in (bundle.parent / "evil.weights", bundle / "unrecorded.weights"):
        shutil.copy(bundle / "context.weights", target)
    model = onnx.load(str(bundle / "context.onnx"), load_external_data=False)
    moved = onnx.TensorProto.FromString(model.graph.initializer[0].SerializeToString())
    next(entry for entry in moved.external_data if entry.key == "location").value = place
    if deep:
        # Where the weights of a sampling loop lie: in the graph of a node's attribute.
        body = onnx.helper.make_graph([], "body", [], [], initializer=[moved])
        model.graph.node.append(onnx.helper.make_node("If", [], [], then_branch=body, else_branch=body))
    else:
        model.graph.initializer[0].CopyFrom(moved)
    onnx.save(model, str(bundle / "context.onnx"))
    seal(bundle, "context.onnx")
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert f"context.onnx reads weights from {place!r}, which bundle.json does not record" in error.problem


def test_every_graph_names_its_recorded_weights() -> None:
    bundle = Bundle.open(default_bundle())
    for name, record in bundle.info["graphs"].items():
        assert Graph(bundle.graph(name)).external_files() == set(record["files"]) - {record["file"]}


def _turns(graph: Any) -> Any:
    return next(tensor for tensor in graph.initializer if tensor.name == "solver/turns")


def _loop(graph: Any) -> Any:
    return next(node for node in graph.node if node.op_type == "Loop")


def _endless(model: Any) -> None:
    _turns(model.graph).raw_data = (1 << 62).to_bytes(8, "little")


def _one_turn_more(model: Any) -> None:
    _turns(model.graph).raw_data = (MAX_TURNS + 1).to_bytes(8, "little")


def _not_raw(model: Any) -> None:
    _turns(model.graph).ClearField("raw_data")
    _turns(model.graph).int64_data.append(1 << 62)


def _computed(model: Any) -> None:
    """Neither a constant of the graph nor known to be small: a node's result."""
    model.graph.node.insert(0, onnx_helper().make_node("Size", ["noise"], ["many"]))
    _loop(model.graph).input[0] = "many"


def _asked_for(model: Any) -> None:
    """An initialiser that is an input as well is only what the input is if nobody says otherwise."""
    helper = onnx_helper()
    model.graph.input.append(helper.make_tensor_value_info("solver/turns", 7, []))


def _twice(model: Any) -> None:
    """ONNX Runtime takes the last one of a name."""
    model.graph.initializer.append(onnx_helper().make_tensor("solver/turns", 7, [], [1 << 62]))


def _while(model: Any) -> None:
    """A loop that only its condition ends, which stays true."""
    _loop(model.graph).input[0] = ""


def _nested(model: Any) -> None:
    """A loop of MAX_TURNS in each turn of a loop of MAX_TURNS."""
    helper = onnx_helper()
    (attribute,) = _loop(model.graph).attribute
    inner = helper.make_node("Loop", ["solver/turns", ""], [], body=helper.make_graph([], "inner", [], []))
    attribute.g.node.append(inner)


def _scan(model: Any) -> None:
    helper = onnx_helper()
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Scan", [], [], body=body, num_scan_inputs=0))


def _foreign_loop(model: Any) -> None:
    _loop(model.graph).domain = "com.example"


def _function_bomb(model: Any) -> None:
    """Sixty functions, of which each calls the one before it twice."""
    helper = onnx_helper()
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("bomb", 1)]
    step = [helper.make_node("Abs", ["x"], ["y"])]
    for level in range(60):
        model.functions.append(helper.make_function("bomb", f"f{level}", ["x"], ["y"], step, opset))
        step = [
            helper.make_node(f"f{level}", ["x"], ["m"], domain="bomb"),
            helper.make_node(f"f{level}", ["m"], ["y"], domain="bomb"),
        ]
    model.opset_import.append(opset[1])


def onnx_helper() -> Any:
    return pytest.importorskip("onnx").helper


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_endless, f"one of its loops takes {1 << 62} turns; at most {MAX_TURNS} are run"),
        (_one_turn_more, f"one of its loops takes {MAX_TURNS + 1} turns"),
        (_not_raw, "no fixed number of turns"),
        (_computed, "no fixed number of turns"),
        (_asked_for, "no fixed number of turns"),
        (_twice, "no fixed number of turns"),
        (_while, "no fixed number of turns"),
        (_nested, "one of its loops holds another graph"),
        (_scan, "its operator 'Scan' repeats other nodes"),
        (_foreign_loop, "its operator 'Loop' repeats other nodes"),
        (_function_bomb, "it defines functions"),
    ],
)
def test_a_graph_that_may_never_end_is_refused(bundle: Path, change: Callable[[Any], object], said: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(bundle / "mask-benign.onnx"), load_external_data=False)
    change(model)
    (bundle / "mask-benign.onnx").write_bytes(model.SerializeToString())
    seal(bundle, "mask-benign.onnx")
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert f"{bundle / 'mask-benign.onnx'} is no ONNX graph of a bundle: " in error.problem
    assert said in error.problem


def test_a_field_that_only_some_readers_see_is_refused(bundle: Path) -> None:
    """ONNX Runtime drops what a field's number has beyond 32 bits, and would load a graph that nobody looked at."""
    data = (bundle / "mask-benign.onnx").read_bytes()
    at = data.index(b"\x3a")  # The tag of the model's graph; all before it is short.
    assert at < 64
    (bundle / "mask-benign.onnx").write_bytes(data[:at] + b"\xba\x80\x80\x80\x70" + data[at + 1 :])
    seal(bundle, "mask-benign.onnx")
    assert "mask-benign.onnx is no ONNX graph" in refusal(bundle).problem
    # Protobuf in Python alone, which platforms without its wheels get, does not refuse it by itself.
    code = (
        "import sys; from pathlib import Path; from busigen.runtime.backends.onnx_graph import Graph; "
        "Graph(Path(sys.argv[1])).external_files()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, bundle / "mask-benign.onnx"],
        cwd=ROOT,
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: it is no protobuf message" in done.stderr


def test_a_graph_of_gigabytes_is_refused_unread(bundle: Path) -> None:
    with (bundle / "context.onnx").open("r+b") as file:
        file.truncate(2 << 30)  # A hole: hashing it alone would take seconds, and its hash is not even wrong.
    error = refusal(bundle)
    assert isinstance(error, IntegrityError)
    assert "context.onnx' cannot be read" in error.problem
    assert f"at most {MAX_GRAPH_BYTES:,} are read" in error.problem


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_record_that_is_a_pipe_is_not_waited_for(bundle: Path) -> None:
    (bundle / "bundle.json").unlink()
    os.mkfifo(bundle / "bundle.json")
    assert "is a pipe" in refusal(bundle).problem


def test_weights_that_are_no_numbers_end_the_run(bundle: Path) -> None:
    """What a cast makes of NaN is garbage, and a painted lesion of garbage has contrast enough for the gates."""
    weights = np.fromfile(bundle / "encoder.weights", dtype=np.float16)
    weights[:] = np.nan
    weights.tofile(bundle / "encoder.weights")
    seal(bundle, "encoder.weights")
    backend = OnnxBackend(Bundle.open(bundle))
    with pytest.raises(IntegrityError, match=r"encoder-128\.onnx yields NaN or infinity") as caught:
        backend.run("encoder@128", {"pixels": np.zeros((2, 1, 128, 128), np.float32)})
    assert "busigen export" in caught.value.fix


def test_a_graph_in_another_ones_place_is_named(bundle: Path) -> None:
    shutil.copy(bundle / "encoder-256.onnx", bundle / "encoder-128.onnx")
    seal(bundle, "encoder-128.onnx")
    backend = OnnxBackend(Bundle.open(bundle))
    with pytest.raises(IntegrityError, match=r"encoder-128\.onnx cannot be run") as caught:
        backend.run("encoder@128", {"noise": np.zeros((2, 1, 128, 128), np.float32)})
    assert "\n" not in str(caught.value)
