"""The commands of a reader study: make, which is also what no name of a command stands for, and score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from busigen.cli.app import Interrupted, app, quiet_libraries, stdout
from busigen.errors import needs
from busigen.runtime.storage.url import refuse_urls

MAKE, SCORE = "make", "score"


class _MakesByDefault(TyperGroup):
    """A group whose command is `make` where the first argument names none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Arguments as typer parses them; a folder that is called like a command is written ./score."""
        args = args or ["--help"]
        named = args[0] in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if named else [MAKE, *args])


study = typer.Typer(
    cls=_MakesByDefault,
    help="Have people tell real from synthetic images on a page, and score their answers.",
    epilog="Examples: `busigen reader-study data --real prepared --cases 100 --out study`; "
    "`busigen reader-study score study/answers*.json`. See docs/reader-study.md.",
)
app.add_typer(study, name="reader-study")


@study.command(
    MAKE,
    epilog="Examples: `busigen reader-study data --real prepared --cases 100 --out study` (`make` may be left out); "
    "`busigen reader-study data --real prepared --outlines --repeats 0 --out outlined`. See docs/reader-study.md.",
)
def make(
    synthetic: Annotated[Path, typer.Argument(help="A dataset, WebDataset shards, or a folder of images and masks.")],
    real: Annotated[
        Path, typer.Option(help="Real images: what `prepare` wrote, of which val and test are taken, or any such set.")
    ],
    out: Annotated[Path, typer.Option(help="The study's folder: a page for the readers, and the key to it.")],
    cases: Annotated[int, typer.Option(help="Number of images, half of them real.")] = 100,
    repeats: Annotated[int | None, typer.Option(help="How many of them come twice. [default: a fifth]")] = None,
    outlines: Annotated[bool, typer.Option("--outlines", help="Draw the outline of each lesion's mask.")] = False,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="Id of an image that gives itself away, as key.json has it. May be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which images are drawn, and their order.")] = 0,
) -> None:
    """Write a page on which readers tell real from synthetic images, and the key to it."""
    typed = {name: value for name, value in locals().items() if name not in ("synthetic", "real", "out")}
    from busigen.runtime.progress import console_progress

    with needs("eval"):
        from busigen.evaluation.reader_study.make import make as run
    refuse_urls(synthetic, real, out, what="reader-study")
    with quiet_libraries(), console_progress() as progress:
        try:
            made = run(synthetic, real, out, **{**typed, "leave_out": leave_out or ()}, progress=progress)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; nothing is written.", fix="Run the same command again.") from None
    for line in made.lines():
        stdout.print(line)


@study.command(
    SCORE,
    epilog="Examples: `busigen reader-study score study/answers*.json`; `busigen reader-study score mail/*.json --key "
    "study/key.json --out report`. See docs/reader-study.md.",
)
def score(
    answers: Annotated[list[Path], typer.Argument(help="What readers saved, a file each.")],
    key: Annotated[Path | None, typer.Option(help="The study's key. [default: key.json beside the first file]")] = None,
    out: Annotated[Path | None, typer.Option(help="The report's folder. [default: score beside the key]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the resampling behind intervals.")] = 0,
) -> None:
    """Score readers' answers: can they tell, do they agree, how do the lesions read."""
    with needs("eval"):
        from busigen.evaluation.reader_study.score import score as run
    for line in run(answers, key=key, out=out, seed=seed).lines():
        stdout.print(line)
