"""What an export found, as Markdown and JSON: parity, precision, fused nodes, and the model card."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from busigen.errors import OutputError, UsageError
from busigen.export.parity import LIMITS
from busigen.files import atomic_path
from busigen.registry import LESION_CLASSES, PAINTING

KINDS = {
    "attention": ("Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention"),
    "normalisation": (
        *("GroupNorm", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
        *("SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization"),
    ),
    "activation": ("BiasGelu", "FastGelu", "Gelu", "QuickGelu"),
    "product": ("FusedConv", "FusedGemm", "FusedMatMul"),
    "softmax": ("Softmax",),
}
"""Operators that count as one kernel for what PyTorch has several of; ``QuickGelu`` is ONNX Runtime's SiLU, too."""


def fused(graph: Path | bytes) -> dict[str, int]:
    """Count the nodes of a graph as ONNX Runtime's CPU provider optimises it, those of a loop's body among them, once.

    ``graph`` is a file, or holds its weights. Gives ``nodes`` in all, and how many there are of each of ``KINDS``.
    """
    with tempfile.TemporaryDirectory(prefix="busigen-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        # Beside it, because a message holds 2 GiB at most.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        # It warns that what it writes is for this machine, which is where it is counted.
        options.log_severity_level = 4
        model = graph if isinstance(graph, bytes) else str(graph)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        outer = onnx.load(str(optimised), load_external_data=False).graph.node
    inner = (node for loop in outer for attribute in loop.attribute for node in attribute.g.node)
    nodes = Counter(node.op_type for node in (*outer, *inner))
    return {"nodes": nodes.total(), **{kind: sum(nodes[name] for name in names) for kind, names in KINDS.items()}}


ENDINGS = (".md", ".json")  # Kinds of reports, by the file's ending.

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

    A UsageError says that its ending is not one of ``ENDINGS``, an OutputError that its folder is not there.
    """
    if path.suffix not in ENDINGS:
        raise UsageError(f"--report {path} ends with neither {' nor '.join(ENDINGS)}.", fix="Name it report.md.")
    if not path.parent.is_dir():
        raise OutputError(f"--report {path}: {path.parent} is no folder.", fix="Create it, or name another.")


def write_report(path: Path, info: Mapping[str, Any]) -> None:
    """Write what an export proved by its ``bundle.json``, as Markdown or as JSON, which the path's ending says."""
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
    options = f"precision {info['precision']}, opset {info['opset']}, solver {info['loop']}"
    return f"""# Export of preset {info["preset"]}: {options}

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
    described = "; ".join(f"{name} ({reason})" for name, reason in parity.get("unproved", {}).items())
    return described and f"Not compared: {described}."


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


def model_card(record: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """A model card in Markdown, of a checkpoint's ``busigen.json`` and a bundle's ``bundle.json``."""
    tasks = "\n".join(
        f"| {name} | {task.get('steps', '')} | {_held_out(task)} | {task['seconds']:.0f} |"
        for name, task in record["tasks"].items()
    )
    images = record["data"].get("images", "unrecorded")
    return f"""# Model card

Preset `{info["preset"]}`, trained on {record["device"]} on the training split of {images} images
(split hash `{info["split_hash"]}`).
{_origin(record.get("base"))}
Solver steps per stage: {", ".join(f"{k} {v}" for k, v in info["solver_steps"].items())}.

| task | steps | held-out loss | seconds (of the last sitting) |
| --- | --- | --- | --- |
{tasks}

PyTorch against the exported graphs over the whole trajectory, same draws:

{parity_table(info["parity"])}

{unproved(info["parity"])}

What each component computes in:

{precision_table(info["components"])}
{_painting(info)}
Not for diagnosis. Lesions painted into a patient's image still hold that patient's pixels.
"""


def _painting(info: Mapping[str, Any]) -> str:
    """What a Stable Diffusion in the bundle is, how it draws, and which terms come with it; empty where none is."""
    found = info.get("painting")
    if found is None:
        return ""
    sums = "\n".join(f"- `{name}`: `{sha256}`" for name, sha256 in sorted(found["sha256"].items()))
    prompts = "\n".join(f"- {label}: `{prompt}`" for label, prompt in found["prompts"].items())
    loras = [[lora["for"] or "all", f"{lora['weight']:g}", f"`{lora['sha256']}`"] for lora in found["loras"]]
    merged = _table(["stage and class", "weight", "sha256"], loras) if loras else "No other LoRAs were merged."
    steps = ", ".join(f"{stage} {info['solver_steps'][stage]}" for stage in PAINTING)
    guidance = "none" if found["guidance"] is None else f"{found['guidance']:g}"
    source = f" (`{found['source']}`)" if found.get("source") else ""
    return f"""
## Stable Diffusion

Stages 2 and 3 are a Stable Diffusion inpainting model{source} with the LoRAs of the training
above. Its files have these sha256:

{sums}

Prompts:

{prompts}

- steps: {steps}; guidance: {guidance}; share of fresh noise: {found["fresh_noise"]:g}
- windows shown at {found["shown_at"]} pixels; ViT tokens: {"yes" if found["context"] else "no"}
- decoder: {found["decoder"]}

{merged}

**Licence of the model:** {found["licence"]}. Where it is one of the OpenRAIL-M licences, its use restrictions travel
with whatever is derived from the model, and this bundle is: whoever passes it on passes on the licence with it, binds
others to the same restrictions, and says what was changed. What it draws may not be used for what they forbid.

**What this does not protect.** The model was trained on images of others, from the web, that busigen has never seen:
how much of these it repeats, `busigen audit` cannot measure, which compares with the training split alone. The LoRAs
have seen patients' images, and what they repeat is what the audit's section on privacy is for.
"""


def _held_out(task: Mapping[str, Any]) -> str:
    """The loss of the weights that were kept; empty for a task that trains none."""
    losses = [loss for _, loss in task.get("validation", ())]
    return f"{min(losses):.4f}" if losses else ""


def _origin(base: Mapping[str, str] | None) -> str:
    """Where the base comes from, if not from the same run: what its images taught it is in the bundle, too."""
    if base is None:
        return ""
    return f"""
These images trained the tasks below. All else is the base's, unchanged: it was trained on the training split with hash
`{base["split_hash"]}`, and its weights have the digest `{base["weights"]}`.
"""
