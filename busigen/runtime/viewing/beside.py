"""What stands beside a pair: the healthy image that it was painted into, found in a folder or drawn again."""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image

from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.errors import UsageError
from busigen.registry import SYNTHETIC
from busigen.runtime.dataset.finalize import run_of
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.sampling.inputs.healthy_images import Backgrounds
from busigen.runtime.sampling.sampler import Sampler

_KEPT = 64  # Pictures that are kept as PNG


class Origin(NamedTuple):
    """What a pair was painted into; pairs with the same ``key`` share it."""

    key: Hashable
    caption: str


class Beside:
    """Finds what pairs were painted into: images of the folder ``healthy``, or drawn again as ``replay`` says.

    Raises:
        UsageError: drawn again are synthetic backgrounds alone.
        InputError: the folder is missing, or the bundle is not the run's.
        IntegrityError: the bundle is damaged.
    """

    def __init__(self, parts: Sequence[Dataset], healthy: Path | None, replay: Inputs | None) -> None:
        self._images = Backgrounds.below(healthy).paths if healthy is not None else {}
        self._seeds = [part.plan.seed for part in parts]
        self._sampler: Sampler | None = None
        self._lock = Lock()
        self._png = lru_cache(maxsize=_KEPT)(self._made)
        if replay is not None:
            run = run_of(parts[0].info)
            if run["fingerprint"].get("healthy") != SYNTHETIC:
                problem = "--replay is given, and the dataset's backgrounds are not synthetic."
                raise UsageError(problem, fix="Leave it out; --healthy shows a user's own images.")
            source = replay.open(run)
            self._sampler = source if isinstance(source, Sampler) else None

    def origin(self, part: int, row: Mapping[str, Any]) -> Origin | None:
        """What the pair of a row of the manifest was painted into; None where it is not at hand."""
        if (sha256 := row.get("healthy_sha256")) is not None and sha256 in self._images:
            return Origin(sha256, f"Healthy image: {row.get('healthy_file')}")
        if self._sampler is not None and row.get("background") == SYNTHETIC:
            return Origin((part, row["index"], row["attempt"]), "Synthetic background, drawn again")
        return None

    def png(self, origin: Origin) -> bytes:
        """It as PNG, 256 x 256, equal to the pair outside its edit region; a BusigenError if it cannot be had."""
        return self._png(origin.key)

    def _made(self, key: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self._pixels(key)).save(file, "PNG")
        return file.getvalue()

    def _pixels(self, key: Any) -> NDArray[Any]:
        if isinstance(key, str):
            return letterbox(read_image(self._images[key]).pixels)[0]
        assert self._sampler is not None
        part, index, attempt = key
        with self._lock:  # An engine call has all compute threads.
            return self._sampler.background(self._seeds[part], index, attempt)
