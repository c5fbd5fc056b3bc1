"""The system's own Chromium, driven by Playwright, and axe's findings in what it shows. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

DESKTOP, PHONE = (1280, 900), (390, 780)
_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# A Chromium that is driven needs none of what it would otherwise ask its maker for.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    """The program: what BUSIGEN_CHROMIUM names, or one on PATH."""
    return os.environ.get("BUSIGEN_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def missing() -> str:
    """Why no browser can be driven here; empty if one can."""
    if not all(find_spec(name) for name in ("playwright", "axe_playwright_python")):
        return "needs Playwright and axe, of the extra 'dev'"
    return "" if chromium() else "needs Chromium (apt-get install chromium), or its path in BUSIGEN_CHROMIUM"


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "a browser is there")


@contextmanager
def browser(profile: Path, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[BrowserContext]:
    """A browser with a profile of its own, which asks for nothing but loopback addresses and files."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=chromium(),
            headless=True,
            args=list(_ARGUMENTS),
            viewport={"width": size[0], "height": size[1]},
            **options,
        )
        context.set_default_timeout(60_000)  # A machine with much else to do is slow.
        try:
            yield context
        finally:
            context.close()


def accessibility_faults(page: Page) -> list[str]:
    """What axe finds wrong with a page as it is shown, at any level, each with an element that has it."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for fault in found
        for node in fault["nodes"]
    ]
