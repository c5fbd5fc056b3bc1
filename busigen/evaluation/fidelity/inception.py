"""Inception's features of both sets, where somebody brought its weights. Nothing is ever downloaded.

A TorchScript file is a program, and this module runs it. Its code is refused where it names an operation on files or on
other machines; that narrows what a hostile file can do and does not make one safe.
"""

from __future__ import annotations

import ast
import logging
import re
import zipfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from busigen.errors import BusigenError, InputError, MissingDependencyError
from busigen.evaluation.context import AuditContext, Figure, ImageSet, Interval
from busigen.evaluation.statistics import grouped
from busigen.evaluation.statistics.grouped import Rows
from busigen.foreign import open_file
from busigen.text import install_command

log = logging.getLogger("busigen.evaluation")

BATCH = 32

_MAX_BYTES = 1 << 30  # Largest file of weights that is read, packed and unpacked; Inception's take a tenth
SPLITS = 10  # Parts over which the Inception score is averaged (Salimans et al. 2016)
CACHED_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's converted TensorFlow Inception, in torch hub's folder of checkpoints."""

_ABSENT = (
    "FID, KID and the Inception score were not computed, because Inception's weights are not at hand and the audit "
    "downloads nothing. Two ways to provide them: --inception PATH with a TorchScript Inception (such as "
    f"inception-2015-12-05.pt); or busigen[fid] installed and {CACHED_WEIGHTS} in torch hub's folder of checkpoints."
)

_FORBIDDEN = re.compile(r"\b(save|from_file|rpc_sync|rpc_async|rpc_remote|c10d|_c10d_functional|torch\.classes)\b")
"""What TorchScript can write and read files with, reach other machines with, and bind foreign classes with."""

LOADING_ERRORS = (
    BusigenError, RuntimeError, OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, EOFError,
    UnpicklingError,
)  # fmt: skip
"""What weights that are damaged, or of another version, fail with. Not worth a whole section."""

_Extract = Callable[[Any], tuple[Any, Any]]
"""Maps ``uint8 (N, 3, H, W)`` to features and to the logarithm of class probabilities (or None)."""


class Network(NamedTuple):
    """A network and its weights' file name, or neither, and the report's sentence about them."""

    extract: _Extract | None
    source: str | None
    text: str


class Features(NamedTuple):
    """``float64 (N, D)`` features of both sets, and log-probabilities of both where the network gives them."""

    synthetic: NDArray[np.float64]
    real: NDArray[np.float64]
    logits: list[NDArray[np.float64]]


def load(context: AuditContext) -> Network:
    """The network at ``context.inception``, a program which is run, or else the one in the library's own cache.

    Raises one of ``LOADING_ERRORS`` where the weights cannot be used.
    """
    path = context.inception
    extract = _cached(context.device) if path is None else _torchscript(path, context.device)
    if extract is None:
        return Network(None, None, _ABSENT)
    source = CACHED_WEIGHTS if path is None else path.name
    text = (
        f"FID, KID and their companions rest on {source}. Inception was trained on photographs, so small differences "
        "between them say little about ultrasound."
    )
    return Network(extract, source, text)


def try_load(context: AuditContext) -> Network:
    """The same; weights that cannot be used are logged at once, and become the report's sentence."""
    try:
        return load(context)
    except LOADING_ERRORS as error:
        text = not_computed(error)
        log.warning("%s", text)
        return Network(None, None, text)


def not_computed(error: Exception) -> str:
    """The report's sentence for weights that failed."""
    return f"FID, KID and the Inception score were not computed: {_reason(error)}"


def _reason(error: Exception) -> str:
    # PyTorch's messages go on for pages of C++.
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def features_of(context: AuditContext, network: Network) -> Features | None:
    """Features of both sets; None where there is no network. Raises `InputError` where they are not finite."""
    if network.extract is None:
        return None
    parts = [_run(network.extract, images, context) for images in (context.synthetic, context.real)]
    if not all(np.isfinite(features).all() for features, _ in parts):
        raise InputError(f"{network.source} gives features that are not finite.", fix="Use other weights.")
    return Features(parts[0][0], parts[1][0], [logits for _, logits in parts if logits is not None])


def _run(
    extract: _Extract, images: ImageSet, context: AuditContext
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    import torch
    from torch.nn import functional

    features, logits = [], []
    starts = range(0, len(images), BATCH)
    with torch.inference_mode():
        for start in context.track(f"Inception on {images.name}", starts, len(starts)):
            grey = torch.from_numpy(images.images[start : start + BATCH]).to(context.device)[:, None].float()
            # torchmetrics' own preparation: antialiased, to Inception's 299 pixels.
            resized = functional.interpolate(grey, (299, 299), mode="bilinear", align_corners=False, antialias=True)
            batch = resized.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
            found, log_probabilities = extract(batch)
            features.append(found.double().cpu().numpy())
            if log_probabilities is not None:
                logits.append(log_probabilities.double().cpu().numpy())
    return np.concatenate(features), np.concatenate(logits) if logits else None


def library_figures(features: Features, synthetic: Rows, real: Rows, context: AuditContext) -> list[Figure]:
    """FID over all images, which papers print, and Inception score of some rows of both sets, by torchmetrics."""
    import torch

    identity = torch.nn.Identity()
    identity.num_features = features.real.shape[1]
    fid = _torchmetrics("fid").FrechetInceptionDistance(feature=identity)
    fid.set_dtype(torch.float64)
    fid.update(torch.from_numpy(features.real[real]), real=True)
    fid.update(torch.from_numpy(features.synthetic[synthetic]), real=False)
    note = "biased by sample size, so no floor: judge by the Frechet distance between samples of one size"
    key, counts = "fidelity.inception.all.fid.all_images", (len(synthetic), len(real))
    figures = [Figure(key, "FID over all images", Interval(float(fid.compute())), None, *counts, note=note)]
    if len(features.logits) < 2:
        return figures
    groups = context.synthetic.groups[synthetic], context.real.groups[real]
    size = grouped.matched_size(*groups)
    logits = features.logits[0][synthetic], features.logits[1][real]
    pairs = list(grouped.draws(*groups, size, context.rng("fidelity", "inception score"), 20))
    splits = context.rng("fidelity", "inception splits")
    scores = [[_score(part[rows], splits) for part, rows in zip(logits, pair, strict=True)] for pair in pairs]
    value, floor = (grouped.middle(list(column)) for column in zip(*scores, strict=True))
    note = f"never flagged: it has no notion of ultrasound; floor: real images; {size} images each"
    key = "fidelity.inception.all.score.value"
    return [*figures, Figure(key, "Inception score", value, floor, *counts, better="near", note=note)]


def _torchmetrics(name: str) -> Any:
    try:
        return import_module(f"torchmetrics.image.{name}")
    except ImportError as error:
        raise MissingDependencyError(
            f"FID and the Inception score need torchmetrics, which cannot be imported ({error})",
            fix=f"Run {install_command('eval')}; where torch-fidelity lacks torchvision, {install_command('fid')}.",
        ) from error


def _score(logits: NDArray[np.float64], rng: np.random.Generator) -> float:
    import torch

    score = _torchmetrics("inception").InceptionScore(feature=torch.nn.Identity(), splits=min(SPLITS, len(logits)))
    score.update(torch.from_numpy(logits))
    # torchmetrics deals the images to the splits by the process's own generator, and has no option for another.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return float(score.compute()[0])


def _refuse_file_operations(path: Path, fix: str) -> None:
    """Read the program before anything of it runs: loading alone may run its ``__setstate__``."""
    import torch

    # PyTorch's own reader, so that what is read here is what is run later, whatever the archive's quirks.
    reader = torch._C.PyTorchFileReader(str(path))
    records = reader.get_all_records()
    # Lookups ignore case, so listing must too.
    code = [reader.get_record(name).decode() for name in records if name.lower().endswith(".py")]
    if not code or any(name.lower() == "model.json" for name in records):
        raise InputError(f"{path} is not a TorchScript file of this age: it holds no code where that belongs.", fix=fix)
    for text in code:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"{path} holds code that cannot be read.", fix=fix) from error
        # getattr takes a name as a string, which escapes can hide from a search in the text.
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for part in (text, *strings):
            if found := _FORBIDDEN.search(part):
                raise InputError(
                    f"{path} is refused: the program in it names {found[0]}, which reads or writes files or reaches "
                    "beyond this process.",
                    fix=f"Do not use this file. {fix}",
                )


def _torchscript(path: Path, device: str) -> _Extract:
    import torch

    fix = "Give a TorchScript Inception, such as inception-2015-12-05.pt."
    try:
        with open_file(path, limit=_MAX_BYTES) as file, zipfile.ZipFile(file) as archive:
            # Its code is compressed, and a few kilobytes can unpack to gigabytes.
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise ValueError(f"it unpacks to more than {_MAX_BYTES:,} bytes")
        _refuse_file_operations(path, fix)
        network = torch.jit.load(str(path), map_location=device).eval()
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.", fix=fix) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", fix=fix) from error
    except (ValueError, zipfile.BadZipFile, RuntimeError) as error:
        raise InputError(f"{path} is not a TorchScript file ({_reason(error)}).", fix=fix) from error
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
        raise InputError(f"{path} does not take uint8 images of shape (N, 3, 299, 299).", fix=fix) from error
    if not isinstance(trial, torch.Tensor) or trial.ndim != 2 or len(trial) != 2:
        raise InputError(f"{path} does not give one feature vector per image.", fix=fix)
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
    build = _torchmetrics("fid").NoTrainInceptionV3
    network = build("inception-v3-compat", ["2048", "logits_unbiased"], str(path)).to(device)

    def extract(batch: Any) -> tuple[Any, Any]:
        features, logits = network._torch_fidelity_forward(batch)
        return features, logits.log_softmax(dim=1)

    return extract
