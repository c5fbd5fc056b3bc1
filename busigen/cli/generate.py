"""Commands that make a dataset, look at one, and judge one: generate, bench, verify, merge, explain, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from busigen.cli.app import Interrupted, app, quiet_libraries, stderr, stdout
from busigen.errors import BusigenError, FlaggedError, InputError, UsageError, needs
from busigen.registry import (
    AUTO,
    BIRADS,
    DEFAULT_BATCH,
    LAUNCHERS,
    MAX_LESIONS,
    PROVIDERS,
    SHARD_SIZE,
    SYNTHETIC,
    TALLER_THAN_WIDE,
)
from busigen.runtime.storage.url import place_of, refuse_urls


@app.command(
    epilog="Examples: `busigen generate --count 1000 --out data` uses the shipped bundle and synthetic backgrounds; "
    "`busigen generate --count 1000 --out data --healthy normal/ --classes malignant` paints into your own images; "
    "`busigen generate --count 200 --out data --masks masks/ --healthy normal/` paints each of 200 masks of your own; "
    "`busigen generate --count 1000 --out data --birads 2:0.1,3:0.4,4:0.3,5:0.2 --normals 0.2` deals categories, and "
    "images without a lesion; `busigen generate --count 1000 --out data --lesions 1:0.9,2:0.1` paints two lesions into "
    "every tenth image; "
    "`busigen generate --count 100000 --out data --workers 16 --threads 2` uses 32 cores; with `sbatch --array=1-8`, "
    "`busigen generate --count 100000 --out data --launcher slurm` makes one dataset in eight jobs. See "
    "docs/scale-out.md. `busigen generate --count 100000 --out s3://bucket/data` publishes each finished shard to S3; "
    "it needs `pip install 'busigen[s3]'`."
)
def generate(
    out: Annotated[
        str, typer.Option(help="The dataset's folder, or a URL (s3://, gs://). A rerun of the same command continues.")
    ],
    count: Annotated[int | None, typer.Option(help="Accepted samples in the dataset.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle's folder. [default: the shipped one]")] = None,
    healthy: Annotated[str, typer.Option(help="A folder of healthy images, or 'synthetic'.")] = SYNTHETIC,
    frames: Annotated[int, typer.Option(help="Frames to take of each DICOM file in --healthy, evenly spaced.")] = 1,
    masks: Annotated[
        Path | None, typer.Option(help="Your own masks, in any layout that `prepare` reads or alone, painted in turn.")
    ] = None,
    jitter: Annotated[
        float, typer.Option(help="Move and scale each by up to this share, and mirror half; 0 leaves them as they are.")
    ] = 0.0,
    classes: Annotated[
        str, typer.Option(help="Shares that sum to 1, or whole numbers as weights; of masks, those of no known class.")
    ] = "benign=0.5,malignant=0.5",
    normals: Annotated[
        float, typer.Option(help="Share of samples that are a healthy image without a lesion, with an empty mask.")
    ] = 0.0,
    lesions: Annotated[
        str | None,
        typer.Option(help=f"Lesions an image, 1 to {MAX_LESIONS}, or shares, as 1:0.9,2:0.1; each gets a mask."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Lesion's area as a share of the image's without bars: 0.03, or a range 0.02:0.06."),
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
    birads: Annotated[
        str | None,
        typer.Option(help=f"BI-RADS category: {', '.join(BIRADS)}; or shares, as 2:0.1,3:0.4,4:0.3,5:0.2."),
    ] = None,
    scanner: Annotated[
        str | None,
        typer.Option(
            help="As which scanner, of those that the bundle knows; or any, or mix. [default: mix; in images: any]"
        ),
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Gland in synthetic backgrounds, from A (less than a quarter) to D.")
    ] = None,
    chest_wall: Annotated[
        str | None,
        typer.Option(help="Share of the height above the chest muscle in synthetic backgrounds; number or range."),
    ] = None,
    tissue_maps: Annotated[
        bool, typer.Option("--tissue-maps", help="Write <key>.tissue.png: skin, fat, gland, muscle... by number.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Another seed gives other samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per engine call; larger windows use fewer.")] = DEFAULT_BATCH,
    shard_size: Annotated[
        int, typer.Option(help="Samples per shard; a kill loses up to two shards and 8 batches.")
    ] = SHARD_SIZE,
    provider: Annotated[
        str, typer.Option(help=f"{', '.join(PROVIDERS)}; or auto: what --out was begun with, else the best that works.")
    ] = AUTO,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Go on with the processor if the provider cannot be used.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Compute threads, of each worker. [default: the cores, divided by the workers]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that make shards. [default: 1; with Ray, as many as have room]")
    ] = None,
    launcher: Annotated[str, typer.Option(help=f"Where the workers run: {', '.join(LAUNCHERS)}.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster that runs, or 'auto'. [default: one of this command's own]")
    ] = None,
    index_range: Annotated[
        str | None,
        typer.Option(help="first:end; the part of --count that this command makes. Without --count, all there is."),
    ] = None,
    array_task: Annotated[
        str | None, typer.Option(help="K/N: make the K-th of N parts; give all N tasks the same --out.")
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option(help="For a URL: local folder for shards on their way. [default: in the user's cache folder]"),
    ] = None,
    log_json: Annotated[
        str | None, typer.Option(help="File to append progress to as JSON lines; - for standard output.")
    ] = None,
) -> None:
    """Write a dataset of images with lesions and their exact masks, in shards.

    Ctrl-C or SIGTERM finishes the open shard; a second one stops at once. The same command continues.
    """
    typed = {name: value for name, value in locals().items() if name != "log_json"}
    from busigen.runtime.execution.events import supervised
    from busigen.runtime.execution.run import GenerateOptions

    place = place_of(out)
    options = GenerateOptions(**{**typed, "out": place})
    with supervised(place, log_json) as (progress, stop):
        report = options.run(progress, stop)
    for line in report.lines(options.given()):
        (stderr if log_json == "-" else stdout).print(line)


@app.command(
    epilog="Example: `busigen bench --batch-sizes 4,16 --count-for 100000`. Exit codes: 0 measured, 2 an option or a "
    "provider cannot be used, 3 input, 4 output, 5 integrity, 8 acceptance, 130 interrupted (no result is kept)."
)
def bench(
    bundle: Annotated[Path | None, typer.Option(help="A bundle's folder. [default: the shipped one]")] = None,
    providers: Annotated[
        str, typer.Option("--provider", "--providers", help=f"One or more of: {', '.join((AUTO, *PROVIDERS))}.")
    ] = AUTO,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Measure the processor where a provider cannot be used.")
    ] = False,
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
    typed = dict(locals())
    from busigen.runtime.diagnostics.bench import Bench
    from busigen.runtime.diagnostics.bench_report import LEDGER_FILE, show
    from busigen.runtime.progress import console_progress

    options = Bench(**{**typed, "ledger": ledger or out / LEDGER_FILE})
    with console_progress() as progress:
        try:
            record = options.run(progress)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; no result is kept.", fix="Run the same command to start anew.") from None
    show(record, stdout)
    stdout.print(f"Results and plot are in {out}; a line was appended to {options.ledger}.")


@app.command(
    epilog="Examples: `busigen verify data --healthy normal/`; `busigen verify data --repair`; "
    "`busigen verify s3://bucket/data`"
)
def verify(
    dataset: Annotated[str, typer.Argument(help="What `busigen generate` wrote: a folder or a URL.")],
    healthy: Annotated[Path | None, typer.Option(help="The run's healthy images: proves every background.")] = None,
    masks: Annotated[Path | None, typer.Option(help="The run's masks, where it had any: proves every mask.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged or missing, and no more.")] = (
        False
    ),
    bundle: Annotated[Path | None, typer.Option(help="For --repair: the run's. [default: the shipped one]")] = None,
    threads: Annotated[int | None, typer.Option(help="For --repair: threads. [default: one per core]")] = None,
) -> None:
    """Check a dataset: hashes, counts, pairing, duplicates and, given the folders, every background and mask."""
    from busigen.runtime.maintenance.remote import refuse_repair, verify_place
    from busigen.runtime.maintenance.repair import repair as mend
    from busigen.runtime.maintenance.replay import Inputs
    from busigen.runtime.progress import console_progress

    if healthy is not None and not healthy.is_dir():
        raise InputError(
            f"--healthy {healthy} is no folder.", fix="Give the folder that `generate --healthy` was given."
        )
    if not repair and (bundle is not None or threads is not None):
        raise UsageError("--bundle and --threads are for --repair.", fix="Leave them out, or add --repair.")
    place = place_of(dataset)
    with console_progress() as progress:
        inputs = Inputs(bundle=bundle, healthy=healthy, threads=threads, masks=masks, progress=progress)
        mended = mend(refuse_repair(place), inputs=inputs) if repair else None
        report = mended.after if mended else verify_place(place, healthy=healthy, masks=masks, progress=progress)
    shown = report.lines(proving=healthy is not None, masks=masks is not None)
    for line in (*(mended.lines() if mended else ()), *shown):
        stdout.print(line)
    if mended and mended.error:
        raise mended.error
    if not report.ok:
        raise typer.Exit(5)


@app.command(
    epilog="Examples: `busigen merge all night1 night2` joins datasets of two seeds; `busigen merge all first second` "
    "of `--index-range 0:5000` and `5000:10000` gives the files of one run of 10,000."
)
def merge(
    out: Annotated[Path, typer.Argument(help="The merged dataset's folder; it must not exist.")],
    datasets: Annotated[list[Path], typer.Argument(help="Two or more finished datasets of one bundle.")],
) -> None:
    """Join datasets that differ in nothing but seed or index range; they stay as they are."""
    from busigen.runtime.maintenance.merge import merge as run
    from busigen.runtime.progress import console_progress

    refuse_urls(out, *datasets, what="merge")
    with console_progress() as progress:
        try:
            report = run(out, datasets, progress=progress)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; nothing was merged.", fix="Run the same command again.") from None
    for line in report.lines():
        stdout.print(line)


@app.command(epilog="Examples: `busigen explain data 000000012`; of a merged dataset, `busigen explain all 001/12`")
def explain(
    dataset: Annotated[str, typer.Argument(help="What `busigen generate` wrote: a folder or a URL.")],
    key: Annotated[str, typer.Argument(help="A sample's key in the manifest, or its index; part/key if merged.")],
    bundle: Annotated[Path | None, typer.Option(help="The run's bundle. [default: the shipped one]")] = None,
    healthy: Annotated[Path | None, typer.Option(help="The run's healthy images, where it had any.")] = None,
    masks: Annotated[Path | None, typer.Option(help="The run's masks, where it had any.")] = None,
    provider: Annotated[str | None, typer.Option(help=f"{', '.join(PROVIDERS)}. [default: the run's]")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads. [default: one per core]")] = None,
    replay: Annotated[bool, typer.Option("--replay/--no-replay", help="Draw the sample again and compare.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder to write the replayed image, mask and row to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell one sample's whole history, draw it again, and say whether the bytes agree."""
    from busigen.runtime.maintenance.remote import explain_place
    from busigen.runtime.maintenance.replay import Inputs
    from busigen.runtime.progress import console_progress

    with console_progress() as progress:
        inputs = Inputs(bundle, healthy, provider, threads, progress, masks)
        described = explain_place(place_of(dataset), key, inputs=inputs, replay=replay, out=out)
    if as_json:
        stdout.print_as_json(described.to_json())
    else:
        for line in described.lines():
            stdout.print(line)
    if described.error:
        raise described.error


@app.command(
    epilog="Examples: `busigen audit data --real prepared --train-split prepared --out report` judges a dataset by the "
    "images that its generator has not seen; `busigen audit data --real prepared --within source=busi --out report` "
    "within one hospital; `busigen audit others/ --real Dataset_BUSI_with_GT --out report --only "
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
    frames: Annotated[int, typer.Option(help="Frames to take of each DICOM file, evenly spaced.")] = 1,
    within: Annotated[
        str | None,
        typer.Option(
            help="COLUMN=VALUE: only real images with that value, and synthetic ones if they have the column."
        ),
    ] = None,
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

    with needs("eval"):
        from busigen.evaluation.audit import audit as run
        from busigen.evaluation.audit import audited
    refuse_urls(synthetic, real, *filter(None, (train_split, healthy, external)), what="audit")
    with quiet_libraries(), console_progress() as progress:
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
                frames=frames,
                within=within,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted; {out} keeps the sections that were finished.", fix="Run the same command to continue."
            ) from None
    for line in audited(report):
        stdout.print(line)
    if report.failed:
        raise BusigenError(f"sections that could not run: {', '.join(report.failed)}.", fix=f"See {report.html}.")
    if fail_on_flag and report.flagged:
        raise FlaggedError(f"flagged: {', '.join(report.flagged)}.", fix=f"See {report.html}.")
