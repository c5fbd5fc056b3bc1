"""What a finished command tells: the lines that the command line prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from busigen.text import counted, disk_size, printable, shell_word, unproven_line

if TYPE_CHECKING:
    from busigen.runtime.execution.factory import GenerateReport
    from busigen.runtime.maintenance.explain import Explanation
    from busigen.runtime.maintenance.merge import MergeReport
    from busigen.runtime.maintenance.repair import RepairReport
    from busigen.runtime.maintenance.verify import VerifyReport

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
    if report.missing:
        yield (
            f"  this task's part is complete; still to come from others: {counted(report.missing, 'shard')}; the last "
            "of them completes the dataset"
        )
    if report.rejected:
        refused = sum(report.rejected.values())
        share = refused / (refused + report.samples)
        yield f"  draws refused by the gates: {share:.1%} ({_counts(dict(sorted(report.rejected.items())))})"
    if not report.missing:
        yield f"  look at {report.folder / 'preview.png'}; check with: busigen verify {shell_word(report.folder)}"


def merged(report: MergeReport) -> Iterator[str]:
    """The lines of ``busigen merge``."""
    shape = "as one run would have made it" if report.parts == 1 else f"in {counted(report.parts, 'part')}"
    yield f"{counted(report.samples, 'sample')} in {report.folder}, {shape}; {disk_size(report.size)} of shards"
    if report.copied:
        yield "  shards were copied: this file system cannot link them"
    yield f"  check with: busigen verify {shell_word(report.folder)}"


def verified(report: VerifyReport, *, proving: bool) -> Iterator[str]:
    """The lines of ``busigen verify``; ``proving`` tells whether the healthy images were given."""
    shown = report.problems[:SHOWN_PROBLEMS]
    for fix in dict.fromkeys(problem.fix for problem in shown):
        yield from (problem.finding for problem in shown if problem.fix == fix)
        yield f"  -> {printable(fix)}"
    if len(report.problems) > SHOWN_PROBLEMS:
        yield f"and {counted(len(report.problems) - SHOWN_PROBLEMS, 'more problem')}"
    state = "is sound" if report.ok else f"has {counted(len(report.problems), 'problem')}"
    # The report counts the shards that there should be, which are those that were read only where none is missing.
    shards = f" in {counted(report.shards, 'shard')}" if report.ok else ""
    yield f"{report.folder} {state}: {counted(report.samples, 'sample')}{shards} read"
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


def repaired(report: RepairReport) -> Iterator[str]:
    """The lines of ``busigen verify --repair`` that come before those of what verify says now."""
    yield from (f"repaired {line}" for line in report.repaired)
    yield from (f"not repaired {line}" for line in report.refused)
    if not report.repaired and not report.refused:
        yield "nothing was repaired"


def explained(described: Explanation) -> Iterator[str]:
    """The lines of ``busigen explain``."""
    past = described.history
    made, background, bundle = past["made_with"], past["background"], past["bundle"]
    yield f"sample {past['key']} of {past['dataset']}: index {past['index']}, seed {past['seed']}, {past['class']}"
    yield f"  bundle        {bundle['name']} ({bundle['sha256']})"
    yield "  made with     " + ", ".join(f"{name} {version}" for name, version in made.items())
    # What a person wants to read of a number; --json and the manifest hold all its digits.
    asked = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in past["asked"].items()}
    yield f"  asked for     {', '.join(f'{name} {value}' for name, value in asked.items() if value is not None)}"
    if background["sha256"]:
        yield f"  painted into  {background['file']} of {background['folder']} ({background['sha256']})"
    else:
        yield f"  painted into  a {background['kind'] or 'generated'} background"
    attempts, refused = "1, nothing refused", past["refused"]
    if refused is None:
        attempts = "unknown: the record is lost"
    elif refused:
        reasons = ", ".join(f"attempt {draw['attempt']} refused: {draw['reason']}" for draw in refused)
        attempts = f"{len(refused) + 1} ({reasons})"
    yield f"  attempts      {attempts}"
    yield f"  shard         {past['shard']['file']}"
    yield "  fingerprints"
    width = max(len(link["link"]) for link in past["chain"])
    yield from (f"    {link['link']:{width}}  {link['sha256']}" for link in past["chain"])
    if past["unproven"]:
        yield f"  unproven: {unproven_line(past['unproven'])}"
    yield from (f"  problem: {problem}" for problem in described.problems)
    replay = described.replay
    if replay is None:
        return
    for kind, agrees in (("image", replay.image_agrees), ("mask", replay.mask_agrees)):
        yield f"  replay: the {kind}'s bytes {'agree' if agrees else 'DIFFER'} ({replay.files[kind]})"
    yield from (f"    {difference}" for difference in replay.differs)
    if replay.conditions:
        yield "  replay: under other conditions than the run's; with another engine, grey levels may differ:"
        yield from (f"    {condition}" for condition in replay.conditions)


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
