"""A thousand broken and malicious PNG files as healthy images: each is used or named, in little memory."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.harness.processes import GUARD_SECONDS, ROOT

SEED, MUTATED = 5, 1000

ROOM = 640 << 20
"""Bytes that the reader may map beyond what it has after its imports: for 64 million pixels, ten bytes each."""

LIMITED = f"""
import json, logging, resource, sys
from pathlib import Path
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + {ROOM},) * 2)
folder = HealthyFolder(Path(sys.argv[1]))
used = [path.name for _, path in folder.items]
picked = [folder.pick((n + 0.5) / len(used)).pixels.shape for n in range(len(used))]
print(json.dumps({{"used": used, "left_out": folder.left_out, "shapes": sorted(set(picked))}}))
"""


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png(*parts: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut or repeated: anywhere, or inside a chunk whose checksum then fits again."""
    if rng.random() < 0.5:
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
    parts = chunks(whole)
    place = rng.randrange(len(parts))
    kind, data = parts[place][0], bytearray(parts[place][1])
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    parts[place] = (kind, bytes(data))
    if rng.random() < 0.2:
        parts.insert(rng.randrange(len(parts)), rng.choice(parts))
    return png(*parts)


def header(width: int, height: int, depth: int = 8, kind: int = 0) -> tuple[bytes, bytes]:
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"IHDR", size + bytes([depth, kind, 0, 0, 0])


def large(kind: int, depth: int) -> bytes:
    """A PNG of 64 million pixels, each row the same ramp of grey; in colour with alpha throughout."""
    ramp = np.linspace(0.2, 0.8, 8000) * (2**depth - 1)
    channels = 4 if kind == 6 else 1
    row = np.repeat(ramp.astype(">u2")[:, None], channels, axis=1)
    row[:, 3:] = 2**depth - 1
    packer = zlib.compressobj(1)
    rows = b"\0" + row.tobytes()
    data = b"".join(packer.compress(rows) for _ in range(8000)) + packer.flush()
    return png(header(8000, 8000, depth, kind), (b"IDAT", data), (b"IEND", b""))


def special(grey: Image.Image) -> dict[str, tuple[bytes, bool]]:
    """Further files, and whether they are images that can be used."""
    whole = saved(grey)
    head, *body = chunks(whole)
    zeros = zlib.compress(bytes(64 << 20), 9)
    colour = grey.convert("RGB")
    frames = [grey, grey.rotate(90)]
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "16 bit": (saved(deep), True),
        "palette": (saved(colour.quantize(64)), True),
        "transparent": (saved(colour.quantize(64), transparency=0), True),
        "interlaced header": (png((head[0], head[1][:-1] + b"\1"), *body), False),
        "animated": (saved(frames[0], save_all=True, append_images=frames[1:]), False),
        "cut short": (whole[: len(whole) // 2], False),
        "beyond any size": (png(header(2**31 - 1, 2**31 - 1), *body), False),
        "bomb": (png(header(60_000, 60_000), (b"IDAT", zeros), (b"IEND", b"")), False),
        "bomb within the limits": (png(header(8000, 8000, kind=6), (b"IDAT", zeros), (b"IEND", b"")), False),
        "as large as may be": (large(0, 16), True),
        "as large as may be, in colour": (large(6, 16), True),
        "text bomb": (png(head, (b"zTXt", b"a\0\0" + zeros), *body), False),
        "profile bomb": (png(head, (b"iCCP", b"a\0\0" + zeros), *body), False),
        "data beyond the end": (png(head, *body[:-1], (b"IDAT", zeros), body[-1]), True),
        "no data": (png(head, body[-1]), False),
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is set by what /proc says")
def test_a_thousand_mutated_images_are_used_or_named(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    grey = Image.fromarray(np.random.default_rng(SEED).integers(40, 140, (48, 64), dtype=np.uint8))
    files = {f"{n:04d}": mutated(saved(grey), rng) for n in range(MUTATED)}
    files |= {name: data for name, (data, _) in special(grey).items()}
    folder = tmp_path / "healthy"
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.png").write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", LIMITED, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert len(said["used"]) + sum(said["left_out"].values()) == len(files)
    assert said["shapes"] == [[256, 256]]
    lines = done.stderr.splitlines()
    named = {line.removeprefix("left out: ").partition(".png")[0] for line in lines if line.startswith("left out: ")}
    assert {Path(name).stem for name in said["used"]}.isdisjoint(named)
    assert len(named) == len(files) - len(said["used"]) - said["left_out"].get("the same file again", 0)
    used = {Path(name).stem for name in said["used"]}
    assert {name: name in used for name in special(grey)} == {name: good for name, (_, good) in special(grey).items()}
    assert not any("Traceback" in line for line in lines)
    assert sorted(tmp_path.rglob("*")) == before
