"""``busigen bench`` on the shipped bundle: its figures agree with one another. None of them is held to a speed."""

from __future__ import annotations

import io
import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from busigen.errors import OutputError, UsageError
from busigen.runtime.backends.bundle import default_bundle
from busigen.runtime.diagnostics.bench import Bench, covered
from busigen.runtime.diagnostics.bench_report import show
from busigen.runtime.progress import Progress
from tests.harness.command import CLI, ROOT, Done, error_line, run
from tests.harness.hashing import hash_of

TINY = ("bench", "--count", 2, "--count-for", 1000)
WRITTEN = {"bench.json", "bench.svg", "ledger.jsonl"}


@dataclass(frozen=True)
class Benched:
    """A finished command, its folder, and ``bench.json``."""

    done: Done
    out: Path
    record: dict[str, Any]


def benched(out: Path, *arguments: object) -> Benched:
    done = run(*TINY, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    return Benched(done, out, json.loads((out / "bench.json").read_text()))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Benched:
    """Two runs of one batch size on synthetic backgrounds."""
    out = tmp_path_factory.mktemp("bench") / "first"
    found = benched(out, "--batch-sizes", 2, "--repeat", 2)
    assert {path.name for path in out.iterdir()} == WRITTEN, "the runs themselves are thrown away"
    assert len((out / "ledger.jsonl").read_text().splitlines()) == 1
    return found


@pytest.fixture(scope="module")
def second(first: Benched, synthetic_busi: Path) -> Benched:
    """Two batch sizes on healthy images, into another folder and the first one's ledger."""
    return benched(
        first.out.with_name("second"),
        *("--batch-sizes", "4,2", "--repeat", 1, "--healthy", synthetic_busi / "normal"),
        *("--ledger", first.out / "ledger.jsonl"),
    )


@pytest.fixture
def options(tmp_path: Path) -> Bench:
    return Bench(
        out=tmp_path / "out",
        ledger=tmp_path / "out" / "ledger.jsonl",
        bundle=None,
        providers="cpu",
        batch_sizes="2",
        count=2,
        count_for=10,
        repeat=1,
        healthy="synthetic",
        threads=1,
    )


def test_stage_times_sum_to_the_engines_and_fit_into_the_wall_time(first: Benched, second: Benched) -> None:
    for result in first.record["results"] + second.record["results"]:
        for one in result["runs"]:
            stages = one["stages"]
            assert sum(stage["seconds"] for stage in stages.values()) == pytest.approx(one["engine_seconds"])
            assert 0 < one["busy_seconds"] < one["seconds"]
            # Whole batches of two: a padded row counts as one that the engine computed.
            assert all(stage["rows"] >= 2 * stage["calls"] > 0 for stage in stages.values())
            assert {"context", "mask"} <= stages.keys()
            assert {"encoder", "lesion", "blend", "decoder"} <= {name.partition("@")[0] for name in stages}
        assert sum(stage["share"] for stage in result["stages"].values()) <= 1
    assert "prior" in first.record["results"][0]["stages"]
    assert "prior" not in second.record["results"][0]["stages"], "a real background needs no prior"


def test_figures_follow_from_the_runs(first: Benched, second: Benched) -> None:
    assert [len(result["runs"]) for result in first.record["results"]] == [2]
    assert [result["batch_size"] for result in second.record["results"]] == [2, 4]
    for result in first.record["results"] + second.record["results"]:
        seconds = statistics.median(one["seconds"] for one in result["runs"])
        assert result["images_per_second"] == pytest.approx(2 / seconds)
        assert result["predicted"]["count"] == 1000
        assert result["predicted"]["seconds"] == pytest.approx(1000 / result["images_per_second"])
        assert result["predicted"]["bytes"] == pytest.approx(1000 * result["bytes_per_image"])
        # Two PNGs and a row: below this no image was written, above it none was compressed.
        assert 10_000 < result["bytes_per_image"] < 256 * 256 * 2
        assert result["acceptance"] == 2 / result["runs"][0]["draws"]
        assert 0 < result["idle_share"] < 1
        # A Python process with graphs loaded; what tells bytes from kilobytes.
        assert 5e7 < result["peak_memory"] < 5e10


def test_the_pipeline_is_not_faster_than_its_engines(first: Benched, second: Benched) -> None:
    for result in first.record["results"] + second.record["results"]:
        # Each is timed for a second or so, one after the other, and other work on the machine may hit either alone.
        assert result["images_per_second"] < 2 * result["engines_alone_images_per_second"]


def test_the_record_names_what_was_measured(first: Benched) -> None:
    record = first.record
    assert record["bundle"]["sha256"] == hash_of(default_bundle() / "bundle.json")
    assert record["providers"] == {"cpu": ["CPUExecutionProvider"]}
    assert record["machine"]["cores"] >= 1
    assert {"python", "numpy", "pillow", "polars", "scipy"} <= record["machine"]["versions"].keys()
    assert any(name.startswith("onnxruntime") for name in record["machine"]["versions"])
    assert record["notes"][-1].startswith("All 2 samples fit in one shard")


def test_without_a_terminal_the_tables_are_plain_columns(second: Benched) -> None:
    output = second.done.stdout
    assert output.isascii()
    assert "\x1b" not in output
    assert sum(line.startswith(("  cpu, 2  ", "  cpu, 4  ")) for line in output.splitlines()) == 2
    for name in (*second.record["results"][0]["stages"], "no engine", "all"):
        (line,) = [line for line in output.splitlines() if line.startswith(f"  {name} ")]
        assert line.count("%") == 2
    assert "measuring" not in output
    assert "measuring: 12/12" in second.done.stderr, "progress goes where it mixes with no result"


def test_on_a_terminal_the_tables_have_lines(second: Benched) -> None:
    screen = io.StringIO()
    show(second.record, Console(file=screen, force_terminal=True, width=140))
    assert "┃" in screen.getvalue()
    assert "1,000 images" in screen.getvalue()


def test_the_plot_has_a_bar_per_result(second: Benched) -> None:
    bars: dict[str, float] = {}
    for shape in ElementTree.parse(second.out / "bench.svg").getroot():
        title = shape.find("{*}title")
        if title is not None:
            bars[shape.attrib["y"]] = bars.get(shape.attrib["y"], 0.0) + float(shape.attrib["width"])
    two, four = bars.values()
    times = [result["ms_per_image"] for result in second.record["results"]]
    # Of one run, the parts sum to the whole; each of the eight widths is rounded to a tenth of at least ten pixels.
    assert two / four == pytest.approx(times[0] / times[1], rel=0.01)


def test_a_second_run_appends_to_the_ledger(first: Benched, second: Benched) -> None:
    assert {path.name for path in second.out.iterdir()} == WRITTEN - {"ledger.jsonl"}
    old, new = (json.loads(line) for line in (first.out / "ledger.jsonl").read_text().splitlines())
    for line, of in ((old, first), (new, second)):
        results = [{key: value for key, value in one.items() if key != "runs"} for one in of.record["results"]]
        assert line == {**of.record, "results": results}
    assert (old["options"]["backgrounds"], new["options"]["backgrounds"]) == ("synthetic", "real")


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom busigen.runtime.diagnostics.bench_report import append_line\n"
        "for number in range(150):\n"
        "    append_line(Path(sys.argv[1]), {'who': sys.argv[2], 'number': number, 'long': 'x' * 9000})\n"
    )
    ledger = tmp_path / "ledger.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", code, ledger, who], cwd=ROOT) for who in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for who in "ab":
        assert [line["number"] for line in lines if line["who"] == who] == list(range(150))


@pytest.mark.parametrize("providers", ["abacus", "cpu,abacus", "cpu,cuda"])
def test_a_provider_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path, providers: str) -> None:
    command = (*TINY, "--batch-sizes", 2, "--repeat", 1, "--provider", providers, "--out", tmp_path / "out")
    done = run(*command)
    if done.returncode == 0 and "cuda" in providers:
        pytest.skip("this machine has a CUDA device")
    line = error_line(done, 2)
    assert providers.rpartition(",")[2] in line
    assert "cpu" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"count": 0}, "--count is 0"),
        ({"count_for": 0}, "--count-for is 0"),
        ({"repeat": 0}, "--repeat is 0"),
        ({"batch_sizes": "4,many"}, "--batch-sizes names 'many'"),
        ({"batch_sizes": ""}, "--batch-sizes names ''"),
        ({"batch_sizes": "4,0"}, "--batch-size is 0"),
        ({"threads": 0}, "--threads is 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: Bench, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        replace(options, **changes).run(Progress())
    assert not options.out.exists()


def test_a_ledger_that_cannot_be_written_is_found_before_the_measurement(options: Bench, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=str(tmp_path)):
        replace(options, ledger=tmp_path).run(Progress())
    assert list(options.out.iterdir()) == []


def test_ctrl_c_keeps_no_run_and_no_result(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*CLI, "bench", "--count", "500", "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(tmp_path.glob("*/dataset/run.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    assert "Interrupted; no result is kept." in error_line(done, 130)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"ledger.jsonl": b""}


def test_time_that_calls_share_counts_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == 4.0
    assert covered([]) == 0.0
