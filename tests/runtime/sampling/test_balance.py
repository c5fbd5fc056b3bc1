"""What is dealt to samples: BI-RADS categories to each class, and a healthy image without a lesion to some."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from busigen.api.functions import source_options
from busigen.data.geometry import edit_region
from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.errors import UsageError
from busigen.runtime.dataset.format import Sample
from busigen.runtime.execution.run import SourceOptions
from busigen.runtime.sampling.inputs.given_masks import MaskFolder
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.runtime.sampling.inputs.test_given_masks import save, save_image
from tests.runtime.sampling.inputs.test_placement import blob
from tests.runtime.sampling.test_grid import Placed

SEED = 6


def draw(sampler: Sampler, count: int, first: int = 0) -> list[Sample]:
    return sampler.draw(SEED, range(first, first + count), lambda done: None).samples


@pytest.fixture
def healthy(tmp_path: Path) -> HealthyFolder:
    for number in range(5):
        save_image(tmp_path / f"healthy/{number}.png", (400, 300 + 30 * number), seed=number)
    return HealthyFolder(tmp_path / "healthy")


def test_each_class_gets_the_mix_of_categories_and_stage_1_is_told() -> None:
    told: list[int] = []

    class Listening(Placed):
        def run(self, graph, inputs):  # type: ignore[no-untyped-def]
            if graph.startswith("mask-"):
                told.extend(int(row[8:].argmax()) + 2 for row in inputs["asked"])
                assert (inputs["asked"][:, 8:].sum(axis=1) == 1).all()
            return super().run(graph, inputs)

    asked = SourceOptions(birads="3:0.25,4:0.75", size="0.03", depth="0.4", across="0.5", height_width="0.7")
    samples = draw(quick_sampler(Listening(), asked=asked.conditions()[1]), 16)
    found = Counter((sample.label, sample.row["asked_birads"]) for sample in samples)
    assert found == {("benign", "3"): 2, ("benign", "4"): 6, ("malignant", "3"): 2, ("malignant", "4"): 6}
    # Batches are padded with their last row, which leaves no category out and adds none.
    assert set(told) == {3, 4}


def test_a_mix_is_given_in_python_as_a_dictionary() -> None:
    options = source_options({"birads": {2: 0.25, 4: 0.75}, "normals": 0.2})
    assert options.conditions()[1].typed()["birads"] == "2:0.25,4:0.75"


def test_a_sample_asked_one_category_is_the_same_in_a_mix_that_deals_it_that() -> None:
    held = {"size": "0.03", "depth": "0.4", "across": "0.5", "height_width": "0.7"}
    mixed, single = (
        draw(quick_sampler(Placed(), asked=SourceOptions(birads=text, **held).conditions()[1]), 8)
        for text in ("3:0.5,4:0.5", "4")
    )
    same = [(a, b) for a, b in zip(mixed, single, strict=True) if a.row["asked_birads"] == "4"]
    assert len(same) == 4
    assert all(a.row == b.row and np.array_equal(a.image, b.image) for a, b in same)


@pytest.mark.parametrize("real", [False, True])
def test_a_share_of_samples_has_no_lesion_and_classes_keep_their_shares(real: bool, healthy: HealthyFolder) -> None:
    sampler = quick_sampler(QuickEngine(), healthy=healthy if real else None, normals=0.25)
    samples = draw(sampler, 16)
    assert Counter(sample.label for sample in samples) == {"normal": 4, "benign": 6, "malignant": 6}
    for sample in samples:
        assert sample.mask.any() == (sample.label != "normal")
        assert sample.row.keys() == sampler.row_types().keys()
        assert (sample.row["edit_pixels"] == 0) == (sample.label == "normal")
        if sample.label == "normal":
            assert {sample.row[name] for name in ("area_share", "depth", "window_side", "asked_birads")} == {None}
    again = draw(
        quick_sampler(QuickEngine(), healthy=healthy if real else None, normals=0.25, batch_size=1), 3, first=9
    )
    for one, before in zip(again, samples[9:12], strict=True):
        assert (one.label, one.attempt, one.row) == (before.label, before.attempt, before.row)
        assert np.array_equal(one.image, before.image)


def test_a_normal_of_a_folder_is_its_image_letterboxed_and_all_take_turns(healthy: HealthyFolder) -> None:
    normals = [s for s in draw(quick_sampler(QuickEngine(), healthy=healthy, normals=0.5), 20) if s.label == "normal"]
    used = [sample.row["healthy_file"] for sample in normals]
    assert Counter(used) == dict.fromkeys((f"{number}.png" for number in range(5)), 2)
    for sample in normals:
        pixels, _ = letterbox(read_image(healthy.folder / sample.row["healthy_file"]).pixels)
        assert np.array_equal(sample.image, pixels)


def test_a_synthetic_normal_is_the_background_that_a_lesion_would_have_been_painted_into() -> None:
    """Sharpness, too: a network must not tell normals by a filter that only lesions' images went through."""
    sampler = quick_sampler(QuickEngine(), normals=0.5)
    normals = [sample for sample in draw(sampler, 8) if sample.label == "normal"]
    lesions = {sample.index: sample for sample in draw(quick_sampler(QuickEngine()), 8)}
    assert sampler.bundle.transfer is not None
    compared = 0
    for sample in normals:
        other = lesions[sample.index]
        if other.attempt != sample.attempt:
            continue
        compared += 1
        outside = ~edit_region(other.mask, np.ones((256, 256), dtype=bool))
        assert np.array_equal(sample.image[outside], other.image[outside])
        assert not np.array_equal(sample.image, other.image)
    assert compared


def test_masks_take_their_turn_among_the_samples_with_a_lesion(tmp_path: Path, healthy: HealthyFolder) -> None:
    for number, size in enumerate(((310, 190), (300, 420), (280, 280))):
        save(tmp_path / f"masks/benign/{number}.png", blob(size))
    masks = MaskFolder(tmp_path / "masks")
    for folder in (healthy, None):
        samples = draw(quick_sampler(QuickEngine(), masks=masks, healthy=folder, normals=0.4), 10)
        files = Counter(sample.row["given_mask_file"] for sample in samples)
        assert files == {None: 4, **{item.file: 2 for item in masks.items}}
        assert all((s.row["given_mask_file"] is None) == (s.label == "normal") for s in samples)


def test_shares_that_leave_nothing_are_refused() -> None:
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="--normals is") as caught:
            SourceOptions(normals=share).conditions()
        assert "from 0 to below 1" in caught.value.fix
    with pytest.raises(UsageError, match=r"--normals is 0\.2, and a grid"):
        SourceOptions(normals=0.2, vary="class").conditions()
