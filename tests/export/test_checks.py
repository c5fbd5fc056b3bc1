"""Checkpoints, machines and options that export refuses: with the fault by name, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from busigen.errors import BusigenError, InputError, IntegrityError, OutputError, UsageError
from busigen.export.exporter import export
from busigen.export.precision_search import check_opset, runs
from busigen.export.report import check_report
from busigen.export.request import Options, batch_sizes
from busigen.mtf import Transfer
from busigen.registry import OPSETS, PRECISIONS
from busigen.runtime.storage.files import atomic_folder
from busigen.training.checkpoint import RECORD
from tests.harness.checkpoints import changed, rehashed, untrained
from tests.harness.command import error_line, run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; treat it as read-only."""
    return untrained(tmp_path_factory.mktemp("checkpoints") / "sound")


def refusal(checkpoint: Path, out: Path) -> BusigenError:
    with pytest.raises(BusigenError) as caught:
        export(checkpoint, out)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith((out.name, ".tmp-"))] == []
    return caught.value


def copied(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@pytest.mark.parametrize("place", ["base/context", "merged/blend-malignant"])
def test_a_missing_component_is_named(sound: Path, tmp_path: Path, place: str) -> None:
    checkpoint = copied(sound, tmp_path)
    shutil.rmtree(checkpoint / place)
    error = refusal(rehashed(checkpoint), tmp_path / "bundle")
    assert isinstance(error, InputError) and f"{place} is missing" in str(error)


def test_a_component_too_many_is_named(sound: Path, tmp_path: Path) -> None:
    checkpoint = copied(sound, tmp_path)
    shutil.copytree(checkpoint / "merged/mask-benign", checkpoint / "merged/mask-normal")
    error = refusal(rehashed(checkpoint), tmp_path / "bundle")
    assert isinstance(error, InputError) and "merged/mask-normal is no component" in str(error)


def test_an_adapter_that_was_not_merged_is_named(sound: Path, tmp_path: Path) -> None:
    checkpoint = copied(sound, tmp_path)
    (checkpoint / "adapters").mkdir()
    shutil.move(checkpoint / "merged/lesion-benign", checkpoint / "adapters/lesion-benign")
    error = refusal(rehashed(checkpoint), tmp_path / "bundle")
    assert isinstance(error, InputError) and "lesion-benign has an adapter that was not merged" in str(error)


def test_weights_with_an_adapter_beside_them_are_refused(sound: Path, tmp_path: Path) -> None:
    checkpoint = copied(sound, tmp_path)
    path = next((checkpoint / "merged/lesion-benign").glob("*.safetensors"))
    weights = load_file(path)
    name, value = next((name, value) for name, value in weights.items() if value.dim() == 2)
    save_file({**weights, f"{name}.lora_A.default.weight": value[:1].clone()}, path)
    error = refusal(rehashed(checkpoint), tmp_path / "bundle")
    assert isinstance(error, InputError) and "lora_A" in str(error) and "not merged" in str(error)


def test_weights_that_are_no_numbers_are_named_on_the_command_line(sound: Path, tmp_path: Path) -> None:
    checkpoint = changed(
        sound,
        tmp_path / "checkpoint",
        "merged/blend-benign",
        lambda state: state["conv_in.bias"][:3].fill_(float("nan")),
    )
    line = error_line(run("export", checkpoint, "--out", tmp_path / "bundle"), 3)
    assert "3 of 16 values of conv_in.bias in blend-benign are NaN" in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_fit_beyond_what_a_bundle_may_say_is_named_before_anything_is_exported(sound: Path, tmp_path: Path) -> None:
    checkpoint = copied(sound, tmp_path)
    record = json.loads((checkpoint / RECORD).read_text())
    record["transfer"] = Transfer(np.zeros(14), np.zeros((14, 14))).to_json()
    record["transfer"]["mean"][0] = -3.8
    (checkpoint / RECORD).write_text(json.dumps(record))
    error = refusal(checkpoint, tmp_path / "bundle")
    assert isinstance(error, IntegrityError)
    assert "'transfer'" in str(error) and "-3.8 is no number from -3.0 to 3.0" in str(error)
    assert "done/finish.json" in error.fix


def test_an_opset_that_onnx_runtime_lacks_is_refused() -> None:
    for opset in OPSETS:
        check_opset(opset)
    with pytest.raises(UsageError, match=r"cannot run opset 900.*Choose one of: 20"):
        check_opset(900)


def test_this_machines_providers_are_asked_what_they_can_run() -> None:
    """Every CPU runs fp32 and, with casts, fp16; none of ONNX Runtime's has a convolution in bf16."""
    assert [precision for precision in PRECISIONS if runs("CPUExecutionProvider", precision)] == ["bf16"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "fp8"}, "Choose one of: fp32, fp16"),
        ({"opset": 19}, "Choose one of: 20"),
        ({"loop": "spiral"}, "unknown loop 'spiral'"),
        ({"target": "coreml"}, "unknown target 'coreml'"),
        ({"batch_sizes": (4, 0)}, "--batch-size 0"),
        ({"draws": 0}, "--draws is 0"),
    ],
)
def test_options_say_what_is_allowed(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**change)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_batches_are_read_as_they_are_listed() -> None:
    assert batch_sizes(None) == () and batch_sizes("16, 4,16") == (16, 4)
    for text in ("", "4,", "4;8", "-4", "four", "4.0"):
        with pytest.raises(UsageError, match="whole numbers"):
            batch_sizes(text)


def test_a_folder_beside_the_bundle_is_left_alone(tmp_path: Path) -> None:
    mine, out, link = tmp_path / ".bundle.tmp", tmp_path / "bundle", tmp_path / "link"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with atomic_folder(out) as folder:
        (folder / "bundle.json").write_text("{}")
    link.symlink_to(out)
    with pytest.raises(OutputError, match="is a link"), atomic_folder(link):
        pass
    assert [path.name for path in out.iterdir()] == ["bundle.json"]
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, out.name, link.name}


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.md nor \.json"):
        check_report(tmp_path / "report.txt")
    with pytest.raises(OutputError, match="no folder"):
        check_report(tmp_path / "nowhere" / "report.md")
