"""The files of a reader study: its key, which stays with whoever made it, and answers, which may be anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from busigen.errors import InputError, IntegrityError
from busigen.records import Record, Text, Whole, checked, read_json
from busigen.text import printable

PAGE_FILE, KEY_FILE, README_FILE = "study.html", "key.json", "README.md"
SCHEMA = 1  # Of key and answers; raised when a reader of the older one would misread it.
MOST_CASES = 500  # The page then has 53 MB, or 70 with most repeats.
SCALE = (
    "certainly real",
    "probably real",
    "perhaps real",
    "perhaps synthetic",
    "probably synthetic",
    "certainly synthetic",
)
"""What a rating says of an image, from 1 on."""

SYNTHETIC_FROM = 4  # The first rating that calls an image synthetic.
CATEGORIES = {
    0: "incomplete: cannot be judged",
    1: "negative: no lesion",
    2: "benign",
    3: "probably benign",
    4: "suspicious",
    5: "highly suggestive of malignancy",
}
"""BI-RADS categories that a reader may give (ACR BI-RADS Atlas, 5th edition); 6 is for proven malignancy."""

_NEW_KEY = "Take the key.json that `busigen reader-study` wrote, unchanged."
_NEW_ANSWERS = "Ask the reader to save the answers on the page again."

Truth = Literal["real", "synthetic"]
Version = Literal[1]


class Case(Record):
    """One image of a study.

    ``source`` is the set it comes from and ``scanner`` what it was taken with, where that is known, and ``birads`` the
    category recorded for it; ``id``, ``file`` and ``sha256`` are those of the file.
    """

    truth: Truth
    image_class: Text
    source: Text | None
    scanner: Text | None = None  # Keys of earlier versions do not say it.
    id: Text
    file: Text
    sha256: Text
    birads: Text | None


class Shown(Record):
    """One image as the page shows it: which case it is, from 0 on, and the sha256 of its PNG."""

    case: Whole
    sha256: Text


class Key(Record):
    """Content of ``key.json``: what the images of a page are, in the page's order."""

    schema_version: Version = Field(alias="schema")
    study: Text
    cases: Annotated[list[Case], Field(min_length=1, max_length=MOST_CASES)]
    shown: Annotated[list[Shown], Field(min_length=1, max_length=2 * MOST_CASES)]


class Answer(Record):
    """What a reader said of the image at this place on the page, from 1 on; None where nothing was said."""

    image: Whole
    rating: Annotated[int, Strict(), Field(ge=1, le=len(SCALE))] | None = None
    birads: Annotated[int, Strict(), Field(ge=min(CATEGORIES), le=max(CATEGORIES))] | None = None


class Answers(Record):
    """Content of a file of answers."""

    schema_version: Version = Field(alias="schema")
    study: Text
    reader: Annotated[str, Strict(), Field(min_length=1, max_length=100)]
    answers: Annotated[list[Answer], Field(max_length=2 * MOST_CASES)]


def study_id(images: Iterable[str]) -> str:
    """The name of a study, 16 hex digits, from the sha256 of every image that its page shows, in order."""
    return hashlib.sha256("\n".join(images).encode()).hexdigest()[:16]


def read_key(path: Path) -> Key:
    """Read a study's key.

    Raises `InputError` where there is none, `IntegrityError` where it is damaged or was changed.
    """
    key = checked(Key, _read(path, _NEW_KEY), path, fix=_NEW_KEY)
    cases = {shown.case for shown in key.shown}
    if cases != set(range(len(key.cases))) or key.study != study_id(shown.sha256 for shown in key.shown):
        raise IntegrityError(f"{path} has other images than its study {printable(key.study)[:16]}.", fix=_NEW_KEY)
    return key


def read_answers(path: Path, key: Key) -> Answers:
    """Read a reader's answers to the study of this key.

    Raises `InputError` where there are none, or they are to another study, `IntegrityError` where they are no answers.
    """
    answers = checked(Answers, _read(path, _NEW_ANSWERS), path, fix=_NEW_ANSWERS)
    if answers.study != key.study:
        raise InputError(
            f"{path} answers the study {printable(answers.study)[:40]}, and the key is that of {key.study}.",
            fix="Give the answers to one study and its key (--key).",
        )
    seen = set()
    for answer in answers.answers:
        if not 1 <= answer.image <= len(key.shown) or answer.image in seen:
            why = "which it has already answered" if answer.image in seen else f"of {len(key.shown)}"
            raise IntegrityError(f"{path} answers image {answer.image}, {why}.", fix=_NEW_ANSWERS)
        seen.add(answer.image)
    return answers


def _read(path: Path, fix: str) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", fix="Name the file.") from error
    except ValueError as error:
        raise IntegrityError(f"{error}.", fix=fix) from error
