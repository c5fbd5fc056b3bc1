"""The audit's sections, in the order in which they run and are shown; command line, report and cache read this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from busigen.evaluation.context import AuditContext
from busigen.evaluation.results import SectionResult


@dataclass(frozen=True)
class Section:
    """One section.

    ``version`` is part of the cache's key: raise it whenever the section's figures change meaning. ``reads`` names what
    the section looks at besides the synthetic and the real set (see ``cache.INPUTS``): another value of these, and of
    no others, runs it again.
    """

    name: str
    title: str
    question: str
    run: Callable[[AuditContext], SectionResult]
    reads: tuple[str, ...] = ()
    version: int = 1


# What a section needs is imported only when it runs.


def _integrity(context: AuditContext) -> SectionResult:
    from busigen.evaluation.integrity.section import run

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
        "integrity", "Integrity and masks", "Are the files and masks what they should be?", _integrity, ("healthy",)
    ),
    Section("physics", "Ultrasound physics", "Do speckle, depth, shadows and outlines follow the real ones?", _physics),
    Section(
        "fidelity",
        "Fidelity",
        "How far is the set from real images, and how much of them does it cover?",
        _fidelity,
        ("inception",),
    ),
    Section("realness", "Real or synthetic?", "Can a network tell the two apart?", _realness, ("device",)),
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
