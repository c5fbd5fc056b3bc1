"""The command that builds engines ahead of a run, and what `export --target` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from busigen.cli.app import app, stdout
from busigen.registry import ENGINE_TARGETS

if TYPE_CHECKING:
    from busigen.runtime.bundle import Bundle
    from busigen.runtime.engines.making import Made
    from busigen.runtime.engines.order import Order


@app.command(
    name="build-engines",
    epilog="Examples: `busigen build-engines --target tensorrt-rtx --batch-size 16`; `busigen build-engines --bundle "
    "bundle --target tensorrt-rtx --compute-capability 8.9 --out engines` fills a folder to be copied to the machine "
    "that generates, which reads it with `BUSIGEN_CACHE=engines`.",
)
def build_engines(
    target: Annotated[list[str], typer.Option(help=f"{', '.join(ENGINE_TARGETS)}. May be repeated.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. [default: the shipped one]")] = None,
    batch_size: Annotated[
        str, typer.Option(help="As in `generate`; 16,4 adds a smaller batch for what is left over.")
    ] = "16",
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="For every batch up to --batch-size, in place of fixed ones.")
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="Of the card, such as 8.9; may be repeated. tensorrt-rtx alone. [default: all from 8.0 on]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Cache folder to fill. [default: this user's, or what BUSIGEN_CACHE names]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was built as JSON.")] = False,
) -> None:
    """Build TensorRT engines of a bundle into the cache, ahead of the first run."""
    from busigen.runtime.bundle import Bundle, default_bundle
    from busigen.runtime.engines.making import summary
    from busigen.runtime.engines.order import Order
    from busigen.runtime.engines.profiles import Batches

    order = Order(target, Batches.parse(batch_size, dynamic=dynamic), compute_capability or (), out)
    order.check()
    made = fill(order, Bundle.open(bundle or default_bundle()))
    if as_json:
        stdout.print_as_json(summary(made))
    else:
        show(made)


def order_for(targets: list[str], batch_sizes: tuple[int, ...]) -> Order:
    """The order that `export` gives, checked before it begins."""
    from busigen.runtime.engines.order import Order
    from busigen.runtime.engines.profiles import Batches

    order = Order(targets, Batches(tuple(sorted(batch_sizes, reverse=True))) if batch_sizes else Batches())
    order.check()
    return order


def fill(order: Order, bundle: Bundle) -> list[Made]:
    """Make an order's engines, with progress on stderr."""
    from busigen.runtime.progress import console_progress

    with console_progress() as progress:
        progress.start("building engines", order.count, unit="engine")
        return order.fill(bundle, lambda made: progress.advance(1))


def show(made: list[Made]) -> None:
    """Print a table of engines, a row per graph, and where they lie."""
    table = Table(box=None)
    for name in ("graph", "engine", "rows", "MB", "seconds"):
        table.add_column(name, justify="left" if name in ("graph", "engine") else "right")
    for one in made:
        rows = ",".join(str(most) if least == most else f"{least}-{most}" for least, _, most in one.key["profiles"])
        seconds = "kept" if one.cached else f"{one.seconds:.1f}"
        engine = f"{one.key['target']} {one.key['version']} {one.capability}".strip()
        table.add_row(one.graph, engine, rows, f"{one.size / 1e6:.1f}", seconds)
    stdout.print(table)
    built = [one for one in made if not one.cached]
    took, size = sum(one.seconds for one in built), sum(one.size for one in made) / 1e6
    stdout.print(f"{len(built)} engines built in {took:.0f} s, {len(made) - len(built)} were there; {size:.1f} MB")
