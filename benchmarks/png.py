"""Milliseconds and bytes per image of PNG encoders, and of lossless WebP, on the pairs of a generated dataset.

busigen generate --count 64 --out out/some && python benchmarks/png.py out/some

Encoders take turns, every one encodes all images of the dataset in each round, and the table shows the medians over the
rounds. Time is the processor's, not the clock's, so that other work on the machine hardly shows. Whatever an encoder
writes is decoded with Pillow and must hold the same pixels. Encoders whose package is missing are left out:
``pip install imagecodecs isal opencv-python-headless zlib-ng`` brings them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import os
import platform
import statistics
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

Pixels = NDArray[Any]
Encoder = Callable[[Pixels], bytes]

RESULTS = Path(__file__).parent / "results" / "png.json"
PACKAGES = ("pillow", "numpy", "opencv-python-headless", "imagecodecs", "isal", "zlib-ng")
USED = "pillow, RLE, level 6"


def pillow(kind: str = "PNG", **options: Any) -> Encoder:
    """Pillow's encoder."""

    def encode(pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


def handwritten(deflate: Callable[[bytes], bytes], up: bool) -> Encoder:
    """A PNG of one deflate stream by a library of its own: what is left when the wrapping costs next to nothing."""

    def encode(pixels: Pixels) -> bytes:
        bits = 1 if pixels.dtype == bool else 8
        rows = np.packbits(pixels, axis=1) if bits == 1 else pixels
        lines = np.empty((rows.shape[0], rows.shape[1] + 1), dtype=np.uint8)
        lines[:, 0] = 2 if up else 0
        lines[:, 1:] = rows
        if up:
            lines[1:, 1:] -= rows[:-1]
        header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, 0, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", deflate(lines.tobytes())), (b"IEND", b""))
        chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    return encode


def encoders() -> dict[str, Encoder]:
    """What there is to compare, by name."""
    found = {
        USED: pillow(compress_level=6, compress_type=zlib.Z_RLE),
        "pillow, RLE, level 1": pillow(compress_level=1, compress_type=zlib.Z_RLE),
        "pillow, Huffman only": pillow(compress_level=6, compress_type=zlib.Z_HUFFMAN_ONLY),
        "pillow, level 1": pillow(compress_level=1),
        "pillow, level 6": pillow(compress_level=6),
        "pillow, level 9": pillow(compress_level=9),
        "webp lossless, method 0": pillow("WEBP", lossless=True, quality=0, method=0),
        "webp lossless, method 2": pillow("WEBP", lossless=True, quality=50, method=2),
        "webp lossless, method 4": pillow("WEBP", lossless=True, quality=75, method=4),
    }
    if cv2 := _module("cv2"):
        for name, options in {
            "opencv, default": [],
            "opencv, RLE, level 1": [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, *_level(cv2, 1)],
        }.items():
            found[name] = lambda pixels, options=options: cv2.imencode(".png", _bytes(pixels), options)[1].tobytes()
    if imagecodecs := _module("imagecodecs"):
        for level in (1, 6):
            found[f"libpng (imagecodecs), level {level}"] = lambda pixels, level=level: imagecodecs.png_encode(
                _bytes(pixels), level=level
            )
            found[f"libspng (imagecodecs), level {level}"] = lambda pixels, level=level: imagecodecs.spng_encode(
                _bytes(pixels), level=level
            )
    if isal := _module("isal.isal_zlib"):
        for level in (0, 1, 3):
            found[f"isal, level {level}"] = handwritten(lambda data, level=level: isal.compress(data, level), True)
    if zlib_ng := _module("zlib_ng.zlib_ng"):
        for level in (1, 6):
            found[f"zlib-ng, level {level}"] = handwritten(
                lambda data, level=level: zlib_ng.compress(data, level), True
            )
    return found


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path, help="a dataset of busigen generate")
    parser.add_argument("--repeat", type=int, default=7, help="rounds")
    parser.add_argument("--limit", type=int, default=200, help="pairs at the most")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args()
    pairs = read(options.dataset, options.limit)
    rows = [measure(kind, [pair[k] for pair in pairs], options.repeat) for k, kind in enumerate(("image", "mask"))]
    medians = {name: {"image": rows[0][name], "mask": rows[1][name]} for name in rows[0]}
    print(f"{len(pairs)} pairs")
    print(f"{'':36}{'image':>18}{'mask':>18}")
    print(f"{'encoder':36}{'ms':>8}{'bytes':>10}{'ms':>8}{'bytes':>10}")
    for name, kinds in medians.items():
        cells = "".join(f"{kinds[k]['ms']:>8.3f}{kinds[k]['bytes']:>10.0f}" for k in ("image", "mask"))
        print(f"{name:36}{cells}")
    record = {
        "command": {"pairs": len(pairs), "repeat": options.repeat},
        "machine": machine(),
        "medians": medians,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.results}")


def measure(kind: str, images: list[Pixels], repeat: int) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time and bytes per image, by encoder."""
    known = encoders()
    for name, encode in known.items():
        for pixels in images[:8]:
            decoded = np.asarray(Image.open(io.BytesIO(encode(pixels))).convert("L"))
            if not np.array_equal(decoded, _bytes(pixels)):
                sys.exit(f"{name}: a {kind} came back with other pixels")
    times: dict[str, list[float]] = {name: [] for name in known}
    sizes = {}
    for _ in range(repeat):
        for name, encode in known.items():
            started = time.process_time()
            written = [len(encode(pixels)) for pixels in images]
            times[name].append(1000 * (time.process_time() - started) / len(images))
            sizes[name] = statistics.mean(written)
    return {name: {"ms": statistics.median(times[name]), "bytes": sizes[name]} for name in known}


def read(dataset: Path, limit: int) -> list[tuple[Pixels, Pixels]]:
    """Images and masks of a dataset's first shards, decoded."""
    pairs: list[tuple[Pixels, Pixels]] = []
    for path in sorted((dataset / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in (name for name in found if name.endswith(".image.png")):
            both = (found[name], found[name.replace(".image.", ".mask.")])
            image, mask = (np.asarray(Image.open(io.BytesIO(data))) for data in both)
            pairs.append((np.ascontiguousarray(image), np.ascontiguousarray(mask)))
    if not pairs:
        sys.exit(f"{dataset} has no shards")
    return pairs[:limit]


def machine() -> dict[str, Any]:
    """What decides the figures, and nothing that says whose machine it is."""
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "pillow with zlib-ng": bool(features.check_feature("zlib_ng")),
    }


def _level(cv2: Any, level: int) -> list[int]:
    return [cv2.IMWRITE_PNG_COMPRESSION, level]


def _bytes(pixels: Pixels) -> Pixels:
    """Bits as the grey levels 0 and 255, which is all that some encoders take."""
    return pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
