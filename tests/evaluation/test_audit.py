"""The audit as a user meets it: real processes, a report in JSON and HTML, and reruns that continue."""

from __future__ import annotations

import html
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from busigen.data.prepared import Prepared
from busigen.errors import InputError, OutputError, UsageError
from busigen.evaluation.audit import Report, audit
from busigen.evaluation.context import AuditContext
from busigen.evaluation.sections import SECTIONS, key_of
from busigen.text import install_command
from tests.harness.hashing import hashes
from tests.harness.planted_defects import draw_set
from tests.harness.synthetic_datasets import draw_busi, draw_pairs

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "busigen.cli", "audit"]
QUICKEST = ["--only", "integrity", "--device", "cpu"]

Done = subprocess.CompletedProcess[str]


def run(*arguments: object) -> Done:
    command = [*CLI, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def error_line(done: Done, code: int) -> str:
    """The error that a refused command ends with."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "This is a bug" not in line
    return line


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder of 24 images, read-only."""
    return draw_pairs(tmp_path_factory.mktemp("pairs") / "made", count=24)


@pytest.fixture(scope="module")
def busi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another draw of BUSI than the one that is prepared, read-only."""
    return draw_busi(tmp_path_factory.mktemp("other") / "Dataset_BUSI_with_GT", seed=9)


def audited(synthetic: Path, real: Path, out: Path, **options: object) -> Report:
    return audit(synthetic, real, out, **{"only": ["integrity"], "device": "cpu", **options})


def test_the_command_writes_both_reports_and_says_what_it_found(pairs: Path, busi: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = run(pairs, "--real", busi, "--out", out, *QUICKEST)
    assert done.returncode == 0, done.stderr
    assert "synthetic  24 images with 16 lesions" in done.stdout
    assert "real       32 images with 24 lesions" in done.stdout
    assert "Nobody said which real images trained the generator" in done.stdout
    assert "  Images with calipers: " in done.stdout
    assert f"Report: {out / 'report.html'}" in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["sets"]["synthetic"]["classes"] == {"benign": 8, "malignant": 8, "normal": 8}
    assert report["sets"]["real"]["layout"] == "BUSI"
    assert report["inputs"]["synthetic"] == str(pairs)
    assert {"python", "numpy", "scipy"} <= set(report["versions"])
    assert [section["section"] for section in report["sections"]] == ["integrity"]
    assert report["seconds"]["integrity"] > 0
    figures = {figure["key"]: figure for figure in report["sections"][0]["figures"]}
    figure = figures["integrity.mask.displacement"]
    assert figure["value"]["low"] <= figure["value"]["value"] <= figure["value"]["high"]
    assert figure["floor"]["low"] <= figure["floor"]["value"] <= figure["floor"]["high"]
    assert (figure["synthetic"], figure["real"]) == (16, 24)
    page = html.unescape((out / "report.html").read_text())
    assert figure["label"] in page
    assert SECTIONS["physics"].title in page, "the page names what was not asked"


def test_a_rerun_keeps_what_is_there_and_a_change_does_not(pairs: Path, busi: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(pairs, tmp_path / "made"))
    out = tmp_path / "report"
    first = audited(made, busi, out)
    assert not first.outcomes["integrity"].cached
    again = audited(made, busi, out)
    assert again.outcomes["integrity"].cached
    assert again.outcomes["integrity"].result == first.outcomes["integrity"].result
    assert not audited(made, busi, out, seed=1).outcomes["integrity"].cached
    # The same images in another place are the same set; one mask less is another.
    moved = made.rename(tmp_path / "elsewhere").rename(tmp_path / "made")
    assert audited(moved, busi, out, seed=1).outcomes["integrity"].cached
    next((made / "masks").iterdir()).unlink()
    assert not audited(made, busi, out, seed=1).outcomes["integrity"].cached


def test_a_result_is_made_anew_for_what_its_section_reads_and_for_nothing_else(tmp_path: Path) -> None:
    sets = {"synthetic": "a", "real": "b", "train": "c", "external": None}
    (tmp_path / "healthy").mkdir()
    scan = tmp_path / "healthy" / "scan.png"
    Image.new("L", (64, 64), 90).save(scan)
    context = AuditContext(draw_set(2), draw_set(2), None, tmp_path, healthy=tmp_path / "healthy")
    before = {name: key_of(section, context, sets) for name, section in SECTIONS.items()}

    def changed(context: AuditContext, sets: dict[str, str | None]) -> set[str]:
        return {name for name, section in SECTIONS.items() if key_of(section, context, sets) != before[name]}

    assert changed(context, sets) == set()
    assert changed(context, {**sets, "train": "d"}) == {"utility", "privacy"}
    assert changed(context, {**sets, "external": "d"}) == {"utility"}
    assert changed(replace(context, seed=1), sets) == set(SECTIONS)
    # The same name, another image: what was proved of the old one is not proved of the new one.
    Image.new("L", (64, 64), 91).save(scan)
    assert changed(context, sets) == {"integrity"}


@pytest.mark.parametrize("damage", ["picture", "truncated", "foreign"])
def test_a_kept_result_that_is_not_whole_is_made_anew(pairs: Path, busi: Path, tmp_path: Path, damage: str) -> None:
    made, out = Path(shutil.copytree(pairs, tmp_path / "made")), tmp_path / "report"
    for folder in (made / "images" / "benign", made / "masks"):
        shutil.copy(folder / "scan0.png", folder / "again.png")  # A repeat, of which the report shows a picture.
    first = audited(made, busi, out)
    folder = out / "sections" / "integrity"
    if damage == "picture":
        (folder / first.outcomes["integrity"].result.pictures[0].file).unlink()
    elif damage == "truncated":
        (folder / "result.json").write_bytes((folder / "result.json").read_bytes()[:100])
    else:
        (folder / "result.json").write_text('{"key": "", "result": []}')
    again = audited(made, busi, out)
    assert not again.outcomes["integrity"].cached
    assert again.outcomes["integrity"].result.pictures
    assert all((folder / picture.file).is_file() for picture in again.outcomes["integrity"].result.pictures)


@pytest.mark.parametrize(
    ("how", "seen"),
    [
        (signal.SIGKILL, "sections/integrity/result.json"),
        (signal.SIGINT, "sections/integrity/result.json"),
        (signal.SIGKILL, "cache/radiomics-*.parquet"),
    ],
)
def test_interrupted_it_keeps_the_finished_sections(
    pairs: Path, busi: Path, tmp_path: Path, how: signal.Signals, seen: str
) -> None:
    out = tmp_path / "report"
    arguments = [str(pairs), "--real", str(busi), "--out", str(out), "--only", "integrity,physics", "--device", "cpu"]
    process = subprocess.Popen(
        [*CLI, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not any(out.glob(seen)):
        time.sleep(0.005)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert not (out / "report.json").exists(), "it was killed before the end"
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"{out} keeps the sections that were finished" in errors.splitlines()[-1]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("integrity") and "kept from an earlier run" in line for line in lines)
    assert any(line.startswith("physics") and "kept" not in line for line in lines)


def test_training_images_judge_nothing(pairs: Path, synthetic_prepared: Prepared, tmp_path: Path) -> None:
    folder = synthetic_prepared.folder
    report = audited(pairs, folder, tmp_path / "report", train_split=folder)
    by_split = synthetic_prepared.table["split"].value_counts()
    counts = dict(by_split.iter_rows())
    assert report.content["sets"]["real"]["images"] == counts["val"] + counts["test"]
    assert report.content["sets"]["train"]["images"] == counts["train"]
    assert f"{counts['train']} trained the generator" in report.content["notes"][0]


def test_a_real_set_of_training_images_alone_is_refused(
    pairs: Path, synthetic_busi: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    table = synthetic_prepared.table
    folder = Path(shutil.copytree(synthetic_busi, tmp_path / "real"))
    for row in table.iter_rows(named=True):
        if row["split"] != "train" and row["source"] == "busi":
            (tmp_path / "real" / Path(row["image_file"]).relative_to(synthetic_busi.name)).unlink()
    with pytest.raises(InputError, match=r"every image of .* trained the generator"):
        audited(pairs, folder, tmp_path / "report", train_split=synthetic_prepared.folder)


def test_training_images_test_no_utility(
    pairs: Path, synthetic_busi: Path, synthetic_busbra: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    """An external folder with images of the training set, as they are and saved again under another name."""
    table = synthetic_prepared.table.filter(pl.col("split") == "train")
    ours = draw_pairs(tmp_path / "elsewhere", count=6)
    for number, (source, root) in enumerate(
        (("busi", synthetic_busi), ("busbra", synthetic_busbra), ("busbra", synthetic_busbra))
    ):
        file = root.parent / table.filter(pl.col("source") == source)["image_file"][number]
        if number == 0:
            shutil.copy(file, ours / "images" / "benign" / "copied.png")
        else:
            Image.open(file).convert("L").save(ours / "images" / "benign" / f"again{number}.png", optimize=True)
    report = audited(pairs, synthetic_busi, tmp_path / "r", train_split=synthetic_prepared.folder, external=ours)
    assert report.content["sets"]["external"]["images"] == 6
    assert any(
        "3 were left out (1 trained the generator, 2 resemble a training image or share its patient); 6 are tested on."
        in note
        for note in report.content["notes"]
    )
    for folder in (ours / "images", ours / "masks"):
        for file in folder.rglob("scan*.png"):
            file.unlink()
    with pytest.raises(InputError, match=r"--external .*elsewhere: every image trained the generator"):
        audited(pairs, synthetic_busi, tmp_path / "r", train_split=synthetic_prepared.folder, external=ours)


def test_a_set_is_not_judged_by_itself(pairs: Path, busi: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every image of .*made is one of .*made as well"):
        audited(pairs, pairs, tmp_path / "report")
    real = Path(shutil.copytree(busi, tmp_path / "real"))
    shutil.copy(pairs / "images" / "benign" / "scan0.png", real / "benign" / "benign (99).png")
    shutil.copy(pairs / "masks" / "scan0.png", real / "benign" / "benign (99)_mask.png")
    notes = audited(pairs, real, tmp_path / "report").content["notes"]
    assert any(note.startswith("1 of the synthetic images are also files of the real set") for note in notes)


def test_too_few_images_are_no_clean_bill_of_health(pairs: Path, busi: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = run(pairs, "--real", busi, "--out", out, "--limit", "10", "--only", "integrity", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "    With fewer than 20 images on a side, nothing is flagged by comparison." in done.stdout.splitlines()
    assert "silence says nothing" in (out / "report.html").read_text()


def test_a_limit_draws_and_says_so(pairs: Path, busi: Path, tmp_path: Path) -> None:
    report = audited(pairs, busi, tmp_path / "report", limit=10)
    assert [report.content["sets"][name]["images"] for name in ("synthetic", "real")] == [10, 10]
    assert sum("drawn at random in whole groups" in note for note in report.content["notes"]) == 2


def test_a_section_that_lacks_a_library_says_so_and_the_others_run(pairs: Path, busi: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    code = (
        "import sys\nsys.modules['skimage'] = None\nfrom busigen.cli import main\n"
        f"sys.argv = ['busigen', 'audit', {str(pairs)!r}, '--real', {str(busi)!r}, '--out', {str(out)!r}, "
        "'--only', 'integrity,physics', '--device', 'cpu', *sys.argv[1:]]\nmain()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # Not everything that was asked for is done, with or without a gate.
    assert "physics" in error_line(done, 1)
    assert "physics    NOT RUN" in done.stdout
    assert install_command("eval") in done.stdout
    assert json.loads((out / "report.json").read_text())["sections"][0]["figures"]
    # A gate must not open because nobody looked.
    done = subprocess.run([*command, "--fail-on-flag"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "physics" in error_line(done, 1)


def test_a_missing_extra_is_named(pairs: Path, busi: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['jinja2'] = None\nfrom busigen.cli import main\n"
        f"sys.argv = ['busigen', 'audit', {str(pairs)!r}, '--real', {str(busi)!r}, '--out', {str(tmp_path / 'r')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert install_command("eval") in error_line(done, 7)
    assert not (tmp_path / "r").exists()


def test_fail_on_flag(pairs: Path, busi: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(pairs, tmp_path / "made"))
    (made / "images" / "benign" / "scan0.png").write_bytes(b"no image")
    out = tmp_path / "report"
    done = run(made, "--real", busi, "--out", out, *QUICKEST)
    assert done.returncode == 0
    assert "integrity  FLAGGED" in done.stdout
    assert "! 1 files or entries could not be used" in done.stdout
    line = error_line(run(made, "--real", busi, "--out", out, *QUICKEST, "--fail-on-flag"), 9)
    assert "integrity" in line
    assert str(out / "report.html") in line


@pytest.mark.parametrize(
    ("options", "code", "texts"),
    [
        (["--only", "integrity,beauty"], 2, ["'beauty'", "integrity, physics, fidelity, realness, utility, privacy"]),
        (["--only", ","], 2, ["--only names no section", "integrity"]),
        (["--device", "tpu"], 2, ["'tpu'", "auto, cpu or cuda"]),
        (["--limit", "1"], 2, ["--limit is 1"]),
        (["--train-split", "{pairs}"], 3, ["no prepared folder"]),
        (["--healthy", "nowhere"], 3, ["--healthy nowhere"]),
        (["--inception", "nowhere.pt"], 3, ["--inception nowhere.pt"]),
        (["--real", "nowhere"], 3, ["--real nowhere does not exist"]),
    ],
)
def test_a_wrong_option_is_one_line(
    pairs: Path, busi: Path, tmp_path: Path, options: list[str], code: int, texts: list[str]
) -> None:
    options = [option.format(pairs=pairs) for option in options]
    done = run(pairs, "--real", busi, "--out", tmp_path / "r", *options)
    line = error_line(done, code)
    assert all(text in line for text in texts)
    # Told at once, and not after minutes of reading.
    assert "reading" not in done.stderr


def test_a_folder_with_other_content_is_left_alone(pairs: Path, busi: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.docx"):
        audited(pairs, busi, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


@pytest.mark.parametrize(
    "theirs",
    [
        {"report.json": '{"tests": 12}'},
        {"report.json": "PDF"},
        {"sections/chapter 1.tex": "mine"},
        {"sections/integrity/table.csv": "mine", "thesis.tex": "mine"},
        {"sections/integrity/table.csv": "mine", "cache/page.html": "mine"},
    ],
    ids=str,
)
def test_a_folder_that_only_looks_like_a_report_is_left_alone(
    pairs: Path, busi: Path, tmp_path: Path, theirs: dict[str, str]
) -> None:
    for name, text in theirs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match="holds no report"):
        audited(pairs, busi, tmp_path)
    assert hashes(tmp_path).keys() == theirs.keys()


def test_cuda_is_refused_where_there_is_none(pairs: Path, busi: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        assert audited(pairs, busi, tmp_path / "report", device="cuda").content["inputs"]["device"] == "cuda"
    else:
        with pytest.raises(UsageError, match="--device cpu"):
            audited(pairs, busi, tmp_path / "report", device="cuda")


def test_an_audit_within_a_column_compares_with_such_real_images_alone(
    pairs: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    real = synthetic_prepared.folder
    report = audit(pairs, real, tmp_path / "out", only=["integrity"], within="source=busi")
    kept = synthetic_prepared.table.filter((pl.col("source") == "busi") & (pl.col("split") != "excluded"))
    assert report.content["sets"]["real"]["images"] == len(kept)
    assert report.content["inputs"]["within"] == "source=busi"
    assert any("no column 'source'" in note for note in report.content["notes"])
    line = error_line(run(pairs, "--real", real, "--within", "source=mars", "--out", tmp_path / "none"), 3)
    assert "no image of" in line and "busi (" in line
    assert "--within is 'source'" in error_line(run(pairs, "--real", real, "--within", "source", "--out", tmp_path), 2)
