"""What a user gets today, frozen: bytes of records, values of samples, columns of tables, options of commands.

``python -m tests.golden`` writes ``tests/golden/*.json`` anew, after a change that is meant.

What a library decides (how Pillow packs a PNG, polars a table, the versions that a record names) is left out or named
``<so>``: the files hold on every machine and with every version that `pyproject.toml` allows.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import typer
from PIL import Image

import busigen.cli  # noqa: F401  # adds the commands to the app
from busigen.cli.app import app
from busigen.runtime.dataset.format import CROISSANT_FILE, DATASET_FILE, RUN_FILE
from busigen.runtime.execution.factory import generate
from tests.harness.command import run
from tests.harness.noise_source import NoiseSource

HERE = Path(__file__).parent
BLOCK = 16
"""Side of the squares, in pixels, whose means stand for an image of the shipped bundle."""

_HASH = re.compile(r"\b[0-9a-f]{64}\b")
_VERSION = re.compile(r'("(?:busigen|python|numpy|pillow|polars|onnxruntime|version|generator)": ")[^"]*(")')
_SIZE = re.compile(r'("(?:bytes|size|contentSize)": )("?)[^,\n"]+("?)')
_CITED = re.compile(r"(version|year) = \{[^}]*\}")
_DATE = re.compile(r"\b20\d\d-\d\d-\d\d(T[0-9:.+Z]*)?\b")


def noise_dataset(folder: Path) -> Path:
    """Ten samples in three shards, the last one short, of a source that numpy alone decides."""
    generate(NoiseSource(), folder, count=10, seed=7, shard_size=4)
    return folder


def records(folder: Path) -> dict[str, list[str]]:
    """The lines of every JSON file of a dataset, by its path, without what libraries decide of it."""
    names = [RUN_FILE, DATASET_FILE, CROISSANT_FILE, *(f"shards/{path.name}" for path in folder.glob("shards/*.json"))]
    return {name: settled((folder / name).read_text()).split("\n") for name in sorted(names)}


def settled(text: str) -> str:
    """JSON text with hashes of packed files, versions, sizes and dates replaced; order and separators stay."""
    for pattern, with_what in (
        (_HASH, "<sha256>"),
        (_VERSION, r"\1<version>\2"),
        (_SIZE, r"\1\2<size>\3"),
        (_CITED, r"\1 = {<\1>}"),
        (_DATE, "<date>"),
    ):
        text = pattern.sub(with_what, text)
    return text


def columns(folder: Path) -> dict[str, str]:
    """The manifest's columns and their types, in order."""
    return {name: str(kind) for name, kind in pl.read_parquet_schema(folder / "manifest.parquet").items()}


def members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every member of every shard, in order."""
    for path in sorted(folder.glob("shards/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("L"))


def noise_samples(folder: Path) -> dict[str, Any]:
    """Every member: rows as text, images and masks as a hash of their pixels."""
    return {
        name: hashlib.sha256(pixels(content).tobytes()).hexdigest()
        if name.endswith(".png")
        else settled(content.decode())
        for name, content in members(folder)
    }


def bundle_samples(folder: Path) -> dict[str, Any]:
    """Rows as values; images as means of blocks, masks as numbers of pixels in blocks.

    Another kind of processor may tip single pixels by a grey level, so pixels have no hash to be frozen.
    """
    found: dict[str, Any] = {}
    for name, content in members(folder):
        if name.endswith(".png"):
            blocks = pixels(content).reshape(256 // BLOCK, BLOCK, 256 // BLOCK, BLOCK).astype(float)
            found[name] = np.round(blocks.mean(axis=(1, 3)), 3).tolist()
        else:
            found[name] = json.loads(content)
    return found


def commands() -> dict[str, Any]:
    """Every command's text, and its options with their defaults and texts; how rich lays them out is its own affair."""
    return dict(_commands(typer.main.get_command(app)))


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield (
            before + name,
            {
                "help": command.help,
                "epilog": command.epilog,
                "options": [
                    [
                        *option.opts,
                        *option.secondary_opts,
                        option.required,
                        str(option.default),
                        getattr(option, "help", ""),
                    ]
                    for option in command.params
                ],
            },
        )
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")


def bundle_dataset(folder: Path) -> Path:
    """Four samples of the shipped bundle on backgrounds of its own."""
    done = run("generate", "--count", 4, "--shard-size", 4, "--seed", 3, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def frozen(scratch: Path) -> dict[str, Any]:
    """All of it, by the name of its file."""
    noise, bundle = noise_dataset(scratch / "noise"), bundle_dataset(scratch / "bundle")
    return {
        "noise.json": {"records": records(noise), "columns": columns(noise), "members": noise_samples(noise)},
        "commands.json": commands(),
        "bundle.json": {"records": records(bundle), "columns": columns(bundle), "members": bundle_samples(bundle)},
    }


def main() -> None:
    """Write the files anew."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in frozen(Path(scratch)).items():
            (HERE / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
