"""The audit: its sets are read, its sections run or kept from an earlier run, its report written and summed up."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from busigen import __version__
from busigen.data.sources.frames import refuse_frames
from busigen.errors import BusigenError, InputError, OutputError, UsageError
from busigen.evaluation.context import AuditContext, Effort, SectionResult, jsonable, load, section_folder, store
from busigen.evaluation.physics.features import CACHE, is_cache
from busigen.evaluation.reading.inputs import read_inputs
from busigen.evaluation.reading.within import Within
from busigen.evaluation.report.page import CONTACT_SHEET, contact_sheet, write_html
from busigen.evaluation.report.text import sentence
from busigen.evaluation.sections import SECTIONS, Prints, Section, key_of
from busigen.files import write_json
from busigen.records import read_json
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.text import install_command

log = logging.getLogger("busigen.evaluation")

REPORT_SCHEMA = 1  # Version of report.json; raised when a reader of the older one would misread it
REPORT_FILE = "report.json"

QUICK_LIMIT = 500  # Images per set that quick looks at
_LIBRARIES = (
    *("numpy", "scipy", "polars", "pillow", "scikit-image", "scikit-learn"),
    *("torch", "torchmetrics", "torch-fidelity", "monai", "matplotlib"),
)
"""Distributions whose version a report names, where they are installed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one section: its result, whether an earlier run had it, and why it could not run."""

    result: SectionResult
    cached: bool = False
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What an audit found: the sections that were asked for, in order, and what ``report.json`` holds."""

    out: Path
    html: Path
    outcomes: dict[str, Outcome]
    content: dict[str, Any]

    @property
    def flagged(self) -> tuple[str, ...]:
        """Names of the sections that found a defect."""
        return tuple(name for name, outcome in self.outcomes.items() if outcome.result.flagged)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the sections that could not run."""
        return tuple(name for name, outcome in self.outcomes.items() if outcome.error)


def audit(
    synthetic: Path,
    real: Path,
    out: Path,
    *,
    train_split: Path | None = None,
    healthy: Path | None = None,
    external: Path | None = None,
    effort: Effort = "quick",
    only: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    inception: Path | None = None,
    limit: int | None = None,
    frames: int = 1,
    within: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Judge a labelled set against real images and write ``report.json`` and ``report.html``.

    A section's result is kept under ``out/sections/<name>/`` as soon as it is there, so that an interrupted audit
    continues where it was, and an unchanged one only writes the report again. A section that cannot run says why in a
    finding, and the others run all the same.

    Args:
        synthetic: The set under judgement; like the other sets in any layout of ``sets.read_set``.
        real: Real images.
        out: The report's folder; created.
        train_split: Prepared folder that trained the generator: its training images judge nothing.
        healthy: Folder of the healthy images that the set was painted into.
        external: A further real set for the utility section.
        effort: ``quick`` or ``full``.
        only: Names of sections to run; None runs all.
        seed: Seeds every draw.
        device: ``auto``, ``cpu`` or ``cuda``.
        inception: Inception weights for FID, KID and IS.
        limit: Greatest number of images per set; None is ``QUICK_LIMIT`` for ``quick`` and all for ``full``.
        frames: Of each DICOM file, so many frames are taken at even distances.
        within: ``COLUMN=VALUE``: only real images whose column holds the value, and only such synthetic ones where
            that set has the column as well.
        progress: Shows rate and ETA.

    Raises:
        UsageError: an unknown section or device, a limit below 2, no frames, or no condition in ``within``.
        InputError: a set cannot be read, it has no image ``within``, the synthetic one is part of the real one, or no
            real or no external image is left that did not train the generator.
        OutputError: ``out`` cannot be written or holds something else.
    """
    started = time.perf_counter()
    sections = _choose_sections(only)
    refuse_frames(frames)
    if limit is not None and limit < 2:
        raise UsageError(f"--limit is {limit}.", fix="Give a whole number from 2.")
    device = _resolve_device(device)
    condition = None if within is None else Within.parse(within)
    # Before anything is read: who misspells one of several folders should not wait for the others.
    for option, path in (("--real", real), ("--healthy", healthy), ("--external", external)):
        if path is not None and not path.exists():
            raise InputError(f"{option} {path} does not exist.", fix="Give a folder of images.")
    if inception is not None and not inception.is_file():
        raise InputError(f"--inception {inception} is no file.", fix="Give the file with the Inception weights.")
    progress = progress or Progress()
    with output_errors(out):
        _claim(out)
    if limit is None and effort == "quick":
        limit = QUICK_LIMIT
    parts, about = read_inputs(synthetic, real, train_split, external, limit, seed, frames, progress, condition)
    context = AuditContext(
        **parts,
        out=out,
        effort=effort,
        seed=seed,
        device=device,
        inception=inception,
        healthy=healthy,
        progress=progress,
    )
    paths = {"train": train_split, "healthy": healthy, "external": external, "inception": inception}
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    with output_errors(out):
        prints = {name: part and part["fingerprint"] for name, part in about["sets"].items()}
        outcomes = {section.name: _outcome(section, context, prints) for section in sections}
        contact_sheet(context.synthetic, context.real, out / CONTACT_SHEET)
        seconds = {name: outcome.result.seconds for name, outcome in outcomes.items()}
        content = {
            "schema_version": REPORT_SCHEMA,
            "busigen": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "inputs": {
                "synthetic": str(synthetic),
                "real": str(real),
                **{name: None if path is None else str(path) for name, path in paths.items()},
                "backgrounds": context.backgrounds,
                "effort": effort,
                "limit": limit,
                "seed": seed,
                "device": device,
                "within": within,
            },
            **about,
            "versions": versions,
            "sections": [
                {
                    **jsonable(outcome.result.to_dict()),
                    "title": SECTIONS[name].title,
                    "question": SECTIONS[name].question,
                    "flagged": outcome.result.flagged,
                    "cached": outcome.cached,
                    "error": outcome.error,
                }
                for name, outcome in outcomes.items()
            ],
            "seconds": {**seconds, "this run": time.perf_counter() - started},
        }
        write_json(out / REPORT_FILE, content)
        html = write_html(content, out)
    return Report(out, html, outcomes, content)


def audited(report: Report) -> Iterator[str]:
    """The sets, what became of each section with its headline figures and flags, and where the report is."""
    for name, text in report.content["counts"].items():
        yield f"{name:10} {text}"
    for note in report.content["notes"]:
        yield f"  {note}"
    for name, outcome in report.outcomes.items():
        result = outcome.result
        silent = "nothing flagged" if result.figures else "nothing measured"
        verdict = "NOT RUN" if outcome.error else "FLAGGED" if result.flagged else silent
        kept = " (kept from an earlier run)" if outcome.cached else ""
        lines = [f"{name:10} {verdict}, {result.seconds:.0f} s{kept}"]
        for figure in result.figures:
            if figure.headline:
                lines.append(f"  {figure.label}: {sentence(figure)}{'  FLAGGED' if figure.flagged else ''}")
        for finding in result.findings:
            if finding.level == "flag" or outcome.error:
                lines.append(f"  ! {finding.text}")
            elif not result.flagged:
                # Why nothing is flagged, or could be: a silent section would otherwise look like a clean one.
                lines.append(f"    {finding.text}")
        # A page ties numbers to their units; a terminal is shown plain spaces.
        yield from (line.replace("\N{NO-BREAK SPACE}", " ") for line in lines)
    yield f"Report: {report.html}"


def _choose_sections(only: Sequence[str] | None) -> list[Section]:
    """The sections of these names, in the order of ``SECTIONS``; all of them for None."""
    names = list(SECTIONS) if only is None else [name.strip() for name in only if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        problem = f"--only names no section '{unknown[0]}'" if unknown else "--only names no section"
        raise UsageError(f"{problem}.", fix=f"Give some of: {', '.join(SECTIONS)}, separated by commas.")
    return [section for section in SECTIONS.values() if section.name in names]


def _resolve_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where PyTorch finds it."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device is {device!r}.", fix="Give auto, cpu or cuda.")
    available = False
    if device != "cpu" and find_spec("torch") is not None:
        import torch

        available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch finds no CUDA device here.", fix="Use --device cpu.")
    return "cuda" if available else "cpu"


def _claim(out: Path) -> None:
    """Refuse a folder that holds anything but an audit's report, since files of an earlier one are removed."""
    sections = out / "sections"
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file.", fix="Name a folder for the report.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        report = read_json(out / REPORT_FILE)
    except (OSError, ValueError):
        report = None
    foreign = set()
    if not (isinstance(report, dict) and report.keys() >= {"busigen", "schema_version", "sections"}):
        # One that was killed before it could write its report leaves the others.
        present = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        foreign = present - {"sections", CONTACT_SHEET}
        if is_cache(out / CACHE):
            foreign.discard(CACHE)
    if sections.is_symlink() or (sections.is_dir() and {path.name for path in sections.iterdir()} - set(SECTIONS)):
        foreign.add("sections")
    if foreign:
        raise OutputError(
            f"{out} is not empty and holds no report: {sorted(foreign)[0]!r}.", fix="Name a new or empty folder."
        )
    sections.mkdir(exist_ok=True)


def _outcome(section: Section, context: AuditContext, prints: Prints) -> Outcome:
    """The section's kept result, or that of running it, which is kept unless it could not run."""
    key = key_of(section, context, prints)
    kept = load(context.out, section.name, key)
    if kept is not None:
        return Outcome(kept, cached=True)
    log.info("%s: %s", section.title, section.question)
    started = time.perf_counter()
    before = {path: path.stat().st_mtime_ns for path in section_folder(context.out, section.name).glob("*.*")}
    error = ""
    result = SectionResult(section.name)
    try:
        result = section.run(context)
    except ModuleNotFoundError as missing:
        error = f"It needs {missing.name}, which is not installed. Run {install_command('eval')}."
    except BusigenError as problem:
        error = str(problem)
    except Exception as problem:
        # One section must not cost the user the other five; the log has the rest.
        log.exception("section %s failed", section.name)
        error = f"{type(problem).__name__}: {problem}"
    finally:
        context.progress.stop()
    result = replace(result, seconds=time.perf_counter() - started)
    if error:
        result.note(f"This section could not run. {error}")
        return Outcome(result, error=error)
    # From JSON in either case, so that a kept result and a fresh one read the same.
    result = SectionResult.from_dict(jsonable(result.to_dict()))
    # Only now: a run that fails leaves the files of the one before it as they were.
    for path, changed in before.items():
        if path.is_file() and path.stat().st_mtime_ns == changed:
            path.unlink()
    store(context.out, key, result)
    return Outcome(result)
