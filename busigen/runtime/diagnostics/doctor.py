"""``busigen doctor``: what this machine can run, what it cannot and why, and what helps.

``python -m busigen.runtime.diagnostics.doctor PROVIDER`` draws two samples of the shipped bundle.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import busigen
from busigen import SILENCE
from busigen.errors import BusigenError, OutputError
from busigen.registry import LESION_CLASSES, MIN_BATCH, PROVIDERS, Provider
from busigen.runtime.backends.base import FALLBACK, usable_cores
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.memory import available_memory
from busigen.runtime.backends.probe import answer, driver_cuda, gpus, probe, tried_apart
from busigen.runtime.execution.estimate import BYTES_PER_SAMPLE, free_space
from busigen.runtime.storage.files import existing
from busigen.text import counted, disk_size, install_command

ROW_MEMORY = 16 << 20
"""Bytes to reckon with per image of a batch. The shipped bundle's graphs take 4.3 MB on the processor (peak memory at
batches of 32 and of 8 images, ONNX Runtime 1.31); a card's libraries want room to work in beside that."""

FIXED_MEMORY = 1 << 30  # bytes for the graphs' weights, CUDA's context and its libraries
_FEW_ROWS, _FEW_SAMPLES = 16, 1000  # batch size and samples for which there should be room in memory and on the disk
_CGROUP = Path("/sys/fs/cgroup")

Installed = dict[str, str]  # distributions by their names as PyPI writes them, with their versions


class State(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    OFF = "off"  # not for this machine, which lacks the card that it is for
    WARNING = "warning"  # `generate` runs, but slower than it could, or not with everything that is installed
    PROBLEM = "problem"  # `generate` cannot run


@dataclass(frozen=True)
class Finding:
    """One thing that was examined: its name, what was found, and what helps, if anything has to be done."""

    name: str
    state: State
    described: str
    fix: str = ""


def _finding(name: str, described: str, fix: str = "") -> Finding:
    """A warning if something helps, else a finding that all is well."""
    return Finding(name, State.WARNING if fix else State.OK, described, fix)


def examine(out: Path) -> Iterator[Finding]:
    """Examine everything, one thing after the other; ``out`` is where datasets would go."""
    yield _finding("busigen", f"{busigen.__version__}, Python {platform.python_version()}")
    packages = _installed()
    imported, cuda = _onnxruntime()
    card = driver_cuda() is not None or bool(gpus())
    yield _onnxruntimes(packages, imported)
    yield _reporting(busigen.REPORTED)
    try:
        graphs = Bundle.open(default_bundle()).info["graphs"]
        yield _finding("bundle", f"{len(graphs)} graphs, every file as it was shipped")
    except BusigenError as error:
        yield Finding("bundle", State.PROBLEM, error.problem, "Install busigen again.")
    yield from _driver(cuda)
    if card:
        yield _cuda_libraries(packages, cuda)
    yield from _tensorrts(packages, os.environ.get("LD_LIBRARY_PATH", ""))
    works = []
    for provider in PROVIDERS.values():
        name, found = f"--provider {provider.name}", probe(provider)
        if found.works:
            works.append(provider.name)
            yield _finding(name, f"works, on {found.described}")
        elif provider.name == FALLBACK:
            yield Finding(name, State.PROBLEM, found.described, found.fix)
        else:
            yield Finding(name, State.WARNING if card else State.OFF, found.described, found.fix if card else "")
    if FALLBACK in works:
        # What no hash and no network of one node shows: whether the shipped bundle's graphs can be loaded and run here.
        found = tried_apart(PROVIDERS[FALLBACK], __name__)
        described = f"{found.described} on the processor, with the shipped bundle" if found.works else found.described
        yield Finding("generate", State.OK if found.works else State.PROBLEM, described, found.fix)
    if works:
        yield _finding("auto", f"--provider auto takes {works[-1]}")
    if version := packages.get("torch"):
        if card and version.endswith("+cpu"):
            described = f"torch {version} is a build without CUDA: train and audit would not use the card"
            fix = "Run `pip install --force-reinstall torch` without an index of CPU builds."
            yield _finding("PyTorch", described, fix)
        else:
            yield _finding("PyTorch", f"torch {version}; generate does without")
    yield _processor()
    if (free := available_memory()) is not None:
        fix = "Give a smaller --batch-size, and one worker." if largest_batch(free) < _FEW_ROWS else ""
        yield _finding("memory", f"{disk_size(free)} free", fix)
    yield _disk(out)


def can_generate(findings: list[Finding]) -> bool:
    """Whether ``generate`` can run, with some provider."""
    return all(finding.state is not State.PROBLEM for finding in findings)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """What ``--json`` prints."""
    listed = [{"name": one.name, "state": one.state, "told": one.described, "fix": one.fix} for one in findings]
    return {"can_generate": can_generate(findings), "findings": listed}


def draw(provider: Provider) -> str:
    """Draw a sample of each class with the shipped bundle, and say in a few words how that went."""
    from busigen.runtime.execution.run import GenerateOptions
    from busigen.runtime.progress import Progress

    count = len(LESION_CLASSES)
    options = GenerateOptions(
        out=Path(), count=count, classes=",".join(LESION_CLASSES), batch_size=count, provider=provider.name
    )
    started = time.perf_counter()
    generated = options.source(Progress()).draw(0, range(count), lambda number: None)
    return f"{counted(len(generated.samples), 'sample')} drawn in {time.perf_counter() - started:.1f} s"


def _installed() -> Installed:
    """Everything on Python's path; of two versions of one thing, the one that is imported."""
    found: Installed = {}
    for distribution in distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        found.setdefault(name, distribution.version)
    return found


def _named(packages: Installed) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _onnxruntime() -> tuple[str | None, str]:
    """Version that loads, None if none does, and the CUDA version that it was built for, if any."""
    try:
        import onnxruntime

        return str(onnxruntime.__version__), str(getattr(onnxruntime, "cuda_version", "") or "")
    except Exception:  # An install whose files are another's raises whatever it comes upon first.
        return None, ""


def _onnxruntimes(packages: Installed, imported: str | None) -> Finding:
    """Whether one ONNX Runtime is installed, and ``imported``, the version that really loads, is its own."""
    name = "onnxruntime install"
    builds = {key: value for key, value in packages.items() if re.fullmatch(r"onnxruntime(-[a-z0-9-]+)?", key)}
    builds.pop("onnxruntime-extensions", None)
    described = _named(builds) or "none that pip knows of"
    fix = f"Run `pip install --force-reinstall --no-deps {next(iter(builds), 'onnxruntime-gpu')}`."
    if len(builds) > 1:
        fix = f"Run `pip uninstall -y {' '.join(builds)}`, then install busigen again, which brings the one that fits."
        described += ": they write into one folder, and the one installed last has overwritten the others"
    elif imported is None:
        described += ", but it cannot be imported"
    elif not builds:
        described = f"{imported}, which pip does not know of"
    elif imported not in builds.values():
        described += f", but {imported} is what loads"
    else:
        return _finding(name, described)
    return Finding(name, State.WARNING if imported else State.PROBLEM, described, fix)


def _reporting(reported: bool) -> Finding:
    """That no library reports home; ``reported``: ONNX Runtime was imported before busigen could turn that off."""
    name, (first, *_) = "reporting home", SILENCE
    if not reported:
        return _finding(name, f"off: {', '.join(f'{switch}={value}' for switch, value in SILENCE.items())}")
    return _finding(
        name,
        "something of this Python imports ONNX Runtime before busigen, and it reports then; nothing does later",
        f"Set {first}=1 in the environment, or take the import out of sitecustomize or the .pth file that has it.",
    )


def _driver(cuda: str) -> Iterator[Finding]:
    """The NVIDIA driver against ``cuda``, which ONNX Runtime was built for, if for any, and each card's memory."""
    name, runs, cards = "NVIDIA driver", driver_cuda(), gpus()
    if runs is None:
        if cards:
            described = f"nvidia-smi lists {cards[0].name}, but the driver's library (libcuda) cannot be loaded"
            fix = "Install the driver's libraries, or start the container with the card (--gpus all)."
            yield _finding(name, described, fix)
        else:
            yield Finding(name, State.OFF, "none is loaded; the processor does the work")
        return
    versions = ", ".join(sorted({card.driver for card in cards})) or "of unknown version"
    if cuda and runs[0] < int(cuda.partition(".")[0]):
        described = f"{versions} runs CUDA {runs[0]}.{runs[1]} at most, and ONNX Runtime is built for CUDA {cuda}"
        yield _finding(name, described, "Update the driver: CUDA 13 needs 580 or newer.")
    else:
        yield _finding(name, f"{versions}, runs CUDA up to {runs[0]}.{runs[1]}")
    if not cards:
        fix = "Look at what nvidia-smi says; in a container, start it with the card."
        yield _finding("GPU", "the driver is loaded, but nvidia-smi lists no card", fix)
    for number, card in enumerate(cards):
        if not card.memory:
            yield _finding(f"GPU {number}", f"{card.name}; it does not tell its memory")
            continue
        batch, free = largest_batch(card.free), f"{disk_size(card.free)} of {disk_size(card.memory)} free"
        less = f"Give --batch-size {max(MIN_BATCH, batch)} or less"
        fix = f"{less}, or end what holds its memory (nvidia-smi shows it)." if batch < _FEW_ROWS else ""
        yield _finding(f"GPU {number}", f"{card.name}, {free}: room for --batch-size {batch} or so", fix)


def largest_batch(free: int) -> int:
    """The largest power of two, up to 1024, of images at a time that so many bytes probably hold; 0 if not even 2."""
    rows = (free - FIXED_MEMORY) // ROW_MEMORY
    return 0 if rows < MIN_BATCH else 1 << min(10, int(rows).bit_length() - 1)


def _cuda_libraries(packages: Installed, cuda: str) -> Finding:
    """Whether CUDA's packages are of the major version of ``cuda``, which ONNX Runtime was built for, if for any."""
    name, install = "CUDA packages", install_command("cuda")
    if not cuda:
        return _finding(name, "this ONNX Runtime is a build without CUDA", f"Run {install}.")
    major = cuda.partition(".")[0]
    found: dict[str, list[str]] = {}
    for key, version in sorted(packages.items()):
        if key.startswith(("nvidia-cublas", "nvidia-cudnn", "nvidia-cuda-runtime", "nvidia-curand")):
            suffix = re.search(r"-cu(\d+)$", key)
            # Since CUDA 13, all but cuDNN are named without a suffix, and their own version tells; cuRAND counts alone.
            of = suffix[1] if suffix else version.partition(".")[0] if "curand" not in key else major
            found.setdefault(of, []).append(f"{key} {version}")
    others = ", ".join(text for of, texts in found.items() if of != major for text in texts)
    if major in found:
        return _finding(name, ", ".join(found[major]) + (f"; beside them, for others: {others}" if others else ""))
    if others:
        return _finding(name, f"{others}, but ONNX Runtime needs CUDA {major}'s", f"Run {install}.")
    described = f"none from pip; CUDA {major} and cuDNN 9 have to come from the system"
    return _finding(name, described, f"If --provider cuda does not work, run {install}.")


def _tensorrts(packages: Installed, library_path: str) -> Iterator[Finding]:
    """Whether each TensorRT's packages are of one version and one CUDA, and LD_LIBRARY_PATH has no other of them."""
    rtx = {key: value for key, value in sorted(packages.items()) if key.startswith("tensorrt-rtx")}
    plain = {k: v for k, v in sorted(packages.items()) if k.startswith("tensorrt") and k not in rtx and "llm" not in k}
    for name, extra, parts in (
        ("TensorRT packages", "tensorrt", plain),
        ("TensorRT-RTX packages", "tensorrt-rtx", rtx),
    ):
        if not parts:
            continue
        described = _named(parts)
        fix = f"Run `pip uninstall -y {' '.join(parts)}`, then {install_command(extra)}."
        # What is compatible within itself: the first two parts.
        versions = {tuple(value.split(".")[:2]) for value in parts.values()}
        cudas = sorted({found[1] for key in parts if (found := re.search(r"-cu(\d+)", key))})
        if len(versions) > 1:
            yield _finding(name, f"versions are mixed: {described}", fix)
        elif len(cudas) > 1:
            yield _finding(name, f"packages for CUDA {' and '.join(cudas)} are mixed: {described}", fix)
        else:
            yield _finding(name, described)
    majors = {value.partition(".")[0] for value in plain.values()}
    strays = [
        path
        for folder in filter(None, library_path.split(os.pathsep))
        for path in sorted(Path(folder).glob("libnvinfer.so.[0-9]*"))
        if path.suffix[1:].isdigit() and path.suffix[1:] not in majors
    ]
    if plain and strays:
        described = f"{strays[0]} is of another major version than the packages, and is found before them"
        yield _finding("TensorRT libraries", described, f"Take {strays[0].parent} out of LD_LIBRARY_PATH.")


def _processor() -> Finding:
    """Cores that this process may use, and whether a limit on its time makes that many threads wait."""
    cores = usable_cores()
    described = f"{cores} of {os.cpu_count() or 1} cores, as many compute threads"
    try:  # Control groups, version 2.
        limit, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        quota = float(cores) if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        quota = float(cores)
    if quota >= cores - 0.01:
        return _finding("processor", described)
    described += f", but this container may use the time of {quota:g}: the threads would wait for each other"
    return _finding("processor", described, f"Give --threads {max(1, int(quota))}.")


def _disk(out: Path) -> Finding:
    """Whether a dataset could be written into ``out``, and how many samples have room there."""
    folder = existing(out)
    fix = "Free some space, or choose another --out."
    try:
        free = free_space(out)
        # Something in it: an empty file fits on a full disk.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(BYTES_PER_SAMPLE))
    except OutputError as error:
        return Finding("disk", State.PROBLEM, error.problem.rstrip("."), error.fix)
    except OSError as error:
        return Finding("disk", State.PROBLEM, f"{folder} cannot be written to: {error.strerror}", fix)
    samples = free // BYTES_PER_SAMPLE
    described = f"{disk_size(free)} free in {folder}: room for some {samples:,} samples"
    return _finding("disk", described, fix if samples < _FEW_SAMPLES else "")


if __name__ == "__main__":
    answer(sys.argv[1], draw)
