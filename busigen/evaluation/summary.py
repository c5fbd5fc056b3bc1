"""What the command line prints about an audit."""

from __future__ import annotations

from collections.abc import Iterator

from busigen.evaluation.audit import Outcome, Report
from busigen.evaluation.report.words import sentence


def audited(report: Report) -> Iterator[str]:
    """The sets, what became of each section with its headline figures and flags, and where the report is."""
    for name, text in report.content["counts"].items():
        yield f"{name:10} {text}"
    for note in report.content["notes"]:
        yield f"  {note}"
    for name, outcome in report.outcomes.items():
        # A page ties numbers to their units; a terminal is shown plain spaces.
        yield from (line.replace("\N{NO-BREAK SPACE}", " ") for line in _section(name, outcome))
    yield f"Report: {report.html}"


def _section(name: str, outcome: Outcome) -> Iterator[str]:
    result = outcome.result
    silent = "nothing flagged" if result.figures else "nothing measured"
    verdict = "NOT RUN" if outcome.error else "FLAGGED" if result.flagged else silent
    kept = " (kept from an earlier run)" if outcome.cached else ""
    yield f"{name:10} {verdict}, {result.seconds:.0f} s{kept}"
    for figure in result.figures:
        if figure.headline:
            yield f"  {figure.label}: {sentence(figure)}{'  FLAGGED' if figure.flagged else ''}"
    for finding in result.findings:
        if finding.level == "flag" or outcome.error:
            yield f"  ! {finding.text}"
        elif not result.flagged:
            # Why nothing is flagged, or could be: a silent section would otherwise look like a clean one.
            yield f"    {finding.text}"
