from dataclasses import replace

import numpy as np
import pytest

from busigen.evaluation.utility.training import (
    RECIPES,
    Examples,
    centroid_offsets,
    dice,
    examples,
    overlap,
    pooled_f1,
    predict,
    train,
)
from tests.harness.synthetic_sets import synthetic_set

SMALL = replace(RECIPES["quick"], side=64, channels=(8, 16, 32, 32), steps=60)


def _squares(*starts, size=8, side=64):
    masks = np.zeros((len(starts), side, side), np.bool_)
    for mask, (y, x) in zip(masks, starts, strict=True):
        mask[y : y + size, x : x + size] = True
    return masks


def test_dice_and_pooled_f1_of_known_masks():
    masks = _squares((8, 8), (8, 8), (8, 8))
    predicted = _squares((8, 8), (8, 12), (40, 40))
    counts = overlap(predicted, masks)
    assert counts.tolist() == [[64, 0, 0], [32, 32, 32], [0, 64, 64]]
    assert dice(counts).tolist() == [1.0, 0.5, 0.0]
    assert pooled_f1(counts) == pytest.approx(2 * 96 / (2 * 96 + 96 + 96))


def test_an_empty_prediction_of_an_empty_mask_is_right():
    nothing = np.zeros((1, 64, 64), np.bool_)
    assert dice(overlap(nothing, nothing)).tolist() == [1.0]
    assert dice(overlap(_squares((0, 0)), nothing)).tolist() == [0.0]
    assert np.isnan(pooled_f1(overlap(nothing, nothing)))


def test_offsets_are_in_pixels_of_the_working_frame():
    offsets = centroid_offsets(
        _squares((8, 8), (8, 8)), np.concatenate([_squares((10, 5)), np.zeros((1, 64, 64), bool)])
    )
    assert offsets[0].tolist() == [-8.0, 12.0]  # 2 and 3 pixels of a 64-pixel image are 8 and 12 of 256
    assert np.isnan(offsets[1]).all()


def test_shrinking_averages_images_and_keeps_the_majority_of_masks():
    images = synthetic_set(2, 0)
    small = examples(images, 64)
    assert small.images.shape == small.masks.shape == (2, 64, 64)
    assert abs(small.images.mean() - images.images.mean()) < 0.5  # rounding to whole grey levels
    assert small.masks.mean() == pytest.approx(images.masks.mean(), rel=0.02)  # edge blocks go either way


@pytest.mark.parametrize("options", [{}, {"classic": True}, {"paste": True}])
def test_a_small_network_learns_drawn_lesions(options):
    data, test = (examples(synthetic_set(count, seed), 64) for count, seed in ((32, 1), (12, 2)))
    network = train([data], SMALL, seed=0, device="cpu", **{"classic": False, "paste": False, **options})
    nothing = dice(overlap(np.ones_like(test.masks), test.masks)).mean()
    # Marking everything scores about 0.15; a network that ignores images or misplaces masks while augmenting does too.
    assert dice(overlap(predict(network, test.images, "cpu"), test.masks)).mean() > nothing + 0.25


def test_training_is_a_function_of_its_seed():
    data = Examples(*(part[:4] for part in vars(examples(synthetic_set(4, 1), 64)).values()))
    short = replace(SMALL, steps=3)
    runs = [train([data], short, seed=seed, device="cpu", classic=True, paste=True) for seed in (0, 0, 1)]
    weights = [np.concatenate([w.detach().numpy().ravel() for w in run.parameters()]) for run in runs]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_phases_train_one_after_the_other():
    data = examples(synthetic_set(32, 1), 64)
    # One phase's masks lie beside the lesions: where a network looks for lesions tells which phase trained it last.
    beside = Examples(data.images, np.roll(data.masks, 20, axis=1))
    found = [
        train(phases, SMALL, seed=0, device="cpu", classic=False, paste=False)
        for phases in ([beside, data], [data, beside])
    ]
    right, wrong = (dice(overlap(predict(network, data.images, "cpu"), data.masks)).mean() for network in found)
    # Measured 0.65; a network that marks everything scores 0.15.
    assert right > 0.45
    assert wrong < 0.25
