"""The preset ``sd15`` at the true size of Stable Diffusion 1.5, with random weights: memory, seconds, bytes.

python benchmarks/stable_diffusion.py --work FOLDER         all steps, about half an hour of two cores, 12 GB of disk
python benchmarks/stable_diffusion.py --work FOLDER --only base checkpoint export

The base is made once (2 GB in fp16). Each step runs in a process of its own, whose peak memory is its own word. Random
weights draw nothing: only costs are measured, and whether graphs give what PyTorch gives.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import RESULTS, about, write

STEPS, DRAWS = {256: 4, 512: 2}, 1
"""Evaluations of either stage by the side of its windows, and draws per class that are compared with PyTorch."""


def base(work: Path) -> dict[str, Any]:
    """A diffusers folder of the true architecture, fp16."""
    from tests.harness import stable_diffusion as harness

    harness.write_folder(work / "base", variant="fp16", true_size=True)
    return {"bytes": sum(path.stat().st_size for path in (work / "base").rglob("*") if path.is_file())}


def train(work: Path) -> dict[str, Any]:
    """LoRA steps of one adapter: batch 2, windows shown at 256 pixels, gradient checkpointing."""
    from busigen.data.prepare import prepare
    from busigen.export.import_bundle import opened_base
    from busigen.training.pipeline import train as run
    from busigen.training.stable_diffusion.painter import asked_of
    from busigen.training.trainer import Trainer
    from tests.harness.synthetic_datasets import draw_pairs

    seconds: list[float] = []
    step = Trainer._train_step

    def timed(self: Trainer) -> float:
        started = time.monotonic()
        loss = step(self)
        seconds.append(time.monotonic() - started)
        return loss

    Trainer._train_step = timed  # type: ignore[method-assign]
    if not (work / "prepared").exists():
        prepare([draw_pairs(work / "clinic", seed=5, count=12)], work / "prepared")
    asked = asked_of(str(work / "base"), None, prompts=(), context=True, shown_at=256)
    with opened_base(Path("default")) as start:
        assert start is not None
        recipe = start.recipe("sd15")
        task = replace(recipe.tasks[0], steps=4, batch=2, warmup=1, variants=1)
        run(work / "prepared", work / "trained", replace(recipe, tasks=(task,)), base=start, **asked)
    return {"seconds_per_step": seconds[1:], "steps": len(seconds), "batch": 2}


def checkpoint(work: Path) -> dict[str, Any]:
    """Checkpoints with random adapters, whose windows are shown at 256 and at 512 pixels."""
    from tests.harness import painting

    for side in (256, 512):
        if not (work / f"checkpoint{side}").exists():
            painting.untrained(work / f"checkpoint{side}", work / "base", shown_at=side)
    folder = work / "checkpoint256" / "adapters"
    return {"adapters_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


def _export(work: Path, side: int) -> dict[str, Any]:
    started = time.monotonic()
    name = f"bundle{side}"
    _command(
        *("export", work / f"checkpoint{side}", "--out", work / name, "--base-model", work / "base"),
        *("--steps", f"lesion={STEPS[side]}", "--steps", f"blend={STEPS[side]}", "--draws", DRAWS),
    )
    info = json.loads((work / name / "bundle.json").read_text())
    seen = {
        graph: sum((work / name / file).stat().st_size for file in entry["files"])
        for graph, entry in info["graphs"].items()
    }
    return {
        "seconds": time.monotonic() - started,
        "bytes": sum(path.stat().st_size for path in (work / name).iterdir()),
        "bytes_if_every_graph_had_its_own": sum(seen.values()),
        "files": len(list((work / name).iterdir())),
        "parity": {
            label: {k: figures[k] for k in ("psnr", "ssim", "dice")}
            for label, figures in info["parity"]["targets"]["cpu"].items()
        },
    }


def export(work: Path) -> dict[str, Any]:
    """Export at 256 pixels, with parity on one draw a class."""
    return _export(work, 256)


def export512(work: Path) -> dict[str, Any]:
    """The same at 512 pixels."""
    return _export(work, 512)


def _generate(work: Path, side: int, count: int) -> dict[str, Any]:
    started = time.monotonic()
    out = work / f"pairs{side}"
    _command("generate", "--count", count, "--out", out, "--bundle", work / f"bundle{side}", "--batch-size", 2)
    seconds = time.monotonic() - started
    _command("verify", out)
    return {"pairs": count, "seconds_with_opening": seconds}


def generate(work: Path) -> dict[str, Any]:
    """Pairs of windows shown at 256 pixels."""
    return _generate(work, 256, 4)


def generate512(work: Path) -> dict[str, Any]:
    """Pairs of windows shown at 512 pixels."""
    return _generate(work, 512, 1)


def engines(work: Path) -> dict[str, Any]:
    """Engines of TensorRT for RTX, which builds without a card."""
    started = time.monotonic()
    command = ("build-engines", "--bundle", work / "bundle256", "--target", "tensorrt-rtx", "--batch-size", 2)
    place = ("--compute-capability", 8.9, "--out", work / "engines")
    done = subprocess.run(
        [sys.executable, "-m", "busigen.cli", *map(str, (*command, *place))],
        capture_output=True,
        text=True,
        check=False,
    )
    said = (done.stdout if done.returncode == 0 else done.stderr).splitlines()[-12:]
    return {"code": done.returncode, "seconds": time.monotonic() - started, "said": said}


ORDER: dict[str, Callable[[Path], dict[str, Any]]] = {
    step.__name__: step for step in (base, train, checkpoint, export, export512, generate, generate512, engines)
}


def _command(*arguments: object) -> None:
    """Run busigen here, so that its memory is this process's."""
    from busigen.cli import app

    app([str(argument) for argument in arguments], standalone_mode=False)


def main() -> None:
    """Run each step in a process of its own and write what was measured; or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the base, checkpoints and bundles")
    parser.add_argument("--only", nargs="+", choices=ORDER, default=list(ORDER), help="steps, in their order")
    parser.add_argument("--step", choices=ORDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.step:
        from busigen.runtime.backends.probe import peak_memory

        logging.basicConfig(level=logging.INFO)
        found = ORDER[options.step](options.work)
        (options.work / f"{options.step}.json").write_text(json.dumps({**found, "peak_memory": peak_memory()}))
        return
    for name in options.only:
        subprocess.run([sys.executable, __file__, "--work", str(options.work), "--step", name], check=True)
        print(name, (options.work / f"{name}.json").read_text(), flush=True)
    known = {name: options.work / f"{name}.json" for name in ORDER}
    found = {name: json.loads(path.read_text()) for name, path in known.items() if path.exists()}
    write(RESULTS / "stable_diffusion.json", {**about(), "steps": STEPS, "draws": DRAWS, **found})


if __name__ == "__main__":
    main()
