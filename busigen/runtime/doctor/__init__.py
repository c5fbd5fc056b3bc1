"""``busigen doctor``: what this machine can run, why not, and what helps."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import busigen
from busigen.errors import BusigenError
from busigen.registry import PROVIDERS, Provider
from busigen.runtime.backend import FALLBACK
from busigen.runtime.bundle import Bundle, default_bundle
from busigen.runtime.doctor.finding import Finding, State
from busigen.runtime.doctor.installs import cuda_libraries, installed, onnxruntimes, reporting, tensorrts, torch_build
from busigen.runtime.doctor.surroundings import disk, driver, memory, processor
from busigen.runtime.nvidia import cards, driver_cuda
from busigen.runtime.probing import probe, tried_apart

__all__ = ["Finding", "State", "can_generate", "examine", "to_json"]


def examine(out: Path) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    Args:
        out: where datasets would go.
    """
    yield Finding("busigen", State.OK, f"{busigen.__version__}, Python {platform.python_version()}")
    packages = installed()
    imported, cuda = _onnxruntime()
    card = driver_cuda() is not None or bool(cards())
    yield onnxruntimes(packages, imported)
    yield reporting(busigen.REPORTED)
    yield _bundle()
    yield from driver(cuda)
    if card:
        yield cuda_libraries(packages, cuda)
    yield from tensorrts(packages, os.environ.get("LD_LIBRARY_PATH", ""))
    works = []
    for provider in PROVIDERS.values():
        finding = _provider(provider, card)
        yield finding
        works += [provider.name] if finding.state is State.OK else []
    if FALLBACK in works:
        yield _generate()
    if works:
        yield Finding("auto", State.OK, f"--provider auto takes {works[-1]}")
    yield from filter(None, (torch_build(packages, card), processor(), memory(), disk(out)))


def can_generate(findings: list[Finding]) -> bool:
    """Whether `generate` can run, with some provider."""
    return all(finding.state is not State.PROBLEM for finding in findings)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {"can_generate": can_generate(findings), "findings": [asdict(finding) for finding in findings]}


def _onnxruntime() -> tuple[str | None, str]:
    """Version that loads, ``None`` where none does, and the CUDA version that it was built for, if any."""
    try:
        import onnxruntime

        return str(onnxruntime.__version__), str(getattr(onnxruntime, "cuda_version", "") or "")
    except Exception:  # An install whose files are another's raises whatever it comes upon first.
        return None, ""


def _bundle() -> Finding:
    try:
        bundle = Bundle.open(default_bundle())
    except BusigenError as error:
        return Finding("bundle", State.PROBLEM, error.problem, "Install busigen again.")
    return Finding("bundle", State.OK, f"{len(bundle.info['graphs'])} graphs, every file as it was shipped")


def _generate() -> Finding:
    """What no hash and no network of one node tells: whether the shipped bundle's graphs can be loaded and run here."""
    found = tried_apart(PROVIDERS[FALLBACK], "busigen.runtime.doctor.rehearsal")
    told = f"{found.told} on the processor, with the shipped bundle" if found.works else found.told
    return Finding("generate", State.OK if found.works else State.PROBLEM, told, found.fix)


def _provider(provider: Provider, card: bool) -> Finding:
    name, found = f"--provider {provider.name}", probe(provider)
    if found.works:
        return Finding(name, State.OK, f"works, on {found.told}")
    if provider.name == FALLBACK:
        return Finding(name, State.PROBLEM, found.told, found.fix)
    return Finding(name, State.WARNING if card else State.OFF, found.told, found.fix if card else "")
