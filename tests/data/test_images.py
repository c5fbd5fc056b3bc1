"""Reading files that users really have, and files that only claim to be images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from busigen.data import images
from busigen.data.images import TURNED, WHITE_IS_ZERO, read_image
from busigen.data.masks import read_mask
from busigen.errors import InputError
from tests.conftest import Sources

_RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))


def _save(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_every_way_to_store_grey_gives_the_same_grey(tmp_path: Path, mode: str, suffix: str) -> None:
    file = read_image(_save(tmp_path / f"scan{suffix}", Image.fromarray(_RAMP).convert(mode)))
    np.testing.assert_array_equal(file.pixels, _RAMP)
    assert (file.width, file.height, file.coloured) == (64, 48, None)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_sixteen_bit_files_use_the_whole_grey_range(tmp_path: Path, bits: int) -> None:
    deep = np.round(_RAMP / 252 * (2**bits - 1)).astype(np.uint16)
    file = read_image(_save(tmp_path / "deep.png", Image.fromarray(deep)))
    np.testing.assert_allclose(file.pixels, _RAMP / 252 * 255, atol=1)


def test_one_bit_image(tmp_path: Path) -> None:
    file = read_image(_save(tmp_path / "bits.png", Image.fromarray(_RAMP > 99)))
    np.testing.assert_array_equal(file.pixels, np.where(_RAMP > 99, 255, 0))


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    layer = np.dstack([np.full((40, 40, 3), 200, np.uint8), np.zeros((40, 40), np.uint8)])
    layer[:20, :, 3] = 255
    pixels = read_image(_save(tmp_path / "clear.png", Image.fromarray(layer))).pixels
    assert (pixels[:20] == 200).all()
    assert (pixels[20:] == 0).all()


def test_colour_is_told_from_grey_stored_as_jpeg_colour(tmp_path: Path) -> None:
    grey = Image.fromarray(_RAMP).convert("RGB")
    assert read_image(_save(tmp_path / "grey.jpg", grey)).coloured is None
    grey.paste((200, 30, 30), (0, 0, 20, 20))
    coloured = read_image(_save(tmp_path / "doppler.png", grey)).coloured
    assert coloured is not None
    assert coloured[:20, :20].all() and coloured.sum() == 400


def test_colour_images_of_a_whole_set(any_sources: Sources) -> None:
    table = any_sources.prepared.table
    marked = set(table.filter(table["overlay_colour"])["id"])
    assert {"busi/benign (6)"} <= marked
    assert len(marked) <= 14, "of BUSI's 623 images, 11 are colour and 3 carry a small coloured mark"


def _huge_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _png_bytes(folder: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    return _save(folder / "whole.png", Image.fromarray(noise)).read_bytes()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"patient name, date of birth\n", "not a PNG"),
        (_huge_header(100_000, 100_000), "pixels"),
        (_huge_header(9_000, 9_000), "64,000,000"),
        (_huge_header(30_000, 100), "20,000"),
        (_huge_header(16, 400), "at least 32"),
        (_huge_header(64, 64), "damaged"),
    ],
)
def test_what_is_no_usable_image_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "scan 1.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_image(path)
    assert "scan 1.png" in refusal.value.problem
    assert says in refusal.value.problem
    assert refusal.value.fix


def test_missing_folder_and_oversized_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"folder\.png is a folder"):
        read_image(tmp_path / "folder.png")
    path = _save(tmp_path / "large.png", Image.fromarray(_RAMP))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match="at most 10 are read"):
        read_image(path)


def test_several_frames_in_a_file_are_refused(tmp_path: Path) -> None:
    frame = Image.fromarray(_RAMP)
    frame.save(tmp_path / "loop.tif", save_all=True, append_images=[frame])
    with pytest.raises(InputError, match="more than one frame"):
        read_image(tmp_path / "loop.tif")


def test_of_many_frames_no_more_than_two_are_looked_at(tmp_path: Path) -> None:
    frame = Image.fromarray(_RAMP)
    file = tmp_path / "loop.tif"
    frame.save(file, save_all=True, append_images=[frame] * 2)
    data = bytearray(file.read_bytes())
    second = _next_directory(data, int.from_bytes(data[4:8], "little"))
    entries = int.from_bytes(data[second : second + 2], "little")
    # Whoever goes on to the third frame meets a directory that leads back to the first, for ever.
    data[second + 2 + 12 * entries : second + 6 + 12 * entries] = data[4:8]
    file.write_bytes(data)
    with pytest.raises(InputError, match="more than one frame"):
        read_image(file)


def _next_directory(data: bytearray, at: int) -> int:
    end = at + 2 + 12 * int.from_bytes(data[at : at + 2], "little")
    return int.from_bytes(data[end : end + 4], "little")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def stored_turned(upright: Image.Image, orientation: int, path: Path) -> Path:
    """Save an image as a camera or viewer does that turns it by its tag alone; PNG, TIFF, or JPEG with little loss."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(_TURNS[inverse]).save(path, exif=exif, **({"quality": 98} if path.suffix == ".jpg" else {}))
    return path


@pytest.mark.parametrize("orientation", _TURNS)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_images_and_masks_are_read_as_viewers_show_them(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = Image.fromarray(np.maximum(_RAMP, np.arange(48, dtype=np.uint8)[:, None]))
    file = read_image(stored_turned(upright, orientation, tmp_path / f"scan{suffix}"))
    np.testing.assert_allclose(file.pixels.astype(int), np.asarray(upright), atol=6 if suffix == ".jpg" else 0)
    assert file.notes == (TURNED,)
    half = Image.fromarray((np.arange(64) < 32) & (np.arange(48) < 30)[:, None]).convert("L")
    notes: list[str] = []
    mask = read_mask(stored_turned(half, orientation, tmp_path / f"mask{suffix}"), (64, 48), notes=notes)
    np.testing.assert_array_equal(mask, np.asarray(half) > 0)
    assert notes == [TURNED]


def test_an_image_that_is_stored_upright_needs_no_note(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.fromarray(_RAMP).save(tmp_path / "scan.png", exif=exif)
    assert read_image(tmp_path / "scan.png").notes == ()
    assert read_image(_save(tmp_path / "plain.tif", Image.fromarray(_RAMP))).notes == ()


@pytest.mark.parametrize("bits", [12, 16])
def test_white_is_zero_is_read_as_the_header_says(tmp_path: Path, bits: int) -> None:
    deep = np.round((255 - _RAMP) / 255 * (2**bits - 1)).astype(np.uint16)
    path = tmp_path / "negative.tif"
    Image.fromarray(deep).save(path, tiffinfo={262: 0})
    data = path.read_bytes()
    entry = data.index(struct.pack("<HHI", 262, 3, 1))
    path.write_bytes(data[: entry + 8] + struct.pack("<H", 0) + data[entry + 10 :])
    file = read_image(path)
    np.testing.assert_allclose(file.pixels.astype(int), _RAMP, atol=1)
    assert WHITE_IS_ZERO in file.notes


def _deep_colour(levels: np.ndarray, path: Path) -> Path:
    """A PNG of three 16-bit channels, which Pillow reads but does not write."""
    height, width = levels.shape
    rows = np.repeat(levels.astype(">u2")[..., None], 3, axis=2).tobytes()
    stride = 6 * width
    raw = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(height))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def test_colour_of_sixteen_bits_is_read_where_it_uses_them(tmp_path: Path) -> None:
    deep = _RAMP.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_image(_deep_colour(deep, tmp_path / "full.png")).pixels, _RAMP)
    with pytest.raises(InputError, match=r"twelve\.png has colour channels of 16 bits that use the lowest 12"):
        read_image(_deep_colour(deep >> 4, tmp_path / "twelve.png"))
    with pytest.raises(InputError, match=r"labels\.png has colour channels of 16 bits"):
        read_mask(_deep_colour((_RAMP > 99).astype(np.uint16), tmp_path / "labels.png"), None)


def test_levels_of_unknown_range_are_refused_by_name(tmp_path: Path) -> None:
    wide = Image.fromarray((_RAMP.astype(np.int32) - 100) * 2**20)
    with pytest.raises(InputError, match=r"wide\.tif has levels beyond 16 bits"):
        read_image(_save(tmp_path / "wide.tif", wide))
    with pytest.raises(InputError, match=r"lab\.tif has LAB pixels"):
        read_image(_save(tmp_path / "lab.tif", Image.merge("LAB", [Image.fromarray(_RAMP)] * 3)))
    few = Image.fromarray(_RAMP.astype(np.int32))
    np.testing.assert_array_equal(read_image(_save(tmp_path / "few.tif", few)).pixels, _RAMP)


def test_printers_colours_are_grey_as_well(tmp_path: Path) -> None:
    grey = Image.fromarray(_RAMP).convert("RGB").convert("CMYK")
    np.testing.assert_array_equal(read_image(_save(tmp_path / "print.tif", grey)).pixels, _RAMP)


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(1, 4000), flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=6))
def test_damaged_bytes_give_an_image_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    data = bytearray(_png_bytes(folder)[:cut])
    for place, change in flips:
        data[place % len(data)] ^= change
    path = folder / "damaged.png"
    path.write_bytes(data)
    try:
        assert read_image(path).pixels.ndim == 2
    except InputError as error:
        assert "damaged.png" in error.problem


_DISC = np.hypot(*np.mgrid[-24:24, -32:32]) < 15


def _alpha_only(disc: Image.Image) -> Image.Image:
    layer = Image.new("RGBA", disc.size, (0, 0, 0, 0))
    layer.putalpha(disc)
    return layer


@pytest.mark.parametrize(
    "store",
    [
        lambda disc: disc.convert("1"),
        lambda disc: disc,
        lambda disc: disc.convert("P"),
        lambda disc: disc.convert("RGB"),
        lambda disc: disc.convert("RGBA"),
        lambda disc: Image.merge("RGB", (disc, Image.new("L", disc.size), Image.new("L", disc.size))),
        lambda disc: disc.point(lambda level: level // 255),
        lambda disc: Image.fromarray(np.asarray(disc).astype(np.uint16) * 257),
        _alpha_only,
    ],
    ids=["1-bit", "grey", "palette", "RGB", "RGBA", "red", "labels 0 and 1", "16-bit", "alpha only"],
)
def test_every_way_to_store_a_mask_gives_the_same_mask(tmp_path: Path, store: object) -> None:
    path = tmp_path / "mask.png"
    store(Image.fromarray(_DISC.astype(np.uint8) * 255)).save(path)  # type: ignore[operator]
    np.testing.assert_array_equal(read_mask(path, (64, 48)), _DISC)


_LARGE = np.hypot(*np.mgrid[-60:60, -80:80]) < 30
_RIM = (np.hypot(*np.mgrid[-60:60, -80:80]) < 34) & ~_LARGE
_SPECKLE = np.random.default_rng(0).rayleigh(60, _LARGE.shape).clip(0, 255).astype(np.uint8)


def _labels(**regions: np.ndarray) -> Image.Image:
    levels = np.zeros(_LARGE.shape, np.uint8)
    for name, region in regions.items():
        levels[region] = int(name[1:])
    return Image.fromarray(levels)


def _overlay() -> Image.Image:
    colour = np.repeat(_SPECKLE[..., None], 3, axis=2)
    colour[_RIM] = (255, 0, 0)
    return Image.fromarray(colour)


def _palette(first: tuple[int, int, int], second: tuple[int, int, int]) -> Image.Image:
    image = _labels(_1=_LARGE, _2=_RIM)
    image.putpalette([0, 0, 0, *first, *second])
    return image


NO_MASKS: dict[str, tuple[Image.Image, str]] = {
    "255 to be ignored": (_labels(_1=_LARGE, _255=_RIM), r"levels 1 \(14.*ignore"),
    "tissue and lesion": (_labels(_1=~_LARGE, _2=_LARGE), "several structures, with the levels 1 .*, 2 "),
    "tissue and lesion on black": (_labels(_128=_RIM | (np.mgrid[:120, :160][0] > 100), _255=_LARGE), "levels 128 "),
    "the image": (Image.fromarray(_SPECKLE), "a picture"),
    "an outline in colour over the image": (_overlay(), "a picture"),
    "a dim picture": (Image.fromarray(_SPECKLE // 3), "a picture"),
    "lesion and cyst in colours": (_palette((255, 0, 0), (0, 0, 255)), "several colours"),
    "labels of 16 bits": (Image.fromarray(_LARGE * np.uint16(1) + _RIM * np.uint16(65535)), "levels 1 "),
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_a_mask_of_something_else_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    image, says = NO_MASKS[kind]
    with pytest.raises(InputError, match=rf"no mask\.png.* {says}"):
        read_mask(_save(tmp_path / "no mask.png", image), None)


def test_a_person_says_which_levels_are_lesion(tmp_path: Path) -> None:
    path = _save(tmp_path / "labels.png", NO_MASKS["255 to be ignored"][0])
    np.testing.assert_array_equal(read_mask(path, None, values=[1]), _LARGE)
    np.testing.assert_array_equal(read_mask(path, None, values=[1, 255]), _LARGE | _RIM)
    deep = _save(tmp_path / "deep.png", NO_MASKS["labels of 16 bits"][0])
    np.testing.assert_array_equal(read_mask(deep, None, values=[65535]), _RIM)


@pytest.mark.parametrize("level", [255, 200])
@pytest.mark.parametrize("blur", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("quality", [None, 60, 95, 100])
def test_soft_edges_and_traces_of_jpeg_are_no_labels(
    tmp_path: Path, level: int, blur: float, quality: int | None
) -> None:
    soft = np.round(ndimage.gaussian_filter(_LARGE.astype(float), blur) * level).astype(np.uint8)
    path = tmp_path / ("mask.png" if quality is None else "mask.jpg")
    Image.fromarray(soft).save(path, **({} if quality is None else {"quality": quality}))
    mask = read_mask(path, None)
    # A pixel of the outline more or less: half of the range is not half of a mask that is less than white.
    assert (mask != _LARGE).sum() <= (0.5 if level == 255 else 3) * np.pi * 60
    again = _save(tmp_path / "again.png", Image.open(path))
    np.testing.assert_array_equal(read_mask(again, None), mask)


def test_an_empty_mask_saved_as_jpeg_is_empty(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 4, (100, 120), dtype=np.uint8)
    assert not read_mask(_save(tmp_path / "empty.jpg", Image.fromarray(noise)), None).any()


def test_a_mask_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    path = _save(tmp_path / "a_mask.png", Image.fromarray(_DISC))
    with pytest.raises(InputError, match=r"a_mask\.png.*64x48.*100x80"):
        read_mask(path, (100, 80))
