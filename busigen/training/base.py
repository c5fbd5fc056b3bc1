"""Building on a finished checkpoint: what is not trained anew is taken as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError, OutputError, UsageError
from busigen.registry import STAGES
from busigen.training import checkpoint
from busigen.training.recipe import LEARN_FROM_HEALED, LoraSpec, Recipe, TaskSpec, recipe_for
from busigen.training.state import fresh_folder

ADAPTER_KINDS = ("heal", "adapter")
"""What is left to do of a recipe where the base is there: heal the new images, then train the adapters on them."""

RETRAINABLE = (*STAGES, "prior", "decoder", "finish")
"""What can be trained further on a base. All of it speaks through the encoder and the context encoder."""

RETRAIN_RATE = 0.5
"""Factor on the learning rate of what goes on from a base's weights: the whole rate first undoes what they know."""


@dataclass(frozen=True)
class Base:
    """A finished checkpoint whose components another run builds on. ``record`` is its ``busigen.json``."""

    folder: Path
    record: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Base:
        """Read and check a checkpoint.

        Raises:
            InputError: ``folder`` is no finished checkpoint.
            IntegrityError: a weight file is missing, extra or not the one that was recorded.
        """
        return cls(folder, checkpoint.read_record(folder))

    @property
    def weights(self) -> dict[str, str]:
        """The sha256 of the base components' weight files, by relative path; its merged adapters play no part."""
        return {name: digest for name, digest in self.record["weights"].items() if _component(name)}

    @property
    def identity(self) -> dict[str, str]:
        """What tells bases apart: ``split_hash`` of the images that they were trained on, and ``weights``.

        ``weights`` is the sha256 of :attr:`weights` as sorted JSON, so that it can be computed again from any
        checkpoint that holds these components. A checkpoint that was itself trained on a base names that one.
        """
        digest = hashlib.sha256(json.dumps(self.weights, sort_keys=True).encode()).hexdigest()
        origin = self.record.get("base", self.record["data"])
        return {"split_hash": str(origin["split_hash"]), "weights": digest}

    def recipe(
        self, preset: str | None = None, *, seed: int = 0, scale: float = 1.0, retrain: Collection[str] = ()
    ) -> Recipe:
        """The part of the preset's recipe that is left to do, with the base's LoRA.

        Without ``retrain``, that is all adapters, which learn from all sources of the data: whoever names a base has
        said what to adapt to. With it, these components go on from the base's weights, at ``RETRAIN_RATE`` of the
        rate, and their adapters are trained from the start as in a run without a base. Stage 3 begins with stage 2's
        weights, as in such a run, where both are named.

        Args:
            preset: ``None`` or the base's.
            seed: as for :func:`busigen.training.recipe.recipe_for`.
            scale: as for :func:`busigen.training.recipe.recipe_for`.
            retrain: names in ``RETRAINABLE``.

        Raises:
            UsageError: another preset than the base's, a scale that is not positive, or a component that cannot be
                trained anew.
        """
        own = self.record["preset"]
        if preset not in (None, own):
            raise UsageError(
                f"--preset {preset} does not fit --base {self.folder}, which has preset {own}.",
                fix="Leave --preset out, or name a base of that preset.",
            )
        for name in retrain:
            if name not in RETRAINABLE:
                raise UsageError(f"--retrain {name!r} is not possible.", fix=f"Choose from: {', '.join(RETRAINABLE)}.")
        recipe = recipe_for(own, seed=seed, scale=scale)
        lora = self.record["recipe"]["lora"]
        if retrain:
            healing = not set(LEARN_FROM_HEALED).isdisjoint(retrain)
            tasks = tuple(
                _further(task, retrain)
                for task in recipe.tasks
                if (healing if task.kind == "heal" else not {task.name, task.component}.isdisjoint(retrain))
            )
        else:
            tasks = tuple(replace(task, sources=()) for task in recipe.tasks if task.kind in ADAPTER_KINDS)
        return replace(recipe, tasks=tasks, lora=LoraSpec(**{**lora, "targets": tuple(lora["targets"])}))

    def copy(self, out: Path, recipe: Recipe) -> None:
        """Copy what ``recipe`` does not train to ``out``, so that it needs this checkpoint no more.

        What is there already stays.

        Raises:
            OutputError: ``out`` cannot be written.
            IntegrityError: a copy is not what was recorded.
        """
        trained = {checkpoint.place_of(task) for task in recipe.tasks if task.kind != "heal"}
        weights: dict[str, dict[str, str]] = {}
        for path, digest in self.record["weights"].items():
            top, name, _ = path.split("/", 2)
            place = f"{checkpoint.MERGED if top == checkpoint.ADAPTERS else top}/{name}"
            if place not in trained:
                weights.setdefault(f"{top}/{name}", {})[path] = digest
        for place, wanted in sorted(weights.items()):
            self._copy(out, place, wanted)

    def _copy(self, out: Path, place: str, wanted: Mapping[str, str]) -> None:
        if checkpoint.weight_hashes(out, (place,)) == wanted:
            return
        try:
            with fresh_folder(out / place) as folder:
                shutil.copytree(self.folder / place, folder, dirs_exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{out / place} cannot be written: {error}.", fix="Use a folder that you may write to."
            ) from error
        if checkpoint.weight_hashes(out, (place,)) != wanted:
            raise IntegrityError(
                f"{out / place} is not what {self.folder / checkpoint.RECORD} records.",
                fix="Run the same command again.",
            )


def _further(task: TaskSpec, retrain: Collection[str]) -> TaskSpec:
    """A task of the recipe that goes on from the base's weights, or begins with another's where that is retrained, too.

    Adapters and healing are as in a run without base.
    """
    if task.kind in ADAPTER_KINDS or task.start == task.component or task.start in retrain:
        return task
    return replace(task, start=task.component, lr=RETRAIN_RATE * task.lr)


def _component(path: str) -> str:
    """The base component that a weight file of a checkpoint belongs to; empty for adapters and merged weights."""
    top, _, rest = path.partition("/")
    return rest.partition("/")[0] if top == checkpoint.BASE else ""
