"""Keeping a section's result for a later run, which takes it only if everything that decided it is the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from busigen import __version__
from busigen.data.sources.files import find_images
from busigen.errors import IntegrityError
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.results import SectionResult, section_folder
from busigen.evaluation.sections import Section
from busigen.files import sha256_of, write_json
from busigen.records import Record, Text, read_checked

RESULT_FILE = "result.json"


class _Kept(Record):
    """A kept result, of the audit that its key is of."""

    key: Text
    result: dict[Text, Any]


Sets = dict[str, str | None]
"""Fingerprint per set, None for one that is not there."""


def fingerprint(images: ImageSet) -> str:
    """Hex sha256 over everything that a section can see of a set; where it lies does not count."""
    digest = hashlib.sha256()
    marks = (np.packbits(images.masks), np.packbits(images.valid), np.packbits(images.overlays))
    for array in (images.images, images.without_overlays().images, *marks):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(images.table.write_json().encode())
    digest.update(json.dumps([refusal.to_dict() for refusal in images.refused]).encode())
    return digest.hexdigest()


def _inception(context: AuditContext, sets: Sets) -> Any:
    if context.inception is not None:
        return sha256_of(context.inception)
    # Where the user brings no weights, the library's own are used as soon as it is there.
    return find_spec("torch_fidelity") is not None


def _healthy(context: AuditContext, sets: Sets) -> Any:
    return None if context.healthy is None else sorted(sha256_of(path) for path in find_images(context.healthy))


INPUTS: dict[str, Callable[[AuditContext, Sets], Any]] = {
    "train": lambda context, sets: sets.get("train"),
    "external": lambda context, sets: sets.get("external"),
    "healthy": _healthy,
    "inception": _inception,
    # The full real-or-synthetic test trains a smaller network where there is no GPU.
    "device": lambda context, sets: context.device if context.effort == "full" else None,
}
"""What a section can read besides the synthetic and the real set, as something that changes when the content does."""


def key_of(section: Section, context: AuditContext, sets: Sets) -> str:
    """Hex sha256 over what decides a section's result.

    ``context``: Its options count; its folder does not.
    """
    content = {
        "section": section.name,
        "version": section.version,
        "busigen": __version__,
        "sets": {name: sets[name] for name in ("synthetic", "real")},
        "effort": context.effort,
        "seed": context.seed,
        "backgrounds": context.backgrounds,
        **{name: INPUTS[name](context, sets) for name in section.reads},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def store(out: Path, key: str, result: SectionResult) -> None:
    """Keep a result; it appears complete or not at all.

    Raises:
        OSError: the disk refused.
    """
    folder = section_folder(out, result.section)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT_FILE, {"key": key, "result": jsonable(result.to_dict())})


def load(out: Path, section: str, key: str) -> SectionResult | None:
    """The kept result of that key; None where there is none, it is damaged, or one of its pictures is gone."""
    folder = section_folder(out, section)
    try:
        content = read_checked(_Kept, folder / RESULT_FILE, fix="")
        if content["key"] != key:
            return None
        result = SectionResult.from_dict(content["result"])
    except (OSError, IntegrityError):
        return None
    whole = all((folder / picture.file).is_file() for picture in result.pictures)
    return result if whole and result.section == section else None


def jsonable(value: Any) -> Any:
    """The same in plain JSON types; NaN and infinities, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
