"""Which run a folder belongs to: recorded before its first task, compared whenever it is continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from busigen.data.prepared import Prepared
from busigen.errors import IntegrityError, OutputError
from busigen.files import make_folder
from busigen.records import Record, Text, read_checked
from busigen.training import checkpoint
from busigen.training.checkpoint import Base, Origin, Painting, RecipeRecord
from busigen.training.recipe import Recipe
from busigen.training.trainer import write_json

RUN = "run.json"
_SHOWN = 3  # Fields of recipes that are named as different.
_ANOTHER = "Use another --out."


class _RunRecord(Record):
    """Content of a training run's ``run.json``."""

    recipe: RecipeRecord
    split_hash: Text
    base: Origin | None = None
    painting: Painting | None = None


def claim(
    out: Path, recipe: Recipe, prepared: Prepared, base: Base | None = None, painting: Painting | None = None
) -> None:
    """Record recipe, data and bases in a new folder, or check that they are those of the run in it.

    An OutputError says what is another there, or that ``out`` cannot be written.
    """
    config = json.loads(json.dumps({"recipe": recipe.to_dict(), "split_hash": prepared.split_hash}))
    if base is not None:
        config["base"] = base.identity
    if painting is not None:
        # The same weights may come from elsewhere when a run is continued.
        config["painting"] = painting.model_dump(exclude={"source"})
    path = out / RUN
    try:
        if path.exists():
            before = read_checked(_RunRecord, path, fix="", root=out)
            if before != config:
                raise OutputError(
                    f"{out} belongs to another run ({_difference(before, config)}).",
                    fix="Use another --out, or the same options.",
                )
            if linked := next((place for place in out.rglob("*") if place.is_symlink()), None):
                raise OutputError(f"{linked} is a link, and would be written through.", fix=_ANOTHER)
            return
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} is not empty and holds no busigen run.", fix=_ANOTHER)
        make_folder(out)
        write_json(path, config)
    except IntegrityError as error:
        raise OutputError(f"{out} holds no run of `busigen train`: {error.problem}", fix=_ANOTHER) from error
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.", fix=checkpoint.WRITABLE) from error


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, as options; fields of the recipe only where no option explains them."""
    old, new = before.get("recipe", {}), now["recipe"]
    options = [name for name in ("preset", "seed") if old.get(name) != new[name]]
    shown = [f"--{name}: {old.get(name)!r} there, {new[name]!r} now" for name in options]
    if before.get("split_hash") != now["split_hash"]:
        shown.append("--data: other images or splits")
    bases = [config.get("base") for config in (before, now)]
    there, here = (f"one with weights {base['weights'][:12]}..." if base else "none" for base in bases)
    if there != here:
        shown.append(f"--base: {there} there, {here} now")
    painting = _fields(*(config.get("painting", {}) for config in (before, now)))
    named = {"sha256": "base-model", "prompts": "prompt", "shown_at": "window", "licence": "base-model"}
    for name, one, two in painting:
        first = name.partition(".")[0]
        shown.append(f"--{named.get(first, first)}: {one!r} there, {two!r} now")
    # A run with a base has fewer tasks than one without, which no person chose.
    if old.get("preset") == new["preset"] and ("base" in before) == ("base" in now):
        fields = _fields(old, new)
        # --scale changes steps and the warm-ups that follow from them, and nothing else.
        if scaled := [field for field in fields if field[0].endswith((".steps", ".warmup"))]:
            name, there, here = scaled[0]
            shown.append(f"--scale: {name} {there} there, {here} now")
        rest = [field for field in fields if field not in scaled and field[0] != "seed"]
        shown += [f"recipe.{name}: {there!r} there, {here!r} now" for name, there, here in rest[:_SHOWN]]
        shown += [f"and {len(rest) - _SHOWN} more"] if len(rest) > _SHOWN else []
    return "; ".join(shown)


def _fields(old: Any, new: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Differing fields as (dotted name, old, new); items of a list go by their own name or their position."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        names = [item.get("name", number) if isinstance(item, dict) else number for number, item in enumerate(new)]
        pairs = list(zip(map(str, names), old, new, strict=True))
    else:
        return [] if old == new else [(at, old, new)]
    return [field for key, a, b in pairs for field in _fields(a, b, f"{at}.{key}".strip("."))]
