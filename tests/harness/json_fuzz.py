"""JSON files of every kind, mutated, and the commands that read them: whatever comes out has to be an answer of theirs.

``python -m benchmarks.json_fuzz`` runs many of them and counts the answers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
from typer.main import get_command

from busigen.cli import app
from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.errors import BusigenError
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.convert.run import convert
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.progress import Progress
from busigen.runtime.storage.url import Address
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs, reseal
from tests.harness.synthetic_datasets import draw_pairs

RUN = {"count": 4, "seed": 7, "shard_size": 2}
KEY = "2"
BUG = "this is a bug"

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "1", "a", "x" * 5000, "\ud800", "\x1b[2J\n\u202e", "../../etc/passwd", "/dev/zero", "a\0b", "10:2", "1:2:3",
    [], {}, [[]], [None], {"": {}}, {"a": "x"}, {"a": 10**400}, [1, 2], ["x"] * 3, [[1] * 300],
)  # fmt: skip


def mutated(value: Any, rng: random.Random) -> bytes:
    """A JSON value with one thing changed, or its text with some."""
    whole = copy.deepcopy(value)
    places = list(_places(whole))
    kind = rng.randrange(10)
    if kind == 0 or not places:
        return _garbled(json.dumps(whole), rng)
    holder, key = rng.choice(places)
    if kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\x1b", "\ud800", "__class__"])] = holder.pop(key)
    elif kind == 3:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
    elif kind == 4:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 5 and isinstance(holder[key], (int, float)):
        number = holder[key]
        holder[key] = rng.choice([str(number), float(number), -number, number + 1, number * 10**6, bool(number)])
    elif kind == 6:
        for _ in range(150):
            holder[key] = [holder[key]]
    elif kind == 7 and isinstance(holder, dict):
        text = json.dumps(whole)
        return text.replace(f"{json.dumps(key)}:", f"{json.dumps(key)}: {json.dumps(rng.choice(_VALUES))}, "
                            f"{json.dumps(key)}:", 1).encode()  # fmt: skip
    else:
        holder[key] = rng.choice(_VALUES)
    return json.dumps(whole).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _garbled(text: str, rng: random.Random) -> bytes:
    data = bytearray(text.encode())
    at = rng.randrange(len(data) or 1)
    more = rng.choice([b"[", b"}", b'"', b"\xff", b"\0", b"NaN", b"1e999", b"[" * 2000, b"\\ud800", b",", b"9" * 5000])
    data[at : at + rng.choice([0, 1, len(data)])] = more
    return bytes(data) if rng.random() < 0.8 else bytes(data[:at])


@dataclass(frozen=True)
class Reader:
    """Something that reads JSON.

    Attributes:
        name: for the table.
        folder: what it is given a copy of.
        files: in it, of which one is mutated; ``TAR:MEMBER`` for one in a tar, whose shard's record is made to fit.
        read: given the copy.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]


def answer(reader: Reader, place: Path, rng: random.Random) -> tuple[str, str]:
    """Mutate one file of a copy below ``place`` and read it: the answer, an exit code or a bug, and what it said."""
    place.mkdir(exist_ok=True)
    # A lease may still be writing its last beat.
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(shutil.copytree(reader.folder, Path(name) / "it", symlinks=True))
        _mutate(folder, rng.choice(reader.files), rng)
        return _answer(reader, folder)


def _answer(reader: Reader, folder: Path) -> tuple[str, str]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = reader.read(folder)
    except BusigenError as error:
        text = str(error)
        return str(error.exit_code), text if len(text) < 2000 else f"{BUG}: {len(text)} characters are no line"
    except click.exceptions.Exit as done:
        return str(done.exit_code), ""
    except Exception as error:
        return BUG, f"{type(error).__name__}: {error}"[:500]
    return str(code) if isinstance(code, int) else "0", ""


def _mutate(folder: Path, name: str, rng: random.Random) -> None:
    file, _, member = name.partition(":")
    path = folder / file
    if not member:
        path.write_bytes(mutated(json.loads(path.read_bytes()), rng))
        return
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            data = mutated(json.loads(content), rng) if info.name == member else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    reseal(folder, int(path.stem))


def command(*arguments: object) -> int:
    """The real command in this process; what it ends with."""
    code = _busigen()([str(argument) for argument in arguments], prog_name="busigen", standalone_mode=False)
    return code if isinstance(code, int) else 0


@cache
def _busigen() -> click.Command:
    return get_command(app)


class SamplerLike(NoiseSource):
    """A source whose run record is that of a sampler."""

    def __init__(self) -> None:
        # Through a bundle that differs in its name alone, nothing is drawn: what matters is what is read of the record.
        described = {"bundle": Bundle.recorded(default_bundle()).sha256, "checkpoint": "c" * 64, "split_hash": "5" * 64,
                "preset": "compact", "provider": "cpu", "engine_version": "1.24.0", "healthy": "synthetic",
                "classes": {"benign": 0.6, "malignant": 0.4}, "size": "0.1:0.2", "depth": None, "across": None,
                "height_width": "1.2", "birads": "4"}  # fmt: skip
        super().__init__(**described)

    def options(self) -> dict[str, str | None]:
        return {"--bundle": None, "--healthy": "synthetic"}


def readers(place: Path) -> list[Reader]:
    """Everything that reads JSON without torch, with what it reads, made below ``place``."""
    whole, second = place / "set", place / "second"
    generate(SamplerLike(), whole, **RUN)
    generate(SamplerLike(), second, **{**RUN, "seed": 8})
    parts = place / "parts"
    merge(parts, [whole, second])
    prepared = _prepared(place)
    converted = place / "converted"
    convert(whole, converted, to="files")
    locked = place / "locked"
    shutil.copytree(whole, locked)
    (locked / "dataset.json").unlink()
    (locked / "shards" / "000001.json").unlink()
    (locked / ".lock").write_text(json.dumps({"mark": "00ff", "holder": "process 1 on elsewhere", "beat": 3}))
    bundle = small_bundle(place / "bundle")
    top = ("run.json", "dataset.json")
    of_set = (*top, "shards/000001.json", "shards/000001.tar:000000002.json")
    of_parts = ("dataset.json", "parts/000/dataset.json", "parts/001/run.json", "parts/000/shards/000001.json")
    return [
        Reader("verify", whole, of_set, lambda it: command("verify", it)),
        Reader("verify, in parts", parts, of_parts, lambda it: command("verify", it)),
        Reader("verify, at a URL", whole, of_set, lambda it: command("verify", it.as_uri())),
        Reader("verify --repair", whole, of_set, lambda it: repair(it, inputs=NoiseInputs(source=SamplerLike()))),
        Reader("verify --repair, in parts", parts, of_parts, lambda it: command("verify", "--repair", it)),
        Reader("explain", whole, of_set, lambda it: command("explain", it, KEY, "--no-replay")),
        Reader("explain --json", whole, of_set, lambda it: command("explain", it, KEY, "--no-replay", "--json")),
        Reader("explain, replayed", whole, of_set, _replayed),
        Reader("explain, in parts", parts, of_parts, lambda it: command("explain", it, f"000/{KEY}", "--no-replay")),
        Reader("explain, at a URL", whole, of_set, lambda it: command("explain", it.as_uri(), KEY, "--no-replay")),
        Reader("merge", whole, of_set, lambda it: command("merge", it.parent / "all", it, second)),
        Reader("merge, of parts", parts, of_parts, lambda it: command("merge", it.parent / "all", it, _third(place))),
        Reader("convert", whole, of_set, lambda it: command("convert", it, "--to", "coco", "--out", it.parent / "all")),
        Reader("convert, in parts", parts, of_parts, lambda it: convert(it, it.parent / "all", to="files", limit=3)),
        Reader("convert, continued", converted, ("convert.json",), lambda it: convert(whole, it, to="files")),
        Reader("generate, continued", whole, of_set[:3], lambda it: generate(SamplerLike(), it, **RUN)),
        Reader("generate, at a URL", locked, (".lock", "run.json", "shards/000000.json"), _continued),
        Reader("the run opened again", whole, top, _opened),
        Reader("bundle", bundle, ("bundle.json",), _bundle),
        Reader("audit, a dataset", whole, of_set, _set),
        Reader("prepared folder", prepared, ("prepared.json",), lambda it: Prepared.open(it).split_hash),
        Reader("prepare, again", prepared, ("prepared.json",), lambda it: prepare([place / "pairs"], it)),
    ]  # fmt: skip


@cache
def _third(place: Path) -> Path:
    generate(SamplerLike(), place / "third", **{**RUN, "seed": 9})
    return place / "third"


def _replayed(folder: Path) -> None:
    explain(folder, KEY, inputs=NoiseInputs(source=SamplerLike()), out=folder.parent / "out").to_json()


def _continued(folder: Path) -> None:
    from busigen.runtime.output.ownership import Beat
    from busigen.runtime.output.remote import RemoteOutput

    beat = Beat(every=0.02, dead=0.06, settle=0.0)
    destination = RemoteOutput(Address(folder.as_uri()), folder.parent / "spools", progress=Progress(), beat=beat)
    generate(SamplerLike(), destination, **RUN)


def _opened(folder: Path) -> None:
    from busigen.runtime.maintenance.replay import recorded_conditions
    from busigen.runtime.maintenance.verify import read_run

    run = read_run(folder)
    Inputs().recorded_bundle(run)
    recorded_conditions(run)


def _bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for name in bundle.info["graphs"]:
        assert bundle.graph(name).is_file()
        np.zeros(bundle.fresh(name)), bundle.call_side(name), bundle.inputs(name), bundle.constants(name)
    for side in bundle.windows:
        np.zeros(bundle.latent_shape(side))
    np.zeros(bundle.background_shape), np.zeros(bundle.code_length), bundle.patch + 1
    assert bundle.background_speckle + 1 and bundle.grain_fade + 1
    assert all(height + width for height, width in bundle.frames())
    for part in (bundle.styles, bundle.transfer and bundle.transfer.factor):
        assert part is None or np.isfinite(part).all()
    json.dumps([bundle.info.get(name) for name in ("checkpoint", "split_hash", "preset")], ensure_ascii=False).encode()


def _set(folder: Path) -> None:
    from busigen.evaluation.reading.sets import read_set

    read_set(folder, limit=3)


def small_bundle(folder: Path) -> Path:
    """The shipped bundle's record, in schema 6, beside graphs of no weights, so that opening it takes no time."""
    import hashlib

    folder.mkdir()
    info = json.loads((default_bundle() / "bundle.json").read_text())
    graph = (default_bundle() / "context.onnx").read_bytes()
    digest = hashlib.sha256(graph).hexdigest()
    info |= {"schema": 6, "resolution": 256, "latent_factor": 8, "windows": {"128": 128, "256": 256}}
    info |= {"background": {"decoder": "decoder@256", "latent_channels": 8}}
    for record in info["graphs"].values():
        record["files"] = dict.fromkeys([record["file"], "context.weights"], digest)
        (folder / record["file"]).write_bytes(graph)
    (folder / "context.weights").write_bytes(graph)
    (folder / "bundle.json").write_text(json.dumps(info))
    return folder


def training_readers(place: Path) -> list[Reader]:
    """Everything that reads JSON with torch, with what it reads, made below ``place``."""
    from busigen.evaluation.context import Figure, Finding, Interval, SectionResult, store
    from busigen.files import write_json
    from busigen.training.recipe import recipe_for
    from tests.harness.checkpoints import untrained

    prepared = Prepared.open(_prepared(place))
    checkpoint = untrained(place / "checkpoint")
    recipe = recipe_for("tiny")
    run = Path(shutil.copytree(checkpoint, place / "run"))
    (run / "busigen.json").unlink()
    write_json(run / "run.json", {"recipe": recipe.to_dict(), "split_hash": prepared.split_hash})
    (run / "done").mkdir()
    for task in recipe.tasks:
        figures = {"steps": 2, "kept": 2, "validation": [[2, 0.5]], "seconds": 1.0}
        more = {"autoencoder": {"latents": {"mean": [0.0] * 4, "std": [1.0] * 4}}, "prior": {"styles": []}}
        write_json(run / "done" / f"{task.name}.json", {**figures, **more.get(task.name, {})})
    report = place / "report"
    figure = Figure("physics.a", "A", Interval(1.0, 0.5), Interval(0.5), 10, 10, p=0.5)
    result = SectionResult("physics", [figure], [Finding("note", "Text.", ("physics.a",))], details={"a": [1.0, None]})
    store(report, "key", result)
    write_json(report / "training.json", {"key": "key", "test": [[1, 2, 3]], "test_offsets": [[0.5, 1.0], None]})
    entry = place / "engines"
    _engines(entry).write("kind", {"a": 1}, b"engine", made_by="x")
    (record,) = (path.relative_to(entry).as_posix() for path in entry.rglob("record.json"))
    configs = ("base/context", "base/autoencoder", "merged/mask-benign", "merged/lesion-malignant")
    markers = tuple(f"done/{name}.json" for name in ("autoencoder", "prior", "finish", "mask"))
    return [
        Reader("checkpoint as a base", checkpoint, ("busigen.json",), _base),
        Reader("checkpoint to export", checkpoint, ("busigen.json",), _reported),
        Reader("networks to export", checkpoint, tuple(f"{name}/config.json" for name in configs), _networks),
        Reader("train, continued", run, ("run.json", *markers), lambda it: _trained(it, prepared, recipe)),
        Reader("audit, continued", report, ("sections/physics/result.json", "training.json"), _report),
        Reader("cache of engines", entry, (record,), lambda it: _cached(it)),
    ]


def _prepared(place: Path) -> Path:
    if not (place / "prepared").exists():
        prepare([draw_pairs(place / "pairs", labels=True)], place / "prepared")
    return place / "prepared"


def _base(folder: Path) -> None:
    from busigen.training.checkpoint import Base

    base = Base.open(folder)
    json.dumps([base.identity, base.recipe().to_dict(), base.recipe(retrain=["lesion"]).to_dict()])
    base.copy(folder.parent / "copy", base.recipe())


def _reported(folder: Path) -> None:
    """What export reads of a record, but for the graphs."""
    from busigen.export.report import model_card
    from busigen.registry import PRESETS
    from busigen.training.checkpoint import read_record

    record = read_record(folder)
    shipped = json.loads((default_bundle() / "bundle.json").read_text())
    model_card(record, {**shipped, "preset": PRESETS[record["preset"]].latent_channels})
    json.dumps({**record["versions"], "recipe": record["recipe"]})


def _networks(folder: Path) -> None:
    from busigen.training.checkpoint import load_networks

    load_networks(folder)


def _trained(folder: Path, prepared: Prepared, recipe: Any) -> None:
    import torch
    from rich.console import Console

    from busigen.training.claim import claim
    from busigen.training.pipeline import _Run

    claim(folder, recipe, prepared)
    _Run(prepared, folder, recipe, None, torch.device("cpu"), Console(file=io.StringIO())).execute()


def _report(folder: Path) -> None:
    from busigen.evaluation.context import jsonable, load
    from busigen.evaluation.report.page import write_html
    from busigen.evaluation.utility.training import _kept, _outcome

    found = load(folder, "physics", "key")
    if found is not None:
        content = {"sections": [jsonable(found.to_dict())], "inputs": {}}
        write_html(content, folder)
    kept = _kept(folder / "training.json", "key")
    if kept is not None:
        _outcome("real", 0, "held_out", kept)


def _engines(folder: Path) -> Any:
    from busigen.runtime.backends.tensorrt.engine_builder import Cache

    return Cache(folder)


def _cached(folder: Path) -> None:
    cache = _engines(folder)
    cache.read("kind", {"a": 1})
    cache.keys("kind")
