"""Keeping a section's result for a later run, which takes it only if everything that decided it is the same."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from busigen import __version__
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.results import SectionResult, section_folder
from busigen.evaluation.sections import Section
from busigen.runtime.atomic import sha256_of, write_json

RESULT_FILE = "result.json"


def fingerprint(images: ImageSet) -> str:
    """Hex sha256 over everything that a section can see of a set; where it lies does not count."""
    digest = hashlib.sha256()
    for array in (images.images, np.packbits(images.masks), np.packbits(images.valid), np.packbits(images.overlays)):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(images.table.write_json().encode())
    digest.update(json.dumps([refusal.to_dict() for refusal in images.refused]).encode())
    return digest.hexdigest()


def key_of(section: Section, context: AuditContext, sets: dict[str, str | None]) -> str:
    """Hex sha256 over what decides a section's result.

    Args:
        section: Its name and version count.
        context: Its options count; device and folder do not.
        sets: Fingerprint per set.
    """
    healthy = context.healthy
    content = {
        "section": section.name,
        "version": section.version,
        "busigen": __version__,
        "sets": sets,
        "effort": context.effort,
        "seed": context.seed,
        "backgrounds": context.backgrounds,
        "inception": None if context.inception is None else sha256_of(context.inception),
        "healthy": None if healthy is None else sorted(path.name for path in healthy.rglob("*") if path.is_file()),
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
        content = json.loads((folder / RESULT_FILE).read_bytes())
        if content["key"] != key:
            return None
        result = SectionResult.from_dict(content["result"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
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
