"""Versions of what a report rests on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    "numpy",
    "scipy",
    "polars",
    "pillow",
    "scikit-image",
    "scikit-learn",
    "torch",
    "torchmetrics",
    "torch-fidelity",
    "monai",
    "matplotlib",
)
"""Distributions whose version a report names, where they are installed."""


def library_versions() -> dict[str, str]:
    """Version of Python and of every installed library of ``LIBRARIES``."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
