"""Inception's features of both sets, where somebody brought its weights. Nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import InputError, MissingDependencyError
from busigen.evaluation.comparing import matched
from busigen.evaluation.comparing.statistics import Rows
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.results import Figure, Interval
from busigen.runtime.install import install_command

BATCH = 32
SPLITS = 10
"""Parts over which the Inception score is averaged (Salimans et al. 2016)."""

CACHED_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's converted TensorFlow Inception, in torch hub's folder of checkpoints."""

_ABSENT = (
    "FID, KID and the Inception score were not computed, because Inception's weights are not at hand and the audit "
    "downloads nothing. Two ways to provide them: --inception PATH with a TorchScript Inception (such as "
    f"inception-2015-12-05.pt); or busigen[fid] installed and {CACHED_WEIGHTS} in torch hub's folder of checkpoints."
)

_Extract = Callable[[Any], tuple[Any, Any]]
"""Maps ``uint8 (N, 3, H, W)`` to features and to the logarithm of class probabilities (or None)."""


@dataclass(frozen=True)
class Inception:
    """What came of the search for weights.

    Attributes:
        source: File name of the weights, or None.
        text: A sentence for the report.
        synthetic: ``float64 (N, D)`` features of the synthetic set, or None.
        real: The same of the real set.
        logits: Log-probabilities of the synthetic and the real set, where the network gives them.
    """

    source: str | None
    text: str
    synthetic: NDArray[np.float64] | None = None
    real: NDArray[np.float64] | None = None
    logits: list[NDArray[np.float64]] = field(default_factory=list)


def features_of(context: AuditContext) -> Inception:
    """Features of both sets by the network at ``context.inception``, or else by the one in the library's own cache.

    Raises:
        InputError: ``context.inception`` cannot be used.
    """
    if context.inception is not None:
        extract, source = _torchscript(context.inception, context.device), context.inception.name
    else:
        found = _cached(context.device)
        if found is None:
            return Inception(None, _ABSENT)
        extract, source = found, CACHED_WEIGHTS
    parts = [_extract(extract, images, context) for images in (context.synthetic, context.real)]
    logits = [logit for _, logit in parts if logit is not None]
    text = (
        f"FID, KID and their companions rest on {source}. Inception was trained on photographs, so small differences "
        "between them say little about ultrasound."
    )
    return Inception(source, text, parts[0][0], parts[1][0], logits)


def library_figures(network: Inception, synthetic: Rows, real: Rows, context: AuditContext) -> list[Figure]:
    """FID and Inception score by torchmetrics.

    FID over all images is what papers print; it has no floor, because no two halves of the real set are that large.

    Args:
        network: With features.
        synthetic: Rows that are compared.
        real: Likewise.
        context: The audit.
    """
    import torch

    assert network.synthetic is not None and network.real is not None
    identity = torch.nn.Identity()
    identity.num_features = network.real.shape[1]
    fid = _torchmetrics("fid").FrechetInceptionDistance(feature=identity)
    fid.set_dtype(torch.float64)
    fid.update(torch.from_numpy(network.real[real]), real=True)
    fid.update(torch.from_numpy(network.synthetic[synthetic]), real=False)
    figures = [
        Figure(
            key="fidelity.inception.all.fid.all_images",
            label="FID over all images",
            value=Interval(float(fid.compute())),
            floor=None,
            synthetic=len(synthetic),
            real=len(real),
            note="biased by sample size, so no floor: judge by the Frechet distance between samples of one size",
        )
    ]
    if len(network.logits) == 2:
        groups = context.synthetic.groups[synthetic], context.real.groups[real]
        size = matched.matched_size(*groups)
        rng = context.rng("fidelity", "inception score")
        logits = network.logits[0][synthetic], network.logits[1][real]
        pairs = list(matched.draws(*groups, size, rng, 20))
        scores = [[_score(part[rows]) for part, rows in zip(logits, pair, strict=True)] for pair in pairs]
        value, floor = (
            Interval(*np.percentile(column, [50.0, 2.5, 97.5]).tolist()) for column in zip(*scores, strict=True)
        )
        figures.append(
            Figure(
                key="fidelity.inception.all.score.value",
                label="Inception score",
                value=value,
                floor=floor,
                synthetic=len(synthetic),
                real=len(real),
                better="near",
                note=f"never flagged: it has no notion of ultrasound; floor: real images; {size} images each",
            )
        )
    return figures


def _torchmetrics(name: str) -> Any:
    try:
        return import_module(f"torchmetrics.image.{name}")
    except ImportError as error:
        raise MissingDependencyError(
            f"FID and the Inception score need torchmetrics, which cannot be imported ({error})",
            fix=f"Run {install_command('eval')}; where torch-fidelity lacks torchvision, {install_command('fid')}.",
        ) from error


def _score(logits: NDArray[np.float64]) -> float:
    import torch

    score = _torchmetrics("inception").InceptionScore(feature=torch.nn.Identity(), splits=min(SPLITS, len(logits)))
    score.update(torch.from_numpy(logits))
    return float(score.compute()[0])


def _torchscript(path: Path, device: str) -> _Extract:
    import torch

    fix = "Give a TorchScript Inception, such as inception-2015-12-05.pt."
    if not path.is_file():
        raise InputError(f"there is no file {path}", fix=fix)
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise InputError(f"{path} is not a TorchScript file ({str(error).splitlines()[0]})", fix=fix) from error
    options = {argument.name for argument in network.forward.schema.arguments}

    def extract(batch: Any) -> tuple[Any, Any]:
        if "return_features" not in options:
            return network(batch), None
        features = network(batch, return_features=True)
        # Without the last layer's bias, as in the original Inception score.
        kwargs = {"no_output_bias": True} if "no_output_bias" in options else {}
        return features, network(batch, **kwargs).clamp_min(1e-30).log()

    try:
        with torch.inference_mode():
            trial = extract(torch.zeros((2, 3, 299, 299), dtype=torch.uint8, device=device))[0]
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{path} does not take uint8 images of shape (N, 3, 299, 299)", fix=fix) from error
    if not isinstance(trial, torch.Tensor) or trial.ndim != 2 or len(trial) != 2:
        raise InputError(f"{path} does not give one feature vector per image", fix=fix)
    return extract


def _cached(device: str) -> _Extract | None:
    if find_spec("torch_fidelity") is None or find_spec("torchvision") is None:
        return None
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / CACHED_WEIGHTS
    if not path.is_file():
        return None
    # torch-fidelity unpickles its weights: refuse first whatever is more than tensors.
    torch.load(path, map_location="cpu", weights_only=True)
    network = (
        _torchmetrics("fid")
        .NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        .to(device)
    )

    def extract(batch: Any) -> tuple[Any, Any]:
        features, logits = network._torch_fidelity_forward(batch)
        return features, logits.log_softmax(dim=1)

    return extract


def _extract(
    extract: _Extract, images: ImageSet, context: AuditContext
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    import torch
    from torch.nn import functional

    found: list[tuple[Any, Any]] = []
    starts = range(0, len(images), BATCH)
    with torch.inference_mode():
        for start in context.track(f"Inception on {images.name}", starts, len(starts)):
            grey = torch.from_numpy(images.images[start : start + BATCH]).to(context.device)[:, None].float()
            # torchmetrics' own preparation: antialiased, to Inception's 299 pixels.
            resized = functional.interpolate(grey, (299, 299), mode="bilinear", align_corners=False, antialias=True)
            batch = resized.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
            features, logits = extract(batch)
            found.append((features.double().cpu().numpy(), None if logits is None else logits.double().cpu().numpy()))
    stacked = np.concatenate([features for features, _ in found])
    known = [logits for _, logits in found if logits is not None]
    return stacked, np.concatenate(known) if len(known) == len(found) else None
