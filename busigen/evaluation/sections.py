"""The audit's sections, in the order in which they run and are shown, and what decides their results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from busigen import __version__
from busigen.data.sources.files import find_images
from busigen.data.sources.renamed import image_hash
from busigen.evaluation.context import AuditContext, SectionResult
from busigen.files import sha256_of

Prints = dict[str, str | None]  # Fingerprint per set, None for one that is not there.


@dataclass(frozen=True)
class Section:
    """One section. ``version`` is part of a kept result's key: raise it whenever its figures change meaning.

    ``reads``: What it looks at besides the synthetic and the real set, of `INPUTS`; another value of these, and of no
    others, runs it again.
    """

    name: str
    title: str
    question: str
    run: Callable[[AuditContext], SectionResult]
    reads: tuple[str, ...] = ()
    version: int = 1


# What a section needs is imported only when it runs.


def _integrity(context: AuditContext) -> SectionResult:
    from busigen.evaluation.integrity import run

    return run(context)


def _physics(context: AuditContext) -> SectionResult:
    from busigen.evaluation.physics.section import run

    return run(context)


def _fidelity(context: AuditContext) -> SectionResult:
    from busigen.evaluation.fidelity.section import run

    return run(context)


def _realness(context: AuditContext) -> SectionResult:
    from busigen.evaluation.realness.section import run

    return run(context)


def _utility(context: AuditContext) -> SectionResult:
    from busigen.evaluation.utility.section import run

    return run(context)


def _privacy(context: AuditContext) -> SectionResult:
    from busigen.evaluation.privacy.section import run

    return run(context)


_ALL = (
    Section(
        "integrity",
        "Integrity and masks",
        "Are the files and masks what they should be?",
        _integrity,
        ("healthy",),
        version=2,
    ),
    Section(
        "physics",
        "Ultrasound physics",
        "Do speckle, depth, shadows and outlines follow the real ones?",
        _physics,
        version=2,
    ),
    Section(
        "fidelity",
        "Fidelity",
        "How far is the set from real images, and how much of them does it cover?",
        _fidelity,
        ("inception", "frd"),
        version=2,
    ),
    Section("realness", "Real or synthetic?", "Can a network tell the two apart?", _realness, ("device",), version=2),
    Section(
        "utility",
        "Utility",
        "Does it help a segmentation network that is tested on real images?",
        _utility,
        ("train", "external"),
    ),
    Section("privacy", "Privacy", "Does it show the images that it was trained on?", _privacy, ("train",)),
)
SECTIONS = {section.name: section for section in _ALL}


def _healthy(context: AuditContext, prints: Prints) -> Any:
    return None if context.healthy is None else sorted(image_hash(path) for path in find_images(context.healthy))


def _inception(context: AuditContext, prints: Prints) -> Any:
    if context.inception is not None:
        return sha256_of(context.inception)
    # Where the user brings no weights, the library's own are used as soon as it is there.
    return find_spec("torch_fidelity") is not None


def _frd(context: AuditContext, prints: Prints) -> Any:
    from busigen.evaluation.fidelity.frd import is_there

    return is_there()


INPUTS: dict[str, Callable[[AuditContext, Prints], Any]] = {
    "train": lambda context, prints: prints.get("train"),
    "external": lambda context, prints: prints.get("external"),
    "healthy": _healthy,
    "inception": _inception,
    "frd": _frd,
    # The full real-or-synthetic test trains a smaller network where there is no GPU.
    "device": lambda context, prints: context.device if context.effort == "full" else None,
}
"""What a section can read besides the synthetic and the real set, as something that changes when the content does."""


def key_of(section: Section, context: AuditContext, prints: Prints) -> str:
    """Hex sha256 over what decides a section's result: options and content count, the report's folder does not."""
    content = {
        "section": section.name,
        "version": section.version,
        "busigen": __version__,
        "sets": {name: prints[name] for name in ("synthetic", "real")},
        "effort": context.effort,
        "seed": context.seed,
        "backgrounds": context.backgrounds,
        **{name: INPUTS[name](context, prints) for name in section.reads},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
