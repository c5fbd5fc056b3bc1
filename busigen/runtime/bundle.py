"""Reading a bundle: which graphs there are, what they were proved to be, and that no file was changed."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import InputError, IntegrityError
from busigen.foreign import open_file
from busigen.registry import BUCKETS, LATENT_FACTOR, LESION_CLASSES, RESOLUTION, STAGES
from busigen.runtime.onnx_files import MAX_GRAPH_BYTES, external_files, refuse_endless
from busigen.styles import are_styles
from busigen.transfer import Transfer

RECORD = "bundle.json"
SCHEMA, READABLE = 5, (4, 5)
"""What export writes, and what can be read: 4 differs in that nothing of it is filtered last (busigen.transfer)."""

MAX_RECORD_BYTES = 4 << 20
MAX_WEIGHTS_BYTES = 4 << 30

MAX_TURNS = 1000
"""Turns that the loop of a graph may take: as many as diffusion has steps in training, where those in use have ten."""

LEAST_FRAME, MAX_FRAMES = 32, 1024
"""Shortest side in pixels, and number, of the frames that a bundle may record."""

LARGEST_SPECKLE = 4.0
"""Greatest deviation of the noise that a bundle may ask to decode backgrounds with."""

_LARGEST = {"latent_channels": 256, "code_length": 4096, "patch": RESOLUTION}
"""Sizes that a bundle may ask noise and inputs of: a damaged record is not to ask for all memory."""

_EXPORT = "Export it again with 'busigen export', or leave out --bundle to use the shipped one."


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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: where it lies.
        info: the content of ``bundle.json``.
        sha256: of ``bundle.json``; since that names every file's hash, it stands for the whole bundle.
    """

    folder: Path
    info: dict[str, Any]
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Open a bundle and check every file against its recorded hash.

        Raises:
            InputError: no bundle is there, or one that this busigen does not read.
            IntegrityError: a file is missing or changed, or a recorded path leaves the folder.
        """
        bundle = cls.recorded(folder)
        bundle._check()
        return bundle

    @classmethod
    def recorded(cls, folder: Path) -> Bundle:
        """Read a bundle's record and none of its other files: what it says, not whether they are what it says.

        Raises:
            InputError: no bundle is there, or one that this busigen does not read.
        """
        path = folder / RECORD
        try:
            found = path.stat()
            # A pipe would be waited for, a device never ends.
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_RECORD_BYTES:
                raise InputError(f"{path} is no regular file, or is larger than {MAX_RECORD_BYTES} bytes.", fix=_EXPORT)
            content = path.read_bytes()
            info = json.loads(content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{folder} is no bundle: it has no {RECORD}.", fix=_EXPORT) from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}.", fix=_EXPORT) from error
        if not isinstance(info, dict) or info.get("schema") not in READABLE:
            wanted = " or ".join(map(str, READABLE))
            raise InputError(f"{path} does not have schema {wanted}.", fix=_EXPORT)
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
        """What the prior's noise is styled with (:func:`busigen.styles.styled`), ``(rows, K)``; None for nothing."""
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

    def _check(self) -> None:
        graphs = self.info.get("graphs")
        if not isinstance(graphs, dict) or set(graphs) != set(graph_names()):
            raise IntegrityError(f"{self.folder / RECORD} does not name the graphs of a bundle.", fix=_EXPORT)
        for key, largest in _LARGEST.items():
            if not isinstance(self.info.get(key), int) or not 1 <= self.info[key] <= largest:
                raise IntegrityError(
                    f"{self.folder / RECORD} has no valid {key!r}: {self.info.get(key)!r}.", fix=_EXPORT
                )
        if not _are_frames(self.info.get("frames", [[RESOLUTION, RESOLUTION]])):
            raise IntegrityError(f"{self.folder / RECORD} has no valid 'frames'.", fix=_EXPORT)
        styles = self.info.get("styles", [])
        if styles != [] and not are_styles(styles, self.info["latent_channels"]):
            raise IntegrityError(f"{self.folder / RECORD} has no valid 'styles'.", fix=_EXPORT)
        try:
            _ = self.transfer
        except ValueError as error:
            raise IntegrityError(f"{self.folder / RECORD} has no valid 'transfer': {error}.", fix=_EXPORT) from error
        speckle = self.info.get("background_speckle", 1.0)
        if type(speckle) not in (int, float) or not 0 <= speckle <= LARGEST_SPECKLE:
            raise IntegrityError(f"{self.folder / RECORD} has no valid 'background_speckle': {speckle!r}.", fix=_EXPORT)
        expected: dict[str, str] = {}
        for name, record in graphs.items():
            hashes = record.get("files") if isinstance(record, dict) else None
            if not isinstance(hashes, dict) or record.get("file") not in list(hashes):
                raise IntegrityError(f"{self.folder / RECORD} records no files for graph {name}.", fix=_EXPORT)
            for file, sha256 in hashes.items():
                if file not in expected:
                    _check_name(file, self.folder / RECORD)
                    limit = MAX_GRAPH_BYTES if file == record["file"] else MAX_WEIGHTS_BYTES
                    _check_file(self.folder / file, sha256, limit)
                if expected.setdefault(file, sha256) != sha256:
                    raise IntegrityError(f"{self.folder / RECORD} gives {file} two hashes.", fix=_EXPORT)
            _check_graph(self.folder / record["file"], set(hashes))


def _are_frames(found: Any) -> bool:
    """Whether these are heights and widths that an image can have in the working frame."""

    def is_frame(pair: Any) -> bool:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(side) is int for side in pair)
        return whole and min(pair) >= LEAST_FRAME and max(pair) == RESOLUTION

    return isinstance(found, list) and 1 <= len(found) <= MAX_FRAMES and all(map(is_frame, found))


def _check_name(file: str, record: Path) -> None:
    if Path(file).name != file or "\\" in file or file.startswith("."):
        raise IntegrityError(f"{record} names the file {file!r}, which is not a plain name.", fix=_EXPORT)


def _check_file(path: Path, expected: str, limit: int) -> None:
    try:
        # No link: it may point anywhere, and what it points to may change after the check.
        with open_file(path, limit=limit, root=path.parent) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise IntegrityError(f"{str(path)!r} cannot be read: {reason}.", fix=_EXPORT) from error
    if found != expected:
        raise IntegrityError(f"{path} is not the file that was exported: its sha256 is {found[:12]}....", fix=_EXPORT)


def _check_graph(graph: Path, recorded: set[str]) -> None:
    """Refuse a graph that may never end, or reads weights from a file which its record gives no hash of."""
    try:
        if others := sorted(external_files(graph) - recorded):
            problem = f"reads weights from {others[0]!r}, which {RECORD} does not record"
            raise IntegrityError(f"{graph} {problem}.", fix=_EXPORT)
        refuse_endless(graph, MAX_TURNS)
    except OSError as error:  # Recorded as another graph's weights, and allowed more room as such.
        raise IntegrityError(f"{graph} cannot be read: {error.strerror}.", fix=_EXPORT) from error
    except ValueError as error:
        raise IntegrityError(f"{graph} is no ONNX graph of a bundle: {error}.", fix=_EXPORT) from error
