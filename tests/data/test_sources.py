"""Each layout is recognised, and what it lists in vain is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from busigen.data.prepare import prepare
from busigen.data.sources.read import LAYOUTS, read_source
from busigen.data.sources.records import Listing
from busigen.errors import InputError
from tests.conftest import Sources
from tests.harness.synthetic_datasets import draw_busbra, draw_frame, draw_pairs


def test_busi_is_found_in_its_folder_and_from_above(any_sources: Sources) -> None:
    listing = read_source(any_sources.busi)
    assert listing.layout == "BUSI"
    assert listing.folder == any_sources.busi.resolve()
    names = [record.id for record in listing.records]
    assert len(set(names)) == len(names)
    assert names.index("busi/benign (2)") < names.index("busi/benign (10)")
    assert any(len(record.masks) > 1 for record in listing.records)
    assert not listing.refused


def test_busi_from_its_parent_folder(synthetic_busi: Path) -> None:
    assert read_source(synthetic_busi.parent).records == read_source(synthetic_busi).records


def test_busbra_has_patients_and_birads(any_sources: Sources) -> None:
    listing = read_source(any_sources.busbra)
    assert listing.layout == "BUS-BRA"
    assert not listing.refused
    first = listing.records[0]
    assert first.id == "busbra/bus_0001-l"
    assert first.patient == "busbra/1"
    assert {record.birads for record in listing.records} == {"2", "3", "4", "5"}
    assert len({record.patient for record in listing.records}) < len(listing.records)


def test_scanners_are_what_the_sets_and_their_tables_say(any_sources: Sources, tmp_path: Path) -> None:
    assert {record.scanner for record in read_source(any_sources.busi).records} == {"GE Logiq E9"}
    busbra = draw_busbra(tmp_path / "BUSBRA")
    table = busbra / "bus_data.csv"
    head, *rows = [line for line in table.read_text().splitlines() if line]
    devices = ["GE Logiq 7 @10-14MHz", "", *["Toshiba Aplio 300"] * (len(rows) - 2)]
    told = [f"{row},{device}" for row, device in zip(rows, devices, strict=True)]
    table.write_text("\n".join([f"{head},Device", *told]))
    scanners = [record.scanner for record in read_source(busbra).records]
    assert scanners[:3] == ["GE Logiq 7", None, "Toshiba Aplio 300"]
    clinic = draw_pairs(tmp_path / "clinic", labels=True)
    head, first, *rest = (clinic / "labels.csv").read_text().splitlines()
    (clinic / "labels.csv").write_text(
        "\n".join([f"{head},scanner", f"{first},Sono \x1b[31m1", *(f"{row}," for row in rest)])
    )
    found = {record.scanner for record in read_source(clinic).records}
    assert len(found) == 2 and None in found and not any("\x1b" in name for name in found if name)


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


def test_busbra_names_rows_and_images_that_do_not_match(synthetic_busbra: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(synthetic_busbra, tmp_path / "BUSBRA"))
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
def test_a_broken_table_is_named(synthetic_busbra: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(synthetic_busbra, tmp_path / "BUSBRA"))
    (folder / "bus_data.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"bus_data\.csv"):
        read_source(folder)


def test_orphan_masks_and_misnamed_images_are_named(synthetic_busi: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(synthetic_busi, tmp_path / "BUSI"))
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


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_set(folder: Path, names: dict[str, str], image_class: str = "malignant") -> Path:
    """Draw a folder of images and masks: each image's path with its mask's, or with nothing for none."""
    rng = np.random.default_rng(5)
    for image, mask in names.items():
        frame = draw_frame(rng, (240, 200), image_class)
        write_image(folder / image, frame.pixels)
        if mask:
            write_image(folder / mask, frame.lesions[0].astype(np.uint8) * 255)
    return folder


def masks_of(listing: Listing) -> dict[str, list[str]]:
    return {
        listing.relative(record.image): [listing.relative(mask) for mask in record.masks] for record in listing.records
    }


def test_busis_names_in_images_and_masks_are_the_plain_layout(tmp_path: Path) -> None:
    names = {f"images/{c}/{c} ({n}).png": f"masks/{c}/{c} ({n}).png" for c in ("benign", "malignant") for n in (1, 2)}
    listing = read_source(draw_set(tmp_path / "set", names))
    assert listing.layout == "pairs"
    assert masks_of(listing) == {f"set/{image}": [f"set/{mask}"] for image, mask in names.items()}
    with pytest.raises(InputError, match="holds the images of a set") as refusal:
        read_source(tmp_path / "set" / "images")
    assert str(tmp_path / "set") in refusal.value.fix


def test_a_number_that_every_class_has_joins_no_mask_of_another_class(tmp_path: Path) -> None:
    names = {"images/benign/2.png": "masks/benign/2.png", "images/malignant/2.png": "", "images/normal/2.png": ""}
    listing = read_source(draw_set(tmp_path / "set", names))
    assert masks_of(listing) == {
        "set/images/benign/2.png": ["set/masks/benign/2.png"],
        "set/images/malignant/2.png": [],
        "set/images/normal/2.png": [],
    }


def test_a_mask_that_may_be_of_two_images_is_of_none(tmp_path: Path) -> None:
    folder = draw_set(tmp_path / "set", {"images/benign/2.png": "masks/2.png", "images/malignant/2.png": ""})
    listing = read_source(folder)
    assert not listing.records
    assert all("masks/2.png" in refusal.problem for refusal in listing.refused)
    assert {refusal.file for refusal in listing.refused} == {f"set/images/{c}/2.png" for c in ("benign", "malignant")}


def test_a_row_of_a_bare_name_is_of_none_of_two_images(tmp_path: Path) -> None:
    folder = draw_set(tmp_path / "set", {"images/a/2.png": "masks/a/2.png", "images/b/2.png": "masks/b/2.png"})
    (folder / "labels.csv").write_text("file,class\n2.png,malignant\na/2.png,benign\n")
    listing = read_source(folder)
    assert [(record.id, record.image_class) for record in listing.records] == [("set/a/2", "benign")]
    assert listing.notes == ["1 rows of labels.csv name several images, and are used for none: 2.png"]


def test_other_versions_of_a_mask_are_passed_over_with_a_word(tmp_path: Path) -> None:
    folder = draw_set(tmp_path / "set", {"images/malignant/p1.png": "masks/p1.png", "images/malignant/p2.png": ""})
    for place in ("old", "reader2"):
        (folder / "masks" / place).mkdir()
        shutil.copy(folder / "masks" / "p1.png", folder / "masks" / place / "p9.png")
    shutil.copy(folder / "masks" / "p1.png", folder / "masks" / "old" / "p2.png")
    listing = read_source(folder)
    assert [len(record.masks) for record in listing.records] == [1, 0]
    assert listing.notes == [
        "1 masks passed over, whose image has another one or lies in another folder: set/masks/old/p2.png"
    ]
    assert [refusal.file for refusal in listing.refused] == ["set/masks/old/p9.png, set/masks/reader2/p9.png"]


def test_masks_that_a_name_alone_joins_are_counted(tmp_path: Path) -> None:
    names = {"images/malignant/p1.png": "masks/lesions/malignant/p1.png"}
    listing = read_source(draw_set(tmp_path / "set", names))
    assert len(listing.records[0].masks) == 1
    assert "joined by name alone" in listing.notes[0]


def test_busi_in_parts_is_read_whole(synthetic_busi: Path, tmp_path: Path) -> None:
    whole = read_source(synthetic_busi)
    for number, record in enumerate(whole.records):
        place = tmp_path / "set" / ("train", "val", "test")[number % 3] / record.image_class
        place.mkdir(parents=True, exist_ok=True)
        for path in (record.image, *record.masks):
            shutil.copy(path, place)
    listing = read_source(tmp_path / "set")
    assert {record.id for record in listing.records} == {record.id for record in whole.records}
    assert listing.layout == "BUSI" and not listing.refused
    assert listing.notes[0].startswith("3 sets are read as one") and "train (BUSI, " in listing.notes[0]


def test_sets_side_by_side_are_all_read(synthetic_busi: Path, synthetic_busbra: Path, tmp_path: Path) -> None:
    shutil.copytree(synthetic_busi, tmp_path / "data" / "ultrasound" / "BUSI")
    shutil.copytree(synthetic_busbra, tmp_path / "data" / "BUSBRA")
    for name in ("north", "south"):
        draw_pairs(tmp_path / "data" / name, seed=len(name))
    listing = read_source(tmp_path / "data")
    apart = [
        read_source(path)
        for path in (synthetic_busi, synthetic_busbra, *(tmp_path / "data" / n for n in ("north", "south")))
    ]
    assert {r.id for r in listing.records} == {r.id for one in apart for r in one.records}
    assert listing.layout == "BUS-BRA, pairs, BUSI"


def test_images_of_one_name_in_two_parts_are_both_kept(tmp_path: Path) -> None:
    for part in ("train", "test"):
        folder = draw_set(tmp_path / "set" / part, {"images/malignant/1.png": "masks/malignant/1.png"})
        (folder / "labels.csv").write_text("file,class,patient\nmalignant/1.png,malignant,7\n")
    listing = read_source(tmp_path / "set")
    assert [record.id for record in listing.records] == ["set/test/malignant/1", "set/train/malignant/1"]
    assert {record.source for record in listing.records} == {"set"}
    assert {record.patient for record in listing.records} == {"set/7"}, "a patient is one, in whichever part"


def test_images_that_belong_to_no_set_are_named(synthetic_busi: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(synthetic_busi, tmp_path / "data" / "BUSI"))
    for name in ("figure.png", "data/figure.png", "data/BUSI/benign/more/x.png", "data/BUSI/figure.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "benign" / "benign (1).png", tmp_path / name)
    (refusal,) = read_source(tmp_path / "data").refused
    assert refusal.count == 3
    assert "data/BUSI/benign/more/x.png" in refusal.file


@pytest.mark.parametrize(
    ("layout", "image", "mask"),
    [
        ("UDIAT", "original/{n}.png", "GT/{n}.png"),
        ("nnU-Net", "imagesTr/case_{n}_0000.png", "labelsTr/case_{n}.png"),
        ("pairs", "images/{n}.png", "mask/{n}.png"),
        ("pairs", "USG Images/{n}.png", "USG Masks/{n}_tumor.png"),
        ("pairs", "Images/{n}.PNG", "MASKS/{n}.png"),
        ("BrEaST", "case{n}.png", "case{n}_tumor.png"),
    ],
)
def test_layouts_that_people_have(tmp_path: Path, layout: str, image: str, mask: str) -> None:
    names = {image.format(n=n): mask.format(n=n) for n in ("001", "002", "003")}
    folder = draw_set(tmp_path / "set", names)
    if layout == "BrEaST":
        shutil.copy(folder / "case001_tumor.png", folder / "case001_other1.png")
        rows = "".join(f"{n},case{n:03}.png,malignant,5\n" for n in (1, 2, 3))
        (folder / "clinical.csv").write_text(f"CaseID,Image_filename,Classification,BIRADS\n{rows}")
    else:
        rows = "".join(f"{Path(name).name},malignant\n" for name in names)
        (folder / "labels.csv").write_text(f"file,class\n{rows}")
    listing = read_source(folder)
    assert listing.layout == layout and not listing.refused
    assert masks_of(listing) == {f"set/{image}": [f"set/{mask}"] for image, mask in names.items()}
    assert {record.image_class for record in listing.records} == {"malignant"}
    if layout == "BrEaST":
        assert listing.records[0].patient == "breast/1"
        assert listing.notes == ["1 masks of other structures than the tumour, passed over: set/case001_other1.png"]


def test_breast_without_its_table_says_how_to_save_it(tmp_path: Path) -> None:
    folder = draw_set(tmp_path / "set", {"case001.png": "case001_tumor.png"})
    (refusal,) = read_source(folder).refused
    assert "CSV" in refusal.fix and ".xlsx" in refusal.fix
    assert [record.image_class for record in read_source(folder, unlabelled=True).records] == ["unknown"]


def test_jfif_is_jpeg(tmp_path: Path) -> None:
    folder = draw_set(tmp_path / "set", {"images/malignant/1.jpg": "masks/1.png"})
    (folder / "images" / "malignant" / "1.jpg").rename(folder / "images" / "malignant" / "1.jfif")
    assert [record.image.name for record in read_source(folder).records] == ["1.jfif"]


def test_what_prepare_wrote_into_a_source_changes_nothing(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set")
    first = prepare([folder], folder / "prepared")
    again = prepare([folder], folder / "prepared")
    assert again.split_hash == first.split_hash and not again.refused
    assert any("written by busigen" in note for note in again.notes)
