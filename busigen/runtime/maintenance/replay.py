"""Drawing samples of an existing dataset again: its run's source, opened from what the run recorded about it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busigen.errors import InputError, IntegrityError, UsageError
from busigen.registry import ATTRIBUTES, AUTO, DEFAULT_BATCH, SYNTHETIC
from busigen.runtime.backends.base import EngineOptions, open_backend
from busigen.runtime.backends.bundle import RECORD, Bundle, default_bundle
from busigen.runtime.backends.tensorrt.profiles import Batches
from busigen.runtime.dataset.format import RUN_FILE, SHARD_FOLDER, Plan, Source, as_typed, differences
from busigen.runtime.dataset.reader import plan_of
from busigen.runtime.dataset.shards import ShardRecord, write_shard
from busigen.runtime.output.ownership import run_record
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.conditions import parse_classes, parse_conditions, parse_lesions, refuse_normals
from busigen.runtime.sampling.grid import Grid
from busigen.runtime.sampling.inputs.backgrounds import parse_tissue
from busigen.runtime.sampling.inputs.given_masks import MaskFolder, refuse_jitter
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from busigen.runtime.storage.files import output_errors
from busigen.text import describe

BYTES_ONLY = ("busigen", "fingerprint.engine_version", "versions.")
"""Fields of a run record that may change a sample's bytes, but not which samples exist."""

Change = tuple[str, Any, Any]  # dotted field of a run record, its value then, and its value now


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of a dataset's run lie now: a dataset holds their hashes, not their paths."""

    bundle: Path | None = None  # None for the shipped one
    healthy: Path | None = None  # not needed where backgrounds are synthetic
    provider: str | None = None  # a name in registry.PROVIDERS; None for the run's own
    threads: int | None = None  # None for one per core
    progress: Progress = field(default_factory=Progress)
    masks: Path | None = None  # not needed where stage 1 drew the outlines

    def open(self, run: Mapping[str, Any], *, other_bundle: bool = False) -> Source:
        """The source of a run, by the content of its ``run.json``, with the same healthy images.

        With ``other_bundle``, a bundle that was given by name is taken even if it is not the run's. Raises an
        InputError for inputs that are not the run's, or a provider that is not usable; an IntegrityError for damage.
        """
        recorded = run.get("fingerprint")
        if not isinstance(recorded, Mapping) or "bundle" not in recorded:
            raise IntegrityError(f"{RUN_FILE} names no bundle.", fix="Get the original dataset again.")
        bundle = self._bundle(run, other_bundle)
        # What auto takes where a run stands already: that run's.
        provider = str(recorded.get("provider") if self.provider in (None, AUTO) else self.provider)
        try:
            backend = open_backend(bundle, provider, EngineOptions(self.threads, exact_batches=Batches.recorded(run)))
        except UsageError as error:
            if self.provider or self.threads is not None:
                raise
            raise InputError(f"the run's provider cannot be used here: {error.problem}", fix=error.fix) from error
        # Calls of a fixed size are filled: a smaller batch would be padded to it.
        batch_size = backend.batches.sizes[0] if backend.batches else DEFAULT_BATCH
        sampler = Sampler(bundle, backend, **recorded_conditions(run), batch_size=batch_size)
        # What a hash of the folder decides comes last: reading its images may take minutes.
        if recorded.get("healthy") != SYNTHETIC:
            sampler.plan.healthy = self._healthy(run)
        if recorded.get("masks") is not None:
            sampler.plan.masks = self._masks(run, sampler)
        return sampler

    def recorded_bundle(self, run: Mapping[str, Any]) -> Bundle | None:
        """The run's bundle, of which the record alone is read; None where it is not at hand."""
        try:
            bundle = Bundle.recorded(self.bundle or default_bundle())
        except (InputError, IntegrityError):
            return None
        return bundle if bundle.sha256 == run["fingerprint"].get("bundle") else None

    def _bundle(self, run: Mapping[str, Any], other: bool) -> Bundle:
        folder, recorded = self.bundle or default_bundle(), str(run["fingerprint"]["bundle"])
        found = Bundle.recorded(folder).sha256
        if found != recorded and not (other and self.bundle):
            name = as_typed(run, "--bundle") or "the one that came with it"
            given = f"{folder} is" if self.bundle else "the shipped one is"
            shipped = not (run.get("options") or {}).get("--bundle")
            raise InputError(
                f"the dataset was made with another bundle ({name}, {RECORD} {recorded[:12]}...): {given} "
                f"{found[:12]}..., which draws other samples.",
                fix="Give the run's own bundle with --bundle"
                + (f", or use busigen {run.get('busigen')}, which ships it." if shipped else "."),
            )
        return Bundle.open(folder)

    def _healthy(self, run: Mapping[str, Any]) -> HealthyFolder:
        name, recorded = as_typed(run, "--healthy"), str(run["fingerprint"]["healthy"])
        if self.healthy is None:
            problem = f"the dataset was painted into the healthy images of a folder named {name!r}, which is not given."
            raise InputError(problem, fix="Give that folder with --healthy.")
        frames = as_typed(run, "--frames") or "1"
        if not re.fullmatch("[1-9][0-9]{0,5}", frames):
            raise IntegrityError(f"{RUN_FILE} says --frames {frames!r}.", fix="Get the original dataset again.")
        folder = HealthyFolder(self.healthy, self.progress, frames=int(frames))
        if folder.fingerprint() != recorded:
            raise InputError(
                f"--healthy {self.healthy} holds other images than the run's {name!r} did: {len(folder)} images of "
                f"fingerprint {folder.fingerprint()[:12]}... instead of {recorded[:12]}....",
                fix="Give the folder as it was: with one image more or less, every sample gets another one.",
            )
        return folder

    def _masks(self, run: Mapping[str, Any], sampler: Sampler) -> MaskFolder:
        name, recorded = as_typed(run, "--masks"), str(run["fingerprint"]["masks"])
        if self.masks is None:
            problem = f"the dataset's masks are those of a folder named {name!r}, which is not given."
            raise InputError(problem, fix="Give that folder with --masks.")
        folder = MaskFolder(self.masks, self.progress, classes=sampler.plan.classes)
        if (found := folder.fingerprint(sampler.plan.healthy)) != recorded:
            raise InputError(
                f"--masks {self.masks} holds other masks or classes than the run's {name!r} did, or goes with other "
                f"healthy images by name: {len(folder)} masks of fingerprint {found[:12]}... instead of "
                f"{recorded[:12]}....",
                fix="Give both folders as they were: with one mask more or less, every sample gets another one.",
            )
        return folder


def recorded_conditions(run: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's samples beside its folders, as :class:`Sampler` takes it, or an IntegrityError."""
    recorded = run["fingerprint"]
    try:
        classes = parse_classes(",".join(f"{name}={weight!r}" for name, weight in recorded["classes"].items()))
        asked = parse_conditions(**{name: recorded.get(name) for name in (*ATTRIBUTES, "birads")})
        jitter = refuse_jitter(float(recorded.get("jitter") or 0.0))
        normals = refuse_normals(float(recorded.get("normals") or 0.0))
        lesions = parse_lesions(recorded.get("lesions"))
        grid = Grid.parse(recorded["vary"]) if recorded.get("vary") else None
        tissue = parse_tissue(recorded.get("density"), recorded.get("chest_wall"), recorded.get("tissue_maps") is True)
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        problem = f"{RUN_FILE} does not say what was asked for: {error}."
        raise IntegrityError(problem, fix="Get the original dataset again.") from error
    given = {"jitter": jitter, "normals": normals, "lesions": lesions, "grid": grid, "tissue": tissue}
    given["scanner"] = recorded.get("scanner")
    return {"classes": classes, "asked": asked, **given}


@contextmanager
def redrawn_shard(
    source: Source, plan: Plan, number: int, indices: range, done: Callable[[int], None]
) -> Iterator[tuple[Path, ShardRecord]]:
    """Draw samples of one shard again and write them, as generate does, to a temporary folder: it, and their record."""
    batch = source.draw(plan.seed, indices, done)
    with tempfile.TemporaryDirectory(prefix="busigen-") as name:
        folder = Path(name)
        with output_errors(folder):
            (folder / SHARD_FOLDER).mkdir()
            record = write_shard(folder, number, batch, source.row_types())
        yield folder, record


def other_conditions(run: Mapping[str, Any], source: Source) -> list[Change]:
    """In what a source differs from the run (content of ``run.json``) that made a dataset."""
    now = run_record(source, plan_of(dict(run), Path(RUN_FILE)))
    ignored = ("options.", "unproven", "engine_batches")
    return [change for change in differences(run, now) if not change[0].startswith(ignored)]


def refuse_other_samples(run: Mapping[str, Any], source: Source) -> None:
    """Raise an InputError on a source that would draw other samples than the dataset's."""
    if changed := [change for change in other_conditions(run, source) if not change[0].startswith(BYTES_ONLY)]:
        named = "; ".join(f"{name}: {describe(then)} -> {describe(now)}" for name, then, now in changed[:3])
        fix = f"Use the version that made it: busigen {run.get('busigen')}, with the run's own provider."
        raise InputError(f"this busigen would draw other samples than the dataset's ({named}).", fix=fix)


def then_and_now(changes: Iterable[Change]) -> list[str]:
    """Changed conditions in words."""
    return [f"{name}: {describe(then)} then, {describe(now)} now" for name, then, now in changes]
