"""The page in a real browser, served and as one file: what a person sees, clicks and types, at both widths."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import polars as pl
import pytest

from busigen.runtime.sampling.conditions import parse_conditions
from busigen.runtime.sampling.grid import Grid
from tests.harness.browser import DESKTOP, PHONE, accessibility_faults, browser, needs_browser
from tests.harness.command import run
from tests.harness.several_lesions import SMALL, written
from tests.runtime.viewing.conftest import HOSTILE, serving

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = needs_browser

SEEN = "() => [...document.querySelectorAll('#grid img')].every(i => i.complete && i.naturalWidth === 256)"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with browser(tmp_path_factory.mktemp("profile")) as context:
        yield context


@dataclass(frozen=True)
class Shown:
    """A dataset's page and what it must not do: ask for anything elsewhere, or run into an error."""

    page: Page
    url: str
    asked: list[str]
    said: list[str]

    def at(self, **query: Any) -> Page:
        """The page where its address has this after the #."""
        self.page.goto(f"{self.url}#{urlencode(query, doseq=True)}")
        return self.page

    def names(self) -> list[str]:
        return list(self.page.locator("#grid a").evaluate_all("all => all.map(one => one.dataset.name)"))


@pytest.fixture(scope="module")
def addresses(
    plain_url: str, merged_url: str, plain: Path, merged: Path, healthy: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """The two datasets' pages, served and as files."""
    folder = tmp_path_factory.mktemp("pages")
    assert run("view", plain, "--healthy", healthy, "--html", folder / "plain.html").returncode == 0
    assert run("view", merged, "--html", folder / "merged.html").returncode == 0
    return {
        "served": {"plain": plain_url, "merged": merged_url},
        "file": {name: (folder / f"{name}.html").as_uri() for name in ("plain", "merged")},
    }


@pytest.fixture(params=["served", "file"])
def opened(
    request: pytest.FixtureRequest, context: BrowserContext, addresses: dict[str, dict[str, str]]
) -> Iterator[Callable[[str], Shown]]:
    """Opens the page of a dataset, "plain" or "merged"; afterwards, that all it asked for was its own, and no error."""
    page = context.new_page()
    shown: list[Shown] = []

    def open_page(name: str) -> Shown:
        shown.append(Shown(page, addresses[request.param][name], [], []))
        page.on("request", lambda asked: shown[-1].asked.append(asked.url))
        page.on("console", lambda message: shown[-1].said.append(message.text))
        page.on("pageerror", lambda error: shown[-1].said.append(str(error)))
        return shown[-1]

    yield open_page
    page.close()
    for one in shown:
        assert one.said == []
        assert all(asked.startswith((one.url, "data:")) for asked in one.asked)


def expect(*arguments: Any) -> Any:
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    return expect(*arguments)


def test_the_grid_shows_each_pair_with_its_outline(opened: Callable[[str], Shown], plain: Path) -> None:
    shown = opened("plain")
    page = shown.at()
    expect(page.locator("#status")).to_have_text("14 pairs, 1 to 14 shown")
    rows = pl.read_parquet(plain / "manifest.parquet").rows(named=True)
    assert shown.names() == [row["key"] for row in rows]
    for row, text in zip(rows, page.locator("#grid a").all_inner_texts(), strict=True):
        assert re.sub(r"\s+", " ", text).strip() == f"{row['key']} {row['class']}"
    page.locator("#grid a").last.scroll_into_view_if_needed()
    for image in page.locator("#grid img").all():
        expect(image).to_have_js_property("complete", True)
    assert page.evaluate(SEEN)
    assert page.locator("#grid img.outline").count() == 14


def test_outlines_go_off_and_on(opened: Callable[[str], Shown]) -> None:
    shown = opened("plain")
    page = shown.at()
    outline = page.locator("#grid img.outline").first
    expect(outline).to_be_visible()
    page.get_by_label("Outlines").first.uncheck()
    expect(outline).to_be_hidden()
    assert page.url.endswith("#outlines=0")
    page.reload()
    expect(outline).to_be_hidden()
    page.locator("#grid a").first.focus()
    page.keyboard.press("o")
    expect(outline).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator("#pictures img.outline").first).to_be_visible()
    page.keyboard.press("o")
    expect(page.locator("#pictures img.outline").first).to_be_hidden()


def test_filters_are_added_removed_and_kept_in_the_address(opened: Callable[[str], Shown], merged: Path) -> None:
    table = pl.read_parquet(merged / "manifest.parquet")
    shown = opened("merged")
    page = shown.at()
    form = page.locator("#filter")
    form.get_by_label("Value").fill("malignant")
    page.keyboard.press("Enter")
    malignant = table.filter(pl.col("class") == "malignant")
    expect(page.locator("#status")).to_contain_text(f"{malignant.height} pairs of 140, 1 to ")
    form.get_by_label("Column").select_option("score")
    form.get_by_label("Comparison").select_option(label="≥")
    form.get_by_label("Value").fill("two")
    form.get_by_role("button", name="Add filter").click()
    expect(page.locator("#error")).to_have_text("two is no number, as score holds.")
    expect(page.locator("#filters li")).to_have_count(1)
    form.get_by_label("Value").fill("0.5")
    form.get_by_role("button", name="Add filter").click()
    both = malignant.filter(pl.col("score") >= 0.5)
    expect(page.locator("#status")).to_contain_text(f"{both.height} pairs of 140")
    page.reload()
    expect(page.locator("#status")).to_contain_text(f"{both.height} pairs of 140")
    page.get_by_role("button", name="Remove the filter class=malignant").click()
    expect(page.locator("#status")).to_contain_text(f"{table.filter(pl.col('score') >= 0.5).height} pairs of 140")
    page.go_back()
    expect(page.locator("#status")).to_contain_text(f"{both.height} pairs of 140")
    form.get_by_label("Column").select_option("rarely")
    form.get_by_label("Comparison").select_option(label="filled")
    expect(form.get_by_label("Value")).to_be_hidden()
    form.get_by_role("button", name="Add filter").click()
    rare = both.filter(pl.col("rarely").is_not_null()).height
    expect(page.locator("#status")).to_contain_text(f"{rare} pair" if rare else "No pair of 140 is as the filters ask")


def test_sorting(opened: Callable[[str], Shown], merged: Path) -> None:
    table = pl.read_parquet(merged / "manifest.parquet")
    page = opened("merged").at()
    page.get_by_label("Sort by").select_option("lesion_pixels")
    least = table.sort("lesion_pixels", maintain_order=True).row(0, named=True)
    expect(page.locator("#grid a").first).to_contain_text(f"lesion_pixels {least['lesion_pixels']}")
    page.get_by_label("Largest first").check()
    most = table.sort("lesion_pixels", descending=True, maintain_order=True).row(0, named=True)
    expect(page.locator("#grid a").first).to_contain_text(f"lesion_pixels {most['lesion_pixels']}")
    expect(page.locator("#grid a").first).to_contain_text(str(most["key"]))


QUERIES = [
    {"where": ["class=benign", "score>=0.25", "score<0.75"]},
    {"where": "rarely!=none"},
    {"where": "rarely=none", "sort": "whole", "down": 1},
    {"where": ["part='parts/001'", "flipped=TRUE"]},
    {"where": 'class!="Benign"'},
    {"sort": "score"},
    {"sort": "class", "down": 1},
    {"sort": "rarely", "down": 1},
    {"sort": "flipped"},
    {"down": 1, "page": 2},
    {"where": "lesion_pixels==1"},
]


def test_a_file_finds_what_the_server_finds(context: BrowserContext, addresses: dict[str, dict[str, str]]) -> None:
    pages = [Shown(context.new_page(), addresses[kind]["merged"], [], []) for kind in ("served", "file")]
    for shown in pages:
        expect(shown.at().locator("#grid a")).to_have_count(60)
    for query in [*QUERIES, {"where": "bogus=1"}, {"where": "class<3"}, {"where": "score=a"}, {"sort": "bogus"}]:
        seen = []
        for shown in pages:
            shown.page.evaluate(
                "hash => new Promise(done => {"
                "  addEventListener('hashchange', () => done(), { once: true }); location.hash = hash; })",
                urlencode(query, doseq=True),
            )
            expect(shown.page.locator("#grid")).to_have_attribute("aria-busy", "false")
            seen.append((shown.page.locator("#status").inner_text(), shown.names()))
            expect(shown.page.locator("#error")).to_be_visible(visible=query not in QUERIES)
        assert seen[0] == seen[1], query
        assert bool(seen[0][0]) is (query in QUERIES)
    for shown in pages:
        shown.page.close()


def test_pages_and_the_keyboard(opened: Callable[[str], Shown]) -> None:
    shown = opened("merged")
    page = shown.at(per=30)
    focused = lambda: page.evaluate("document.activeElement.dataset.name")  # noqa: E731
    expect(page.locator("#status")).to_have_text("140 pairs, 1 to 30 shown")
    expect(page.get_by_role("button", name="Page before")).to_be_disabled()
    page.get_by_role("link", name="Go to the pairs").focus()
    page.keyboard.press("Enter")
    assert focused() == "000/000000000"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    across = len(page.evaluate("getComputedStyle(document.getElementById('grid')).gridTemplateColumns").split())
    assert focused() == f"000/{1 + across:09d}"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#status")).to_have_text("140 pairs, 31 to 60 shown")
    expect(page.locator("#grid a").first).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#grid a").last).to_be_focused()
    assert focused() == "000/000000029"
    page.get_by_label("Page", exact=True).fill("5")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("140 pairs, 121 to 140 shown")
    expect(page.get_by_role("button", name="Next page")).to_be_disabled()
    page.get_by_role("button", name="First page").click()
    expect(page.locator("#status")).to_have_text("140 pairs, 1 to 30 shown")
    shown.at(page=99)
    expect(page.locator("#status")).to_have_text("140 pairs, 121 to 140 shown")


def test_one_pair_large(opened: Callable[[str], Shown], plain: Path) -> None:
    rows = pl.read_parquet(plain / "manifest.parquet").rows(named=True)
    page = opened("plain").at(sort="index", down=1)
    tile = page.locator("#grid a").nth(3)
    tile.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="000000010")).to_be_visible()
    pair = page.locator("#pair")
    expect(pair.locator("#pair-place")).to_have_text(f" {rows[10]['class']}, 4 of 14")
    cells = pair.locator("#row tr").evaluate_all(
        "all => all.map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert [name for name, _ in cells] == list(rows[10])
    assert dict(cells)["image_sha256"] == rows[10]["image_sha256"]
    assert dict(cells)["never"] == "–"
    expect(pair.locator("#refused li")).to_have_text([f"{rows[10]['class']}: too dark"])
    expect(pair.locator("figcaption")).to_have_text(["Image", f"Healthy image: {rows[10]['healthy_file']}", "Mask"])
    for image in pair.locator("figure img").all():
        expect(image).to_have_js_property("naturalWidth", 256)
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog", name="000000009")).to_be_visible()
    expect(pair.locator("#refused")).to_have_text("Nothing: the first draw was accepted.")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("dialog", name="000000011")).to_be_visible()
    page.get_by_role("button", name="Next", exact=True).click()
    page.get_by_role("button", name="Next", exact=True).click()
    expect(page.get_by_role("dialog", name="000000009")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#grid a").nth(4)).to_be_focused()
    page.go_back()
    expect(page.get_by_role("dialog", name="000000009")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_pair_whose_data_come_while_it_is_closed_leaves_the_focus_at_its_tile(
    context: BrowserContext, plain_url: str
) -> None:
    page = context.new_page()
    page.goto(f"{plain_url}#sort=index&down=1&pair=000000010")
    expect(page.locator("#row tr").first).to_be_visible()
    # The next pair's data are held, and come between the click that closes it and the page's next turn.
    page.evaluate(
        """() => {
            const held = new Promise((resolve) => { window.release = resolve; });
            const answer = fetch("pair/000000009/pair.json?sort=index&down=1");
            window.ready = answer.then((got) => got.json());
            window.fetch = async () => { await held; return { ok: true, json: () => window.ready }; };
        }"""
    )
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog", name="000000009")).to_be_visible()
    page.evaluate(
        """async () => {
            await window.ready;
            document.getElementById("close").click();
            window.release();
        }"""
    )
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#grid a").nth(4)).to_be_focused()
    page.close()


def test_lesions_of_a_pair_with_several_are_told_one_by_one_and_an_empty_mask_is_said_to_be_one(
    context: BrowserContext, tmp_path: Path
) -> None:
    out = written(tmp_path / "set")
    assert run("view", out, "--html", tmp_path / "page.html").returncode == 0
    rows = pl.read_parquet(out / "manifest.parquet").sort("lesions").rows(named=True)
    page, address = context.new_page(), (tmp_path / "page.html").as_uri()
    page.goto(f"{address}#{urlencode({'pair': rows[-1]['key']})}")
    told = page.locator("#lesions li")
    expect(told).to_have_count(rows[-1]["lesions"])
    for number, one in enumerate(told.all(), start=1):
        box = f"{rows[-1][f'lesion_{number}_box_left']} to {rows[-1][f'lesion_{number}_box_right']} across"
        expect(one).to_contain_text(f"{rows[-1][f'lesion_{number}_pixels']} pixels, {box}")
    tiles = page.locator("#grid .caption")
    expect(tiles.filter(has_text=rows[-1]["key"])).to_contain_text("3 lesions")
    expect(tiles.filter(has_text=rows[0]["key"])).not_to_contain_text("lesion")
    mask = page.locator("#pictures figure").last
    expect(mask).to_have_text("Mask")
    page.goto(f"{address}#{urlencode({'pair': rows[0]['key']})}")
    expect(mask.get_by_text("empty")).to_be_visible()
    # It is seen on the black square and not behind it.
    assert mask.get_by_text("empty").evaluate(
        "one => { const { left, top } = one.getBoundingClientRect();"
        " return document.elementFromPoint(left + 1, top + 1) === one; }"
    )
    page.close()


def test_tiles_tell_the_category_and_the_level(context: BrowserContext, tmp_path: Path) -> None:
    asked = parse_conditions(**SMALL, birads="2")
    out = written(tmp_path / "asked", mix=None, asked=asked, normals=0.0, count=2)
    grid = Grid.parse("size=0.02/0.03")
    varied = written(tmp_path / "varied", mix=None, normals=0.0, count=2, grid=grid, asked=grid.held({}))
    with serving(varied) as (url, _):
        assert run("view", out, "--html", tmp_path / "page.html").returncode == 0
        page = context.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        expect(page.locator("#grid .caption").first).to_contain_text("BI-RADS 2")
        page.goto(url)
        expect(page.locator("#grid .caption").last).to_contain_text("size 0.03")
        page.close()


def test_an_address_leads_to_a_pair_and_its_page(opened: Callable[[str], Shown]) -> None:
    shown = opened("merged")
    page = shown.at(pair="001/000000069", per=30)
    expect(page.get_by_role("dialog", name="001/000000069")).to_be_visible()
    expect(page.get_by_role("button", name="Next", exact=True)).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("140 pairs, 121 to 140 shown")
    expect(page.locator("#grid a").last).to_be_focused()
    shown.at(pair="001/000000069", where="whole<10")
    expect(page.locator("#pair-place")).to_contain_text("not among those that the filters ask for")


def test_an_address_of_no_pair(opened: Callable[[str], Shown]) -> None:
    shown = opened("plain")
    page = shown.at(pair="<img class=evil src=x>")
    expect(page.locator("#pair-error")).to_have_text("There is nothing here.")
    expect(page.get_by_role("dialog", name="<img class=evil src=x>")).to_be_visible()
    assert page.locator(".evil").count() == 0
    shown.said.clear()  # The browser itself says that it got a 404.


def test_what_the_dataset_says_is_text(opened: Callable[[str], Shown]) -> None:
    page = opened("plain").at(pair="000000003", sort="<b class=evil>")
    expect(page.get_by_role("heading", name="<img class=evil src=x>")).to_have_count(1)
    assert page.title() == "<img class=evil src=x> – busigen view"
    row = page.locator("#row tr").filter(has_text="<b class=evil>")
    expect(row.locator("td")).to_have_text(f"{HOSTILE} 3")
    expect(page.locator("figcaption").nth(1)).to_have_text('Healthy image: <img class=evil src="x">.png')
    page.keyboard.press("Escape")
    expect(page.locator("#grid .value").first).to_have_text(f"<b class=evil> {HOSTILE} 0")
    assert page.locator(".evil").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_can_be_used_by_everybody(opened: Callable[[str], Shown], size: tuple[int, int], scheme: Any) -> None:
    shown = opened("plain")
    shown.page.set_viewport_size({"width": size[0], "height": size[1]})
    shown.page.emulate_media(color_scheme=scheme)
    for query, there in (
        ({"where": ["class=benign"], "sort": "score"}, "#grid img"),
        ({"where": "bogus=1"}, "#error"),
        ({"pair": "000000003"}, "#refused li"),
        ({"pair": "none"}, "#pair-error"),
    ):
        page = shown.at(**query)
        page.reload()
        expect(page.locator(there).first).to_be_visible()
        if "pair" not in query:
            page.locator("#controls").evaluate("one => { one.open = true; }")
        assert accessibility_faults(page) == []
        # Nothing is cut off at the right, nor has to be scrolled for.
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.said.clear()  # The browser itself says that it got a 400 and a 404.


def test_a_damaged_pair_is_said_to_be_one(context: BrowserContext, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    (folder / "shards" / "000001.tar").unlink()
    with serving(folder) as (url, process):
        page = Shown(context.new_page(), url, [], []).at()
        expect(page.locator("#grid a").nth(5)).to_contain_text("cannot be read")
        expect(page.locator("#grid a").nth(4)).not_to_contain_text("cannot be read")
        page.locator("#grid a").nth(5).click()
        expect(page.locator("#pair-error")).to_contain_text("000001.tar cannot be read")
        expect(page.locator("#row tr").first).to_have_text("key000000005")
        page.keyboard.press("Escape")
        process.kill()
        process.wait()
        page.get_by_label("Largest first").check()
        expect(page.locator("#error")).to_contain_text("busigen view does not answer any more. Start it again")
        page.close()
