"""Reading image and mask files that may be damaged, oversized or not images at all."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from busigen.errors import InputError

MIN_SIDE = 32
"""Shortest side in pixels that still shows anatomy; anything smaller is an icon or a thumbnail."""

MAX_SIDE = 20_000
"""Longest side in pixels that is decoded."""

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded. Some twenty times the largest clinical screen capture."""

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Largest file that is read into memory, in bytes."""

COLOUR_STEP = 12
"""Grey levels between the channels of one pixel above which it is coloured; JPEG chroma noise stays below."""

COLOUR_SHARE = 0.005
"""Share of coloured pixels above which the file is a colour image.

Of BUSI's 15 files stored with unequal channels (of 623 images), 11 lie at 0.9 % or above (Doppler, colour maps), three
have only small coloured marks (0.05 % or less), and one has a tint that never exceeds 12 levels.
"""

MARK_SHARE = 0.0001
"""Share of coloured pixels above which a scanner painted a coloured mark; the three files above lie at 0.017 %."""

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_RESAVE = "Open it in an image viewer and save it again as an 8-bit PNG, or remove it."


@dataclass(frozen=True)
class ImageFile:
    """One decoded image file.

    Attributes:
        path: The file that was read.
        pixels: Grey levels, ``uint8 (H, W)``, 0 to 255.
        colour: More than ``COLOUR_SHARE`` of the pixels are coloured.
        sha256: Hex digest of the file's bytes.
        width: Pixels per row.
        height: Rows.
        coloured: ``bool (H, W)``, pixels whose channels differ by more than ``COLOUR_STEP``; None if there are none.
        mode: Pillow's name of the file's pixel format, such as ``L``, ``RGB`` or ``I;16``.
    """

    path: Path
    pixels: NDArray[np.uint8]
    colour: bool
    sha256: str
    width: int
    height: int
    coloured: NDArray[np.bool_] | None = None
    mode: str = "L"


def read_image(path: Path, data: bytes | None = None) -> ImageFile:
    """Read a PNG, JPEG, BMP or TIFF file as grey levels.

    Accepts 1-bit, grey, palette and colour files, with or without alpha (composited on black), and 16-bit grey, which
    is scaled to 8 bits.

    Args:
        path: The file to read.
        data: Its content where that is at hand, as from an archive; ``path`` then only names it.

    Returns:
        The image; ``pixels`` is ``uint8 (H, W)``.

    Raises:
        InputError: The file is missing, unreadable, damaged, not an image, or outside the size limits.
    """
    try:
        return _read_image(Path(path), data)
    except MemoryError as error:
        raise InputError(
            f"{Path(path).name} needs more memory than there is.", fix="Crop or shrink it to the ultrasound frame."
        ) from error


def _read_image(path: Path, data: bytes | None) -> ImageFile:
    data = _read_bytes(path) if data is None else data
    decoded = _decode(path, data)
    coloured: NDArray[np.bool_] | None = None
    if decoded.mode in _DEEP_MODES:
        pixels = _to_eight_bits(np.asarray(decoded))
    elif decoded.mode in {"1", "L"}:
        pixels = np.asarray(decoded.convert("L"))
    else:
        opaque = _on_black(decoded)
        pixels = np.asarray(opaque.convert("L"))
        channels = np.asarray(opaque)
        marks = channels.max(axis=2) - channels.min(axis=2) > COLOUR_STEP
        coloured = marks if marks.any() else None
    return ImageFile(
        path=path,
        pixels=np.ascontiguousarray(pixels, dtype=np.uint8),
        colour=coloured is not None and float(coloured.mean()) > COLOUR_SHARE,
        sha256=hashlib.sha256(data).hexdigest(),
        width=pixels.shape[1],
        height=pixels.shape[0],
        coloured=coloured,
        mode=decoded.mode,
    )


def read_mask(path: Path, size: tuple[int, int] | None, data: bytes | None = None) -> NDArray[np.bool_]:
    """Read a lesion mask: bright is lesion, black is not.

    A pixel is lesion where its brightest channel is above half of the range. A mask of a few small label values (such
    as 0 and 1) is lesion wherever it is not 0. Alpha counts only where the colour channels say nothing.

    Args:
        path: The file to read.
        size: ``(width, height)`` that the mask must have, or None to accept any.
        data: The file's content where that is at hand; ``path`` then only names it.

    Returns:
        ``bool (H, W)``, True on the lesion.

    Raises:
        InputError: As for `read_image`, or the mask has another size.
    """
    path = Path(path)
    decoded = _decode(path, _read_bytes(path) if data is None else data)
    if size is not None and decoded.size != tuple(size):
        raise InputError(
            f"{path.name}: the mask is {decoded.width}x{decoded.height} pixels, its image {size[0]}x{size[1]}.",
            fix="Export the mask at the image's own size.",
        )
    return _lesion_pixels(_mask_levels(decoded))


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise InputError(f"{path.name} {problem}.", fix="Check the name, or restore it from the original set.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(
                f"{path.name} has {size:,} bytes; the limit is {MAX_FILE_BYTES:,}.",
                fix="Save it as a compressed PNG of the ultrasound frame alone.",
            )
        if size == 0:
            raise InputError(f"{path.name} is empty (0 bytes).", fix="Restore the file from the original set.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {error}.", fix="Check the file's permissions.") from error


def _decode(path: Path, data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns about bombs and odd metadata; the limits below refuse what matters.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(path, image)
                image.load()
                return image.copy()
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path.name} unpacks to more than {MAX_PIXELS:,} pixels.", fix="Crop or shrink it to the ultrasound frame."
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path.name} is not a PNG, JPEG, BMP or TIFF image, whatever its name says.", fix=_RESAVE
        ) from error
    except Exception as error:  # Decoders raise anything on damaged bytes: SyntaxError, struct.error, MemoryError, ...
        raise InputError(f"{path.name} is damaged or cut short: {error}.", fix=_RESAVE) from error


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"{path.name} is {width}x{height} pixels; the limit is {MAX_SIDE:,} per side and {MAX_PIXELS:,} in all.",
            fix="Crop or shrink it to the ultrasound frame.",
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{path.name} is {width}x{height} pixels; at least {MIN_SIDE} per side are needed.",
            fix="Use the original image, not a thumbnail.",
        )
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise InputError(f"{path.name} holds {frames} frames.", fix="Export one frame per file.")
    if image.mode == "F":
        raise InputError(f"{path.name} has floating-point pixels, whose range is unknown.", fix=_RESAVE)


def _to_eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    levels = np.clip(values.astype(np.int64), 0, 65_535)
    # Scanners store 8, 10 or 12 significant bits in 16: taking the full range would turn those almost black.
    peak = int(levels.max())
    top = next(top for top in (255, 1023, 4095, 65_535) if peak <= top)
    return np.round(levels * (255.0 / top)).astype(np.uint8)


def _on_black(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    black = Image.new("RGBA", layer.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, layer).convert("RGB")


def _mask_levels(image: Image.Image) -> NDArray[np.int64]:
    """One level per pixel, ``int64 (H, W)``; 8-bit files give 0 to 255."""
    if image.mode in _DEEP_MODES:
        return np.clip(np.asarray(image).astype(np.int64), 0, 65_535)
    if image.mode in {"1", "L"}:
        return np.asarray(image.convert("L")).astype(np.int64)
    channels = np.asarray(image.convert("RGBA")).astype(np.int64)
    colour, alpha = channels[..., :3].max(axis=2), channels[..., 3]
    silent = int(colour.min()) == int(colour.max())
    # The brightest channel, not luminance: annotation tools paint lesions pure red or dark blue.
    return alpha if silent and int(alpha.min()) != int(alpha.max()) else colour


def _lesion_pixels(levels: NDArray[np.int64]) -> NDArray[np.bool_]:
    peak = int(levels.max())
    full = 255 if peak <= 255 else 65_535
    if 0 < peak <= full // 2:
        labels = np.unique(levels)
        # Label masks (0 and 1, or 0, 1, 2) are common outside BUSI; a dim photograph has many more values.
        if labels.size <= 16:
            return levels > 0
    return levels > full // 2
