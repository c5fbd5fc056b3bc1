"""Drawn outlines carried over to how real ones are distributed, after the last step and no sooner."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from busigen.data.geometry import Mask, circularity, largest_component
from busigen.evaluation.physics.features import outline
from busigen.registry import ASKED_LENGTH, ATTRIBUTES
from busigen.training.networks import outline as outline_spread
from busigen.training.networks.outline import FINEST, OutlineSpace, OutlineSpread
from tests.training.test_outline import blob

COUNT = len(ATTRIBUTES)
LENGTH = COUNT + 24


def outlines_of(components: int) -> Callable[[torch.Tensor], list[Mask]]:
    """What gives the lesions of codes in a space of so many components."""
    rng = np.random.default_rng(0)
    space = OutlineSpace(components, 48)
    space.fit([blob(rng) for _ in range(60)])
    nothing = torch.zeros(1, ASKED_LENGTH)

    def outlined(found: torch.Tensor) -> list[Mask]:
        distances = space.distance(found, nothing.expand(len(found), -1))
        masks = [largest_component(distance[0].numpy() > 0) for distance in distances]
        return [mask for mask in masks if mask.sum() > 64]

    return outlined


def codes(count: int, seed: int, scale: float = 1.0, shift: float = 0.0, length: int = LENGTH) -> torch.Tensor:
    found = torch.randn(count, length, generator=torch.Generator().manual_seed(seed)) * scale
    found[:, :COUNT] += shift
    return found


def test_unmeasured_draws_stay_as_they_are() -> None:
    generated = codes(200, 0, scale=1.5)
    torch.testing.assert_close(OutlineSpread(LENGTH).calibrated(generated), generated)


def test_only_the_last_step_is_calibrated() -> None:
    spread = OutlineSpread(LENGTH)
    x, velocity = codes(4, 0), codes(4, 1)
    plain = [spread(x, velocity, torch.tensor([0.6]), torch.tensor([s])) for s in (0.3, 0.0)]
    spread.fit_attributes(codes(100, 2), codes(100, 3, shift=1.0))
    first, last = (spread(x, velocity, torch.tensor([0.6]), torch.tensor([s])) for s in (0.3, 0.0))
    assert torch.equal(first, plain[0])
    torch.testing.assert_close(last, spread.calibrated(plain[1]))
    assert not torch.allclose(last, plain[1])


def test_attributes_come_out_distributed_as_the_real_ones_and_in_the_same_order() -> None:
    spread = OutlineSpread(LENGTH)
    real = codes(400, 1, scale=1.6, shift=-0.7).exp()
    spread.fit_attributes(codes(400, 0, scale=0.5, shift=0.4), real)
    fresh = codes(400, 2, scale=0.5, shift=0.4)
    found = spread.calibrated(fresh)
    for k in range(COUNT):
        # Other draws than those that were measured, of 400 each: chance alone gives up to 0.1.
        assert stats.ks_2samp(found[:, k], real[:, k]).statistic < 0.12
        assert torch.equal(found[:, k].argsort(), fresh[:, k].argsort())
    assert torch.equal(found[:, COUNT:], fresh[:, COUNT:])


def test_too_few_lesions_change_nothing() -> None:
    spread = OutlineSpread(LENGTH)
    spread.fit_attributes(codes(400, 0), codes(10, 1, shift=3.0))
    spread.fit_form(codes(10, 0), lambda _: pytest.fail("looked at outlines"), [])
    torch.testing.assert_close(spread.calibrated(codes(50, 2)), codes(50, 2))


def test_outlines_that_are_too_smooth_become_as_ragged_as_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each evaluation draws 72 outlines; 24 are enough to be much nearer. Two samples of 72 differ by chance as well.
    monkeypatch.setattr(outline_spread, "EVALUATIONS", 24)
    outlined = outlines_of(24)

    ragged = codes(72, 1, scale=0.6)
    ragged[:, COUNT + 4 :] *= 3.0
    generated, real = codes(72, 2, scale=0.6), outlined(ragged)
    spread = OutlineSpread(LENGTH)

    def distance(found: torch.Tensor) -> float:
        first, second = ([circularity(mask) for mask in masks] for masks in (outlined(found), real))
        return float(stats.wasserstein_distance(first, second))

    before = distance(generated)
    spread.fit_form(generated, outlined, real)
    assert distance(spread.calibrated(generated)) < 0.6 * before
    # Draws that were not measured gain as well, and the broad shape is left as it is.
    fresh = codes(72, 3, scale=0.6)
    assert distance(spread.calibrated(fresh)) < 0.8 * distance(fresh)
    assert torch.equal(spread.calibrated(fresh)[:, COUNT : COUNT + 4], fresh[:, COUNT : COUNT + 4])


def test_what_a_hand_leaves_on_an_outline_is_distributed_as_in_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline_spread, "EVALUATIONS", 30)
    outlined = outlines_of(160)

    def drawn(seed: int, finest: float) -> torch.Tensor:
        found = codes(72, seed, scale=0.6, length=COUNT + 160)
        found[:, COUNT + FINEST :] *= finest
        return found

    def ripple(found: torch.Tensor) -> list[float]:
        return [outline(mask, np.ones_like(mask))["ripple"] for mask in outlined(found)]

    real, generated = drawn(1, 40.0), drawn(2, 1.0)
    spread = OutlineSpread(COUNT + 160)
    before = stats.wasserstein_distance(ripple(generated), ripple(real))
    spread.fit_form(generated, outlined, outlined(real))
    assert stats.wasserstein_distance(ripple(spread.calibrated(generated)), ripple(real)) < 0.7 * before
