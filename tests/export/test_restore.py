"""A bundle turned back into a checkpoint: nothing of it is lost, and it can be trained on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_model

from busigen.data.geometry import edit_region
from busigen.errors import IntegrityError, OutputError
from busigen.export.import_bundle import opened_base, restore
from busigen.export.parity import TorchBackend
from busigen.registry import LESION_CLASSES, STAGES
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.sampling.sampler import Sampler
from busigen.training.checkpoint import load_component, load_networks, read_record
from busigen.training.networks.build import widened


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle as a checkpoint, out of files with a second hard link, as uv and conda install them.

    Treat it as read-only.
    """
    folder = tmp_path_factory.mktemp("restored")
    shutil.copytree(default_bundle(), folder / "cache")
    shutil.copytree(folder / "cache", folder / "bundle", copy_function=os.link)
    restore(Bundle.open(folder / "bundle"), folder / "checkpoint")
    return folder / "checkpoint"


def test_the_restored_networks_draw_what_the_bundle_draws(restored: Path) -> None:
    bundle = Bundle.open(default_bundle())
    networks, record = load_networks(restored)
    assert record["restored"] == bundle.sha256
    assert record["data"]["split_hash"] == bundle.info["split_hash"]
    generated = [
        Sampler(bundle, backend, classes=dict.fromkeys(LESION_CLASSES, 0.5), batch_size=2)
        .draw(3, range(2), lambda accepted: None)
        .samples
        for backend in (OnnxBackend(bundle), TorchBackend(networks))
    ]
    for ours, theirs in zip(*generated, strict=True):
        # Two engines round differently in the sixth decimal: a pixel on the outline's edge, a grey level on .5. Where a
        # pixel of the outline is another, the region to paint is shown another mask, and all of it moves a little: the
        # same noise gives about one grey level there, other noise or another class more than ten.
        assert int((ours.mask ^ theirs.mask).sum()) <= 0.02 * ours.mask.sum()
        apart = np.abs(ours.image.astype(int) - theirs.image)
        painted = edit_region(ours.mask | theirs.mask, np.ones_like(ours.mask))
        assert (apart[~painted] <= 1).mean() > 0.999
        assert apart[painted].mean() < 3.0


def stored_in(graph: str) -> dict[str, np.ndarray]:
    """A shipped graph's constants by name, those of its loop's body with them."""
    model = onnx.load(str(default_bundle() / f"{graph}.onnx"), load_external_data=False)
    load_external_data_for_model(model, str(default_bundle()))
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    tensors = [tensor for part in (model.graph, *bodies) for tensor in part.initializer]
    return {t.name.removesuffix("/fp16"): onnx.numpy_helper.to_array(t) for t in tensors}


def test_every_weight_of_the_bundle_comes_back_bit_for_bit(restored: Path) -> None:
    for label in LESION_CLASSES:
        # Windows of each size have a graph, which alone holds the spread of its solver's steps.
        stored = {**stored_in(f"lesion-{label}-256"), **stored_in(f"lesion-{label}-128")}
        unet = load_component("lesion", restored / "merged" / f"lesion-{label}").state_dict()
        seen = 0
        for name, tensor in unet.items():
            value = stored.get(f"velocity.unet.{name}", stored.get(name.replace("spectrum.", "update/")))
            assert value is not None, name
            read = torch.from_numpy(value.astype(np.float32))
            if name == "conv_in.weight" and read.shape != tensor.shape:
                read = widened(read, 8)
            assert torch.equal(tensor, read), name
            seen += value.size
        assert seen > 1_000_000


@pytest.mark.parametrize("stage", STAGES)
def test_the_base_lies_in_the_middle_between_the_classes(restored: Path, stage: str) -> None:
    base = load_component(stage, restored / "base" / stage).state_dict()
    merged = [load_component(stage, restored / "merged" / f"{stage}-{label}").state_dict() for label in LESION_CLASSES]
    apart = 0.0
    for name, tensor in base.items():
        if name.startswith("spectrum."):
            # Measured, not trained: the first class's as a whole, because the mean of two sets of axes is none.
            assert torch.equal(tensor, merged[0][name]), name
            continue
        # One sum and one halving in fp32.
        assert torch.allclose(tensor, 0.5 * (merged[0][name] + merged[1][name]), rtol=1e-6, atol=1e-7), name
        apart = max(apart, float((merged[0][name] - merged[1][name]).abs().max()))
    assert apart > 0


@pytest.mark.parametrize("stage", ["lesion", "blend"])
def test_the_axes_of_the_bases_steps_are_at_right_angles(restored: Path, stage: str) -> None:
    state = load_component(stage, restored / "base" / stage).state_dict()
    axes = {name: table for name, table in state.items() if name.startswith("spectrum.axes")}
    assert axes
    for name, table in axes.items():
        # Stored in fp16, whose numbers below 1 are exact to 5e-4.
        identity = torch.eye(table.shape[-1]).expand(table.shape)
        torch.testing.assert_close(table @ table.transpose(-1, -2), identity, rtol=0, atol=4e-3, msg=name)


def test_a_bundle_serves_as_a_base_and_leaves_nothing_behind(restored: Path) -> None:
    with opened_base(default_bundle()) as base, opened_base(restored) as same, opened_base(Path("default")) as named:
        assert base is not None and same is not None and named is not None
        assert base.identity == same.identity == named.identity
        folder = base.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_a_taken_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        restore(Bundle.open(default_bundle()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_graph_that_reads_a_file_beside_the_recorded_ones_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle(), folder)
    path = folder / "context.onnx"
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret.weights"
    path.write_bytes(model.SerializeToString())
    record = json.loads((folder / "bundle.json").read_text())

    record["graphs"]["context"]["files"]["context.onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="secret"):
        restore(Bundle.open(folder), tmp_path / "out")


def test_the_record_reads_back(restored: Path) -> None:
    assert read_record(restored)["preset"] == "compact"
