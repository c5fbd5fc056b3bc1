"""What each part of a bundle gives away: real lesions as they are, through the autoencoder, and repainted in place.

python benchmarks/studies/gap.py --data prepared/

Lesion images of the training split keep their backgrounds and outlines. *decoded* has the whole image encoded and
decoded, *autoencoded* the edit region alone, with its lesion, pasted back; *repainted* has it painted anew by stages 2
and 3. The audit's classifiers (``--quick``) and the radiomic judge tell each from the held-out images; *real* is what
they make of the same images unchanged, and more than 0.5 where the two sides are of different hospitals
(``--train-source``, ``--held-out-source``). Where the bundle knows an image's scanner, it is told; ``--scanner`` takes
images of one alone. Stages and decoder learnt from these images, so held-out ones might fare worse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from radiomic_judge import judged

from busigen.data.geometry import edit_region, paste, window_for
from busigen.data.prepared import Prepared
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.reading.sets import from_prepared
from busigen.evaluation.sections import SECTIONS
from busigen.registry import BACKGROUND_SPECKLE, LESION_CLASSES, RESOLUTION, SYNTHETIC
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.sampling.batching import Draft
from busigen.runtime.sampling.graphs import cut, to_grey, to_unit
from busigen.runtime.sampling.inputs.healthy_images import Healthy
from busigen.runtime.sampling.sampler import Sampler

RESULTS = Path(__file__).parent / "results" / "gap.json"
BATCH = 8
Images = list[NDArray[np.uint8]]


def main() -> None:
    """Make and judge every arm, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `busigen prepare` wrote")
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--count", type=int, default=400, help="training images, spread over the split")
    parser.add_argument("--train-source", help="busi or busbra; both, if left out")
    parser.add_argument("--held-out-source", help="likewise")
    parser.add_argument("--scanner", help="of both sides' images; all, if left out")
    parser.add_argument("--out", type=Path, default=Path("out/gap"), help="folder for the section's pictures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    prepared = Prepared.open(options.data)
    train = lesions(prepared, ("train",), options.train_source, options.scanner)
    train = train.take(np.linspace(0, len(train) - 1, min(options.count, len(train))).round().astype(int))
    held_out = lesions(prepared, ("val", "test"), options.held_out_source, options.scanner)
    bundle = Bundle.open(options.bundle)
    backend = OnnxBackend(bundle)
    sampler = Sampler(bundle, backend, classes=dict.fromkeys(LESION_CLASSES, 0.5), batch_size=BATCH)
    arms: dict[str, Callable[[Sequence[Draft]], Images]] = {
        "real": lambda drafts: [draft.healthy.pixels for draft in drafts],
        "decoded": lambda drafts: [reencoded(sampler, draft) for draft in drafts],
        "autoencoded": lambda drafts: autoencoded(sampler, drafts),
        # The sampler's own, because what it does with each stage's answer is to be judged, too.
        "repainted": lambda drafts: sampler.graphs.images(0, drafts),
    }
    report: dict[str, Any] = {
        "bundle": bundle.sha256,
        "sources": [options.train_source, options.held_out_source],
        "scanner": options.scanner,
        "images": len(train),
        "held_out": len(held_out),
    }
    for name, arm in arms.items():
        made = replace(train, images=changed(train, arm, bundle.scanners))
        report[name] = figures(made, held_out, options.out)
        print(name, json.dumps(report[name]), flush=True)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")


def lesions(prepared: Prepared, splits: tuple[str, ...], source: str | None, scanner: str | None) -> ImageSet:
    """Lesion images of the splits, overlays painted over, each a background of its own."""
    found = from_prepared(prepared, splits, lesions_only=True, also=("scanner",)).without_overlays()
    table = found.table.with_columns(pl.lit(SYNTHETIC).alias("background"))
    found = replace(found, table=table, clean=None)
    wanted = table["id"].str.starts_with("" if source is None else f"{source}/")
    if scanner is not None:
        wanted &= (table["scanner"] == scanner).fill_null(False)
    return found.take(wanted.to_numpy())


def changed(images: ImageSet, arm: Callable[[Sequence[Draft]], Images], scanners: Collection[str]) -> NDArray[np.uint8]:
    """The images after an arm, in batches of one class and window."""
    drafts = []
    names = [name if name in scanners else None for name in images.table["scanner"]]
    for position, (pixels, mask, valid) in enumerate(zip(images.images, images.masks, images.valid, strict=True)):
        edit = edit_region(mask, valid)
        drafts.append(
            Draft(
                index=position,
                attempt=0,
                position=position,
                label=str(images.classes[position]),
                healthy=Healthy(pixels, valid, {"scanner": names[position]}),
                mask=mask,
                edit=edit,
                window=window_for(edit),
            )
        )
    result = images.images.copy()
    for _, group in groupby(sorted(drafts, key=_kind), _kind):
        alike = list(group)
        for start in range(0, len(alike), BATCH):
            batch = alike[start : start + BATCH]
            for draft, image in zip(batch, arm(batch), strict=True):
                result[draft.index] = image
    return result


def _kind(draft: Draft) -> tuple[str, int]:
    assert draft.window is not None
    return draft.label, draft.window.side


def reencoded(sampler: Sampler, draft: Draft) -> NDArray[np.uint8]:
    """The whole image encoded and decoded, with the bars that it had."""
    pixels, graphs = to_unit(draft.healthy.pixels)[None, None], sampler.graphs
    noise = np.random.default_rng(draft.index).standard_normal(pixels.shape, dtype=np.float32)
    latents = graphs.run(f"encoder@{RESOLUTION}", 1, 1, pixels=pixels)
    shown = {"mask": np.float32(draft.mask)[None, None], "scanner": graphs.told([draft.healthy.row["scanner"]])}
    decoded = graphs.run(f"decoder@{RESOLUTION}", 1, 1, latents=latents, noise=BACKGROUND_SPECKLE * noise, **shown)
    return np.where(draft.healthy.valid, to_grey(decoded[0, 0]), draft.healthy.pixels)


def autoencoded(sampler: Sampler, drafts: Sequence[Draft]) -> Images:
    """The edit regions encoded with what they hold, decoded and pasted back."""
    windows = [draft.window for draft in drafts if draft.window is not None]
    masks = [draft.mask for draft in drafts if draft.mask is not None]
    side = windows[0].side
    pixels = cut([to_unit(draft.healthy.pixels) for draft in drafts], windows)
    noise = np.random.default_rng(drafts[0].index).standard_normal(pixels.shape, dtype=np.float32)
    graphs, count = sampler.graphs, len(drafts)
    latents = graphs.run(f"encoder@{side}", BATCH, count, pixels=pixels)
    shown = {"mask": cut(masks, windows), "scanner": graphs.told(draft.healthy.row["scanner"] for draft in drafts)}
    decoded = graphs.run(f"decoder@{side}", BATCH, count, latents=latents, noise=noise, **shown)
    return [
        paste(draft.healthy.pixels, new[0], draft.edit, window, graphs.bundle.grain_fade)
        for draft, new, window in zip(drafts, decoded, windows, strict=True)
        if draft.edit is not None
    ]


def figures(made: ImageSet, held_out: ImageSet, out: Path) -> dict[str, Any]:
    """AUC of the audit's classifiers, with intervals, and of the radiomic judge."""
    context = AuditContext(made, held_out, None, out, backgrounds="synthetic")
    found = {
        figure.label: [round(v, 3) for v in (figure.value.value, figure.value.low, figure.value.high) if v is not None]
        for figure in SECTIONS["realness"].run(context).figures
        if "AUC" in figure.label
    }
    return {**found, "radiomic judge": round(judged(made, held_out)[1], 3)}


if __name__ == "__main__":
    main()
