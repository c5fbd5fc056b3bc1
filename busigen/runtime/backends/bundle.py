"""Bundles: folders of ONNX graphs and weights, whose record and files are checked before they are used."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import InputError, IntegrityError
from busigen.files import sha256_of
from busigen.mtf import Transfer
from busigen.phantoms.distribution import Phantoms
from busigen.records import checked, read_given
from busigen.registry import BUCKETS, LATENT_FACTOR, LESION_CLASSES, RESOLUTION
from busigen.runtime.backends.bundle_record import (
    BACKGROUND_DECODER,
    DEFAULT_WINDOWS,
    WHOLE_DECODER,
    BundleRecord,
    FrameRecord,
    names_of_graphs,
)
from busigen.runtime.backends.onnx_graph import MAX_GRAPH_BYTES, Graph

RECORD = "bundle.json"
# What export writes, what can be read: pairs of schema 4 are not filtered (`busigen.mtf`), and those before 6 leave out
# what the graphs work on: classes, windows, latents of backgrounds. Those with phantoms have one of their own, so that
# an older busigen, which would start from noise, refuses them.
SCHEMA, SCHEMA_OF_PHANTOMS, SCHEMA_OF_SCANNERS, READABLE = 6, 7, 8, (4, 5, 6, 7, 8)
MAX_RECORD_BYTES = 4 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_TURNS = 1000  # turns that a graph's loop may take: diffusion's steps in training, where those in use have ten
_EXPORT = "Export it again with 'busigen export', or leave out --bundle to use the shipped one."


def unproven(record: Mapping[str, Any]) -> list[str]:
    """Links of the chain of fingerprints that a ``bundle.json``, or a run's fingerprint, has no sha256 of."""
    return [name for name in ("split_hash", "checkpoint") if not re.fullmatch("[0-9a-f]{64}", str(record.get(name)))]


def default_bundle() -> Path:
    """The bundle that ships inside the package."""
    return Path(str(files("busigen"))) / "bundles" / "default"


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
        if (made := checked(FrameRecord, info, path, fix=_EXPORT).resolution) != RESOLUTION:
            problem = f"{path} is of a bundle made for frames of {made} pixels; this busigen writes {RESOLUTION}."
            raise InputError(problem, fix=_EXPORT)
        if faults := checked(BundleRecord, info, path, fix=_EXPORT).faults():
            raise IntegrityError(f"{path} {faults[0]}.", fix=_EXPORT)
        return cls(folder, info, hashlib.sha256(content).hexdigest())

    def graph(self, name: str) -> Path:
        """Path of a graph's file."""
        return self.folder / self.file(name)

    def file(self, name: str) -> str:
        """Name of a graph's file, which other graphs may share."""
        return str(self.info["graphs"][name]["file"])

    def inputs(self, graph: str) -> tuple[str, ...] | None:
        """The inputs of a graph; None where nothing is recorded of it, as of networks that are no graphs yet."""
        record = self._record(graph)
        return tuple(record["inputs"]) if record else None

    def constants(self, graph: str) -> dict[str, NDArray[np.float32]]:
        """Inputs of a graph that are the same for every image, by name, each as a row ``(1, N)``."""
        found = self._record(graph).get("constants", {})
        return {name: np.array([values], dtype=np.float32) for name, values in found.items()}

    def fresh(self, graph: str) -> int:
        """How many arrays of noise, beside that which it starts from, a graph reads for an image; 0 for none."""
        return int(self._record(graph).get("fresh") or 0)

    def _record(self, graph: str) -> dict[str, Any]:
        found: dict[str, Any] = self.info.get("graphs", {}).get(graph, {})
        return found

    @property
    def graph_names(self) -> tuple[str, ...]:
        """Every graph, by name."""
        return names_of_graphs(self.classes, tuple(self.windows), self.background_decoder)

    @property
    def distinct_graphs(self) -> tuple[str, ...]:
        """The first graph of every file: what has to be opened, or built, to have all of them."""
        first: dict[Path, str] = {}
        for name in self.graph_names:
            first.setdefault(self.graph(name), name)
        return tuple(first.values())

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of lesions that it paints."""
        return tuple(self.info.get("classes", LESION_CLASSES))

    @property
    def windows(self) -> dict[int, int]:
        """Sides of the windows, the smallest first, and the sides at which their latents are computed, in pixels."""
        return dict(sorted((int(side), shown) for side, shown in self.info.get("windows", DEFAULT_WINDOWS).items()))

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell and axis."""
        return int(self.info.get("latent_factor", LATENT_FACTOR))

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """Latents of a window of that side: channels, rows, columns."""
        cells = self.windows[side] // self.latent_factor
        return int(self.info["latent_channels"]), cells, cells

    @property
    def background_shape(self) -> tuple[int, int, int]:
        """Latents of a whole image that the prior draws: channels, rows, columns."""
        cells = RESOLUTION // self.latent_factor
        return int(self._background.get("latent_channels", self.info["latent_channels"])), cells, cells

    @property
    def background_decoder(self) -> str:
        """The graph that decodes them."""
        return str(self._background.get("decoder", WHOLE_DECODER))

    @property
    def _background(self) -> dict[str, Any]:
        return self.info.get("background") or {}

    def call_side(self, graph: str) -> int:
        """Side in pixels by which calls of a graph are sized (`registry.rows_per_call`): what it costs an image.

        It is that at which a window is shown, the smallest of those that share the graph's file. Other graphs cost as
        little as a small window, but for those of backgrounds, which are whole images.
        """
        if graph in ("prior", BACKGROUND_DECODER):
            return RESOLUTION
        sharing = [name for name in self.graph_names if self.graph(name) == self.graph(graph) and "@" in name]
        return min((self.windows[int(name.partition("@")[2])] for name in sharing), default=BUCKETS[0])

    @property
    def code_length(self) -> int:
        """Numbers in the outline code that stage 1 starts from."""
        return int(self.info["code_length"])

    @property
    def patch(self) -> int:
        """Side of a context patch in pixels."""
        return int(self.info["patch"])

    def frames(self, scanner: str | None = None) -> list[tuple[int, int]]:
        """Heights and widths of training images in the working frame, those of a scanner if they are recorded.

        Without a record, images fill it.
        """
        found = self.info.get("scanner_frames", {}).get(scanner) or self.info.get("frames", [[RESOLUTION] * 2])
        return [(height, width) for height, width in found]

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
    def scanners(self) -> dict[str, float]:
        """The scanners that can be asked for, in the order of the condition, and their shares of training images."""
        return {str(name): float(share) for name, share in self.info.get("scanners", [])}

    @property
    def phantoms(self) -> Phantoms | None:
        """What synthetic backgrounds begin with; None for noise alone."""
        found = self.info.get("phantoms")
        return None if found is None else Phantoms.from_json(found)

    @property
    def outlines(self) -> int:
        """How many outlines are drawn on a background, as long as gates refuse them, before the draw is refused."""
        return int(self.info.get("outlines", 1))

    @property
    def background_speckle(self) -> float:
        """Deviation of the noise that synthetic backgrounds are decoded with; 1 in bundles that do not say."""
        return float(self.info.get("background_speckle", 1.0))

    @property
    def grain_fade(self) -> float:
        """Pixels from an edit region's rim over which pasted speckle fades in; 0, within a grain, if it is not said."""
        return float(self.info.get("grain_fade", 0.0))


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
