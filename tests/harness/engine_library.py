"""TensorRT for RTX in tests: it builds engines on any machine, so the real one is what they use."""

from __future__ import annotations

import pytest

from busigen.errors import MissingDependencyError
from busigen.runtime.backends.tensorrt.library import Library

TARGET = "tensorrt-rtx"


def rtx() -> Library:
    """The real library; the test is skipped where it is not installed."""
    try:
        return Library.load(TARGET)
    except MissingDependencyError as error:
        pytest.skip(f"needs the extra {TARGET}: {error}")
