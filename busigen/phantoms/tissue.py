"""What lies where in a phantom: layers, lobules, gland, muscle and ribs, as a label map and as decibels.

Layers are bounded by smooth curves: skin, subcutaneous fat in lobules between septa (Cooper's ligaments, as boundaries
of cells: Pokrajac et al. 2012), gland with dark ducts, fat behind it, fascia, muscle with bright streaks along it, and
now and then a rib with its shadow (anatomy as in Graff's VICTRE phantoms, 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
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

MOST_LOBULES = 900
FIELDS, OTHERS = 10, 2 * MOST_LOBULES + 200
"""How many fields a phantom has, speckle included, and how many normals its curves, lobules and ribs take at most."""

Floats = NDArray[Any]


def values_of(logits: Floats) -> dict[str, float]:
    """Parameters from real numbers ``(P,)``, in the order of ``PARAMETERS``."""
    shares = 1.0 / (1.0 + np.exp(-logits))
    limits = zip(PARAMETERS.items(), shares, strict=True)
    return {name: float(low + (high - low) * share) for (name, (low, high)), share in limits}


class Canvas:
    """One phantom's grid while it is drawn; random numbers are taken from ``normals`` in order.

    Attributes:
        p: the parameters, by the names in ``PARAMETERS``.
        height: rows.
        width: columns.
    """

    def __init__(self, parameters: Mapping[str, float], normals: NDArray[np.float32], height: int, width: int) -> None:
        self.p, self._normals, self._used = parameters, normals, 0
        self.height, self.width, self.side = height, width, max(height, width)
        self.rows = np.arange(height)[:, None] + 0.5
        self.columns = np.arange(width)[None] + 0.5
        self._frequencies = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]

    def normals(self, *shape: int) -> NDArray[np.float32]:
        """The next standard normals."""
        size = int(np.prod(shape))
        found = self._normals[self._used : self._used + size].reshape(shape)
        self._used += size
        return found

    def field(self, tall: float, wide: float) -> NDArray[np.float32]:
        """Smooth noise ``(height, width)`` of zero mean and unit variance, correlated as a Gaussian of these pixels."""
        spectrum = np.fft.rfft2(self.normals(self.height, self.width))
        # Of a very smooth field there is little but its mean, which would be hundreds of deviations.
        spectrum[0, 0] = 0.0
        down, along = self._frequencies
        window = np.exp(-((np.pi * down * tall) ** 2) - (np.pi * along * wide) ** 2)
        found = np.fft.irfft2(spectrum * window, (self.height, self.width)).astype(np.float32)
        return found / max(float(found.std()), 1e-6)

    def curve(self, amplitude: float, waves: int = 4) -> Floats:
        """A smooth curve over the columns, ``(width,)``, in rows; ``amplitude`` is a share of the height."""
        place = (np.arange(self.width) + 0.5) / self.width
        weights = self.normals(2, waves) / np.arange(1, waves + 1)
        angles = np.pi * np.arange(1, waves + 1)[:, None] * place
        return np.asarray(amplitude * self.height * (weights[0] @ np.cos(angles) + weights[1] @ np.sin(angles)))


class Tissue:
    """What lies where on a canvas.

    Attributes:
        labels: ``uint8 (height, width)``, positions in ``TISSUES``.
        depth: the row of each boundary at every column, ``(width,)``, by name.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.canvas, self.p = canvas, canvas.p
        self.labels, self.depth = self._layers()

    @property
    def density(self) -> float:
        """Gland's share of gland and fat above the chest wall, while septa count as fat."""
        above = self.canvas.rows < self.depth["fascia"]
        gland = int(((self.labels == GLAND) & above).sum())
        fat = int((((self.labels == FAT) | (self.labels == SEPTUM)) & above).sum())
        return gland / max(gland + fat, 1)

    @property
    def chest_wall(self) -> float:
        """The mean depth of the fascia above the muscle, as a share of the height; above 1 if it lies below."""
        return float(self.depth["fascia"].mean()) / self.canvas.height

    def _layers(self) -> tuple[NDArray[np.uint8], dict[str, Floats]]:
        p, c = self.p, self.canvas
        height = c.height
        tilt = p["tilt"] * height * (np.arange(c.width) / c.width - 0.5)
        skin = p["skin"] * height + c.curve(0.002)
        fat = np.maximum(skin + 1, skin + p["fat"] * height + c.curve(p["wave"]) + 0.5 * tilt)
        gland = np.maximum(fat, fat + p["gland"] * height + c.curve(p["wave"]) + 0.5 * tilt)
        fascia = np.maximum(gland, gland + p["behind"] * height + c.curve(0.3 * p["wave"]))
        muscle = fascia + p["muscle"] * height + c.curve(0.5 * p["wave"])
        labels = np.full((height, c.width), MUSCLE, np.uint8)
        for label, below in ((FAT, fascia), (GLAND, gland), (FAT, fat), (SKIN, skin)):
            labels[c.rows < below] = label
        return labels, {"skin": skin, "fat": fat, "fascia": fascia, "muscle": muscle}

    def decibels(self) -> NDArray[np.float32]:
        """Backscatter of every pixel, ``float32 (height, width)``; writes septa, fascia and ribs into the labels."""
        p, c = self.p, self.canvas
        side = c.side
        fat, gland, muscle = (self.labels == kind for kind in (FAT, GLAND, MUSCLE))
        level = np.zeros(self.labels.shape, np.float32)
        level += p["fat_texture"] * c.field(0.03 * side, 0.08 * side) * fat
        grain = p["gland_grain"] * side
        texture = c.field(grain, grain * p["gland_aspect"])
        level += (p["gland_gain"] + p["gland_texture"] * texture) * gland
        ducts = c.field(1.3 * grain, 1.3 * grain * (0.5 + 0.5 * p["gland_aspect"]))
        duct = ndimage.gaussian_filter((ducts > np.quantile(ducts, 1.0 - p["ducts"])).astype(np.float32), 0.8)
        level -= p["duct_drop"] * duct * gland
        level += p["muscle_gain"] * muscle
        self._streaks(level, muscle | gland, muscle)
        self._septa(level, fat)
        self._lines(level)
        self._rib(level)
        return level

    def _streaks(self, level: NDArray[np.float32], where: NDArray[np.bool_], muscle: NDArray[np.bool_]) -> None:
        """Thin bright streaks that run along the fascia, strong in muscle and weak in gland."""
        c = self.canvas
        tall = self.p["streak_width"] * c.side
        straight = c.field(tall, tall * self.p["streak_aspect"])
        # Sheared down each column, so that they follow the layers.
        shift = np.rint(self.depth["fascia"] - self.depth["fascia"].mean()).astype(int)
        rows = (np.arange(c.height)[:, None] - shift[None]) % c.height
        streaks = np.maximum(straight[rows, np.arange(c.width)[None]] - 0.8, 0.0)
        level += np.where(muscle, self.p["streak_gain"], self.p["streaks_above"]) * streaks * where

    def _septa(self, level: NDArray[np.float32], fat: NDArray[np.bool_]) -> None:
        """Bright boundaries of cells in fat, brighter where they lie across the beam, with gaps."""
        p, c = self.p, self.canvas
        aspect, size = p["lobule_aspect"], p["lobule"] * c.side
        count = int(np.clip(1.6 * c.width * c.height / (size * size) + 6, 6, MOST_LOBULES))
        spread = c.normals(count, 2)
        centres = np.stack([_to_unit(spread[:, 0]) * 1.2 - 0.1, _to_unit(spread[:, 1]) * 1.2 - 0.1], axis=1)
        warp = 0.25 * size
        rows = (c.rows + warp * c.field(0.5 * size, 0.8 * size)) * aspect
        columns = c.columns + warp * c.field(0.5 * size, 0.8 * size)
        breaks = c.field(0.08 * c.side, 0.12 * c.side)[fat]
        points = np.stack([rows[fat], columns[fat]], axis=1)
        if not len(points):
            return
        scaled = centres * (c.height * aspect, c.width)
        distances, nearest = cKDTree(scaled).query(points, k=2)
        towards = scaled[nearest[:, 1]] - scaled[nearest[:, 0]]
        length = np.maximum(np.linalg.norm(towards, axis=1), 1e-3)
        gap = (distances[:, 1] ** 2 - distances[:, 0] ** 2) / (2.0 * length) / np.sqrt(aspect)
        across = np.abs(towards[:, 0]) / length
        strength = np.clip(0.7 + breaks - 1.6 * (p["septum_gaps"] - 0.5), 0.0, 1.5) * (0.25 + 0.75 * across**2)
        line = np.exp(-0.5 * (gap / p["septum_width"]) ** 2) * strength
        level[fat] += (p["septum_gain"] * line).astype(np.float32)
        tissue = self.labels[fat]
        tissue[line > 0.5] = SEPTUM
        self.labels[fat] = tissue

    def _lines(self, level: NDArray[np.float32]) -> None:
        """Skin's two bright surfaces and the bright lines at the layers' boundaries, which fade in and out."""
        p, c = self.p, self.canvas
        surface = np.exp(-((c.rows / max(0.35 * p["skin"] * c.height, 1.0)) ** 2))
        level += p["skin_gain"] * (self.labels == SKIN) * surface
        gains = {"skin": 0.6 * p["skin_gain"], "fat": 0.5 * p["fascia_gain"], "fascia": p["fascia_gain"]}
        for name, gain in gains.items():
            strength = np.clip(0.6 + c.curve(1.0, 8) / c.height, 0.0, 1.4)
            line = np.exp(-0.5 * ((c.rows - self.depth[name]) / (0.004 * c.side + 0.6)) ** 2) * strength
            level += gain * line
            if name == "fascia":
                self.labels[line > 0.5] = FASCIA

    def _rib(self, level: NDArray[np.float32]) -> None:
        """A bright arc with a shadow below it, in some images."""
        c = self.canvas
        place, size = c.normals(2)
        if self.p["rib"] < 0.35:
            return
        middle = c.width * float(_to_unit(np.array(place)))
        half = c.side * (0.10 + 0.05 * abs(float(size)))
        apart = (np.arange(c.width) - middle) / half
        top = self.depth["muscle"] + 0.5 * half * apart**2
        inside = (np.abs(apart) < 1.0)[None] & (c.rows > top)
        level[inside] -= 18.0
        arc = np.exp(-0.5 * ((c.rows - top) / (0.006 * c.side + 0.8)) ** 2) * (np.abs(apart) < 1.0)
        level += 14.0 * arc
        self.labels[inside & (c.rows < top + 0.5 * half)] = RIB


def _to_unit(normals: Floats) -> Floats:
    """Standard normals as numbers from 0 to 1."""
    return np.asarray(1.0 / (1.0 + np.exp(-1.702 * normals)))
