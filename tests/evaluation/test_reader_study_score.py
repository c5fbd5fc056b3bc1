"""What readers' answers add up to, held against values known otherwise; and answers that are none."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from busigen.errors import BusigenError, InputError, IntegrityError, OutputError
from busigen.evaluation.reader_study import figures
from busigen.evaluation.reader_study.records import study_id
from busigen.evaluation.reader_study.score import Score, score
from tests.harness.command import error_line, run
from tests.harness.json_fuzz import mutated

LABELS = range(1, 7)


def made_key(folder: Path, truths: str = "rs" * 10, again: tuple[int, ...] = (), classes: str = "bbmm") -> Path:
    """A key of cases that are (r)eal or (s)ynthetic and (b)enign or (m)alignant in turn, shown in order, then again."""
    folder.mkdir(exist_ok=True)
    cases = [
        {
            "truth": {"r": "real", "s": "synthetic"}[truth],
            "image_class": {"b": "benign", "m": "malignant"}[classes[k % len(classes)]],
            "source": None,
            "id": f"case {k}",
            "file": f"{k}.png",
            "sha256": "0" * 64,
            "birads": str(2 + k % 4) if truth == "r" else None,
        }
        for k, truth in enumerate(truths)
    ]
    shown = [{"case": case, "sha256": f"{place:064x}"} for place, case in enumerate([*range(len(cases)), *again])]
    content = {"schema": 1, "study": study_id(one["sha256"] for one in shown), "cases": cases, "shown": shown}
    (folder / "key.json").write_text(json.dumps(content))
    return folder / "key.json"


def answered(key: Path, ratings: list[int | None], reader: str = "A", birads: list[int] | None = None) -> Path:
    """A file of answers beside the key; BI-RADS 2 to 5 in turn unless given."""
    answers = [
        {"image": k + 1, "rating": rating, "birads": birads[k] if birads else 2 + k % 4}
        for k, rating in enumerate(ratings)
    ]
    path = key.parent / f"answers-{len(list(key.parent.iterdir()))}.json"
    content = {"schema": 1, "study": json.loads(key.read_text())["study"], "reader": reader, "answers": answers}
    path.write_text(json.dumps(content))
    return path


def test_the_auc_is_scikit_learns_with_ties_and_gaps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ratings, truth = rng.integers(1, 7, 60).astype(float), rng.random(60) < 0.4
        assert figures.auc(ratings[truth], ratings[~truth]) == pytest.approx(metrics.roc_auc_score(truth, ratings))
        gaps = np.where(rng.random(60) < 0.2, np.nan, ratings)
        known = ~np.isnan(gaps)
        expected = metrics.roc_auc_score(truth[known], gaps[known])
        assert figures.auc(gaps[truth], gaps[~truth]) == pytest.approx(expected)


def test_who_sees_through_all_and_who_always_says_the_same(tmp_path: Path) -> None:
    key = made_key(tmp_path)
    result = score(
        [answered(key, [1, 6] * 10, "sees"), answered(key, [6] * 20, "always"), answered(key, [5, 2] * 10, "not")]
    )
    sees, always, reversed_ = result.readers
    assert [one.auc.value for one in result.readers] == [1, 0.5, 0]
    # Clopper and Pearson's interval of 20 in 20 begins at the 20th root of 0.025; Fisher's p is 2 in (20 over 10).
    assert (sees.accuracy.share.value, sees.accuracy.share.low) == (1, pytest.approx(0.025 ** (1 / 20)))
    assert sees.accuracy.p == pytest.approx(2 / 184_756)
    assert (always.accuracy.share.value, always.accuracy.chance, always.accuracy.p) == (0.5, 0.5, 1)
    assert (always.accuracy.synthetic, always.accuracy.real) == (1, 1)
    assert (reversed_.accuracy.synthetic, reversed_.accuracy.real) == (0, 1)
    assert result.auc.value == 0.5 and result.right.value == 0.5


def test_chance_follows_what_was_answered(tmp_path: Path) -> None:
    """Of 8 real and 2 synthetic images that were answered, who calls all real is right in 8, and so is chance."""
    key = made_key(tmp_path, "r" * 10 + "s" * 10)
    (one,) = score([answered(key, [1] * 8 + [None] * 2 + [1] * 2 + [None] * 8)]).readers
    assert one.answered == 10
    assert (one.accuracy.share.value, one.accuracy.chance, one.accuracy.p) == (0.8, pytest.approx(0.8), 1)


def test_the_interval_of_the_auc_is_as_wide_as_the_auc_scatters() -> None:
    """A reader who guesses: over many studies, the interval's half width is near to twice the spread of the AUCs."""
    rng = np.random.default_rng(1)
    truth = np.arange(100) % 2 == 1
    found = [
        figures.over_readers(figures.auc, rng.integers(1, 7, 100).astype(float)[None], truth, ~truth, rng)
        for _ in range(40)
    ]
    spread = np.std([one.value for one in found])
    half = np.mean([one.high - one.low for one in found]) / 2
    # 40 studies tell a spread to within a ninth.
    assert 1.96 * spread == pytest.approx(half, rel=0.3)
    assert np.mean([one.low <= 0.5 <= one.high for one in found]) >= 0.85


def test_for_other_readers_the_interval_is_wider_where_readers_differ(tmp_path: Path) -> None:
    key = made_key(tmp_path, "rs" * 30)
    rng = np.random.default_rng(2)
    alike = [rng.integers(1, 7, 60).tolist()] * 3
    differing = [[1, 6] * 30, rng.integers(1, 7, 60).tolist(), [6, 1] * 30]
    for readers, wider in ((alike, False), (differing, True)):
        result = score([answered(key, ratings, f"{wider} {k}") for k, ratings in enumerate(readers)])
        these, others = (one.high - one.low for one in (result.auc, result.auc_of_others))
        assert (others > 3 * these) if wider else others == pytest.approx(these, rel=0.3)


def test_kappas_are_those_of_textbooks() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: 0.7 agree, 0.5 by chance.
    first = np.repeat([1.0, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1.0, 0, 1, 0], [20, 5, 10, 15])
    found = figures.agreement(first, second, (0, 1), weighted=False)
    assert (found.count, found.alike, found.kappa, found.word) == (50, 35, pytest.approx(0.4), "fair")
    scale = np.array([1.0, 2, 3, 4, 5, 6])
    assert figures.agreement(scale, scale, LABELS, weighted=True).kappa == 1
    assert figures.agreement(scale, scale[::-1], LABELS, weighted=True).kappa == pytest.approx(-1)
    assert [figures.Kappa(9, 4, kappa).word for kappa in (-0.1, 0.0, 0.2, 0.61, 1.0)] == [
        "poor",
        "slight",
        "slight",
        "substantial",
        "almost perfect",
    ]
    # Off by one everywhere: 1 of 35/3 squared, which is what two such series miss each other by in the mean.
    off = np.array([2.0, 1, 4, 3, 6, 5])
    assert figures.agreement(scale, off, LABELS, weighted=True).kappa == pytest.approx(1 - 1 / (35 / 6))
    constant = figures.agreement(np.ones(5), np.ones(5), LABELS, weighted=True)
    assert (constant.alike, constant.kappa, constant.word) == (5, None, "undefined")
    assert figures.agreement(np.array([np.nan, 0.0]), np.array([1.0, 3.0]), LABELS, weighted=True).count == 0


def test_the_first_showing_counts_and_the_second_is_for_repeatability(tmp_path: Path) -> None:
    key = made_key(tmp_path, "rs" * 3, again=(0, 1, 2, 3))
    (one,) = score([answered(key, [1, 6, 2, 5, 1, 6, 1, 6, 5, 4])]).readers
    assert (one.answered, one.auc.value) == (6, 1)
    assert (one.repeats["call"].count, one.repeats["call"].alike) == (4, 3)
    assert one.repeats["rating"].alike == 2


def test_how_lesions_read_is_told_apart_for_real_and_synthetic_ones(tmp_path: Path) -> None:
    """Real malignant lesions get 5 and benign ones 2; synthetic ones are read the other way round; 0 is no degree."""
    key = made_key(tmp_path, "rs" * 20)
    birads = [5 if (k // 2 % 2 == 1) == (k % 2 == 0) else 2 for k in range(40)]
    birads[0] = 0
    result = score([answered(key, [3, 4] * 20, birads=birads)])
    assert {name: one.value for name, one in result.malignancy.items()} == {"real": 1, "synthetic": 0, "difference": -1}
    assert result.birads["real benign"] == {0: 1, 1: 0, 2: 9, 3: 0, 4: 0, 5: 0}
    assert result.birads["synthetic benign"] == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 10}
    assert result.readers[0].recorded.count == 19


def test_the_report_names_the_readers_and_shows_names_as_text(tmp_path: Path) -> None:
    key = made_key(tmp_path, "rs" * 10, again=(0, 1))
    content = json.loads(key.read_text())
    content["cases"][1]["id"] = "[x](javascript:alert) <img src=x> | `a`\n# b"
    key.write_text(json.dumps(content))
    hostile = "</td><script>alert(1)</script> | **me**\n\n# top \x1b[2J \u202e"
    result = score([answered(key, [1, 6] * 11, "B"), answered(key, [2, 4] * 11, hostile)])
    text = (tmp_path / "score" / "score.md").read_text()
    # What stands before a p-value may begin no tag: a space follows.
    assert not re.search(r"(?<!\\)<(?!\xa0)", text) and "\x1b" not in text and "\u202e" not in text
    assert "\n# top" not in text and "\\*\\*me\\*\\*" in text and "\\[x\\]\\(javascript" in text
    # Every table has as many cells in each of its lines.
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table
    stored = json.loads((tmp_path / "score" / "score.json").read_text())
    assert [one["auc"]["value"] for one in stored["readers"]] == [1, 1]
    assert stored["mean_kappa"]["call"] == 1 and len(stored["cases"]) == 20
    assert all(line.isprintable() for line in result.lines())


GOOD = {"image": 1, "rating": 3, "birads": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"study": "another"}, "answers the study another"),
        ({"reader": ""}, "reader"),
        ({"reader": "x" * 101}, "reader"),
        ({"reader": 7}, "reader"),
        ({"schema": 2}, "schema"),
        ({"answers": [GOOD, GOOD]}, "image 1, which it has already answered"),
        ({"answers": [{**GOOD, "image": 21}]}, "image 21, of 20"),
        ({"answers": [{**GOOD, "image": 0}]}, "image 0, of 20"),
        ({"answers": [{**GOOD, "rating": 7}]}, "rating"),
        ({"answers": [{**GOOD, "rating": True}]}, "rating"),
        ({"answers": [{**GOOD, "rating": "3"}]}, "rating"),
        ({"answers": [{**GOOD, "birads": 6}]}, "birads"),
        ({"answers": [{**GOOD, "birads": 2.5}]}, "birads"),
        ({"answers": [{"rating": 1}]}, "image"),
        ({"answers": [GOOD] * 1001}, "answers"),
        ({"answers": {}}, "answers"),
    ],
)
def test_answers_that_are_none_are_refused_by_what_is_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    key = made_key(tmp_path)
    path = answered(key, [1] * 20)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((InputError, IntegrityError), match=said):
        score([path])
    assert not (tmp_path / "score").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_holes_and_garbage_are_refused_in_a_line(tmp_path: Path) -> None:
    made_key(tmp_path)
    os.mkfifo(tmp_path / "answers-pipe.json")
    with (tmp_path / "answers-hole.json").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "answers-deep.json").write_text("[" * 100_000)
    (tmp_path / "answers-none.json").write_bytes(b"\xff\xfe\x00")
    for name in ("pipe", "hole", "deep", "none"):
        with pytest.raises(IntegrityError, match=rf"answers-{name}\.json .*save the answers on the page again"):
            score([tmp_path / f"answers-{name}.json"])
    error = error_line(run("reader-study", "score", tmp_path / "answers-pipe.json"), 5)
    assert "answers-pipe.json is a pipe, not a file" in error


def test_missing_answers_and_keys_are_named(tmp_path: Path) -> None:
    key = made_key(tmp_path)
    with pytest.raises(InputError, match=r"answers\*\.json does not exist"):
        score([tmp_path / "answers*.json"])
    path = answered(key, [1] * 20)
    key.rename(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match=r"key\.json does not exist.*--key"):
        score([path])
    assert score([path], key=tmp_path / "elsewhere.json").out == tmp_path / "score"


def test_a_changed_key_is_refused(tmp_path: Path) -> None:
    key = made_key(tmp_path)
    path = answered(key, [1, 6] * 10)
    content = json.loads(key.read_text())
    shown = content["shown"]
    for changed in ([*shown[1:], shown[0]], shown[:-1], [*shown, shown[0]], [{**shown[0], "case": 99}, *shown[1:]]):
        key.write_text(json.dumps({**content, "shown": changed}))
        with pytest.raises(IntegrityError, match=r"key\.json has other images"):
            score([path])


def test_no_reader_counts_twice_and_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    key = made_key(tmp_path)
    first, second = answered(key, [1, 6] * 10), answered(key, [6, 1] * 10)
    with pytest.raises(InputError, match="both of the reader A"):
        score([first, second])
    with pytest.raises(InputError, match="No image is answered"):
        score([answered(key, [], "B")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.md").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.md"):
        score([first], out=tmp_path / "mine")
    before = score([first]).to_dict()
    assert score([first]).to_dict() == before


def test_mutated_keys_and_answers_are_scored_or_refused(tmp_path: Path) -> None:
    key = made_key(tmp_path, "rs" * 4, again=(0,))
    path = answered(key, [1, 6] * 4 + [2])
    contents = {file: json.loads(file.read_text()) for file in (key, path)}
    for number in range(80):
        rng = random.Random(number)
        file = rng.choice([key, path])
        file.write_bytes(mutated(contents[file], rng))
        try:
            result = score([path])
        except BusigenError as error:
            assert error.exit_code in (3, 5) and len(str(error)) < 2000 and str(error).isprintable(), number
        else:
            assert isinstance(result, Score) and all(line.isprintable() for line in result.lines())
        file.write_text(json.dumps(contents[file]))
