"""Phantoms: what is in them, what their numbers decide, and what a bundle may say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from busigen.phantoms.distribution import Phantom, Phantoms, filled, numbers_for
from busigen.phantoms.tissue import FASCIA, FAT, GLAND, MUSCLE, PARAMETERS, RIB, SEPTUM, SKIN
from busigen.runtime.sampling.inputs.backgrounds import DENSITIES, AskedTissue, phantom_at

FRAME = (190, 256)
FIT = Path(__file__).parents[2] / "benchmarks" / "studies" / "results" / "phantom.json"
UNFITTED = Phantoms.unfitted()
FITTED = Phantoms.from_json(json.loads(FIT.read_text()))


@pytest.fixture(scope="module")
def drawn() -> list[Phantom]:
    return [phantom_at(UNFITTED, 3, index, 0, FRAME) for index in range(24)]


def test_seed_index_and_attempt_decide_a_phantom_and_nothing_else_does(drawn: list[Phantom]) -> None:
    again = phantom_at(UNFITTED, 3, 5, 0, FRAME)
    assert np.array_equal(again.image, drawn[5].image) and np.array_equal(again.labels, drawn[5].labels)
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert not np.array_equal(phantom_at(UNFITTED, *other, FRAME).image, drawn[5].image)


@pytest.mark.parametrize("frame", [(256, 256), (256, 180), (97, 256), (32, 256), (256, 32)])
def test_every_frame_that_a_bundle_may_record_can_be_drawn(frame: tuple[int, int]) -> None:
    found = phantom_at(UNFITTED, 1, 2, 0, frame)
    assert found.image.shape == found.labels.shape == frame
    assert found.image.std() > 5


def test_tissues_lie_in_the_order_in_which_they_lie_in_a_breast(drawn: list[Phantom]) -> None:
    rows = np.arange(FRAME[0])[:, None] + np.zeros(FRAME)
    seen = set[int]()
    for one in drawn:
        seen |= set(np.unique(one.labels).tolist())
        depth = {kind: rows[one.labels == kind].mean() for kind in (SKIN, GLAND, MUSCLE) if (one.labels == kind).any()}
        assert list(depth.values()) == sorted(depth.values())
        assert (one.labels[0] == SKIN).all()
    assert {SKIN, FAT, SEPTUM, GLAND, FASCIA, MUSCLE, RIB} <= seen


def test_labels_tell_the_image(drawn: list[Phantom]) -> None:
    """Septa are brighter than the fat that they bound, in the phantoms' own image."""
    brighter = [
        one.image[one.labels == SEPTUM].mean() > one.image[one.labels == FAT].mean()
        for one in drawn
        if (one.labels == SEPTUM).sum() > 100
    ]
    # Of eighty phantoms 0.92 are so; gaps in the septa and haze take it from the others.
    assert len(brighter) > 10 and np.mean(brighter) > 0.8


@pytest.mark.parametrize("kind", DENSITIES)
def test_the_density_asked_for_is_what_comes_out(kind: str) -> None:
    low, high = DENSITIES[kind]
    for index in range(6):
        # So little gland is rare before the fit, and so much after it.
        phantoms = FITTED if kind in "AB" else UNFITTED
        found = phantom_at(phantoms, 3, index, 0, FRAME, AskedTissue(density=kind))
        # Counted on the map: lines of fascia and septa are drawn over what the density was chosen by.
        gland, fat = (int(np.isin(found.labels, kinds).sum()) for kinds in ((GLAND,), (FAT, SEPTUM)))
        # Where none of the phantoms that are tried fits, the nearest is taken.
        assert low - 0.03 <= found.density <= high
        assert abs(gland / (gland + fat) - found.density) < 0.06


def test_the_chest_wall_asked_for_is_what_comes_out() -> None:
    for index in range(6):
        found = phantom_at(UNFITTED, 3, index, 0, FRAME, AskedTissue(chest_wall=(0.5, 0.6)))
        assert 0.5 <= found.chest_wall <= 0.6
        top = (np.isin(found.labels, (MUSCLE, RIB, FASCIA))).argmax(axis=0).mean() / FRAME[0]
        assert abs(top - found.chest_wall) < 0.05


def test_what_cannot_be_had_at_once_is_met_as_nearly_as_can_be() -> None:
    def missed(one: Phantom) -> float:
        return max(0.75 - one.density, one.chest_wall - 0.31)

    asked = AskedTissue(density="D", chest_wall=(0.3, 0.31))
    assert missed(phantom_at(UNFITTED, 3, 0, 0, FRAME, asked)) < 0.5 * missed(phantom_at(UNFITTED, 3, 0, 0, FRAME))


def some_phantoms(seed: int, **more: Any) -> Phantoms:
    rng, count = np.random.default_rng(seed), len(PARAMETERS)
    return Phantoms(rng.normal(size=count).round(4), rng.normal(size=(count, count)).round(4), **more)


def test_phantoms_come_back_from_json() -> None:
    phantoms = some_phantoms(0, scanners={"one": some_phantoms(1)})
    again = Phantoms.from_json(json.loads(json.dumps(phantoms.to_json())))
    for found, given in ((again, phantoms), (again.of("one"), phantoms.of("one"))):
        assert np.array_equal(found.mean, given.mean) and np.array_equal(found.factor, given.factor)
    assert again.of("another") is again and again.of(None) is again


def test_a_scanner_has_phantoms_of_its_own() -> None:
    known = list(FITTED.scanners)
    images = [phantom_at(FITTED.of(name), 3, 0, 0, FRAME).image for name in (*known, None)]
    assert len(known) == 3 and len({image.tobytes() for image in images}) == 4


def test_bundles_that_do_not_name_their_noise_have_the_phantoms_that_they_had() -> None:
    """Their noise is normal; the bytes are those of the version before."""
    before = {key: part for key, part in UNFITTED.to_json().items() if key != "noise"}
    image = phantom_at(Phantoms.from_json(before), 3, 5, 0, FRAME).image
    assert image[100, 100:106].tolist() == [127, 125, 125, 123, 116, 107]


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.0]},
        {"mean": [float("nan")] * len(PARAMETERS)},
        {"mean": [1e9] * len(PARAMETERS)},
        {"mean": [True] * len(PARAMETERS)},
        {"factor": []},
        {"factor": [[0.0]] * len(PARAMETERS)},
        {"factor": "x"},
        {"parameters": ["skin"]},
        {"noise": "white"},
        {"scanners": []},
        {"scanners": {"one": {"mean": [0.0]}}},
        {"scanners": {"one": 5}},
        {"scanners": dict.fromkeys("abcdefghi", UNFITTED.to_json())},
    ],
)
def test_what_is_no_distribution_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Phantoms.from_json(UNFITTED.to_json() | change)


def test_streaks_run_along_the_layers_and_not_across_them() -> None:
    """Of fitted phantoms, as of real tissue, neighbours side by side are more alike than those above one another."""
    for index in range(8):
        image = phantom_at(FITTED, 3, index, 0, FRAME).image.astype(np.float32)
        smooth = image.reshape(95, 2, 128, 2).mean(axis=(1, 3))
        down, across = (np.abs(np.diff(smooth, axis=axis)).mean() for axis in (0, 1))
        assert down > 1.1 * across


def test_a_phantom_beside_its_frame_is_mirrored() -> None:
    image = np.arange(200 * 150, dtype=np.int64).reshape(200, 150)
    whole = filled(image, (0, 53, 200, 150))
    assert whole.shape == (256, 256) and np.array_equal(whole[:200, 53:203], image)
    assert np.array_equal(whole[200:, 53:203], image[198:142:-1])


def test_no_phantom_runs_out_of_numbers() -> None:
    """Parameters at their ends have the most in them."""
    for value in (-50.0, 50.0):
        phantoms = Phantoms(np.full(len(PARAMETERS), value), np.zeros((len(PARAMETERS),) * 2))
        noise = np.random.default_rng(0).standard_normal(numbers_for(*FRAME)).astype(np.float32)
        assert phantoms.drawn(phantoms.parameters(np.zeros(len(PARAMETERS))), noise, *FRAME).image.shape == FRAME
