"""Proof that a set painted into real images left them as they were outside the edit regions."""

from __future__ import annotations

from busigen.evaluation.context import AuditContext
from busigen.evaluation.results import Figure, Interval, SectionResult
from busigen.registry import SYNTHETIC
from busigen.runtime.backgrounds import Backgrounds

KEY = "integrity.background.unproven"


def prove_backgrounds(context: AuditContext, result: SectionResult) -> None:
    """Compare every sample that names its healthy image with it, bit for bit outside the edit region.

    Adds one figure, and a flag where a background is not its healthy image's; a note where nothing can be proven.
    """
    images = context.synthetic
    named = [
        (row, str(name)) for row, name in enumerate(images.table["background"]) if name not in (None, SYNTHETIC, "real")
    ]
    if context.healthy is None:
        if named:
            result.note("The set was painted into real images; --healthy DIR proves that it left them as they were.")
        return
    if not named:
        result.note("--healthy was given, but no sample names a healthy image: nothing can be proven.")
        return
    backgrounds = Backgrounds.below(context.healthy)
    problems = []
    for row, sha256 in context.track("proving backgrounds", named, len(named)):
        if sha256 not in backgrounds.paths:
            # Whatever wrote the set's rows may name anything; what is not there proves nothing.
            problems.append(f"{images.table['id'][row]} names a healthy image that is not below --healthy.")
            continue
        problem = backgrounds.difference(sha256, images.images[row], images.masks[row])
        if problem is not None:
            problems.append(f"{images.table['id'][row]}: {problem.problem}")
    share = 100 * len(problems) / len(named)
    result.figures.append(
        Figure(
            key=KEY,
            label="Backgrounds that are not their healthy image's",
            value=Interval(share),
            floor=None,
            synthetic=len(named),
            real=len(backgrounds.paths),
            unit="%",
            flagged=bool(problems),
            note="Every pixel outside the edit region is compared; there is nothing to estimate, hence no interval.",
        )
    )
    if problems:
        result.flag(f"{len(problems)} of {len(named)} backgrounds are not proven. The first: {problems[0]}", KEY)
    else:
        result.note(
            f"All {len(named)} backgrounds equal their healthy image outside the edit region, bit for bit.", KEY
        )
