"""Scoring a reader study: answers are read and held against the key, and a report is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from busigen import __version__
from busigen.data.sources.records import birads_category
from busigen.errors import InputError, OutputError, UsageError
from busigen.evaluation.context import Interval, jsonable
from busigen.evaluation.reader_study import figures
from busigen.evaluation.reader_study.figures import GRADED, Accuracy, Array, Kappa, Mask, Reading
from busigen.evaluation.reader_study.records import CATEGORIES, KEY_FILE, Key, read_answers, read_key
from busigen.evaluation.reader_study.templates import templates
from busigen.evaluation.report.text import NOTHING, interval, number, probability
from busigen.files import atomic_file, make_folder, write_json
from busigen.foreign import names_in
from busigen.registry import LESION_CLASSES
from busigen.runtime.storage.files import output_errors
from busigen.text import counted, printable

SCHEMA = 1  # Of score.json; raised when a reader of the older one would misread it.
JSON_FILE, REPORT_FILE = "score.json", "score.md"
NAMED = 5  # Synthetic images that the report names as given away most, and as least
QUESTIONS = {"call": "real or synthetic", "rating": "rating", "birads": "BI-RADS"}
"""What agreement is measured in, as `figures.agreements` has it."""


@dataclass(frozen=True)
class ReaderFigures:
    """One reader's figures: whether they can tell, and agree with themselves and with recorded BI-RADS categories."""

    reader: str
    file: str
    answered: int
    auc: Interval | None
    accuracy: Accuracy | None
    repeats: dict[str, Kappa]
    recorded: Kappa


@dataclass(frozen=True)
class Score:
    """What the answers to a study add up to.

    Attributes:
        auc: Mean of the readers' AUCs, for these readers; ``auc_of_others`` with an interval for others as well, None
            where one reader answered.
        right: Mean share of right answers.
        by_class: Mean AUC among the images of a class.
        between: Agreement of every two readers, by their names.
        birads: Answers by truth and class, ``real benign``, and category, of all readers together.
        malignancy: Mean AUC of the category between malignant and benign images, ``real`` and ``synthetic``, and their
            ``difference``; only those that can be given.
        cases: Each image with all that the key has of it, and what readers said in the order of ``readers``.
    """

    out: Path
    study: str
    images: dict[str, int]
    repeats: int
    readers: list[ReaderFigures]
    auc: Interval | None
    auc_of_others: Interval | None
    right: Interval | None
    by_class: dict[str, Interval]
    between: dict[tuple[str, str], dict[str, Kappa]]
    birads: dict[str, dict[int, int]]
    malignancy: dict[str, Interval]
    cases: list[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        """The headlines, a line each."""
        # A report ties numbers to their signs; a terminal is shown plain spaces.
        yield from (line.replace("\N{NO-BREAK SPACE}", " ") for line in self._lines())

    def _lines(self) -> Iterator[str]:
        shown = ", ".join(f"{count} {truth}" for truth, count in self.images.items())
        yield f"study {self.study}: {shown} images, {counted(self.repeats, 'repeat')}"
        for one in self.readers:
            right = "no calls"
            if one.accuracy:
                right = f"right {_shown(one.accuracy.share)}, p {probability(one.accuracy.p)}"
            again = one.repeats["call"]
            same = f"; {again.alike} of {counted(again.count, 'repeat')} called alike" if again.count else ""
            yield f"  {one.reader}: AUC {_shown(one.auc)}, {right}; {one.answered} answered{same}"
        if len(self.readers) > 1:
            yield f"  mean of {len(self.readers)} readers: AUC {_shown(self.auc)}, right {_shown(self.right)}"
            yield f"  the same for other readers as well: AUC {_shown(self.auc_of_others)}"
            for name, label in QUESTIONS.items():
                yield f"  agreement between readers, {label}: mean kappa {number(self.mean_kappa(name))}"
        yield "  chance is an AUC of 0.5"
        yield f"Report: {self.out / REPORT_FILE}"

    def mean_kappa(self, question: str) -> float | None:
        """Mean of the kappas of every two readers (Light, Psychological Bulletin 76, 365-377, 1971)."""
        kappas = [pair[question].kappa for pair in self.between.values()]
        known_ones = [kappa for kappa in kappas if kappa is not None]
        return float(np.mean(known_ones)) if known_ones else None

    def to_dict(self) -> dict[str, Any]:
        """What ``score.json`` holds."""
        content = {**asdict(self), "schema": SCHEMA, "busigen": __version__}
        del content["out"]
        content["between"] = [
            {"readers": names, **{name: asdict(kappa) for name, kappa in pair.items()}}
            for names, pair in self.between.items()
        ]
        content["mean_kappa"] = {name: self.mean_kappa(name) for name in QUESTIONS}
        return {str(name): value for name, value in jsonable(content).items()}


def score(answers: Sequence[Path], *, key: Path | None = None, out: Path | None = None, seed: int = 0) -> Score:
    """Hold readers' answers against the key of their study, and write ``score.md`` and ``score.json``.

    Args:
        answers: One file for each reader.
        key: The study's key; None looks beside the first of them.
        out: The report's folder, created; None is ``score`` beside the key.
        seed: Decides the resampling behind intervals.

    Raises:
        UsageError: no file was given.
        InputError: a file is missing, answers another study, or two are of one reader; or nothing was answered.
        IntegrityError: key or answers are damaged.
        OutputError: ``out`` cannot be written or holds something else.
    """
    if not answers:
        raise UsageError("No answers were given.", fix="Name the files that readers saved.")
    if missing := next((path for path in answers if not path.exists()), None):
        raise InputError(f"{missing} does not exist.", fix="Name the files that readers saved.")
    key_file = key or answers[0].parent / KEY_FILE
    if key is None and not key_file.exists():
        raise InputError(f"{key_file} does not exist.", fix="Name the study's key with --key.")
    opened = read_key(key_file)
    files: dict[str, Path] = {}
    readings = []
    for path in answers:
        found = read_answers(path, opened)
        if found.reader in files:
            raise InputError(
                f"{files[found.reader]} and {path} are both of the reader {printable(found.reader)}.",
                fix="Give one file for each reader.",
            )
        files[found.reader] = path
        readings.append(Reading.of(found, opened))
    if all(np.isnan(one.rating).all() and np.isnan(one.birads).all() for one in readings):
        raise InputError("No image is answered.", fix="Give files in which readers answered.")
    folder = out or key_file.parent / "score"
    result = _scored(opened, readings, [path.name for path in files.values()], folder, np.random.default_rng(seed))
    with output_errors(folder):
        _claim(folder)
        write_json(folder / JSON_FILE, result.to_dict())
        with atomic_file(folder / REPORT_FILE) as file:
            file.write(_report(result).encode())
    return result


def _scored(key: Key, readings: Sequence[Reading], files: Sequence[str], out: Path, rng: np.random.Generator) -> Score:
    truth = np.array([case.truth for case in key.cases])
    classes = np.array([case.image_class for case in key.cases])
    synthetic, real = truth == "synthetic", truth == "real"
    rating, called, birads = (
        np.stack([getattr(one, name) for one in readings]) for name in ("rating", "called", "birads")
    )
    # 0 is no degree of suspicion.
    graded = np.where(np.isin(birads, GRADED), birads, np.nan)
    told = partial(figures.over_readers, figures.auc, rating, rng=rng)
    sides = {side: _malignant_and_benign(classes, mask) for side, mask in (("real", real), ("synthetic", synthetic))}
    malignancy = {side: figures.over_readers(figures.auc, graded, *masks, rng) for side, masks in sides.items()}
    malignancy["difference"] = figures.auc_difference(graded, sides["synthetic"], sides["real"], rng)
    return Score(
        out=out,
        study=key.study,
        images={side: int((truth == side).sum()) for side in ("real", "synthetic")},
        repeats=len(key.shown) - len(key.cases),
        readers=[_reader(one, file, key, synthetic, rng) for one, file in zip(readings, files, strict=True)],
        auc=told(synthetic, real),
        auc_of_others=told(synthetic, real, readers=True) if len(readings) > 1 else None,
        right=figures.over_readers(figures.right, called, synthetic, real, rng),
        by_class=_given(
            {str(name): told(synthetic & (classes == name), real & (classes == name)) for name in sorted(set(classes))}
        ),
        between=figures.between(readings),
        birads=_counts(birads, truth, classes),
        malignancy=_given(malignancy),
        cases=[_case(key, number, rating, birads) for number in range(len(key.cases))],
    )


def _reader(one: Reading, file: str, key: Key, synthetic: Mask, rng: np.random.Generator) -> ReaderFigures:
    categories = [birads_category(case.birads) or "" for case in key.cases]
    recorded = np.array([int(text) if text.isdigit() else np.nan for text in categories], dtype=np.float64)
    return ReaderFigures(
        reader=printable(one.reader),
        file=file,
        answered=int((~np.isnan(one.rating)).sum()),
        auc=figures.over_readers(figures.auc, one.rating[None], synthetic, ~synthetic, rng),
        accuracy=figures.accuracy(one.called, synthetic),
        repeats=figures.agreements((one.rating, one.birads), (one.rating_again, one.birads_again)),
        recorded=figures.agreement(one.birads, recorded, GRADED, weighted=True),
    )


def _malignant_and_benign(classes: np.ndarray[Any, Any], side: Mask) -> tuple[Mask, Mask]:
    benign, malignant = LESION_CLASSES
    return side & (classes == malignant), side & (classes == benign)


def _given(figures_by_name: Mapping[str, Interval | None]) -> dict[str, Interval]:
    return {name: figure for name, figure in figures_by_name.items() if figure is not None}


def _counts(birads: Array, truth: np.ndarray[Any, Any], classes: np.ndarray[Any, Any]) -> dict[str, dict[int, int]]:
    return {
        f"{side} {name}": {
            category: int((birads[:, (truth == side) & (classes == name)] == category).sum()) for category in CATEGORIES
        }
        for side in ("real", "synthetic")
        for name in np.unique(classes[truth == side])
    }


def _case(key: Key, case: int, rating: Array, birads: Array) -> dict[str, Any]:
    said = rating[:, case][~np.isnan(rating[:, case])]
    return {
        **key.cases[case].model_dump(),
        "shown": [place + 1 for place, shown in enumerate(key.shown) if shown.case == case],
        "rating": rating[:, case].tolist(),
        "birads_given": birads[:, case].tolist(),
        "mean_rating": float(said.mean()) if said.size else None,
    }


def _claim(out: Path) -> None:
    make_folder(out)
    foreign = {name for name in names_in(out) if not name.startswith(".")} - {JSON_FILE, REPORT_FILE}
    if foreign:
        raise OutputError(
            f"{out} holds more than a score: {sorted(foreign)[0]!r}.", fix="Name a new folder with --out."
        )


def _report(result: Score) -> str:
    rated = [case for case in result.cases if case["truth"] == "synthetic" and case["mean_rating"] is not None]
    ranked = sorted(rated, key=lambda case: -case["mean_rating"])
    return (
        templates()
        .get_template("score.md.j2")
        .render(
            score=result,
            questions=QUESTIONS,
            categories=CATEGORIES,
            given_away=ranked[:NAMED],
            believed=ranked[::-1][:NAMED],
            shown=_shown,
            number=number,
            probability=lambda p: Markup(probability(p)),
        )
    )


def _shown(figure: Interval | None) -> str:
    """``0.620 [0.583, 0.661]``, or a dash."""
    return NOTHING if figure is None else interval(figure)
