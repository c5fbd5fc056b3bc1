"""busigen: healthy breast-ultrasound images in, benign or malignant ones with their exact lesion mask out."""

from __future__ import annotations

import os
import sys

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
