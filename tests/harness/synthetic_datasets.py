"""Small drawn data sets with the quirks of the real ones, good enough to train a tiny model on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

_SIZES = ((190, 310), (1048, 719), (560, 468), (300, 420), (420, 330), (380, 380), (334, 310), (500, 360))


@dataclass(frozen=True)
class Frame:
    """One drawn ultrasound frame: ``pixels`` uint8 (H, W) and one bool (H, W) per lesion."""

    pixels: NDArray[np.uint8]
    lesions: tuple[NDArray[np.bool_], ...]


def draw_frame(rng: np.random.Generator, size: tuple[int, int], image_class: str = "normal", lesions: int = 1) -> Frame:
    """Draw tissue layers under speckle, with dark elliptic lesions and their shadow or enhancement.

    Args:
        rng: Source of every choice.
        size: ``(width, height)``.
        image_class: ``normal`` has no lesion, ``malignant`` a rough one with a shadow below.
        lesions: How many, side by side.

    Returns:
        The frame.
    """
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    echo = _layers(rng, x / width, y / height)
    masks = []
    for place in range(lesions if image_class != "normal" else 0):
        centre = (place + rng.uniform(0.35, 0.65)) / lesions * width, rng.uniform(0.3, 0.6) * height
        mask = _lesion(rng, x, y, centre, image_class, lesions)
        masks.append(mask)
        echo = _paint(echo, mask, image_class)
    speckle = ndimage.gaussian_filter(rng.rayleigh(1.0, (height, width)), (0.7, 1.3))
    grey = np.clip(60 * echo * (0.25 + 0.6 * speckle / speckle.mean()), 0, 255)
    return Frame(grey.astype(np.uint8), tuple(masks))


def draw_busi(folder: Path, seed: int = 0, count: int = 32) -> Path:
    """Draw a BUSI-like set with its quirks, and the list of its near-duplicates, ``groups.csv``.

    Half of the images are benign, a quarter malignant, a quarter normal. The first of each class carry the quirks:

    - benign 1: two lesions in two mask files; 2 to 5: masks in RGB, RGBA, 1-bit, and in the alpha channel alone;
      6: colour Doppler; 7: benign 2 again, cropped, noisier and with calipers
    - malignant 1: the same frame as benign 3; 2: a palette image; 3: an RGBA image; 4: a small coloured mark;
      5: a line of text
    - normal 1: an all-black mask; 2: no mask file

    Args:
        folder: Where to write; created.
        seed: Decides everything.
        count: Number of images, at least 28.

    Returns:
        The folder.
    """
    if count < 28:
        raise ValueError(f"count must be at least 28 to hold every quirk, not {count}")
    rng = np.random.default_rng(seed)
    numbers = {"benign": count - 2 * (count // 4), "malignant": count // 4, "normal": count // 4}
    frames: dict[tuple[str, int], Frame] = {}
    for image_class, many in numbers.items():
        (folder / image_class).mkdir(parents=True, exist_ok=True)
        for number in range(1, many + 1):
            size = _SIZES[len(frames)] if len(frames) < len(_SIZES) else _random_size(rng)
            lesions = 2 if (image_class, number) == ("benign", 1) else 1
            frames[image_class, number] = draw_frame(rng, size, image_class, lesions)
    frames["benign", 7] = _again(rng, frames["benign", 2])
    frames["malignant", 1] = frames["benign", 3]
    for (image_class, number), frame in frames.items():
        stem = f"{image_class} ({number})"
        _quirky(image_class, number, frame.pixels).save(folder / image_class / f"{stem}.png")
        masks = frame.lesions or (np.zeros(frame.pixels.shape, dtype=np.bool_),)
        for index, mask in enumerate(masks):
            ending = "_mask" if index == 0 else f"_mask_{index}"
            if (image_class, number) != ("normal", 2):
                _quirky_mask(image_class, number, mask).save(folder / image_class / f"{stem}{ending}.png")
    _write_groups(folder, list(frames))
    return folder


def draw_busbra(folder: Path, seed: int = 0, patients: int = 8) -> Path:
    """Draw a BUS-BRA-like set: two images a patient, 1-bit masks, and ``bus_data.csv``."""
    rng = np.random.default_rng(seed + 1)
    (folder / "Images").mkdir(parents=True)
    (folder / "Masks").mkdir()
    rows = []
    for case in range(1, patients + 1):
        image_class = "malignant" if case % 3 == 0 else "benign"
        for side in "lr":
            frame = draw_frame(rng, (int(rng.integers(240, 300)), int(rng.integers(300, 360))), image_class)
            name = f"{case:04d}-{side}"
            Image.fromarray(frame.pixels).save(folder / "Images" / f"bus_{name}.png")
            Image.fromarray(frame.lesions[0]).save(folder / "Masks" / f"mask_{name}.png")
            rows.append({"ID": f"bus_{name}", "Case": case, "Pathology": image_class, "BIRADS": 2 + case % 4})
    with (folder / "bus_data.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def draw_pairs(folder: Path, seed: int = 0, count: int = 6, *, labels: bool = False) -> Path:
    """Draw a folder of ``images/`` and ``masks/``; classes in folder names, or with ``labels`` in ``labels.csv``."""
    rng = np.random.default_rng(seed + 2)
    (folder / "masks").mkdir(parents=True)
    lines = ["file,class,patient,birads"]
    for number in range(count):
        image_class = ("benign", "malignant", "normal")[number % 3]
        frame = draw_frame(rng, (320, 280), image_class)
        place = folder / "images" if labels else folder / "images" / image_class
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame.pixels).save(place / f"scan{number}.png")
        lines.append(f"scan{number}.png,{image_class},p{number // 2},4")
        for mask in frame.lesions:
            ending = "_mask" if labels else ""
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"scan{number}{ending}.png")
    if labels:
        (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _random_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(280, 480)), int(rng.integers(310, 400))


def _layers(rng: np.random.Generator, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Skin, fat, gland and muscle as wavy bands, with a few bright fasciae and attenuation by depth."""
    wave = sum(
        rng.uniform(0.01, 0.05) * np.sin(2 * np.pi * (rate * x + rng.uniform())) for rate in rng.uniform(0.4, 3, 3)
    )
    depth = y + wave
    edges = np.sort(rng.uniform(0.05, 0.95, 5))
    levels = rng.uniform(0.4, 2.2, 6)
    echo = levels[np.searchsorted(edges, depth)]
    for line in rng.uniform(0.1, 0.9, 4):
        echo = echo + 1.5 * np.exp(-(((depth - line + rng.uniform(-0.2, 0.2) * x) / 0.012) ** 2))
    blobs = ndimage.gaussian_filter(rng.normal(size=x.shape), (x.shape[0] / 16, x.shape[1] / 10))
    return np.asarray((echo + 0.6 * blobs / blobs.std()).clip(0.15) * (1.3 - 0.8 * y), dtype=np.float32)


def _lesion(
    rng: np.random.Generator,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    centre: tuple[float, float],
    image_class: str,
    lesions: int,
) -> NDArray[np.bool_]:
    height, width = x.shape
    across = rng.uniform(0.10, 0.18) * width / lesions
    along = min(across * rng.uniform(0.5, 0.9), 0.2 * height)
    angle = np.arctan2(y - centre[1], x - centre[0])
    rough = 0.16 if image_class == "malignant" else 0.03
    edge = 1 + rough * np.sin(7 * angle + rng.uniform(0, 6)) + rough / 2 * np.sin(11 * angle)
    return np.asarray(np.hypot((x - centre[0]) / across, (y - centre[1]) / along) < edge)


def _paint(echo: NDArray[np.float32], mask: NDArray[np.bool_], image_class: str) -> NDArray[np.float32]:
    soft = ndimage.gaussian_filter(mask.astype(np.float32), 1.5)
    below = np.cumsum(mask, axis=0) > 0
    beam = ndimage.gaussian_filter(np.where(below & ~mask, 1.0, 0.0), 4)
    painted = echo * (1 - soft) + 0.25 * soft
    return np.asarray(painted * (1 + (0.5 if image_class == "benign" else -0.6) * beam), dtype=np.float32)


def _again(rng: np.random.Generator, frame: Frame) -> Frame:
    """The frame a moment later: cropped by a few pixels, a little noisier, and with calipers."""
    pixels = np.clip(frame.pixels + rng.normal(0, 3, frame.pixels.shape), 0, 255).astype(np.uint8)
    mask = frame.lesions[0]
    rows, columns = np.nonzero(mask)
    for row, column in ((rows.min(), columns[0]), (rows.max(), columns[-1])):
        pixels[max(row - 8, 0) : row + 9, max(column - 8, 0) : column + 9] //= 2
        pixels[max(row - 7, 0) : row + 8, column : column + 2] = 250
        pixels[row : row + 2, max(column - 7, 0) : column + 8] = 250
    return Frame(pixels[3:-2, 2:-3], (mask[3:-2, 2:-3],))


def _quirky(image_class: str, number: int, pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels)
    quirk = (image_class, number)
    if quirk == ("benign", 6):
        colour = np.stack([pixels] * 3, axis=-1)
        colour[100:180, 100:190] = (200, 40, 20)
        return Image.fromarray(colour)
    if quirk == ("malignant", 2):
        return image.convert("P")
    if quirk == ("malignant", 3):
        return image.convert("RGBA")
    if quirk == ("malignant", 4):
        image = image.convert("RGB")
        ImageDraw.Draw(image).rectangle((20, 20, 29, 23), fill=(255, 220, 0))
    if quirk == ("malignant", 5):
        ImageDraw.Draw(image).rectangle((40, 250, 180, 275), fill=10)
        ImageDraw.Draw(image).text((50, 252), "LT AXILLA MHI", fill=240, font_size=17)
    return image


def _quirky_mask(image_class: str, number: int, mask: NDArray[np.bool_]) -> Image.Image:
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    if (image_class, number) == ("benign", 5):
        alone = Image.new("RGBA", grey.size, (255, 255, 255, 0))
        alone.putalpha(grey)
        return alone
    mode = {("benign", 2): "RGB", ("benign", 3): "RGBA", ("benign", 4): "1"}.get((image_class, number), "L")
    return grey.convert(mode)


def _write_groups(folder: Path, names: list[tuple[str, int]]) -> None:
    same = {("benign", 7): ("benign", 2), ("malignant", 1): ("benign", 3)}
    number = {name: index for index, name in enumerate(names)}
    lines = [
        f"{image_class},{index},{number[same.get((image_class, index), (image_class, index))]}\n"
        for image_class, index in names
    ]
    (folder / "groups.csv").write_text("class,number,near_duplicate_group\n" + "".join(lines), encoding="utf-8")
