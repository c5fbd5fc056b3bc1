"""Making a folder a training run's own, or saying by which options it differs from the run that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from busigen.data.prepared import Prepared
from busigen.errors import IntegrityError, OutputError
from busigen.records import Record, Text, read_checked
from busigen.training.base import Base
from busigen.training.checkpoint import Origin, RecipeRecord
from busigen.training.recipe import Recipe
from busigen.training.state import write_json

RUN = "run.json"

_SHOWN = 3


class _RunRecord(Record):
    """Content of a training run's ``run.json``."""

    recipe: RecipeRecord
    split_hash: Text
    base: Origin | None = None


def claim(out: Path, recipe: Recipe, prepared: Prepared, base: Base | None = None) -> None:
    """Record recipe, data and base in a new folder, or check that they are those of the run in it.

    Raises:
        OutputError: ``out`` belongs to a run with another recipe, other data or another base, or cannot be written.
    """
    config = json.loads(json.dumps({"recipe": recipe.to_dict(), "split_hash": prepared.split_hash}))
    if base is not None:
        config["base"] = base.identity
    path = out / RUN
    try:
        if path.exists():
            before = read_checked(_RunRecord, path, fix="", root=out)
            if before != config:
                raise OutputError(
                    f"{out} belongs to another run ({_difference(before, config)}).",
                    fix="Use another --out, or the same options.",
                )
            linked = next((place for place in out.rglob("*") if place.is_symlink()), None)
            if linked is not None:
                raise OutputError(f"{linked} is a link, and would be written through.", fix="Use another --out.")
            return
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} is not empty and holds no busigen run.", fix="Use another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
    except IntegrityError as error:
        raise OutputError(
            f"{out} holds no run of `busigen train`: {error.problem}", fix="Use another --out."
        ) from error
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}.", fix="Use a folder that you may write to."
        ) from error


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a person changed, in terms of options; fields of the recipe only where no option explains them."""
    old, new = before.get("recipe", {}), now["recipe"]
    shown = [
        f"--{name}: {old.get(name)!r} there, {new[name]!r} now"
        for name in ("preset", "seed")
        if old.get(name) != new[name]
    ]
    if before.get("split_hash") != now["split_hash"]:
        shown.append("--data: other images or splits")
    there, here = _base(before), _base(now)
    if there != here:
        shown.append(f"--base: {there} there, {here} now")
    # A run with a base has fewer tasks than one without: that says nothing of what a person changed.
    if old.get("preset") == new["preset"] and ("base" in before) == ("base" in now):
        fields = _fields(old, new)
        # Steps and the warm-ups that follow from them are all that --scale changes.
        scaled = [field for field in fields if field[0].endswith((".steps", ".warmup"))]
        if scaled:
            name, there, here = scaled[0]
            shown.append(f"--scale: {name} {there} there, {here} now")
        rest = [field for field in fields if field not in scaled and field[0] != "seed"]
        shown += [f"recipe.{name}: {there!r} there, {here!r} now" for name, there, here in rest[:_SHOWN]]
        shown += [f"and {len(rest) - _SHOWN} more"] if len(rest) > _SHOWN else []
    return "; ".join(shown)


def _base(config: Mapping[str, Any]) -> str:
    base = config.get("base")
    return f"one with weights {base['weights'][:12]}..." if base else "none"


def _fields(old: Any, new: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two recipes differ, as (dotted name, old, new); a list's items go by their own name or place."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(_name(b, number)), a, b) for number, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [(at, old, new)]
    return [field for key, a, b in pairs for field in _fields(a, b, f"{at}.{key}".strip("."))]


def _name(item: Any, number: int) -> Any:
    return item.get("name", number) if isinstance(item, dict) else number
