"""The command line: each command parses, calls one function and prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from busigen import __version__
from busigen.errors import (
    INTERRUPTED_EXIT_CODE,
    BusigenError,
    FlaggedError,
    InputError,
    MissingDependencyError,
    UsageError,
)
from busigen.registry import BIRADS, DEFAULT_PRESET, LESION_CLASSES, PRESETS, PROVIDERS, SYNTHETIC, TALLER_THAN_WIDE
from busigen.runtime.install import install_command
from busigen.runtime.layout import DEFAULT_SHARD_SIZE
from busigen.runtime.summary import SHOWN_PROBLEMS, explained, generated, repaired, verified

app = typer.Typer(
    name="busigen",
    help="Turn healthy breast-ultrasound images into benign or malignant ones, with the exact lesion mask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done, 2 usage, 3 input, 4 output, 5 integrity, 6 parity, 7 missing extra, 8 acceptance, "
    "9 flagged, 130 interrupted, 143 terminated. See docs/exit-codes.md.",
)
stdout, stderr = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)

DEBUG = "--debug"


class Interrupted(BusigenError):
    """Ctrl-C, with what was done kept."""

    exit_code = INTERRUPTED_EXIT_CODE


def _version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"busigen {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show a traceback with an error; works after a command, too.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    # Libraries log how they load files; a person wants to hear about the run.
    for name in ("httpx", "torch", "onnxscript", "onnx_ir", "PIL", "urllib3", "absl", "tensorboard"):
        logging.getLogger(name).setLevel(logging.ERROR)


@app.command(epilog="Example: `busigen prepare Dataset_BUSI_with_GT BUSBRA --out prepared`")
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="BUSI's or BUS-BRA's folder, or one with images/ and masks/.")],
    out: Annotated[Path, typer.Option(help="Folder to write the table and the letterboxed arrays to.")],
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first file that cannot be used.")] = False,
) -> None:
    """Read data sets into one table: classes, patients, near-duplicate groups, splits, overlays."""
    from busigen.data.prepare import prepare as run
    from busigen.runtime.progress import console_progress

    with console_progress() as progress:
        started: list[int] = []

        def report(done: int, total: int) -> None:
            if not started:
                progress.start("preparing", total, unit="image")
                started.append(0)
            progress.advance(done - started[0])
            started[0] = done

        result = run(sources, out, seed=seed, strict=strict, progress=report)
    stdout.print(f"{result.images} images prepared in {out} ({result.seconds:.0f} s)")
    for name, parts in result.by_class_and_split.items():
        counts = ", ".join(f"{split} {count}" for split, count in sorted(parts.items()))
        stdout.print(f"  {name:10} {sum(parts.values()):6}   {counts}")
    stdout.print(f"  sources: {', '.join(f'{name} {count}' for name, count in result.by_source.items())}")
    stdout.print(f"  groups (patients, near-duplicates): {result.groups}")
    stdout.print(
        f"  images under two classes: {result.conflicts} (the same frame stands under another class as well; they are "
        "kept, but no class is fine-tuned on them)"
    )
    stdout.print(f"  overlays suspected: {', '.join(f'{name} {count}' for name, count in result.overlays.items())}")
    stdout.print(f"  split hash: {result.split_hash}")
    stdout.print(f"  refused: {len(result.refused)}")
    for refusal in result.refused[:SHOWN_PROBLEMS]:
        stdout.print(escape(f"    {refusal.file}: {refusal.problem} {refusal.fix}"))
    if len(result.refused) > SHOWN_PROBLEMS:
        stdout.print(f"    and {len(result.refused) - SHOWN_PROBLEMS} more, all of them in {out / 'prepared.json'}")


@app.command(
    epilog="Examples: `busigen train --data prepared --out runs/first --preset tiny`; "
    "`busigen train --base runs/first --data prepared_hospital --out runs/hospital` adapts a finished checkpoint to "
    "other images."
)
def train(
    data: Annotated[Path, typer.Option(help="What `busigen prepare` wrote.")],
    out: Annotated[Path, typer.Option(help="The run's folder, which becomes the checkpoint. A rerun continues in it.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Finished checkpoint whose base is kept as it is: only the adapters are trained, on --data."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Sizes and recipe: {', '.join(PRESETS)}. [default: {DEFAULT_PRESET}, or the base's]"),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on every task's steps; 1 is sized for a GPU.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seeds weights, order, augmentation and noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train autoencoder, context encoder, three stages, healthy prior and one LoRA per class, and merge them.

    With --base, only the LoRAs: for a new hospital's images.
    """
    with _needs("train"):
        from busigen.training.base import Base
        from busigen.training.pipeline import train as run
        from busigen.training.recipe import recipe_for
    with _quiet_libraries():
        start = None if base is None else Base.open(base)
        prescribe = partial(recipe_for, preset or DEFAULT_PRESET) if start is None else partial(start.recipe, preset)
        try:
            record = run(data, out, prescribe(seed=seed, scale=scale), base=start, device=device, console=stderr)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted; {out} keeps what was trained.", fix="Run the same command to continue."
            ) from None
    seconds = sum(task["seconds"] for task in record["tasks"].values())
    stdout.print(f"Checkpoint finished in {out}: preset {record['preset']}, {seconds / 60:.1f} minutes of training.")
    stdout.print(f"Next: busigen export {out} --out bundle")


@app.command(epilog="Example: `busigen export runs/first --out bundle`")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="What `busigen train` finished.")],
    out: Annotated[Path, typer.Option(help="The bundle's folder; must not exist yet, or be empty.")],
    target: Annotated[str, typer.Option(help="onnx.")] = "onnx",
) -> None:
    """Export a checkpoint as one ONNX graph per component and class, proved against PyTorch."""
    with _needs("train"):
        from busigen.export.exporter import export as run
    with _quiet_libraries():
        bundle = run(checkpoint, out, target=target)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    stdout.print(f"Bundle written to {out}: {len(bundle.info['graphs'])} graphs, {size:.1f} MB")
    for label in LESION_CLASSES:
        figures = bundle.info["parity"][label]
        stdout.print(
            f"  parity {label:10} {figures['images_compared']} of {figures['draws']} draws, "
            f"Dice >= {figures['dice']:.4f}, PSNR >= {figures['psnr']:.1f} dB, "
            f"grey difference <= {figures['max_grey_difference']}"
        )


@app.command(
    epilog="Examples: `busigen generate --count 1000 --out data` uses the shipped bundle and synthetic backgrounds; "
    "`busigen generate --count 1000 --out data --healthy normal/ --classes malignant` paints into your own images."
)
def generate(
    count: Annotated[int, typer.Option(help="Accepted samples to write.")],
    out: Annotated[Path, typer.Option(help="The dataset's folder. A rerun of the same command continues in it.")],
    bundle: Annotated[Path | None, typer.Option(help="A bundle's folder. [default: the shipped one]")] = None,
    healthy: Annotated[str, typer.Option(help="A folder of healthy images, or 'synthetic'.")] = SYNTHETIC,
    classes: Annotated[str, typer.Option(help="Class weights.")] = "benign=0.5,malignant=0.5",
    size: Annotated[
        str | None, typer.Option(help="Lesion's area as a share of the image's: 0.03, or a range 0.02:0.06.")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(help="Share of the image's height above the lesion's centre; number or range.")
    ] = None,
    across: Annotated[
        str | None, typer.Option(help="Share of the image's width left of the lesion's centre; number or range.")
    ] = None,
    height_width: Annotated[str | None, typer.Option(help="Lesion's height over its width; number or range.")] = None,
    taller_than_wide: Annotated[
        bool, typer.Option("--taller-than-wide", help=f"Short for --height-width {TALLER_THAN_WIDE}.")
    ] = False,
    birads: Annotated[str | None, typer.Option(help=f"BI-RADS category: {', '.join(BIRADS)}.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per engine call; larger windows use fewer.")] = 16,
    shard_size: Annotated[
        int, typer.Option(help="Samples per shard; a kill loses up to two shards.")
    ] = DEFAULT_SHARD_SIZE,
    provider: Annotated[str, typer.Option(help=f"{', '.join(PROVIDERS)}.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Compute threads. [default: one per core]")] = None,
    log_json: Annotated[
        str | None, typer.Option(help="File to append progress to as JSON lines; - for standard output.")
    ] = None,
) -> None:
    """Write a dataset of images with lesions and their exact masks, in shards.

    Ctrl-C or SIGTERM finishes the open shard; a second one stops at once. The same command continues.
    """
    from busigen.runtime.job import Job
    from busigen.runtime.supervise import supervised

    job = Job(
        count=count,
        out=out,
        bundle=bundle,
        healthy=healthy,
        classes=classes,
        seed=seed,
        batch_size=batch_size,
        shard_size=shard_size,
        provider=provider,
        threads=threads,
        size=size,
        depth=depth,
        across=across,
        height_width=height_width,
        taller_than_wide=taller_than_wide,
        birads=birads,
    )
    with supervised(out, log_json) as (progress, stop):
        report = job.run(progress, stop)
    for line in generated(report):
        (stderr if log_json == "-" else stdout).print(escape(line))


@app.command(
    epilog="Example: `busigen bench --batch-sizes 4,16 --count-for 100000`. Exit codes: 0 measured, 2 an option or a "
    "provider cannot be used, 3 input, 4 output, 5 integrity, 8 acceptance, 130 interrupted (no result is kept)."
)
def bench(
    bundle: Annotated[Path | None, typer.Option(help="A bundle's folder. [default: the shipped one]")] = None,
    provider: Annotated[
        str, typer.Option("--provider", "--providers", help=f"One or more of: {', '.join(PROVIDERS)}.")
    ] = "cpu",
    batch_sizes: Annotated[str, typer.Option(help="Images per engine call, one or more.")] = "4,16",
    count: Annotated[int, typer.Option(help="Accepted samples per run.")] = 48,
    count_for: Annotated[int, typer.Option(help="Predict time and disk size for this many samples.")] = 100_000,
    repeat: Annotated[int, typer.Option(help="Runs per provider and batch size; medians are shown.")] = 3,
    healthy: Annotated[str, typer.Option(help="A folder of healthy images, or 'synthetic'.")] = SYNTHETIC,
    threads: Annotated[int | None, typer.Option(help="Compute threads. [default: one per core]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.svg and, meanwhile, the runs.")] = Path(
        "bench"
    ),
    ledger: Annotated[
        Path | None, typer.Option(help="File to append a line to. [default: ledger.jsonl in --out]")
    ] = None,
) -> None:
    """Measure `generate` on this machine: every stage, engines alone, the whole pipeline; predict a long run."""
    from busigen.runtime.bench import Bench
    from busigen.runtime.bench_report import LEDGER_FILE, show
    from busigen.runtime.progress import console_progress

    options = Bench(
        out=out,
        ledger=ledger or out / LEDGER_FILE,
        bundle=bundle,
        providers=provider,
        batch_sizes=batch_sizes,
        count=count,
        count_for=count_for,
        repeat=repeat,
        healthy=healthy,
        threads=threads,
    )
    with console_progress() as progress:
        try:
            record = options.run(progress)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; no result is kept.", fix="Run the same command to start anew.") from None
    show(record, stdout)
    stdout.print(escape(f"Results and plot are in {out}; a line was appended to {options.ledger}."))


@app.command(epilog="Examples: `busigen verify data --healthy normal/`; `busigen verify data --repair`")
def verify(
    dataset: Annotated[Path, typer.Argument(help="What `busigen generate` wrote.")],
    healthy: Annotated[Path | None, typer.Option(help="The run's healthy images: proves every background.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged or missing, and no more.")] = (
        False
    ),
    bundle: Annotated[Path | None, typer.Option(help="For --repair: the run's. [default: the shipped one]")] = None,
    threads: Annotated[int | None, typer.Option(help="For --repair: threads. [default: one per core]")] = None,
) -> None:
    """Check a dataset: hashes, counts, pairing, duplicates and, given the healthy images, every background."""
    from busigen.runtime.progress import console_progress
    from busigen.runtime.repair import repair as mend
    from busigen.runtime.replay import Inputs
    from busigen.runtime.verify import verify as run

    if healthy is not None and not healthy.is_dir():
        raise InputError(
            f"--healthy {healthy} is no folder.", fix="Give the folder that `generate --healthy` was given."
        )
    if not repair and (bundle is not None or threads is not None):
        raise UsageError("--bundle and --threads are for --repair.", fix="Leave them out, or add --repair.")
    with console_progress() as progress:
        inputs = Inputs(bundle=bundle, healthy=healthy, threads=threads, progress=progress)
        mended = mend(dataset, inputs=inputs) if repair else None
        report = mended.after if mended else run(dataset, healthy=healthy, progress=progress)
    for line in (*(repaired(mended) if mended else ()), *verified(report, proving=healthy is not None)):
        stdout.print(escape(line))
    if mended and mended.error:
        raise mended.error
    if not report.ok:
        raise typer.Exit(5)


@app.command(epilog="Example: `busigen explain data 000000012`")
def explain(
    dataset: Annotated[Path, typer.Argument(help="What `busigen generate` wrote.")],
    key: Annotated[str, typer.Argument(help="A sample's key in the manifest, or its index.")],
    bundle: Annotated[Path | None, typer.Option(help="The run's bundle. [default: the shipped one]")] = None,
    healthy: Annotated[Path | None, typer.Option(help="The run's healthy images, where it had any.")] = None,
    provider: Annotated[str | None, typer.Option(help=f"{', '.join(PROVIDERS)}. [default: the run's]")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads. [default: one per core]")] = None,
    replay: Annotated[bool, typer.Option("--replay/--no-replay", help="Draw the sample again and compare.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder to write the replayed image, mask and row to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell one sample's whole history, draw it again, and say whether the bytes agree."""
    from busigen.runtime.explain import explain as run
    from busigen.runtime.progress import console_progress
    from busigen.runtime.replay import Inputs

    with console_progress() as progress:
        inputs = Inputs(bundle=bundle, healthy=healthy, provider=provider, threads=threads, progress=progress)
        told = run(dataset, key, inputs=inputs, replay=replay, out=out)
    for line in [json.dumps(told.to_json(), indent=2, ensure_ascii=False)] if as_json else explained(told):
        stdout.print(escape(line))
    if told.error:
        raise told.error


@app.command(
    epilog="Examples: `busigen audit data --real prepared --train-split prepared --out report` judges a dataset by the "
    "images that its generator has not seen; `busigen audit others/ --real Dataset_BUSI_with_GT --out report --only "
    "integrity,physics` looks at any folder of images and masks without a neural network."
)
def audit(
    synthetic: Annotated[Path, typer.Argument(help="A dataset, WebDataset shards, or a folder of images and masks.")],
    real: Annotated[Path, typer.Option(help="Real images to judge it by, in any of these layouts, or prepared.")],
    out: Annotated[Path, typer.Option(help="The report's folder. A rerun continues in it.")],
    train_split: Annotated[
        Path | None, typer.Option(help="Prepared folder that trained the generator; its images judge nothing.")
    ] = None,
    healthy: Annotated[Path | None, typer.Option(help="The healthy images that the set was painted into.")] = None,
    external: Annotated[Path | None, typer.Option(help="A further real set, to test the utility on.")] = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Everything, for hours, or at most 500 images, for minutes.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Sections to run, such as integrity,physics. [default: all six]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds every draw.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Images per set. [default: 500 for --quick, else all]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    inception: Annotated[
        Path | None,
        typer.Option(
            help="TorchScript file with Inception, for FID, KID and IS: a program that will be run, so only take it "
            "from a source you trust."
        ),
    ] = None,
    fail_on_flag: Annotated[bool, typer.Option("--fail-on-flag", help="Exit with code 9 if anything is flagged.")] = (
        False
    ),
) -> None:
    """Judge any synthetic set against real images: integrity, physics, fidelity, realness, utility, privacy."""
    from busigen.runtime.progress import console_progress

    with _needs("eval"):
        from busigen.evaluation.audit import audit as run
        from busigen.evaluation.audit import check_libraries
        from busigen.evaluation.summary import audited

        check_libraries()
    with _quiet_libraries(), console_progress() as progress:
        try:
            report = run(
                synthetic,
                real,
                out,
                train_split=train_split,
                healthy=healthy,
                external=external,
                effort="full" if full else "quick",
                only=None if only is None else only.split(","),
                seed=seed,
                device=device,
                inception=inception,
                limit=limit,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted; {out} keeps the sections that were finished.", fix="Run the same command to continue."
            ) from None
    for line in audited(report):
        stdout.print(escape(line))
    if report.failed:
        raise BusigenError(f"sections that could not run: {', '.join(report.failed)}.", fix=f"See {report.html}.")
    if fail_on_flag and report.flagged:
        raise FlaggedError(f"flagged: {', '.join(report.flagged)}.", fix=f"See {report.html}.")


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turn a missing module into the name of the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"this command needs {error.name}, which is not installed.", fix=f"Run {install_command(extra)}."
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep third-party deprecation warnings off the user's terminal."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Run the command line; an error of the user's becomes one line and its exit code."""
    # click's base class of usage errors: typer does not export it, and newer versions have a click of their own.
    misuse: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(app(args=arguments or ["--help"], prog_name="busigen", standalone_mode=False))
    except BusigenError as error:
        _fail(error, debug)
    except misuse as error:
        _fail(_usage_error(error, arguments), debug)
    except typer.Abort:
        _fail(Interrupted("Interrupted."), debug)
    except Exception as error:
        if debug:
            raise
        stderr.print(
            escape(f"error: {type(error).__name__}: {error}. This is a bug: run again with --debug and report it.")
        )
        sys.exit(1)


def _fail(error: BusigenError, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    stderr.print(escape(f"error: {error}"), style=None if debug else "red")
    sys.exit(error.exit_code)


def _usage_error(error: Any, arguments: list[str]) -> UsageError:
    """Put what click would spread over a box of several lines into one, with the value, which click may leave out."""
    problem = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return UsageError(
        f"{problem} (in: {shlex.join(['busigen', *arguments])}).",
        fix=f"See: {context.command_path if context else 'busigen'} --help",
    )


if __name__ == "__main__":
    main()
