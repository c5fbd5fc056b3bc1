"""Making a reader study: who is in it, in which order, and that nothing but the images tells which are real."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.inpainting import without_overlays
from busigen.data.prepared import Prepared
from busigen.errors import InputError, OutputError, UsageError
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reader_study.cases import Side, choose, sequence, spread
from busigen.evaluation.reader_study.make import make
from busigen.evaluation.reader_study.pictures import LESION_MARGIN, finished, with_decoys
from busigen.evaluation.reader_study.records import Key, Truth, read_key
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.execution.factory import generate
from tests.conftest import Sources
from tests.harness.command import error_line, run
from tests.harness.noise_source import NoiseSource
from tests.harness.synthetic_datasets import draw_pairs
from tests.harness.synthetic_sets import BAR, synthetic_set


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "set"
    generate(NoiseSource(), out, count=24, seed=7)
    return out


def pictures(page: str) -> list[bytes]:
    (content,) = re.findall(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)
    return [base64.b64decode(image, validate=True) for image in json.loads(content)["images"]]


def chunks(png: bytes) -> list[tuple[bytes, int]]:
    """Name and length of every part of a PNG file."""
    found, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        found.append((png[at + 4 : at + 8], length))
        at += 12 + length
    return found


def counts(key: Key) -> Counter[tuple[str, str]]:
    return Counter((case.truth, case.image_class) for case in key.cases)


def test_a_study_of_what_prepare_wrote(dataset: Path, synthetic_prepared: Prepared, tmp_path: Path) -> None:
    made = make(dataset, synthetic_prepared.folder, tmp_path / "study", cases=8, repeats=2)
    key = read_key(tmp_path / "study" / "key.json")
    assert counts(key) == {(truth, label): 2 for truth in ("real", "synthetic") for label in ("benign", "malignant")}
    assert (key.study, made.images, len(key.shown)) == (made.study, 10, 10)
    table = synthetic_prepared.table
    real = [case for case in key.cases if case.truth == "real"]
    rows = table.filter(pl.col("id").is_in([case.id for case in real]))
    assert set(rows["split"]) <= {"val", "test"} and rows["group"].n_unique() == len(real)
    assert Counter((case.image_class, case.source) for case in real) == {
        (label, source): 1 for label in ("benign", "malignant") for source in ("busi", "busbra")
    }
    assert {case.birads for case in real if case.source == "busbra"} <= {"2", "3", "4", "5"}
    # A real image is the prepared one with overlays painted over, its bars black.
    shown = pictures((tmp_path / "study" / "study.html").read_text())
    number = next(place for place, one in enumerate(key.shown) if key.cases[one.case].truth == "real")
    row = table.row(by_predicate=pl.col("id") == key.cases[key.shown[number].case].id, named=True)["row"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown[number]))), synthetic_prepared.clean[row])


def test_nothing_but_the_pixels_tells_the_images_apart(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    make(dataset, synthetic_busi, tmp_path / "study", cases=12)
    page = (tmp_path / "study" / "study.html").read_text()
    shown = pictures(page)
    assert len(shown) == 14
    # The same parts of the same sizes, nothing said beside the pixels, and one format.
    assert len({tuple(chunks(png)) for png in shown}) == 1
    assert {name for name, _ in chunks(shown[0])} == {b"IHDR", b"IDAT", b"IEND"}
    assert {png[:41] for png in shown} == {shown[0][:41]}
    key = json.loads((tmp_path / "study" / "key.json").read_text())
    assert len({case["id"] for case in key["cases"]}) == 12
    text = re.sub(r'"images": \[.*?\]', "", page)
    for case in key["cases"]:
        for told in (case["id"], case["file"], case["sha256"], case["sha256"][:12]):
            assert told not in text
    for word in ("busi", "dataset_busi", "malignant", "noise", key["sets"]["real"]["name"], "000000"):
        assert word not in text.lower().replace("busigen", ""), word


def test_the_page_is_the_same_whatever_the_images_are(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    """Two studies of other sets differ in their images and name, and in nothing else."""
    draw_pairs(tmp_path / "pairs", count=18)
    make(dataset, synthetic_busi, tmp_path / "one", cases=4, repeats=1)
    make(tmp_path / "pairs", synthetic_busi, tmp_path / "two", cases=4, repeats=1, seed=5)
    texts = [
        re.sub(r'"(images|study)": (\[.*?\]|"[0-9a-f]{16}")', "", (tmp_path / name / "study.html").read_text())
        for name in ("one", "two")
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) < 30_000


def test_the_same_seed_gives_the_same_study_and_another_set_another_order(
    dataset: Path, synthetic_busi: Path, tmp_path: Path
) -> None:
    def truths(name: str) -> list[str]:
        key = read_key(tmp_path / name / "key.json")
        return [key.cases[one.case].truth for one in key.shown]

    make(dataset, synthetic_busi, tmp_path / "one", cases=12)
    make(dataset, synthetic_busi, tmp_path / "two", cases=12)
    for name in ("study.html", "key.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    make(dataset, synthetic_busi, tmp_path / "seed", cases=12, seed=1)
    generate(NoiseSource(), tmp_path / "other", count=24, seed=8)
    make(tmp_path / "other", synthetic_busi, tmp_path / "set", cases=12)
    assert truths("one") != truths("seed") and truths("one") != truths("set")


def test_outlines_are_drawn_on_request(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    plain, drawn = (
        make(dataset, synthetic_busi, tmp_path / str(outlines), cases=4, repeats=0, outlines=outlines).out
        for outlines in (False, True)
    )
    assert "white line" in (drawn / "study.html").read_text()
    for one, two in zip(*(pictures((out / "study.html").read_text()) for out in (plain, drawn)), strict=True):
        before, after = (np.asarray(Image.open(io.BytesIO(png))) for png in (one, two))
        changed = before != after
        assert changed.any() and (after[changed] == 255).all()


def test_bars_are_black_whatever_lay_there() -> None:
    valid = np.zeros((256, 256), np.bool_)
    valid[20:236] = True
    pixels = np.full((256, 256), 77, np.uint8)
    png = finished(pixels, valid, None)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.where(valid, 77, 0))
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    assert len(finished(noise, valid, None)) == len(png)


def test_decoys_lie_where_the_other_image_was_painted_over_and_spare_lesion_and_bars() -> None:
    images = synthetic_set(1, 0)
    pixels, valid = images.images[0].copy(), images.valid[0]
    pixels[~valid] = 200
    like, like_valid = (np.zeros((256, 256), np.bool_) for _ in range(2))
    like_valid[:, 64:192] = True
    like[:128, 64:96] = True  # The upper left quarter's left half.
    lesion = np.zeros_like(like)
    lesion[60:80, 20:40] = True
    nothing = np.zeros_like(like)
    painted = with_decoys(pixels, valid, nothing, lesion, like, like_valid, 512)
    decoys = np.zeros_like(like)
    decoys[BAR:128, :64] = True
    decoys[60 - LESION_MARGIN : 80 + LESION_MARGIN, 20 - LESION_MARGIN : 40 + LESION_MARGIN] = False
    changed = painted != pixels
    assert not (changed & ~decoys).any()
    assert changed[decoys].mean() > 0.9
    own = np.zeros_like(like)
    own[200:210, 100:140] = True
    both = with_decoys(pixels, valid, own, lesion, like, like_valid, 512)
    assert (both != pixels)[own].mean() > 0.9
    # Where both were painted over before they were shrunk, the traces are as fine as each other's.
    assert np.array_equal(with_decoys(pixels, valid, nothing, lesion, nothing, like_valid, 512), pixels)
    same = with_decoys(pixels, valid, own, nothing, nothing, like_valid, 256)
    inside = slice(BAR, 256 - BAR)
    assert np.array_equal(same[inside][own[inside]], without_overlays(pixels[inside], own[inside])[own[inside]])


def test_images_that_give_themselves_away_are_left_out(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    def ids(name: str) -> list[str]:
        return [case.id for case in read_key(tmp_path / name / "key.json").cases]

    make(dataset, synthetic_busi, tmp_path / "one", cases=8)
    left_out = ids("one")[::2]
    make(dataset, synthetic_busi, tmp_path / "two", cases=8, leave_out=left_out)
    assert len(ids("two")) == 8 and not set(left_out) & set(ids("two"))
    with pytest.raises(UsageError, match="--leave-out nobody: no image that was read"):
        make(dataset, synthetic_busi, tmp_path / "three", cases=8, leave_out=["nobody"])


def side(truth: Truth, images: ImageSet, **told: list[str | None]) -> Side:
    columns = {name: told.get(name, [None] * len(images)) for name in ("source", "scanner", "birads")}
    table = images.table.with_columns(**{name: pl.Series(said, dtype=pl.String) for name, said in columns.items()})
    return Side(truth, replace(images, table=table))


def test_classes_and_sources_are_balanced_and_no_group_comes_twice() -> None:
    rng = np.random.default_rng(0)
    real = synthetic_set(80, 1)
    sources = [("a", "a", "a", "b")[k // 2 % 4] for k in range(80)]  # b: 10 groups, all malignant ones.
    sides = [side("real", real, source=sources), side("synthetic", synthetic_set(60, 2))]
    (real_rows, rows), notes = choose(sides, 38, rng)
    assert (len(real_rows), len(rows)) == (19, 19)
    assert len(notes) == 1 and "Scanners are matched for 0 of 10 benign, 0 of 9 malignant images a side" in notes[0]
    drawn = real.table[real_rows.tolist()]
    assert sorted(Counter(drawn["class"]).values()) == [9, 10]
    assert drawn["group"].n_unique() == 19
    malignant = Counter(sources[row] for row in real_rows if real.classes[row] == "malignant")
    assert abs(malignant["a"] - malignant["b"]) <= 1


def test_scanners_are_as_frequent_on_one_side_as_on_the_other_as_far_as_both_have_them() -> None:
    # Groups of two images, every second of them benign.
    told = {
        "real": [("A", "B", "A", None, "A", "C")[k // 4 % 6] for k in range(96)],
        "synthetic": [("B", None, "A", "D")[k // 4 % 4] for k in range(96)],
    }
    made = {truth: synthetic_set(96, number) for number, truth in enumerate(told, start=1)}
    sides = [
        side("real", made["real"], scanner=told["real"]),
        side("synthetic", made["synthetic"], scanner=told["synthetic"]),
    ]

    def drawn(cases: int) -> tuple[list[Counter[tuple[str, str | None]]], list[str]]:
        rows, notes = choose(sides, cases, np.random.default_rng(0))
        found = [
            Counter((str(one.images.classes[row]), told[one.truth][row]) for row in some)
            for one, some in zip(sides, rows, strict=True)
        ]
        assert all(
            sorted(Counter(one.images.groups[some]).values()) == [1] * (cases // 2)
            for one, some in zip(sides, rows, strict=True)
        )
        return found, notes

    (real, synthetic), notes = drawn(24)
    assert real == synthetic == {(label, name): 3 for label in ("benign", "malignant") for name in "AB"} and not notes
    # Of B the real set has four of a class, and of A the synthetic one six.
    (real, synthetic), notes = drawn(44)
    assert len(notes) == 1 and "matched for 10 of 11 benign, 10 of 11 malignant images a side" in notes[0]
    for label in ("benign", "malignant"):
        assert (
            real[label, "A"] >= 6
            and real[label, "B"] >= 4
            and synthetic[label, "A"] >= 6
            and synthetic[label, "B"] >= 4
        )


class ScannerSource(NoiseSource):
    """The noise source, whose samples say in turn which scanner they are of, or any."""

    def row_types(self) -> Mapping[str, type]:
        return {**super().row_types(), "scanner": str}

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        batch = super().draw(seed, indices, done)
        names = ("GE Logiq E9", "GE Logiq 7", "Philips", None)
        return replace(
            batch, samples=[replace(one, row=one.row | {"scanner": names[one.index % 4]}) for one in batch.samples]
        )


def test_a_study_matches_the_scanners_that_prepare_and_a_dataset_name(any_sources: Sources, tmp_path: Path) -> None:
    folder = any_sources.prepared.folder
    named = any_sources.prepared.table.filter(pl.col("scanner") == "GE Logiq 7").height > 0
    generate(ScannerSource(), tmp_path / "set", count=80, seed=7)
    made = make(tmp_path / "set", folder, tmp_path / "study", cases=16 if named else 8)
    key = read_key(tmp_path / "study" / "key.json")
    found = Counter((case.truth, case.image_class, case.scanner) for case in key.cases)
    # The drawn sets name BUSI's scanner alone.
    scanners = ("GE Logiq 7", "GE Logiq E9") if named else ("GE Logiq E9",)
    assert found == {
        (truth, label, name): 2
        for truth in ("real", "synthetic")
        for label in ("benign", "malignant")
        for name in scanners
    }
    assert not any("Scanners" in note for note in made.notes)
    told = dict(any_sources.prepared.table.select("id", "scanner").iter_rows())
    assert all(told[case.id] == case.scanner for case in key.cases if case.truth == "real")


def test_too_few_images_of_a_class_say_how_many_cases_there_can_be() -> None:
    rng = np.random.default_rng(0)
    sides = [side("real", synthetic_set(16, 1)), side("synthetic", synthetic_set(80, 2))]
    with pytest.raises(InputError, match=r"24 cases need 6 real images of the class benign.* has 4\. .*--cases 16\."):
        choose(sides, 24, rng)
    assert [len(rows) for rows in choose(sides, 16, rng)[0]] == [8, 8]
    with pytest.raises(InputError, match="share no class: the real ones are normal; the synthetic ones are benign"):
        choose([side("real", synthetic_set(8, 1, ("normal",))), sides[1]], 8, rng)


def test_repeats_come_at_least_a_third_of_the_cases_later() -> None:
    truths = ["real", "synthetic"] * 50
    for seed in range(20):
        order = sequence(truths, 20, np.random.default_rng(seed))  # type: ignore[arg-type]
        places: dict[int, list[int]] = {}
        for place, case in enumerate(order):
            places.setdefault(case, []).append(place)
        twice = {case: found for case, found in places.items() if len(found) == 2}
        assert len(places) == 100 and len(order) == 120
        assert Counter(truths[case] for case in twice) == {"real": 10, "synthetic": 10}
        assert all(second - first > 33 for first, second in twice.values())
    assert sorted(sequence(["real", "synthetic"] * 2, 1, np.random.default_rng(0)))[-1] == 3


def test_what_is_dealt_is_as_even_as_there_is_room() -> None:
    assert spread(10, [2, 9, 9]) == [2, 4, 4]
    assert spread(3, [1, 1, 1]) == [1, 1, 1]
    with pytest.raises(ValueError, match="4 do not fit"):
        spread(4, [1, 2])


def test_sets_and_numbers_that_make_no_study_are_refused(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    for wrong in ({"cases": 3}, {"cases": 501}, {"cases": 9, "repeats": 4}, {"repeats": -1}):
        with pytest.raises(UsageError):
            make(dataset, synthetic_busi, out, **wrong)
    with pytest.raises(InputError, match="is a busigen dataset"):
        make(synthetic_busi, dataset, out, cases=4)
    with pytest.raises(InputError, match="equal files"):
        make(synthetic_busi, synthetic_busi, out, cases=4)
    assert not out.exists()


def test_another_study_and_other_files_are_left_alone(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    make(dataset, synthetic_busi, out, cases=4)
    (out / "answers-A.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    make(dataset, synthetic_busi, out, cases=4)
    with pytest.raises(OutputError, match="another study"):
        make(dataset, synthetic_busi, out, cases=4, seed=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.md").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.md"):
        make(dataset, synthetic_busi, tmp_path / "mine", cases=4)


def test_the_command_in_both_its_forms(dataset: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = run("reader-study", dataset, "--real", synthetic_busi, "--cases", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "1 real benign, 1 real malignant, 1 synthetic benign, 1 synthetic malignant" in done.stdout
    note = "Scanners are matched for 0 of 1 malignant, 0 of 1 benign images a side"  # The rarest first.
    assert note in " ".join(done.stdout.split()) and note in (out / "README.md").read_text()
    key = read_key(out / "key.json")
    truths = [key.cases[one.case].truth for one in key.shown]
    answers = [{"image": k + 1, "rating": 6 if truth == "synthetic" else 1} for k, truth in enumerate(truths)]
    for reader in "AB":
        content = {"schema": 1, "study": key.study, "reader": reader, "answers": answers}
        (out / f"answers-{reader}.json").write_text(json.dumps(content))
    scored = run("reader-study", "score", out / "answers-A.json", out / "answers-B.json")
    assert scored.returncode == 0, scored.stderr
    assert "mean of 2 readers: AUC 1" in scored.stdout
    assert (out / "score" / "score.md").is_file() and (out / "score" / "score.json").is_file()
    helped = run("reader-study")
    assert helped.returncode == 0 and "make" in helped.stdout and "score" in helped.stdout
    assert "--real" in error_line(run("reader-study", dataset, "--out", out), 2)
    assert "--cases is 3" in error_line(run("reader-study", dataset, "--real", dataset, "--out", out, "--cases", 3), 2)
