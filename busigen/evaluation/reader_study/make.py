"""Making a reader study: images are chosen and made alike, the page is written, and the key beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from busigen import __version__
from busigen.data.prepared import INFO, Prepared
from busigen.errors import InputError, IntegrityError, OutputError, UsageError
from busigen.evaluation.context import fingerprint
from busigen.evaluation.reader_study.cases import Rows, Side, choose, sequence
from busigen.evaluation.reader_study.pictures import finished, painted_over, with_decoys
from busigen.evaluation.reader_study.records import (
    CATEGORIES,
    KEY_FILE,
    MOST_CASES,
    PAGE_FILE,
    README_FILE,
    SCALE,
    SCHEMA,
    SYNTHETIC_FROM,
    Truth,
    read_key,
    study_id,
)
from busigen.evaluation.reader_study.templates import source, templates
from busigen.evaluation.reading.sets import from_prepared, read_set
from busigen.files import atomic_file, make_folder, write_json
from busigen.foreign import names_in
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.text import shell_word

FEWEST_CASES = 4  # Two classes on two sides
HELD_OUT = ("val", "test")  # Splits of a prepared folder that the generator did not learn from
READ_FACTOR = 4  # So many times the cases are read of either set: enough for classes of a tenth
OWN_DATASET = "busigen dataset"  # The layout of sets into which no scanner painted anything


@dataclass(frozen=True)
class Study:
    """What was made: the folder, the study's name, its cases, and how many images the page shows."""

    out: Path
    study: str
    cases: list[dict[str, Any]]
    images: int
    notes: list[str]

    def lines(self) -> Iterator[str]:
        """What was made, and what to do with it."""
        kinds = Counter((case["truth"], case["image_class"]) for case in self.cases)
        named = ", ".join(f"{count} {truth} {label}" for (truth, label), count in sorted(kinds.items()))
        yield f"study {self.study}: {named}; {self.images - len(self.cases)} come twice"
        yield from (f"  note: {note}" for note in self.notes)
        yield f"  for readers: {self.out / PAGE_FILE}; not for readers: {self.out / KEY_FILE}"
        yield f"  next: busigen reader-study score {shell_word(self.out)}/answers*.json"


def make(
    synthetic: Path,
    real: Path,
    out: Path,
    *,
    cases: int = 100,
    repeats: int | None = None,
    outlines: bool = False,
    leave_out: Collection[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Study:
    """Write a study: ``study.html`` for the readers, ``key.json`` and ``README.md`` for whoever made it.

    Half of the cases are real, of a prepared folder's splits that trained nothing; every class is as frequent among
    them as among the others, and so are, within a class, the scanners that both sets name. The same sets, seed and
    options give the same study.

    Args:
        synthetic: The set under judgement, in any layout that the audit reads.
        real: Real images: a prepared folder, or any other of these layouts.
        out: The study's folder; created.
        cases: Number of images, 4 to 500.
        repeats: How many of them are shown twice; at most a third. None is a fifth.
        outlines: Draw the outline of each lesion's mask.
        leave_out: Ids, as ``key.json`` has them, of images that are not to be shown.
        seed: Decides what is drawn, and the order.
        progress: Shows rate and ETA.

    Raises:
        UsageError: a number out of its range, or an id to leave out that no image has.
        InputError: a set cannot be read, both hold the same files, or there are too few images of a class.
        IntegrityError: a prepared folder is not what its record says.
        OutputError: ``out`` cannot be written, or holds something else or another study.
    """
    repeats = cases // 5 if repeats is None else repeats
    if not FEWEST_CASES <= cases <= MOST_CASES:
        raise UsageError(f"--cases is {cases}.", fix=f"Give {FEWEST_CASES} to {MOST_CASES}.")
    if not 0 <= repeats <= cases // 3:
        raise UsageError(f"--repeats is {repeats}.", fix=f"Give 0 to {cases // 3}, a third of the cases.")
    _refuse_foreign(out)
    progress = progress or Progress()
    sides = [_real(real, cases, seed, progress), _side("synthetic", synthetic, cases, seed, progress)]
    notes = _doubts(sides, real, synthetic)
    # The sets are part of it: who knows the key of another study with this seed knows nothing of this one's order.
    prints = hashlib.sha256("".join(fingerprint(side.images) for side in sides).encode()).digest()
    rng = np.random.default_rng([seed, *np.frombuffer(prints, np.uint32).tolist()])
    sides = _without(sides, leave_out)
    rows, unmatched = choose(sides, cases, rng)
    notes += unmatched
    listed = [_case(side, int(row)) for side, drawn in zip(sides, rows, strict=True) for row in drawn]
    pictures = _pictures(sides, rows, outlines, progress)
    order = sequence([case["truth"] for case in listed], repeats, rng)
    shown = [pictures[case] for case in order]
    hashes = [hashlib.sha256(picture).hexdigest() for picture in shown]
    study = study_id(hashes)
    key = {
        "schema": SCHEMA,
        "busigen": __version__,
        "study": study,
        "seed": seed,
        "outlines": outlines,
        "sets": {side.truth: {"name": side.images.name, "layout": side.images.layout} for side in sides},
        "cases": listed,
        "shown": [{"case": case, "sha256": digest} for case, digest in zip(order, hashes, strict=True)],
    }
    with output_errors(out):
        make_folder(out)
        _refuse_other(out, study)
        for name, text in ((PAGE_FILE, page(study, shown, outlines)), (README_FILE, _readme(key, notes))):
            with atomic_file(out / name) as file:
                file.write(text.encode())
        write_json(out / KEY_FILE, key)
    return Study(out, study, listed, len(shown), notes)


def page(study: str, pictures: Sequence[bytes], outlines: bool) -> str:
    """The page that readers get: these PNG files, in this order, and nothing else about them."""
    environment = templates()
    script, style = (source(environment, f"page/{name}") for name in ("page.js", "page.css"))
    images = [base64.b64encode(picture).decode("ascii") for picture in pictures]
    return environment.get_template("page/page.html.j2").render(
        study=Markup(json.dumps({"study": study, "schema": SCHEMA, "images": images})),
        total=len(images),
        scale=SCALE,
        synthetic_from=SYNTHETIC_FROM,
        categories=CATEGORIES,
        outlines=outlines,
        script=Markup(script),
        style=Markup(style),
        hashes={name: _hash(text) for name, text in (("script", script), ("style", style))},
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _real(path: Path, cases: int, seed: int, progress: Progress) -> Side:
    if not (path / INFO).is_file():
        return _side("real", path, cases, seed, progress)
    return Side("real", from_prepared(Prepared.open(path), HELD_OUT, also=("source", "scanner", "birads")))


def _side(truth: Truth, path: Path, cases: int, seed: int, progress: Progress) -> Side:
    """A set of any layout. What its rows call source or BI-RADS category need not be either."""
    images = read_set(path, progress, limit=READ_FACTOR * cases, seed=seed, also=("scanner",))
    unknown = dict.fromkeys(("source", "birads"), pl.lit(None, pl.String))
    return Side(truth, replace(images, table=images.table.with_columns(**unknown)))


def _doubts(sides: Sequence[Side], real: Path, synthetic: Path) -> list[str]:
    """What to know about the sets; refuses real ones that are none."""
    first, second = (side.images for side in sides)
    if first.layout == OWN_DATASET:
        raise InputError(f"--real {real} is a busigen dataset.", fix="Give real images, such as what `prepare` wrote.")
    if shared := set(first.table["sha256"]) & set(second.table["sha256"]):
        raise InputError(
            f"{synthetic} and --real {real} hold {len(shared)} equal files.",
            fix="Give the synthetic set first and real images with --real.",
        )
    notes = [f"Of the {side.truth} set: {note}." for side in sides for note in side.images.notes]
    notes += [
        f"Of the {side.truth} set, {len(refused)} files were refused, such as {refused[0].file}: {refused[0].problem}"
        for side in sides
        if (refused := side.images.refused)
    ]
    if first.layout != "prepared folder":
        notes.append(
            "Nobody said which real images trained the generator: it may have seen some. A prepared folder says it."
        )
    return notes


def _without(sides: Sequence[Side], ids: Collection[str]) -> list[Side]:
    read = {name for side in sides for name in side.images.table["id"]}
    if unknown := next((name for name in ids if name not in read), None):
        raise UsageError(f"--leave-out {unknown}: no image that was read has this id.", fix="Copy it from key.json.")
    return [side.without(ids) for side in sides]


def _case(side: Side, row: int) -> dict[str, Any]:
    """One of ``records.Case``, as JSON."""
    of_file = side.images.table.row(row, named=True)
    return {
        "truth": side.truth,
        "image_class": of_file["class"],
        "source": of_file["source"],
        "scanner": of_file["scanner"],
        "id": of_file["id"],
        "file": of_file["file"],
        "sha256": of_file["sha256"],
        "birads": of_file["birads"],
    }


def _pictures(sides: Sequence[Side], rows: Sequence[Rows], outlines: bool, progress: Progress) -> list[bytes]:
    """The PNG of every case: real images without overlays, and synthetic ones painted over in the same places."""
    (real, made), (real_rows, made_rows) = (side.images for side in sides), rows
    progress.start("painting over", len(real_rows) + len(made_rows), unit="image")
    pictures = []
    for images, drawn in ((real, real_rows), (made, made_rows)):
        for place, row in enumerate(drawn):
            valid, lesion = images.valid[row], images.masks[row]
            if images is real:
                pixels = real.without_overlays().images[row]
            else:
                like = int(real_rows[place % len(real_rows)])
                own = painted_over(made, row) if made.layout != OWN_DATASET else np.zeros_like(lesion)
                side = max(real.table["width"][like], real.table["height"][like])
                traces = painted_over(real, like), real.valid[like], side
                pixels = with_decoys(made.images[row], valid, own, lesion, *traces)
            pictures.append(finished(pixels, valid, lesion if outlines else None))
            progress.advance(1)
    progress.stop()
    return pictures


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder without a study that holds anything, before anything is read."""
    names = {name for name in names_in(out) if not name.startswith(".")}
    if KEY_FILE not in names and (foreign := names - {PAGE_FILE, README_FILE}):
        raise OutputError(f"{out} is not empty: {sorted(foreign)[0]!r}.", fix="Name a new or empty folder.")


def _refuse_other(out: Path, study: str) -> None:
    """Refuse a folder with another study, whose page readers may be answering."""
    if KEY_FILE not in names_in(out):
        return
    try:
        other = read_key(out / KEY_FILE).study
    except IntegrityError as error:
        raise OutputError(f"{out} holds no study: {error.problem}", fix="Name a new folder.") from error
    if other != study:
        raise OutputError(f"{out} holds another study, {other}.", fix="Name a new folder.")


def _readme(key: dict[str, Any], notes: Sequence[str]) -> str:
    return templates().get_template("readme.md.j2").render(key=key, notes=notes)
