"""What holds for every format: which pairs are taken, runs that are ended and continued, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from busigen.errors import BusigenError, InputError, IntegrityError, OutputError, UsageError
from busigen.registry import FORMATS
from busigen.runtime.convert.run import convert
from busigen.runtime.convert.source import opened
from busigen.runtime.dataset.reader import DATASET_FILE
from busigen.runtime.execution.factory import generate
from busigen.runtime.progress import Observer, Progress
from busigen.runtime.sampling.grid import Grid
from busigen.runtime.sampling.inputs.given_masks import MaskFolder
from busigen.runtime.storage.url import place_of
from tests.harness.command import error_line, run
from tests.harness.hashing import hashes
from tests.harness.hostile_datasets import CASES, VICTIM, edit, link
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.replaying import flip
from tests.runtime.sampling.inputs.test_given_masks import save
from tests.runtime.sampling.inputs.test_placement import blob
from tests.runtime.sampling.test_grid import Placed

PLAIN_FORMATS = [name for name, one in FORMATS.items() if not one.extra]


class Ended(Observer):
    """Ends a run, as Ctrl-C does, once so many pairs are done."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs

    def changed(self, progress: Progress) -> None:
        if progress.done >= self.pairs:
            raise KeyboardInterrupt


def names(out: Path) -> set[str]:
    return {path.stem for path in out.glob("images/*/*.png")}


@pytest.mark.parametrize("to", PLAIN_FORMATS)
def test_a_run_that_was_ended_continues_and_makes_the_same_bytes(plain: Path, tmp_path: Path, to: str) -> None:
    whole, out = tmp_path / "whole" / "Dataset501_A", tmp_path / "ended" / "Dataset501_A"
    convert(plain, whole, to=to)
    for pairs in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            convert(plain, out, to=to, progress=Progress(Ended(pairs)))
        done = {path: path.stat().st_ino for kind in ("png", "parquet") for path in out.rglob(f"*.{kind}")}
    report = convert(plain, out, to=to)
    assert hashes(out) == hashes(whole)
    assert len(done) >= (2 if to == "hf" else 8)
    assert {path: path.stat().st_ino for path in done} == done  # Nothing was written again.
    assert report.pairs == 10 and report.seconds is not None
    again = convert(plain, out, to=to)
    assert again.seconds is None and again.pairs == 10 and hashes(out) == hashes(whole)


def test_what_a_killed_run_left_half_written_is_made_anew(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(plain, out, to="files", progress=Progress(Ended(4)))
    (out / ".convert" / "new-9").write_bytes(b"half")
    (out / ".convert" / "000001.json").write_bytes(b"[")
    convert(plain, out, to="files")
    convert(plain, tmp_path / "whole", to="files")
    assert hashes(out) == hashes(tmp_path / "whole")


def test_merged_and_remote_datasets_are_converted_as_plain_ones_are(plain: Path, merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    convert(plain, tmp_path / "local", to="files")
    convert(place_of(f"file://{plain.as_posix()}"), tmp_path / "remote", to="files")
    assert hashes(tmp_path / "remote") == hashes(tmp_path / "local")
    convert(merged, tmp_path / "merged", to="files")
    assert names(tmp_path / "merged") == {
        *(f"000-{key:09d}" for key in range(10)),
        *(f"001-{key:09d}" for key in range(6)),
    }


def test_pairs_are_chosen_by_class_condition_and_limit(plain: Path, tmp_path: Path) -> None:
    rows = pl.read_parquet(plain / "manifest.parquet")
    for number, (options, wanted) in enumerate(
        [
            ({"classes": "malignant"}, pl.col("class") == "malignant"),
            ({"where": "lesion_pixels>4000"}, pl.col("lesion_pixels") > 4000),
            ({"where": "score<=0.5 and class=benign"}, (pl.col("score") <= 0.5) & (pl.col("class") == "benign")),
            ({"where": "flipped=true and key!='000000001'"}, pl.col("flipped") & (pl.col("index") != 1)),
            ({"where": "rarely!=none"}, pl.col("rarely").is_not_null()),
            ({"where": "never = none", "limit": 3}, pl.col("index") < 3),
            ({"where": "index>1", "limit": 5}, pl.col("index").is_between(2, 6)),
        ]
    ):
        out = tmp_path / str(number)
        convert(plain, out, to="files", **options)  # type: ignore[arg-type]
        assert names(out) == set(rows.filter(wanted)["key"]) != set()


@pytest.mark.parametrize("column", ["grid_group", "given_mask_sha256"])
def test_a_grids_background_and_a_users_mask_are_in_one_split_alone(column: str, tmp_path: Path) -> None:
    if column == "grid_group":
        grid = Grid.parse("size=0.03/0.05")
        sampler = quick_sampler(Placed(), grid=grid, asked=grid.held({}))
    else:
        for number in range(8):
            save(tmp_path / f"masks/benign/{number}.png", blob((300, 300), down=0.4 + 0.03 * number))
        sampler = quick_sampler(QuickEngine(), masks=MaskFolder(tmp_path / "masks"))
    generate(sampler, tmp_path / "set", count=16, seed=1, shard_size=8)
    with opened(tmp_path / "set", Progress()) as source:
        chosen = source.choose(None, None, None, {"train": 0.5, "val": 0.5})
    kin = pl.read_parquet(tmp_path / "set/manifest.parquet")[column]
    assert kin.n_unique() == 8
    assert chosen.with_columns(kin).group_by(column).agg(pl.col("split").n_unique())["split"].to_list() == [1] * 8
    assert chosen["split"].n_unique() == 2


def test_splits_have_their_shares_and_stay_the_same(plain: Path, tmp_path: Path) -> None:
    report = convert(plain, tmp_path / "a", to="files", split="train=0.5,val=0.3,test=0.2")
    assert report.splits == {"train": 5, "val": 3, "test": 2}
    assert "train 5, val 3, test 2" in next(report.lines())
    found = {path.parts[-4]: set() for path in (tmp_path / "a").glob("*/images/*/*")}
    for path in (tmp_path / "a").glob("*/images/*/*"):
        found[path.parts[-4]].add(path.stem)
    assert {name: len(keys) for name, keys in found.items()} == report.splits
    convert(plain, tmp_path / "b", to="files", split="train=0.5,val=0.3,test=0.2")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"to": "dicon"}, UsageError, "--to is 'dicon', which is no format"),
        ({"limit": 0}, UsageError, "--limit is 0"),
        ({"classes": "cyst"}, UsageError, "--classes names 'cyst'"),
        ({"where": "colour=red"}, UsageError, "names 'colour', which is no column"),
        ({"where": "class>benign"}, UsageError, "compares class with >benign. class holds text"),
        ({"where": "score=high"}, UsageError, "compares score with =high. score holds numbers"),
        ({"where": "score<nan"}, UsageError, "compares score with <nan"),
        ({"where": "score<'1'"}, UsageError, "compares score with <'1'"),
        ({"where": "flipped=maybe"}, UsageError, "flipped holds true or false"),
        ({"where": "score"}, UsageError, "is unclear from 'score' on"),
        ({"where": "score>0 or score<1"}, UsageError, "is unclear from 'or score<1' on"),
        ({"where": "score>0 and"}, UsageError, "is unclear from '' on"),
        ({"where": "__import__('os').system('true')"}, UsageError, "is unclear from"),
        ({"where": "score>2"}, InputError, "no pair of set is as --where and --classes ask. It has: 4 benign"),
        ({"split": "train=0.5"}, UsageError, "shares sum to 0.5"),
        ({"split": "train=0.5,train=0.5"}, UsageError, "names twice 'train'"),
        ({"split": "../up=1"}, UsageError, "names '../up'"),
        ({"split": "train=1,val=0"}, UsageError, "gives 'val' the share '0'"),
        ({"split": "train=0.97,val=0.03"}, InputError, "leaves nothing to 'val' of 10 pairs"),
    ],
)
def test_options_that_are_unfit_are_refused_and_nothing_is_written(
    plain: Path, tmp_path: Path, options: dict[str, object], error: type[BusigenError], problem: str
) -> None:
    with pytest.raises(error) as found:
        convert(plain, tmp_path / "out", **{"to": "files", **options})  # type: ignore[arg-type]
    assert problem in str(found.value)
    assert not (tmp_path / "out").exists()


def test_another_conversion_and_others_files_are_left_as_they_are(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(plain, out, to="files", limit=3)
    before = hashes(out)
    for options in ({"to": "coco"}, {"to": "files", "limit": 4}, {"to": "files"}):
        with pytest.raises(OutputError, match="holds another conversion"):
            convert(plain, out, **options)  # type: ignore[arg-type]
    assert hashes(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files \(thesis.tex\) and no convert.json"):
        convert(plain, tmp_path / "mine", to="files")
    assert hashes(tmp_path / "mine").keys() == {"thesis.tex"}
    with pytest.raises(UsageError, match="lies in the dataset"):
        convert(plain, plain / "files", to="files")
    for content in (b"{", b"[]", b'{"finished": 1}'):
        (tmp_path / "mine" / "convert.json").write_bytes(content)
        with pytest.raises(OutputError, match="is no record of a conversion"):
            convert(plain, tmp_path / "mine", to="files")


def test_a_link_in_a_target_is_not_written_through(plain: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    with pytest.raises(KeyboardInterrupt):
        convert(plain, out, to="files", progress=Progress(Ended(4)))
    elsewhere.mkdir()
    shutil.rmtree(out / "masks" / "benign")
    (out / "masks" / "benign").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        convert(plain, out, to="files")
    assert list(elsewhere.iterdir()) == []


def _no_dataset(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _unfinished(folder: Path) -> None:
    (folder / DATASET_FILE).unlink()


def _other_class(folder: Path) -> None:
    """A table with a class of its own, which is what the record says."""
    from busigen.runtime.dataset.shards import FileRecord

    path = folder / "manifest.parquet"
    pl.read_parquet(path).with_columns(pl.lit("cyst").alias("class")).write_parquet(path)
    edit(
        folder / DATASET_FILE,
        lambda info: info["files"].update({path.name: vars(FileRecord.of(folder, path.name))}),
    )


@pytest.mark.parametrize(
    ("damage", "error", "problem"),
    [
        (_no_dataset, InputError, "is no busigen dataset"),
        (_unfinished, InputError, "is not finished"),
        (lambda folder: flip(folder / "shards" / "000001.tar"), IntegrityError, "000001.tar is not the file that"),
        (lambda folder: flip(folder / "manifest.parquet"), IntegrityError, "manifest.parquet is not the file that"),
        (lambda folder: (folder / "shards" / "000002.tar").unlink(), IntegrityError, "000002.tar cannot be read"),
        (lambda folder: (folder / "manifest.parquet").unlink(), IntegrityError, "manifest.parquet cannot be read"),
        (link("shards/000001.tar", "/dev/zero"), InputError, "is a link"),
        (_other_class, InputError, "has pairs of the class 'cyst', which no format knows"),
        (lambda folder: (folder / DATASET_FILE).write_bytes(b"{}"), IntegrityError, "is damaged"),
    ],
)
def test_a_foreign_or_damaged_dataset_is_refused(
    plain: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[BusigenError], problem: str
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    damage(folder)
    with pytest.raises(error) as found:
        convert(folder, tmp_path / "out", to="files")
    assert problem in str(found.value)


def test_a_dataset_that_was_repaired_meanwhile_is_converted_to_its_end(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    flip(folder / "shards" / "000001.tar")
    with pytest.raises(IntegrityError):
        convert(folder, tmp_path / "out", to="files")
    assert names(tmp_path / "out") == {f"{key:09d}" for key in range(4)}  # The shard before it is whole.
    shutil.copy(plain / "shards" / "000001.tar", folder / "shards")
    convert(folder, tmp_path / "out", to="files")
    convert(plain, tmp_path / "whole", to="files")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("name", CASES)
def test_a_dataset_made_to_hurt_its_reader_ends_with_an_answer(plain: Path, tmp_path: Path, name: str) -> None:
    """What convert does not look at, such as the shards' own tables, may be as it likes."""
    (tmp_path / VICTIM).mkdir()
    (tmp_path / VICTIM / "file").write_text("precious")
    CASES[name][0](Path(shutil.copytree(plain, tmp_path / "set")))
    before = hashes(tmp_path / VICTIM)
    try:
        report = convert(tmp_path / "set", tmp_path / "out", to="files")
    except BusigenError as error:
        assert error.exit_code in (3, 5)
    else:
        assert report.pairs == 10 and names(tmp_path / "out") == {f"{key:09d}" for key in range(10)}
    assert hashes(tmp_path / VICTIM) == before


def test_parts_that_a_merged_dataset_does_not_record_are_refused(merged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged, tmp_path / "set"))
    edit(folder / DATASET_FILE, lambda info: info["parts"][1].update(dataset_sha256="0" * 64))
    with pytest.raises(IntegrityError, match="does not describe the parts"):
        convert(folder, tmp_path / "out", to="files")


def test_the_command_prints_what_it_made_and_ends_with_the_documented_codes(plain: Path, tmp_path: Path) -> None:
    done = run("convert", plain, "--to", "coco", "--out", tmp_path / "out", "--limit", 3)
    assert done.returncode == 0 and done.stdout.startswith(f"3 pairs as coco in {tmp_path / 'out'}, in 0 s\n")
    assert json.loads((tmp_path / "out" / "convert.json").read_text())["pairs"] == 3
    assert "choose another --out" in error_line(run("convert", plain, "--to", "coco", "--out", tmp_path / "out"), 4)
    line = error_line(run("convert", plain, "--to", "dicon", "--out", tmp_path / "b"), 2)
    assert all(name in line for name in FORMATS)
    error_line(run("convert", tmp_path / "none", "--to", "coco", "--out", tmp_path / "b"), 3)
