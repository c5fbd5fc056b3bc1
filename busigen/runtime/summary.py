"""What a finished command tells: the lines that the command line prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from busigen.runtime.wording import counted

if TYPE_CHECKING:
    from busigen.runtime.factory import GenerateReport
    from busigen.runtime.verify import VerifyReport

SHOWN_PROBLEMS = 20
"""Problems that are listed one by one."""


def generated(report: GenerateReport) -> Iterator[str]:
    """The lines of ``busigen generate``."""
    samples = f"{counted(report.samples, 'sample')} ({_counts(report.classes)})"
    if report.already_complete:
        yield f"{report.folder} is complete already: {samples}."
        return
    yield (
        f"{samples} in {report.folder}: {counted(report.shards, 'shard')}, {report.size / 1e6:.1f} MB; "
        f"{counted(report.written, 'shard')} written in {report.seconds:.1f} s"
    )
    if report.rejected:
        refused = sum(report.rejected.values())
        share = refused / (refused + report.samples)
        yield f"  draws refused by the gates: {share:.1%} ({_counts(dict(sorted(report.rejected.items())))})"
    yield f"  look at {report.folder / 'preview.png'}; check with: busigen verify {report.folder}"


def verified(report: VerifyReport, *, proving: bool) -> Iterator[str]:
    """The lines of ``busigen verify``; ``proving`` tells whether the healthy images were given."""
    yield from map(str, report.problems[:SHOWN_PROBLEMS])
    if len(report.problems) > SHOWN_PROBLEMS:
        yield f"and {counted(len(report.problems) - SHOWN_PROBLEMS, 'more problem')}"
    state = "is sound" if report.ok else f"has {counted(len(report.problems), 'problem')}"
    yield f"{report.folder} {state}: {counted(report.samples, 'sample')} in {counted(report.shards, 'shard')} read"
    if not proving:
        return
    if report.backgrounds_synthetic:
        synthetic = counted(report.backgrounds_synthetic, "synthetic background")
        yield f"  {synthetic}: made from no healthy image, so there is nothing to prove"
    if report.backgrounds_synthetic < report.samples:
        yield (
            f"  backgrounds equal to their healthy image outside the edit region, bit for bit: "
            f"{report.backgrounds_proven}; not proven: {report.backgrounds_unproven}"
        )


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
