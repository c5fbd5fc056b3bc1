"""The command that makes counterfactual sets: grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from busigen.cli.app import app, stderr, stdout
from busigen.registry import AUTO, DEFAULT_BATCH, PROVIDERS, SYNTHETIC
from busigen.runtime.storage.url import place_of


@app.command(
    epilog="Examples: `busigen grid --vary class,birads --backgrounds 100 --out pairs` makes eight lesions on each of "
    "100 backgrounds; `busigen grid --vary size=0.01/0.03/0.09 --classes malignant --backgrounds 50 --out sizes "
    "--healthy normal/` makes three on images of your own. `busigen verify pairs` shows that backgrounds are equal."
)
def grid(
    vary: Annotated[
        str,
        typer.Option(
            help="What differs: class, birads (only as a tendency), size, depth, across, height_width, scanner, "
            "commas between; with levels, size=0.02/0.05/0.1."
        ),
    ],
    out: Annotated[
        str, typer.Option(help="The dataset's folder, or a URL (s3://, gs://). A rerun of the same command continues.")
    ],
    backgrounds: Annotated[int, typer.Option(help="How many; each gets every combination of the levels.")] = 10,
    bundle: Annotated[Path | None, typer.Option(help="A bundle's folder. [default: the shipped one]")] = None,
    healthy: Annotated[str, typer.Option(help="A folder of healthy images, or 'synthetic'.")] = SYNTHETIC,
    frames: Annotated[int, typer.Option(help="Frames to take of each DICOM file in --healthy, evenly spaced.")] = 1,
    classes: Annotated[
        str, typer.Option(help="Where the class is not varied: as for `generate`, background by background.")
    ] = "benign=0.5,malignant=0.5",
    size: Annotated[
        str | None, typer.Option(help="Where it is not varied, as all below: number or range. [default: 0.02:0.08]")
    ] = None,
    depth: Annotated[str | None, typer.Option(help="As for `generate`. [default: 0.25:0.45]")] = None,
    across: Annotated[str | None, typer.Option(help="As for `generate`. [default: 0.35:0.65]")] = None,
    height_width: Annotated[str | None, typer.Option(help="As for `generate`. [default: 0.5:0.9]")] = None,
    birads: Annotated[str | None, typer.Option(help="As for `generate`. [default: none is asked for]")] = None,
    scanner: Annotated[str | None, typer.Option(help="As for `generate`.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images per engine call; larger windows use fewer.")] = DEFAULT_BATCH,
    provider: Annotated[str, typer.Option(help=f"{', '.join(PROVIDERS)}; or auto.")] = AUTO,
    threads: Annotated[int | None, typer.Option(help="Compute threads, of each worker.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that make shards. [default: 1]")] = None,
    log_json: Annotated[
        str | None, typer.Option(help="File to append progress to as JSON lines; - for standard output.")
    ] = None,
) -> None:
    """Write counterfactual sets: one background, noise and place, and attributes at every combination of their levels.

    It is a dataset like those of `generate`; `grid_group` and `grid_level` in the manifest say what belongs together.
    """
    typed = {name: value for name, value in locals().items() if name not in ("log_json", "backgrounds", "out")}
    from busigen.runtime.execution.events import supervised
    from busigen.runtime.execution.run import GenerateOptions

    place = place_of(out)
    options = GenerateOptions.of_grid(place, backgrounds, **typed)
    with supervised(place, log_json) as (progress, stop):
        report = options.run(progress, stop)
    for line in report.lines(options.given()):
        (stderr if log_json == "-" else stdout).print(line)
