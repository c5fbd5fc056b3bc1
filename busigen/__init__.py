"""busigen: healthy breast-ultrasound images in, benign or malignant ones with their exact lesion mask out."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # Type checkers take it for true by its name; importing typing would take twice as long as this.
if TYPE_CHECKING:
    from typing import Any

    from busigen.api.functions import audit as audit
    from busigen.api.functions import explain as explain
    from busigen.api.functions import generate as generate
    from busigen.api.functions import grid as grid
    from busigen.api.functions import prepare as prepare
    from busigen.api.functions import verify as verify
    from busigen.api.functions import write as write
    from busigen.api.pairs import Dataset as Dataset
    from busigen.api.pairs import Pair as Pair
    from busigen.errors import BusigenError as BusigenError

__version__ = "0.1.0"
RELEASED = "2026-12-01"  # this version, as in CITATION.cff

SILENCE = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}
"""What keeps libraries from reporting home, whatever the environment said before: medical images are about. ONNX
Runtime posts paths, the machine's identity and names of graphs. It reads this once, when it is imported, so it is set
here, which every process passes first; whatever a process starts inherits it."""

REPORTED = "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY") != "1"
"""Whether ONNX Runtime was imported before busigen, and may have reported what it does at that moment."""

os.environ.update(SILENCE)
if REPORTED:
    # At least no more than that: names of graphs, run times and error messages would follow with the sessions.
    sys.modules["onnxruntime"].disable_telemetry_events()

_OFFERED = {
    "BusigenError": "errors",
    **dict.fromkeys(("Dataset", "Pair"), "api.pairs"),
    **dict.fromkeys(("audit", "explain", "generate", "grid", "prepare", "verify", "write"), "api.functions"),
    "torch": "torch",
}  # what can be asked of the package, by the module that is imported when it is; docs/python.md


def __getattr__(name: str) -> Any:
    """One of `_OFFERED`."""
    if name not in _OFFERED:
        raise AttributeError(f"module 'busigen' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"busigen.{_OFFERED[name]}")
    found = globals()[name] = module if name == _OFFERED[name] else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
