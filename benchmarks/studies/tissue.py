"""Procedural breast tissue: a map of its layers and a B-mode image of them, from a seed and an index alone.

A prototype, for `phantom.py`: nothing in busigen uses it yet.

Layers are bounded by smooth curves: skin, subcutaneous fat in lobules between septa (Cooper's ligaments, as boundaries
of cells: Pokrajac et al. 2012), gland with dark ducts, fat behind it, fascia, muscle with bright streaks along it, and
now and then a rib with its shadow (anatomy as in Graff's VICTRE phantoms, 2016). Each tissue has a level in decibels;
scatterers of that power, convolved with a point spread function that widens with depth, give speckle, which is
attenuated, shadowed and compressed to grey levels. The distribution of the parameters is fitted on training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

OUTSIDE, SKIN, FAT, SEPTUM, GLAND, FASCIA, MUSCLE, RIB = range(8)
TISSUES = ("outside", "skin", "fat", "septum", "gland", "fascia", "muscle", "rib")
"""Names of a label map's values."""

PARAMETERS: dict[str, tuple[float, float]] = {
    # Thicknesses and depths are shares of the image's height.
    "skin": (0.008, 0.045),
    "fat": (0.02, 0.45),
    "gland": (0.02, 0.60),
    "behind": (0.0, 0.15),
    "muscle": (0.05, 0.45),
    "wave": (0.005, 0.09),
    "tilt": (-0.18, 0.18),
    # Sides of lobules and of textures are shares of the image's longer side; the rest is decibels or a share.
    "lobule": (0.05, 0.30),
    "lobule_aspect": (1.2, 5.0),
    "septum_gain": (2.0, 20.0),
    "septum_width": (0.6, 3.0),
    "septum_gaps": (0.1, 0.9),
    "fat_texture": (0.0, 6.0),
    "gland_gain": (-2.0, 16.0),
    "gland_texture": (1.0, 9.0),
    "gland_grain": (0.012, 0.08),
    "gland_aspect": (1.0, 6.0),
    "ducts": (0.0, 0.35),
    "duct_drop": (3.0, 16.0),
    "muscle_gain": (-14.0, 6.0),
    "streak_gain": (1.0, 16.0),
    "streak_width": (0.004, 0.02),
    "streak_aspect": (5.0, 30.0),
    "fascia_gain": (2.0, 20.0),
    "rib": (-1.0, 1.0),
    "shadows": (-0.5, 1.0),
    "shadow_drop": (3.0, 25.0),
    "attenuation": (-4.0, 40.0),
    "bow": (0.6, 3.0),
    "haze": (0.0, 7.0),
    "haze_size": (0.1, 0.5),
    "axial": (0.5, 1.4),
    "lateral": (0.8, 3.0),
    "spread": (0.0, 1.5),
    "compound": (0.0, 0.97),
    "range": (36.0, 75.0),
    "level": (0.08, 0.75),
    "skin_gain": (2.0, 22.0),
    "streaks_above": (0.0, 12.0),
}
"""Least and greatest value of each parameter; a logistic curve takes normals to between them."""

Floats = NDArray[Any]


@dataclass(frozen=True)
class Phantoms:
    """How phantoms are distributed: the normals behind ``PARAMETERS``.

    Attributes:
        mean: ``(P,)``.
        factor: ``(P, K)``, how ``K`` independent normals make what is added to the mean.
    """

    mean: Floats
    factor: Floats

    @classmethod
    def unfitted(cls) -> Phantoms:
        """Every parameter about the middle of what it may be."""
        return cls(np.zeros(len(PARAMETERS)), np.eye(len(PARAMETERS)))

    def values(self, seed: int, index: int) -> dict[str, float]:
        """The parameters of one phantom."""
        normals = np.random.default_rng((seed, index, 0)).standard_normal(self.factor.shape[1])
        return values_of(self.mean + self.factor @ np.clip(normals, -3.0, 3.0))


def values_of(logits: Floats) -> dict[str, float]:
    """Parameters from real numbers ``(P,)``."""
    shares = 1.0 / (1.0 + np.exp(-logits))
    limits = zip(PARAMETERS.items(), shares, strict=True)
    return {name: float(low + (high - low) * share) for (name, (low, high)), share in limits}


def phantom(
    parameters: dict[str, float], seed: int, index: int, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one phantom.

    Args:
        parameters: as `Phantoms.values` gives them.
        seed: of all that is random beside them.
        index: the sample's.
        height: rows.
        width: columns.

    Returns:
        The image and the label map, both ``uint8 (height, width)``.
    """
    return _Canvas(
        parameters, np.random.default_rng((seed, index, 1)).standard_normal(1 << 20, np.float32), height, width
    ).draw()


class _Canvas:
    """One phantom while it is drawn; random numbers are taken from ``noise`` in order."""

    def __init__(self, parameters: dict[str, float], noise: NDArray[np.float32], height: int, width: int) -> None:
        self.p, self.noise, self.used = parameters, noise, 0
        self.height, self.width, self.side = height, width, max(height, width)
        self.rows, self.columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
        self.frequencies = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]

    def _normals(self, *shape: int) -> NDArray[np.float32]:
        size = int(np.prod(shape))
        found = self.noise[self.used : self.used + size].reshape(shape)
        self.used += size
        return found

    def _field(self, tall: float, wide: float) -> NDArray[np.float32]:
        """Smooth standard normal noise whose correlation is a Gaussian of these pixels."""
        spectrum = np.fft.rfft2(self._normals(self.height, self.width))
        down, along = self.frequencies
        window = np.exp(-((np.pi * down * tall) ** 2) - (np.pi * along * wide) ** 2)
        found = np.fft.irfft2(spectrum * window, (self.height, self.width)).astype(np.float32)
        return found / max(float(found.std()), 1e-6)

    def _curve(self, amplitude: float, waves: int = 4) -> Floats:
        """A smooth curve over the columns, ``(width,)``, in rows."""
        place = (np.arange(self.width) + 0.5) / self.width
        weights = self._normals(2, waves) / np.arange(1, waves + 1)
        angles = np.pi * np.arange(1, waves + 1)[:, None] * place
        return amplitude * self.height * (weights[0] @ np.cos(angles) + weights[1] @ np.sin(angles))

    def draw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image and labels."""
        labels, depth = self._layers()
        level = self._levels(labels, depth)
        return self._image(level), labels

    def _layers(self) -> tuple[NDArray[np.uint8], dict[str, Floats]]:
        """The label map without septa, and each boundary's row at every column, ``(width,)``."""
        p, height = self.p, self.height
        tilt = p["tilt"] * height * (np.arange(self.width) / self.width - 0.5)
        skin = p["skin"] * height + self._curve(0.002)
        fat = np.maximum(skin + 1, skin + p["fat"] * height + self._curve(p["wave"]) + 0.5 * tilt)
        gland = np.maximum(fat, fat + p["gland"] * height + self._curve(p["wave"]) + 0.5 * tilt)
        fascia = np.maximum(gland, gland + p["behind"] * height + self._curve(0.3 * p["wave"]))
        muscle = fascia + p["muscle"] * height + self._curve(0.5 * p["wave"])
        labels = np.full((height, self.width), MUSCLE, np.uint8)
        for label, below in ((FAT, fascia), (GLAND, gland), (FAT, fat), (SKIN, skin)):
            labels[self.rows < below] = label
        return labels, {"skin": skin, "fat": fat, "gland": gland, "fascia": fascia, "muscle": muscle}

    def _levels(self, labels: NDArray[np.uint8], depth: dict[str, Floats]) -> NDArray[np.float32]:
        """Decibels of every pixel; writes septa, fascia and ribs into the labels."""
        p, side = self.p, self.side
        fat, gland, muscle = (labels == kind for kind in (FAT, GLAND, MUSCLE))
        level = np.zeros(labels.shape, np.float32)
        level += p["fat_texture"] * self._field(0.03 * side, 0.08 * side) * fat
        grain = p["gland_grain"] * side
        texture = self._field(grain, grain * p["gland_aspect"])
        level += (p["gland_gain"] + p["gland_texture"] * texture) * gland
        ducts = self._field(1.3 * grain, 1.3 * grain * (0.5 + 0.5 * p["gland_aspect"]))
        duct = ndimage.gaussian_filter((ducts > np.quantile(ducts, 1.0 - p["ducts"])).astype(np.float32), 0.8)
        level -= p["duct_drop"] * duct * gland
        level += p["muscle_gain"] * muscle
        self._streaks(level, muscle | gland, muscle, depth)
        self._septa(level, labels, fat)
        self._lines(level, labels, depth)
        self._rib(level, labels, depth["muscle"])
        return level

    def _streaks(
        self, level: NDArray[np.float32], where: NDArray[np.bool_], muscle: NDArray[np.bool_], depth: dict[str, Floats]
    ) -> None:
        """Thin bright streaks that run along the fascia, strong in muscle and weak in gland."""
        tall = self.p["streak_width"] * self.side
        straight = self._field(tall, tall * self.p["streak_aspect"])
        # Sheared down each column, so that they follow the layers.
        shift = np.rint(depth["fascia"] - depth["fascia"].mean()).astype(int)
        rows = (np.arange(self.height)[:, None] - shift[None]) % self.height
        streaks = np.maximum(straight[rows, np.arange(self.width)[None]] - 0.8, 0.0)
        gain = np.where(muscle, self.p["streak_gain"], self.p["streaks_above"])
        level += gain * streaks * where

    def _septa(self, level: NDArray[np.float32], labels: NDArray[np.uint8], fat: NDArray[np.bool_]) -> None:
        """Bright boundaries of cells in fat, brighter where they lie across the beam, with gaps."""
        p = self.p
        aspect, size = p["lobule_aspect"], p["lobule"] * self.side
        count = int(np.clip(1.6 * self.width * self.height * aspect / (size * size * aspect**1.0) + 6, 6, 900))
        spread = self._normals(count, 2)
        centres = np.stack([_to_unit(spread[:, 0]) * 1.2 - 0.1, _to_unit(spread[:, 1]) * 1.2 - 0.1], axis=1)
        warp = 0.25 * size
        rows = (self.rows + warp * self._field(0.5 * size, 0.8 * size)) * aspect
        columns = self.columns + warp * self._field(0.5 * size, 0.8 * size)
        points = np.stack([rows[fat], columns[fat]], axis=1)
        if not len(points):
            return
        scaled = centres * (self.height * aspect, self.width)
        distances, nearest = cKDTree(scaled).query(points, k=2)
        towards = scaled[nearest[:, 1]] - scaled[nearest[:, 0]]
        length = np.maximum(np.linalg.norm(towards, axis=1), 1e-3)
        gap = (distances[:, 1] ** 2 - distances[:, 0] ** 2) / (2.0 * length) / np.sqrt(aspect)
        across = np.abs(towards[:, 0]) / length
        breaks = self._field(0.08 * self.side, 0.12 * self.side)[fat]
        strength = np.clip(0.7 + breaks - 1.6 * (p["septum_gaps"] - 0.5), 0.0, 1.5) * (0.25 + 0.75 * across**2)
        line = np.exp(-0.5 * (gap / p["septum_width"]) ** 2) * strength
        level[fat] += (p["septum_gain"] * line).astype(np.float32)
        tissue = labels[fat]
        tissue[line > 0.5] = SEPTUM
        labels[fat] = tissue

    def _lines(self, level: NDArray[np.float32], labels: NDArray[np.uint8], depth: dict[str, Floats]) -> None:
        """Skin's two bright surfaces and the bright lines at the layers' boundaries, which fade in and out."""
        p = self.p
        level += (
            p["skin_gain"] * (labels == SKIN) * np.exp(-((self.rows / max(0.35 * p["skin"] * self.height, 1.0)) ** 2))
        )
        for name, gain in (
            ("skin", 0.6 * p["skin_gain"]),
            ("fat", 0.5 * p["fascia_gain"]),
            ("fascia", p["fascia_gain"]),
        ):
            strength = np.clip(0.6 + self._curve(1.0, 8) / self.height, 0.0, 1.4)
            line = np.exp(-0.5 * ((self.rows - depth[name]) / (0.004 * self.side + 0.6)) ** 2) * strength
            level += gain * line
            if name == "fascia":
                labels[line > 0.5] = FASCIA

    def _rib(self, level: NDArray[np.float32], labels: NDArray[np.uint8], muscle: Floats) -> None:
        """A bright arc with a shadow below it, in some images."""
        place, size, *_ = self._normals(4)
        if self.p["rib"] < 0.35:
            return
        middle = self.width * float(_to_unit(np.array(place)))
        half = self.side * (0.10 + 0.05 * abs(float(size)))
        apart = (np.arange(self.width) - middle) / half
        top = muscle + 0.5 * half * apart**2
        inside = (np.abs(apart) < 1.0)[None] & (self.rows > top)
        level[inside] -= 18.0
        arc = np.exp(-0.5 * ((self.rows - top) / (0.006 * self.side + 0.8)) ** 2) * (np.abs(apart) < 1.0)
        level += 14.0 * arc
        labels[inside & (self.rows < top + 0.5 * half)] = RIB

    def _image(self, level: NDArray[np.float32]) -> NDArray[np.uint8]:
        """B-mode: shadows, attenuation, speckle, compression."""
        p, side = self.p, self.side
        depth = self.rows / self.height
        level = level - p["attenuation"] * depth ** p["bow"]
        level += p["haze"] * self._field(p["haze_size"] * side, p["haze_size"] * side)
        across = self._curve(1.0, 12) / self.height
        shadow = np.clip(across - across.mean() - 1.2 + 1.5 * max(p["shadows"], 0.0), 0.0, 1.0)
        level -= p["shadow_drop"] * shadow[None] * np.clip(3.0 * depth, 0.0, 1.0)
        amplitude = 10.0 ** (level / 20.0)
        real, imaginary = (self._normals(self.height, self.width) * amplitude for _ in range(2))
        near, far = (
            np.hypot(*(ndimage.gaussian_filter(part, (p["axial"], lateral)) for part in (real, imaginary)))
            * np.sqrt(4.0 * np.pi * p["axial"] * lateral)
            for lateral in (p["lateral"], p["lateral"] + p["spread"])
        )
        envelope = near * (1.0 - depth) + far * depth
        # Compounding averages speckle (shorter bright streaks and all the rest stay): towards the mean power.
        power = 2.0 * ndimage.gaussian_filter(amplitude**2, (p["axial"], p["lateral"]))
        decibels = 10.0 * np.log10((1.0 - p["compound"]) * envelope**2 + p["compound"] * power + 1e-9)
        # As a sonographer sets the gain: by what is near the skin.
        grey = p["level"] + (decibels - np.median(decibels[: self.height // 2])) / p["range"]
        return np.clip(np.rint(255.0 * grey), 0, 255).astype(np.uint8)


def _to_unit(normals: Floats) -> Floats:
    """Standard normals as numbers from 0 to 1."""
    return np.asarray(1.0 / (1.0 + np.exp(-1.702 * normals)))
