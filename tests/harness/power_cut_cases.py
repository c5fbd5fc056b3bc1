"""The commands that are cut off by `tests.harness.power_cut`: from generate and prepare to train and export."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from busigen.data.prepare import prepare
from busigen.data.prepared import FILES, INFO
from busigen.files import TEMPORARY_PREFIX
from busigen.runtime.convert.base import WORK_FOLDER
from busigen.runtime.convert.run import RECORD, convert
from busigen.runtime.dataset.shards import shard_path
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.power_cut import Case
from tests.harness.replaying import NoiseInputs, flip, truncate
from tests.harness.synthetic_datasets import draw_pairs

COUNT, SHARD_SIZE = 8, 2
OUT = Path("deep/er/out")
"""Where a command writes; the folders above it are its own making."""


def _nothing(root: Path) -> None:
    pass


def _made(folder: Path) -> dict[str, str]:
    """The hashes of all files but locks and temporary ones."""
    return {
        name: digest
        for name, digest in hashes(folder).items()
        if TEMPORARY_PREFIX not in name and not Path(name).name.startswith(".lock")
    }


def _torn(root: Path, whole: Path) -> list[str]:
    """Files with a final name whose bytes are not those of an undisturbed run."""
    right = _made(whole)
    return [f"{name} is torn" for name, digest in _made(root).items() if right.get(name) != digest]


def _differs(root: Path, whole: Path) -> bool:
    return _made(root / OUT) != _made(whole / OUT)


def _dataset_faults(root: Path, whole: Path) -> list[str]:
    out, faults = root / OUT, _torn(root, whole)
    for record in out.glob("shards/[0-9]*.json"):
        number = int(record.stem)
        faults += [
            f"{path} is missing"
            for path in (shard_path(number, kind) for kind in ("tar", "parquet"))
            if not (out / path).exists()
        ]
    if (out / "dataset.json").exists():
        faults += [f"{name} is missing" for name in sorted(_made(whole).keys() - _made(root).keys())]
    return faults


def _generate(root: Path) -> None:
    generate(NoiseSource(), root / OUT, count=COUNT, seed=7, shard_size=SHARD_SIZE)


def generating(inputs: Path) -> Case:
    return Case(_nothing, _generate, _dataset_faults, _differs)


def merging(inputs: Path) -> Case:
    def work(root: Path) -> None:
        if not (root / OUT).exists():
            merge(root / OUT, [inputs / "front", inputs / "back"])

    return Case(_nothing, work, _dataset_faults, _differs)


def _damage(root: Path) -> None:
    _generate(root)
    flip(root / OUT / shard_path(1, "tar"))
    (root / OUT / shard_path(2, "parquet")).unlink()
    truncate(root / OUT / "manifest.parquet")


def repairing(inputs: Path) -> Case:
    _damage(inputs)
    before = _made(inputs)

    def faults(root: Path, whole: Path) -> list[str]:
        """What was damaged may be as it was; everything else is whole and there."""
        right, now = _made(whole), _made(root)
        torn = [f"{name} is torn" for name, digest in now.items() if digest not in (right.get(name), before.get(name))]
        return torn + [f"{name} is lost" for name, digest in before.items() if right[name] == digest != now.get(name)]

    return Case(_damage, lambda root: repair(root / OUT, inputs=NoiseInputs()), faults, _differs)


def preparing(inputs: Path) -> Case:
    def faults(root: Path, whole: Path) -> list[str]:
        """A file may be torn as long as nothing vouches for it."""
        if not (root / OUT / INFO).exists():
            return []
        return _torn(root, whole) + [f"{name} is missing" for name in FILES if not (root / OUT / name).exists()]

    return Case(_nothing, lambda root: prepare([inputs / "images"], root / OUT), faults, _differs)


def preparing_again(inputs: Path) -> Case:
    """More images into a prepared folder: until the new files are there, the old ones stand or nothing vouches."""

    def begin(root: Path) -> None:
        prepare([inputs / "images"], root / OUT)

    begin(inputs)
    before = {name: digest for name, digest in _made(inputs).items() if name.startswith(f"{OUT}/")}

    def faults(root: Path, whole: Path) -> list[str]:
        now, right = _made(root), _made(whole)
        record = now.get(f"{OUT}/{INFO}")
        if record is None:
            return []
        wanted = right if record == right[f"{OUT}/{INFO}"] else before
        return [f"{name} is missing or torn" for name, digest in wanted.items() if now.get(name) != digest]

    def work(root: Path) -> None:
        prepare([inputs / "images", inputs / "more"], root / OUT)

    return Case(begin, work, faults, _differs)


def _weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in _made(folder).items() if name.endswith((".safetensors", ".npz"))}


def _training_faults(root: Path, whole: Path) -> list[str]:
    """Of every task that is marked as done, and of a finished checkpoint, all weights are there and whole."""
    out, right, now = root / OUT, _weights(whole / OUT), _weights(root / OUT)
    final = {name: digest for name, digest in right.items() if not name.startswith(("state/", "cache/"))}
    wanted = dict(final) if (out / "busigen.json").exists() else {}
    for marker in out.glob("done/[a-z]*.json"):
        json.loads(marker.read_bytes())
        name = "autoencoder" if marker.stem == "decoder" else marker.stem
        places = ("healed.npz",) if name == "heal" else (f"merged/{name}/", f"adapters/{name}/")
        wanted |= {path: digest for path, digest in final.items() if path.startswith(places)}
        wanted |= {path: "" for path in final if path.startswith(f"base/{name}/")}  # A later task trains it further.
    return [
        f"{name} is missing or torn"
        for name, digest in wanted.items()
        if name not in now or now[name] not in (digest or now[name],)
    ] + [f"{name} is torn" for name in _torn_json(out)]


def _torn_json(out: Path) -> list[str]:
    found = []
    for path in out.rglob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            if TEMPORARY_PREFIX not in str(path) and not path.name.startswith("events"):
                found.append(path.name)
    return found


def _other_weights(root: Path, whole: Path) -> bool:
    return _weights(root / OUT) != _weights(whole / OUT) or not (root / OUT / "busigen.json").exists()


def training(inputs: Path) -> Case:
    from busigen.training.pipeline import train
    from busigen.training.recipe import recipe_for

    def work(root: Path) -> None:
        quiet = Console(file=io.StringIO())
        train(inputs / "prepared", root / OUT, recipe_for("tiny", scale=1e-9), device="cpu", console=quiet)

    return Case(_nothing, work, _training_faults, _other_weights)


def saving(inputs: Path) -> Case:
    """What training writes, without the training: components, a state file, healed images and the record."""
    import numpy as np
    import torch

    from busigen.training.rollouts import save_healed
    from busigen.training.trainer import save_state
    from tests.harness.checkpoints import untrained

    def work(root: Path) -> None:
        out = root / OUT
        save_state(out / "state" / "prior.safetensors", {"weight": torch.arange(4096.0)}, {"step": 1})
        save_healed(out / "healed.npz", [1, 2], np.zeros((2, 1, 8, 8), np.uint8))
        untrained(out)

    return Case(_nothing, work, _training_faults, _other_weights)


def exporting(inputs: Path) -> Case:
    from busigen.export.exporter import export
    from busigen.export.request import Options

    def work(root: Path) -> None:
        if not (root / OUT).exists():
            export(inputs / "checkpoint", root / OUT, Options(draws=8))

    def names(root: Path) -> set[str]:
        return set(_made(root / OUT)) if (root / OUT).exists() else set()

    def faults(root: Path, whole: Path) -> list[str]:
        from busigen.errors import BusigenError
        from busigen.runtime.backends.bundle import Bundle

        if not (root / OUT).exists():
            return []
        try:
            Bundle.open(root / OUT)
        except BusigenError as error:
            return [str(error)]
        return [f"{name} is missing" for name in sorted(names(whole) - names(root))]

    return Case(_nothing, work, faults, lambda root, whole: names(root) != names(whole))


def appearing(inputs: Path) -> Case:
    """How an export writes its bundle, without tracing and proving it."""
    from busigen.export.weights import WeightFiles
    from busigen.runtime.storage.files import atomic_folder
    from busigen.training.trainer import write_json

    def work(root: Path) -> None:
        if (root / OUT).exists():
            return
        with atomic_folder(root / OUT) as folder:
            WeightFiles(folder).place("prior", bytes(range(256)) * 40)
            (folder / "prior.onnx").write_bytes(bytes(range(256)) * 20)
            write_json(folder / "bundle.json", {"schema": 1})

    def faults(root: Path, whole: Path) -> list[str]:
        return ["the bundle is missing a file or torn"] if (root / OUT).exists() and _differs(root, whole) else []

    return Case(_nothing, work, faults, _differs)


def converting(inputs: Path) -> Case:
    """Of every chunk that is marked as done, and of a finished conversion, all files are there and whole."""

    def work(root: Path) -> None:
        convert(inputs / "set", root / OUT, to="monai")

    def faults(root: Path, whole: Path) -> list[str]:
        out, right, now = root / OUT, _made(whole / OUT), _made(root / OUT)
        wanted = [
            name
            for chunk in out.glob(f"{WORK_FOLDER}/[0-9]*.json")
            for _, case in json.loads(chunk.read_bytes())
            for name in (case["image"], case["label"])
        ]
        if RECORD in now and json.loads((out / RECORD).read_bytes())["finished"]:
            wanted = list(right)
        return [f"{name} is missing or torn" for name in wanted if now.get(name) != right[name]]

    return Case(_nothing, work, faults, _differs)


CASES: dict[str, Callable[[Path], Case]] = {
    "generate": generating,
    "merge": merging,
    "repair": repairing,
    "prepare": preparing,
    "prepare-again": preparing_again,
    "save": saving,
    "train": training,
    "appear": appearing,
    "export": exporting,
    "convert": converting,
}


def inputs_of(name: str, place: Path) -> Path:
    """A folder below ``place`` with what a case reads."""
    inputs = place / "inputs"
    inputs.mkdir()
    if name == "merge":
        generate(NoiseSource(), inputs / "front", count=4, seed=7, shard_size=SHARD_SIZE)
        generate(NoiseSource(), inputs / "back", count=3, seed=7, shard_size=SHARD_SIZE, first=4)
    if name == "convert":
        generate(NoiseSource(), inputs / "set", count=6, seed=7, shard_size=SHARD_SIZE)
    if name.startswith("prepare"):
        draw_pairs(inputs / "images")
        draw_pairs(inputs / "more", seed=1, count=3)
    if name == "train":
        from tests.harness.synthetic_datasets import draw_busi

        prepare([draw_busi(inputs / "Dataset_BUSI_with_GT")], inputs / "prepared")
    if name == "export":
        from tests.harness.checkpoints import untrained

        untrained(inputs / "checkpoint")
    return inputs
