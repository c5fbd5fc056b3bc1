"""Adapters for a new hospital: what a run with ``--base`` keeps of the base, trains and refuses."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.errors import InputError, IntegrityError, OutputError, UsageError
from busigen.export.parity import LIMITS
from busigen.export.report import model_card
from busigen.registry import LESION_CLASSES, STAGES
from busigen.training.checkpoint import (
    RETRAIN_RATE,
    RETRAINABLE,
    Base,
    load_component,
    load_networks,
    weight_hashes,
    write_record,
)
from busigen.training.examples import Frames, load_examples, outline_examples, select
from busigen.training.pipeline import train
from busigen.training.recipe import recipe_for
from busigen.training.rollouts import healed_reader
from busigen.training.tasks import TaskContext
from tests.harness.synthetic_datasets import draw_pairs

SHORTEST = 1e-9
"""Two steps a task."""

NAMES = [f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES]


def quiet() -> Console:
    return Console(file=io.StringIO())


@dataclass(frozen=True)
class Hospital:
    """A hospital's own folder, prepared, and the run that adapts the base to it."""

    prepared: Prepared
    run: Path


@pytest.fixture(scope="module")
def base(synthetic_prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny checkpoint; treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "base"
    train(synthetic_prepared.folder, out, recipe_for("tiny", scale=SHORTEST), device="cpu", console=quiet())
    return out


@pytest.fixture(scope="module", params=[1, 3], ids=["nothing held out", "only a healthy image held out"])
def hospital(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """Adapted to a dozen images, under split seeds that leave too little to validate on; treat it as read-only."""
    folder = tmp_path_factory.mktemp("hospital")
    prepare([draw_pairs(folder / "clinic", seed=5, count=12)], folder / "prepared", seed=request.param)
    prepared = Prepared.open(folder / "prepared")
    assert set(select(prepared, "val")["class"]) == ({"normal"} if request.param == 3 else set())
    start = Base.open(base)
    train(prepared.folder, folder / "run", start.recipe(scale=SHORTEST), base=start, device="cpu", console=quiet())
    return Hospital(prepared, folder / "run")


def test_the_bases_components_are_taken_over_bit_for_bit_and_without_its_adapters(
    base: Path, hospital: Hospital
) -> None:
    taken = weight_hashes(hospital.run, ("base",))
    assert taken and taken == weight_hashes(base, ("base",))
    record, before = (json.loads((folder / "busigen.json").read_text()) for folder in (hospital.run, base))
    assert record["latents"] == before["latents"]
    assert set(record["tasks"]) == {"heal", *NAMES}
    for name in NAMES:
        file = f"adapters/{name}/adapter_model.safetensors"
        assert record["weights"][file] != before["weights"][file]


def test_the_record_names_the_base_and_the_data_that_the_adapters_learnt_from(
    base: Path, hospital: Hospital, synthetic_prepared: Prepared
) -> None:
    record = json.loads((hospital.run / "busigen.json").read_text())
    assert record["data"]["split_hash"] == hospital.prepared.split_hash
    assert record["base"]["split_hash"] == synthetic_prepared.split_hash != hospital.prepared.split_hash
    # The same components are the same base, wherever they lie and whatever was adapted to them.
    assert Base.open(hospital.run).identity == Base.open(base).identity == record["base"]


def test_the_model_card_says_what_was_trained_on_which_images(base: Path, hospital: Hospital) -> None:
    figures = dict.fromkeys((*LIMITS, "draws", "images_compared", "masks_compared", "equal_masks"), 1)
    parity = {"targets": {"cpu": dict.fromkeys(LESION_CLASSES, figures)}}
    for folder, adapted in ((hospital.run, True), (base, False)):
        record = json.loads((folder / "busigen.json").read_text())
        split_hash = record["data"]["split_hash"]
        info = {"preset": "tiny", "split_hash": split_hash, "solver_steps": {}, "parity": parity, "components": {}}
        text = model_card(record, info)
        assert split_hash in text
        assert ("All else is the base's" in text) == adapted
        assert all(value in text for value in record.get("base", {}).values())
        del record["data"]["images"]  # Nothing but the card reads it, so that a record may lack it.
        assert "unrecorded images" in model_card(record, info)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_the_bases_plus_the_new_adapter(hospital: Hospital, name: str) -> None:
    adapter = load_file(hospital.run / "adapters" / name / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for key, tensor in adapter.items() if "lora_A" in key)
    assert any(bool(tensor.any()) for key, tensor in adapter.items() if "lora_B" in key)

    component = load_component(name.partition("-")[0], hospital.run / "base" / name.partition("-")[0])
    plain = {key: tensor.clone() for key, tensor in component.state_dict().items()}
    expected = PeftModel.from_pretrained(component, str(hospital.run / "adapters" / name)).merge_and_unload()
    merged = load_component(name.partition("-")[0], hospital.run / "merged" / name).state_dict()
    changed = 0
    for key, tensor in expected.state_dict().items():
        # One product and one sum in fp32; weights are of order one.
        assert torch.allclose(merged[key], tensor, rtol=0, atol=1e-6), key
        changed += not torch.equal(merged[key], plain[key])
    assert changed, "the adapter changes nothing"


def test_codes_of_the_new_outlines_are_those_of_the_bases_space(base: Path, hospital: Hospital) -> None:
    space = load_component("mask", base / "base" / "mask").space
    networks, _ = load_networks(hospital.run)
    for label in LESION_CLASSES:
        used = dict(networks.denoiser("mask", label).space.named_buffers())
        assert used and all(torch.equal(used[name], buffer) for name, buffer in space.named_buffers())

    frames = Frames(hospital.prepared, select(hospital.prepared, "train"))
    encoded = outline_examples(
        frames,
        healed_reader(hospital.run / "healed.npz"),
        space,
        networks=networks,
        variants=1,
        seed=0,
        progress=lambda done, total: None,
    )
    (trained,) = load_examples(hospital.run / "cache" / "outlines-train-1.safetensors").values()
    assert torch.equal(trained.tensors["row"], encoded["row"])
    assert torch.equal(trained.tensors["clean"], encoded["clean"])


def test_only_the_new_images_are_healed(hospital: Hospital) -> None:
    with np.load(hospital.run / "healed.npz") as stored:
        rows = set(stored["rows"].tolist())
    table = hospital.prepared.table
    assert rows == set(table.filter(pl.col("split").is_in(["train", "val"]))["row"])


def test_adapters_learn_from_every_source_of_data_that_holds_busi_too(base: Path) -> None:
    tasks = Base.open(base).recipe().tasks
    assert [task.name for task in tasks] == ["heal", *NAMES]
    assert all(task.sources == () for task in tasks)
    assert {task.steps for task in tasks[1:]} == {task.steps for task in recipe_for("tiny").tasks if task.label}


@pytest.mark.parametrize("label", LESION_CLASSES)
def test_an_own_folders_adapters_are_validated_on_its_held_out_images(tmp_path: Path, label: str) -> None:
    """The recipe of a whole run prefers BUSI for them, of which an own folder has nothing."""
    prepare([draw_pairs(tmp_path / "clinic", seed=5, count=12)], tmp_path / "prepared", seed=4)
    prepared = Prepared.open(tmp_path / "prepared")
    spec = next(task for task in recipe_for("tiny").tasks if task.name == f"mask-{label}")
    assert spec.sources == ("busi",)
    setting = TaskContext(prepared, None, torch.device("cpu"), 0, lambda what: lambda done, total: None, tmp_path)
    for split in ("train", "val"):
        rows = setting.frames(split, spec).table
        assert rows.height and set(rows["split"]) == {split} and set(rows["class"]) == {label}


def test_a_rerun_goes_on_where_it_was_and_another_base_is_refused(
    base: Path, synthetic_prepared: Prepared, hospital: Hospital, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(hospital.run, run)
    finished = weight_hashes(run)
    # As a kill before the last task, in the middle of the copy of a component, leaves it.
    for path in (run / "busigen.json", run / "done" / f"{NAMES[-1]}.json"):
        path.unlink()
    shutil.rmtree(run / "merged" / NAMES[-1])
    (run / "base" / "prior").rename(run / "base" / "prior.tmp")
    start = Base.open(base)
    options = {"device": "cpu", "console": quiet()}
    done = {path.name: path.stat().st_mtime_ns for path in (run / "done").iterdir()}
    train(hospital.prepared.folder, run, start.recipe(scale=SHORTEST), base=start, **options)
    assert weight_hashes(run) == finished
    assert {name: (run / "done" / name).stat().st_mtime_ns for name in done} == done

    other = _another(base, tmp_path / "other")
    with pytest.raises(OutputError, match=r"\(--base: one with weights \w{12}\.\.\. there, one with weights \w{12}"):
        train(hospital.prepared.folder, run, other.recipe(scale=SHORTEST), base=other, **options)
    with pytest.raises(OutputError, match=r"another run \(--base: one with weights \w{12}\.\.\. there, none now\)"):
        train(hospital.prepared.folder, run, recipe_for("tiny", scale=SHORTEST), **options)
    with pytest.raises(OutputError, match=r"another run \(--base: none there, one with weights \w{12}\.\.\. now\)"):
        train(synthetic_prepared.folder, base, start.recipe(scale=SHORTEST), base=start, **options)
    assert weight_hashes(run) == finished


def _another(base: Path, folder: Path) -> Base:
    """The base after a change to one of its components."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("cache", "state", "tensorboard", "samples"))
    prior = load_component("prior", folder / "base" / "prior")
    with torch.no_grad():
        next(prior.parameters()).add_(1.0)
    prior.save_pretrained(str(folder / "base" / "prior"), safe_serialization=True)
    record = json.loads((folder / "busigen.json").read_text())
    write_record(folder, {key: value for key, value in record.items() if key not in ("schema", "weights")})
    return Base.open(folder)


def test_a_retrained_stage_is_new_and_all_else_is_the_bases(
    base: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    start = Base.open(base)
    recipe = start.recipe(scale=SHORTEST, seed=1, retrain=["mask"])
    assert [task.name for task in recipe.tasks] == ["heal", "mask", "mask-benign", "mask-malignant"]
    assert {task.sources for task in recipe.tasks if task.label} == {("busi",)}
    rates = {task.name: task.lr for task in recipe_for("tiny").tasks}
    changed = {task.name: task.lr / rates[task.name] for task in recipe.tasks if task.steps}
    assert changed == pytest.approx({"mask": RETRAIN_RATE, "mask-benign": 1.0, "mask-malignant": 1.0})
    run = tmp_path / "run"
    train(synthetic_prepared.folder, run, recipe, base=start, device="cpu", console=quiet())
    before, after = weight_hashes(base), weight_hashes(run)
    assert set(after) == set(before)
    anew = {name for name in after if after[name] != before[name]}
    assert anew and all("/mask" in name for name in anew)
    assert {name for name in after if name.startswith(("base/mask", "merged/mask"))} <= anew
    networks, record = load_networks(run)
    assert set(networks.denoisers) == {"prior", *NAMES}
    assert record["base"] == start.identity
    benign, malignant = (networks.denoisers[f"mask-{label}"].spectrum.spread for label in LESION_CLASSES)
    assert not torch.allclose(benign, malignant), "each class has the spread of its own outlines"


def test_a_retrained_decoder_reads_the_same_latents(base: Path, synthetic_prepared: Prepared, tmp_path: Path) -> None:
    """The encoder stays what all stages learnt their latents from, bit for bit; so does all else."""
    start = Base.open(base)
    recipe = start.recipe(scale=SHORTEST, seed=1, retrain=["decoder"])
    assert [task.name for task in recipe.tasks] == ["decoder"]
    run = tmp_path / "run"
    train(synthetic_prepared.folder, run, recipe, base=start, device="cpu", console=quiet())
    before, after = weight_hashes(base), weight_hashes(run)
    assert {name.split("/")[1] for name in after if after[name] != before[name]} == {"autoencoder"}
    (old, described), (new, record) = load_networks(base), load_networks(run)
    assert record["latents"] == described["latents"]
    changed = {
        name.partition(".")[0]
        for name, value in new.autoencoder.state_dict().items()
        if not torch.equal(value, old.autoencoder.state_dict()[name])
    }
    assert changed == {"decoder"}


def test_images_are_healed_for_those_alone_that_learn_from_healed_ones(base: Path) -> None:
    healing = {
        name: "heal" in {task.name for task in Base.open(base).recipe(retrain=[name]).tasks} for name in RETRAINABLE
    }
    others = dict.fromkeys(("lesion", "blend", "decoder", "finish"), False)
    assert healing == {"mask": True, "prior": True, **others}


def test_stage_3_begins_with_a_retrained_stage_2(base: Path) -> None:
    alone, both = (
        {task.name: task.start for task in Base.open(base).recipe(retrain=names).tasks}
        for names in (["blend"], ["lesion", "blend"])
    )
    assert alone["blend"] == "blend"
    assert (both["lesion"], both["blend"]) == ("lesion", "lesion")


def test_a_component_that_all_others_speak_through_cannot_be_retrained(base: Path) -> None:
    with pytest.raises(UsageError, match=r"--retrain 'autoencoder' .*mask, lesion, blend, prior, decoder"):
        Base.open(base).recipe(retrain=["autoencoder"])


def test_another_preset_than_the_bases_is_refused_with_both_names(base: Path) -> None:
    assert Base.open(base).recipe("tiny").preset == "tiny"
    with pytest.raises(UsageError, match=r"--preset compact .*preset tiny"):
        Base.open(base).recipe("compact")


def test_an_unfinished_or_damaged_base_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished checkpoint"):
        Base.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    weights = next((copy / "base" / "mask").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="base/mask"):
        Base.open(copy)
