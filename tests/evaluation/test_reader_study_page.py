"""The page of a reader study in a real browser: answered with the keyboard, closed, opened again, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from busigen.evaluation.reader_study.make import Study, make
from busigen.evaluation.reader_study.records import Answer, Answers, read_answers, read_key
from busigen.evaluation.reader_study.score import score
from busigen.runtime.execution.factory import generate
from tests.harness.browser import DESKTOP, PHONE, accessibility_faults, browser, needs_browser
from tests.harness.noise_source import NoiseSource

pytestmark = needs_browser

IMAGES = 10


@pytest.fixture(scope="module")
def study(synthetic_busi: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    generate(NoiseSource(), folder / "drawn", count=16, seed=7)
    made = make(folder / "drawn", synthetic_busi, folder / "study", cases=8, repeats=2)
    assert made.images == IMAGES
    return made


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return tmp_path / "profile"


def page_of(context: Any, study: Study) -> Any:
    page = context.pages[0]
    page.goto((study.out / "study.html").as_uri())
    return page


def begin(page: Any, reader: str) -> None:
    page.get_by_label("Your name").fill(reader)
    page.keyboard.press("Enter")


def saved(page: Any, study: Study, path: Path) -> Answers:
    with page.expect_download() as download:
        page.locator(".save:visible").click()
    download.value.save_as(path)
    return read_answers(path, read_key(study.out / "key.json"))


def press(page: Any, *keys: object) -> None:
    for key in keys:
        page.keyboard.press(str(key))


def expected(count: int) -> list[Answer]:
    return [Answer(image=k + 1, rating=k % 6 + 1, birads=k % 6) for k in range(count)]


def answer(page: Any, first: int, last: int) -> None:
    for k in range(first, last):
        press(page, k % 6 + 1, k % 6, "Enter")


def test_a_reader_answers_closes_the_page_goes_on_and_saves(study: Study, profile: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    with browser(profile) as context:
        context.on("request", lambda request: asked.append(request.url))
        page = page_of(context, study)
        begin(page, "Dr <b>Ä</b> & Co")
        answer(page, 0, 4)
        assert page.locator("#place").inner_text() == f"Image 5 of {IMAGES}"
        assert saved(page, study, tmp_path / "part.json").answers == expected(4)
        press(page, 5)  # Half of the fifth image's answer, and no word of farewell.
    with browser(profile) as context:
        context.on("request", lambda request: asked.append(request.url))
        page = page_of(context, study)
        assert page.get_by_label("Your name").input_value() == "Dr <b>Ä</b> & Co"
        assert f"5 of {IMAGES} images are kept" in page.locator("#kept").inner_text()
        page.get_by_role("button", name="Begin").click()
        assert page.locator("#place").inner_text() == f"Image 5 of {IMAGES}"
        assert page.locator("input[name=rating]:checked").get_attribute("value") == "5"
        answer(page, 4, IMAGES)
        assert page.locator("h1:visible").inner_text() == f"All {IMAGES} images are answered"
        given = saved(page, study, tmp_path / "answers.json")
    assert given.reader == "Dr <b>Ä</b> & Co" and given.answers == expected(IMAGES)
    (one,) = score([tmp_path / "answers.json"], key=study.out / "key.json").readers
    assert one.answered == 8 and one.repeats["call"].count == 2
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def test_both_questions_have_to_be_answered_and_answers_can_be_changed(
    study: Study, profile: Path, tmp_path: Path
) -> None:
    with browser(profile) as context:
        page = page_of(context, study)
        begin(page, "A")
        press(page, "Enter")
        assert "both questions" in page.locator("#hint").inner_text()
        press(page, 2, "Backspace", 9, "Enter")  # No second answer, no image before the first, no rating of 9.
        assert page.locator("#place").inner_text() == f"Image 1 of {IMAGES}"
        page.get_by_label("suspicious").check()
        page.get_by_role("button", name="Next").click()
        press(page, 6, 5, "Enter", "Backspace", 1)
        assert page.locator("#place").inner_text() == f"Image 2 of {IMAGES}"
        given = saved(page, study, tmp_path / "answers.json").answers
    assert given == [Answer(image=1, rating=2, birads=4), Answer(image=2, rating=1, birads=5)]


def test_readers_of_one_computer_do_not_meet(study: Study, profile: Path, tmp_path: Path) -> None:
    with browser(profile) as context:
        page = page_of(context, study)
        begin(page, "first")
        answer(page, 0, 3)
        page.get_by_role("button", name="To the start").click()
        begin(page, "second")
        assert page.locator("#place").inner_text() == f"Image 1 of {IMAGES}"
        assert page.locator("input:checked").count() == 0
        assert saved(page, study, tmp_path / "answers.json").answers == []


def test_two_tabs_of_a_reader_keep_both_their_answers(study: Study, profile: Path, tmp_path: Path) -> None:
    with browser(profile) as context:
        page = page_of(context, study)
        begin(page, "A")
        other = context.new_page()
        other.goto(page.url)
        begin(other, "A")
        answer(page, 0, 2)
        other.wait_for_function("document.getElementById('count').textContent === '2 answered'")
        press(other, "Enter", "Enter", 3, 2, "Enter")
        given = saved(other, study, tmp_path / "answers.json").answers
    assert given == [*expected(2), Answer(image=3, rating=3, birads=2)]


@pytest.mark.parametrize(
    "kept", ["{", "null", "[]", '{"answers": {"1": {"rating": 77, "birads": "x"}, "2": 5}, "place": -3}']
)
def test_what_another_program_left_in_the_store_is_no_answer(study: Study, profile: Path, kept: str) -> None:
    with browser(profile) as context:
        page = page_of(context, study)
        page.evaluate(
            "([key, kept]) => localStorage.setItem(key, kept)", [f"busigen-reader-study/{study.study}/A", kept]
        )
        begin(page, "A")
        assert page.locator("#place").inner_text() == f"Image 1 of {IMAGES}"
        assert page.locator("input:checked").count() == 0
        press(page, 1, 1, "Enter")
        assert page.locator("#place").inner_text() == f"Image 2 of {IMAGES}"


def test_a_browser_that_keeps_nothing_is_told_of(study: Study, profile: Path, tmp_path: Path) -> None:
    with browser(profile) as context:
        context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('off'); } });")
        page = page_of(context, study)
        begin(page, "A")
        assert "keeps nothing" in page.get_by_role("alert").inner_text()
        answer(page, 0, IMAGES)
        assert saved(page, study, tmp_path / "answers.json").answers == expected(IMAGES)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_view_is_accessible_and_fits(study: Study, profile: Path, size: tuple[int, int]) -> None:
    with browser(profile, size) as context:
        page = page_of(context, study)

        def check() -> None:
            assert accessibility_faults(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

        check()
        begin(page, "A")
        check()
        answer(page, 0, IMAGES)
        check()
