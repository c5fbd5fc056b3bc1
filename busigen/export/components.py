"""The graphs that share a file of weights, traced once and laid out as often as a precision is tried."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import ModelMixin
from onnx import ModelProto, TensorProto

from busigen.export.assembly import with_solver, with_weights
from busigen.export.graph_rewrites import TYPES, emulated, lowered, make_sums_deterministic
from busigen.export.trace import PAINTER, Tracer, without_context
from busigen.export.weights import weight
from busigen.registry import (
    BUCKETS,
    CLASSES,
    LATENT_FACTOR,
    LESION_CLASSES,
    LOOPS,
    MASK_CHANNELS,
    PAINTING,
    PLACE_CHANNELS,
    RESOLUTION,
    SCANNERS,
)
from busigen.runtime.backends.bundle_record import BACKGROUND_DECODER, graphs_of
from busigen.solver import solver_steps
from busigen.training.networks.inference import ADAPTERS, Networks

Graphs = dict[str, ModelProto]


@dataclass(frozen=True)
class Part:
    """One graph: a traced evaluation in fp32, and what puts the rest around it (given a name in ``registry.LOOPS``).

    ``before`` computes conditions once, ahead of the solver's loop, ``after`` the output from its result, and
    ``update`` is a solver step.
    """

    evaluation: ModelProto
    finish: Callable[[ModelProto, str], ModelProto] = lambda model, loop: model
    before: ModelProto | None = None
    after: ModelProto | None = None
    update: ModelProto | None = None


@dataclass(frozen=True)
class Component:
    """What shares weights: ``parts`` by graph name; ``loop`` is a name in ``registry.LOOPS``.

    Names with the very same part are one graph, which is told them apart by ``constants``: inputs by name.
    """

    name: str
    parts: Mapping[str, Part]
    loop: str = next(iter(LOOPS))
    constants: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)

    def graphs(self, precision: str, *, rounded: bool = False) -> Graphs:
        """Lay out the graphs in ``fp32``, or a precision of :data:`busigen.export.graph_rewrites.TYPES`.

        ``rounded`` ones compute in fp32 what it would round (:func:`busigen.export.graph_rewrites.emulated`).
        """
        made: dict[int, ModelProto] = {}
        for part in self.parts.values():
            if id(part) not in made:
                model = make_sums_deterministic(
                    lowered(part.evaluation, precision) if precision in TYPES else part.evaluation
                )
                made[id(part)] = part.finish(emulated(model) if rounded else model, self.loop)
        return {name: made[id(part)] for name, part in self.parts.items()}


COMPONENTS = ("context", "encoder", "decoder", "prior", "mask", "lesion", "blend")
"""Names of all components, in the order in which they are traced."""


def components_of(networks: Networks) -> tuple[str, ...]:
    """The names of a checkpoint's components: Stable Diffusion takes the place of two."""
    others = tuple(name for name in COMPONENTS if name not in PAINTING)
    return COMPONENTS if networks.shown_at is None else (*others, PAINTER)


Steps = dict[str, list[ModelProto]]
"""Traced evaluations, one per window size, by the configuration of what was traced: stages 2 and 3 may share one."""


def components(
    networks: Networks, *, opset: int, loop: str, only: Collection[str] = (*COMPONENTS, PAINTER)
) -> Iterator[Component]:
    """Trace a checkpoint's networks, one component after the other.

    A network is traced once per window size and gets each class's weights; what adapters leave alone is the same in
    both classes and stored once. ``only`` are names of ``components_of``.
    """
    tracing, steps, told = Tracer(opset), Steps(), bool(networks.scanners) and networks.shown_at is None
    for name in (name for name in components_of(networks) if name in only):
        if name == "mask":
            yield outlines(tracing, networks, loop)
        elif name == "context":
            yield Component(name, {name: Part(tracing.context(networks))}, loop)
        elif name == "prior":
            own = networks.prior_decoder
            decoding = {} if own is None else {BACKGROUND_DECODER: Part(tracing.decoder(own, RESOLUTION, scanner=told))}
            yield Component(name, {name: _prior(tracing, networks), **decoding}, loop)
        elif name == "encoder":
            yield Component(name, {f"{name}@{side}": Part(tracing.encoder(networks, side)) for side in BUCKETS}, loop)
        elif name == "decoder":
            halves = {f"{name}@{side}": Part(tracing.decoder(networks.decoder, side, scanner=told)) for side in BUCKETS}
            yield Component(name, halves, loop)
        elif name == PAINTER:
            yield _painter(tracing, networks, loop)
        else:
            yield Component(name, _staged(tracing, networks, name, steps), loop)


def _prior(tracing: Tracer, networks: Networks) -> Part:
    unet, cells = networks.denoisers["prior"], RESOLUTION // LATENT_FACTOR
    step = tracing.step(without_context(unet), cells, 1, (SCANNERS, PLACE_CHANNELS))
    before = tracing.prior_condition(networks, cells)
    update = tracing.update(unet.spectrum, networks.preset.latent_channels, cells, cells)
    return _part(step, "prior", "normal", networks, before, update, start=networks.prior_start)


def outlines(tracing: Tracer, networks: Networks, loop: str) -> Component:
    """Stage 1 of each class; the classes' adapters share the base's outline space, but not its spread."""
    first = networks.denoiser("mask", LESION_CLASSES[0])
    step = tracing.outline_step(first, networks.preset.tokens)
    before, after = tracing.asked(first.space), tracing.distance(first.space, first.length)
    parts = {}
    for label in LESION_CLASSES:
        unet = networks.denoisers[f"mask-{label}"]
        update = tracing.update(unet.spectrum, unet.length)
        weighted = with_weights(step, denoiser_weights(unet))
        parts[f"mask-{label}"] = _part(weighted, "mask", label, networks, before, update, after)
    return Component("mask", parts, loop)


def _staged(tracing: Tracer, networks: Networks, stage: str, steps: Steps) -> dict[str, Part]:
    channels, first = networks.preset.latent_channels, networks.denoisers[f"{stage}-{LESION_CLASSES[0]}"]
    conditions, sizes = (SCANNERS, channels, MASK_CHANNELS, 1), [side // LATENT_FACTOR for side in BUCKETS]
    # Names with an underscore say where the network was loaded from.
    key = str(sorted((name, value) for name, value in first.config.items() if not name.startswith("_")))
    if key not in steps:
        steps[key] = [tracing.step(first, size, networks.preset.tokens, conditions) for size in sizes]
    before = [tracing.condition(stage, channels, side, scanner=bool(networks.scanners)) for side in BUCKETS]
    parts = {}
    for label in LESION_CLASSES:
        unet = networks.denoisers[f"{stage}-{label}"]
        for name, size, step, known in zip(graphs_of(f"{stage}-{label}"), sizes, steps[key], before, strict=True):
            update = tracing.update(unet.spectrum, channels, size, size, conditions=conditions)
            weighted = with_weights(step, denoiser_weights(unet))
            parts[name] = _part(weighted, stage, label, networks, known, update)
    return parts


def painter_graphs(networks: Networks) -> dict[str, dict[str, Any]]:
    """What a bundle records of Stable Diffusion's graphs before they are there: inputs, adapter, fresh noise."""
    painter = networks.denoisers[ADAPTERS[0]]
    found: dict[str, dict[str, Any]] = {}
    for number, adapter in enumerate(ADAPTERS):
        record: dict[str, Any] = {
            "inputs": ["noise", "tokens", "keep", "known", "painted", "mask", "edit", "ring", "adapter"],
            "constants": {"adapter": [float(k == number) for k in range(len(ADAPTERS))]},
        }
        if painter.spectrum.fresh_noise:
            record["fresh"] = max(networks.steps[stage] for stage in PAINTING)
            record["inputs"].append("fresh")
        found |= dict.fromkeys(graphs_of(adapter), record)
    return found


def _painter(tracing: Tracer, networks: Networks, loop: str) -> Component:
    """One graph for both stages, all classes and windows."""
    painter, channels, side = networks.denoisers[ADAPTERS[0]], networks.channels, networks.shown_at or RESOLUTION
    cells = side // LATENT_FACTOR
    step = tracing.painter_step(networks, (channels, MASK_CHANNELS, 1))
    fresh = painter.spectrum.fresh_noise > 0
    update = tracing.update(painter.spectrum, channels, cells, cells, fresh=fresh)
    before = tracing.condition(PAINTER, channels, side)
    tables = [painter.solver_steps(networks.steps[name.partition("-")[0]]) for name in ADAPTERS]

    def finish(evaluation: ModelProto, loop: str) -> ModelProto:
        return with_solver(
            evaluation, tables, None, loop=loop, name=PAINTER, output="latents", update=update, before=before
        )

    part, constants = Part(step, finish, before, None, update), painter_graphs(networks)
    return Component(PAINTER, dict.fromkeys(constants, part), loop, {n: r["constants"] for n, r in constants.items()})


def _part(
    step: ModelProto,
    stage: str,
    label: str,
    networks: Networks,
    before: ModelProto,
    update: ModelProto,
    after: ModelProto | None = None,
    start: float | None = None,
) -> Part:
    def finish(evaluation: ModelProto, loop: str) -> ModelProto:
        return with_solver(
            evaluation,
            [solver_steps(stage, networks.steps[stage], 1.0 if start is None else start)],
            CLASSES.index(label),
            loop=loop,
            name=stage if label == "normal" else f"{stage}-{label}",
            output="latents" if after is None else "distance",
            update=update,
            before=before,
            after=after,
            start=start,
        )

    return Part(step, finish, before, after, update)


def denoiser_weights(unet: ModelMixin) -> dict[str, TensorProto]:
    """What training changes, as a traced evaluation has it; buffers (stage 1's outline space) are no part of that."""
    names = ((f"velocity.unet.{name}", value) for name, value in unet.named_parameters())
    return {name: weight(name, value) for name, value in names}
