"""The command that hands a dataset to other tools: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from busigen.cli.app import Interrupted, app, stdout
from busigen.registry import FORMATS
from busigen.runtime.storage.url import place_of, refuse_urls


@app.command(
    epilog="Examples: `busigen convert data --to coco --out coco`; `busigen convert data --to yolo --out yolo --split "
    "train=0.8,val=0.1,test=0.1`; `busigen convert data --to nnunet --out nnUNet_raw/Dataset501_Busigen --real "
    "prepared`; `busigen convert data --to files --out large --where 'area_share>0.05 and class=malignant'`. See "
    "docs/using-datasets.md."
)
def convert(
    dataset: Annotated[str, typer.Argument(help="What `busigen generate` or `merge` wrote: a folder or a URL.")],
    to: Annotated[str, typer.Option(help="; ".join(f"{name}: {one.about}" for name, one in FORMATS.items()))],
    out: Annotated[Path, typer.Option(help="The folder to write. A rerun of the same command continues.")],
    split: Annotated[
        str | None,
        typer.Option(help="Names with shares that sum to 1. Pairs that share a given background stay together."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most pairs, from the start. [default: all]")] = None,
    classes: Annotated[str | None, typer.Option(help="Classes to take, commas between. [default: all]")] = None,
    where: Annotated[
        str | None, typer.Option(help="Conditions on the manifest's columns: 'depth<0.4 and asked_birads=4'.")
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="For nnunet: a prepared folder to merge with, whose splits are kept.")
    ] = None,
) -> None:
    """Write a dataset in the format of another tool."""
    typed = {name: value for name, value in locals().items() if name != "dataset"}
    from busigen.runtime.convert.run import convert as run
    from busigen.runtime.progress import console_progress

    refuse_urls(out, *filter(None, (real,)), what="convert")
    with console_progress() as progress:
        try:
            report = run(place_of(dataset), **typed, progress=progress)
        except KeyboardInterrupt:
            raise Interrupted(
                "Interrupted; what is written is kept.", fix="Run the same command to continue."
            ) from None
    for line in report.lines():
        stdout.print(line)
