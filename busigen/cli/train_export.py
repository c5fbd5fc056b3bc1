"""Commands that make a model: prepare, train, export, restore, build-engines; and doctor, for the machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from busigen.cli.app import Interrupted, app, quiet_libraries, stderr, stdout
from busigen.errors import FlaggedError, UsageError, needs
from busigen.registry import (
    DEFAULT_PRESET,
    ENGINE_TARGETS,
    LESION_CLASSES,
    LOOPS,
    OPSETS,
    PARITY_DRAWS,
    PRECISIONS,
    PRESETS,
    PRIOR_START,
    SHOWN_AT,
    STABLE_DIFFUSION,
)
from busigen.text import SHOWN_PROBLEMS, shell_word

if TYPE_CHECKING:
    from busigen.runtime.backends.bundle import Bundle
    from busigen.runtime.backends.tensorrt.engine_builder import BuildRequest, EngineInfo


BASE_MODEL = typer.Option(
    help="With --preset sd15: a Stable Diffusion 1.x inpainting model: a diffusers folder, a .safetensors file, or "
    "NAME/MODEL@REVISION of the Hugging Face hub, which is then downloaded."
)
BASE_CONFIG = typer.Option(help="With a --base-model of one file: a diffusers folder with its configuration.")


@app.command(epilog="Example: `busigen prepare Dataset_BUSI_with_GT BUSBRA --out prepared`")
def prepare(
    sources: Annotated[list[Path], typer.Argument(help="BUSI's or BUS-BRA's folder, or one with images/ and masks/.")],
    out: Annotated[Path, typer.Option(help="Folder to write the table and the letterboxed arrays to.")],
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first file that cannot be used.")] = False,
    mask_values: Annotated[
        str | None,
        typer.Option(
            help="Grey levels of the masks that are lesion, as stored, such as 2 or 1,2; all others are not. [default: "
            "white, or the only label of a mask]"
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames to take of each DICOM file, evenly spaced.")] = 1,
) -> None:
    """Read data sets into one table: classes, patients, near-duplicate groups, splits, overlays."""
    from busigen.data.prepare import prepare as run
    from busigen.runtime.progress import console_progress

    levels = [] if mask_values is None else [level.strip() for level in mask_values.split(",")]
    if not all(level.isdecimal() and 0 < int(level) < 1 << 16 for level in levels):
        raise UsageError(
            f"--mask-values is {mask_values!r}.",
            fix="Give grey levels from 1 to 65535, with commas between, such as 1,2.",
        )
    values = tuple(map(int, levels))
    with console_progress() as progress:
        result = run(
            sources,
            out,
            seed=seed,
            strict=strict,
            mask_values=values,
            frames=frames,
            progress=progress.counter("preparing", "image"),
            looked=progress.counter("looking at DICOM files", "file"),
        )
    stdout.print(f"{result.images} images prepared in {out} ({result.seconds:.0f} s)")
    for name, parts in result.by_class_and_split.items():
        counts = ", ".join(f"{split} {count}" for split, count in sorted(parts.items()))
        stdout.print(f"  {name:10} {sum(parts.values()):6}   {counts}")
    stdout.print(f"  sources: {', '.join(f'{name} {count}' for name, count in result.by_source.items())}")
    stdout.print(f"  groups (patients, near-duplicates): {result.groups}")
    stdout.print(
        f"  images under two classes: {result.conflicts} (the same frame stands under another class as well; they are "
        "kept, but no class is fine-tuned on them)"
    )
    stdout.print(f"  overlays suspected: {', '.join(f'{name} {count}' for name, count in result.overlays.items())}")
    stdout.print(f"  split hash: {result.split_hash}")
    for note in result.notes:
        stdout.print(f"  note: {note}")
    stdout.print(f"  refused: {sum(refusal.count for refusal in result.refused)}")
    for refusal in result.refused[:SHOWN_PROBLEMS]:
        stdout.print(f"    {refusal.file}: {refusal.problem} {refusal.fix}")
    if len(result.refused) > SHOWN_PROBLEMS:
        stdout.print(f"    and {len(result.refused) - SHOWN_PROBLEMS} more, all of them in {out / 'prepared.json'}")


@app.command(
    epilog="Examples: `busigen train --data prepared --out runs/first --preset tiny`; "
    "`busigen train --base runs/first --data prepared_hospital --out runs/hospital` adapts a finished checkpoint to "
    "other images; `busigen train --base default --retrain mask --data prepared --out runs/better` trains stage 1 of "
    "the shipped bundle on; `busigen train --preset sd15 --base-model stable-diffusion-inpainting --data prepared "
    "--out runs/sd` trains LoRAs of a Stable Diffusion (docs/sd15.md)."
)
def train(
    data: Annotated[Path, typer.Option(help="What `busigen prepare` wrote.")],
    out: Annotated[Path, typer.Option(help="The run's folder, which becomes the checkpoint. A rerun continues in it.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint or bundle ('default': the shipped one) whose base is kept as it is: only the adapters are "
            "trained, on --data."
        ),
    ] = None,
    retrain: Annotated[
        list[str] | None,
        typer.Option(
            help="With --base: train this component further, its adapters afresh, and keep all else: mask, lesion, "
            "blend, prior, decoder or finish (the decoder, on what the stages draw). May be repeated."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"Sizes and recipe: {', '.join(PRESETS)}. [default: {DEFAULT_PRESET}, or the base's]"),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on every task's steps; 1 is sized for a GPU.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seeds weights, order, augmentation and noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    base_model: Annotated[str | None, BASE_MODEL] = None,
    base_config: Annotated[Path | None, BASE_CONFIG] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="With --preset sd15: CLASS=TEXT, what Stable Diffusion is asked for. May be repeated."),
    ] = None,
    context: Annotated[
        bool,
        typer.Option(help="With --preset sd15: show Stable Diffusion the healthy image as well, by its ViT tokens."),
    ] = True,
    window: Annotated[
        int,
        typer.Option(help="With --preset sd15: pixels at which windows are shown, 256 or 512."),
    ] = SHOWN_AT[0],
) -> None:
    """Train autoencoder, context encoder, three stages, healthy prior and one LoRA per class, and merge them.

    With --base, only the LoRAs: for a new hospital's images. With --preset sd15, LoRAs of a Stable Diffusion.
    """
    with needs("train"):
        from busigen.export.import_bundle import DEFAULT, opened_base
        from busigen.training.pipeline import train as run
        from busigen.training.recipe import recipe_for
    if retrain and base is None:
        raise UsageError("--retrain needs a --base that has all else.", fix="Name one, or leave --retrain out.")
    painting: dict[str, Any] = {}
    if preset == STABLE_DIFFUSION:
        from busigen.training.stable_diffusion.painter import asked_of

        base = base or Path(DEFAULT)
        painting = asked_of(base_model, base_config, prompts=prompt or (), context=context, shown_at=window)
    elif base_model or base_config or prompt or not context or window != SHOWN_AT[0]:
        problem = "--base-model, --base-config, --prompt, --no-context and --window need --preset sd15."
        raise UsageError(problem, fix="Add it, or leave them out.")
    with quiet_libraries(), opened_base(base) as start:
        prescribe = (
            partial(recipe_for, preset or DEFAULT_PRESET)
            if start is None
            else partial(start.recipe, preset, retrain=retrain or ())
        )
        try:
            recipe = prescribe(seed=seed, scale=scale)
            record = run(data, out, recipe, base=start, device=device, console=stderr, **painting)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted; {out} keeps what was trained.", fix="Run the same command to continue."
            ) from None
    seconds = sum(task["seconds"] for task in record["tasks"].values())
    stdout.print(f"Checkpoint finished in {out}: preset {record['preset']}, {seconds / 60:.1f} minutes of training.")
    named = f" --base-model {shell_word(base_model)}" if base_model else ""
    named += f" --base-config {shell_word(base_config)}" if base_config else ""
    stdout.print(f"Next: busigen export {shell_word(out)}{named} --out bundle")


@app.command(
    epilog="Examples: `busigen export runs/first --out bundle`; `busigen export runs/first --out bundle --target onnx "
    "--target tensorrt-rtx`; `busigen export runs/first --out bundle16 --precision "
    "fp16 --loop unrolled --batch-size 4,16 --report export.md`; `busigen export runs/sd --base-model sd "
    "--out bundle --steps lesion=30 --steps blend=50 --guidance 7.5` draws with the paper's settings."
)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="What `busigen train` finished.")],
    out: Annotated[Path, typer.Option(help="The bundle's folder; must not exist yet, or be empty.")],
    target: Annotated[
        list[str], typer.Option(help=f"onnx, {', '.join(ENGINE_TARGETS)}; may be repeated. Engines go into the cache.")
    ] = ["onnx"],  # noqa: B006  # typer copies it.
    precision: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(PRECISIONS)}. A component that does not reproduce the checkpoint in it gets the next "
            "higher one."
        ),
    ] = next(iter(PRECISIONS)),
    batch_size: Annotated[
        str | None,
        typer.Option(help="Batches that engines with static shapes are built for, such as 4,16. ONNX takes any."),
    ] = None,
    loop: Annotated[
        str, typer.Option(help=f"Solver's steps: {'; '.join(f'{name}: {about}' for name, about in LOOPS.items())}.")
    ] = next(iter(LOOPS)),
    opset: Annotated[int, typer.Option(help=f"ONNX's: {', '.join(map(str, OPSETS))}.")] = OPSETS[0],
    draws: Annotated[int, typer.Option(help="Draws per class that are compared with PyTorch.")] = PARITY_DRAWS,
    report: Annotated[Path | None, typer.Option(help="Write what was proved as a table: FILE.md or FILE.json.")] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(help="STAGE=NUMBER of network evaluations, such as lesion=30. May be repeated."),
    ] = None,
    phantoms: Annotated[
        Path | None,
        typer.Option(help="Backgrounds begin with phantoms of this fitted distribution. [default: the checkpoint's]"),
    ] = None,
    prior_start: Annotated[
        float, typer.Option(help="Of --phantoms: time from which the prior finishes them; 1 is noise alone.")
    ] = PRIOR_START,
    base_model: Annotated[str | None, BASE_MODEL] = None,
    base_config: Annotated[Path | None, BASE_CONFIG] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Of Stable Diffusion: factor on what the prompt changes; twice the work. [default: none]"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="Of Stable Diffusion: a further LoRA, [STAGE-CLASS=]FILE[:WEIGHT], for all stages and classes or, as "
            "lesion-benign=mine.safetensors:0.8, for one. May be repeated."
        ),
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Of LoRAs that do not say theirs.")] = None,
    fresh_noise: Annotated[
        float,
        typer.Option(help="Of Stable Diffusion: share of the noise that steps draw anew: 1 for LCM-LoRA, 0 for DDIM."),
    ] = 0.0,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Of Stable Diffusion's latents: own, the checkpoint's, which draws speckle from noise; base, Stable "
            "Diffusion's; or the folder of a TAESD. [default: own, if there is one]"
        ),
    ] = None,
) -> None:
    """Export a checkpoint as one ONNX graph per component and class, proved against PyTorch."""
    with needs("train"):
        from busigen.export.exporter import export as run
        from busigen.export.report import check_report, write_report
        from busigen.export.request import Options, batch_sizes, fitted_phantoms, solver_counts
    from busigen.runtime.backends.tensorrt.engine_builder import BuildRequest
    from busigen.runtime.backends.tensorrt.profiles import Batches
    from busigen.runtime.progress import console_progress

    options = Options(
        precision=precision,
        opset=opset,
        loop=loop,
        batch_sizes=batch_sizes(batch_size),
        draws=draws,
        engines=tuple(name for name in target if name != "onnx"),
        steps=solver_counts(steps or ()),
        phantoms=None if phantoms is None else fitted_phantoms(phantoms, prior_start),
    )
    if base_model is not None:
        from busigen.training.stable_diffusion.hub import open_base
        from busigen.training.stable_diffusion.painter import PaintingOptions, parse_loras

        painting = PaintingOptions(parse_loras(lora or ()), lora_alpha, guidance, fresh_noise, decoder)
        options = replace(options, base_model=open_base(base_model, base_config), painting=painting)
    elif base_config or guidance is not None or lora or lora_alpha is not None or fresh_noise or decoder:
        named = "--guidance, --lora, --lora-alpha, --fresh-noise, --decoder and --base-config"
        raise UsageError(f"{named} are for a Stable Diffusion.", fix="Name it by --base-model, or leave them out.")
    if report is not None:
        check_report(report)
    batches = Batches(tuple(sorted(options.batch_sizes, reverse=True))) if options.batch_sizes else Batches()
    order = BuildRequest(list(options.engines), batches)
    order.check()
    made: list[EngineInfo] = []

    def built(written: Bundle) -> None:
        if order.targets:
            made.extend(fill(order, written))

    with quiet_libraries():
        # Engines come before the bundle appears: without one that was asked for, it is not exported.
        bundle = run(checkpoint, out, options, progress=console_progress(), last=built)
    if report is not None:
        write_report(report, bundle.info)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    stdout.print(f"Bundle written to {out}: {len(bundle.info['graphs'])} graphs, {size:.1f} MB")
    for name, found in bundle.info["components"].items():
        why = "; ".join(f"not {tried['precision']}: {tried['refused']}" for tried in found["tried"] if tried["refused"])
        stdout.print(f"  {name:8} {found['precision']}{f' ({why})' if why else ''}")
    for place, parity in bundle.info["parity"]["targets"].items():
        for label in LESION_CLASSES:
            figures = parity[label]
            stdout.print(
                f"  parity {place:9} {label:10} {figures['images_compared']} of {figures['draws']} draws, "
                f"Dice >= {figures['dice']:.4f}, PSNR >= {figures['psnr']:.1f} dB, "
                f"grey difference <= {figures['max_grey_difference']}"
            )
    for name in options.engines:
        if reason := bundle.info["parity"]["unproved"].get(name):
            stdout.print(f"  parity {name}: not compared: {reason}")
    if made:
        show(made)


@app.command(epilog="Example: `busigen restore --out runs/default`")
def restore(
    out: Annotated[Path, typer.Option(help="The checkpoint's folder; must not exist yet, or be empty.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. [default: the shipped one]")] = None,
) -> None:
    """Turn a bundle back into a checkpoint, to measure it or to export it again."""
    with needs("train"):
        from busigen.export.import_bundle import restore as run
        from busigen.runtime.backends.bundle import Bundle, default_bundle
    with quiet_libraries():
        record = run(Bundle.open(bundle or default_bundle()), out)
    stdout.print(f"Checkpoint restored in {out}: preset {record['preset']}, weights as precise as the bundle's fp16.")


@app.command(
    name="build-engines",
    epilog="Examples: `busigen build-engines --target tensorrt-rtx --batch-size 16`; `busigen build-engines --bundle "
    "bundle --target tensorrt-rtx --compute-capability 8.9 --out engines` fills a folder to be copied to the machine "
    "that generates, which reads it with `BUSIGEN_CACHE=engines`.",
)
def build_engines(
    target: Annotated[list[str], typer.Option(help=f"{', '.join(ENGINE_TARGETS)}. May be repeated.")],
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder. [default: the shipped one]")] = None,
    batch_size: Annotated[
        str, typer.Option(help="As in `generate`; 16,4 adds a smaller batch for what is left over.")
    ] = "16",
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="For every batch up to --batch-size, in place of fixed ones.")
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="Of the card, such as 8.9; may be repeated. tensorrt-rtx alone. [default: all from 8.0 on]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Cache folder to fill. [default: this user's, or what BUSIGEN_CACHE names]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was built as JSON.")] = False,
) -> None:
    """Build TensorRT engines of a bundle into the cache, ahead of the first run."""
    from busigen.runtime.backends.bundle import Bundle, default_bundle
    from busigen.runtime.backends.tensorrt.engine_builder import BuildRequest, summary
    from busigen.runtime.backends.tensorrt.profiles import Batches

    order = BuildRequest(target, Batches.parse(batch_size, dynamic=dynamic), compute_capability or (), out)
    order.check()
    made = fill(order, Bundle.open(bundle or default_bundle()))
    if as_json:
        stdout.print_as_json(summary(made))
    else:
        show(made)


@app.command(
    epilog="Examples: `busigen doctor`; `busigen doctor --json --out /data/run`. Exit codes: 0 generate can run, "
    "9 it cannot."
)
def doctor(
    out: Annotated[Path, typer.Option(help="Folder that datasets would be written into.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can run, what it cannot and why, and what helps."""
    from busigen.runtime.diagnostics.doctor import State, can_generate, examine, to_json

    findings = []
    for finding in examine(out):
        findings.append(finding)
        if not as_json:
            stdout.print(f"{finding.state:8} {finding.name}: {finding.described}")
            if finding.fix:
                stdout.print(f"{'':8} -> {finding.fix}")
    if as_json:
        stdout.print_as_json(to_json(findings))
    if not can_generate(findings):
        broken = next(finding for finding in findings if finding.state is State.PROBLEM)
        raise FlaggedError(f"generate cannot run here: {broken.name}: {broken.described}.", fix=broken.fix)


def fill(order: BuildRequest, bundle: Bundle) -> list[EngineInfo]:
    """Make an order's engines, with progress on stderr."""
    from busigen.runtime.progress import console_progress

    with console_progress() as progress:
        progress.start("building engines", order.count(bundle), unit="engine")
        return order.fill(bundle, lambda made: progress.advance(1))


def show(made: list[EngineInfo]) -> None:
    """Print a table of engines, a row per graph, and where they lie."""
    table = Table(box=None)
    for name in ("graph", "engine", "rows", "MB", "seconds"):
        table.add_column(name, justify="left" if name in ("graph", "engine") else "right")
    for one in made:
        rows = ",".join(str(most) if least == most else f"{least}-{most}" for least, _, most in one.key["profiles"])
        seconds = "kept" if one.cached else f"{one.seconds:.1f}"
        engine = f"{one.key['target']} {one.key['version']} {one.capability}".strip()
        table.add_row(one.graph, engine, rows, f"{one.size / 1e6:.1f}", seconds)
    stdout.print(table)
    built = [one for one in made if not one.cached]
    took, size = sum(one.seconds for one in built), sum(one.size for one in made) / 1e6
    stdout.print(f"{len(built)} engines built in {took:.0f} s, {len(made) - len(built)} were there; {size:.1f} MB")
