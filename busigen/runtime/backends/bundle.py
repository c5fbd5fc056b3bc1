"""Bundles: folders of ONNX graphs and weights, whose record and files are checked before they are used."""

from __future__ import annotations

import hashlib
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, Strict

from busigen.errors import IntegrityError
from busigen.files import sha256_of
from busigen.mtf import Transfer
from busigen.noise_styles import are_styles
from busigen.records import FileName, Many, Number, Record, Text, checked, read_given
from busigen.registry import BUCKETS, LATENT_FACTOR, LESION_CLASSES, RESOLUTION, STAGES
from busigen.runtime.backends.onnx_graph import MAX_GRAPH_BYTES, Graph

RECORD = "bundle.json"
SCHEMA, READABLE = 5, (4, 5)  # what export writes, what can be read: pairs of schema 4 are not filtered (`busigen.mtf`)
MAX_RECORD_BYTES = 4 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TURNS = 1000  # turns that a graph's loop may take: diffusion's steps in training, where those in use have ten
LEAST_FRAME, MAX_FRAMES = 32, 1024  # shortest side in pixels, and number, of the frames that a bundle may record
LARGEST_SPECKLE = 4.0  # greatest deviation of the noise that a bundle may ask to decode backgrounds with
_EXPORT = "Export it again with 'busigen export', or leave out --bundle to use the shipped one."


def unproven(record: Mapping[str, Any]) -> list[str]:
    """Links of the chain of fingerprints that a ``bundle.json``, or a run's fingerprint, has no sha256 of."""
    return [name for name in ("split_hash", "checkpoint") if not re.fullmatch("[0-9a-f]{64}", str(record.get(name)))]


def graph_names() -> tuple[str, ...]:
    """Every graph that a bundle holds."""
    components = ("context", "prior", *(f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES))
    return tuple(name for component in ("encoder", "decoder", *components) for name in graphs_of(component))


def graphs_of(component: str) -> tuple[str, ...]:
    """The graphs of one component: one, or one per window size (``<component>@<side>``) for what works on windows."""
    if component in ("encoder", "decoder") or component.partition("-")[0] in ("lesion", "blend"):
        return tuple(f"{component}@{side}" for side in BUCKETS)
    return (component,)


def default_bundle() -> Path:
    """The bundle that ships inside the package."""
    return Path(str(files("busigen"))) / "bundles" / "default"


def _framed(sides: list[int]) -> list[int]:
    if max(sides) != RESOLUTION:
        raise ValueError(f"should have a side of {RESOLUTION}")
    return sides


def _transfer(found: Any) -> Any:
    if found is not None:
        Transfer.from_json(found)
    return found


Side = Annotated[int, Strict(), Field(ge=LEAST_FRAME, le=RESOLUTION)]
Frame = Annotated[list[Side], Field(min_length=2, max_length=2), AfterValidator(_framed)]


class ImagesRecord(Record):
    """What bundle and checkpoint record of whole images; `busigen.noise_styles.are_styles` says more of ``styles``."""

    frames: Annotated[Many[Frame], Field(min_length=1, max_length=MAX_FRAMES)] = Field(
        default_factory=lambda: [[RESOLUTION, RESOLUTION]]
    )
    styles: Many[Many[Number]] = Field(default_factory=list)
    transfer: Annotated[Any, AfterValidator(_transfer)] = None


class _GraphRecord(Record):
    file: FileName
    files: dict[FileName, Text]
    precision: Text = ""


class _TrainingRecord(Record):
    recipe: dict[Text, Any] = Field(default_factory=dict)
    data: dict[Text, Any] = Field(default_factory=dict)
    tasks: dict[Text, Any] = Field(default_factory=dict)
    device: Text = ""


class BundleRecord(ImagesRecord):
    """Content of ``bundle.json`` as far as it is used, bounded: a damaged record is not to ask for all memory."""

    graphs: dict[Text, _GraphRecord]
    latent_channels: Annotated[int, Strict(), Field(ge=1, le=256)]
    code_length: Annotated[int, Strict(), Field(ge=1, le=4096)]
    patch: Annotated[int, Strict(), Field(ge=1, le=RESOLUTION)]
    background_speckle: Annotated[Number, Field(ge=0, le=LARGEST_SPECKLE)] = 1.0
    preset: Text | None = None
    precision: Text = ""
    split_hash: Text | None = None
    checkpoint: Text | None = None
    training: _TrainingRecord | None = None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, the content of ``bundle.json``, and that file's sha256, which stands for all."""

    folder: Path
    info: dict[str, Any]
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Open a bundle and check every file against its recorded hash.

        An InputError says that no bundle is there, or one that this busigen does not read; an IntegrityError, that a
        file is missing or changed, or a recorded path leaves the folder.
        """
        bundle = cls.recorded(folder)
        expected: dict[str, str] = {}
        for name, record in bundle.info["graphs"].items():
            hashes = record["files"]
            if record["file"] not in hashes:
                raise IntegrityError(f"{folder / RECORD} records no files for graph {name}.", fix=_EXPORT)
            for file, sha256 in hashes.items():
                if file not in expected:
                    limit = MAX_GRAPH_BYTES if file == record["file"] else MAX_WEIGHTS_BYTES
                    _check_file(folder / file, sha256, limit)
                if expected.setdefault(file, sha256) != sha256:
                    raise IntegrityError(f"{folder / RECORD} gives {file} two hashes.", fix=_EXPORT)
            _check_graph(folder / record["file"], set(hashes))
        return bundle

    @classmethod
    def recorded(cls, folder: Path) -> Bundle:
        """Read a bundle's record and none of its other files; raises what :meth:`open` does."""
        path = folder / RECORD
        info, content = read_given(path, "bundle", schemas=READABLE, fix=_EXPORT, limit=MAX_RECORD_BYTES)
        record = checked(BundleRecord, info, path, fix=_EXPORT)
        if set(record.graphs) != set(graph_names()):
            raise IntegrityError(f"{path} does not name the graphs of a bundle.", fix=_EXPORT)
        if record.styles and not are_styles(record.styles, record.latent_channels):
            wrong = f"{reprlib.repr(record.styles)} are not those of {record.latent_channels} channels"
            raise IntegrityError(f"{path} has no valid 'styles': {wrong}.", fix=_EXPORT)
        return cls(folder, info, hashlib.sha256(content).hexdigest())

    def graph(self, name: str) -> Path:
        """Path of a graph's file."""
        return self.folder / str(self.info["graphs"][name]["file"])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latents of a whole image: channels, rows, columns."""
        cells = RESOLUTION // LATENT_FACTOR
        return int(self.info["latent_channels"]), cells, cells

    @property
    def code_length(self) -> int:
        """Numbers in the outline code that stage 1 starts from."""
        return int(self.info["code_length"])

    @property
    def patch(self) -> int:
        """Side of a context patch in pixels."""
        return int(self.info["patch"])

    @property
    def frames(self) -> list[tuple[int, int]]:
        """Heights and widths of training images in the working frame; without a record, they fill it."""
        return [(height, width) for height, width in self.info.get("frames", [[RESOLUTION, RESOLUTION]])]

    @property
    def styles(self) -> NDArray[np.float64] | None:
        """What styles the prior's noise (:func:`busigen.noise_styles.styled`), ``(rows, K)``; None for nothing."""
        found = self.info.get("styles", [])
        return np.array(found) if found else None

    @property
    def transfer(self) -> Transfer | None:
        """What pairs on synthetic backgrounds are filtered with last; None for nothing."""
        found = self.info.get("transfer")
        return None if found is None else Transfer.from_json(found)

    @property
    def background_speckle(self) -> float:
        """Deviation of the noise that synthetic backgrounds are decoded with; 1 in bundles that do not say."""
        return float(self.info.get("background_speckle", 1.0))


def _check_file(path: Path, expected: str, limit: int) -> None:
    try:
        # No link: it may point anywhere, and what it points to may change after the check.
        found = sha256_of(path, limit=limit, root=path.parent)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise IntegrityError(f"{str(path)!r} cannot be read: {reason}.", fix=_EXPORT) from error
    if found != expected:
        raise IntegrityError(f"{path} is not the file that was exported: its sha256 is {found[:12]}....", fix=_EXPORT)


def _check_graph(graph: Path, recorded: set[str]) -> None:
    """Refuse a graph that may never end, or reads weights from a file which its record gives no hash of."""
    try:
        found = Graph(graph)
        if others := sorted(found.external_files() - recorded):
            problem = f"reads weights from {others[0]!r}, which {RECORD} does not record"
            raise IntegrityError(f"{graph} {problem}.", fix=_EXPORT)
        found.refuse_endless(MAX_TURNS)
    except OSError as error:  # Recorded as another graph's weights, and allowed more room as such.
        raise IntegrityError(f"{graph} cannot be read: {error.strerror}.", fix=_EXPORT) from error
    except ValueError as error:
        raise IntegrityError(f"{graph} is no ONNX graph of a bundle: {error}.", fix=_EXPORT) from error


@contextmanager
def openable(graph: Path, files: Iterable[str]) -> Iterator[Path]:
    """A graph's path as ONNX and ONNX Runtime open it for the block; an ``OSError`` if there is no room for a copy.

    Both refuse weights of which the file system has a second name, and installers that link packages from a cache (uv,
    conda) leave them so: then the graph's files are copied for the block. Weights in memory are no way out, since ONNX
    Runtime 1.31 looks for those of a loop's body on the disk all the same.
    """
    if all((graph.parent / name).stat().st_nlink == 1 for name in files):
        yield graph
        return
    # On Windows, what a session has mapped into its memory cannot be removed before that ends.
    with tempfile.TemporaryDirectory(prefix="busigen-", ignore_cleanup_errors=True) as folder:
        for name in files:
            shutil.copyfile(graph.parent / name, Path(folder) / name)
        yield Path(folder) / graph.name
