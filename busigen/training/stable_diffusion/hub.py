"""Bases of the Hugging Face hub: of one revision, the files that are needed, in the hub's own cache."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from busigen.errors import BusigenError, InputError, OutputError
from busigen.runtime.execution.estimate import free_space
from busigen.text import disk_size
from busigen.training.stable_diffusion.base_model import CONFIGURATIONS, CONVERT, WEIGHTS, BaseModel, settings_of

log = logging.getLogger("busigen.training")

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)@([\w-][\w./-]*)", flags=re.ASCII)
_TOKENIZER = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
_OTHERS = ("README.md", *CONFIGURATIONS.values(), *(f"tokenizer/{name}" for name in _TOKENIZER))
_CHOICES = {
    part: [f"{part}/{stem}{variant}.safetensors" for variant in ("", ".fp16")] for part, stem in WEIGHTS.items()
}
"""Files of a part's weights, the first of which is taken that is there."""

_LONGEST = 200  # Letters of what the hub's library said.
_FOLDER = "Name a folder or .safetensors file that is here, or NAME/MODEL@REVISION of the hub (docs/sd15.md)."


def open_base(text: str, config: Path | None = None) -> BaseModel:
    """The base that a user names: a path, or ``NAME/MODEL@REVISION``, which is downloaded where no such path exists.

    An InputError is that of :meth:`BaseModel.open`, or says that it is neither, that the hub does not have it or cannot
    be reached; an OutputError, that the hub's cache has no room for it.
    """
    place, found = Path(text), _ID.fullmatch(text)
    if place.exists() or found is None:
        if found is None and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not place.exists():
            problem = f"there is no base model at {text}, and for one of the hub the revision is missing."
            raise InputError(problem, fix=f"Name the commit or tag that you want: {text}@REVISION.")
        return BaseModel.open(place, config)
    name, revision = found.groups()
    folder = _fetched(name, revision)
    # A branch or tag may be moved; the cache names folders by their commit.
    return replace(BaseModel.open(folder), source=f"{name}@{folder.name}")


def _fetched(name: str, revision: str) -> Path:
    """The folder of the hub's cache with a model's files."""
    asked = f"{name}@{revision}"
    try:
        with _refusals(asked):
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except BusigenError:
        raise
    except Exception as error:  # Which library speaks to the hub, and what it raises, depends on the version.
        return _cached(name, revision, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    chosen = _chosen(sizes, asked)
    # It is a path where a file is cached, and something else where not.
    cached = {file for file in chosen if isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)}
    missing = sum(sizes[file] for file in chosen if file not in cached)
    cache = Path(constants.HF_HUB_CACHE)
    if missing and (free := free_space(cache)) < missing:
        raise OutputError(
            f"{asked} takes {disk_size(missing)} in {cache}, which has {disk_size(free)} free.",
            fix="Free some space, or name another place by the variable HF_HOME.",
        )
    if not sys.stderr.isatty():
        disable_progress_bars()  # They would fill a log.
    if missing:
        log.info("downloading %s, commit %s: %s to %s", asked, info.sha, disk_size(missing), cache)
    try:
        with _refusals(asked):
            if missing:
                # Its configuration first, which may say that the rest is of no use.
                settings_of(Path(snapshot_download(name, revision=revision, allow_patterns=list(_OTHERS))))
            return Path(snapshot_download(name, revision=revision, allow_patterns=chosen))
    except BusigenError:
        raise
    except Exception as error:
        raise InputError(
            f"{asked} was not downloaded: {_reason(error)}.", fix="Give the same command again, which continues it."
        ) from error


@contextmanager
def _refusals(asked: str) -> Iterator[None]:
    """A context that words what the hub refuses as InputErrors; what else fails is the caller's."""
    try:
        yield
    except GatedRepoError as error:
        fix = "Ask for access on its page, and log in with 'hf auth login'."
        raise InputError(f"{asked} is given by the hub only to those who have access.", fix=fix) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        what = "no such revision" if isinstance(error, RevisionNotFoundError) else "no such model, or it is private"
        raise InputError(f"there is no base model at {asked}, and the hub has {what}.", fix=_FOLDER) from error


def _chosen(names: Collection[str], asked: str) -> list[str]:
    """Of a model's files those that are needed; an InputError where there are no weights that can be read."""
    chosen = [name for name in _OTHERS if name in names]
    for part, choices in _CHOICES.items():
        weights = next((name for name in choices if name in names), None)
        if weights is None:
            pickle = any(name.startswith(f"{part}/") and name.endswith((".bin", ".ckpt", ".pt")) for name in names)
            kind = ", but a pickle, which may run any program when it is read" if pickle else ""
            raise InputError(f"{asked} has no {choices[0]}{kind}.", fix=CONVERT if pickle else _FOLDER)
        chosen.append(weights)
    return chosen


def _cached(name: str, revision: str, error: Exception) -> Path:
    """The folder of the cache where the hub cannot be asked; an InputError where it was not downloaded before."""
    unet = try_to_load_from_cache(name, CONFIGURATIONS["unet"], revision=revision)
    if not isinstance(unet, str):
        raise InputError(
            f"there is no base model at {name}@{revision}, and the hub cannot be asked for it: {_reason(error)}.",
            fix="Connect to it, or name a folder or .safetensors file that is here.",
        ) from error
    log.info("the hub cannot be asked (%s); %s@%s was downloaded before", _reason(error), name, revision)
    return Path(unet).parents[1]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:_LONGEST]
