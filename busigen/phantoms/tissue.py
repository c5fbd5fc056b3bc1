"""What lies where in a phantom: layers, lobules, gland, muscle and ribs, as a label map and as decibels.

Layers are bounded by smooth curves: skin, subcutaneous fat in lobules between septa (Cooper's ligaments), gland with
dark ducts, fat behind it, fascia, muscle, and now and then a rib with its shadow (anatomy as in Graff's VICTRE
phantoms, 2016). Textures are drawn on a straight grid and then bent with the layers, and a little more in each place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

OUTSIDE, SKIN, FAT, SEPTUM, GLAND, FASCIA, MUSCLE, RIB = range(8)
TISSUES = ("outside", "skin", "fat", "septum", "gland", "fascia", "muscle", "rib")
"""Names of a label map's values."""

PARAMETERS: dict[str, tuple[float, float]] = {
    # Thicknesses and depths are shares of the image's height.
    "skin": (0.012, 0.06),
    "fat": (0.02, 0.40),
    "gland": (0.05, 0.70),
    "behind": (0.0, 0.12),
    "muscle": (0.05, 0.45),
    "wave": (0.003, 0.06),
    "tilt": (-0.18, 0.18),
    # Sizes of textures are shares of the image's longer side; the rest is decibels or a share.
    "bend": (0.0, 0.12),
    "bend_size": (0.10, 0.40),
    "lobule": (0.05, 0.20),
    "lobule_aspect": (1.5, 6.0),
    "septum_gain": (2.0, 20.0),
    "septum_gaps": (0.1, 0.9),
    "fat_texture": (0.0, 4.0),
    "gland_gain": (1.0, 18.0),
    "gland_texture": (1.0, 9.0),
    "gland_grain": (0.006, 0.04),
    "gland_aspect": (1.0, 5.0),
    "ducts": (0.02, 0.40),
    "duct_size": (0.008, 0.035),
    "duct_aspect": (1.2, 5.0),
    "duct_drop": (2.0, 18.0),
    "muscle_gain": (-14.0, 4.0),
    "streak_width": (0.002, 0.0055),
    "streak_aspect": (5.0, 20.0),
    "fat_streaks": (0.0, 7.0),
    "gland_streaks": (0.0, 8.0),
    "muscle_streaks": (2.5, 9.0),
    "fascia_gain": (2.0, 18.0),
    "skin_gain": (4.0, 18.0),
    "rib": (-1.0, 1.0),
    "shadows": (-1.0, 0.8),
    "shadow_drop": (1.0, 16.0),
    "contact": (0.0, 14.0),
    "contact_width": (0.03, 0.25),
    "attenuation": (-4.0, 45.0),
    "bow": (0.6, 4.0),
    "haze": (0.0, 4.5),
    "haze_size": (0.08, 0.4),
    "axial": (0.5, 0.8),
    "lateral": (1.0, 1.7),
    "spread": (0.0, 1.2),
    "compound": (0.5, 0.9),
    "floor": (-40.0, -12.0),
    "range": (36.0, 66.0),
    "level": (0.2, 0.65),
}
"""Least and greatest value of each parameter; a logistic curve takes normals to between them."""

FIELDS, OTHERS = 12, 360
"""How many fields a phantom has, speckle included, and how many normals its curves, shadows and ribs take at most."""

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
        self.rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
        self.columns = np.arange(width, dtype=np.float32)[None] + 0.5
        down, along = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        self._squares = [((np.pi * part) ** 2).astype(np.float32) for part in (down, along)]

    def normals(self, *shape: int) -> NDArray[np.float32]:
        """The next standard normals."""
        size = int(np.prod(shape))
        found = self._normals[self._used : self._used + size].reshape(shape)
        self._used += size
        return found

    def field(self, tall: float, wide: float, rough: bool = False) -> NDArray[np.float32]:
        """Noise ``(height, width)`` of zero mean and unit variance, correlated over these pixels of the image's side.

        Smooth as a Gaussian, or ``rough``: with detail of all sizes below, whose amplitude falls as frequency to 1.5.
        """
        tall, wide = tall * self.side, wide * self.side
        real, imaginary = self.normals(2, self.height, self.width // 2 + 1)
        spectrum = real + 1j * imaginary
        # Of a very smooth field there is little but its mean, which would be hundreds of deviations.
        spectrum[0, 0] = 0.0
        squares = self._squares[0] * np.float32(tall**2) + self._squares[1] * np.float32(wide**2)
        window = (1.0 + 2.0 * squares) ** -0.75 if rough else np.exp(-squares)
        found = np.fft.irfft2(spectrum * window, (self.height, self.width)).astype(np.float32)
        return found / max(float(found.std()), 1e-6)

    def curve(self, amplitude: float, waves: int = 4, fall: float = 1.0) -> Floats:
        """A curve over the columns, ``(width,)``, in rows; ``amplitude`` is a share of the height.

        It has that many ``waves``, whose amplitude falls with that power of their number.
        """
        weights = self.normals(2, waves) / np.arange(1, waves + 1) ** fall
        angles = np.pi * np.arange(1, waves + 1)[:, None] * (self.columns[0] / self.width)
        found = amplitude * self.height * (weights[0] @ np.cos(angles) + weights[1] @ np.sin(angles))
        return np.asarray(found, np.float32)


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
        p, c, height = self.p, self.canvas, self.canvas.height
        tilt = p["tilt"] * height * (c.columns[0] / c.width - 0.5)
        skin = p["skin"] * height + c.curve(0.001)
        chest = skin + (p["fat"] + p["gland"] + p["behind"]) * height + c.curve(p["wave"], 6, 2.0) + tilt
        # Where ligaments hold it, gland reaches up in peaks.
        fat = np.maximum(skin + 1, skin + p["fat"] * height + c.curve(p["wave"], 16, 1.3) + 0.5 * tilt)
        gland = np.maximum(fat, chest - np.maximum(p["behind"] * height + c.curve(0.5 * p["wave"], 8, 2.0), 0.0))
        fascia = np.maximum(gland, chest)
        muscle = fascia + p["muscle"] * height + c.curve(0.5 * p["wave"], 4, 2.0)
        labels = np.full((height, c.width), MUSCLE, np.uint8)
        for label, below in ((FAT, fascia), (GLAND, gland), (FAT, fat), (SKIN, skin)):
            labels[c.rows < below] = label
        return labels, {"skin": skin, "fat": fat, "gland": gland, "fascia": fascia, "muscle": muscle}

    def decibels(self) -> NDArray[np.float32]:
        """Backscatter of every pixel, ``float32 (height, width)``; writes septa, fascia and ribs into the labels."""
        p, c = self.p, self.canvas
        fat, gland, muscle = (
            ndimage.gaussian_filter((self.labels == kind).astype(np.float32), 1.0) for kind in (FAT, GLAND, MUSCLE)
        )
        bent = self._bending()
        fine = bent(c.field(p["gland_grain"], p["gland_aspect"] * p["gland_grain"], rough=True))
        holes = bent(c.field(p["duct_size"], p["duct_size"] * p["duct_aspect"]))
        edge = float(np.quantile(holes[::3, ::3], 1.0 - p["ducts"]))
        level = p["gland_gain"] + p["gland_texture"] * fine - p["duct_drop"] * np.clip(2.0 * (holes - edge), 0.0, 1.0)
        # Muscle grows dark by and by, sooner in some places, so that no edge is sharper than the fascia itself.
        within = (c.rows - self.depth["fascia"]) / c.height
        sinks = np.clip(within / 0.16 + 0.25 * fine, 0.0, 1.0)
        level = level * gland + p["fat_texture"] * fine * (fat + muscle)
        level += (0.3 * p["gland_gain"] * (1.0 - sinks) + p["muscle_gain"] * sinks) * muscle
        tall, crowds = p["streak_width"], np.clip(1.0 + 0.8 * c.field(0.04, 0.10), 0.0, 2.0)
        # Of fat and gland a few bright ones, of muscle one beside the other.
        short, long = (
            bent(np.clip(c.field(tall, tall * p["streak_aspect"] * longer) - least, 0.0, 1.8)) * crowds
            for longer, least in ((1.0, 0.5), (2.0, 0.1))
        )
        level += short * (p["fat_streaks"] * fat + p["gland_streaks"] * gland)
        level += p["muscle_streaks"] * (0.6 + 0.8 * np.exp(-np.abs(within) / 0.1)) * long * muscle
        self._septa(level, bent, fat)
        self._lines(level)
        self._rib(level)
        return np.asarray(level, np.float32)

    def _bending(self) -> Any:
        """What bends a texture: with the layers, and as far again in each place."""
        p, c, wide = self.p, self.canvas, self.p["bend_size"]
        down = p["bend"] * wide * c.side * c.field(0.7 * wide, wide)
        down += (self.depth["fascia"] - self.depth["fascia"].mean()) * np.clip(c.rows / self.depth["fascia"], 0.0, 1.0)
        places = (c.rows - 0.5 - down).astype(np.float32)
        above = np.floor(places).astype(np.intp)
        share = places - above
        above, below = above % c.height, (above + 1) % c.height

        def bent(field: Floats) -> Floats:
            upper = np.take_along_axis(field, above, 0)
            return np.asarray(upper + share * (np.take_along_axis(field, below, 0) - upper))

        return bent

    def _septa(self, level: NDArray[np.float32], bent: Any, fat: Floats) -> None:
        """Thin bright boundaries of lobules: where smooth fields change sign; brighter across the beam, with gaps."""
        p, c = self.p, self.canvas
        tall = p["lobule"] / p["lobule_aspect"]
        line = np.zeros_like(level)
        for _ in range(2):
            field = bent(c.field(tall, p["lobule"]))
            down, along = np.gradient(field)
            slope = down**2 + along**2 + 1e-9
            line = np.maximum(line, np.exp(-0.5 * field**2 / slope) * (0.15 + 0.85 * (down**2 / slope) ** 2))
        line *= np.clip(1.0 + c.field(0.03, 0.06, rough=True) - 2.0 * (p["septum_gaps"] - 0.5), 0.0, 1.6) * fat
        level += p["septum_gain"] * line
        self.labels[(line > 0.5) & (self.labels == FAT)] = SEPTUM

    def _lines(self, level: NDArray[np.float32]) -> None:
        """Skin's two bright surfaces and the bright lines at the layers' boundaries, which fade in and out."""
        p, c = self.p, self.canvas
        level += p["skin_gain"] * (self.labels == SKIN) * (0.4 + 0.6 * np.exp(-((c.rows / 1.5) ** 2)))
        skin, fascia = 0.8 * p["skin_gain"], p["fascia_gain"]
        gains = {"skin": skin, "fat": fascia, "gland": 0.7 * fascia, "fascia": fascia, "muscle": fascia}
        # How much of a line is there; the last is the pleura's, where the chest wall ends.
        for (name, gain), whole in zip(gains.items(), (0.9, 0.5, 0.5, 0.7, 0.0), strict=True):
            strength = np.clip(whole + c.curve(0.8, 24) / c.height, 0.0, 1.2)
            line = np.exp(-0.5 * ((c.rows - self.depth[name]) / (0.002 * c.side + 0.4)) ** 2) * strength
            level += gain * line
            if name == "fascia":
                self.labels[line > 0.5] = FASCIA

    def _rib(self, level: NDArray[np.float32]) -> None:
        """A bright arc with a shadow below it, in some images."""
        c = self.canvas
        place, size = c.normals(2)
        if self.p["rib"] < 0.45:
            return
        middle = c.width / (1.0 + np.exp(-1.7 * float(place)))
        half = c.side * (0.10 + 0.05 * abs(float(size)))
        apart = (c.columns[0] - middle) / half
        top = self.depth["muscle"] + 0.5 * half * apart**2
        inside = (np.abs(apart) < 1.0)[None] & (c.rows > top)
        shadow = inside * np.clip((c.rows - top) / (0.12 * c.height), 0.0, 1.0)
        level -= 12.0 * ndimage.gaussian_filter1d(shadow, 0.04 * c.side, axis=1)
        arc = np.exp(-0.5 * ((c.rows - top) / (0.003 * c.side + 0.5)) ** 2)
        level += 15.0 * arc * np.clip(2.0 - 2.0 * np.abs(apart), 0.0, 1.0)
        self.labels[inside & (c.rows < top + 0.5 * half)] = RIB
