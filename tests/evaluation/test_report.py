from __future__ import annotations

import base64
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from busigen.evaluation.context import Figure, Interval, Picture, SectionResult, section_folder
from busigen.evaluation.report.page import CONTACT_SHEET, LARGEST, inline, write_html
from busigen.evaluation.sections import SECTIONS
from busigen.text import printable

VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
ATTACK = "<img src=x onerror=alert(1)>\"'.png"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 200" width="300pt" height="200pt">'
    '<defs><g id="glyph"/></defs>'
    '<script>alert(1)</script><image href="https://example.org/tracker.png"/></svg>'
)


@dataclass
class Page(HTMLParser):
    """The page as a reader's browser sees it: every element with its attributes, and the text outside of scripts."""

    html: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    unbalanced: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.html)
        self.close()
        self.unbalanced += self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()
        else:
            self.unbalanced.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def figure(key: str, value: float | None = 0.62, *, bare: bool = False, **others: Any) -> Figure:
    """A figure with interval and floor, or with neither."""
    if bare:
        return Figure(key, f"Label of {key}", Interval(value), None, 500, 419, **others)  # type: ignore[arg-type]
    assert value is not None
    floor = Interval(0.51, 0.45, 0.56)
    return Figure(key, f"Label of {key}", Interval(value, value - 0.04, value + 0.04), floor, 500, 419, **others)


def entry(result: SectionResult, **others: Any) -> dict[str, Any]:
    section = SECTIONS[result.section]
    return {**result.to_dict(), "title": section.title, "question": section.question, **others}


def report_of(*entries: dict[str, Any], **others: Any) -> dict[str, Any]:
    inputs = {"synthetic": "/somewhere/set", "real": "prepared", "train": None, "effort": "quick", "seed": 0}
    content = {"schema_version": 1, "busigen": "1.2.3", "inputs": inputs, "sections": list(entries), **others}
    # As it comes from report.json.
    return dict(json.loads(json.dumps(content)))


@pytest.fixture
def everything(tmp_path: Path) -> tuple[dict[str, Any], list[SectionResult]]:
    """All six sections with flags, notes, pictures, plots and a long table, and texts that try to become markup."""
    results = []
    rng = np.random.default_rng(0)
    for name in SECTIONS:
        folder = section_folder(tmp_path, name)
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (64, 200), dtype=np.uint8)).save(folder / "worst.png")
        (folder / "plot.svg").write_text(SVG, encoding="utf-8")
        result = SectionResult(name, seconds=187.0)
        result.figures = [figure(f"{name}.part{k}", 0.4 + k / 50, flagged=k > 9, p=0.004) for k in range(14)]
        result.figures += [figure(f"{name}.bare", 12.0, bare=True, note="No floor: nothing to halve.", headline=True)]
        result.flag(f"Something is wrong with {name} & <b>more</b>.", f"{name}.part13")
        result.note(f"Something to know about {name}.")
        result.pictures = [Picture("worst.png", f"The worst of {name}"), Picture("plot.svg", f"A plot of {name}")]
        results.append(result)
    Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).save(section_folder(tmp_path, "privacy") / ATTACK)
    results[-1].pictures.append(Picture(ATTACK, ATTACK))
    Image.fromarray(rng.integers(0, 256, (90, 180), dtype=np.uint8)).save(tmp_path / CONTACT_SHEET)
    return report_of(*map(entry, results)), results


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_every_finding_figure_and_picture(
    everything: tuple[dict[str, Any], list[SectionResult]], tmp_path: Path
) -> None:
    content, results = everything
    content["created"] = "2026-03-04T05:06:07+00:00 by UTC"
    page = read(write_html(content, tmp_path))
    assert "2026-03-04 05:06:07+00:00 by UTC" in page.text
    for result in results:
        assert SECTIONS[result.section].question in page.text
        for finding in result.findings:
            assert finding.text in page.text
        for part in result.figures:
            assert f"{part.label} {part.key}" in page.text
        for picture in result.pictures:
            assert picture.caption in page.text
            assert any(picture.caption in (image["alt"] or "") for image in page.all("img"))
        assert "No floor: nothing to halve." in page.text
    # Two pictures in each section, the one with the hostile name, and the contact sheet.
    assert len(page.all("img")) == 2 * len(results) + 2
    assert page.text.count("Wall time: 3 min 07 s.") == len(results)


def test_the_page_needs_nothing_else(everything: tuple[dict[str, Any], list[SectionResult]], tmp_path: Path) -> None:
    path = write_html(everything[0], tmp_path)
    html = path.read_text(encoding="utf-8")
    # Base64 has no colon, so an address in the page could not hide from this.
    assert not re.search(r"https?://|@import|url\(", html)
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy


def test_the_page_is_well_formed(everything: tuple[dict[str, Any], list[SectionResult]], tmp_path: Path) -> None:
    page = read(write_html(everything[0], tmp_path))
    assert page.unbalanced == []
    ids = Counter(attributes["id"] for _, attributes in page.elements if attributes.get("id"))
    assert max(ids.values()) == 1
    for tag, attributes in page.elements:
        for name in ("href", "aria-labelledby"):
            if target := attributes.get(name):
                assert target.lstrip("#") in ids, f"<{tag}> points to {target}, which is nowhere"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(image.get("alt") for image in page.all("img"))


def test_the_page_stays_small(everything: tuple[dict[str, Any], list[SectionResult]], tmp_path: Path) -> None:
    content, _ = everything
    noise = np.random.default_rng(1).integers(0, 256, (1500, 2400), dtype=np.uint8)
    large = section_folder(tmp_path, "fidelity") / "large.png"
    Image.fromarray(noise).save(large)
    content["sections"][2]["pictures"].append({"file": "large.png", "caption": "Noise"})
    path = write_html(content, tmp_path)
    # The large picture alone takes 3.6 MB; noise is the worst that a compressed one can hold.
    assert large.stat().st_size > 3_000_000
    assert path.stat().st_size < 3_000_000
    assert "large.png" in read(path).text


def test_texts_from_outside_never_become_markup(tmp_path: Path) -> None:
    folder = section_folder(tmp_path, "privacy")
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / ATTACK)
    script = "</style></script><script>alert(1)</script>"
    result = SectionResult("privacy", pictures=[Picture(ATTACK, ATTACK), Picture(f"../{script}", script)])
    result.figures = [Figure(script, script, Interval(1.0, 0.5, 1.5), None, 5, 5, unit=script, note=script)]
    result.flag(script, script)
    content = report_of(
        {**entry(result), "title": script, "question": script, "error": script},
        busigen=script,
        created=script,
        notes=[script],
        inputs={"synthetic": script, "real": script, script: {script: [script]}},
        sets={"real": {"refused": [{"file": script, "reason": script}]}},
        versions={script: script},
    )
    page = read(write_html(content, tmp_path))
    assert page.unbalanced == []
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert [image["src"] for image in page.all("img") if not (image["src"] or "").startswith("data:")] == []
    assert ATTACK in page.text and script in page.text
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_plots_cannot_reach_into_the_page(tmp_path: Path) -> None:
    (tmp_path / "plot.svg").write_text(SVG, encoding="utf-8")
    shown = inline(tmp_path, "plot.svg")
    assert shown.uri.startswith("data:image/svg+xml;base64,")
    assert base64.b64decode(shown.uri.partition(",")[2]).decode() == SVG
    # Points to CSS pixels: 4 for 3.
    assert (shown.width, shown.height) == (400, 267)


@pytest.mark.parametrize("file", ["gone.png", "../secret.png", "torn.png", "torn.svg", "text.png", "a\0\u202eb.png"])
def test_a_picture_that_cannot_be_shown_is_named_instead(tmp_path: Path, file: str) -> None:
    folder = section_folder(tmp_path, "physics")
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder.parent / "secret.png")
    (folder / "torn.png").write_bytes((folder.parent / "secret.png").read_bytes()[:40])
    (folder / "torn.svg").write_text("<svg>")
    (folder / "text.png").write_text("not a picture")
    result = SectionResult("physics", pictures=[Picture(file, "What it would have shown")])
    page = read(write_html(report_of(entry(result)), tmp_path))
    assert page.all("img") == []
    assert "What it would have shown" in page.text
    assert printable(f"The picture {file}") in page.text


def test_large_pictures_keep_their_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (900, 900), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    before = (tmp_path / "noise.png").read_bytes()
    shown = inline(tmp_path, "noise.png")
    assert len(before) > LARGEST
    assert shown.uri.startswith("data:image/jpeg") and "noise.png" in shown.problem
    assert (tmp_path / "noise.png").read_bytes() == before


def test_no_section_at_all(tmp_path: Path) -> None:
    page = read(write_html({"sections": []}, tmp_path))
    assert "No section ran" in page.text
    for section in SECTIONS.values():
        assert f"{section.question} ({section.title})" in page.text


def test_missing_sections_stay_unanswered(tmp_path: Path) -> None:
    page = read(write_html(report_of(entry(SectionResult("physics", [figure("physics.one")]))), tmp_path))
    assert "Nothing is flagged" in page.text
    unanswered = page.text.partition("Unanswered: ")[2].partition("No training images")[0]
    assert [section.name for section in SECTIONS.values() if section.question in unanswered] == [
        name for name in SECTIONS if name != "physics"
    ]


def test_a_section_that_failed_is_neither_silent_nor_flagged(tmp_path: Path) -> None:
    result = SectionResult("realness")
    result.note("This section could not run. It needs monai.")
    page = read(write_html(report_of(entry(result, error="It needs monai.")), tmp_path))
    assert "unmeasured" in page.text
    assert "silent" not in page.text.partition("What this audit cannot say")[0]
    assert SECTIONS["realness"].question in page.text.partition("Unanswered: ")[2].partition("No training images")[0]


def test_figures_without_interval_floor_or_value(tmp_path: Path) -> None:
    result = SectionResult("physics")
    result.figures = [
        figure("physics.bare", 0.25, bare=True, note="No halves."),
        figure("physics.nothing", None, bare=True, note="Too few lesions."),
        Figure("physics.tick", "Tick", Interval(3.0), Interval(2.0), 20, 20),
        Figure(
            "physics.nan", "Lost", Interval(float("nan"), float("nan"), float("inf")), Interval(1.0, 0.5, 2.0), 1, 1
        ),
    ]
    page = read(write_html(report_of(entry(result)), tmp_path))
    assert page.unbalanced == []
    assert "Too few lesions." in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text.lower().replace("physics.nan", ""))
    assert not re.search(r"\bnone%|\bNone\b(?!\.)", page.html)


def test_the_worst_defect_comes_first(tmp_path: Path) -> None:
    near, far = SectionResult("integrity"), SectionResult("realness")
    near.figures = [figure("integrity.near", 0.58, flagged=True)]
    near.flag("A little off.", "integrity.near")
    far.figures = [figure("realness.far", 0.97, flagged=True)]
    far.flag("Far off.", "realness.far")
    summary = read(write_html(report_of(entry(near), entry(far)), tmp_path)).text.partition("Verdicts")[0]
    assert 0 < summary.index("Far off.") < summary.index("A little off.")
    assert "0.970 [0.930, 1.010], floor 0.510 [0.450, 0.560], n = 500 / 419" in summary


def test_flagged_marks_differ_in_shape_and_in_words(tmp_path: Path) -> None:
    result = SectionResult("realness", [figure("realness.a", flagged=True), figure("realness.b", 0.5)])
    result.flag("Off.", "realness.a")
    page = read(write_html(report_of(entry(result)), tmp_path))
    shapes = {tag for tag, attributes in page.elements if attributes.get("class") in ("flagged", "silent")}
    assert {"path", "circle"} <= shapes
    plots = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert [label.partition(": ")[2] for label in plots] == ["above the floor, flagged", "inside the floor"]
