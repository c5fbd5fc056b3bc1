"""Classifiers that separate two sets, the views they look at, and how well they do: folds, scores, AUC and its null."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from monai.networks import nets
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.stats import rankdata
from skimage import measure
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.evaluation.context import ImageSet
from busigen.evaluation.physics.features import bounds, largest_part, square
from busigen.evaluation.statistics.grouped import RESAMPLES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

MARGIN = 1.5  # Side of the lesion crop over the longer side of the lesion's box
SMALLEST = 64  # Pixels of the working frame that a lesion crop spans at least
COARSE = (64, 48)  # Columns and rows at which structure is looked at: speckle is averaged away, layers are not
BAND = 16  # Pixels that the ring reaches inwards and outwards of the outline
RING_LENGTH = 256  # Pixels along the outline; shorter outlines go round again, longer ones are cut
_SMOOTHING = 2.0  # Sigma in pixels of the distance map whose gradient gives the normals, so that they do not cross
RIDGE = 0.1  # Ridge term against a kernel whose diagonal is about one: of 0.001 to 10 what found planted defects best

NETWORKS = {"cuda": "resnet101", "cpu": "resnet18"}
"""The network of Wen et al. 2026 where there is a GPU; one that finishes in hours where not. Weights start random."""

EPOCHS = 20
BATCH = 32
RATE = 3e-4

SCALES = 4  # Octaves of the scattering network: filters span 7, 14, 28 and 56 pixels
ORIENTATIONS = 4

_SIZE = 7
_FREQUENCY = 0.75 * math.pi  # Centre frequency of the Morlet wavelets in radians per pixel (Bruna and Mallat 2013)
_SIGMA = 1.3  # Their width in pixels, that seven pixels hold
_FLOOR = 1e-3  # Below a tenth of a grey level, a response is rounding


@dataclass(frozen=True)
class View:
    """One view: ``cut`` maps image, mask and valid pixels of one frame to ``uint8 (height, width)`` of a fixed size.

    ``cells``: Rows and columns of the grid in which a fixed network's responses are pooled.
    """

    name: str
    label: str
    cut: Callable[[Pixels, Mask, Mask], Pixels]
    cells: tuple[int, int]

    def of(self, images: ImageSet) -> Pixels:
        """``uint8 (N, height, width)``; every mask must hold a lesion, but for `WHOLE`."""
        return np.stack([self.cut(*frame) for frame in zip(images.images, images.masks, images.valid, strict=True)])


def whole(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """The largest centred square inside the letterbox bars, as 192 by 192 pixels."""
    return _crop(image, bounds(valid), math.inf, valid, 192)


def coarse(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """All that lies inside the letterbox bars as 64 by 48 pixels, each the average of what it covers."""
    top, left, bottom, right = bounds(valid)
    return shrunk(image[top:bottom, left:right])


def shrunk(image: Pixels) -> Pixels:
    """An image without bars at `COARSE`."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(COARSE, Image.Resampling.BOX))


def lesion(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """A square around the largest lesion, moved and if need be shrunk to lie on the image, as 128 by 128 pixels."""
    top, left, bottom, right = bounds(largest_part(mask))
    side = max(MARGIN * max(bottom - top, right - left), SMALLEST)
    return _crop(image, (top, left, bottom, right), side, valid, 128)


def _crop(image: Pixels, box: tuple[int, int, int, int], side: float, valid: Mask, to: int) -> Pixels:
    within = bounds(valid)
    top, left, bottom, right = within
    y, x, side = square(box, side, within)
    # Cut to the image first: resampling reaches a pixel beyond its box, which must not be a bar's.
    place = (x - left, y - top, x - left + side, y - top + side)
    part = Image.fromarray(image[top:bottom, left:right])
    return np.asarray(part.resize((to, to), Image.Resampling.BILINEAR, box=place))


def ring(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """The band within ``BAND`` pixels of the largest lesion's outline, unrolled: 32 rows from inside to outside.

    Unrolled along the outline's normals at the image's own pixel scale, the strip shows what lies across the edge and
    not the outline's shape. Where a normal leaves the image, the last pixel is repeated.
    """
    padded = np.pad(largest_part(mask), 1)
    distance = ndimage.distance_transform_edt(~padded) - ndimage.distance_transform_edt(padded)
    slope = np.stack(np.gradient(ndimage.gaussian_filter(distance, _SMOOTHING)))
    outline = max(measure.find_contours(padded.astype(np.float32), 0.5), key=len)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(outline, axis=0).T))])
    places = np.arange(RING_LENGTH) % max(along[-1], 1.0)
    points = np.stack([np.interp(places, along, outline[:, k]) for k in (0, 1)])
    normals = np.stack([ndimage.map_coordinates(slope[k], points, order=1) for k in (0, 1)])
    normals /= np.maximum(np.hypot(*normals), 1e-6)
    offsets = np.arange(-BAND, BAND) + 0.5
    coordinates = points[:, None] - 1 + normals[:, None] * offsets[:, None]
    top, left, bottom, right = bounds(valid)
    coordinates[0] = np.clip(coordinates[0], top, bottom - 1)
    coordinates[1] = np.clip(coordinates[1], left, right - 1)
    strip = ndimage.map_coordinates(image.astype(np.float32), coordinates, order=1)
    return np.asarray(np.rint(strip), dtype=np.uint8)


VIEWS = {
    view.name: view
    for view in (
        View("whole", "whole image", whole, (3, 1)),
        View("coarse", "coarse structure", coarse, (4, 4)),
        View("lesion", "lesion crop", lesion, (3, 3)),
        View("ring", "ring around the outline", ring, (5, 1)),
    )
}

WHOLE = ("whole", "coarse")
"""Views that need no lesion, and show the background as well."""


@dataclass(frozen=True)
class Task:
    """Rows of both sets, joined. ``side``: N, 0 for the first set and 1 for the second. ``label``: N class numbers.

    Rows are compared within their class only, so a different mix of classes cannot tell the sets apart.
    """

    side: Ints
    label: Ints
    group: Ints


def folds(task: Task, count: int, seed: int) -> Ints:
    """The fold in which each row is tested: groups stay together, classes and sides are spread evenly."""
    result = np.zeros(len(task.side), np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # "The least populated class has fewer members than folds": then some folds hold none of it, which is fine.
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, test) in enumerate(splitter.split(task.side, 2 * task.label + task.side, task.group)):
            result[test] = fold
    return result


def auc(scores: Floats, task: Task, fold: Ints, weights: Floats | None = None) -> float:
    """Chance that a row of side 1 scores above one of side 0 **of the same class and fold**; ties count half.

    NaN where no pair exists. ``weights``: N weights, such as how often a bootstrap drew each row.
    """
    above = pairs = 0.0
    stratum = task.label * (int(fold.max()) + 1) + fold
    for value in np.unique(stratum):
        first, second = (np.flatnonzero((stratum == value) & (task.side == side)) for side in (0, 1))
        if weights is None:
            # Mann and Whitney's U by ranks: a permutation test calls this a thousand times.
            ranks = rankdata(scores[np.concatenate([second, first])])[: len(second)]
            above += float(ranks.sum()) - len(second) * (len(second) + 1) / 2
            pairs += len(first) * len(second)
            continue
        difference = np.sign(scores[second][:, None] - scores[first][None, :])
        above += float(weights[second] @ (0.5 + 0.5 * difference) @ weights[first])
        pairs += float(weights[second].sum() * weights[first].sum())
    return above / pairs if pairs else float("nan")


def bootstrap_auc(
    scores: Floats, task: Task, fold: Ints, rng: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of ``auc``: whole groups of each side drawn with replacement, the scores held fixed."""
    _, code = np.unique(task.group, return_inverse=True)
    side_of = np.zeros(code.max() + 1, np.int64)
    side_of[code] = task.side
    values = []
    for _ in range(resamples):
        counts = np.zeros(len(side_of))
        for side in (0, 1):
            members = np.flatnonzero(side_of == side)
            counts += np.bincount(rng.choice(members, len(members)), minlength=len(side_of))
        values.append(auc(scores, task, fold, counts[code]))
    low, high = np.nanpercentile(values, [2.5, 97.5]).tolist()
    return low, high


def shuffled_sides(task: Task, rng: np.random.Generator) -> Ints:
    """Sides exchanged between whole groups of one class: what "both sets are one" allows."""
    _, first, code = np.unique(task.group, return_index=True, return_inverse=True)
    side, label = task.side[first], task.label[first]
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        side[members] = side[rng.permutation(members)]
    return side[code].reshape(len(task.side))


class Ridge:
    """Ridge classifier on fixed features, whose out-of-fold scores are linear in the labels.

    So a permutation test can train anew for every permutation, at the price of a matrix product.
    """

    def __init__(self, features: NDArray[np.float32], task: Task, fold: Ints) -> None:
        self.task, self.fold = task, fold
        scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
        kernel = scaled.astype(np.float64) @ scaled.T.astype(np.float64) / features.shape[1]
        self._map = np.zeros(kernel.shape)
        for value in np.unique(fold):
            test, train = np.flatnonzero(fold == value), np.flatnonzero(fold != value)
            inner = kernel[np.ix_(train, train)]
            centre = inner.mean(0)
            # Both kernels centred at the training rows' mean: an intercept that the ridge term does not shrink.
            inner = inner - centre[None, :] - centre[:, None] + centre.mean()
            outer = kernel[np.ix_(test, train)]
            outer = outer - outer.mean(1, keepdims=True) - centre[None, :] + centre.mean()
            self._map[np.ix_(test, train)] = np.linalg.solve(inner + RIDGE * np.eye(len(train)), outer.T).T

    def scores(self, side: Ints) -> Floats:
        """N out-of-fold scores after training on these sides, each class's share of side 1 taken out."""
        result = np.zeros(len(side))
        for value in np.unique(self.fold):
            test, train = self.fold == value, self.fold != value
            target = np.where(train, side, 0).astype(np.float64)
            for label in np.unique(self.task.label):
                rows = train & (self.task.label == label)
                if rows.any():
                    target[rows] -= target[rows].mean()
            result[test] = self._map[test] @ target
        return result


def scattering_features(
    pixels: Pixels, cells: tuple[int, int], device: str = "cpu", batch: int = 32
) -> NDArray[np.float32]:
    """Logarithms of pooled wavelet moduli up to second order, ``float32 (N, features)``, of ``uint8 (N, H, W)``.

    As in Bruna and Mallat, "Invariant scattering convolution networks", TPAMI 2013, section 2, with an average-pooling
    pyramid in place of low-pass filters. Added are mean and standard deviation of grey levels and the *largest* modulus
    per cell and first-order path. Cells in mirrored columns are averaged: left and right mean nothing in ultrasound.
    """
    bank = _wavelets().to(device)
    parts = []
    for start in range(0, len(pixels), batch):
        block = torch.from_numpy(pixels[start : start + batch].astype(np.float32) / 255.0).unsqueeze(1).to(device)
        with torch.inference_mode():
            parts.append(_features(block, bank, cells).cpu().numpy())
    return np.concatenate(parts)


def _wavelets() -> Tensor:
    """Real and imaginary parts of Morlet wavelets: ``(2 * ORIENTATIONS, 1, 7, 7)``, each of zero mean."""
    grid = torch.arange(_SIZE, dtype=torch.float64) - _SIZE // 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * _SIGMA**2))
    window /= window.sum()
    angles = [math.pi * k / ORIENTATIONS for k in range(ORIENTATIONS)]
    phases = [_FREQUENCY * (x * math.cos(angle) + y * math.sin(angle)) for angle in angles]
    waves = [part(phase) for phase in phases for part in (torch.cos, torch.sin)]
    return torch.stack([window * (wave - (window * wave).sum()) for wave in waves]).unsqueeze(1).float()


def _modulus(maps: Tensor, bank: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C * ORIENTATIONS, H, W)``."""
    batch, channels, height, width = maps.shape
    flat = F.pad(maps.reshape(batch * channels, 1, height, width), (_SIZE // 2,) * 4, mode="reflect")
    parts = F.conv2d(flat, bank).reshape(batch, channels * ORIENTATIONS, 2, height, width)
    return torch.linalg.vector_norm(parts, dim=2)


def _features(pixels: Tensor, bank: Tensor, cells: tuple[int, int]) -> Tensor:
    mean, squares = (F.adaptive_avg_pool2d(maps, cells) for maps in (pixels, pixels**2))
    parts = [mean, torch.log((squares - mean**2).clamp_min(0).sqrt() + _FLOOR)]
    deeper: list[Tensor] = []
    level = pixels
    for _ in range(SCALES):
        first = _modulus(level, bank)
        second = [F.adaptive_avg_pool2d(_modulus(maps, bank), cells) for maps in deeper]
        paths = [F.adaptive_avg_pool2d(first, cells), F.adaptive_max_pool2d(first, cells), *second]
        parts += [torch.log(path + _FLOOR) for path in paths]
        deeper = [F.avg_pool2d(maps, 2) for maps in (*deeper, first)]
        level = F.avg_pool2d(level, 2)
    joint = torch.cat(parts, dim=1)
    joint = (joint + joint.flip(-1)) / 2
    return joint[..., : (cells[1] + 1) // 2].flatten(1)


def network_name(device: str) -> str:
    """Name of the MONAI network that this device trains."""
    return NETWORKS["cuda" if device.startswith("cuda") else "cpu"]


def resnet_scores(
    pixels: Pixels, task: Task, fold: Ints, *, seed: int, device: str = "cpu", epochs: int = EPOCHS
) -> Floats:
    """Out-of-fold logits of "side 1", from one network per fold, for ``uint8 (N, H, W)``.

    Every class and side has the same weight in the loss, so prevalence teaches nothing. Training mirrors left and right
    at random, and scales brightness by up to 10 %, because gain is a knob.
    """
    result = np.zeros(len(pixels))
    for value in np.unique(fold):
        train, test = np.flatnonzero(fold != value), np.flatnonzero(fold == value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000 + int(value))
            network = _trained(pixels[train], task.label[train], task.side[train], device, epochs)
        network.eval()
        with torch.inference_mode():
            for rows in np.array_split(test, max(1, len(test) // BATCH)):
                result[rows] = network(_inputs(pixels[rows], device)).squeeze(1).cpu().numpy()
    return result


def _trained(pixels: Pixels, label: Ints, side: Ints, device: str, epochs: int) -> nn.Module:
    network: nn.Module = getattr(nets, network_name(device))(spatial_dims=2, n_input_channels=1, num_classes=1)
    network.to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    # A batch of one has no variance for batch normalisation: what is left over joins the batch before.
    batches = max(1, len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=epochs * batches)
    stratum = 2 * label + side
    weight = torch.from_numpy((1.0 / np.bincount(stratum)[stratum]).astype(np.float32)).to(device)
    weight = weight / weight.mean()
    target = torch.from_numpy(side.astype(np.float32)).to(device)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).tensor_split(batches):
            images = _inputs(pixels[rows.numpy()], device)
            mirrored = (torch.rand(len(images), 1, 1, 1) < 0.5).to(device)
            images = torch.where(mirrored, images.flip(-1), images)
            images = images * (0.9 + 0.2 * torch.rand(len(images), 1, 1, 1)).to(device)
            loss = F.binary_cross_entropy_with_logits(network(images).squeeze(1), target[rows], weight=weight[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return network


def _inputs(pixels: Pixels, device: str) -> Tensor:
    """Pictures in [-1, 1], ``(N, 1, H, W)``; those lower than 64 rows are doubled in size."""
    images = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).unsqueeze(1).to(device)
    if images.shape[2] < 64:
        images = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
    return images
