from __future__ import annotations

import pytest

from busigen.errors import UsageError
from busigen.registry import LESION_CLASSES, PRESETS, STABLE_DIFFUSION, STAGES
from busigen.training.networks.build import build
from busigen.training.pipeline import KINDS
from busigen.training.recipe import recipe_for

WHOLE = sorted(PRESETS.keys() - {STABLE_DIFFUSION})  # Presets that train all of their components themselves.


@pytest.mark.parametrize("preset", WHOLE)
def test_every_preset_trains_every_component_before_it_is_needed(preset: str) -> None:
    names = [task.name for task in recipe_for(preset).tasks]
    order = ["autoencoder", "context", "lesion", "heal", "mask"]
    assert [name for name in names if name in order] == order
    assert names.index("heal") < names.index("prior")
    adapters = {f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES}
    assert adapters <= set(names)
    for stage in STAGES:
        assert all(names.index(stage) < names.index(f"{stage}-{label}") for label in LESION_CLASSES)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_task_kind_is_one_that_the_trainer_knows(preset: str) -> None:
    kinds = {task.kind for task in recipe_for(preset).tasks}
    assert kinds <= {*KINDS, "heal", "adapter"}


def test_scale_shortens_steps_and_keeps_warm_up_a_small_part_of_them() -> None:
    whole, tenth = recipe_for("compact"), recipe_for("compact", scale=0.1)
    for long, short in zip(whole.tasks, tenth.tasks, strict=True):
        if long.steps:
            assert short.steps == pytest.approx(long.steps * 0.1, abs=1)
            assert short.warmup <= max(1, short.steps // 10)
    assert all(task.steps >= 2 for task in recipe_for("compact", scale=1e-9).tasks if task.kind != "heal")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="--scale"):
        recipe_for("compact", scale=scale)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'huge'.*compact, sd15, tiny"):
        recipe_for("huge")


@pytest.mark.parametrize("preset", WHOLE)
def test_a_task_that_starts_from_another_component_comes_after_it_and_fits_its_weights(preset: str) -> None:
    recipe = recipe_for(preset)
    starting = [task for task in recipe.tasks if task.start is not None]
    assert starting
    for task in starting:
        names = [earlier.name for earlier in recipe.tasks]
        assert names.index(task.start) < names.index(task.name)
        own, first = (build(name, recipe.sizes).state_dict() for name in (task.component, task.start))
        assert {name: value.shape for name, value in own.items()} == {k: v.shape for k, v in first.items()}
