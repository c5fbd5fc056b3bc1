"""The command that judges a set: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from busigen.cli.app import Interrupted, app, needs, quiet_libraries, stdout
from busigen.errors import BusigenError, FlaggedError
from busigen.runtime.storage.url import refuse_urls


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
