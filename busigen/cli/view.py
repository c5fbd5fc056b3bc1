"""The command that shows a dataset to a person: view."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from busigen.cli.app import Interrupted, app, stdout
from busigen.errors import InputError, UsageError
from busigen.runtime.storage.url import refuse_urls


@app.command(
    epilog="Examples: `busigen view data` prints an address to open in a browser on this machine; `busigen view data "
    "--healthy normal/ --open`; `busigen view data --where 'asked_birads=4 and depth<0.4' --limit 500 --html "
    "page.html` writes a page to hand on. See docs/view.md."
)
def view(
    dataset: Annotated[Path, typer.Argument(help="What `busigen generate` or `merge` wrote: a folder.")],
    port: Annotated[
        int | None, typer.Option(help="Of the loopback address 127.0.0.1. [default: one that is free]")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file instead, with all in it.")] = None,
    healthy: Annotated[
        Path | None, typer.Option(help="The run's healthy images, to show beside what was painted into them.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Draw synthetic backgrounds again, to show beside their pairs.")
    ] = False,
    bundle: Annotated[Path | None, typer.Option(help="For --replay: the run's. [default: the shipped one]")] = None,
    where: Annotated[
        str | None, typer.Option(help="Show these alone: 'depth<0.4 and class=malignant', as for convert.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most pairs, from the start. [default: all]")] = None,
) -> None:
    """Look at a dataset in a browser: pairs as a grid, filtered and sorted; one pair large, with its history.

    Only this machine is answered, until Ctrl-C. With `--html`, one file that needs no busigen.
    """
    from busigen.runtime.maintenance.replay import Inputs
    from busigen.runtime.progress import console_progress
    from busigen.runtime.viewing.page import write_page
    from busigen.runtime.viewing.pairs import Pairs
    from busigen.runtime.viewing.server import ViewServer
    from busigen.text import counted, disk_size

    refuse_urls(dataset, *filter(None, (healthy, html, bundle)), what="view")
    if html is not None and port is not None:
        raise UsageError("--port and --html are given; a page in a file needs no port.", fix="Leave out one of them.")
    if healthy is not None and not healthy.is_dir():
        fix = "Give the folder that `generate --healthy` was given."
        raise InputError(f"--healthy {healthy} is no folder.", fix=fix)
    if bundle is not None and not replay:
        raise UsageError("--bundle is for --replay.", fix="Leave it out, or add --replay.")
    pairs = Pairs(dataset, where=where, limit=limit, healthy=healthy, replay=Inputs(bundle=bundle) if replay else None)
    size = counted(len(pairs), "pair")
    if html is None:
        with ViewServer(pairs, port or 0) as server, suppress(KeyboardInterrupt):  # This is how it is meant to end.
            stdout.print(f"{size} of {dataset}: {server.url} (Ctrl-C ends this)")
            _opened(server.url, open_browser)
            server.serve_forever()
        return
    with console_progress() as progress:
        try:
            write_page(pairs, html, progress)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; nothing was written.", fix="Run the same command again.") from None
    stdout.print(f"{size} of {dataset} in {html}, {disk_size(html.stat().st_size)}")
    _opened(html.resolve().as_uri(), open_browser)


def _opened(url: str, wanted: bool) -> None:
    if wanted:
        import webbrowser

        webbrowser.open(url)
