"""Outline codes: what goes in comes out again, and what is asked for is what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import attributes, largest_component
from busigen.registry import ASKED_LENGTH, ATTRIBUTES, LESION_CLASSES, PRESETS
from busigen.training.networks.build import build
from busigen.training.networks.inference import Velocity
from busigen.training.networks.outline import OutlineSpace
from busigen.training.tasks.denoiser import random_condition
from tests.conftest import Sources

TINY = PRESETS["tiny"]
ROWS, COLUMNS = np.mgrid[0:256, 0:256] + 0.5
NOTHING = torch.zeros(1, ASKED_LENGTH)
COUNT = len(ATTRIBUTES)


def blob(rng: np.random.Generator) -> NDArray[np.bool_]:
    """A wavy ellipse away from the border."""
    down, across = rng.uniform(80, 170, 2)
    height, width = rng.uniform(14, 45, 2)
    angle = np.arctan2((ROWS - down) / height, (COLUMNS - across) / width)
    waves = sum(rng.normal(0, 0.12 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 6))
    return np.hypot((ROWS - down) / height, (COLUMNS - across) / width) <= 1 + waves


@pytest.fixture(scope="module")
def space() -> OutlineSpace:
    rng = np.random.default_rng(0)
    fitted = OutlineSpace(24, 48)
    fitted.fit([blob(rng) for _ in range(60)])
    return fitted


def decoded(space: OutlineSpace, code: torch.Tensor, asked: torch.Tensor = NOTHING) -> list[NDArray[np.bool_]]:
    field = space.distance(code, asked.expand(len(code), -1))
    assert field.shape == (len(code), 1, 256, 256)
    return [picture[0].numpy() > 0 for picture in field]


def dice(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def test_unseen_outlines_come_back(space: OutlineSpace) -> None:
    rng = np.random.default_rng(1)
    masks = [blob(rng) for _ in range(20)]
    back = decoded(space, space.encode(masks))
    # Sixty blobs teach the main waves alone, so a pixel or two along the outline may go either way.
    assert min(dice(a, b) for a, b in zip(masks, back, strict=True)) > 0.95


def test_real_outlines_come_back(any_sources: Sources) -> None:
    table, stored = any_sources.prepared.table, any_sources.prepared.masks
    if table.height < 1000:
        pytest.skip("a drawn set has too few lesions to fit the shipped basis on")

    def lesions(*splits: str, label: str | None = None) -> list[NDArray[np.bool_]]:
        wanted = table["split"].is_in(splits) & (table["class"] == label if label else table["class"] != "normal")
        return [largest_component(stored[row] == 1) for row in table.filter(wanted)["row"]]

    shape = PRESETS["compact"].outline
    space = OutlineSpace(shape.coefficients, shape.grid)
    space.fit(lesions("train"))
    for label in LESION_CLASSES:
        held_out = lesions("val", "test", label=label)
        back = [mask for start in held_out for mask in decoded(space, space.encode([start]))]
        found = [dice(a, b) for a, b in zip(held_out, back, strict=True)]
        # Two readers of one lesion agree to about 0.9; the code must not add to that.
        assert np.median(found) > 0.98
        assert np.quantile(found, 0.05) > 0.95


def test_a_field_is_a_distance_in_pixels_and_negative_far_outside(space: OutlineSpace) -> None:
    mask = blob(np.random.default_rng(2))
    field = space.distance(space.encode([mask]), NOTHING)[0, 0].numpy()
    exact = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    near = np.abs(exact) < 4
    # The frame stretches an ellipse to a circle, so distances along its short axis come out up to its slenderness
    # (at most about two) wrong, and those of pixels next to the outline half a pixel.
    assert np.abs(field - exact)[near].mean() < 1.5
    corners = field[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < 0).all()


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_what_is_asked_for_comes_out_whatever_was_sampled(space: OutlineSpace, which: tuple[int, ...]) -> None:
    wanted = np.array([0.45, 0.55, np.log(45.0), np.log(1.3)])
    asked = torch.zeros(1, ASKED_LENGTH)
    for k in which:
        asked[0, k], asked[0, COUNT + k] = float(wanted[k]), 1.0
    generator = torch.Generator().manual_seed(3)
    code = torch.randn(24, COUNT + space.coefficients, generator=generator)
    # Moderate forms and places, so that no outline is cut by the border or falls apart.
    code[:, COUNT:] *= 0.7
    code[:, :COUNT] *= 0.5
    for mask in decoded(space, code, asked):
        found = attributes(largest_component(mask))
        # Half a pixel of place; 2 % of the root of the area; a pixel more or less of a bounding box of thirty.
        assert (np.abs(found - wanted)[list(which)] < np.array([0.002, 0.002, 0.02, 0.07])[list(which)]).all()


def test_hopeless_codes_stay_finite(space: OutlineSpace) -> None:
    code = torch.full((2, COUNT + space.coefficients), 40.0)
    code[1] *= -1
    field = space.distance(code, NOTHING.expand(2, -1))
    assert torch.isfinite(field).all()


def test_fitting_is_a_function_of_the_lesions(space: OutlineSpace) -> None:
    rng = np.random.default_rng(0)
    again = OutlineSpace(24, 48)
    again.fit([blob(rng) for _ in range(60)])
    for name, buffer in space.named_buffers():
        assert torch.equal(buffer, dict(again.named_buffers())[name])
    mirrored = blob(np.random.default_rng(5))
    code, other = space.encode([mirrored, np.ascontiguousarray(mirrored[:, ::-1])])
    # Mirror images are equally likely: the same distance from the mean.
    assert float(code.norm()) == pytest.approx(float(other.norm()), rel=1e-2)


def test_the_transformer_reads_time_class_context_and_what_is_asked() -> None:
    torch.manual_seed(0)
    model = build("mask", TINY).eval()
    # Fresh, it answers with the velocity of normal codes whatever it is told.
    for write in model.write:
        torch.nn.init.normal_(write.weight)
    velocity = Velocity(model)
    x, t, label = torch.randn(2, model.length), torch.tensor([0.5, 0.5]), torch.tensor([1, 1])
    tokens, keep = torch.randn(2, TINY.tokens, TINY.context_dim), torch.ones(2, TINY.tokens)
    asked = torch.zeros(2, ASKED_LENGTH)
    with torch.no_grad():
        plain = velocity(x, t, label, tokens, keep, asked)
        others = [
            velocity(x, t + 0.3, label, tokens, keep, asked),
            velocity(x, t, label + 1, tokens, keep, asked),
            velocity(x, t, label, tokens.flip(1), keep, asked),
            velocity(x, t, label, tokens, keep, asked + 1),
        ]
        hidden = keep.clone()
        hidden[:, :8] = 0
        changed = tokens.clone()
        changed[:, :8] = 9.0
        dropped = [velocity(x, t, label, some, hidden, asked) for some in (tokens, changed)]
    assert plain.shape == x.shape
    assert all((other - plain).abs().max() > 1e-4 for other in others)
    assert torch.equal(*dropped), "a dropped token was seen"


def test_training_tells_a_part_of_the_answer_and_nothing_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    code, birads = torch.randn(4000, 20), torch.nn.functional.one_hot(torch.arange(4000) % 4, 4).float()
    asked = random_condition(code, birads, generator)
    values, flags, shown = asked.split([COUNT, COUNT, 4], dim=1)
    assert torch.equal(values, code[:, :COUNT] * flags)
    # Nothing: half, and 0.7 to the fourth of the other half, is 0.62; five standard errors of 4000 draws are 0.04.
    assert float((flags.sum(dim=1) == 0).float().mean()) == pytest.approx(0.62, abs=0.04)
    assert ((shown == birads) | (shown == 0)).all()
    assert float(shown.sum(dim=1).mean()) == pytest.approx(0.5, abs=0.04)
