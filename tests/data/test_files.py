"""What is seen of a folder that somebody gave, and what is passed over with a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from busigen.data.sources.files import Tree, find_images, name_key
from busigen.data.sources.read import read_images, read_source
from busigen.errors import InputError
from busigen.foreign import walk
from tests.harness.synthetic_datasets import draw_pairs


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A set that also holds 2,500 folders in one another: more than Python recurses, and than a path can name."""
    folder = draw_pairs(tmp_path / "set")
    with chdir(folder):
        for _ in range(2500):
            os.mkdir("deep")
            os.chdir("deep")
        yield folder
        # What removes temporary folders recurses, too.
        for _ in range(2500):
            os.chdir("..")
            os.rmdir("deep")


def link(path: Path, target: str | Path) -> None:
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no links")


def test_images_are_found_in_natural_order_without_masks(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    for folder in (inside / "b", inside / "Masks", outside):
        folder.mkdir(parents=True)
    names = ["scan (10).png", "scan (2).png", "scan (2)_mask.png", "scan (2)_mask_1.png", ".scan (3).png", "b/x.JPG"]
    for name in [*names, "Masks/scan (2).png", "notes.txt", "../elsewhere/secret.png"]:
        (inside / name).write_bytes(b"-")
    (inside / "leaving.png").symlink_to(outside / "secret.png")
    (inside / "away").symlink_to(outside)
    found = [path.relative_to(inside).as_posix() for path in find_images(inside)]
    assert found == ["b/x.JPG", "scan (2).png", "scan (10).png"]


def test_a_set_holds_as_many_images_as_its_list(any_busi: Path) -> None:
    listed = (any_busi / "groups.csv").read_text().splitlines()[1:]
    assert len(find_images(any_busi)) == len(listed)


def test_links_in_circles_are_named_and_end_nothing(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set")
    link(folder / "again", ".")
    link(folder / "images" / "self.png", "self.png")
    link(folder / "images" / "normal" / "all", folder / "images")
    for listing in (read_source(folder), read_images(folder)):
        assert len(listing.records) == 6
        (refusal,) = listing.refused
        assert refusal.file == "set/again, set/images/self.png, set/images/normal/all"
        assert refusal.count == 3 and "Links are not followed" in refusal.problem
    assert len(find_images(folder)) == 6


def test_folders_without_an_end_are_named_and_end_nothing(deep: Path) -> None:
    for listing in (read_source(deep), read_images(deep)):
        assert len(listing.records) == 6
        (refusal,) = listing.refused
        assert "deep" in refusal.problem
    assert len(find_images(deep)) == 6
    assert sum(path.suffix == ".png" for path in walk(deep)) == 10


def test_a_link_that_stays_inside_is_read(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x.bin").write_bytes(b"-")
    link(tmp_path / "x.png", Path("store", "x.bin"))
    assert find_images(tmp_path) == [tmp_path / "x.png"]


def test_a_linked_class_folder_is_named(synthetic_busi: Path, tmp_path: Path) -> None:
    folder = tmp_path / "BUSI"
    folder.mkdir()
    for name in ("benign", "malignant"):
        link(folder / name, synthetic_busi / name)
    with pytest.raises(InputError, match="2 links, which are not followed"):
        read_source(folder)


@pytest.mark.parametrize("hidden", ["._scan0.png", ".trash/scan0.png", "__MACOSX/scan0.png", "lost+found/scan0.png"])
def test_hidden_files_are_counted_and_change_nothing(tmp_path: Path, hidden: str) -> None:
    folder = draw_pairs(tmp_path / "set")
    before = read_source(folder).records
    for half in ("images", "masks"):
        (folder / half / hidden).parent.mkdir(exist_ok=True)
        (folder / half / hidden).write_bytes(b"-")
    listing = read_source(folder)
    assert listing.records == before and not listing.refused
    (note,) = listing.notes
    assert note.startswith("2 hidden") and "set/images/" in note


@pytest.mark.parametrize(("name", "ending"), [("a.webp", ".webp"), ("a.mha", ".mha"), ("a.nii.gz", ".nii.gz")])
def test_images_that_others_can_read_are_counted_and_named(tmp_path: Path, name: str, ending: str) -> None:
    folder = draw_pairs(tmp_path / "set")
    for number in range(5):
        (folder / "images" / f"{number}{name}").write_bytes(b"-")
    for listing in (read_source(folder), read_images(folder)):
        (refusal,) = listing.refused
        assert refusal.count == 5
        assert refusal.file == f"set/images/0{name}, set/images/1{name}, set/images/2{name} and 2 more"
        assert f"end in {ending} " in refusal.problem
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / name).write_bytes(b"-")
    with pytest.raises(InputError, match=f"it holds 1 {ending}"):
        read_source(tmp_path / "only")


def test_documents_are_passed_over_without_a_word(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set")
    for name in ("README", "LICENSE.txt", "groups.csv", "clinical.xlsx", "paper.pdf", "Thumbs.db"):
        (folder / name).write_bytes(b"-")
    listing = read_source(folder)
    assert not listing.refused and not listing.notes


def test_what_busigen_wrote_is_passed_over(tmp_path: Path) -> None:
    for name in ("prepared/prepared.json", "out/run.json", "report/report.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    for name in ("prepared/a.png", "out/shards/a.png", "report/sections/a.png", "elsewhere/a.png", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    assert find_images(tmp_path) == [tmp_path / "a.png", tmp_path / "elsewhere" / "a.png"]
    tree = Tree(tmp_path, skip=tmp_path / "elsewhere")
    assert [path for place in tree.below() for path in place.images] == [tmp_path / "a.png"]
    assert tree.passed_over()[1][0].startswith("4 written by busigen, passed over")


def test_names_are_compared_without_case_and_in_one_unicode_form() -> None:
    assert name_key("L\u00e4sion") == name_key("LA\u0308SION") != name_key("Lasion")
