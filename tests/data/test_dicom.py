"""Ultrasound DICOM as scanners write it is read, and what is none is refused in one clear line."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from busigen.data.dicom.header import MAX_FRAMES
from busigen.data.images import ImageFile, read_image
from busigen.data.masks import read_mask
from busigen.errors import InputError
from tests.harness.dicom_files import REGION, SECRETS, SPACING, lossless_jpeg, packed, region, save, scan, scan_pixels

GREY = scan_pixels()
INSIDE = GREY[REGION[1] : REGION[3] + 1, REGION[0] : REGION[2] + 1]
COLOUR = np.repeat(GREY[..., None], 3, axis=2)


def jpeg(pixels: NDArray[np.uint8], form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def compressed(syntax: str) -> FileDataset:
    found = scan(GREY)
    found.compress(syntax)
    return found


def palette() -> FileDataset:
    found = scan(GREY, PhotometricInterpretation="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(found, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(found, f"{name}PaletteColorLookupTableData", (np.arange(256, dtype=np.uint16) << 8).tobytes())
    return found


def implicit() -> FileDataset:
    found = scan(GREY)
    found.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return found


def deflated() -> FileDataset:
    found = scan(GREY)
    found.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return found


def ybr() -> FileDataset:
    stored = np.stack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)], axis=-1)
    return scan(stored, PhotometricInterpretation="YBR_FULL")


JPEG, LOSSLESS, JPEG_2000, MPEG_4 = (f"1.2.840.10008.1.2.4.{end}" for end in (50, 70, 90, 102))
J2K = {"no_jp2": True, "irreversible": False}
# What is read, by kind; and how far grey levels may be from what was drawn: lossy coding, rounding of colours.
READ: dict[str, tuple[Callable[[], FileDataset], int]] = {
    "grey": (lambda: scan(GREY), 0),
    "white is zero": (lambda: scan(255 - GREY, PhotometricInterpretation="MONOCHROME1"), 0),
    "12 bits": (lambda: scan(GREY.astype(np.uint16) << 4, BitsStored=12, HighBit=11), 1),
    "RGB": (lambda: scan(COLOUR), 1),
    "RGB in planes": (lambda: scan(COLOUR, PlanarConfiguration=1, PixelData=GREY.tobytes() * 3), 1),
    "YBR": (lambda: ybr(), 1),
    "palette": (lambda: palette(), 1),
    "implicit": (lambda: implicit(), 0),
    "deflated": (lambda: deflated(), 0),
    "RLE": (lambda: compressed(RLELossless), 0),
    "JPEG": (lambda: packed(scan(GREY), JPEG, jpeg(GREY, "JPEG", quality=95)), 30),
    "JPEG in colour": (
        lambda: packed(
            scan(COLOUR, PhotometricInterpretation="YBR_FULL_422"),
            JPEG,
            jpeg(COLOUR, "JPEG", quality=95),
        ),
        30,
    ),
    "JPEG 2000": (lambda: packed(scan(GREY), JPEG_2000, jpeg(GREY, "JPEG2000", **J2K)), 0),
    "lossless JPEG": (lambda: packed(scan(GREY), LOSSLESS, lossless_jpeg(GREY)), 0),
    "lossless JPEG in colour": (lambda: packed(scan(COLOUR), LOSSLESS, lossless_jpeg(COLOUR)), 1),
}
if find_spec("jpeg_ls"):  # It has no wheels for Python 3.14.
    READ["JPEG-LS"] = (lambda: compressed(JPEGLSLossless), 0)


def read(found: FileDataset, folder: Path) -> ImageFile:
    return read_image(save(found, folder / "scan.dcm"))


@pytest.mark.parametrize("kind", READ)
def test_the_declared_region_of_every_kind_of_file_is_read_as_grey(kind: str, tmp_path: Path) -> None:
    make, tolerance = READ[kind]
    image = read(make(), tmp_path)
    assert image.pixels.shape == INSIDE.shape
    assert np.abs(image.pixels.astype(int) - INSIDE).max() <= tolerance
    assert (image.window, image.full) == ((20, 30, 220, 190), (256, 210))
    assert image.laterality == "L" and image.spacing == pytest.approx(SPACING)


def test_each_frame_of_a_loop_is_read(tmp_path: Path) -> None:
    frames = np.stack([scan_pixels(seed) for seed in range(3)])
    found = packed(scan(frames), JPEG_2000, *(jpeg(frame, "JPEG2000", **J2K) for frame in frames))
    from busigen.data.sources.files import find_images

    save(found, tmp_path / "loop" / "scan.dcm")
    paths = find_images(tmp_path / "loop")
    left, top, right, bottom = REGION
    for frame, path in zip(frames, paths, strict=True):
        assert np.array_equal(read_image(path).pixels, frame[top : bottom + 1, left : right + 1])
    assert len({read_image(path).sha256 for path in paths}) == 3


def test_a_window_is_applied_as_viewers_do(tmp_path: Path) -> None:
    image = read(scan(GREY, WindowCenter=64, WindowWidth=128), tmp_path)
    bright = INSIDE > 128
    assert (image.pixels[bright] == 255).all() and image.pixels.mean() > INSIDE.mean()


def test_of_several_regions_the_largest_with_tissue_counts(tmp_path: Path) -> None:
    regions = [region(0, 0, 255, 209, kind=1, form=3), region(0, 20, 60, 100), region(*REGION)]
    image = read(scan(GREY, SequenceOfUltrasoundRegions=Sequence(regions)), tmp_path)
    assert np.array_equal(image.pixels, INSIDE) and "largest of" in image.notes[0]


def test_without_a_region_a_file_is_read_only_where_it_says_that_no_text_is_burnt_in(tmp_path: Path) -> None:
    bare = scan(GREY, PixelSpacing=[0.2, 0.3], BurnedInAnnotation="NO")
    del bare.SequenceOfUltrasoundRegions
    image = read(bare, tmp_path)
    assert np.array_equal(image.pixels, GREY) and image.spacing == (0.3, 0.2)
    for burnt in ("YES", ""):
        bare.BurnedInAnnotation = burnt
        with pytest.raises(InputError, match=r"may name the patient.*\(0028,0301\) to NO"):
            read(bare, tmp_path)


def bomb() -> bytes:
    head = io.BytesIO()
    deflated().save_as(head, enforce_file_format=True)
    start = head.getvalue().index(b"\x02\x00\x10\x00")
    end = start + 8 + int.from_bytes(head.getvalue()[start + 6 : start + 8], "little")
    # Other elements of the meta information may follow.
    while head.getvalue()[end : end + 2] == b"\x02\x00":
        end += 8 + int.from_bytes(head.getvalue()[end + 6 : end + 8], "little")
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return head.getvalue()[:end] + b"".join(squeezed.compress(bytes(1 << 20)) for _ in range(300)) + squeezed.flush()


def content(found: FileDataset) -> bytes:
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def rle_bomb() -> bytes:
    return (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56) + b"\x81\0" * 9999


def of_class(uid: str, **attributes: object) -> FileDataset:
    return scan(GREY, SOPClassUID=uid, **attributes)


def without_pixels(found: FileDataset) -> FileDataset:
    del found.PixelData
    return found


def nested() -> bytes:
    """Sequences within sequences, 50,000 deep, in the place of a private element."""
    data = content(scan(GREY))
    at = data.index(b"\x08\x00\x05\x00") if b"\x08\x00\x05\x00" in data else data.index(b"\x08\x00\x08\x00CS")
    deep = (b"\x08\x00\x01\x00SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 50_000
    return data[:at] + deep + data[at:]


OTHER_SIZE = "of another size than it claims"
BLACK = np.zeros((3000, 3000), np.uint8)


def bad_jpeg(*frame: bytes, syntax: str = JPEG) -> bytes:
    return content(packed(scan(GREY), syntax, *frame))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted": (lambda: b"\x30\x82\x10\x00" + bytes(4000), "is encrypted"),
    "no DICOM": (lambda: b"hello" * 100, "is no DICOM file, whatever its name says"),
    "empty": (lambda: b"", r"is empty \(0 bytes\)"),
    "PDF": (lambda: content(without_pixels(of_class("1.2.840.10008.5.1.4.1.1.104.1"))), "holds a PDF document"),
    "CT": (lambda: content(of_class("1.2.840.10008.5.1.4.1.1.2", Modality="CT")), r"no ultrasound image \(CT Image\)"),
    "captured CT": (lambda: content(of_class("1.2.840.10008.5.1.4.1.1.7", Modality="CT")), "no ultrasound image"),
    "unknown": (lambda: content(of_class(f"{SECRETS[4]}.7")), r"no ultrasound image \(of an unknown kind\)"),
    "3-D": (lambda: content(of_class("1.2.840.10008.5.1.4.1.1.6.2")), "is a 3-D ultrasound volume"),
    "segmentation": (
        lambda: content(of_class("1.2.840.10008.5.1.4.1.1.66.4")),
        "is a DICOM segmentation, and no image",
    ),
    "Doppler by region": (
        lambda: content(scan(COLOUR, SequenceOfUltrasoundRegions=Sequence([region(*REGION), region(*REGION, kind=2)]))),
        "is a colour Doppler image",
    ),
    "Doppler by type": (lambda: content(scan(COLOUR, ImageType=["ORIGINAL", "PRIMARY", "", "0011"])), "colour Doppler"),
    "Doppler by flag": (lambda: content(scan(COLOUR, UltrasoundColorDataPresent=1)), "is a colour Doppler image"),
    "trace": (lambda: content(scan(GREY, ImageType=["ORIGINAL", "PRIMARY", "", "0002"])), "M-mode or Doppler trace"),
    "no plane": (
        lambda: content(scan(GREY, SequenceOfUltrasoundRegions=Sequence([region(*REGION, form=2)]))),
        "none of which is a grey image",
    ),
    "region outside": (
        lambda: content(scan(GREY, SequenceOfUltrasoundRegions=Sequence([region(0, 0, 4000, 100)]))),
        "too small or not within its image",
    ),
    "cut short": (lambda: content(scan(GREY))[:-1000], "claims to have 1 frames of 256x210, and holds 0"),
    "cut in its header": (lambda: content(scan(GREY))[:300], "holds no image|damaged or cut short"),
    "lying frames": (
        lambda: content(scan(GREY, NumberOfFrames=900)),
        "claims to have 900 frames of 256x210, and holds 1",
    ),
    "100,000 frames": (
        lambda: content(scan(GREY, NumberOfFrames=100_000)),
        f"claims to have 100,000 frames; 1 to {MAX_FRAMES:,}",
    ),
    "huge": (lambda: content(scan(GREY, Rows=65_000, Columns=65_000)), "has frames of 65000x65000 pixels; 32 to 4096"),
    "tiny": (lambda: content(scan(GREY, Rows=2, Columns=2)), "has frames of 2x2 pixels"),
    "nonsense": (lambda: content(scan(GREY, PhotometricInterpretation="HSV")), "pixels of a kind that is not read"),
    "signed": (lambda: content(scan(GREY, PixelRepresentation=1)), "negative grey levels"),
    "deflated bomb": (bomb, "inflates to more than"),
    "JPEG bomb": (lambda: bad_jpeg(jpeg(BLACK, "JPEG")), OTHER_SIZE),
    "JPEG 2000 bomb": (lambda: bad_jpeg(jpeg(BLACK, "JPEG2000", **J2K), syntax=JPEG_2000), OTHER_SIZE),
    "RLE bomb": (lambda: bad_jpeg(rle_bomb(), syntax=RLELossless), OTHER_SIZE),
    "damaged JPEG": (lambda: bad_jpeg(jpeg(GREY, "JPEG")[:400]), "damaged or cut short"),
    "no JPEG": (lambda: bad_jpeg(b"no JPEG at all"), OTHER_SIZE),
    "video": (lambda: bad_jpeg(b"moov", syntax=MPEG_4), "compressed in a way that is not read"),
    "deep": (nested, "damaged or cut short|holds no image"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_usable_ultrasound_image_is_refused_in_a_line_that_names_nobody(
    kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    make, said = HOSTILE[kind]
    path = tmp_path / "scan.dcm"
    path.write_bytes(make())
    with pytest.raises(InputError, match=said) as caught:
        read_image(path)
    assert not caplog.text
    text = str(caught.value) + " ".join(str(warning.message) for warning in recwarn)
    assert caught.value.fix and "\n" not in str(caught.value)
    assert not [word for word in SECRETS if word in text]


def test_an_unreadable_value_is_not_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = content(scan(GREY, ImageComments="x"))
    data = data.replace(b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00PN\x02\x00")
    path = tmp_path / "scan.dcm"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^scan\.dcm is a DICOM file that is damaged or cut short\."):
        read_image(path)
    assert not caplog.text


def test_damage_anywhere_gives_an_image_or_one_clear_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = [content(make()) for make, _ in READ.values()]
    path = tmp_path / "scan.dcm"
    for turn in range(300):
        data = bytearray(whole[turn % len(whole)])
        # Half of them in the header.
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(132, 1200 if turn % 2 else len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_image(path)
        except InputError as error:
            assert not [word for word in SECRETS if word in str(error)]


def segmentation(*marked: NDArray[np.bool_], **attributes: Any) -> FileDataset:
    """A Segmentation object with a frame for each segment, made of whatever `scan` writes."""
    found = scan(GREY, SegmentationType="BINARY", BitsAllocated=1, BitsStored=1, HighBit=0)
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    found.NumberOfFrames, (found.Rows, found.Columns) = len(marked), marked[0].shape
    groups = []
    for number in range(1, len(marked) + 1):
        group, item = Dataset(), Dataset()
        item.ReferencedSegmentNumber = number
        group.SegmentIdentificationSequence = Sequence([item])
        groups.append(group)
    found.PerFrameFunctionalGroupsSequence = Sequence(groups)
    bits = np.packbits(np.stack(marked).ravel(), bitorder="little").tobytes()
    found.PixelData = bits + b"\0" * (len(bits) % 2)
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def half(rows: slice, columns: slice) -> NDArray[np.bool_]:
    mask = np.zeros(GREY.shape, dtype=bool)
    mask[rows, columns] = True
    return mask


MARKED = half(slice(40, 90), slice(51, 100)), half(slice(60, 120), slice(130, 171))


def test_a_segmentation_marks_what_any_of_its_segments_does(tmp_path: Path) -> None:
    for marked in (MARKED[:1], MARKED):
        path = save(segmentation(*marked), tmp_path / "seg.dcm")
        assert np.array_equal(read_mask(path, (256, 210)), np.logical_or.reduce(marked))
    with pytest.raises(InputError, match=r"the mask is 256x210 pixels, its image 100x100"):
        read_mask(path, (100, 100))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: content(scan(GREY)), "is a DICOM file, but no segmentation"),
        (lambda: content(segmentation(*MARKED, SegmentationType="FRACTIONAL")), "of a kind that is not read"),
        (lambda: content(segmentation(*MARKED, BitsAllocated=8)), "of a kind that is not read"),
        (lambda: content(segmentation(*MARKED, NumberOfFrames=3)), "3 frames of 2 segments"),
        (lambda: content(segmentation(*MARKED, PixelData=b"\1" * 100)), "is cut short"),
        (lambda: content(segmentation(*MARKED, Rows=60_000)), "has frames of 256x60000 pixels"),
        (lambda: content(segmentation(*MARKED, PerFrameFunctionalGroupsSequence=None)), "2 frames of 0 segments"),
        (lambda: content(segmentation(*MARKED))[:700], "damaged or cut short|holds no image"),
        (lambda: b"hello" * 100, "is no DICOM file, whatever its name says"),
    ],
)
def test_what_is_no_usable_segmentation_is_refused_in_a_line(
    make: Callable[[], bytes], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "seg.dcm"
    path.write_bytes(make())
    with pytest.raises(InputError, match=said) as caught:
        read_mask(path, None)
    assert caught.value.fix and not [word for word in SECRETS if word in str(caught.value)]
