"""A bundle that knows scanners: what it draws, what it records, and who is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from onnx import TensorProto, helper, numpy_helper

from busigen.api.functions import generate as drawn_pairs
from busigen.api.pairs import Dataset
from busigen.errors import IntegrityError, OutputError, UsageError
from busigen.registry import SCANNERS
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.dataset.format import Sample
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.batching import DrawRequest
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.made_bundles import loaded, saved, stated, written

MIX = {"benign": 0.5, "malignant": 0.5}
SHARES = [["GE Logiq E9", 0.5], ["Toshiba Aplio 300", 0.3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle, whose decoder of whole images draws those of the second scanner darker."""
    info, place = stated(), tmp_path_factory.mktemp("told") / "bundle"
    model = loaded(info, "decoder@256")
    graph = model.graph
    (output,) = graph.output
    last = next(node for node in graph.node if output.name in node.output)
    last.output[:] = ["told/plain" if name == output.name else name for name in last.output]
    graph.input.append(helper.make_tensor_value_info("scanner", TensorProto.FLOAT, ["batch", SCANNERS]))
    darker = np.zeros((SCANNERS, 1), np.float32)
    darker[1] = -0.2
    graph.initializer.append(numpy_helper.from_array(darker, "told/darker"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 1, 1, 1]), "told/shape"))
    graph.node.append(helper.make_node("MatMul", ["scanner", "told/darker"], ["told/change"]))
    graph.node.append(helper.make_node("Reshape", ["told/change", "told/shape"], ["told/changes"]))
    graph.node.append(helper.make_node("Add", ["told/plain", "told/changes"], [output.name]))
    record = info["graphs"]["decoder@256"]
    info["graphs"]["decoder@256"] = {**record, **saved(place, model, "told.onnx", record["files"])}
    # Of one frame and sharpness, so that the decoder alone makes the difference.
    info["transfer"] = {name: part for name, part in info["transfer"].items() if name != "scanners"}
    return written(place, info | {"schema": 8, "scanners": SHARES, "scanner_frames": {}})


def drawn(folder: Path, indices: range, batch: int = 2, **options: object) -> list[Sample]:
    bundle = Bundle.open(folder)
    sampler = Sampler(bundle, OnnxBackend(bundle), classes=MIX, batch_size=batch, **options)
    return sampler.draw(3, indices, lambda done: None).samples


def test_backgrounds_have_the_scanner_that_is_asked_for(folder: Path) -> None:
    dark, light, anything = (drawn(folder, range(2), scanner=name) for name in (SHARES[1][0], SHARES[0][0], "any"))
    assert [one.row["scanner"] for one in (*dark, *light, *anything)] == [
        *[SHARES[1][0]] * 2,
        *[SHARES[0][0]] * 2,
        None,
        None,
    ]
    for one, other, neither in zip(dark, light, anything, strict=True):
        # 0.2 of 2 are 25 grey levels, but for what is black anyway.
        assert other.image.mean() - one.image.mean() > 10.0
        assert abs(other.image.mean() - neither.image.mean()) < 1.0


def test_backgrounds_have_frames_and_filters_of_their_scanner(folder: Path, tmp_path: Path) -> None:
    info = json.loads((folder / "bundle.json").read_text())
    (one, _), (other, _), names = *SHARES, dict(SHARES)
    # The other's filter takes away what is finer than eight pixels.
    blur = {**info["transfer"], "mean": [-3.0] * len(info["transfer"]["mean"])}
    own = {
        "scanner_frames": {one: [[180, 256]], other: [[256, 180]]},
        "transfer": {**info["transfer"], "scanners": {other: blur}},
    }
    shutil.copytree(folder, tmp_path / "bundle")
    told = written(tmp_path / "bundle", info | own)
    sharp, blurred, mixed = (drawn(told, range(4), 4, scanner=name) for name in (one, other, "mix"))
    tops = {one: (0, 38), other: (38, 0), None: None}
    for image in (*sharp, *blurred, *mixed):
        name = image.row["scanner"]
        assert name in (*names, None)
        if name is not None:
            assert (image.row["letterbox_left"], image.row["letterbox_top"]) == tops[name]
    grains = [np.abs(np.diff(image.image[60:200, 60:190].astype(float))).mean() for image in (*sharp, *blurred)]
    assert max(grains[4:]) < 0.6 * min(grains[:4])


def test_the_default_is_the_training_images_mixture_and_batches_decide_nothing(folder: Path) -> None:
    bundle = Bundle.open(folder)
    plan = Sampler(bundle, OnnxBackend(bundle), classes=MIX).plan
    told = Counter(plan.scanner_of(3, DrawRequest(index=k, attempt=0), bundle.scanners) for k in range(2000))
    for name, share in (*SHARES, [None, 0.2]):
        # Four deviations of a share of 2,000 draws.
        assert abs(told[name] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    together, alone = drawn(folder, range(4), 8), drawn(folder, range(2, 3), 2)
    assert len({one.row["scanner"] for one in together}) > 1
    assert np.array_equal(together[2].image, alone[0].image) and together[2].row == alone[0].row


def test_a_users_image_is_of_any_scanner_unless_one_is_named(folder: Path, synthetic_busi: Path) -> None:
    healthy = HealthyFolder(synthetic_busi / "normal")
    (plain,), (named,) = (drawn(folder, range(1), healthy=healthy, scanner=name) for name in (None, SHARES[0][0]))
    assert (plain.row["scanner"], named.row["scanner"]) == (None, SHARES[0][0])


def test_it_is_recorded_verified_explained_and_drawn_again(folder: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "pairs", SHARES[1][0]
    options = GenerateOptions(out=out, bundle=folder, count=3, shard_size=2, batch_size=2, scanner=asked)
    options.run(Progress())
    assert verify(out).ok
    manifest = pl.read_parquet(out / "manifest.parquet")
    assert set(manifest["scanner"]) == {asked}
    found = explain(out, "000000001", inputs=Inputs(bundle=folder))
    assert found.error is None and found.replay is not None and not found.replay.differs
    again = list(drawn_pairs(2, bundle=folder, scanner=asked, batch_size=2))[1]
    assert np.array_equal(again.image, Dataset(out)[1].image)
    with pytest.raises(OutputError, match="--scanner"):
        replace(options, scanner="any").run(Progress())


def test_unknown_scanners_are_refused_with_those_there_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'Philips'.*GE Logiq E9, Toshiba Aplio 300, any, mix"):
        drawn(folder, range(1), scanner="Philips")
    none = written(tmp_path / "bundle", stated() | {"scanners": []})
    with pytest.raises(UsageError, match="knows no scanners"):
        drawn(none, range(1), scanner="any")


@pytest.mark.parametrize("scanners", [[], [["A", 0.7], ["A", 0.1]], [["A", 0.9], ["B", 0.9]], [["A", 2.0]], [["A"]]])
def test_a_record_whose_scanners_make_no_sense_is_refused(folder: Path, tmp_path: Path, scanners: list[object]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    info = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(info | {"scanners": scanners}))
    with pytest.raises(IntegrityError, match="scanners"):
        Bundle.open(copy)


def test_a_grid_paints_one_background_as_several_scanners(folder: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "grid", [name for name, _ in SHARES]
    options = GenerateOptions(
        out=out, bundle=folder, count=2, shard_size=2, batch_size=2, vary=f"scanner={'/'.join(names)}"
    )
    options.run(Progress())
    # This bundle's lesions are the same for all scanners, so that the images are equal as a whole.
    assert verify(out).groups_equal == 1
    manifest = pl.read_parquet(out / "manifest.parquet")
    assert manifest["scanner"].to_list() == names and manifest["grid_group"].n_unique() == 1
    with pytest.raises(UsageError, match=r"--vary scanner names 'Philips', and the bundle knows these"):
        replace(options, out=tmp_path / "other", vary="scanner=any/Philips").run(Progress())
