"""The commands as functions: what they take and give are Python's values, and what they print is on the results.

A place is a folder or a URL (s3://, gs://), as text or `pathlib.Path`. ``progress`` shows a bar, or a line now and
then, on standard error. Mistakes raise a `busigen.errors.BusigenError`. docs/python.md shows how they are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from busigen.api.pairs import Pair, drawn
from busigen.errors import UsageError, needs
from busigen.registry import SHARD_SIZE
from busigen.runtime.dataset.format import MAX_COUNT, Plan
from busigen.runtime.execution.run import GenerateOptions, SourceOptions
from busigen.runtime.maintenance.remote import explain_place, verify_place
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.progress import Progress, console_progress
from busigen.runtime.storage.url import place_of, refuse_urls

if TYPE_CHECKING:
    from busigen.data.prepare import PrepareReport
    from busigen.evaluation.audit import Report as AuditReport
    from busigen.runtime.execution.factory import GenerateReport
    from busigen.runtime.maintenance.explain import Explanation
    from busigen.runtime.maintenance.verify import VerifyReport

Place = str | PathLike[str]
Range = float | str | tuple[float, float]  # 0.3, "0.2:0.4" or (0.2, 0.4)


class SampleOptions(TypedDict, total=False):
    """The options of ``busigen generate`` that say which samples there are and what draws them, with its defaults."""

    classes: str | Mapping[str, float] | Sequence[str]  # {"benign": 0.5, "malignant": 0.5}, or "malignant"
    healthy: Place  # a folder of healthy images, or "synthetic"
    frames: int  # to take of each DICOM file among them
    masks: Place | None  # a folder of your own masks, painted in turn
    jitter: float  # share by which they are moved and scaled
    bundle: Place | None  # None for the shipped one
    seed: int
    size: Range | None  # the lesion's area as a share of the image's
    depth: Range | None  # share of the image's height above the lesion's centre
    across: Range | None  # share of the image's width left of it
    height_width: Range | None  # of the lesion
    taller_than_wide: bool
    birads: int | str | Mapping[int | str, float] | None  # 4, or {2: 0.1, 3: 0.4, 4: 0.3, 5: 0.2}
    normals: float  # share of pairs without a lesion
    scanner: str | None  # a name of the bundle's, "any" or "mix"
    lesions: int | str | Mapping[int | str, float] | None  # of an image: 2, or {1: 0.9, 2: 0.1}
    density: str | None  # of synthetic backgrounds: A to D
    chest_wall: Range | None  # share of the height above their muscle
    tissue_maps: bool
    provider: str
    allow_fallback: bool
    threads: int | None
    batch_size: int


class WriteOptions(SampleOptions, total=False):
    """All options of ``busigen generate`` that make sense in a process, with its defaults."""

    index_range: str | None
    array_task: str | None
    launcher: str
    workers: int | None
    ray_address: str | None
    spool: Place | None


def source_options(options: SampleOptions, own: Collection[str] = ("count", "first")) -> SourceOptions:
    """The options as they are typed at the command line; a UsageError where one is unfit.

    ``own`` names the arguments that a function has beside them.
    """
    made = SourceOptions(**typed(options, SampleOptions.__annotations__, own))
    made.conditions()
    return made


def generate(count: int | None = None, *, first: int = 0, **options: Unpack[SampleOptions]) -> Iterator[Pair]:
    """Draw pairs and keep nothing: those of ``busigen generate`` with the same options, in the order of their indices.

    Pairs are drawn ahead in threads; to end before the last one, close the iterator or drop it.

    Args:
        count: How many; None goes on without an end.
        first: Index of the first one.
        options: Those of `SampleOptions`.

    Raises:
        UsageError: an option is unfit, or the provider cannot be used.
        InputError: bundle or healthy images cannot be read.
        IntegrityError: the bundle is not what was exported.
        AcceptanceError: the quality gates refuse a sample again and again; from the iterator.
    """
    made = source_options(options)
    return drawn(made, indices_of(count, first, made.seed))


def write(
    out: Place,
    count: int | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
    **options: Unpack[WriteOptions],
) -> GenerateReport:
    """Write a dataset of ``count`` pairs to a folder or URL, or finish one: the very files of ``busigen generate``.

    Raises what `generate` does, and an OutputError where the place holds something else or cannot be written. Ctrl-C
    ends it with a GenerationInterrupted; whole shards are kept, and the same call continues.
    """
    said = typed(options, WriteOptions.__annotations__, ("count", "shard_size", "progress"))
    made = GenerateOptions(out=place_of(str(out)), count=count, shard_size=shard_size, **said)
    with _shown(progress) as shown:
        return made.run(shown)


def grid(
    out: Place,
    vary: str | Sequence[str],
    backgrounds: int = 10,
    *,
    progress: bool = True,
    **options: Unpack[SampleOptions],
) -> GenerateReport:
    """Write counterfactual sets, or finish them: the very files of ``busigen grid``.

    Each background gets a sample for each combination of the levels in ``vary``, such as ``"class,size=0.02/0.05"``
    or ``["class", "size=0.02/0.05"]``.
    Raises what `write` does.
    """
    levels = vary if isinstance(vary, str) else ",".join(vary)
    said = typed(options, SampleOptions.__annotations__, ("vary", "backgrounds", "progress"))
    made = GenerateOptions.of_grid(place_of(str(out)), backgrounds, vary=levels, **said)
    with _shown(progress) as shown:
        return made.run(shown)


def verify(
    dataset: Place, *, healthy: Place | None = None, masks: Place | None = None, progress: bool = True
) -> VerifyReport:
    """Check a dataset against its records; with its healthy images, every background, and with its masks, every mask.

    Nothing is changed.

    ``ok`` of the result says whether all is sound, ``problems`` what is not. An InputError says that it is no dataset.
    """
    with _shown(progress) as shown:
        return verify_place(place_of(str(dataset)), healthy=_path(healthy), masks=_path(masks), progress=shown)


def explain(
    dataset: Place,
    key: str | int,
    *,
    bundle: Place | None = None,
    healthy: Place | None = None,
    masks: Place | None = None,
    provider: str | None = None,
    threads: int | None = None,
    replay: bool = True,
    out: Place | None = None,
    progress: bool = True,
) -> Explanation:
    """One sample's history, and with ``replay`` whether drawing it again gives the same bytes.

    ``error`` of the result is what is wrong with the sample, or None. A UsageError says that there is no such key.
    """
    with _shown(progress) as shown:
        inputs = Inputs(_path(bundle), _path(healthy), provider, threads, shown, _path(masks))
        return explain_place(place_of(str(dataset)), str(key), inputs=inputs, replay=replay, out=_path(out))


def prepare(
    sources: Place | Sequence[Place],
    out: Place,
    *,
    seed: int = 0,
    strict: bool = False,
    mask_values: Sequence[int] = (),
    frames: int = 1,
    progress: bool = True,
) -> PrepareReport:
    """Read labelled folders into a prepared folder; see `busigen.data.prepare.prepare`, also for what it raises."""
    from busigen.data.prepare import prepare as run

    folders = [sources] if isinstance(sources, (str, PathLike)) else sources
    with _shown(progress) as shown:
        return run(
            [Path(folder) for folder in folders],
            Path(out),
            seed=seed,
            strict=strict,
            mask_values=mask_values,
            frames=frames,
            progress=shown.counter("preparing", "image"),
            looked=shown.counter("looking at DICOM files", "file"),
        )


def audit(
    synthetic: Place,
    real: Place,
    out: Place,
    *,
    train_split: Place | None = None,
    healthy: Place | None = None,
    external: Place | None = None,
    full: bool = False,
    only: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    frames: int = 1,
    within: str | None = None,
    device: str = "auto",
    inception: Place | None = None,
    progress: bool = True,
) -> AuditReport:
    """Judge a synthetic set against real images; see `busigen.evaluation.audit.audit`, also for what it raises.

    ``flagged`` and ``failed`` of the result name sections, ``content`` is what ``report.json`` holds. It needs the
    extra ``eval``, or raises a MissingDependencyError.
    """
    with needs("eval", "busigen.audit"):
        from busigen.evaluation.audit import audit as run
    places = [_path(place) for place in (train_split, healthy, external)]
    sets = (Path(synthetic), Path(real))
    refuse_urls(*sets, *filter(None, places), what="audit")
    with _shown(progress) as shown:
        return run(
            *sets,
            Path(out),
            train_split=places[0],
            healthy=places[1],
            external=places[2],
            effort="full" if full else "quick",
            only=[only] if isinstance(only, str) else only,
            seed=seed,
            limit=limit,
            frames=frames,
            within=within,
            device=device,
            inception=_path(inception),
            progress=shown,
        )


def indices_of(count: int | None, first: int, seed: int) -> range:
    """The indices of ``count`` samples from ``first`` on, of all that there can be for None; or a UsageError."""
    if not 0 <= first < MAX_COUNT:
        raise UsageError(f"first is {first}.", fix=f"Give a whole number from 0 to {MAX_COUNT - 1}.")
    # A shard of one sample: where samples go to no shard, any of them may be the first.
    return Plan(MAX_COUNT - first if count is None else count, seed, 1, first).span


def typed(options: Mapping[str, Any], known: Collection[str], own: Collection[str]) -> dict[str, Any]:
    """Options as they are typed at the command line; a UsageError for one that is not among the ``known``."""
    if unknown := [name for name in options if name not in known]:
        near = get_close_matches(unknown[0], (*known, *own), n=1)
        fix = f"Did you mean {near[0]}?" if near else f"Choose among: {', '.join((*own, *known))}."
        raise UsageError(f"there is no option {unknown[0]!r}.", fix=fix)
    found = dict(options)
    for name in ("size", "depth", "across", "height_width", "chest_wall"):
        if (value := found.get(name)) is not None and not isinstance(value, str):
            numbers = value if isinstance(value, Sequence) else (value,)
            found[name] = ":".join(repr(float(number)) for number in numbers)
    if isinstance(classes := found.get("classes"), Mapping):
        found["classes"] = ",".join(f"{name}={float(weight)!r}" for name, weight in classes.items())
    elif classes is not None and not isinstance(classes, str):
        found["classes"] = ",".join(classes)
    for name in ("bundle", "spool", "masks"):
        if name in found:
            found[name] = _path(found[name])
    for name in ("birads", "lesions"):
        if isinstance(mix := found.get(name), Mapping):
            found[name] = ",".join(f"{one}:{float(weight)!r}" for one, weight in mix.items())
    for name in ("healthy", "birads", "lesions"):
        if found.get(name) is not None:
            found[name] = str(found[name])
    return found


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _shown(progress: bool) -> Progress:
    return console_progress() if progress else Progress()
