"""What is measured on every image: names, units, meanings, and what a difference from real images says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DEPTH_BANDS = 6
"""Bands of equal depth in the depth-intensity profile."""

_NAKAGAMI = "Shankar 2000, IEEE Trans. UFFC 47"
_RAYLEIGH = "Wagner et al. 1983, IEEE Trans. Sonics Ultrasonics 30"
_WELCH = "Welch 1967, IEEE Trans. Audio Electroacoustics 15"
_FOURIER = "Zahn and Roskies 1972, IEEE Trans. Computers 21"
_BIRADS = "BI-RADS Atlas 2013, ultrasound lexicon"


@dataclass(frozen=True)
class Feature:
    """One measurement.

    Attributes:
        name: Column of the table: ``region_measure``.
        label: For people.
        region: ``image``, ``background``, ``ring``, ``lesion``, ``outline`` or ``posterior``.
        unit: ``px``, ``dB``, ... or empty.
        meaning: What it measures.
        more: What it says about a set when it is greater than in real images; completes "The images ...".
        less: The same when it is smaller.
        source: Where the method comes from; empty for our own.
    """

    name: str
    label: str
    region: str
    unit: str
    meaning: str
    more: str
    less: str
    source: str = ""


# Measure, label, unit, meaning, more, less, source; "{}" is the region.
_TEXTURE = (
    (
        *("contrast", "speckle contrast", "", "standard deviation over mean of the envelope, median of 16 px blocks"),
        *("have more contrasty speckle in the {} than real", "have flatter speckle in the {} than real", _RAYLEIGH),
    ),
    (
        *("kurtosis", "envelope kurtosis", "", "fourth standardised moment of the envelope, median of 16 px blocks"),
        *("have more bright specks in the {} than real", "have fewer bright specks in the {} than real", _RAYLEIGH),
    ),
    (
        *("nakagami", "Nakagami m", "log10", "E[A^2]^2 / Var[A^2] of the envelope A, median of 16 px blocks, log10"),
        *("have more uniform speckle in the {} than real", "have more clustered speckle in the {} than real"),
        _NAKAGAMI,
    ),
    (
        *("axial", "axial speckle width", "px", "width at half maximum of the autocovariance along the beam"),
        "have speckle in the {} that is too long along the beam: smoothed or stretched",
        "have speckle in the {} that is too short along the beam: noisy, sharpened or squashed",
        _RAYLEIGH,
    ),
    (
        *("lateral", "lateral speckle width", "px", "width at half maximum of the autocovariance across the beam"),
        "have speckle in the {} that is too wide across the beam: smoothed or stretched",
        "have speckle in the {} that is too narrow across the beam: noisy, sharpened or squashed",
        _RAYLEIGH,
    ),
    (
        *("anisotropy", "lateral / axial width", "", "ratio of the two autocovariance widths"),
        "have speckle in the {} that is wider for its length than a real beam makes it",
        "have speckle in the {} that is rounder, or more upright, than a real beam makes it",
        _RAYLEIGH,
    ),
    (
        *("fine", "fine-grain share", "", "share of the detrended variance that a 3 x 3 binomial filter removes"),
        *("are grainier in the {} than real", "are smoother in the {} than real", ""),
    ),
)

# Name, label, region, unit, meaning, more, less, source.
_WHOLE = (
    (
        *("image_slope", "power-spectrum slope", "image", ""),
        "exponent of the power law between 0.05 and 0.40 cycles/px",
        "lose too little power towards fine detail: noisy or sharpened",
        *("lose too much power towards fine detail: smoothed", _WELCH),
    ),
    (
        *("image_high", "power above half Nyquist", "image", "", "share of the power above 0.25 cycles/px"),
        *("are noisier than real above half Nyquist", "are smoother than real above half Nyquist", _WELCH),
    ),
    (
        *(
            "image_blocks",
            "8 px grid",
            "image",
            "",
            "excess of steps between pixels on a grid of 8 px over the steps beside them",
        ),
        *("show a grid of 8 px: JPEG's blocks or an autoencoder's cells", "show less of a grid of 8 px than real", ""),
    ),
    (
        *("image_mean", "mean grey", "image", "grey", "mean grey level outside lesion and ring"),
        *("are brighter than real", "are darker than real", ""),
    ),
    (
        *("image_spread", "grey spread", "image", "grey", "standard deviation of grey outside lesion and ring"),
        *("have stronger contrast between tissues than real", "have weaker contrast between tissues than real", ""),
    ),
)

_TILT = (
    *("depth_tilt", "brightness, deep minus shallow", "image", ""),
    "mean grey of the lower half over the image's mean, minus the same of the upper half",
    *("lose too little brightness with depth", "lose too much brightness with depth", ""),
)

_LESION = (
    (
        *("margin_contrast", "ring-to-lesion contrast", "outline", "dB", "mean of the ring over mean of the lesion"),
        "have lesions too dark for their surroundings",
        *("have lesions too bright for their surroundings, or outlines that miss them", _BIRADS),
    ),
    (
        *("margin_sharpness", "margin sharpness", "outline", "dB", "3 px outside over 3 px inside the outline"),
        *("have sharper margins than real", "have more blurred margins than real, or outlines that miss them"),
        _BIRADS,
    ),
    (
        *("margin_step", "step at the outline", "outline", ""),
        "steps between pixels across the outline over steps beside it",
        *("have a seam along the outline", "have less of an edge along the outline than real", ""),
    ),
    (
        *("margin_offset", "outline offset", "outline", "px"),
        "shift of the outline that maximises the change across it",
        *("have outlines that lie beside the lesion", "have outlines that fit closer than annotators draw them", ""),
    ),
    (
        *("posterior_index", "posterior enhancement", "posterior", "dB"),
        "below the lesion over beside that, at equal depth",
        "have too much enhancement, or too little shadow, below lesions",
        *("have too much shadow, or too little enhancement, below lesions", _BIRADS),
    ),
    (
        *("shape_area", "area", "outline", "", "lesion over image"),
        *("have larger lesions than real", "have smaller lesions than real", ""),
    ),
    (
        *("shape_taller", "height / width", "outline", "", "of the bounding box"),
        *("have taller lesions than real", "have flatter lesions than real", _BIRADS),
    ),
    (
        *("shape_circularity", "circularity", "outline", "", "4 pi A / P^2 with Crofton's perimeter"),
        *("have outlines rounder than real", "have outlines less round than real", ""),
    ),
    (
        *("shape_solidity", "solidity", "outline", "", "area over that of the convex hull"),
        *("have outlines less lobed than real", "have outlines more lobed than real", ""),
    ),
    (
        *("shape_roughness", "boundary roughness", "outline", "", "Fourier descriptors 5 to 24 over the first"),
        *("have outlines rougher than real", "have outlines smoother than real", _FOURIER),
    ),
    (
        *("shape_ripple", "boundary ripple", "outline", "", "Fourier descriptors 15 to 50 over the first"),
        *(
            "have outlines more jagged than annotators draw them",
            "have outlines drawn more evenly than by hand",
            _FOURIER,
        ),
    ),
    (
        *("shape_depth", "depth of centroid", "outline", "", "0 at the upper edge of the image, 1 at the lower"),
        *("have lesions too deep", "have lesions too shallow", ""),
    ),
    (
        *("shape_lateral", "lateral position", "outline", "", "0 at the left edge of the image, 1 at the right"),
        *("have lesions too far right", "have lesions too far left", ""),
    ),
)


def _table() -> Iterator[Feature]:
    for region in ("background", "ring", "lesion"):
        for measure, label, unit, meaning, more, less, source in _TEXTURE:
            name, label = f"{region}_{measure}", f"{label}, {region}"
            yield Feature(name, label, region, unit, meaning, more.format(region), less.format(region), source)
    for row in _WHOLE:
        yield Feature(*row)
    for band in range(1, DEPTH_BANDS + 1):
        yield Feature(
            name=f"depth_{band}",
            label=f"brightness at depth {band}/{DEPTH_BANDS}",
            region="image",
            unit="",
            meaning="mean grey of a band of equal depth over the image's mean, lesions left out",
            more=f"are too bright at depth {band}/{DEPTH_BANDS}",
            less=f"are too dark at depth {band}/{DEPTH_BANDS}",
        )
    yield Feature(*_TILT)
    for row in _LESION:
        yield Feature(*row)


NAMES: dict[str, Feature] = {feature.name: feature for feature in _table()}
"""Every feature, in the order of the table's columns."""
