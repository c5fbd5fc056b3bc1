"""Which mask file belongs to which image."""

from __future__ import annotations

from pathlib import Path

import pytest

from busigen.data.sources.files import MaskFiles, Match, Tree, mask_of, masks_beside

IMAGES, MASKS = Path("images"), Path("masks")


def match(images: list[str], masks: list[str], of: str) -> Match:
    files = MaskFiles([IMAGES / name for name in images], IMAGES)
    files.add_masks([MASKS / name for name in masks], MASKS)
    return files.of(IMAGES / of)


@pytest.mark.parametrize(
    ("images", "masks", "of", "expected"),
    [
        (["benign/2.png", "malignant/2.png"], ["benign/2.png"], "malignant/2.png", []),
        (["p1/2.png", "p2/2.png"], ["p1/2.png"], "p2/2.png", []),
        (["p1/2.png", "p2/3.png"], ["p1/2.png"], "p1/2.png", ["p1/2.png"]),
        (["benign/2.png"], ["2.png"], "benign/2.png", ["2.png"]),
        (["2.png"], ["benign/2.png"], "2.png", ["benign/2.png"]),
        (["2.png"], ["2.png", "old/2.png"], "2.png", ["2.png"]),
        (["2.png"], ["old/2.png"], "2.png", []),
        (["2.png"], ["2.png", "2_mask.png"], "2.png", ["2.png"]),
        (["2.png"], ["2_mask.png", "2_mask_1.png"], "2.png", ["2_mask.png", "2_mask_1.png"]),
        (["2.png"], ["2_mask.png", "2_tumor.png"], "2.png", ["2_mask.png"]),
        (["2.png"], ["2_segmentation.png"], "2.png", ["2_segmentation.png"]),
        (["bus_1.png"], ["mask_1.png"], "bus_1.png", ["mask_1.png"]),
        (["IMG1.png"], ["img1.png"], "IMG1.png", ["img1.png"]),
        (["IMG1.png", "img1.png"], ["img1.png"], "IMG1.png", []),
        (["L\u00e4.png"], ["La\u0308_mask.png"], "L\u00e4.png", ["La\u0308_mask.png"]),
        (["x.png", "x_seg1.png"], ["x_seg1.png"], "x.png", []),
        (["x.png"], ["y.png"], "x.png", []),
    ],
)
def test_the_mask_of_an_image(images: list[str], masks: list[str], of: str, expected: list[str]) -> None:
    found = match(images, masks, of)
    assert [path.relative_to(MASKS).as_posix() for path in found.masks] == expected
    assert not found.rivals


@pytest.mark.parametrize(
    ("images", "masks", "of"),
    [
        (["benign/2.png", "normal/2.png"], ["2.png"], "normal/2.png"),
        (["2.png"], ["reader1/2.png", "reader2/2.png"], "2.png"),
        (["2.png"], ["2.png", "2.tif"], "2.png"),
        (["Img1.png"], ["IMG1.png", "img1.png"], "Img1.png"),
    ],
)
def test_nobody_can_tell(images: list[str], masks: list[str], of: str) -> None:
    found = match(images, masks, of)
    assert not found.masks
    assert [path.relative_to(MASKS).as_posix() for path in found.rivals] == masks


def test_masks_beside_their_images(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.png", "b.png", "b_tumor.png", "c_tumor.png", "d_mask.png"):
        (tmp_path / name).write_bytes(b"-")
    files, found = masks_beside(Tree(tmp_path).at(tmp_path))
    assert {image.name: [mask.name for mask in match.masks] for image, match in found.items()} == {
        "a.png": ["a_mask.png"],
        "b.png": ["b_tumor.png"],
        "c_tumor.png": [],
    }
    assert [path.name for path in files.unused(belonging=False)] == ["d_mask.png"]


def test_the_image_that_a_mask_is_named_like() -> None:
    images = [Path(name) for name in ("a/case_1.png", "a/case_1_2.png", "b/case_1.png", "a/case.png")]
    marked = mask_of([Path("m/case_1_2_lesion.png"), Path("m/Case_1.png"), Path("m/cases.png")], images)
    assert {path.as_posix(): mask.name for path, mask in marked.items()} == {
        "a/case_1_2.png": "case_1_2_lesion.png",
        "a/case_1.png": "Case_1.png",
        "b/case_1.png": "Case_1.png",
    }
