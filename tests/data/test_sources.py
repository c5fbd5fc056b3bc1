"""Each layout is recognised, and what it lists in vain is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from busigen.data.sources import LAYOUTS, read_source
from busigen.errors import InputError
from tests.conftest import Sources
from tests.drawn import draw_pairs


def test_busi_is_found_in_its_folder_and_from_above(any_sources: Sources) -> None:
    listing = read_source(any_sources.busi)
    assert listing.layout == "BUSI"
    assert listing.folder == any_sources.busi.resolve()
    names = [record.id for record in listing.records]
    assert len(set(names)) == len(names)
    assert names.index("busi/benign (2)") < names.index("busi/benign (10)")
    assert any(len(record.masks) > 1 for record in listing.records)
    assert not listing.refused


def test_busi_from_its_parent_folder(drawn_busi: Path) -> None:
    assert read_source(drawn_busi.parent).records == read_source(drawn_busi).records


def test_busbra_has_patients_and_birads(any_sources: Sources) -> None:
    listing = read_source(any_sources.busbra)
    assert listing.layout == "BUS-BRA"
    assert not listing.refused
    first = listing.records[0]
    assert first.id == "busbra/bus_0001-l"
    assert first.patient == "busbra/1"
    assert {record.birads for record in listing.records} == {"2", "3", "4", "5"}
    assert len({record.patient for record in listing.records}) < len(listing.records)


@pytest.mark.parametrize("labels", [False, True])
def test_pairs_have_classes_from_folders_or_a_table(tmp_path: Path, labels: bool) -> None:
    listing = read_source(draw_pairs(tmp_path / "clinic", labels=labels))
    assert listing.layout == "pairs"
    assert {record.image_class for record in listing.records} == {"normal", "benign", "malignant"}
    assert all(record.id.startswith("clinic/") for record in listing.records)
    assert all(len(record.masks) == (record.image_class != "normal") for record in listing.records)
    assert (listing.records[0].patient == "clinic/p0") == labels


def test_a_table_that_says_two_things_of_an_image_is_refused(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "clinic", labels=True)
    lines = (folder / "labels.csv").read_text().splitlines()
    again = [lines[1], "images/scan1.png,malignant,p9,4", "scan2,benign,p1,4"]
    (folder / "labels.csv").write_text("\n".join([*lines, *again]))
    listing = read_source(folder)
    problems = {refusal.file: refusal.problem for refusal in listing.refused}
    assert sorted(problems) == ["clinic/images/scan1.png", "clinic/images/scan2.png"]
    assert "patient is 'p0' and 'p9'" in problems["clinic/images/scan1.png"]
    assert "class is 'normal' and 'benign'" in problems["clinic/images/scan2.png"]
    assert len(listing.records) == 4, "the same row twice says nothing new"


def test_a_pair_without_a_class_is_named_with_the_remedy(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "clinic")
    shutil.move(folder / "images" / "benign" / "scan0.png", folder / "images" / "scan0.png")
    refusal = read_source(folder).refused[0]
    assert refusal.file == "clinic/images/scan0.png"
    assert "labels.csv" in refusal.fix


def test_two_images_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "clinic")
    shutil.copy(folder / "images" / "benign" / "scan0.png", folder / "images" / "benign" / "scan0.tif")
    listing = read_source(folder)
    assert [refusal.file for refusal in listing.refused] == ["clinic/images/benign/scan0.tif"]
    assert len(listing.records) == 6


def test_busbra_names_rows_and_images_that_do_not_match(drawn_busbra: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn_busbra, tmp_path / "BUSBRA"))
    table = (folder / "bus_data.csv").read_text().splitlines()
    table[1] = table[1].replace("benign", "unclear")
    del table[2]
    table.append("../../etc/secret,9,benign,2")
    (folder / "bus_data.csv").write_text("\n".join(table))
    problems = {refusal.file: refusal.problem for refusal in read_source(folder).refused}
    assert "'unclear'" in problems["BUSBRA/Images/bus_0001-l.png"]
    assert "no row" in problems["BUSBRA/Images/bus_0001-r.png"]
    assert "../../etc/secret" in problems["BUSBRA/bus_data.csv"]


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x00", b"ID;Case\n1;2\n", b"ID,Case\n1\n2,3,4\n"])
def test_a_broken_table_is_named(drawn_busbra: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(drawn_busbra, tmp_path / "BUSBRA"))
    (folder / "bus_data.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"bus_data\.csv"):
        read_source(folder)


def test_orphan_masks_and_misnamed_images_are_named(drawn_busi: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drawn_busi, tmp_path / "BUSI"))
    (folder / "benign" / "benign (9).png").unlink()
    (folder / "benign" / "benign (10).png").rename(folder / "benign" / "malignant (99).png")
    files = {refusal.file for refusal in read_source(folder).refused}
    assert {"BUSI/benign/benign (9)_mask.png", "BUSI/benign/malignant (99).png"} <= files


def test_an_unknown_layout_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"-")
    with pytest.raises(InputError) as refusal:
        read_source(tmp_path)
    assert all(layout.name in refusal.value.fix for layout in LAYOUTS)
    with pytest.raises(InputError, match="does not exist"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        read_source(tmp_path / "holiday.png")
