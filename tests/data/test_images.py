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

from busigen.data import images
from busigen.data.images import read_image, read_mask
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
    assert (file.width, file.height, file.colour) == (64, 48, False)


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
    assert not read_image(_save(tmp_path / "grey.jpg", grey)).colour
    grey.paste((200, 30, 30), (0, 0, 20, 20))
    assert read_image(_save(tmp_path / "doppler.png", grey)).colour


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
    with pytest.raises(InputError, match=r"folder\.png is not a file"):
        read_image(tmp_path / "folder.png")
    path = _save(tmp_path / "large.png", Image.fromarray(_RAMP))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    with pytest.raises(InputError, match="the limit is 10"):
        read_image(path)


def test_several_frames_in_a_file_are_refused(tmp_path: Path) -> None:
    frame = Image.fromarray(_RAMP)
    frame.save(tmp_path / "loop.tif", save_all=True, append_images=[frame])
    with pytest.raises(InputError, match="2 frames"):
        read_image(tmp_path / "loop.tif")


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


def test_a_mask_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    path = _save(tmp_path / "a_mask.png", Image.fromarray(_DISC))
    with pytest.raises(InputError, match=r"a_mask\.png.*64x48.*100x80"):
        read_mask(path, (100, 80))
