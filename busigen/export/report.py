"""What an export proved, as tables: for a model card, and for a file of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from busigen.errors import OutputError, UsageError
from busigen.export.counts import KINDS
from busigen.export.parity import LIMITS
from busigen.registry import LESION_CLASSES
from busigen.runtime.atomic import atomic_path

ENDINGS = (".md", ".json")
"""Kinds of reports, by the file's ending."""

_HEADERS = {
    "dice": "smallest Dice",
    "boundary": "largest boundary distance (95 %, pixels)",
    "psnr": "smallest PSNR (dB)",
    "ssim": "smallest SSIM",
    "max_grey_difference": "largest grey difference",
    "psnr_end_to_end": "PSNR end to end, 5th percentile (dB)",
    "same_gates": "gates alike",
}


def check_report(path: Path) -> None:
    """Refuse a report that could not be written, before the export that it is about.

    Raises:
        UsageError: its ending is not one of ``ENDINGS``.
        OutputError: its folder is not there.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"--report {path} ends with neither {' nor '.join(ENDINGS)}.", fix="Name it report.md.")
    if not path.parent.is_dir():
        raise OutputError(f"--report {path}: {path.parent} is no folder.", fix="Create it, or name another.")


def write_report(path: Path, info: Mapping[str, Any]) -> None:
    """Write what an export proved, as Markdown or as JSON.

    Args:
        path: its ending says which.
        info: the content of ``bundle.json``.
    """
    if path.suffix == ".json":
        keys = ("preset", "target", "precision", "opset", "loop", "batch_sizes", "components", "fused", "parity")
        text = json.dumps({key: info[key] for key in keys}, indent=1) + "\n"
    else:
        text = report(info)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", fix="Name another --report.") from error


def report(info: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    asked = f"precision {info['precision']}, opset {info['opset']}, solver {info['loop']}"
    return f"""# Export of preset {info["preset"]}: {asked}

{parity_table(info["parity"])}

{unproved(info["parity"])}

{limits_table()}

{precision_table(info["components"])}

{counts_table(info["fused"])}
"""


def parity_table(parity: Mapping[str, Any]) -> str:
    """PyTorch against each target, per class."""
    header = ["target", "class", "images compared", "equal masks", *_HEADERS.values()]
    rows = [
        [
            target,
            label,
            f"{found[label]['images_compared']} of {found[label]['draws']}",
            f"{found[label]['equal_masks']} of {found[label]['masks_compared']}",
            *(f"{found[label][name]:.4g}" for name in _HEADERS),
        ]
        for target, found in parity["targets"].items()
        for label in LESION_CLASSES
    ]
    return _table(header, rows)


def unproved(parity: Mapping[str, Any]) -> str:
    """Which targets were not compared, and why; empty where all were, or an older export did not record it."""
    told = "; ".join(f"{name} ({reason})" for name, reason in parity.get("unproved", {}).items())
    return told and f"Not compared: {told}."


def limits_table() -> str:
    """What every draw must reach, and why."""
    rows = [
        [_HEADERS[name], f"{'at least' if limit.least else 'at most'} {limit.value:g}", limit.why]
        for name, limit in LIMITS.items()
    ]
    return _table(["figure", "limit", "reason"], rows)


def precision_table(components: Mapping[str, Any]) -> str:
    """Each component's precision, and what was tried before it."""
    rows = []
    for name, found in components.items():
        for tried in found["tried"]:
            error = "" if tried["error"] is None else f"{tried['error']:.3f}"
            rows.append([name, tried["precision"], error, tried["refused"] or "taken"])
    return _table(["component", "precision", "error, as a share of its limit", "outcome"], rows)


def counts_table(fused: Mapping[str, Mapping[str, int]]) -> str:
    """Nodes of each graph as ONNX Runtime's CPU provider optimises it."""
    kinds = ["nodes", *KINDS]
    return _table(["graph", *kinds], [[name, *(str(found[kind]) for kind in kinds)] for name, found in fused.items()])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
