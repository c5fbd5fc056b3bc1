"""What is installed, and whether the parts fit each other. Nothing is loaded here but what is told by its files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

from busigen import SILENCE
from busigen.runtime.doctor.finding import Finding, State
from busigen.runtime.install import install_command

Installed = dict[str, str]
"""Distributions by their names as PyPI writes them, with their versions."""


def installed() -> Installed:
    """Everything on Python's path; of two versions of one thing, the one that is imported."""
    found: Installed = {}
    for distribution in distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        found.setdefault(name, distribution.version)
    return found


def onnxruntimes(packages: Installed, imported: str | None) -> Finding:
    """Whether one ONNX Runtime is installed, and its files are its own.

    Args:
        packages: all that is installed.
        imported: the version that really loads; ``None`` where none does.
    """
    name = "onnxruntime install"
    builds = {key: value for key, value in packages.items() if re.fullmatch(r"onnxruntime(-[a-z0-9-]+)?", key)}
    builds = {key: value for key, value in builds.items() if key != "onnxruntime-extensions"}
    told = ", ".join(f"{key} {value}" for key, value in builds.items()) or "none that pip knows of"
    state = State.WARNING if imported else State.PROBLEM
    if len(builds) > 1:
        remove = f"pip uninstall -y {' '.join(builds)}"
        return Finding(
            name,
            state,
            f"{told}: they write into one folder, and the one installed last has overwritten the others",
            f"Run `{remove}`, then install busigen again, which brings the one that fits.",
        )
    if imported is None:
        return Finding(name, State.PROBLEM, f"{told}, but it cannot be imported", _again(builds))
    if not builds:
        return Finding(name, State.WARNING, f"{imported}, which pip does not know of", _again(builds))
    (version,) = builds.values()
    if version != imported:
        return Finding(name, State.WARNING, f"{told}, but {imported} is what loads", _again(builds))
    return Finding(name, State.OK, told)


def reporting(reported: bool) -> Finding:
    """That no library reports home.

    Args:
        reported: whether ONNX Runtime was imported before busigen could turn that off.
    """
    name, (first, *_) = "reporting home", SILENCE
    if reported:
        return Finding(
            name,
            State.WARNING,
            "something of this Python imports ONNX Runtime before busigen, and it reports then; nothing does later",
            f"Set {first}=1 in the environment, or take the import out of sitecustomize or the .pth file that has it.",
        )
    return Finding(name, State.OK, f"off: {', '.join(f'{switch}={value}' for switch, value in SILENCE.items())}")


def cuda_libraries(packages: Installed, cuda: str) -> Finding:
    """Whether CUDA's packages are of the major version that ONNX Runtime was built for.

    Args:
        packages: all that is installed.
        cuda: that version, such as ``13.0``; empty for a build without CUDA.
    """
    name = "CUDA packages"
    if not cuda:
        return Finding(
            name, State.WARNING, "this ONNX Runtime is a build without CUDA", f"Run {install_command('cuda')}."
        )
    major = cuda.partition(".")[0]
    found: dict[str, list[str]] = {}
    for key, version in sorted(packages.items()):
        if key.startswith(("nvidia-cublas", "nvidia-cudnn", "nvidia-cuda-runtime", "nvidia-curand")):
            suffix = re.search(r"-cu(\d+)$", key)
            # Since CUDA 13, all but cuDNN are named without a suffix, and their own version tells; cuRAND counts alone.
            of = suffix[1] if suffix else version.partition(".")[0] if "curand" not in key else major
            found.setdefault(of, []).append(f"{key} {version}")
    others = [text for of, texts in found.items() if of != major for text in texts]
    if others and major not in found:
        told = f"{', '.join(others)}, but ONNX Runtime needs CUDA {major}'s"
        return Finding(name, State.WARNING, told, f"Run {install_command('cuda')}.")
    if major not in found:
        told = f"none from pip; CUDA {major} and cuDNN 9 have to come from the system"
        return Finding(name, State.WARNING, told, f"If --provider cuda does not work, run {install_command('cuda')}.")
    also = f"; beside them, for others: {', '.join(others)}" if others else ""
    return Finding(name, State.OK, ", ".join(found[major]) + also)


def tensorrts(packages: Installed, library_path: str) -> Iterator[Finding]:
    """Whether each TensorRT's packages are of one version and one CUDA, and the system has no other beside them.

    Args:
        packages: all that is installed.
        library_path: folders that the loader looks into before others, as in LD_LIBRARY_PATH.
    """
    rtx = {key: value for key, value in packages.items() if key.startswith("tensorrt-rtx")}
    plain = {k: v for k, v in packages.items() if k.startswith("tensorrt") and k not in rtx and "llm" not in k}
    for name, extra, parts in (
        ("TensorRT packages", "tensorrt", plain),
        ("TensorRT-RTX packages", "tensorrt-rtx", rtx),
    ):
        if not parts:
            continue
        told = ", ".join(f"{key} {value}" for key, value in sorted(parts.items()))
        fix = f"Run `pip uninstall -y {' '.join(sorted(parts))}`, then {install_command(extra)}."
        versions = {_short(value) for value in parts.values()}
        cudas = {found[1] for key in parts if (found := re.search(r"-cu(\d+)", key))}
        if len(versions) > 1:
            yield Finding(name, State.WARNING, f"versions are mixed: {told}", fix)
        elif len(cudas) > 1:
            yield Finding(
                name, State.WARNING, f"packages for CUDA {' and '.join(sorted(cudas))} are mixed: {told}", fix
            )
        else:
            yield Finding(name, State.OK, told)
    majors = {_short(value).partition(".")[0] for value in plain.values()}
    strays = [path for path in _system_tensorrts(library_path) if path.name.rpartition(".")[2] not in majors]
    if plain and strays:
        yield Finding(
            "TensorRT libraries",
            State.WARNING,
            f"{strays[0]} is of another major version than the packages, and is found before them",
            f"Take {strays[0].parent} out of LD_LIBRARY_PATH.",
        )


def torch_build(packages: Installed, card: bool) -> Finding | None:
    """Whether PyTorch, where it is installed, can use the card, where there is one."""
    version = packages.get("torch")
    if version is None:
        return None
    if card and version.endswith("+cpu"):
        return Finding(
            "PyTorch",
            State.WARNING,
            f"torch {version} is a build without CUDA: train and audit would not use the card",
            "Run `pip install --force-reinstall torch` without an index of CPU builds.",
        )
    return Finding("PyTorch", State.OK, f"torch {version}; generate does without")


def _system_tensorrts(library_path: str) -> Sequence[Path]:
    folders = [Path(part) for part in library_path.split(os.pathsep) if part]
    return [
        path for folder in folders for path in sorted(folder.glob("libnvinfer.so.[0-9]*")) if path.suffix[1:].isdigit()
    ]


def _short(version: str) -> str:
    """The first two parts: what is compatible within itself."""
    return ".".join(version.split(".")[:2])


def _again(builds: Installed) -> str:
    name = next(iter(builds), "onnxruntime-gpu")
    return f"Run `pip install --force-reinstall --no-deps {name}`."
