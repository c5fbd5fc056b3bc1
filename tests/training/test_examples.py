"""What the denoisers are shown. Above all: nothing of the pixels that they are to paint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from busigen.data.geometry import edit_region, patches_outside
from busigen.data.prepared import Prepared
from busigen.registry import PRESETS
from busigen.training.examples import (
    Frame,
    Frames,
    background_examples,
    greyed,
    load_examples,
    save_examples,
    select,
    to_tensor,
    window_examples,
)
from busigen.training.networks.build import build, place_condition
from busigen.training.networks.inference import Networks

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def networks() -> Networks:
    torch.manual_seed(0)
    channels = TINY.latent_channels
    context = build("context", TINY).eval()
    return Networks(TINY, build("autoencoder", TINY).eval(), torch.zeros(channels), torch.ones(channels), context)


@pytest.fixture(scope="module")
def frames(synthetic_prepared: Prepared) -> Frames:
    return Frames(synthetic_prepared, select(synthetic_prepared, "train"))


def _lesion_frame(frames: Frames) -> Frame:
    return next(frame for k in range(len(frames)) if (frame := frames[k]).label != "normal")


def test_nothing_of_the_edit_region_reaches_the_condition(frames: Frames, networks: Networks) -> None:
    """In training the image holds the lesion, in use it does not: what the stages see must be the same for both."""
    frame = _lesion_frame(frames)
    edit = edit_region(frame.lesions > 0, frame.valid)
    without = np.where(edit, np.random.default_rng(0).integers(0, 256, edit.shape), frame.image).astype(np.uint8)
    assert (without != frame.image)[edit].any()
    assert (greyed(frame.image, edit) == greyed(without, edit)).all()

    keep = torch.from_numpy(patches_outside(edit, TINY.patch)).float()[None]
    tokens, tokens_without = (networks.tokens(to_tensor(image)[None], keep) for image in (frame.image, without))
    seen = keep[0] > 0
    assert seen.any() and not seen.all()
    # Bit for bit: the dropped patches are multiplied by zero and masked out of every attention.
    assert torch.equal(tokens[0, seen], tokens_without[0, seen])


def test_training_sees_no_overlay_and_counts_what_replaced_a_small_one(synthetic_prepared: Prepared) -> None:
    rows = synthetic_prepared.table.filter(synthetic_prepared.table["id"].is_in(["busi/benign (6)", "busi/benign (7)"]))
    doppler, calipers = (Frames(synthetic_prepared, rows)[k] for k in range(2))
    assert doppler.overlay.any(), "what lies under a Doppler box is guesswork"
    row = rows["row"][1]
    assert synthetic_prepared.suspects[row].any() and not calipers.overlay.any()
    assert (calipers.image == synthetic_prepared.clean[row]).all()
    # Two white crosses with arms of 4 pixels, half a pixel thin in this frame, on tissue of a third of their level.
    assert (synthetic_prepared.images[row].astype(int) - calipers.image > 30).sum() >= 8


def test_a_flip_turns_image_mask_and_overlay_alike(frames: Frames) -> None:
    frame = _lesion_frame(frames)
    flipped = frame.flipped()
    for name in ("image", "lesions", "overlay", "valid"):
        assert (getattr(flipped, name) == getattr(frame, name)[:, ::-1]).all()
    assert not (flipped.image == frame.image[::-1]).all()


@pytest.mark.parametrize("tall", [True, False])
def test_filling_the_frame_keeps_the_scale_and_mirrors_what_was_a_bar(frames: Frames, tall: bool) -> None:
    frame = _lesion_frame(frames)
    valid = np.zeros_like(frame.valid)
    part = (slice(None), slice(50, 206)) if tall else (slice(40, 210), slice(None))
    valid[part] = True
    ramp = np.arange(256, dtype=np.uint8)
    image = np.where(valid, np.broadcast_to(ramp if tall else ramp[:, None], valid.shape), 0).astype(np.uint8)
    lesions = np.where(valid, frame.lesions, 0).astype(np.uint8)
    filled = Frame(image, lesions, frame.overlay, valid, frame.label).filling(np.random.default_rng(0))
    # The image's own pixels are there bit for bit, its mask with them, and `valid` says where.
    assert (filled.image[filled.valid] == image[valid]).all()
    assert (filled.lesions[filled.valid] == lesions[valid]).all()
    assert not filled.lesions[~filled.valid].any()
    # A mirrored ramp goes back by one a pixel, so no step is larger, and none leads to a bar's black.
    steps = np.diff(filled.image.astype(int), axis=1 if tall else 0)
    assert np.abs(steps).max() == 1
    assert filled.valid[0].any(), "the skin stays on top"


def test_the_prior_learns_depth_as_a_share_of_each_images_own_height(frames: Frames, networks: Networks) -> None:
    """What counts in its loss are the cells that lie in the frame, and these alone have places from -1 to 1."""
    options = {"variants": 1, "seed": 3, "progress": lambda done, total: None}
    examples = background_examples(frames, lambda row, variant: frames.prepared.clean[row], networks, **options)
    place = place_condition(examples["clean"].float(), examples["frame"].float())
    inside = (place.abs() <= 1.0).all(dim=1, keepdim=True)
    counted = examples["weight"]
    assert counted.any() and not (counted & ~inside).any()
    # A cell that the frame cuts lies in it with its centre and does not count; so does one under an overlay.
    heights = examples["frame"][:, 2]
    assert len(heights.unique()) > 1, "images of several shapes, or this proves nothing"
    for row, height in enumerate(heights.tolist()):
        whole = height // 8
        depths = place[row, 0, :whole, 0]
        assert torch.allclose(depths.diff(), torch.tensor(16.0 / height), atol=1e-5)
        assert depths[0] == pytest.approx(8.0 / height - 1.0, abs=1e-5)


def test_every_lesion_image_gives_its_windows_and_normal_ones(frames: Frames, networks: Networks, tmp_path) -> None:
    options = {"variants": 1, "seed": 3, "progress": lambda done, total: None}
    buckets = window_examples(frames, networks, **options)
    labels = torch.cat([part.tensors["label"] for part in buckets.values()])
    rows = torch.cat([part.tensors["row"][part.tensors["label"] > 0] for part in buckets.values()])
    lesion_rows = {int(row) for row, name in frames.table.select("row", "class").iter_rows() if name != "normal"}
    assert set(rows.tolist()) == lesion_rows
    assert (labels == 0).any()
    for side, part in buckets.items():
        assert part.tensors["clean"].shape[-1] == side // 8
        inside = part.tensors["mask"].float().amax(dim=1, keepdim=True) > 0
        assert not (inside & ~part.tensors["edit"]).any(), "a lesion reaches out of its edit region"
        assert not (part.tensors["ring"] & ~part.tensors["edit"]).any()

    save_examples(tmp_path / "examples.safetensors", buckets)
    again = load_examples(tmp_path / "examples.safetensors")
    repeated = window_examples(frames, networks, **options)
    for side, part in buckets.items():
        for name, tensor in part.tensors.items():
            assert torch.equal(again[side].tensors[name], tensor)
            assert torch.equal(repeated[side].tensors[name], tensor), "examples must be a function of the seed"
    only = buckets[min(buckets)].only(torch.tensor(sorted(lesion_rows)[:2]), None)
    assert set(only.tensors["row"].tolist()) <= set(sorted(lesion_rows)[:2])
