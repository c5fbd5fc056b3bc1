"""The audit's sections, in the order in which they run and are shown; command line, report and cache read this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from busigen.evaluation.context import AuditContext
from busigen.evaluation.results import SectionResult


@dataclass(frozen=True)
class Section:
    """One section. Its package's module ``section`` is imported only when it runs, and holds ``run(context)``.

    ``version`` is part of the cache's key: raise it whenever the section's figures change meaning. ``reads`` names what
    the section looks at besides the synthetic and the real set (see ``cache.INPUTS``): another value of these, and of
    no others, runs it again.
    """

    name: str
    title: str
    question: str
    reads: tuple[str, ...] = ()
    version: int = 1

    def load(self) -> Callable[[AuditContext], SectionResult]:
        """The section's ``run`` function."""
        run: Callable[[AuditContext], SectionResult] = import_module(f"busigen.evaluation.{self.name}.section").run
        return run


SECTIONS = {
    section.name: section
    for section in (
        Section("integrity", "Integrity and masks", "Are the files and masks what they should be?", ("healthy",)),
        Section("physics", "Ultrasound physics", "Do speckle, depth, shadows and outlines follow the real ones?"),
        Section(
            "fidelity",
            "Fidelity",
            "How far is the set from real images, and how much of them does it cover?",
            ("inception",),
        ),
        Section("realness", "Real or synthetic?", "Can a network tell the two apart?", ("device",)),
        Section(
            "utility",
            "Utility",
            "Does it help a segmentation network that is tested on real images?",
            ("train", "external"),
        ),
        Section("privacy", "Privacy", "Does it show the images that it was trained on?", ("train",)),
    )
}
