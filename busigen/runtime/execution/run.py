"""``busigen generate`` from options to report: cheap checks first, so that nobody waits for a folder to be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import busigen
from busigen.data.sources.frames import refuse_frames
from busigen.errors import BusigenError, ProviderError, UsageError
from busigen.registry import AUTO, DEFAULT_BATCH, SHARD_SIZE, SYNTHETIC
from busigen.runtime.backends.base import EngineOptions, TimedBackend, open_backend, provider_named
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.memory import require_memory
from busigen.runtime.backends.probe import choose
from busigen.runtime.dataset.format import Plan, decided
from busigen.runtime.execution.factory import GenerateReport, generate, planned, refuse_small_disk
from busigen.runtime.execution.launchers import launcher
from busigen.runtime.execution.signals import Stopping
from busigen.runtime.execution.workers import Coordinator, SourceMaker
from busigen.runtime.output.base import LocalOutput, Output
from busigen.runtime.output.ownership import refuse_other_run
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.conditions import (
    SampleConditions,
    hardly_known,
    parse_conditions,
    parse_lesions,
    parse_shares,
    refuse_normals,
)
from busigen.runtime.sampling.grid import Grid
from busigen.runtime.sampling.inputs.backgrounds import AskedTissue, parse_tissue
from busigen.runtime.sampling.inputs.given_masks import MaskFolder, refuse_jitter
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from busigen.runtime.storage.url import Address
from busigen.text import shell_word

_LOGGED = ("count", "seed", "shard_size", "provider", "index_range", "array_task", "launcher", "workers")


@dataclass(frozen=True)
class SourceOptions:
    """What decides which samples there are, and what draws them, as it was typed; :meth:`source` checks it.

    It is no pydantic model: what is wrong is said by the checks that other commands share.
    """

    bundle: Path | None = None  # None for the shipped one
    healthy: str = SYNTHETIC  # or a folder of healthy images
    frames: int = 1  # of each DICOM file among the healthy images
    masks: Path | None = None  # a folder of masks, which take the place of stage 1
    jitter: float = 0.0  # share by which they are moved and scaled
    normals: float = 0.0  # share of the samples that have no lesion
    lesions: str | None = None  # how many an image has, or several numbers with their shares
    vary: str | None = None  # of a grid: what is varied on each background
    classes: str = "benign=0.5,malignant=0.5"
    seed: int = 0
    batch_size: int = DEFAULT_BATCH
    provider: str = AUTO  # the one that ``out`` was begun with, else the best here; or a name in registry.PROVIDERS
    threads: int | None = None  # None for one per core
    size: str | None = None  # of outlines, a number or ``low:high``, as the next three
    depth: str | None = None
    across: str | None = None
    height_width: str | None = None
    taller_than_wide: bool = False
    birads: str | None = None  # a category, or several with their shares
    scanner: str | None = None  # a name of the bundle's, or any, or mix
    density: str | None = None  # of synthetic backgrounds' tissue, as the next two
    chest_wall: str | None = None
    tissue_maps: bool = False
    allow_fallback: bool = False  # where the provider cannot be used, go on with the processor

    def conditions(self) -> tuple[dict[str, float], SampleConditions]:
        """Class weights and what is asked of lesions; a ``UsageError`` where an option is unfit."""
        names = ("size", "depth", "across", "height_width", "taller_than_wide", "birads")
        options = {name: getattr(self, name) for name in names}
        grid = self.grid()
        if grid and self.masks is not None:
            raise UsageError(f"--vary {self.vary} and --masks {self.masks} are both given.", fix="Leave out one.")
        asked = grid.held(options) if grid else parse_conditions(**options)
        if self.masks is not None and asked:
            typed = next(f"--{name.replace('_', '-')}" for name in names if getattr(self, name))
            problem = f"{typed} asks for outlines, and --masks {self.masks} gives them."
            raise UsageError(problem, fix=f"Leave out {typed}, or --masks.")
        if refuse_jitter(self.jitter) and self.masks is None:
            raise UsageError(f"--jitter is {self.jitter:g}, without masks.", fix="Add --masks DIR.")
        self._tissue()
        if refuse_normals(self.normals) and grid:
            raise UsageError(f"--normals is {self.normals:g}, and a grid varies lesions.", fix="Leave out --normals.")
        self._lesions(asked)
        return parse_shares(self.classes), asked

    def grid(self) -> Grid | None:
        """What is varied; a ``UsageError`` where it cannot be."""
        return Grid.parse(self.vary) if self.vary else None

    def _lesions(self, asked: SampleConditions) -> dict[str, float]:
        """How many lesions images have; a ``UsageError`` where nothing else allows more than one."""
        lesions = parse_lesions(self.lesions)
        if not lesions:
            return lesions
        problem = f"--lesions is {self.lesions}"
        if self.vary is not None:
            raise UsageError(f"{problem}, and a grid varies one lesion of an image.", fix="Leave out --lesions.")
        if self.masks is not None:
            fix = "Leave out --lesions: a mask with several parts is painted as it is."
            raise UsageError(f"{problem}, and --masks {self.masks} gives each image its mask.", fix=fix)
        if all(len(set(asked.ranges.get(name, (0, 1)))) == 1 for name in ("across", "depth")):
            fix = "Give a range of one of them, such as --across 0.2:0.8, or leave it out."
            raise UsageError(f"{problem}, and --across and --depth ask for all of them in one place.", fix=fix)
        return lesions

    def _tissue(self) -> AskedTissue:
        tissue = parse_tissue(self.density, self.chest_wall, self.tissue_maps)
        if tissue and self.healthy != SYNTHETIC:
            option = f"--{next(iter(tissue.typed())).replace('_', '-')}"
            raise UsageError(
                f"{option} is for synthetic backgrounds, and --healthy is {self.healthy}.", fix=f"Leave {option} out."
            )
        return tissue

    def source(self, progress: Progress) -> Sampler:
        """Where samples come from; this checks bundle, provider, threads and batch size."""
        return self._source(progress, lambda sampler: None, None)

    def _source(
        self, progress: Progress, check: Callable[[Sampler], None], out: Path | None, processes: int = 1
    ) -> Sampler:
        """:meth:`source`, where ``check`` may refuse it before folders of images are read; ``out`` is passed over."""
        classes, asked = self.conditions()
        bundle = Bundle.open(self.bundle or default_bundle())
        name = choose().provider if self.provider == AUTO else self.provider
        engine = EngineOptions(self.threads, batch_sizes=(self.batch_size,), processes=processes)
        backend = TimedBackend(open_backend(bundle, name, engine, allow_fallback=self.allow_fallback))
        progress.stage_seconds = backend.seconds
        sampler = Sampler(
            bundle,
            backend,
            classes=classes,
            asked=asked,
            jitter=self.jitter,
            grid=self.grid(),
            tissue=self._tissue(),
            normals=self.normals,
            scanner=self.scanner,
            lesions=self._lesions(asked),
            batch_size=self.batch_size,
        )
        if self._folders():
            # All but the images is known already, and reading those may take minutes.
            check(sampler)
        if self.masks is not None:
            sampler.plan.masks = MaskFolder(self.masks, progress, out=out, classes=classes)
        if self.healthy != SYNTHETIC:
            sampler.plan.healthy = HealthyFolder(Path(self.healthy), progress, out=out, frames=self.frames)
        return sampler

    def _folders(self) -> dict[str, Path]:
        """The folders of images that options name, by the options."""
        healthy = {} if self.healthy == SYNTHETIC else {"--healthy": Path(self.healthy)}
        return healthy if self.masks is None else {**healthy, "--masks": self.masks}


@dataclass(frozen=True)
class GenerateOptions(SourceOptions):
    """The options of ``busigen generate`` as they were typed; :meth:`run` checks them.

    The command line, the Python interface, launchers and workers share one object, which is pickled for workers.
    """

    out: Path | Address = field(kw_only=True)
    count: int | None = None  # accepted samples in the dataset; None where ``index_range`` says so
    shard_size: int = SHARD_SIZE
    index_range: str | None = None  # ``first:end``, the samples that this command makes
    array_task: str | None = None  # ``K/N``, the part of these that it makes
    launcher: str = "local"
    workers: int | None = None  # processes that make shards; None for what the launcher takes by itself
    ray_address: str | None = None  # of a cluster that runs; None for one of this command's own
    spool: Path | None = None  # staging folder on the way to a URL; None for one in the user's cache folder

    @classmethod
    def of_grid(cls, out: Path | Address, backgrounds: int, *, vary: str, **options: Any) -> GenerateOptions:
        """Those of a grid: samples for each of the ``backgrounds``, whole ones in every shard; a ``UsageError``."""
        if backgrounds < 1:
            raise UsageError(f"--backgrounds is {backgrounds}.", fix="Give a whole number from 1.")
        cells = len(Grid.parse(vary).cells)
        shard_size = cells * max(1, SHARD_SIZE // cells)
        return cls(out=out, count=backgrounds * cells, shard_size=shard_size, vary=vary, **options)

    def given(self) -> list[str]:
        """What `busigen verify` is to be given, so that it compares a dataset with the folders that made it."""
        return [f"{option} {shell_word(folder)}" for option, folder in self._folders().items()]

    def run(self, progress: Progress, stop: Stopping | None = None) -> GenerateReport:
        """Generate the dataset, or finish one that the same options began; ``stop`` may end it after any shard."""
        begun_with = self._begun_with(progress) if self.provider == AUTO else None
        choice = choose(begun_with) if self.provider == AUTO else None
        options = replace(self, provider=choice.provider) if choice else self
        progress.event(
            "started",
            busigen=busigen.__version__,
            process=os.getpid(),
            out=str(self.out.absolute() if isinstance(self.out, Path) else self.out),
            **{name: getattr(options, name) for name in _LOGGED},
        )
        if choice:
            progress.note(f"provider: {choice.provider} ({choice.why})")
        try:
            return options._run(progress, stop or Stopping())
        except ProviderError as error:
            if not begun_with:
                raise
            raise ProviderError(
                f"{self.out} was begun with --provider {begun_with}, which cannot be used here. {error.problem}",
                fix="Continue it on a machine like the first one, or choose another --out.",
            ) from error

    def _run(self, progress: Progress, stop: Stopping) -> GenerateReport:
        """All of :meth:`run`, with a provider that has a name; what is cheap to check comes first."""
        refuse_frames(self.frames)
        chosen = launcher(self.launcher)
        task = chosen.task(self.array_task)
        plan, part = planned(self.count, self.index_range, task, seed=self.seed, shard_size=self.shard_size)
        classes, asked = self.conditions()
        kinds = (tuple(classes), tuple(asked.birads))
        if grid := self.grid():
            grid.refuse_cut(plan)
            kinds = (grid.levels("class") or kinds[0], grid.levels("birads") or kinds[1])
        if isinstance(self.out, Path):
            if self.spool is not None:
                problem = f"--spool {self.spool} is for URLs, and --out {self.out} is a folder."
                raise UsageError(problem, fix="Leave --spool out.")
        elif part is not None:
            from busigen.runtime.output.remote import tasks_refused

            raise tasks_refused(self.out)
        for line in hardly_known(*kinds) if self.bundle is None else ():
            progress.note(line)
        output = self._output(progress)
        refuse_small_disk(output, plan)
        worker_pool = chosen.worker_pool(self._maker, self)
        options: dict[str, Any] = {**asdict(plan), "part": part, "progress": progress, "stop": stop}
        if worker_pool is None:
            return generate(self.source(progress, plan, output), output, **options)
        with worker_pool:
            coordinator = Coordinator(worker_pool, progress)
            return generate(coordinator.source(), output, make=coordinator.make, **options)

    def source(self, progress: Progress, plan: Plan | None = None, output: Output | None = None) -> Sampler:
        """See :class:`SourceOptions`; with plan and output of a run in this process, another run is refused early."""

        def refuse(sampler: Sampler) -> None:
            existing = output.stored_run() if output else None
            if output and plan and existing:
                refuse_other_run(output.name, existing, sampler, plan, self._folders())

        processes = (self.workers or 1) if self.ray_address is None else 1
        sampler = self._source(progress, refuse, self.out if isinstance(self.out, Path) else None, processes)
        count = planned(self.count, self.index_range, None, seed=self.seed, shard_size=self.shard_size)[0].count
        lesions = int(count * (1 - Fraction(str(self.normals))))
        if sampler.plan.masks:
            sampler.plan.masks.log_use(sampler.plan.healthy, lesions)
        if plan and sampler.plan.healthy and (wanted := count - lesions) > len(sampler.plan.healthy):
            problem = f"--normals {self.normals:g} asks for {wanted} images without a lesion"
            progress.note(f"{problem}, and --healthy has {len(sampler.plan.healthy)}: they are there several times")
        return sampler

    def require_memory(self, processes: int) -> None:
        """A CapacityError if so many processes cannot open the bundle's graphs on this machine's processor."""
        if self.provider == AUTO or not provider_named(self.provider).gpu:
            require_memory(Bundle.recorded(self.bundle or default_bundle()), processes)

    def _begun_with(self, progress: Progress) -> str | None:
        """The provider of the run that already stands where this one is to go; ``None`` where none does."""
        try:
            existing = self._output(progress).stored_run()
            found = decided(existing, "--provider") if existing else None
        except (BusigenError, ValueError, AttributeError):
            # Whatever is wrong there is raised again when the run claims the place.
            return None
        return found if isinstance(found, str) else None

    def _output(self, progress: Progress) -> Output:
        if isinstance(self.out, Path):
            return LocalOutput(self.out)
        from busigen.runtime.output.remote import RemoteOutput

        return RemoteOutput(self.out, self.spool, progress=progress)

    def _maker(self, threads: int | None) -> SourceMaker:
        """What a worker opens its source with; its folders hold wherever that is."""
        healthy = self.healthy if self.healthy == SYNTHETIC else str(Path(self.healthy).absolute())
        bundle = self.bundle.absolute() if self.bundle else None
        masks = self.masks.absolute() if self.masks else None
        return replace(self, bundle=bundle, healthy=healthy, masks=masks, threads=threads).source
